"""Exports over TCP: served to clients with the right credentials, and to nobody else."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.harness import MIB, AgentProcess, Json, overlay, raw_image, reachable
from tests.qemu.faults import HASTE, PATIENCE, ROOT, Pair, eventually
from tests.qemu.test_exports import alive, assert_no_grants, content, refusal, show, stop
from tests.qemu.test_writable_exports import holds

nbd: Any = importlib.import_module("nbd")

pytestmark = pytest.mark.qemu

SIZE = 16 * MIB


class Credentials:
    """A certificate authority, a server, two clients of it, a stranger, and pre-shared keys."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o755)
        self.folder = folder
        self.server, self.psk = folder / "server", folder / "psk"
        for place in (self.server, self.psk):
            place.mkdir(mode=0o755)
        self._authority("ca")
        self._authority("other-ca")
        self._certificate(self.server, "server", "server", "ca", "subjectAltName=IP:127.0.0.1,DNS:localhost")
        self.alice = self._client("alice", "ca")
        self.bob = self._client("bob", "ca")
        self.stranger = self._client("stranger", "other-ca")
        (self.psk / "keys.psk").write_text(f"backup:{os.urandom(32).hex()}\n")
        self.wrong_psk = folder / "wrong.psk"
        self.wrong_psk.write_text(f"backup:{os.urandom(32).hex()}\n")
        self.names = folder / "names"
        self.names.write_text("# who may connect\n\nCN=ali*\n")
        for path in (*self.server.iterdir(), self.psk / "keys.psk"):
            path.chmod(0o644)

    def _authority(self, name: str) -> None:
        self._openssl("req", "-x509", *self._key(f"{name}-key.pem"), "-out", f"{name}.pem", "-subj", f"/CN={name}")

    def _client(self, name: str, authority: str) -> Path:
        place = self.folder / name
        place.mkdir()
        self._certificate(place, "client", name, authority, "extendedKeyUsage=clientAuth")
        (place / "ca-cert.pem").write_text((self.folder / "ca.pem").read_text())
        return place

    def _certificate(self, place: Path, role: str, name: str, authority: str, extension: str) -> None:
        request, extensions = f"{name}.csr", self.folder / f"{name}.ext"
        extensions.write_text(extension + "\n")
        self._openssl("req", *self._key(f"{place}/{role}-key.pem"), "-out", request, "-subj", f"/CN={name}")
        signing = ["-CA", f"{authority}.pem", "-CAkey", f"{authority}-key.pem", "-CAcreateserial", "-days", "2"]
        self._openssl(
            "x509", "-req", "-in", request, *signing, "-extfile", str(extensions), "-out", f"{place}/{role}-cert.pem"
        )
        (place / "ca-cert.pem").write_text((self.folder / f"{authority}.pem").read_text())

    def _key(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", name]

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=self.folder)

    def settings(self) -> dict[str, str]:
        return {"TLS_X509_DIR": str(self.server), "TLS_PSK_DIR": str(self.psk)}


@pytest.fixture(scope="module")
def credentials() -> Iterator[Credentials]:
    """In a folder that stays open to others: pytest closes the way to its own whenever another one starts."""
    with tempfile.TemporaryDirectory(prefix="ha-tls-") as home:
        Path(home).chmod(0o755)
        yield Credentials(Path(home) / "pki")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, credentials: Credentials) -> Iterator[AgentProcess]:
    home = tmp_path_factory.mktemp("agent")
    with reachable(home), AgentProcess(home, {**HASTE, **credentials.settings()}) as process:
        yield process


def x509(export: Json, folder: Path) -> str:
    return f"{export['uri']}?tls-certificates={folder}"


def psk(export: Json, file: Path, user: str = "backup") -> str:
    return f"{export['uri'].replace('nbds://', f'nbds://{user}@')}?tls-psk-file={file}"


def is_served(uri: str) -> bool:
    """Whether nbdinfo gets at the export; it must come to an end."""
    return subprocess.run(["nbdinfo", "--size", uri], capture_output=True, timeout=PATIENCE).returncode == 0


