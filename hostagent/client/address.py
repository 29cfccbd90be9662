"""The URL of a ticket: where a server is, and the one secret in it.

Whoever has the ticket's id has the image. So it stands in `path` and `secret`, which no text of ours shows: `str()` of
an address is for people, and `hidden` takes the id out of what a server says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qs, unquote, urlsplit

from hostagent.errors import AgentError

_FORMS = "https://HOST:PORT/images/ID, http://HOST:PORT/images/ID or http+unix:///images/ID?socket=PATH"
_LONGEST = 4096


@dataclass(frozen=True, slots=True)
class Address:
    """`socket` is set for a unix socket, with a NUL before an abstract name; else `host` and `port` are."""

    scheme: str
    host: str = ""
    port: int = 0
    socket: str = ""
    path: str = field(default="", repr=False)

    @property
    def secret(self) -> str:
        return unquote(self.path.rpartition("/")[2])

    def hidden(self, text: str) -> str:
        """`text` without the ticket's id, in whichever way it is written there."""
        for word in {self.path.rpartition("/")[2], self.secret}:
            text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", "…", text)
        return text

    def on_socket(self, name: str) -> Address:
        """The same image, over a unix socket of the same server."""
        return replace(self, scheme="http+unix", host="", port=0, socket=name)

    def __str__(self) -> str:
        if self.socket:
            return f"unix socket {self.socket.replace(chr(0), '@', 1)}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://", "http+unix://"))


def parse(text: str) -> Address:
    """The address that a URL means; AgentError `invalid`, which does not repeat the URL."""
    if len(text) > _LONGEST or not text.isascii() or not text.isprintable() or " " in text:
        raise _wrong("it has blanks, control or other characters, or is too long")
    try:
        found = urlsplit(text)
        port = found.port
    except ValueError as error:
        raise _wrong("its host or port is not one") from error
    if found.username is not None or found.password is not None or found.fragment:
        raise _wrong("it has a user, a password or a fragment")
    if not found.path.strip("/") or found.path.endswith("/"):
        raise _wrong("it names no ticket")
    if found.scheme == "http+unix":
        return _on_unix(found.netloc, found.path, found.query)
    if found.scheme not in ("http", "https") or not found.hostname or found.query:
        raise _wrong("its scheme is unknown, or it has no host, or it has a query")
    usual = 443 if found.scheme == "https" else 80
    return Address(found.scheme, found.hostname, port or usual, path=found.path)


def _on_unix(host: str, path: str, query: str) -> Address:
    names = parse_qs(query).get("socket", [])
    if host or len(names) != 1 or not names[0]:
        raise _wrong("a unix socket is named by ?socket=PATH, or ?socket=@NAME for an abstract one, and has no host")
    name = f"\0{names[0][1:]}" if names[0].startswith("@") else names[0]
    return Address("http+unix", socket=name, path=path)


def by_proxy(address: Address, proxy: str) -> Address:
    """The same ticket at the proxy: its path, unless the proxy's URL has one of its own."""
    found = urlsplit(proxy)
    if found.scheme in ("http", "https") and not found.path.strip("/") and not found.query:
        proxy = f"{found.scheme}://{found.netloc}{address.path}"
    return parse(proxy)


def _wrong(why: str) -> AgentError:
    return AgentError("invalid", f"this is not the URL of a ticket: {why}", field="url", remedy=f"write {_FORMS}")
