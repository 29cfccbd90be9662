"""What servers offer, asked of real ones without using them up."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.errors import AgentError
from hostagent.nbdclient.offer import Offer, ask
from tests.harness import MIB, stand_still
from tests.qemu.faults import PATIENCE, eventually, listens
from tests.qemu.remote_storage import needs_nbdkit

WAIT = 10.0


@pytest.fixture
def where() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nbd-") as folder:
        yield Path(folder)


def unix(path: Path) -> dict[str, str]:
    return {"type": "unix", "path": str(path)}


@contextlib.contextmanager
def served(where: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        assert eventually(lambda: listens(where / "s"))
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(PATIENCE)


def refusal(server: dict[str, str], export: str = "", timeout: float = WAIT) -> AgentError:
    with pytest.raises(AgentError) as refused:
        ask(server, export, timeout)
    return refused.value


@pytest.mark.parametrize("read_only", [False, True])
def test_a_server_for_one_client_waits_for_him_after_it_was_asked(where: Path, read_only: bool) -> None:
    with (where / "image").open("wb") as file:
        file.truncate(3 * MIB)
    options = ["-r"] if read_only else []
    command = ["qemu-nbd", *options, "-f", "raw", "-k", str(where / "s"), "-x", "vol1", str(where / "image")]
    with served(where, *command) as server:
        for _ in range(2):
            assert ask(unix(where / "s"), "vol1", WAIT) == Offer(3 * MIB, read_only)
        assert refusal(unix(where / "s"), "vol2").code == "not_found"
        uri = f"nbd+unix:///vol1?socket={where / 's'}"
        assert subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True).stdout.strip() == str(3 * MIB)
        assert server.wait(PATIENCE) == 0, "that was its client"


@needs_nbdkit
def test_a_server_without_a_handshake_says_it_by_serving(where: Path) -> None:
    with served(where, "nbdkit", "-f", "-o", "-U", str(where / "s"), "null", str(MIB)):
        assert ask(unix(where / "s"), "", WAIT) == Offer(MIB, read_only=False)


@needs_nbdkit
def test_a_silent_server_is_given_up(where: Path) -> None:
    with served(where, "nbdkit", "-f", "-U", str(where / "s"), "null", str(MIB)) as server:
        stand_still(server.pid)
        assert refusal(unix(where / "s"), timeout=0.3).code == "timeout"


def test_who_is_no_server_is_unavailable(where: Path) -> None:
    assert refusal(unix(where / "s")).code == "unavailable"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        threading.Thread(target=_answers_nonsense, args=(taken,), daemon=True).start()
        error = refusal({"type": "inet", "host": "localhost", "port": port})
        assert error.code == "unavailable" and "magic" in error.message
    error = refusal({"type": "inet", "host": "127.0.0.1", "port": port})
    assert error.code == "unavailable" and "refused" in error.message
    assert refusal({"type": "inet", "host": "no.such.host.invalid", "port": "10809"}).code == "unavailable"


def _answers_nonsense(listener: socket.socket) -> None:
    one, _ = listener.accept()
    with one:
        one.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