def test_bitmaps_of_several_layers_are_not_merged_behind_tls(agent: AgentProcess, images: Pair) -> None:
    """The agent has no client's credentials, and so cannot see whether they tell of everything."""
    top = overlay(images.folder / "upper.qcow2", images.top, "qcow2")
    for image in (images.top, top):
        subprocess.run(["qemu-img", "bitmap", "--add", str(image), "daily"], check=True)
    request = {"image": str(top), "bitmaps": ["daily"], "tcp": "auto", "tls": "psk"}
    error = refusal(agent, "POST", "/v1/exports", request)
    assert (error.code, error.body["field"], bool(error.body["remedy"])) == ("not_supported", "bitmaps", True)
    export = agent.export(top, bitmaps=["daily"], shallow=True, tcp="auto", tls="psk")
    stop(agent, export)


def test_a_client_with_a_certificate_is_served_and_others_are_not(
    agent: AgentProcess, images: Pair, credentials: Credentials, tmp_path: Path
) -> None:
    export = agent.export(images.top, tcp="auto", tls="x509")
    assert export["uri"] == f"nbds://127.0.0.1:{export['port']}/{export['id']}"
    assert (export["tls"], export["socket"], export["size"]) == ("x509", "", SIZE)
    copy = tmp_path / "copy.raw"
    subprocess.run(["nbdcopy", x509(export, credentials.alice), str(copy)], check=True, timeout=PATIENCE)
    assert copy.read_bytes() == images.truth.read_bytes()
    assert is_served(x509(export, credentials.bob))
    empty = tmp_path / "empty"
    empty.mkdir()
    for uri in (
        x509(export, credentials.stranger),
        x509(export, empty),
        export["uri"].replace("nbds://", "nbd://"),
        psk(export, credentials.psk / "keys.psk"),
    ):
        assert not is_served(uri), uri
    assert not list((agent.runtime / "nbd").glob(f"{export['daemon']}*")), "there is no way around TLS"
    stop(agent, export)
    assert not alive(export["pid"])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", export["port"]), PATIENCE).close()
    assert_no_grants(agent, images)


def test_a_client_with_the_key_is_served_and_others_are_not(
    agent: AgentProcess, images: Pair, credentials: Credentials, tmp_path: Path
) -> None:
    export = agent.export(images.top, tcp="127.0.0.1:auto", tls="psk")
    copy = tmp_path / "copy.raw"
    uri = psk(export, credentials.psk / "keys.psk")
    subprocess.run(["nbdcopy", uri, str(copy)], check=True, timeout=PATIENCE)
    assert copy.read_bytes() == images.truth.read_bytes()
    for uri in (
        psk(export, credentials.wrong_psk),
        psk(export, credentials.psk / "keys.psk", "nobody"),
        export["uri"].replace("nbds://", "nbd://"),
        x509(export, credentials.alice),
    ):
        assert not is_served(uri), uri
    stop(agent, export)


def test_names_say_which_certificates_may_connect(tmp_path: Path, images: Pair, credentials: Credentials) -> None:
    settings = {**HASTE, **credentials.settings(), "TLS_X509_NAMES": str(credentials.names)}
    with AgentProcess(tmp_path, settings) as agent:
        export = agent.export(images.top, tcp="auto", tls="x509")
        assert is_served(x509(export, credentials.alice))
        assert not is_served(x509(export, credentials.bob))
        stop(agent, export)


def test_it_is_written_over_tls_and_outlives_the_agent(
    tmp_path: Path, images: Pair, credentials: Credentials, folder: Path
) -> None:
    new = raw_image(folder / "new.raw", SIZE)
    with AgentProcess(tmp_path, {**HASTE, **credentials.settings()}) as agent:
        export = agent.export(images.top, tcp="auto", tls="psk", writable=True, max_clients=8)
        agent.kill()
        agent.start()
        assert (show(agent, export)["state"], show(agent, export)["uri"]) == ("running", export["uri"])
        uri = psk(export, credentials.psk / "keys.psk")
        subprocess.run(["nbdcopy", "--flush", str(new), uri], check=True, timeout=PATIENCE)
        stop(agent, export)
        assert holds(images.top, new.read_bytes(), folder)


CLIENT = "import nbd, sys; h = nbd.NBD(); h.connect_uri(sys.argv[1]); print('in', flush=True); sys.stdin.read()"


