"""Who somebody is that came by TCP: by the token of a request, else by the certificate of its connection.

A token that is sent decides, and must be a good one: nobody falls back to another identity. Names of certificates have
a scope where `api.certificate_scopes` gives them one, to the letter; a certificate without one is known, and may do
nothing. An identity is looked at again while a request runs on, so that what was taken away ends.

Guessing 256 bits is hopeless. What is bounded is the noise: who fails too often from one address gets 429 instead of
401, and is told of once. A good token is let in from there all the same, for many may share an address.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hostagent.addresses import network_of
from hostagent.api.gate import WINDOW
from hostagent.api.peer import Peer, Remote, from_afar
from hostagent.errors import AgentError
from hostagent.listening import KINDS, scopes_of
from hostagent.tokens import Scope, Token, Tokens

log = logging.getLogger(__name__)

REASONS = (
    *("no_identity", "bad_token", "expired_token", "certificate", "scope", "too_many_failures"),
    *("handshake", "connections", "client_connections", "stranger", "identity_ended"),
    *("local_connections", "local_user", "requests"),
)
"""Why somebody was turned away, for the metric."""
REST = 0.1  # seconds between two looks at the tokens' file for unknown tokens
ADDRESSES = 1024  # that failures are counted for; the one that failed longest ago is forgotten


@dataclass(frozen=True, slots=True)
class Shown:
    """What a client's certificate says. `names` are KIND:NAME, `authorities` those that it was judged by."""

    names: tuple[str, ...]
    ends: float
    authorities: str

    @classmethod
    def of(cls, certificate: Mapping[str, Any] | None, authorities: str) -> Shown | None:
        """What `ssl` says of a certificate that it has verified; None where none was shown."""
        if not certificate:
            return None
        common = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
        others = [f"{kind}:{value}" for kind, value in certificate.get("subjectAltName", ()) if kind in KINDS]
        ends = float(ssl.cert_time_to_seconds(certificate["notAfter"]))
        return cls((*(f"CN:{name}" for name in common), *others), ends, authorities)


@dataclass(frozen=True, slots=True)
class Identity:
    """`stands`: whether it is still in force."""

    peer: Peer
    stands: Callable[[], bool]


class Failures:
    """Of authentications, by address. `allowed` in each window."""

    def __init__(self, allowed: int) -> None:
        self._allowed = allowed
        self._of: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def count(self, address: str) -> bool:
        """One more; whether that is too many."""
        now = time.monotonic()
        began, number = self._of.pop(address, (now, 0))
        if now - began > WINDOW:
            began, number = now, 0
        self._of[address] = began, number + 1
        if len(self._of) > ADDRESSES:
            self._of.popitem(last=False)
        if number == self._allowed:
            fields = {"address": address, "failures": number, "seconds": WINDOW}
            log.warning("too many failed authentications", extra={"fields": fields})
        elif number < self._allowed:
            log.info("authentication failed", extra={"fields": {"address": address}})
        return number >= self._allowed


class Anew:
    """Looks at the tokens' file for whoever has a token that is not known: it may have been made just now. All who come
    share the next look, so that a flood of bad tokens costs a few in a second. On a disk that hangs there is one, and
    nobody waits for longer than `patience` seconds."""

    def __init__(self, look: Callable[[], None], patience: float) -> None:
        self._look = look
        self._patience = patience
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[None] | None = None

    async def look(self) -> None:
        """Until a look has ended that began after this."""
        if self._next is None:
            self._next = asyncio.create_task(self._take())
        await asyncio.wait({self._next}, timeout=self._patience)

    async def _take(self) -> None:
        async with self._turn:
            self._next = None
            await asyncio.to_thread(self._look)
            await asyncio.sleep(REST)


