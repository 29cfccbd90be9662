"""A transfer that was cut off goes on from what is durable, where that is proven to be of the same image; else anew."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hostagent import client
from hostagent.errors import AgentError
from tests.client.model import TICKET, Model
from tests.client.test_model_server import MIB, QUICK

SIZE = 4 * MIB
SLOW = replace(QUICK, bandwidth=8 * MIB, workers=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(2).randbytes(SIZE))
    return path


class Cut(Exception):
    """Stands for a kill: nothing that the transfer would do at its end in good order is relied upon."""


def after(number: int) -> Callable[[client.Progress], None]:
    def show(progress: client.Progress) -> None:
        if progress.done >= number and progress.state == "running":
            raise Cut

    return show


def cut_upload(source: Path, model: Model, options: client.Options = SLOW) -> None:
    with pytest.raises(Cut):
        client.upload(client.Upload(str(source), model.url), options, show=after(SIZE // 2))


def cut_download(model: Model, path: Path, options: client.Options = SLOW) -> None:
    with pytest.raises(Cut):
        client.download(client.Download(model.url, str(path)), options, show=after(SIZE // 2))


def journal(path: Path) -> Path:
    return path.with_name(path.name + ".hostagent-resume")


def test_an_upload_goes_on_from_what_was_flushed(source: Path) -> None:
    with Model(SIZE) as model:
        cut_upload(source, model)
        assert TICKET not in journal(source).read_text()
        assert journal(source).stat().st_mode & 0o777 == 0o600
        found = client.upload(client.Upload(str(source), model.url), QUICK)
        assert found.resumed >= SIZE // 8
        assert found.moved == SIZE - found.resumed
        assert bytes(model.durable) == source.read_bytes()
        assert not journal(source).exists()


def test_what_was_sent_and_not_flushed_does_not_count(source: Path) -> None:
    with Model(SIZE) as model:
        cut_upload(source, model, replace(SLOW, flush_interval=60))
        found = client.upload(client.Upload(str(source), model.url), QUICK)
        assert found.resumed == 0
        assert bytes(model.durable) == source.read_bytes()


def test_a_download_goes_on_from_what_is_on_disk(source: Path, tmp_path: Path) -> None:
    with Model(SIZE, durable=bytearray(source.read_bytes())) as model:
        out = tmp_path / "out.raw"
        cut_download(model, out)
        assert not out.exists()
        assert (tmp_path / "out.raw.part").exists()
        found = client.download(client.Download(model.url, str(out)), QUICK)
        assert found.resumed >= SIZE // 8
        assert found.moved == SIZE - found.resumed
        assert out.read_bytes() == source.read_bytes()
        assert {path.name for path in tmp_path.iterdir()} == {"disk.raw", "out.raw"}


def test_what_was_fetched_is_not_fetched_again(source: Path, tmp_path: Path) -> None:
    """Proven by the bytes: the server has others now, and where the journal says durable the old ones stay."""
    with Model(SIZE, durable=bytearray(source.read_bytes())) as model:
        out = tmp_path / "out.raw"
        cut_download(model, out)
        model.durable[:] = bytes(b ^ 0xFF for b in source.read_bytes())
        found = client.download(client.Download(model.url, str(out)), QUICK)
        old = sum(a == b for a, b in zip(out.read_bytes(), source.read_bytes(), strict=True))
        assert old == found.resumed


def changed_source(source: Path, model: Model) -> None:
    data = bytearray(source.read_bytes())
    data[100] ^= 0xFF
    source.write_bytes(data)


def replaced_source(source: Path, model: Model) -> None:
    other = source.with_name("other")
    other.write_bytes(source.read_bytes()[::-1])
    os.utime(other, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
    other.rename(source)


def other_generation(source: Path, model: Model) -> None:
    model.etag = "two"
    model.durable[:] = b"y" * SIZE


@pytest.mark.parametrize("change", [changed_source, replaced_source, other_generation])
def test_an_upload_of_something_else_starts_over_and_says_why(
    source: Path, change: Callable[[Path, Model], None]
) -> None:
    with Model(SIZE, etag="one") as model:
        cut_upload(source, model)
        change(source, model)
        told: list[str] = []
        found = client.upload(client.Upload(str(source), model.url), QUICK, tell=told.append)
        assert found.resumed == 0
        assert bytes(model.durable) == source.read_bytes()
        assert any("starting over" in line for line in told), told


def test_an_upload_with_another_ticket_starts_over_unless_it_is_trusted(source: Path) -> None:
    """Another ticket may lead to another image, of which nothing was written yet."""
    with Model(SIZE) as model:
        cut_upload(source, model)
        kept = journal(source).read_bytes()
        model.durable[:] = b"y" * SIZE
        told: list[str] = []
        found = client.upload(client.Upload(str(source), f"{model.url}2"), QUICK, tell=told.append)
        assert (found.resumed, bytes(model.durable)) == (0, source.read_bytes())
        assert any("another ticket" in line for line in told), told
        journal(source).write_bytes(kept)
        trusted = client.upload(client.Upload(str(source), f"{model.url}3"), replace(QUICK, resume="trust"))
        assert trusted.resumed > 0
        journal(source).write_bytes(kept)
        never = client.upload(client.Upload(str(source), model.url), replace(QUICK, resume="never"))
        assert never.resumed == 0


def test_a_download_of_another_image_starts_over(source: Path, tmp_path: Path) -> None:
    with Model(SIZE, durable=bytearray(source.read_bytes()), etag="one") as model:
        out = tmp_path / "out.raw"
        cut_download(model, out)
        model.etag = "two"
        model.durable[:] = source.read_bytes()[::-1]
        told: list[str] = []
        client.download(client.Download(model.url, str(out)), QUICK, tell=told.append)
        assert out.read_bytes() == bytes(model.durable)
        assert any("starting over" in line for line in told), told


def test_a_part_that_is_not_ours_is_left_alone(source: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "out.raw", tmp_path / "out.raw.part"
    part.write_text("somebody's")
    with Model(SIZE) as model, pytest.raises(AgentError) as refused:
        client.download(client.Download(model.url, str(out)), QUICK)
    assert refused.value.code == "conflict"
    assert part.read_text() == "somebody's"


def test_a_file_that_is_there_is_not_replaced_unless_it_was_said(source: Path, tmp_path: Path) -> None:
    with Model(SIZE, durable=bytearray(source.read_bytes())) as model:
        out = tmp_path / "out.raw"
        out.write_text("precious")
        with pytest.raises(AgentError) as refused:
            client.download(client.Download(model.url, str(out)), QUICK)
        assert refused.value.code == "conflict"
        assert out.read_text() == "precious"
        client.download(client.Download(model.url, str(out), force=True), QUICK)
        assert out.read_bytes() == source.read_bytes()


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.raw"

    def show(progress: client.Progress) -> None:
        if progress.done and not out.exists():
            out.write_text("precious")

    with Model(SIZE, durable=bytearray(source.read_bytes())) as model, pytest.raises(AgentError) as refused:
        client.download(client.Download(model.url, str(out)), QUICK, show=show)
    assert refused.value.code == "conflict"
    assert out.read_text() == "precious"
    assert (tmp_path / "out.raw.part").read_bytes() == source.read_bytes()


def test_a_journal_that_is_somebody_elses_file_is_left_alone(source: Path) -> None:
    journal(source).write_text("dear diary\n")
    with Model(SIZE) as model, pytest.raises(AgentError) as refused:
        client.upload(client.Upload(str(source), model.url), QUICK)
    assert refused.value.code == "conflict"
    assert journal(source).read_text() == "dear diary\n"


def test_two_downloads_into_one_file_do_not_meet(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    refusals: list[str] = []

    def second(progress: client.Progress) -> None:
        if progress.done and not refusals:
            with pytest.raises(AgentError) as refused:
                client.download(client.Download(model.url, str(out)), QUICK)
            refusals.append(refused.value.code)

    with Model(SIZE, durable=bytearray(source.read_bytes())) as model:
        client.download(client.Download(model.url, str(out)), SLOW, show=second)
    assert refusals == ["busy"]
    assert out.read_bytes() == source.read_bytes()


def test_a_second_upload_of_the_file_goes_without_a_journal(source: Path) -> None:
    told: list[str] = []
    with Model(SIZE) as first, Model(SIZE) as other:

        def second(progress: client.Progress) -> None:
            if progress.done and not told:
                client.upload(client.Upload(str(source), other.url), QUICK, tell=told.append)

        client.upload(client.Upload(str(source), first.url), SLOW, show=second)
        assert bytes(first.durable) == bytes(other.durable) == source.read_bytes()
    assert any("no journal" in line for line in told), told


def test_a_file_that_is_written_meanwhile_is_no_success(source: Path) -> None:
    def show(progress: client.Progress) -> None:
        if progress.done:
            with source.open("r+b") as file:
                file.write(b"changed")

    with Model(SIZE) as model, pytest.raises(AgentError) as refused:
        client.upload(client.Upload(str(source), model.url), SLOW, show=show)
    assert refused.value.code == "image_changed"


def test_a_journal_that_was_cut_off_anywhere_counts_for_no_more_than_it_says(source: Path) -> None:
    """A crash leaves any beginning of it: each is a smaller journal, or none."""
    with Model(SIZE) as model:
        cut_upload(source, model)
        whole = journal(source).read_bytes()
        durable = bytes(model.durable)
    assert whole.count(b"\n") > 2
    for end in sorted({*range(0, len(whole), 97), len(whole) - 1}):
        if whole[:end].count(b"\n") == 0 and end:
            continue  # not even its head: said to be no journal, and looked at by a person
        journal(source).write_bytes(whole[:end])
        with Model(SIZE, durable=bytearray(durable)) as again:
            url = again.url
            found = client.upload(client.Upload(str(source), url), replace(QUICK, request_size=2 * MIB))
            assert bytes(again.durable) == source.read_bytes()
            assert found.resumed <= SIZE


def test_an_image_that_differs_after_all_is_said_loudly(source: Path, tmp_path: Path) -> None:
    """The server tells of zeros where it has data: only the checksum shows it."""
    wrong = [{"start": 0, "length": SIZE, "zero": True}]
    out = tmp_path / "out.raw"
    with Model(SIZE, durable=bytearray(source.read_bytes()), extents=wrong) as model:
        model.checksum = checksum_of(source.read_bytes())
        with pytest.raises(AgentError) as refused:
            client.download(client.Download(model.url, str(out)), replace(QUICK, verify=True))
        assert refused.value.code == "mismatch"
        assert "DIFFER" in refused.value.message
        assert {path.name for path in tmp_path.iterdir()} == {"disk.raw"}, "nobody shall go on from there"
        with pytest.raises(AgentError) as refused:
            model.checksum = checksum_of(b"other")
            client.upload(client.Upload(str(source), model.url), replace(QUICK, verify=True))
        assert refused.value.code == "mismatch"


def checksum_of(data: bytes) -> dict[str, Any]:
    """By the definition, the slow way."""
    import hashlib

    outer = hashlib.blake2b(digest_size=32)
    for at in range(0, len(data), 4 * MIB):
        outer.update(hashlib.blake2b(data[at : at + 4 * MIB], digest_size=32).digest())
    return {"algorithm": "blake2b", "block_size": 4 * MIB, "checksum": outer.hexdigest()}


def test_both_sides_checksum_agrees_when_the_bytes_do(source: Path, tmp_path: Path) -> None:
    with Model(SIZE, durable=bytearray(source.read_bytes())) as model:
        model.checksum = checksum_of(source.read_bytes())
        found = client.download(client.Download(model.url, str(tmp_path / "o.raw")), replace(QUICK, verify=True))
    assert found.checksum is not None
    assert found.checksum.checksum == model.checksum["checksum"]


def test_a_journal_of_another_user_says_nothing(source: Path) -> None:
    """Who can write beside the file could say of anything that it is there already."""
    if os.geteuid() != 0:
        pytest.skip("only root can make another user's file")
    with Model(SIZE) as model:
        cut_upload(source, model)
        os.chown(journal(source), 65534, 65534)
        with pytest.raises(AgentError) as refused:
            client.upload(client.Upload(str(source), model.url), QUICK)
    assert refused.value.code == "conflict"


def test_what_is_no_file_is_no_journal(source: Path) -> None:
    with Model(SIZE) as model, pytest.raises(AgentError) as refused:
        client.upload(client.Upload(str(source), model.url), replace(SLOW, journal="/dev/null"))
    assert refused.value.code == "conflict"
