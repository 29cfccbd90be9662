"""What answers at the agent's socket may be another user's program, or no agent at all."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_agent import FakeAgent

from hostagent.cli.main import main

STRANGER = 4001


@pytest.fixture
def usual(agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeAgent:
    """The agent at the socket that is asked where none is named."""
    folder = tmp_path / "hostagent"
    folder.mkdir()
    (folder / "hostagent.sock").symlink_to(agent.path)
    monkeypatch.setattr("hostagent.config_text.default_runtime_dir", lambda env: folder)
    for name in ("SOCKET", "URL"):
        monkeypatch.delenv(f"HOSTAGENT_{name}", raising=False)
    agent.on("GET", "/v1/jobs", (200, {"items": [], "next": None}))
    return agent


@pytest.fixture
def served_by(monkeypatch: pytest.MonkeyPatch):
    """Let the kernel say that somebody else listens: `served_by(uid)`."""
    real = socket.socket.getsockopt

    def set_uid(uid: int) -> None:
        def getsockopt(self: socket.socket, level: int, option: int, *size: int) -> int | bytes:
            if (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED):
                return struct.pack("3i", 1, uid, uid)
            return real(self, level, option, *size)

        class Seen(socket.socket):
            pass

        Seen.getsockopt = getsockopt
        monkeypatch.setattr("hostagent.unix_http.socket.socket", Seen)

    return set_uid


@pytest.mark.parametrize("uid", [0, os.geteuid()])
def test_the_usual_socket_may_be_roots_or_our_own(usual: FakeAgent, served_by, uid: int) -> None:
    served_by(uid)
    assert main(["job", "list", "--json"]) == 0
    assert usual.asked("GET", "/v1/jobs")


def test_a_stranger_at_the_usual_socket_is_not_asked(usual: FakeAgent, served_by, capsys) -> None:
    served_by(STRANGER)
    assert main(["job", "list"]) == 7
    said = capsys.readouterr().err
    assert f"uid {STRANGER}" in said
    assert "--socket" in said
    assert not usual.calls


def test_a_socket_that_was_named_may_be_anybodys(usual: FakeAgent, served_by, monkeypatch) -> None:
    served_by(STRANGER)
    assert main(["--socket", str(usual.path), "job", "list", "--json"]) == 0
    monkeypatch.setenv("HOSTAGENT_SOCKET", str(usual.path))
    assert main(["job", "list", "--json"]) == 0


@pytest.mark.parametrize("answer", [{}, {"items": 7}, {"items": [{}]}, [], None, "no"])
@pytest.mark.parametrize("words", [("job", "list"), ("export", "list"), ("grant", "list"), ("status",)])
def test_what_is_no_agents_answer_is_an_error(agent: FakeAgent, run, capsys, answer: object, words: tuple[str, ...]):
    for path in ("jobs", "exports", "grants", "host"):
        agent.on("GET", f"/v1/{path}", (200, answer))
    assert run(*words) == 1
    assert "not an agent's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "said"), [(0o660, "join the group video (then log in again), or ask as "), (0o600, "ask as ")]
)
def test_who_may_use_a_socket_is_read_from_it(tmp_path: Path, monkeypatch, capsys, mode: int, said: str) -> None:
    path = tmp_path / "s"
    path.touch()
    path.chmod(mode)
    monkeypatch.setattr("grp.getgrgid", lambda gid: SimpleNamespace(gr_name="video") if gid == os.getegid() else None)

    monkeypatch.setattr("hostagent.unix_http.UnixConnection.connect", refuse_connect)
    assert main(["--socket", str(path), "job", "list"]) == 7
    assert f"remedy: {said}" in capsys.readouterr().err


def refuse_connect(self: object) -> None:
    raise PermissionError(13, "Permission denied")
