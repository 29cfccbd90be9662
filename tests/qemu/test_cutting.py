"""Connections of another process, cut from outside: those to one server, also where a write hangs in one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.drivers import cutting
from tests.qemu.faults import PATIENCE, ROOT, eventually

pytestmark = pytest.mark.skipif(not ROOT, reason="another process's sockets are root's to take")

CLIENT = """
import socket, sys
found = []
for kind, *where in (word.split("=") for word in sys.argv[1:]):
    if kind == "unix":
        one = socket.socket(socket.AF_UNIX)
        one.connect(where[0])
    else:
        one = socket.create_connection((kind, int(where[0])))
    found.append(one)
print("connected", flush=True)
sys.stdin.readline()
try:
    while True:
        found[0].sendall(bytes(65536))
except OSError as error:
    print(error.errno, flush=True)
sys.stdin.readline()
"""


class Client:
    """A process with these connections. It writes to the first until that ends."""

    def __init__(self, *servers: str) -> None:
        command = [sys.executable, "-c", CLIENT, *servers]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.said() == "connected"

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def path() -> Iterator[Path]:
    """A unix socket that listens, and whose owner reads nothing."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:  # their names are short
        listener.bind(f"{folder}/s")
        listener.listen()
        yield Path(folder, "s")


def hangs(pid: int) -> bool:
    return Path(f"/proc/{pid}/wchan").read_text() not in ("", "0") and "S" in Path(f"/proc/{pid}/stat").read_text()


def test_a_writer_that_hangs_in_a_unix_socket_is_let_go(path: Path) -> None:
    client = Client(f"unix={path}")
    try:
        client.write()
        assert eventually(lambda: hangs(client.process.pid))
        wanted = cutting.addresses({"type": "unix", "path": str(path)})
        assert cutting.cut(client.process.pid, cutting.addresses({"type": "unix", "path": "/other"})) == 0
        assert cutting.cut(client.process.pid, wanted) == 1
        assert client.said() == "32", "EPIPE"
    finally:
        client.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_only_the_connections_to_that_server_are_cut(path: Path, host: str) -> None:
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    with socket.create_server((host, 0), family=family) as one, socket.create_server((host, 0), family=family) as two:
        ports = [one.getsockname()[1], two.getsockname()[1]]
        client = Client(f"{host}={ports[0]}", f"{host}={ports[1]}", f"{host}={ports[0]}", f"unix={path}")
        try:
            first, second = one.accept()[0], two.accept()[0]
            server = {"type": "inet", "host": host, "port": str(ports[0])}
            assert cutting.count(client.process.pid, cutting.addresses(server)) == 2
            assert cutting.cut(client.process.pid, cutting.addresses(server)) == 2
            first.settimeout(PATIENCE)
            assert first.recv(1) == b""
            second.settimeout(0.2)
            with pytest.raises(TimeoutError):
                second.recv(1)
            for each in (first, second):
                each.close()
        finally:
            client.close()


def test_who_is_gone_has_no_connections(path: Path) -> None:
    client = Client(f"unix={path}")
    client.close()
    assert cutting.cut(client.process.pid, {str(path)}) == 0
    assert cutting.process_of("4dea22b3-1d52-d8f3-2516-782e98ab3fa0") is None
    assert cutting.addresses({"type": "inet", "host": "no.such.host.invalid", "port": "1"}) == frozenset()
