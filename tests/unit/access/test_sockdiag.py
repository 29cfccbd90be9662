"""Against the kernel: a listener, and clients in processes of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.nbd import sockdiag

CONNECT = (
    "import socket, sys\n"
    "made = []\n"
    "for _ in range(int(sys.argv[2])):\n"
    "    made.append(socket.socket(socket.AF_UNIX)); made[-1].connect(sys.argv[1])\n"
    "print('ready', flush=True)\nsys.stdin.read()"
)


class Server:
    """A listener whose connections are accepted, in this process."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(512)
        self.accepted: list[socket.socket] = []
        self.children: list[subprocess.Popen[str]] = []

    def client(self, connections: int = 1) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", CONNECT, self.path, str(connections)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.children.append(child)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        self.accepted += [self.listener.accept()[0] for _ in range(connections)]
        return child

    def own(self) -> socket.socket:
        mine = socket.socket(socket.AF_UNIX)
        mine.connect(self.path)
        self.accepted.append(self.listener.accept()[0])
        return mine

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.communicate()
        for one in (*self.accepted, self.listener):
            one.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path / "nbd.sock")
    yield one
    one.close()


def test_nobody_is_connected_to_a_fresh_listener_or_to_no_listener(server: Server, tmp_path: Path) -> None:
    assert sockdiag.clients(server.path) == [] and sockdiag.connections(server.path) == 0
    assert sockdiag.clients(str(tmp_path / "absent")) == []


def test_each_connection_is_an_entry_with_its_process(server: Server) -> None:
    children = [server.client(), server.client(), server.client(connections=2)]
    found = sockdiag.clients(server.path)
    expected = sorted([children[0].pid, children[1].pid, children[2].pid, children[2].pid])
    assert sorted(one.pid or 0 for one in found) == expected
    assert all(one.name.startswith("python") and one.uid == os.getuid() for one in found)
    assert sockdiag.connections(server.path) == 4


def test_our_own_connections_can_be_left_out(server: Server) -> None:
    child = server.client()
    with server.own():
        assert sockdiag.connections(server.path) == 2
        assert sockdiag.connections(server.path, skip_self=True) == 1
        assert [one.pid for one in sockdiag.clients(server.path, skip_pids=[os.getpid()])] == [child.pid]


def test_a_client_that_went_away_is_not_counted(server: Server) -> None:
    child = server.client()
    assert sockdiag.connections(server.path) == 1
    child.kill()
    child.communicate()
    assert sockdiag.connections(server.path) == 0 and sockdiag.clients(server.path) == []


def test_another_listener_beside_it_does_not_count(server: Server, tmp_path: Path) -> None:
    other = Server(tmp_path / "nbd.sock2")
    with other.own():
        assert sockdiag.connections(server.path) == 0
        assert sockdiag.connections(other.path) == 1
    other.close()


def test_the_clients_of_many_listeners_are_told_apart_in_one_look(server: Server, tmp_path: Path) -> None:
    other, idle = Server(tmp_path / "other.sock"), Server(tmp_path / "idle.sock")
    try:
        mine, theirs = server.client(2), other.client()
        found = sockdiag.clients_of({server.path, other.path, idle.path})
        pids = {path: [client.pid for client in clients] for path, clients in found.items()}
        assert pids == {server.path: [mine.pid, mine.pid], other.path: [theirs.pid], idle.path: []}
        assert sockdiag.clients_of({server.path}, skip_pids=[mine.pid]) == {server.path: []}
        assert sockdiag.clients_of(set()) == {}
    finally:
        other.close()
        idle.close()


def test_hundreds_of_connections_are_all_counted(server: Server) -> None:
    server.client(connections=400)
    assert sockdiag.connections(server.path) == 400
    assert len(sockdiag.clients(server.path)) == 400


@pytest.mark.qemu
@pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="needs qemu-nbd")
def test_the_clients_of_a_real_nbd_server_are_found(tmp_path: Path) -> None:
    disk, path = tmp_path / "disk", str(tmp_path / "nbd.sock")
    disk.write_bytes(bytes(1 << 20))
    server = subprocess.Popen(["qemu-nbd", "-r", "-f", "raw", "-t", "-e", "4", "-k", path, str(disk)])
    clients: list[subprocess.Popen[str]] = []
    try:
        deadline = time.monotonic() + 5
        while not Path(path).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(3):
            clients.append(
                subprocess.Popen(
                    [sys.executable, "-c", CONNECT, path, "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
        wanted = sorted(client.pid for client in clients)
        while (found := sorted(one.pid or 0 for one in sockdiag.clients(path))) != wanted:
            assert time.monotonic() < deadline + 5, found
            time.sleep(0.02)
    finally:
        for process in (*clients, server):
            process.kill()
            process.communicate()
