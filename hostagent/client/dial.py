"""Connections to a server: TCP, TLS, or a unix socket; directly or by a proxy.

A connection that was not made is `Lost`, and may be tried again; one that must not be made (a certificate that does not
hold, a name that means no host) is an AgentError, which is final.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection

from hostagent.client.address import Address, by_proxy, parse
from hostagent.client.options import Options, Patience, Tls
from hostagent.client.trouble import Lost
from hostagent.errors import AgentError

_HOSTNAME_MISMATCH = 62  # X509_V_ERR_HOSTNAME_MISMATCH (openssl verify(1))
_ADDRESS_MISMATCH = 64  # X509_V_ERR_IP_ADDRESS_MISMATCH
_NEVER = (socket.EAI_NONAME, socket.EAI_FAIL)


@dataclass(frozen=True, slots=True)
class Dial:
    """`addresses` are tried in this order."""

    addresses: tuple[Address, ...]
    tls: Tls
    patience: Patience

    def connect(self) -> tuple[Address, HTTPConnection]:
        """The first that answers. Raises the error of the first one when none does."""
        first: AgentError | None = None
        for address in self.addresses:
            try:
                return address, self._connected(address)
            except AgentError as error:
                first = first or error
        assert first is not None
        raise first

    def preferring(self, address: Address) -> Dial:
        others = tuple(one for one in self.addresses if one != address)
        return Dial((address, *others), self.tls, self.patience)

    def _connected(self, address: Address) -> HTTPConnection:
        connection = _Connection(address, self.patience.connect, context(self.tls))
        with _failures(address, self.patience.connect):
            connection.connect()
        connection.sock.settimeout(self.patience.silence)
        return connection


def dial(url: str, options: Options) -> Dial:
    address = parse(url)
    if options.proxy_only and not options.proxy:
        raise AgentError("invalid", "only the proxy is to be used, and none is named", field="proxy")
    addresses: tuple[Address, ...] = (address,)
    if options.proxy:
        proxy = by_proxy(address, options.proxy)
        addresses = (proxy,) if options.proxy_only else (address, proxy)
    return Dial(addresses, options.tls, options.patience)


@functools.lru_cache(maxsize=8)
def context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 and later, with the server's name checked."""
    try:
        found = ssl.create_default_context(cafile=tls.cafile or None)
    except (OSError, ssl.SSLError) as error:
        message = f"{tls.cafile!r} has no certificates that can be read: {error.strerror or error}"
        raise AgentError("invalid", message, field="cafile", remedy="name a PEM file of the server's CA") from error
    found.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.insecure:
        found.check_hostname = False
        found.verify_mode = ssl.CERT_NONE
    if tls.certificate:
        try:
            found.load_cert_chain(tls.certificate, tls.key or None)
        except (OSError, ssl.SSLError) as error:
            message = f"the client certificate {tls.certificate!r} cannot be used: {error.strerror or error}"
            raise AgentError("invalid", message, field="certificate") from error
    return found


class _Connection(HTTPConnection):
    """Connects once: what was not flushed on a connection that broke must not be forgotten by a silent new one."""

    auto_open = 0

    def __init__(self, address: Address, timeout: float, tls: ssl.SSLContext) -> None:
        super().__init__(address.host or "localhost", address.port or None, timeout=timeout)
        self._address = address
        self._tls = tls

    def connect(self) -> None:
        if self._address.socket:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._address.socket)
            return
        super().connect()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._address.scheme == "https":
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._address.host)


@contextlib.contextmanager
def _failures(address: Address, timeout: float) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise _distrusted(address, error) from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError) as error:
        message = f"{address} broke off while TLS was set up"
        raise Lost("unreachable", message, remedy="see whether its data daemon runs, and its log") from error
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
            message, remedy = f"{address} does not speak TLS", "write http: if that is what it speaks"
            raise AgentError("unreachable", message, remedy=remedy) from error
        remedy = "see its log; it may want a client certificate (--certificate)"
        raise AgentError("unreachable", f"no TLS with {address}: {error.reason or error}", remedy=remedy) from error
    except TimeoutError as error:
        message = f"{address} did not answer within {timeout:g} s"
        raise Lost("unreachable", message, remedy="see whether a firewall is between, or name a --proxy") from error
    except socket.gaierror as error:
        message = f"{address.host!r} is not known: {error.strerror}"
        kind = AgentError if error.errno in _NEVER else Lost
        raise kind("unreachable", message, remedy="see whether the host's name is right") from error
    except PermissionError as error:
        remedy = "see the socket's mode and group, or ask as root"
        raise AgentError("denied", f"the {address} may not be used by this user", remedy=remedy) from error
    except OSError as error:
        raise _unconnected(address, error) from error


def _unconnected(address: Address, error: OSError) -> AgentError:
    reason = error.strerror or str(error) or type(error).__name__
    if address.socket and error.errno == errno.ENOENT:
        return AgentError("unreachable", f"there is no {address}", remedy="see whether the data daemon runs")
    remedy = "see whether its data daemon runs and the port is right, or name a --proxy"
    return Lost("unreachable", f"no connection to {address}: {reason}", remedy=remedy)


def _distrusted(address: Address, error: ssl.SSLCertVerificationError) -> AgentError:
    if error.verify_code in (_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH):
        message = f"the certificate of {address} is for another host: {error.verify_message}"
        remedy = "use a host name that is in the certificate, or have the server given one for this name"
    else:
        message = f"the certificate of {address} is not trusted: {error.verify_message}"
        remedy = "name the file of its CA with --cafile (--insecure trusts anybody)"
    return AgentError("unreachable", message, remedy=remedy)
