"""From when to when a certificate holds: what `ssl` does not tell of a server's own (RFC 5280, 4.1.2.5)."""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

LARGEST_FILE = 1 << 20  # bytes; a chain of certificates has a few KiB
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\n.*?-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE, _INTEGER, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0x02, 0xA0, 0x17, 0x18


class Validity(NamedTuple):
    begins: datetime
    ends: datetime


def validity(path: Path) -> Validity:
    """Of the first certificate in a PEM file, which is the server's own. OSError, ValueError."""
    with path.open("rb") as file:
        text = file.read(LARGEST_FILE).decode("latin-1").replace("\r\n", "\n")
    found = _PEM.search(text)
    if found is None:
        raise ValueError("no certificate is in it")
    return _validity(ssl.PEM_cert_to_DER_cert(found[0]))


def _validity(der: bytes) -> Validity:
    try:
        _, at, _ = _element(der, 0, _SEQUENCE)  # the certificate
        _, at, _ = _element(der, at, _SEQUENCE)  # what is signed
        tag, _, end = _element(der, at)
        if tag == _VERSION:
            at = end
        _, _, at = _element(der, at, _INTEGER)  # the serial number
        for _ in ("signature", "issuer"):
            _, _, at = _element(der, at, _SEQUENCE)
        _, at, _ = _element(der, at, _SEQUENCE)
        begins, at = _time(der, at)
        ends, _ = _time(der, at)
    except IndexError as error:
        raise ValueError("the certificate is cut off") from error
    return Validity(begins, ends)


def _element(der: bytes, at: int, wanted: int | None = None) -> tuple[int, int, int]:
    """The tag of the element at `at`, where its content begins, and where it ends."""
    tag, length = der[at], der[at + 1]
    begin = at + 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[begin : begin + size])
        begin += size
    end = begin + length
    if wanted not in (None, tag) or end > len(der):
        raise ValueError("the certificate is not what RFC 5280 says that one is")
    return tag, begin, end


def _time(der: bytes, at: int) -> tuple[datetime, int]:
    tag, begin, end = _element(der, at)
    text = der[begin:end].decode("ascii", "replace")
    if tag == _UTC_TIME:  # two digits of the year: 1950 to 2049
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("the certificate has no time where one must be")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC), end
