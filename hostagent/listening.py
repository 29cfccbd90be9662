"""What the settings of the API by TCP mean: addresses, a certificate, and scopes of certificates' names; and the
listeners that they ask for. Wrong ones are refused as the settings are read."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from hostagent import addresses
from hostagent.certificates import Certificate
from hostagent.config import UNSET, Api
from hostagent.errors import AgentError
from hostagent.tokens import Scope

KINDS = ("CN", "DNS", "URI", "email")
"""Of names that a certificate has."""
BACKLOG = 128


def check(api: Api) -> None:
    """AgentError invalid."""
    for text in api.listen:
        address_of(text)
    certificate_of(api)
    scopes_of(api.certificate_scopes)


def address_of(text: str) -> tuple[str, int]:
    """An address and a port of api.listen. AgentError invalid."""
    if (found := addresses.tcp_address(text)) is None:
        message, remedy = f"{text!r} is no address to listen on", "write IP:PORT, such as 0.0.0.0:54323 or [::1]:54323"
        raise AgentError("invalid", message, field="api.listen", value=text, remedy=remedy)
    return found


def certificate_of(api: Api) -> Certificate | None:
    """The settings' certificate. None: connections are plain, which is only for the loopback address, and only where
    somebody said so. AgentError invalid."""
    if api.tls_certificate != UNSET:
        return Certificate(
            api.tls_certificate,
            api.tls_certificate if api.tls_key == UNSET else api.tls_key,
            None if api.tls_client_ca == UNSET else api.tls_client_ca,
            optional=api.tls_clients == "optional",
            setting="api.tls_certificate",
            ca_setting="api.tls_client_ca",
        )
    if api.tls_client_ca != UNSET:
        remedy = "set api.tls_certificate, too"
        raise AgentError("invalid", "api.tls_client_ca needs TLS", field="api.tls_certificate", remedy=remedy)
    for text in api.listen:
        if not ipaddress.ip_address(address_of(text)[0]).is_loopback:
            message, remedy = f"{text} leaves this host, and there is no certificate", "set api.tls_certificate"
            raise AgentError("invalid", message, field="api.tls_certificate", value=text, remedy=remedy)
        if not api.plain_loopback:
            message = f"{text} would be served without TLS: every user of this host could listen in as root can"
            remedy = "set api.tls_certificate, or say api.plain_loopback = true"
            raise AgentError("invalid", message, field="api.plain_loopback", value=text, remedy=remedy)
    return None


def listen(api: Api) -> list[socket.socket]:
    """The listeners that the settings ask for. AgentError unavailable."""
    found: list[socket.socket] = []
    try:
        for text in api.listen:
            found.append(addresses.listener(*address_of(text), backlog=BACKLOG, setting="api.listen", value=text))
            found[-1].setblocking(False)
    except AgentError:
        for listener in found:
            listener.close()
        raise
    return found


def scopes_of(given: Sequence[str]) -> dict[str, Scope]:
    """NAME=SCOPE lines as a table. AgentError invalid."""
    found = {}
    for one in given:
        name, equals, word = one.rpartition("=")
        kind = name.partition(":")[0]
        scope: Scope | None
        try:
            scope = Scope.of(word)
        except ValueError:
            scope = None
        if not equals or scope is None or kind not in KINDS or name in found or "*" in name:
            raise AgentError(
                "invalid",
                f"{one[:200]!r} gives no scope to a certificate's name",
                field="api.certificate_scopes",
                value=one[:200],
                remedy="write KIND:NAME=SCOPE: KIND is CN, DNS, URI or email, SCOPE is read, operate or admin, and "
                "each name stands once, without a wildcard",
            )
        found[name] = scope
    return found
