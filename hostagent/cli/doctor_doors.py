"""What `hostagent doctor` finds out about who can get in from elsewhere: listeners, certificates and keys, tokens; and
about what those lean on: the clock, the libraries."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import h11

from hostagent import tokens, x509
from hostagent.cli.finding import Finding, fail, ok, warn
from hostagent.cli.terminal import counted
from hostagent.config import UNSET, Config
from hostagent.errors import AgentError
from hostagent.listening import address_of

SOON = timedelta(days=21)
"""Before its end, that of a certificate is a warning."""
MOST_NAMES = 10  # of tokens, in one line
_STA_UNSYNC = 0x0040
_STATUS = 40  # where struct timex has it on 64 bits: after modes, and four longs (adjtimex(2))
_MAXERROR = 24
OPENSSL = ((3, 0, 0), (3, 0, 7))
"""From, and up to: whose check of a client's certificate can be overrun (CVE-2022-3602, CVE-2022-3786)."""


def findings(config: Config) -> Iterator[Finding]:
    yield from _listeners(config)
    yield from _metrics(config)
    yield from _data(config)
    for name, cert, key in _pairs(config):
        yield from _certificate(name, cert, key)
    yield from _authorities(config)
    yield from _tokens(config)
    yield _clock()
    yield from _libraries(config)


# Listeners


def _listeners(config: Config) -> Iterator[Finding]:
    name, api = "API by TCP", config.api
    if not api.listen:
        yield ok(name, "off: the API is reached on its unix socket alone")
        return
    addresses = [ipaddress.ip_address(address_of(text)[0]) for text in api.listen]
    where = ", ".join(api.listen)
    if api.tls_certificate == UNSET:
        yield warn(name, f"{where}, without TLS: root, and who can become it, may listen in", "set api.tls_certificate")
    elif all(address.is_loopback for address in addresses):
        yield ok(name, f"{where}, with TLS, for this host alone")
    else:
        whom = "to whoever reaches the host" if any(address.is_unspecified for address in addresses) else ""
        yield ok(name, f"{where}, with TLS, open beyond this host {whom}".rstrip())


def _metrics(config: Config) -> Iterator[Finding]:
    if not (where := config.metrics.listen):
        return
    text = f"{where}, without encryption or identities: whoever reaches it reads names of guests and paths of images"
    if ipaddress.ip_address(address_of(where)[0]).is_loopback:
        yield ok("metrics by TCP", text)
    else:
        yield warn("metrics by TCP", text, "have them from api.listen, with a token whose scope is read")


def _data(config: Config) -> Iterator[Finding]:
    data = config.data
    if not data.start or data.port < 0:
        return
    where = data.listen or ("::" if data.cert != UNSET else "127.0.0.1")
    text = f"{where}, port {data.port}, {'with' if data.cert != UNSET else 'without'} TLS: images for who has a ticket"
    yield ok("data by TCP", text if _is_loopback(where) else f"{text}; open beyond this host")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # the daemon says so when it starts
        return False


def _pairs(config: Config) -> Iterator[tuple[str, Path, Path]]:
    """Certificates with their keys, by whose they are."""
    api, data, folder = config.api, config.data, config.tls.x509_dir
    if api.tls_certificate != UNSET:
        yield "API certificate", api.tls_certificate, _or(api.tls_key, api.tls_certificate)
    if data.cert != UNSET:
        yield "data certificate", data.cert, _or(data.key, data.cert)
    if folder != UNSET:
        yield "exports' certificate", folder / "server-cert.pem", folder / "server-key.pem"


def _or(key: Path, cert: Path) -> Path:
    return cert if key == UNSET else key


def _certificate(name: str, cert: Path, key: Path) -> Iterator[Finding]:
    yield _holds(name, cert)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        yield fail(name, f"{cert} and the key {key} do not go together: {error}", "see `openssl x509`, `openssl pkey`")
        return
    found = key.stat()
    if found.st_mode & (stat.S_IRWXO | stat.S_IWGRP):
        text = f"others than its owner can get at the key {key} (mode {stat.S_IMODE(found.st_mode):04o})"
        yield fail(name, text, f"chmod 0600 {key}; where another user must read it, 0640 and its group")
    else:
        yield ok(name, f"the key {key} is its owner's (mode {stat.S_IMODE(found.st_mode):04o})")


def _no_password() -> str:
    raise ValueError("it has a password, and nobody is there to be asked")


def _holds(name: str, path: Path) -> Finding:
    """Whether a certificate's time is over, or soon will be."""
    try:
        begins, ends = x509.validity(path)
    except (OSError, ValueError) as error:
        return fail(name, f"{path}: {getattr(error, 'strerror', None) or error}", "name a certificate (PEM)")
    now, until = datetime.now(UTC), f"{ends:%Y-%m-%d %H:%M} UTC"
    if ends <= now:
        return fail(name, f"{path} was good until {until}: clients refuse it", "put a new one in its place")
    if begins > now:
        return fail(name, f"{path} is good from {begins:%Y-%m-%d %H:%M} UTC on only", "look at the clock")
    if ends - now < SOON:
        days = counted(int((ends - now) / timedelta(days=1)), "day")
        return warn(name, f"{path} is good until {until}, for {days}", "put a new one in its place")
    return ok(name, f"{path} is good until {until}")


