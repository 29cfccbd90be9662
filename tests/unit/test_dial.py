"""What a connection to an NBD server is set to before anybody speaks."""

from __future__ import annotations

import socket
from pathlib import Path

from hostagent.nbdclient.dial import Fence, Server, Waits, dial


def test_a_unix_socket_queues_more_than_the_kernel_lets_it_by_itself(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as usual:
        server.bind(str(tmp_path / "nbd.sock"))
        server.listen()
        with dial(Server(socket=str(tmp_path / "nbd.sock")), Waits(5.0, 5.0, "connect", "answer"), Fence()) as one:
            ours, theirs = (each.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for each in (one, usual))
    assert ours > theirs
