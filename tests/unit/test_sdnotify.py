from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hostagent import sdnotify


def test_systemd_is_told_in_one_datagram(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path_factory.mktemp("n") / "n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        assert sdnotify.ready("3 jobs\nadopted")
        assert listener.recv(1000) == b"READY=1\nSTATUS=3 jobs adopted"
        assert sdnotify.stopping(2.5)
        assert listener.recv(1000) == b"STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC=2500000"
        assert sdnotify.reloading()
        assert listener.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sdnotify.ready()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not sdnotify.status("working")
