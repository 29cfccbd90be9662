"""The commands as processes: killed, interrupted, cut off, and looked at by others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent.cli.main import main
from tests.client.images import MIB, new_qcow2, run
from tests.client.images import SIZE as WHOLE
from tests.client.relay import Relay
from tests.data.daemons import Daemon, Ours
from tests.data.exports import QemuNbd

Start = Callable[..., "subprocess.Popen[str]"]
SIZE = 6 * MIB
SLOW = ("--bandwidth", "4MiB/s", "--flush-interval", "0.1", "--request-size", "64K", "--workers", "2")
PATIENCE = 60.0


only_ours = pytest.mark.parametrize("daemon", [Ours], indirect=True)
"""Where the daemon makes no difference."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[QemuNbd]:
    with QemuNbd(new_qcow2(tmp_path / "target.qcow2", SIZE), "qcow2") as nbd:
        yield nbd


def to(daemon: Daemon) -> list[str]:
    return ["--cafile", str(daemon.cafile)]


def until_durable(journal: Path, process: subprocess.Popen[str], least: int = MIB) -> int:
    """Wait until so many bytes stand in the journal."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        lines = journal.read_text().splitlines()[1:] if journal.exists() else []
        total = sum(end - begin for line in lines for begin, end in parsed(line))
        if total >= least:
            assert process.poll() is None, process.communicate()
            return total
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("nothing became durable")


def parsed(line: str) -> list[list[int]]:
    try:
        return list(json.loads(line)["durable"])
    except ValueError:
        return []


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, (out, err)
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(SIZE - MIB) + bytes(MIB))
    return path


def test_an_upload_that_was_killed_goes_on(source: Path, daemon: Daemon, server: QemuNbd, start: Start) -> None:
    url = daemon.url(daemon.ticket(server.url, SIZE, "read", "write"))
    first = start("upload", source, url, *to(daemon), *SLOW)
    until_durable(Path(f"{source}.hostagent-resume"), first)
    first.kill()
    first.wait()
    found = finished(start("upload", source, url, *to(daemon), "--json", "--verify"))
    assert MIB <= found["resumed"] < SIZE
    assert found["moved"] <= SIZE - found["resumed"]
    server.kill()
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, server.image)


@pytest.mark.parametrize("name", ["out.raw", "out.qcow2"])
def test_a_download_that_was_killed_goes_on(
    source: Path, tmp_path: Path, daemon: Daemon, start: Start, name: str
) -> None:
    """Its storage daemon, where it has one, ends with it; what it said to be durable is there."""
    out = tmp_path / name
    url = daemon.url(daemon.ticket(f"file://{source}", SIZE))
    first = start("download", url, out, *to(daemon), *SLOW)
    until_durable(out.with_name(f"{name}.hostagent-resume"), first)
    helpers = children(first.pid)
    assert bool(helpers) == name.endswith("qcow2")
    first.kill()
    first.wait()
    assert not out.exists()
    assert all(gone(pid) for pid in helpers)
    found = finished(start("download", url, out, *to(daemon), "--json", "--verify"))
    assert MIB <= found["resumed"] < SIZE
    run("qemu-img", "compare", "-f", "raw", "-F", name.rpartition(".")[2], source, out)
    assert {path.name for path in tmp_path.iterdir()} == {"disk.raw", name}


@pytest.mark.parametrize("direction", ["upload", "download"])
def test_a_server_that_was_killed_and_came_back_is_gone_on_with(
    source: Path, tmp_path: Path, daemon: Daemon, server: QemuNbd, start: Start, direction: str
) -> None:
    """With the same ticket, as its owner gives it again."""
    ticket = daemon.ticket(server.url if direction == "upload" else f"file://{source}", SIZE, "read", "write")
    given = {name: daemon.show(ticket)[name] for name in ("uuid", "url", "size", "ops", "timeout")}
    out = tmp_path / "out.raw"
    with Relay(daemon.port) as relay:
        url = f"https://127.0.0.1:{relay.port}/images/{ticket}"
        words = ["upload", source, url] if direction == "upload" else ["download", url, out]
        process = start(*words, *to(daemon), *SLOW, "--no-local", "--json", "--verify")
        until_durable(Path(f"{words[1] if direction == 'upload' else out}.hostagent-resume"), process)
        relay.open = False  # or who comes before the ticket is there is told 403, for good
        daemon.kill()
        daemon.start()
        assert daemon.put(given).status in (200, 201)
        relay.open = True
        found = finished(process)
    assert found["retries"] > 0 or daemon.name == "ours"  # which says that the ticket is another one, and all is sent
    if direction == "upload":
        server.kill()
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, server.image)
    else:
        assert out.read_bytes() == source.read_bytes()


def test_a_line_that_is_cut_again_and_again_is_gone_on_with(
    source: Path, daemon: Daemon, server: QemuNbd, start: Start
) -> None:
    ticket = daemon.ticket(server.url, SIZE, "read", "write")
    with Relay(daemon.port) as relay:
        url = f"https://127.0.0.1:{relay.port}/images/{ticket}"
        process = start("upload", source, url, *to(daemon), *SLOW, "--no-local", "--json")
        for number in range(1, 4):
            until_durable(Path(f"{source}.hostagent-resume"), process, number * MIB)
            relay.cut()
        found = finished(process)
    assert found["retries"] >= 3
    assert found["moved"] < 2 * SIZE, "what was flushed is not sent again"
    server.kill()
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, server.image)


@only_ours
def test_interrupted_it_stops_and_says_how_to_go_on(
    source: Path, daemon: Daemon, server: QemuNbd, start: Start
) -> None:
    url = daemon.url(daemon.ticket(server.url, SIZE, "read", "write"))
    process = start("upload", source, url, *to(daemon), *SLOW)
    until_durable(Path(f"{source}.hostagent-resume"), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, (out, err)
    assert "goes on from here" in err
    assert "Traceback" not in err
    found = finished(start("upload", source, url, *to(daemon), "--json"))
    assert found["resumed"] >= MIB


@only_ours
def test_a_tickets_id_is_seen_nowhere(
    source: Path, tmp_path: Path, daemon: Daemon, server: QemuNbd, start: Start
) -> None:
    """Not in the process list, in what is said, or in what is written down."""
    ticket = daemon.ticket(server.url, SIZE, "read", "write")
    (tmp_path / "url").write_text(daemon.url(ticket) + "\n")
    process = start("upload", source, f"@{tmp_path / 'url'}", *to(daemon), *SLOW, "--progress=json", "--json")
    until_durable(Path(f"{source}.hostagent-resume"), process)
    assert ticket not in subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    assert ticket not in Path(f"{source}.hostagent-resume").read_text()
    assert daemon.delete(ticket).status == 204
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 7, (out, err)
    assert ticket not in out + err
    assert "403" in err
    assert "ask for a new one" in err


@only_ours
def test_a_url_may_come_on_stdin(source: Path, daemon: Daemon, start: Start) -> None:
    ticket = daemon.ticket(f"file://{source}", SIZE)
    process = start("checksum", "-", *to(daemon), "--json")
    out, err = process.communicate(daemon.url(ticket) + "\n", timeout=PATIENCE)
    assert process.returncode == 0, err
    theirs = json.loads(out)
    assert theirs == finished(start("checksum", source, "--json"))


@only_ours
def test_progress_is_one_object_a_line(source: Path, daemon: Daemon, server: QemuNbd, start: Start) -> None:
    url = daemon.url(daemon.ticket(server.url, SIZE, "read", "write"))
    process = start("upload", source, url, *to(daemon), "--progress=json", "--json")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines[-1]["cursor"] == {"cur": SIZE, "end": SIZE}
    assert {line["operation"] for line in lines} == {"upload"}
    result = json.loads(out)
    assert (result["operation"], result["path"], result["size"]) == ("upload", str(source), SIZE)


@only_ours
def test_a_map_of_what_the_server_has(home: Path, daemon: Daemon, start: Start) -> None:
    with QemuNbd(home / "top.qcow2", "qcow2", read_only=True) as nbd:
        url = daemon.url(daemon.ticket(nbd.url, WHOLE))
        found = finished(start("image", "map", url, *to(daemon), "--json"))["extents"]
        assert sum(one["length"] for one in found) == WHOLE
        out, _ = start("image", "map", url, *to(daemon)).communicate(timeout=PATIENCE)
        assert re.search(r"START +LENGTH +KIND", out)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["upload", "FILE", "ftp://host/images/x-secret"], 2, "not the URL of a ticket"),
        (["upload", "FILE", "https://host/"], 2, "names no ticket"),
        (["upload", "/nowhere", "http://127.0.0.1:1/images/x-secret"], 3, "does not exist"),
        (["upload", "FILE", "http://127.0.0.1:1/images/x-secret", "--workers", "99"], 2, "workers"),
        (["upload", "FILE", "http://127.0.0.1:1/images/x-secret", "--bandwidth", "50"], 2, "unit"),
        (["download", "http://127.0.0.1:1/images/x-secret", "FILE", "--incremental"], 2, "incremental"),
        (["checksum", "FILE", "--algorithm", "shake_128"], 2, "algorithm"),
        (["download", "http://host.invalid/images/x-secret", "/tmp/nowhere/out.raw"], 8, "not known"),
    ],
)
def test_what_is_wrong_is_said(
    source: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, said: str
) -> None:
    assert main([str(source) if word == "FILE" else word for word in words]) == status
    err = capsys.readouterr().err
    assert said in err
    assert "x-secret" not in err


def children(pid: int) -> list[int]:
    """Processes that it has started, and those that they have become."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except (OSError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False
