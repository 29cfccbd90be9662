"""The folders and sockets of an agent: whom they let in, and in whose folder nothing is made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostagent import config_text, host
from hostagent.data import listeners
from hostagent.drivers.process import User
from hostagent.drivers.qsd_process import _listener
from hostagent.errors import AgentError

ROOT = os.geteuid() == 0
PLAIN = 65534 if ROOT else os.geteuid()
GROUP = 4242
needs_root = pytest.mark.skipif(not ROOT, reason="only root can be another user")


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that the plain user has, too, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory() as path:
        os.chown(path, PLAIN, -1)
        yield Path(path)


@contextmanager
def plain_user() -> Iterator[None]:
    if ROOT:
        os.seteuid(PLAIN)
    try:
        yield
    finally:
        if ROOT:
            os.seteuid(0)


def modes(*paths: Path) -> dict[str, str]:
    return {path.name: f"{path.stat().st_mode & 0o777:04o}" for path in paths}


@pytest.mark.parametrize(
    ("known", "given", "user"),
    [
        (("nobody",), "", "nobody"),
        (("nobody", "hostagent-data"), "", "hostagent-data"),
        (("nobody", "hostagent-data", "x"), "x", "x"),
        (("nobody", "hostagent-data"), "x", None),
    ],
)
def test_the_data_daemon_has_a_user_of_its_own_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, known: tuple[str, ...], given: str, user: str | None
) -> None:
    def entry(name: str) -> User:
        if name not in known:
            raise KeyError(name)
        return User(name, 900 + len(name), 900, (900,))

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(User, "named", entry)
    config = config_text.load(env={"HOSTAGENT_DATA_USER": given})
    if user is None:
        with pytest.raises(AgentError, match="no user 'x'"):
            host.data_user(config, 42)
    else:
        assert (host.data_user(config, 42).name, host.data_user(config, 42).groups) == (user, (42,))
    assert host.strangers(config) == {900 + len(name) for name in known}, "also one that began before the setting"
    alone = config_text.load(env={"HOSTAGENT_DATA_USER": given, "HOSTAGENT_DATA_START": "no"})
    assert host.strangers(alone) == {914 for name in known if name == "hostagent-data"}, "as a service of its own"


def test_what_a_plain_users_agent_makes_is_his_alone(folder: Path) -> None:
    run = folder / "run"
    with plain_user():
        host.make_folders(folder / "state", run, None)
        env = {"XDG_RUNTIME_DIR": str(folder), "HOME": str(folder)}
        overrides = {"agent.runtime_dir": str(run), "data.cloudstack_socket": str(run / "cloud.sock")}
        bound = listeners.listen(config_text.load(env=env, overrides=overrides))
        for listener in bound.values():
            listener.close()
        with _listener(run / "nbd" / "one.sock", 1):
            found = modes(run / "nbd" / "one.sock", run / "data-control.sock", run / "cloud.sock")
    assert set(found.values()) == {"0600"}, found
    found = modes(folder / "state", run, run / "nbd", run / "qsd")
    assert set(found.values()) == {"0700"}, found


def test_a_folder_for_nbd_sockets_that_was_wider_is_made_narrow(folder: Path) -> None:
    (folder / "run" / "nbd").mkdir(parents=True, mode=0o755)
    os.chown(folder / "run", PLAIN, -1)
    os.chown(folder / "run" / "nbd", PLAIN, -1)
    with plain_user():
        host.make_folders(folder / "state", folder / "run", None)
    assert modes(folder / "run" / "nbd") == {"nbd": "0700"}


@needs_root
@pytest.mark.root
def test_roots_group_may_reach_the_nbd_sockets(folder: Path) -> None:
    run = folder / "run"
    host.make_folders(folder / "state", run, GROUP)
    assert modes(run, run / "nbd", run / "qsd") == {"run": "0755", "nbd": "0750", "qsd": "0700"}
    assert (run / "nbd").stat().st_gid == GROUP


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("by_link", [False, True])
def test_into_another_users_folder_nothing_is_made(folder: Path, *, by_link: bool) -> None:
    """Neither into his own, nor into one of ours to which a link of his leads."""
    ours = folder / "ours"
    ours.mkdir()
    run = folder / "run"
    if by_link:
        run.symlink_to(ours)
        os.lchown(run, 4001, 4001)
    else:
        run.mkdir()
        os.chown(run, 4001, 4001)
    with pytest.raises(AgentError) as caught:
        host.make_folders(folder / "state", run, None)
    assert (caught.value.code, caught.value.field) == ("denied", "agent.runtime_dir")
    assert not list(run.iterdir())
