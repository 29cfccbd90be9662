"""Transfers against a server that fails in every way it may, and forgets what was not flushed."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hostagent import client
from hostagent.errors import AgentError
from tests.client.model import ALL, TICKET, Model

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * MIB + 512
QUICK = client.Options(
    workers=3,
    request_size=64 * KIB,
    flush_interval=0.1,
    patience=client.Patience(retry_wait=0.005, retry_wait_max=0.02, retry_for=20, silence=10, first_contact=0.5),
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Data, zeros, data, and an end that is no whole block."""
    path = tmp_path / "disk.raw"
    rng = random.Random(1)
    path.write_bytes(rng.randbytes(MIB) + bytes(MIB) + rng.randbytes(SIZE - 2 * MIB))
    with path.open("r+b") as file:
        hole = rng.randbytes(MIB)
        file.truncate(0)
        file.write(hole)
        file.seek(2 * MIB)
        file.write(rng.randbytes(SIZE - 2 * MIB))
    return path


def sent(source: Path, model: Model, options: client.Options = QUICK, **more: object) -> client.Result:
    return client.upload(client.Upload(str(source), model.url, **more), options)  # type: ignore[arg-type]


def fetched(model: Model, path: Path, options: client.Options = QUICK, **more: object) -> client.Result:
    return client.download(client.Download(model.url, str(path), **more), options)  # type: ignore[arg-type]