@contextmanager
def connected(uri: str) -> Iterator[None]:
    code = CLIENT.replace("h.connect", "h.set_uri_allow_local_file(True); h.connect")
    process = subprocess.Popen([sys.executable, "-c", code, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"in\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_clients_are_named_by_their_address_and_count_for_stops_and_timeouts(
    agent: AgentProcess, images: Pair, credentials: Credentials
) -> None:
    export = agent.export(images.top, tcp="auto", tls="psk", idle_timeout=0.4)
    with connected(psk(export, credentials.psk / "keys.psk")):
        (client,) = show(agent, export)["clients"]
        assert client["name"].startswith("127.0.0.1:")
        error = refusal(agent, "DELETE", f"/v1/exports/{export['id']}")
        assert (error.code, client["name"] in error.body["detail"]) == ("busy", True)
        assert show(agent, export)["state"] == "running"
    assert eventually(lambda: show(agent, export)["state"] == "stopped")
    assert "no client" in show(agent, export)["reason"]


def test_others_of_the_image_stay_on_their_unix_socket(
    agent: AgentProcess, images: Pair, credentials: Credentials
) -> None:
    plain = agent.export(images.top)
    first, second = (agent.export(images.top, tcp="auto", tls=kind) for kind in ("x509", "psk"))
    assert len({plain["pid"], first["pid"], second["pid"]}) == 3
    assert content(plain["uri"]) == images.truth.read_bytes()
    for export in (plain, first):
        stop(agent, export)
    assert is_served(psk(second, credentials.psk / "keys.psk"))
    stop(agent, second)


@pytest.mark.parametrize(
    ("spec", "code", "field"),
    [
        ({"tcp": "auto"}, "invalid", "tls"),
        ({"tls": "x509"}, "invalid", "tls"),
        ({"tcp": "0", "tls": "psk"}, "invalid", "tcp"),
        ({"tcp": "65536", "tls": "psk"}, "invalid", "tcp"),
        ({"tcp": ":10809", "tls": "psk"}, "invalid", "tcp"),
        ({"tcp": "192.0.2.1:10809", "tls": "psk"}, "invalid", "tcp"),
        ({"tcp": "localhost:10809", "tls": "psk"}, "invalid", "tcp"),
    ],
)
def test_what_cannot_be_listened_on_is_refused(
    agent: AgentProcess, images: Pair, spec: Json, code: str, field: str
) -> None:
    error = refusal(agent, "POST", "/v1/exports", {"image": str(images.top), **spec})
    assert (error.code, error.body["field"]) == (code, field), error.body
    assert error.body["remedy"]
    assert str(images.top) not in {daemon["image"] for daemon in agent.get("/v1/host")["storage_daemons"]}
    assert_no_grants(agent, images)


def test_a_port_that_is_taken_is_busy(agent: AgentProcess, images: Pair) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        request = {"image": str(images.top), "tcp": str(other.getsockname()[1]), "tls": "psk"}
        error = refusal(agent, "POST", "/v1/exports", request)
        assert (error.code, error.body["field"]) == ("busy", "tcp"), error.body
    assert_no_grants(agent, images)


def test_without_credentials_it_is_refused_and_says_what_to_set(tmp_path: Path, images: Pair) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with AgentProcess(tmp_path, {**HASTE, "TLS_PSK_DIR": str(empty)}) as agent:
        for kind, words in (("x509", "tls.x509_dir"), ("psk", "keys.psk")):
            error = refusal(agent, "POST", "/v1/exports", {"image": str(images.top), "tcp": "auto", "tls": kind})
            assert (error.code, words in error.body["detail"] + error.body["remedy"]) == ("unavailable", True)
            assert error.body["field"] == "tls"


@pytest.mark.skipif(not ROOT, reason="the storage daemons' user is another one only as root")
def test_credentials_that_the_user_cannot_read_are_named(
    tmp_path: Path, images: Pair, credentials: Credentials
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "keys.psk").write_text((credentials.psk / "keys.psk").read_text())
    with AgentProcess(tmp_path, {**HASTE, "TLS_PSK_DIR": str(closed)}) as agent:
        error = refusal(agent, "POST", "/v1/exports", {"image": str(images.top), "tcp": "auto", "tls": "psk"})
        assert (error.code, str(closed) in error.body["remedy"]) == ("unavailable", True), error.body
        assert "ermission denied" in error.body["detail"]
        assert_no_grants(agent, images)


def test_no_secret_is_written_anywhere(agent: AgentProcess, images: Pair, credentials: Credentials) -> None:
    key = (credentials.psk / "keys.psk").read_text().strip().partition(":")[2]
    export = agent.export(images.top, tcp="auto", tls="psk")
    assert is_served(psk(export, credentials.psk / "keys.psk"))
    command = Path(f"/proc/{export['pid']}/cmdline").read_text()
    stop(agent, export)
    for text in (agent.log.read_text(), json.dumps(agent.events()), command, json.dumps(show(agent, export))):
        assert key not in text
