from __future__ import annotations

import os
import socket

import pytest

from hostagent import activation
from hostagent.errors import AgentError


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A socket that a service manager has bound for this process, as its first."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    monkeypatch.setattr(activation, "FIRST", found.fileno())
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "api")
    os.set_inheritable(found.fileno(), True)
    return found


def test_sockets_are_taken_by_their_names_and_are_no_childs(given: socket.socket) -> None:
    taken = activation.listeners()
    assert list(taken) == ["api"] and taken["api"].fileno() == given.fileno()
    assert not taken["api"].get_inheritable()
    assert not {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & os.environ.keys()
    taken["api"].detach()
    given.close()


def test_what_is_another_processes_is_left_alone(given: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    assert activation.listeners() == {}
    given.close()


def test_a_number_that_is_none_hands_over_nothing(given: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "some")
    assert activation.listeners() == {}
    given.close()


def test_a_descriptor_that_is_no_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "rb") as nothing, pytest.raises(AgentError, match="is no socket"):
        activation.taken(nothing.fileno())
