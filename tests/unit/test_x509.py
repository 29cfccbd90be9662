from __future__ import annotations

import contextlib
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent import x509
from tests.data.pki import Pki


def test_it_is_what_openssl_says(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    for cert in (pki.server.cert, pki.ca):
        found = x509.validity(cert)
        said = subprocess.run(
            ["openssl", "x509", "-in", str(cert), "-noout", "-dates"], capture_output=True, text=True, check=True
        )
        for line, time in zip(said.stdout.splitlines(), found, strict=True):
            text = line.partition("=")[2]
            assert time == datetime.strptime(text, "%b %d %H:%M:%S %Y GMT").replace(tzinfo=UTC)
    assert found.ends - found.begins == timedelta(days=2)


def test_a_year_beyond_2049_is_read(tmp_path: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", "k.pem", "-out", "c.pem", "-subj", "/CN=x", "-days", "20000"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert x509.validity(tmp_path / "c.pem").ends.year >= 2060


@pytest.mark.parametrize("text", ["", "x", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_a_value_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.pem").write_text(text)
    with pytest.raises(ValueError):
        x509.validity(tmp_path / "c.pem")


@given(st.binary(max_size=300))
def test_any_bytes_are_judged_without_a_crash(data: bytes) -> None:
    for der in (data, b"\x30\x82\x01\x00\x30\x81\xff" + data):
        with contextlib.suppress(ValueError):
            x509._validity(der)
