"""The data daemon's sockets: bound by itself, or by whoever started it (systemd, or the agent for its child)."""

from __future__ import annotations

import contextlib
import grp
import ipaddress
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from hostagent import activation, addresses
from hostagent.config import UNSET, Config
from hostagent.config_data import Data
from hostagent.errors import AgentError

BACKLOG = 512
HANDOVER = "data-handover.sock"


def inherited(given: Mapping[str, int]) -> dict[str, socket.socket]:
    """The listeners that whoever started this process bound, by name: the agent (`given`), or systemd. So they can be
    where this process may make no file, and stay open over a restart."""
    found = {name: activation.taken(fd) for name, fd in given.items()} or activation.listeners()
    for listener in found.values():
        listener.setblocking(True)
    return found


def listen(config: Config) -> dict[str, socket.socket]:
    """The listeners that the settings ask for, by name. The agent binds them with this, too, for its child."""
    settings = config.data
    found = {}
    try:
        if settings.port >= 0:
            found["remote"] = tcp(_address(settings), settings.port)
        if settings.local_socket != UNSET:
            found["local"] = unix(settings.local_socket, 0o666)
        group = _group(config)
        mode = 0o600 if group is None else 0o660
        found["control"] = unix(settings.control_socket, mode, group)
        if settings.control_port >= 0:
            found["control-tcp"] = tcp("127.0.0.1", settings.control_port)
        if settings.cloudstack_socket != UNSET:
            found["cloudstack"] = unix(settings.cloudstack_socket, mode, group)
        handover = settings.control_socket.with_name(HANDOVER)
        found["handover"] = unix(handover, 0o600, kind=socket.SOCK_SEQPACKET)
    except AgentError:
        for listener in found.values():
            listener.close()
        raise
    return found


def _group(config: Config) -> int | None:
    """Whose members may use the control sockets: root's daemon alone lets a group in, and only if it exists."""
    with contextlib.suppress(KeyError):
        return grp.getgrnam(config.api.socket_group).gr_gid if os.geteuid() == 0 else None
    return None


def tcp(address: str, port: int) -> socket.socket:
    return addresses.listener(address, port, backlog=BACKLOG, setting="data.port", value=port)


def unix(path: Path, mode: int, group: int | None = None, *, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A socket at `path`, in place of one that nobody listens on any more."""
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(mode=0o755 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        if path.is_socket():
            _refuse_served(path, kind)
            path.unlink()
        os.fchmod(listener.fileno(), mode)  # Linux makes the name with it: there is no moment in which it has more
        listener.bind(str(path))
        path.chmod(mode)
        if group is not None:
            os.chown(path, -1, group)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        message = f"cannot listen on {str(path)!r}: {error.strerror}"
        raise AgentError("unavailable", message, value=str(path), remedy="see data.*_socket") from error
    return listener


def _refuse_served(path: Path, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except OSError:  # it is there, and does not take us now
            pass
    remedy = "is another data daemon running? set data.*_socket or agent.runtime_dir"
    raise AgentError("conflict", f"somebody listens on {str(path)!r} already", value=str(path), remedy=remedy)


def _address(settings: Data) -> str:
    """What leaves this host goes by TLS only."""
    address = settings.listen or ("::" if settings.cert != UNSET else "127.0.0.1")
    try:
        known = ipaddress.ip_address(address)
    except ValueError as error:
        raise AgentError(
            "invalid",
            f"data.listen is no IP address: {address!r}",
            field="data.listen",
            value=address,
            remedy="write one",
        ) from error
    if settings.cert == UNSET and not known.is_loopback:
        remedy = "set data.cert and data.key, or listen on 127.0.0.1"
        raise AgentError(
            "invalid", f"{address} leaves this host, and there is no certificate", field="data.cert", remedy=remedy
        )
    return address
