"""What the agent needs of its host before it serves: a user, a group, folders of its own, its socket.

What is not as it must be is refused with an AgentError that says what to do; then nothing has begun.
"""

from __future__ import annotations

import contextlib
import grp
import os
import resource
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hostagent.access import owner
from hostagent.config import Config
from hostagent.drivers.process import User
from hostagent.errors import AgentError
from hostagent.records import Label


def storage_user(config: Config) -> User:
    """Who storage daemons run as."""
    name = config.qsd.user or config.access.hypervisor_user
    if not name:
        return User.current()
    try:
        user = User.named(name)
    except KeyError:
        raise AgentError(
            "invalid",
            f"there is no user {name!r} on this host",
            field="access.hypervisor_user",
            value=name,
            remedy="install the hypervisor (its package makes the user), or say --hypervisor-user NAME",
        ) from None
    if not user.is_us and os.geteuid() != 0:
        raise AgentError(
            "denied",
            f"only root can run storage daemons as {name!r}",
            field="access.hypervisor_user",
            value=name,
            remedy="run the agent as root, or leave the setting empty to work as yourself",
        )
    return user


DATA_USERS = ("hostagent-data", "nobody")
"""Who is the data daemon: the first that there is. units/sysusers.conf makes the one, every system has the other."""


def data_user(config: Config, group: int | None) -> User:
    """Who the data daemon runs as: nobody that owns an image, in the group that may use NBD sockets."""
    if os.geteuid() != 0:
        return User.current()
    names = (config.data.user,) if config.data.user else DATA_USERS
    for name in names:
        with contextlib.suppress(KeyError):
            return replace(User.named(name), groups=() if group is None else (group,))
    raise AgentError(
        "invalid",
        f"there is no user {names[0]!r} on this host",
        field="data.user",
        value=names[0],
        remedy="make it, or leave the setting empty",
    )


def strangers(config: Config) -> set[int]:
    """Who is in the group for the exports' sake and has no say in the agent, for strangers are its clients: a data
    daemon, also one that runs still as who it was before, or as a service of its own (units/)."""
    found = set()
    ours = {config.data.user, *DATA_USERS} if config.data.start else {DATA_USERS[0]}
    for name in ours:
        with contextlib.suppress(KeyError):
            found.add(User.named(name).uid)
    return found


def unknown_owner(text: str) -> Label | None:
    """access.unknown_owner as numbers."""
    if not text:
        return None
    try:
        return owner.parse(text)
    except KeyError:
        raise AgentError(
            "invalid",
            f"access.unknown_owner is {text!r}; it must be USER:GROUP, both known on this host",
            field="access.unknown_owner",
            value=text,
            remedy="write root:root, or leave it empty: then files whose owner was not seen are only reported",
        ) from None


def socket_group(config: Config) -> int | None:
    """The group that may use the sockets: root's agent, and only if it exists."""
    if os.geteuid() != 0:
        return None
    try:
        return grp.getgrnam(config.api.socket_group).gr_gid
    except KeyError:
        return None


def qemu_version(config: Config) -> str:
    """What the storage daemon says of itself; empty when it is not there, which `doctor` explains."""
    try:
        done = subprocess.run(
            [config.qsd.binary, "--version"], capture_output=True, text=True, timeout=config.qsd.start_timeout
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    words = done.stdout.split()
    return words[words.index("version") + 1] if "version" in words[:-1] else ""


def raise_file_limit() -> None:
    """Exports and leases are descriptors: take what the system lets us have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_folders(state_dir: Path, runtime_dir: Path, group: int | None) -> None:
    """The agent's folders, with the modes that keep others out; `group` may use the NBD sockets. Into one that is
    another's nothing is made."""
    try:
        monitors, sockets = runtime_dir / "qsd", runtime_dir / "nbd"
        _make_folder(state_dir, 0o700, "agent.state_dir")
        _make_folder(runtime_dir, runtime_mode(), "agent.runtime_dir")
        for folder in (monitors, sockets):
            _make_folder(folder, 0o700, "agent.runtime_dir")
        if group is not None:
            os.chown(sockets, -1, group)
        sockets.chmod(0o700 if group is None else 0o750)
    except OSError as error:
        what = f"a folder of the agent's cannot be made: {error}"
        remedy = "choose other folders with --state-dir and --runtime-dir"
        raise AgentError("unavailable", what, remedy=remedy) from error


def runtime_mode() -> int:
    """Root's sockets are for others, too, each by its own mode; a plain user's are his own."""
    return 0o755 if os.geteuid() == 0 else 0o700


def _make_folder(folder: Path, mode: int, setting: str) -> None:
    with _umask(0o022):
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    _refuse_foreign_folder(folder, setting)


def listen(path: Path, group: int | None) -> socket.socket:
    """The API's socket, with its mode from the first moment on."""
    refuse_second_listener(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _umask(0o177):
        listener.bind(str(path))
    if group is not None:
        os.chown(path, -1, group)
        path.chmod(0o660)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _refuse_foreign_folder(folder: Path, setting: str) -> None:
    """Sockets and the store are only as safe as the folder that they lie in, and as the link that leads there."""
    if (link := folder.lstat()).st_uid not in (0, os.geteuid()):
        raise AgentError(
            "denied",
            f"{str(folder)!r} was made by another user (uid {link.st_uid})",
            field=setting,
            value=str(folder),
            remedy="choose a folder that only this user can write",
        )
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise AgentError(
            "denied",
            f"others can put files into {str(folder)!r} (uid {found.st_uid}, mode {found.st_mode & 0o7777:04o})",
            field=setting,
            value=str(folder),
            remedy="choose a folder that only this user can write",
        )


def refuse_other_address(listener: socket.socket, path: Path) -> None:
    """What the service manager listens on must be where our clients look for us."""
    if (found := listener.getsockname()) != str(path):
        message = f"the service manager listens on {found!r}, and the settings name {str(path)!r}"
        remedy = "set ListenStream= of hostagent.socket to the same"
        raise AgentError("invalid", message, field="api.socket", value=str(path), remedy=remedy)


def refuse_second_listener(path: Path) -> None:
    """Remove a socket that nobody listens on; refuse one that is answered, and anything that is no socket."""
    if not os.path.lexists(path):
        return
    refuse = {"field": "api.socket", "value": str(path), "remedy": "choose another path"}
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise AgentError("invalid", f"{str(path)!r} exists and is no socket", **refuse)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise AgentError("unavailable", f"cannot use the socket {str(path)!r}: {error}", **refuse) from error
    raise AgentError("busy", f"another agent answers at {str(path)!r}", **refuse)


@contextlib.contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
