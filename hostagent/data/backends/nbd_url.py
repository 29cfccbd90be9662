"""NBD URLs as tickets spell them: QEMU's nbd:unix:PATH[:exportname=NAME] and nbd:HOST:PORT[:exportname=NAME], and the
NBD project's nbd://HOST[:PORT]/NAME and nbd+unix:///NAME?socket=PATH (doc/uri.md)."""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from hostagent.errors import AgentError
from hostagent.nbdclient.dial import PORT, Server

SCHEMES = ("nbd", "nbd+unix")
_NAME = ":exportname="


def server_of(url: str) -> Server:
    """Raises AgentError `invalid`, about `url`."""
    try:
        if url.isprintable():  # urlsplit would drop newlines
            return _uri(urlsplit(url)) if "://" in url else _plain(url)
    except ValueError:
        pass
    remedy = "write nbd:unix:PATH:exportname=NAME, nbd:HOST:PORT:exportname=NAME, nbd://HOST:PORT/NAME, "
    remedy += "or nbd+unix:///NAME?socket=PATH"
    if "@" in url:  # NBD has no passwords, but somebody may have written one
        raise AgentError("invalid", "an NBD URL has neither a user nor a password", field="url", remedy=remedy)
    raise AgentError("invalid", "no NBD URL that can be used here", field="url", value=url, remedy=remedy)


def _plain(url: str) -> Server:
    address, _, name = url.removeprefix("nbd:").partition(_NAME)
    if address.startswith("unix:"):
        return Server(name, socket=_path(address.removeprefix("unix:")))
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not bare or ("[" in host) != (":" in bare):
        raise ValueError(url)
    return Server(name, host=bare, port=_port(port))


def _uri(parts: SplitResult) -> Server:
    """Raises ValueError for what means nothing to us, rather than to leave it out."""
    name = unquote(parts.path.removeprefix("/"), errors="strict")
    query = parse_qsl(parts.query.replace("+", "%2B"), strict_parsing=True, errors="strict") if parts.query else []
    if parts.fragment or "@" in parts.netloc or not name.isprintable():
        raise ValueError(parts)
    if parts.scheme == "nbd" and parts.hostname and not query:
        return Server(name, host=parts.hostname, port=PORT if parts.port is None else _port(str(parts.port)))
    ((key, path),) = query
    if parts.scheme != "nbd+unix" or parts.netloc or key != "socket" or not path.isprintable():
        raise ValueError(parts)
    return Server(name, socket=_path(path))


def _path(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError(path)
    return path


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 16:
        raise ValueError(text)
    return int(text)
