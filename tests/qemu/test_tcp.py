"""The real agent by TCP: the whole command line over TLS, who may do what with real images, and what stands in the audit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hostagent import tokens
from tests.data.pki import Certificate, Pki
from tests.harness import MIB, AgentProcess, Json, overlay, raw_image, reachable, same_content

pytestmark = pytest.mark.qemu

OK, NOT_FOUND, BUSY, DENIED, UNREACHABLE = 0, 3, 6, 7, 8
QUICK = {"JOBS_PROGRESS_INTERVAL": "0.1", "API_HANDSHAKE_RATE": "1000", "API_IDENTITY_INTERVAL": "0.1"}


def eventually(true: Callable[[], Any], seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as somebody's who has no agent of his own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HOSTAGENT_")}
    command = [sys.executable, "-m", "hostagent.cli.main", *map(str, words)]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=60)


@dataclass
class House:
    """An agent, its address, and the files of those who may use it."""

    agent: AgentProcess
    pki: Pki
    folder: Path
    url: str = ""
    files: dict[str, Path] = field(default_factory=dict)

    def token(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run("token", *words, "--file", self.agent.state / "tokens.json")

    def add(self, name: str, scope: str, *words: str) -> str:
        done = self.token("add", name, "--scope", scope, *words)
        assert done.returncode == OK, done.stderr
        return self.keep(name, done.stdout.strip())

    def keep(self, name: str, text: str) -> str:
        self.files[name] = self.folder / f"{name}.token"
        self.files[name].write_text(text + "\n")
        self.files[name].chmod(0o600)
        return text

    def cli(self, who: str | Certificate, *words: object) -> subprocess.CompletedProcess[str]:
        """As the holder of a token, by its name; or of a certificate."""
        known: dict[str, str] = {}
        if isinstance(who, Certificate):
            known = {"HOSTAGENT_CERTIFICATE": str(who.cert), "HOSTAGENT_KEY": str(who.key)}
        elif who:
            known = {"HOSTAGENT_TOKEN_FILE": str(self.files[who])}
        return run(*words, HOSTAGENT_URL=self.url, HOSTAGENT_CAFILE=str(self.pki.ca), **known)

    def look_for_address(self) -> None:
        lines = [json.loads(line) for line in self.agent.log.read_text().splitlines() if line.startswith("{")]
        (self.url,) = [f"https://{line['address']}" for line in lines if line["message"] == "listening"][-1:]

    def audit(self, what: str) -> list[Json]:
        file = self.agent.state / "audit.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if line["what"] == what]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("tcp")
    pki = Pki(folder / "pki")
    pool = folder / "pool"
    pool.mkdir()
    settings = {
        **QUICK,
        "IMAGES_POOLS": str(pool),
        "API_LISTEN": "127.0.0.1:0",
        "API_TLS_CERTIFICATE": str(pki.server.cert),
        "API_TLS_KEY": str(pki.server.key),
        "API_TLS_CLIENT_CA": str(pki.ca),
        "API_TLS_CLIENTS": "optional",
        "API_CERTIFICATE_SCOPES": "CN:client=operate",
    }
    with reachable(pool), AgentProcess(folder, settings) as agent:
        found = House(agent, pki, folder)
        with tokens.changing(agent.state / "tokens.json") as known:
            for scope in tokens.GIVEN:
                token, text = tokens.new(scope.word, scope, None)
                known.append(token)
                found.keep(scope.word, text)
        found.look_for_address()
        eventually(lambda: found.cli("read", "status").returncode == OK)
        yield found


@pytest.fixture
def images(house: House, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    name = request.node.name.replace("[", "-").replace("]", "")
    base = raw_image(house.folder / "pool" / f"{name}.raw", 4 * MIB)
    return base, overlay(base.with_suffix(".qcow2"), base)


def test_a_job_is_started_and_waited_for_from_afar(house: House, images: tuple[Path, Path]) -> None:
    base, top = images
    done = house.cli("operate", "--json", "job", "pull", top, "--wait")
    assert done.returncode == OK, done.stderr
    job = json.loads(done.stdout)
    assert job["state"] == "completed" and job["chain"]["after"] == [str(top)]
    assert same_content(base, top)
    assert json.loads(house.cli("read", "--json", "job", "show", job["id"]).stdout)["id"] == job["id"]
    eventually(lambda: house.audit("job start"))
    line = house.audit("job start")[-1]
    assert (line["who"], line["surface"], line["target"], line["id"], line["result"]) == (
        *("token operate", "tcp", str(top), job["id"], "ok"),
    )
    assert line["from"].startswith("127.0.0.1:") and line["request"]


def test_each_may_what_it_may_and_hears_what_is_missing(house: House, images: tuple[Path, Path]) -> None:
    _, top = images
    refused = house.cli("read", "job", "pull", top)
    assert refused.returncode == DENIED and "operate" in refused.stderr and "remedy" in refused.stderr
    assert house.cli("operate", "drain").returncode == DENIED
    assert house.cli("", "job", "list").returncode == DENIED
    assert house.cli(house.pki.client, "job", "list").returncode == OK
    drained = house.cli("admin", "drain")
    assert drained.returncode == OK, drained.stderr
    assert house.cli("operate", "job", "pull", top).returncode == BUSY
    assert house.cli("admin", "drain", "--undo").returncode == OK
    assert house.cli("operate", "job", "show", "00000000-0000-4000-8000-000000000000").returncode == NOT_FOUND


def test_images_outside_of_pools_are_for_owners_of_the_host_alone(house: House, folder: Path) -> None:
    image = overlay(folder / "a.qcow2", raw_image(folder / "a.raw", MIB))
    for who, status in (("operate", DENIED), ("admin", OK)):
        assert house.cli(who, "job", "pull", image, "--dry-run").returncode == status


def test_the_unix_socket_is_audited_too(house: House, images: tuple[Path, Path]) -> None:
    house.agent.export(images[1])
    eventually(lambda: house.audit("export start"))
    line = house.audit("export start")[-1]
    assert (line["who"], line["surface"], line["image"]) == (f"uid {os.geteuid()}", "unix", str(images[1]))
    assert line["from"] == f"pid {os.getpid()}"


def test_a_server_that_is_another_one_gets_no_token(house: House) -> None:
    stranger = house.pki.folder / "stranger-ca.pem"
    done = run("job", "list", "--url", house.url, "--cafile", stranger, "--token-file", house.files["admin"])
    assert done.returncode == UNREACHABLE and "certificate" in done.stderr
    assert run(
        "job", "list", "--url", house.url.replace("https", "http"), "--token-file", house.files["read"]
    ).returncode


def test_a_token_that_is_removed_is_over_at_once(house: House) -> None:
    house.add("short", "read", "--expires", "1h")
    eventually(lambda: house.cli("short", "job", "list").returncode == OK)
    follower = subprocess.Popen(
        [sys.executable, "-m", "hostagent.cli.main", "events", "--follow", "--json"],
        env={**os.environ, "HOSTAGENT_URL": house.url, "HOSTAGENT_CAFILE": str(house.pki.ca),
             "HOSTAGENT_TOKEN_FILE": str(house.files["short"])},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert house.token("list").stdout.count("short") == 1
        assert house.token("remove", "short").returncode == OK
        assert house.token("remove", "short").returncode == NOT_FOUND
        _, said = follower.communicate(timeout=30)
    finally:
        follower.kill()
    assert follower.returncode == DENIED and "token" in said
    assert house.cli("short", "job", "list").returncode == DENIED


def test_sighup_gives_other_scopes_and_opens_the_audit_anew(house: House) -> None:
    moved = house.agent.state / "audit.moved"
    house.agent.delete(f"/v1/exports/{house.agent.get('/v1/exports')['items'][0]['id']}")
    eventually(lambda: house.audit("export stop"))
    (house.agent.state / "audit.jsonl").rename(moved)
    assert house.agent.process is not None
    house.agent.process.send_signal(signal.SIGHUP)
    eventually(lambda: "settings read anew" in house.agent.log.read_text())
    house.cli("operate", "job", "abort", "00000000-0000-4000-8000-000000000000")
    eventually(lambda: house.audit("job abort"))
    assert house.audit("job abort")[0]["result"] == "not_found"


def test_no_secret_is_in_the_log_the_audit_the_metrics_or_the_state(house: House) -> None:
    texts = [
        house.agent.log.read_text(),
        house.agent.call("GET", "/metrics")[2],
        json.dumps(house.agent.get("/v1/host")),
    ]
    texts += [path.read_text(errors="replace") for path in house.agent.state.iterdir() if path.is_file()]
    for file in house.files.values():
        secret = file.read_text().strip().rpartition(".")[2]
        assert len(secret) == 43 and not [text for text in texts if secret in text]
    assert 'hostagent_api_refused_total{reason="scope"}' in texts[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"API_LISTEN": "0.0.0.0:0"}, "api.tls_certificate"),
        ({"API_LISTEN": "127.0.0.1:0", "API_TLS_CERTIFICATE": "/nonexistent"}, "/nonexistent"),
        ({"API_LISTEN": "192.0.2.1:1", "API_TLS_CERTIFICATE": "{cert}", "API_TLS_KEY": "{key}"}, "cannot listen"),
    ],
)
def test_what_would_be_open_or_broken_is_not_begun(
    house: House, tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    server = house.pki.server
    given = {key: value.format(cert=server.cert, key=server.key) for key, value in settings.items()}
    environment = {f"HOSTAGENT_{key}": value for key, value in given.items()}
    words = ["serve", "--state-dir", tmp_path / "state", "--runtime-dir", tmp_path / "run"]
    words += ["--hypervisor-user", house.agent.user] if house.agent.user else []
    done = run(*words, HOSTAGENT_LIBVIRT_URI="", HOSTAGENT_DATA_START="false", **environment)
    assert done.returncode and said in done.stderr, done.stderr
