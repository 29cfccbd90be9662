"""The API by TCP as tests reach it: an agent with doors, its certificates and tokens, and raw requests to it."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from running_agent import Agent, serving

from hostagent import listening, tokens
from hostagent.api import remote
from hostagent.api.identities import Identities
from hostagent.certificates import Renewing
from hostagent.config import DEFAULTS, Api
from hostagent.tokens import Scope, Token, Tokens
from tests.data.pki import Certificate, Pki


@dataclass
class Site:
    """What the agent's host has: `secrets` are the tokens' texts by their names."""

    pki: Pki
    tokens_file: Path
    secrets: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, scope: Scope, expires: datetime | None = None) -> str:
        token, text = tokens.new(name, scope, expires)
        with tokens.changing(self.tokens_file) as found:
            found.append(token)
        self.secrets[name] = text
        return text

    def change(self, name: str, **members: Any) -> None:
        with tokens.changing(self.tokens_file) as found:
            found[:] = [replace(token, **members) if token.name == name else token for token in found]

    def remove(self, name: str) -> None:
        with tokens.changing(self.tokens_file) as found:
            found[:] = [token for token in found if token.name != name]


def site(folder: Path) -> Site:
    """With a token of each scope, and one whose time is over."""
    found = Site(Pki(folder / "pki"), folder / "tokens.json")
    for scope in tokens.GIVEN:
        found.add(scope.word, scope)
    found.add("expired", Scope.ADMIN, datetime.now(UTC) - timedelta(seconds=1))
    return found


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any


@dataclass
class Away:
    """An agent with one door."""

    site: Site
    agent: Agent
    port: int
    tls: bool

    def connect(self, certificate: Certificate | None = None, timeout: float = 10) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout)
        if not self.tls:
            return sock
        try:
            return self.site.pki.context(certificate).wrap_socket(sock, server_hostname="127.0.0.1")
        except BaseException:
            sock.close()
            raise

    def status(self, method: str, path: str, headers: Mapping[str, str], certificate: Certificate | None = None) -> int:
        """Of one request, whose answer is not waited for to its end."""
        with self.connect(certificate) as sock:
            sock.sendall(request(method, path, headers))
            head = b""
            while b"\r\n" not in head:
                more = sock.recv(4096)
                assert more, "the connection ended without an answer"
                head += more
        return int(head.split()[1])

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str = "",
        certificate: Certificate | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        sent = {**bearer(self.site.secrets.get(token, token)), **(headers or {})}
        content = b"" if body is None else json.dumps(body).encode()
        if content:
            sent |= {"content-type": "application/json", "content-length": str(len(content))}
        with self.connect(certificate) as sock:
            sock.sendall(request(method, path, {**sent, "connection": "close"}) + content)
            return parsed(until_end(sock))


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"} if token else {}


def request(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def until_end(sock: socket.socket) -> bytes:
    data = b""
    try:
        while more := sock.recv(65536):
            data += more
    except (ConnectionResetError, ssl.SSLError):
        pass
    return data


def until(sock: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        more = sock.recv(65536)
        assert more, f"the connection ended after {data!r}"
        data += more
    return data


def parsed(data: bytes) -> Answer:
    head, _, content = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    body = json.loads(content) if content and "json" in headers.get("content-type", "") else content
    return Answer(int(lines[0].split()[1]), headers, body)


@contextmanager
def away(
    here: Site, folder: Path, *, scopes: Sequence[str] = (), plain: bool = False, policy: Any = None, **settings: Any
) -> Iterator[Away]:
    """`settings` are of [api]; body_timeout counts for requests, too."""
    pki = here.pki
    tls = {} if plain else {"tls_certificate": pki.server.cert, "tls_key": pki.server.key}
    quick = {"handshake_rate": 10000, "identity_interval": 0.1, "tls_clients": "optional", "auth_failures": 10000}
    given = {"listen": ("127.0.0.1:0",), "plain_loopback": plain, **tls, **quick, **settings}
    api: Api = replace(DEFAULTS.api, **given)

    def doors(agent: Agent) -> remote.Doors:
        certificate = Renewing(found) if (found := listening.certificate_of(api)) else None
        known = Tokens(here.tokens_file, api.tokens)
        known.look()
        identities = Identities(
            known,
            scopes,
            failures=api.auth_failures,
            patience=api.identity_interval,
            told=agent.refusals.append,
            authorities=lambda: certificate.in_force.authorities if certificate else "",
        )
        return remote.Doors(listening.listen(api), certificate, identities, remote.Bounds.of(api), agent.refusals.append)

    kept = {name: settings[name] for name in ("body_timeout", "sse_heartbeat", "max_connections") if name in settings}
    with serving(folder / "s", doors=doors, policy=policy, **kept) as agent:
        assert agent.doors is not None
        yield Away(here, agent, agent.doors.listeners[0].getsockname()[1], not plain)


__all__ = ["Answer", "Away", "Scope", "Site", "Token", "away", "bearer", "parsed", "request", "site", "until", "until_end"]
