from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import pytest

from hostagent import config_text
from hostagent.config import Config
from hostagent.errors import AgentError
from hostagent.reload import Reload


@pytest.fixture
def manager(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = tmp_path_factory.mktemp("n") / "n"
    before = logging.getLogger().level
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield listener
    logging.getLogger().setLevel(before)


def settings(**values: str) -> Config:
    return config_text.load(env={}, overrides={name.replace("__", "."): value for name, value in values.items()})


def waiting(caplog: pytest.LogCaptureFixture) -> list[str]:
    fields: dict[str, list[str]] = caplog.records[-1].fields  # type: ignore[attr-defined]
    return fields["at_the_next_start"]


def test_what_can_change_does_and_the_rest_is_said(manager: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    wanted = settings(logs__level="debug", jobs__width="7")
    reload = Reload(settings(), lambda: wanted)
    for _ in range(2):  # it waits as long as it does
        reload.now()
        assert logging.getLogger().level == logging.DEBUG
        assert waiting(caplog) == ["jobs.width"]
        assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(100) == b"READY=1\nSTATUS=ready"


def test_settings_that_are_wrong_change_nothing(manager: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    def wrong() -> Config:
        raise AgentError("invalid", "jobs.width is 0", remedy="write 1 or more")

    level, opened = logging.getLogger().level, list[str]()
    Reload(settings(), wrong, reopen=lambda: opened.append("anew")).now()
    assert opened == ["anew"], "what logrotate has moved is not written any more"
    assert logging.getLogger().level == level
    assert "those from before stay in force" in caplog.text
    manager.recv(100)
    told = manager.recv(200)
    assert told.startswith(b"READY=1\n"), "it is not left waiting"
    assert b"STATUS=the settings are wrong" in told and told.endswith(b"jobs.width is 0")
