"""Exports over TCP: only with TLS, with credentials from the folders that the configuration names."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from hostagent.drivers.tls import TlsListener
from jobs.errors import JobError

FILES = {"x509": ("ca-cert.pem", "server-cert.pem", "server-key.pem"), "psk": ("keys.psk",)}
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what stands for all addresses, and one of them

# https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_LIST, _STARTTLS = 3, 5
_ACK, _TLS_REQUIRED = 1, (1 << 31) + 5
_MOST_TEXT = 4096  # of an error reply
_MOST_NAMES = 65536  # bytes; they go through a command line, whose words have 128 KiB


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The `tls` section of the configuration; an empty path is not set. `name` is this host's, for URIs."""

    listen: str
    x509_dir: Path
    psk_dir: Path
    x509_names: Path
    name: str

    def folder(self, kind: str) -> Path:
        return self.x509_dir if kind == "x509" else self.psk_dir


def listener(tcp: str | None, tls: str | None, settings: TlsSettings) -> TlsListener | None:
    """What is asked for, as a listener; None for a unix socket. Raises JobError before anything is bound. Blocking."""
    if tcp is None:
        if tls is not None:
            raise JobError(
                "invalid",
                "TLS is for exports over TCP; a unix socket is guarded by its mode",
                field="tls",
                value=tls,
                remedy="leave it out, or say --tcp PORT",
            )
        return None
    if tls is None:
        raise JobError(
            "invalid",
            "over TCP there are exports with TLS only",
            field="tls",
            remedy="say --tls x509 or --tls psk, with tls.x509_dir or tls.psk_dir in the configuration",
        )
    folder, setting = settings.folder(tls), f"tls.{tls}_dir"
    if folder == Path():
        remedy = f"name the folder of {' and '.join(FILES[tls])} in {setting}"
        raise JobError("unavailable", f"{setting} is not set", field="tls", value=tls, remedy=remedy)
    for name in FILES[tls]:
        if not (folder / name).is_file():
            message = f"{str(folder)!r} has no file {name}"
            raise JobError("unavailable", message, field="tls", value=tls, remedy=f"put it there ({setting})")
    host, port = _address(tcp, settings.listen)
    names = _names(settings.x509_names) if tls == "x509" and settings.x509_names != Path() else None
    return TlsListener(host, port, tls, folder, names)


def _names(path: Path) -> tuple[str, ...]:
    """One distinguished name a line; empty lines and what begins with # are not."""
    try:
        with path.open("rb") as stream:
            text = stream.read(_MOST_NAMES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        message = f"{str(path)!r} cannot be read: {error}"
        raise JobError("unavailable", message, field="tls", remedy="correct tls.x509_names") from error
    if len(text) > _MOST_NAMES:
        remedy = "let patterns with * stand for several names"
        raise JobError("unavailable", f"{str(path)!r} has more than {_MOST_NAMES} bytes", field="tls", remedy=remedy)
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _address(tcp: str, default: str) -> tuple[str, int]:
    """`auto`, PORT, HOST:PORT, HOST:auto; an IPv6 address stands in brackets."""
    host, colon, port = tcp.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if colon else default
    if port == "auto":
        return host, 0
    if port.isascii() and port.isdecimal() and 0 < int(port) < 65536 and (host or not colon):
        return host, int(port)
    raise JobError("invalid", f"{tcp!r} is no address", field="tcp", value=tcp, remedy="say auto, PORT or HOST:PORT")


def uri(address: tuple[str, int], name: str, settings: TlsSettings) -> str:
    """`nbds://HOST:PORT/NAME`, as clients write it; a listener on all addresses is named by this host's name."""
    host, port = address
    host = settings.name if host in _LOOPBACK else host
    return f"nbds://{f'[{host}]' if ':' in host else host}:{port}/{name}"


def prove(address: tuple[str, int], timeout: float) -> None:
    """Connect, and see that the server refuses to go on without TLS and offers it. Blocking.

    Further one gets only with a client's credentials, which the agent has not. Raises JobError.
    """
    host, port = address
    host = _LOOPBACK.get(host, host)
    try:
        with socket.create_connection((host, port), timeout) as connection:
            connection.settimeout(timeout)
            magic, more, _ = _GREETING.unpack(_read(connection, _GREETING.size))
            if (magic, more) != (b"NBDMAGIC", b"IHAVEOPT"):
                raise _unproven(address, "it does not greet as an NBD server")
            connection.sendall(struct.pack(">I", _FIXED_NEWSTYLE | _NO_ZEROES))
            if _ask(connection, _LIST) != _TLS_REQUIRED:
                raise _unproven(address, "it talks to clients without TLS")
            if _ask(connection, _STARTTLS) != _ACK:
                raise _unproven(address, "it offers no TLS")
    except (OSError, EOFError) as error:
        raise _unproven(address, str(error) or "no answer in time") from error


def _ask(connection: socket.socket, option: int) -> int:
    connection.sendall(_OPTION.pack(b"IHAVEOPT", option, 0))
    _, _, kind, length = _REPLY.unpack(_read(connection, _REPLY.size))
    _read(connection, min(length, _MOST_TEXT))
    return int(kind)


def _read(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError("the connection was closed")
        data += piece
    return data


def _unproven(address: tuple[str, int], why: str) -> JobError:
    message = f"the export at {address[0]}:{address[1]} cannot be used: {why}"
    return JobError("unavailable", message, field="tls", remedy="run `hostagent doctor`")