def remains(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_sent_is_there_and_flushed(source: Path) -> None:
    with Model(SIZE, durable=bytearray(b"x" * SIZE)) as model:
        found = sent(source, model)
        assert bytes(model.durable) == source.read_bytes()
        assert (found.size, found.workers, found.retries, found.resumed) == (SIZE, 3, 0, 0)
        assert found.moved == SIZE - MIB
        assert model.count("PATCH") >= 2, "zeros go without their bytes"
        assert remains(source.parent) == {"disk.raw"}


@pytest.mark.parametrize("missing", ["flush", "zero", "extents", "all"])
def test_a_server_that_knows_less_gets_the_same_bytes(source: Path, missing: str, tmp_path: Path) -> None:
    features = () if missing == "all" else tuple(name for name in ALL if name != missing)
    with Model(SIZE, features=features, durable=bytearray(b"x" * SIZE)) as model:
        sent(source, model)
        assert bytes(model.durable) == source.read_bytes()
        fetched(model, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("status", [204, 405])
def test_a_server_without_options_gets_one_connection_and_nothing_special(
    source: Path, status: int, tmp_path: Path
) -> None:
    with Model(SIZE, options_status=status) as model:
        assert sent(source, model).workers == 1
        assert bytes(model.durable) == source.read_bytes()
        assert model.count("PATCH") == 0
        assert fetched(model, tmp_path / "out.raw").workers == 1
        assert (tmp_path / "out.raw").read_bytes() == source.read_bytes()


def test_a_server_that_ends_each_connection_has_each_request_flushed(source: Path, tmp_path: Path) -> None:
    with Model(SIZE, closes=True) as model:
        sent(source, model)
        assert bytes(model.durable) == source.read_bytes()
        assert fetched(model, tmp_path / "out.raw").retries == 0, "nothing is lost by it"
        assert (tmp_path / "out.raw").read_bytes() == source.read_bytes()


def test_no_more_connections_than_the_server_has(source: Path) -> None:
    with Model(SIZE, workers=2) as model:
        assert sent(source, model, replace(QUICK, workers=8)).workers == 2


@pytest.mark.parametrize("seed", range(12))
def test_an_upload_survives_any_faults(source: Path, seed: int) -> None:
    """What a connection had not flushed is lost with it: only who sends it again ends with the same bytes."""
    with Model(SIZE, fault=faulty(seed), durable=bytearray(b"x" * SIZE)) as model:
        found = sent(source, model)
        assert bytes(model.durable) == source.read_bytes()
        assert found.retries > 0
        assert found.moved >= SIZE - MIB


@pytest.mark.parametrize("seed", range(8))
def test_a_download_survives_any_faults(source: Path, seed: int, tmp_path: Path) -> None:
    with Model(SIZE, fault=faulty(seed), durable=bytearray(source.read_bytes())) as model:
        found = fetched(model, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == source.read_bytes()
        assert found.retries > 0
        assert remains(tmp_path) == {"disk.raw", "out.raw"}


def faulty(seed: int) -> Callable[[str, int], object]:
    rng = random.Random(seed)

    def fault(request: str, number: int) -> object:
        if request.startswith("OPTIONS"):
            return None
        return rng.choice(["before", "after", "half", 502, 503, 504, 429, 408]) if rng.random() < 0.25 else None

    return fault


def test_a_download_goes_on_within_a_request(source: Path, tmp_path: Path) -> None:
    """What came of a piece before the connection broke is not fetched again."""
    with Model(SIZE, fault=lambda request, number: "half" if number == 4 else None) as model:
        model.durable[:] = source.read_bytes()
        found = fetched(model, tmp_path / "out.raw", replace(QUICK, workers=1, request_size=2 * MIB))
        assert found.retries == 1
        assert found.moved == SIZE


@pytest.mark.parametrize("status", [400, 403, 404, 416, 500, 507])
def test_what_is_refused_for_good_is_not_tried_again(source: Path, status: int, tmp_path: Path) -> None:
    codes = {400: "invalid", 403: "denied", 404: "not_found", 416: "range", 500: "io_error", 507: "no_space"}
    with Model(SIZE, fault=lambda request, number: status if not request.startswith("OPTIONS") else None) as model:
        for call in (lambda: sent(source, model), lambda: fetched(model, tmp_path / "out.raw")):
            with pytest.raises(AgentError) as refused:
                call()
            assert refused.value.code == codes[status]
            assert TICKET not in refused.value.message
            assert str(status) in refused.value.message
        assert model.count("PUT") <= 3
        assert not (tmp_path / "out.raw").exists(), "a name that looks whole"


def test_a_server_that_stays_away_is_given_up(source: Path) -> None:
    patience = replace(QUICK.patience, retry_for=0.3)
    with Model(SIZE, fault=lambda request, number: 503 if number > 3 else None) as model:
        with pytest.raises(AgentError) as refused:
            sent(source, model, replace(QUICK, patience=patience))
        assert refused.value.code == "unavailable"
        assert "given up after" in refused.value.message


def test_a_server_that_fails_at_every_flush_is_given_up(source: Path) -> None:
    """Sending it again and again is no progress."""
    patience = replace(QUICK.patience, retry_for=0.5)

    def fault(request: str, number: int) -> object:
        return "before" if request.startswith("PATCH") else None

    with Model(SIZE, fault=fault, features=("flush",)) as model, pytest.raises(AgentError, match="given up"):
        sent(source, model, replace(QUICK, patience=patience))


def test_an_image_that_was_replaced_meanwhile_is_sent_anew(source: Path) -> None:
    with Model(SIZE, etag="one") as model:
        told: list[str] = []

        def fault(request: str, number: int) -> object:
            if number == 12:
                model.etag = "two"
                with model.lock:
                    model.durable[:] = b"y" * SIZE
            return None

        model.fault = fault
        client.upload(client.Upload(str(source), model.url), QUICK, tell=told.append)
        assert bytes(model.durable) == source.read_bytes()
        assert any("starting over" in line for line in told), told


def test_an_answer_with_other_bytes_is_not_taken(source: Path, tmp_path: Path) -> None:
    with Model(SIZE, partial=False) as model, pytest.raises(AgentError, match="when it was asked for"):
        fetched(model, tmp_path / "out.raw")


def test_a_smaller_image_on_the_server_is_refused_before_a_byte_is_sent(source: Path) -> None:
    with Model(MIB) as model:
        with pytest.raises(AgentError) as refused:
            sent(source, model)
        assert refused.value.code == "too_large"
        assert model.count("PUT") == 0


def test_what_the_server_has_beyond_the_file_becomes_zeros(source: Path) -> None:
    size = SIZE + 3 * MIB
    with Model(size, durable=bytearray(b"x" * size)) as model:
        sent(source, model)
        assert bytes(model.durable) == source.read_bytes() + bytes(3 * MIB)


def test_a_target_that_is_zero_is_not_zeroed(source: Path) -> None:
    with Model(SIZE) as model:
        sent(source, model, target_is_zero=True)
        assert bytes(model.durable) == source.read_bytes()
        assert all("flush" in line or line.startswith(("PUT", "OPTIONS")) or "PATCH" in line for line in model.log)


def test_progress_never_goes_back_and_ends_at_the_size(source: Path) -> None:
    seen: list[client.Progress] = []
    with Model(SIZE, fault=faulty(3)) as model:
        client.upload(client.Upload(str(source), model.url), QUICK, show=seen.append)
    done = [one.done for one in seen if one.size]
    assert done == sorted(done)
    assert done[-1] == SIZE


@pytest.mark.parametrize("direction", ["up", "down"])
def test_the_bandwidth_is_kept_and_used(source: Path, tmp_path: Path, direction: str) -> None:
    with Model(SIZE, durable=bytearray(source.read_bytes())) as model:
        options = replace(QUICK, bandwidth=4 * MIB)
        found = sent(source, model, options) if direction == "up" else fetched(model, tmp_path / "out.raw", options)
        assert found.moved / found.seconds <= 4.6 * MIB
        assert found.moved / found.seconds >= MIB


def test_extents_with_gaps_are_refused(tmp_path: Path) -> None:
    gap = [{"start": 0, "length": MIB, "zero": False}, {"start": 2 * MIB, "length": SIZE - 2 * MIB, "zero": True}]
    with Model(SIZE, extents=gap) as model, pytest.raises(AgentError, match="gap"):
        fetched(model, tmp_path / "out.raw")


def test_extents_that_end_early_are_refused(tmp_path: Path) -> None:
    with Model(SIZE, extents=[{"start": 0, "length": MIB, "zero": False}]) as model:
        with pytest.raises(AgentError, match="tells of"):
            fetched(model, tmp_path / "out.raw")
        assert not (tmp_path / "out.raw").exists()


def test_zeros_that_no_extent_tells_of_take_no_space(source: Path, tmp_path: Path) -> None:
    with Model(SIZE) as model:
        model.durable[:MIB] = source.read_bytes()[:MIB]
        fetched(model, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == bytes(model.durable)
        assert (tmp_path / "out.raw").stat().st_blocks * 512 <= MIB + 64 * KIB


def test_a_proxy_is_used_when_the_server_is_out_of_reach(source: Path) -> None:
    with Model(SIZE) as model:
        url = model.url.replace("127.0.0.1", "127.0.0.2").replace(str(model.server.server_address[1]), "1")
        options = replace(QUICK, proxy=model.url.removesuffix(f"/images/{TICKET}"))
        client.upload(client.Upload(str(source), url), options)
        assert bytes(model.durable) == source.read_bytes()


def test_only_the_proxy_is_used_when_that_was_said(source: Path) -> None:
    with Model(SIZE) as direct, Model(SIZE) as proxy:
        options = replace(QUICK, proxy=proxy.url, proxy_only=True)
        client.upload(client.Upload(str(source), direct.url), options)
        assert bytes(proxy.durable) == source.read_bytes()
        assert direct.connections == 0


def test_a_server_that_is_not_there_is_said_soon(source: Path) -> None:
    with pytest.raises(AgentError) as refused:
        client.upload(client.Upload(str(source), f"http://127.0.0.1:1/images/{TICKET}"), QUICK)
    assert refused.value.code == "unreachable"
    assert "http://127.0.0.1:1" in refused.value.message
    assert TICKET not in refused.value.message


class Trap:
    """A unix socket that counts who comes."""

    def __init__(self, path: Path) -> None:
        self.path, self.came = str(path), 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self.came += 1
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
            connection.close()


def test_another_hosts_socket_is_not_looked_for_here(source: Path, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "s")
    with Model(SIZE, unix_socket=trap.path, host="127.0.0.2") as model:
        sent(source, model)
        assert bytes(model.durable) == source.read_bytes()
    assert trap.came == 0, "who has the ticket's id has the image"


@pytest.mark.parametrize("there", [True, False])
def test_a_socket_that_does_not_serve_the_ticket_is_done_without(source: Path, tmp_path: Path, there: bool) -> None:
    path = Trap(tmp_path / "s").path if there else "\0hostagent-nobody-listens"
    with Model(SIZE, unix_socket=path) as model:
        assert sent(source, model).server.startswith("http://127.0.0.1")
        assert bytes(model.durable) == source.read_bytes()


def test_a_strange_etag_is_not_sent_back(source: Path) -> None:
    with Model(SIZE, etag="a\r\nX: y", fault=lambda request, number: None) as model:
        found = client.info(model.url, QUICK)
    assert found["etag"] == ""
