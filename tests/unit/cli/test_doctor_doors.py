"""What the doctor says of who can get in from elsewhere, and of what that leans on."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hostagent import tokens
from hostagent.cli import doctor_doors, doctor_host
from hostagent.cli.finding import Finding
from hostagent.config import DEFAULTS, Config
from hostagent.tokens import Scope
from tests.data.pki import Pki


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def config(tmp_path: Path, pki: Pki) -> Config:
    """Served beyond this host, with all that it needs."""
    api = replace(
        DEFAULTS.api,
        listen=("0.0.0.0:54323",),
        tls_certificate=pki.server.cert,
        tls_key=pki.server.key,
        tokens_file=tmp_path / "tokens.json",
    )
    return replace(DEFAULTS, api=api)


def changed(config: Config, **api: Any) -> Config:
    return replace(config, api=replace(config.api, **api))


def of(found: Iterable[Finding], name: str) -> list[tuple[str, str, str]]:
    return [(one.result.value, one.message, one.remedy or "") for one in found if one.name == name]


def one(found: Iterable[Finding], name: str) -> tuple[str, str, str]:
    (only,) = of(found, name)
    return only


def signed(pki: Pki, name: str, days: int) -> Path:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", f"{name}-key.pem", "-out", f"{name}.pem", "-subj", "/CN=x", "-days", str(days)]
    subprocess.run(command, check=True, capture_output=True, cwd=pki.folder)
    return pki.folder / f"{name}.pem"


def test_nothing_is_said_of_what_is_off() -> None:
    found = list(doctor_doors.findings(DEFAULTS))
    assert one(found, "API by TCP")[0] == "ok" and "off" in one(found, "API by TCP")[1]
    assert not of(found, "API certificate") and not of(found, "libraries")


def test_it_says_who_can_reach_the_api(config: Config) -> None:
    result, text, _ = one(doctor_doors.findings(config), "API by TCP")
    assert result == "ok" and "0.0.0.0:54323" in text and "beyond this host" in text
    assert (
        "for this host alone" in one(doctor_doors.findings(changed(config, listen=("127.0.0.1:1",))), "API by TCP")[1]
    )
    plain = changed(config, listen=("[::1]:1",), tls_certificate=DEFAULTS.api.tls_certificate, plain_loopback=True)
    assert one(doctor_doors.findings(plain), "API by TCP")[0] == "warn"


@pytest.mark.parametrize(("where", "results"), [("", []), ("127.0.0.1:1", ["ok"]), ("[::]:1", ["warn"])])
def test_it_says_who_can_reach_the_metrics(config: Config, where: str, results: list[str]) -> None:
    given = replace(config, metrics=replace(config.metrics, listen=where))
    assert [result for result, *_ in of(doctor_doors.findings(given), "metrics by TCP")] == results


def test_it_says_who_can_reach_images(config: Config, pki: Pki) -> None:
    assert "127.0.0.1, port 54322, without TLS" in one(doctor_doors.findings(config), "data by TCP")[1]
    served = replace(config, data=replace(config.data, cert=pki.server.cert, key=pki.server.key))
    assert "open beyond this host" in one(doctor_doors.findings(served), "data by TCP")[1]
    assert not of(doctor_doors.findings(replace(config, data=replace(config.data, port=-1))), "data by TCP")


@pytest.mark.parametrize(("days", "result"), [(400, "ok"), (10, "warn")])
def test_a_certificate_that_ends_soon_is_a_warning(config: Config, pki: Pki, days: int, result: str) -> None:
    cert = signed(pki, f"own-{days}", days)
    given = changed(config, tls_certificate=cert, tls_key=pki.folder / f"own-{days}-key.pem")
    found = of(doctor_doors.findings(given), "API certificate")
    assert found[0][0] == result and (datetime.now(UTC) + timedelta(days=days)).strftime("%Y-%m-%d") in found[0][1]


def test_a_certificate_that_is_over_or_none_or_anothers_fails(config: Config, pki: Pki, tmp_path: Path) -> None:
    (tmp_path / "none.pem").write_text("x")
    for cert, said in ((tmp_path / "none.pem", "no certificate"), (tmp_path / "away.pem", "No such file")):
        found = of(doctor_doors.findings(changed(config, tls_certificate=cert)), "API certificate")
        assert found[0][0] == "fail" and said in found[0][1] and found[0][2]
    found = of(doctor_doors.findings(changed(config, tls_key=pki.client.key)), "API certificate")
    assert found[-1][0] == "fail" and "do not go together" in found[-1][1]


def test_a_certificate_that_is_over_fails(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(doctor_doors.x509, "validity", lambda path: (long_ago, long_ago + timedelta(days=1)))
    result, text, remedy = of(doctor_doors.findings(config), "API certificate")[0]
    assert result == "fail" and "2020-01-02" in text and remedy


@pytest.mark.parametrize(("mode", "result"), [(0o600, "ok"), (0o640, "ok"), (0o644, "fail"), (0o660, "fail")])
def test_a_key_is_its_owners(config: Config, pki: Pki, mode: int, result: str) -> None:
    pki.server.key.chmod(mode)
    assert of(doctor_doors.findings(config), "API certificate")[1][0] == result


def test_certificates_of_the_data_daemon_and_of_exports_are_looked_at_too(
    config: Config, pki: Pki, tmp_path: Path
) -> None:
    data = replace(config.data, cert=pki.server.cert, key=pki.server.key, client_ca=pki.ca)
    found = list(doctor_doors.findings(replace(config, data=data, tls=replace(config.tls, x509_dir=tmp_path))))
    assert of(found, "data certificate") and of(found, "data clients' authority")
    assert of(found, "exports' certificate")[0][0] == "fail"


def test_certificates_of_clients_and_their_scopes_belong_together(config: Config, pki: Pki) -> None:
    assert of(doctor_doors.findings(changed(config, tls_client_ca=pki.ca)), "API clients' authority")[-1][0] == "warn"
    found = of(doctor_doors.findings(changed(config, certificate_scopes=("CN:a=read",))), "API clients' authority")
    assert [result for result, *_ in found] == ["warn"]


def test_tokens_without_an_end_or_none_at_all_are_warnings(config: Config) -> None:
    assert one(doctor_doors.findings(config), "tokens")[0] == "warn"
    soon = datetime.now(UTC) + timedelta(days=1)
    for name, expires, results in (
        ("with-end", soon, ["ok"]),
        ("over", datetime.now(UTC) - timedelta(days=1), ["ok", "ok"]),
        ("forever", None, ["warn", "ok"]),
    ):
        token, _ = tokens.new(name, Scope.READ, expires)
        with tokens.changing(config.api.tokens_file) as found:
            found.append(token)
        assert [result for result, *_ in of(doctor_doors.findings(config), "tokens")] == results
    assert "forever" in of(doctor_doors.findings(config), "tokens")[0][1]
    config.api.tokens_file.chmod(0o666)
    assert one(doctor_doors.findings(config), "tokens")[0] == "fail"


class Kernel:
    def __init__(self, status: int, result: int = 0) -> None:
        self._status = status
        self._result = result

    def adjtimex(self, buffer: Any) -> int:
        buffer[24:32] = (1500).to_bytes(8, "little")
        buffer[40:44] = self._status.to_bytes(4, "little")
        return self._result


@pytest.mark.parametrize(
    ("kernel", "result", "said"),
    [
        (Kernel(0x2001), "ok", "0.002 s"),
        (Kernel(0x40, 5), "warn", "nothing keeps"),
        (Kernel(0, -1), "ok", "does not say"),
    ],
)
def test_the_clock_is_judged_by_the_kernel(
    kernel: Kernel, result: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_doors.ctypes, "CDLL", lambda *_, **__: kernel)
    found, text, _ = one(doctor_doors.findings(DEFAULTS), "clock")
    assert found == result and said in text


def test_the_kernel_of_this_host_answers() -> None:
    assert "does not say" not in one(doctor_doors.findings(DEFAULTS), "clock")[1]


def test_libraries_with_known_bugs_are_warnings(config: Config, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [result for result, *_ in of(doctor_doors.findings(config), "libraries")] == ["ok"]
    monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 0, 0, 7, 0))  # OpenSSL 3.0.7, as ssl has it
    assert [result for result, *_ in of(doctor_doors.findings(changed(config, tls_client_ca=pki.ca)), "libraries")] == ["ok"]
    monkeypatch.setattr(doctor_doors, "_takes_malformed_chunks", lambda: True)
    monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 0, 0, 6, 0))
    found = of(doctor_doors.findings(changed(config, tls_client_ca=pki.ca)), "libraries")
    assert [result for result, *_ in found] == ["warn", "warn", "ok"]
    assert "CVE-2025-43859" in found[0][1] and "CVE-2022-3602" in found[1][1]


@pytest.mark.parametrize(
    ("version", "mended"),
    [
        ((7, 2, 22), True),
        ((7, 2, 13), False),
        ((8, 1, 9), False),
        ((8, 2, 7), True),
        ((9, 0, 2), False),
        ((10, 0, 0), True),
    ],
)
def test_a_version_of_qemu_is_mended_in_its_own_line(version: tuple[int, ...], mended: bool) -> None:
    assert doctor_host._mended(version, doctor_host.SAFE_CLOSING_QEMU) is mended


def test_what_is_free_is_said_and_too_little_fails(config: Config, tmp_path: Path) -> None:
    here = replace(
        config,
        agent=replace(config.agent, state_dir=tmp_path),
        audit=replace(config.audit, file=tmp_path / "audit.jsonl"),
        images=replace(config.images, pools=(str(tmp_path / "nowhere"),)),
    )
    assert one(doctor_doors.space(here), "space")[0] in ("ok", "warn")
    full = replace(here, store=replace(here.store, min_free=1 << 60))
    result, text, remedy = one(doctor_doors.space(full), "space")
    assert result == "fail" and "store.min_free" in text and remedy