class Identities:
    """`told` hears of each refusal, by a word of REASONS; `authorities` is what tells those in force from others.
    `patience` is how long, in seconds, an unknown token may wait for a look at their file."""

    def __init__(
        self,
        tokens: Tokens,
        scopes: Sequence[str],
        *,
        failures: int,
        patience: float,
        told: Callable[[str], None],
        authorities: Callable[[], str] = str,
    ) -> None:
        """`scopes` are NAME=SCOPE, as in api.certificate_scopes. AgentError."""
        self.tokens = tokens
        self.told = told
        self._scopes = scopes_of(scopes)
        self._failures = Failures(failures)
        self._anew = Anew(tokens.look, patience)
        self._authorities = authorities

    def rescope(self, scopes: Sequence[str]) -> None:
        """Other scopes for certificates' names, from now on."""
        self._scopes = scopes_of(scopes)

    async def of(
        self, headers: Sequence[tuple[bytes, bytes]], shown: Shown | None, address: str, needed: Scope
    ) -> Identity:
        """Whose request that is: also nobody's, where no scope is `needed`. `address` is IP:PORT, as Python writes it.
        AgentError unauthenticated, limit: what was shown is not good."""
        sent = [value for name, value in headers if name == b"authorization"]
        if sent:
            return await self._by_token(sent, address)
        if shown is not None:
            return self._by_certificate(shown, address)
        if needed is not Scope.NONE:
            raise self._failed("no_identity", "that is not for everybody", address)
        return Identity(from_afar(Remote("", Scope.NONE, address)), stands=lambda: True)

    async def _by_token(self, sent: Sequence[bytes], address: str) -> Identity:
        scheme, _, text = sent[0].decode("latin-1").partition(" ")
        token = await self._find(text.strip()) if len(sent) == 1 and scheme.lower() == "bearer" else None
        if token is None:
            raise self._failed("bad_token", "that is no token of this agent's", address)
        if not self.tokens.holds(token):
            raise self._failed("expired_token", f"the token {token.name} was good until {token.expires}", address)
        remote = Remote(f"token {token.name}", token.scope, address)
        known: Token = token
        return Identity(from_afar(remote), stands=lambda: self.tokens.holds(known))

    async def _find(self, text: str) -> Token | None:
        if (known := self.tokens.find(text)) is not None:
            return known
        await self._anew.look()
        return self.tokens.find(text)

    def _by_certificate(self, shown: Shown, address: str) -> Identity:
        if not self._trusted(shown):
            raise self._failed("certificate", "the certificate was good when it was shown, and is not now", address)
        name, scope = self._granted(shown)
        remote = Remote(f"certificate {name}", scope, address)
        return Identity(
            from_afar(remote), stands=lambda: self._trusted(shown) and self._granted(shown) == (name, scope)
        )

    def _granted(self, shown: Shown) -> tuple[str, Scope]:
        """The name that gives it most, and what that is. The authority vouches for each name, so any of them counts."""
        known = [(self._scopes[name], name) for name in shown.names if name in self._scopes]
        scope, name = max(known, default=(Scope.NONE, shown.names[0] if shown.names else "without a name"))
        return name, scope

    def _trusted(self, shown: Shown) -> bool:
        return shown.ends > datetime.now(UTC).timestamp() and shown.authorities == self._authorities()

    def _failed(self, reason: str, message: str, address: str) -> AgentError:
        if self._failures.count(network_of(address.rpartition(":")[0])):
            self.told("too_many_failures")
            remedy = f"wait up to {WINDOW:.0f} s, and send a good token: `hostagent token add` makes one on the host"
            return AgentError("limit", "too many failed authentications", field="api.auth_failures", remedy=remedy)
        self.told(reason)
        remedy = "send `Authorization: Bearer TOKEN`; `hostagent token add` makes one on the host"
        if reason == "certificate":
            remedy = "connect anew, with a certificate that is good"
        elif reason == "no_identity":
            remedy = "send `Authorization: Bearer TOKEN`, or a certificate that api.certificate_scopes names"
            return AgentError("unauthenticated", message, remedy=remedy, nothing_shown=True)
        return AgentError("unauthenticated", message, field="authorization", remedy=remedy)