def _authorities(config: Config) -> Iterator[Finding]:
    name, api = "API clients' authority", config.api
    if api.listen and api.tls_client_ca != UNSET:
        yield _holds(name, api.tls_client_ca)
        if not api.certificate_scopes:
            text = "clients show certificates, and no name in them may do anything"
            yield warn(name, text, "set api.certificate_scopes, where certificates alone should do")
    elif api.certificate_scopes:
        yield warn(name, "api.certificate_scopes is set, and no certificate is asked for", "set api.tls_client_ca")
    if config.data.client_ca != UNSET:
        yield _holds("data clients' authority", config.data.client_ca)


# Tokens


def _tokens(config: Config) -> Iterator[Finding]:
    name, api = "tokens", config.api
    try:
        found = tokens.read(api.tokens_file)
    except AgentError as error:
        yield fail(name, error.message, error.remedy)
        return
    now = datetime.now(UTC)
    if not found:
        if api.listen and not api.certificate_scopes:
            yield warn(name, "none, and so nobody may use the API by TCP", "hostagent token add NAME --scope read")
        else:
            yield ok(name, "none")
        return
    if len(found) > api.tokens:
        yield fail(name, f"{len(found)}, and api.tokens is {api.tokens}: none is accepted", "raise it, or remove some")
    forever = [token.name for token in found if token.expires is None]
    if forever:
        text = f"{counted(len(forever), 'token')} without an end: {_some(forever)}"
        yield warn(name, text, "make them anew with --expires, where whoever has them can be told")
    if over := [token.name for token in found if token.over(now)]:
        yield ok(
            name, f"{counted(len(over), 'token')} whose time is over: {_some(over)}", "hostagent token remove NAME"
        )
    if not forever:
        yield ok(name, f"{counted(len(found), 'token')}, each with an end")


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (" …" if len(names) > MOST_NAMES else "")


# What all this leans on


def _clock() -> Finding:
    """What the kernel says of its clock: tokens, certificates and times to live end by it."""
    name = "clock"
    timex = ctypes.create_string_buffer(512)
    if ctypes.sizeof(ctypes.c_long) != 8 or ctypes.CDLL(None, use_errno=True).adjtimex(timex) < 0:
        return ok(name, "the kernel does not say whether it is right")
    status = int.from_bytes(timex.raw[_STATUS : _STATUS + 4], "little")
    error = int.from_bytes(timex.raw[_MAXERROR : _MAXERROR + 8], "little") / 1e6
    if status & _STA_UNSYNC:
        text = "nothing keeps it right: tokens, certificates and times to live end by it"
        return warn(name, text, "apt install systemd-timesyncd (or chrony); in a container, mend its host's")
    return ok(name, f"kept right, to {error:.3f} s")


def _libraries(config: Config) -> Iterator[Finding]:
    """Versions with bugs that matter to who comes from elsewhere."""
    if not config.api.listen:
        return
    name = "libraries"
    installed = metadata.version("h11")
    if _takes_malformed_chunks():
        text = f"h11 {installed} takes malformed chunks (CVE-2025-43859), which matters behind a proxy"
        yield warn(name, text, "update it: h11 0.16, and what distributions have mended, does not")
    low, high = OPENSSL
    major, minor, _, patch, _ = ssl.OPENSSL_VERSION_INFO
    if config.api.tls_client_ca != UNSET and low <= (major, minor, patch) < high:
        text = f"{ssl.OPENSSL_VERSION} can be overrun by a client's certificate (CVE-2022-3602)"
        yield warn(name, text, "install 3.0.7 or newer, unless the distribution has mended this one")
    yield ok(name, f"h11 {installed}, {ssl.OPENSSL_VERSION}")


def _takes_malformed_chunks() -> bool:
    """Asked of h11 itself, for distributions mend versions that upstream has left."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\naXX0\r\n\r\n")
    try:
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                return False
    except h11.RemoteProtocolError:
        return False
    return True


def space(config: Config) -> Iterator[Finding]:
    """What is free where the agent writes: its store and audit, and the pools."""
    wanted = config.store.min_free
    for folder in dict.fromkeys((config.agent.state_dir, config.audit.file.parent)):
        yield from _space(folder, wanted, f"store.min_free is {wanted}: no new work is taken")
    for pool in config.images.pools:
        yield from _space(Path(pool), 0, "")


def _space(folder: Path, wanted: int, what: str) -> Iterator[Finding]:
    from hostagent.sizes import format_size

    name = "space"
    try:
        found = os.statvfs(folder)
    except OSError:
        return  # that it is not there is said by another check
    free, whole = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    text = f"{format_size(free)} of {format_size(whole)} are free in {folder}"
    if free < wanted:
        yield fail(name, f"{text}, and {what}", "make space there")
    elif whole and free < whole / 50:
        yield warn(name, f"{text}: less than 2 %", "make space there, before copies and guests' images fill it")
    elif found.f_files and found.f_favail < 100:
        yield warn(name, f"{found.f_favail} files can be made in {folder}", "remove some files there")
    else:
        yield ok(name, text)
