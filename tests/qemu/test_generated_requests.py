"""Requests made from the published document by schemathesis, good ones and bad ones, to the real agent over TLS: none is a
fault (500), none hangs, each refusal is a problem that says what is wrong, and each answer is as the document says.

The agent's identity for them may operate, on images of one folder: what they ask for is carried out, on real images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from events.bus import Bus
from hostagent import tokens
from hostagent.api.http import HttpSettings, build_app
from hostagent.tokens import Scope
from tests.data.pki import Pki
from tests.harness import MIB, AgentProcess, overlay, raw_image, reachable

pytestmark = pytest.mark.qemu

EXAMPLES = int(os.environ.get("GENERATED", "6"))
"""Of each operation and kind. So few are for `make test`; `make test-full` makes more."""
HEAD = 16384  # bytes, at least, that the server reads of a head
SLOWEST = 30.0  # seconds; an answer that takes longer, on whatever machine, hangs
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


def _document() -> dict[str, Any]:
    app = build_app(None, Bus(), settings=HttpSettings(host="h"), metrics=lambda: (b"", ""))  # type: ignore[arg-type]
    return app.openapi()


SCHEMA = schemathesis.openapi.from_dict(_document())
OPERATIONS = {operation.label: operation for operation in (found.ok() for found in SCHEMA.get_all_operations())}


class There:
    """The agent, and what it has: an image on a base, an export, a job that has ended."""

    def __init__(self, agent: AgentProcess, pki: Pki, pool: Path, secrets: dict[str, str]) -> None:
        self.agent = agent
        base = raw_image(pool / "base.raw", MIB)
        self.image = str(overlay(pool / "top.qcow2", base))
        done = overlay(pool / "done.qcow2", base)
        self.job = agent.until_ended(agent.pull(done)["id"])["id"]
        self.export = agent.export(done)["id"]
        self.free = str(pool / "copy.qcow2")
        lines = [json.loads(line) for line in agent.log.read_text().splitlines() if line.startswith("{")]
        self.url = next(f"https://{line['address']}" for line in lines if line["message"] == "listening")
        self.session = requests.Session()
        self.session.trust_env = False
        self.ca = str(pki.ca)
        self.secrets = secrets

    def ids(self, path: str) -> str:
        return self.export if "exports" in path else self.job


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[There]:
    folder = tmp_path_factory.mktemp("generated")
    pki, pool = Pki(folder / "pki"), folder / "pool"
    pool.mkdir()
    given = {
        "IMAGES_POOLS": str(pool),
        "API_LISTEN": "127.0.0.1:0",
        "API_TLS_CERTIFICATE": str(pki.server.cert),
        "API_TLS_KEY": str(pki.server.key),
        "API_HANDSHAKE_RATE": "1000",
        "API_AUTH_FAILURES": "10000",
        "API_WAIT_LIMIT": "0.2",
        "API_KEEPALIVE": "600",  # what is generated may take longer than a connection is kept else
        "JOBS_PROGRESS_INTERVAL": "0.1",
    }
    agent = AgentProcess(folder, given)
    agent.state.mkdir(mode=0o700)
    secrets = {}
    with tokens.changing(agent.state / "tokens.json") as found:
        for scope in (Scope.READ, Scope.OPERATE):
            token, secrets[scope.word] = tokens.new(scope.word, scope, None)
            found.append(token)
    with reachable(pool), agent:
        yield There(agent, pki, pool, secrets)


def ask(there: There, case: schemathesis.Case, who: str) -> Any:
    known = {"authorization": f"Bearer {there.secrets[who]}"} if who else {}
    given: dict[str, Any] = {"verify": there.ca, "timeout": SLOWEST}
    if case.path != "/v1/events":
        return case.call(base_url=there.url, headers=known, session=there.session, **given)
    with there.session.request(**case.as_transport_kwargs(there.url, headers=known), **given, stream=True) as answer:
        if answer.status_code >= 400:  # any other one does not end
            answer.json()
        return answer


def judge(case: schemathesis.Case, answer: Any) -> None:
    about = f"{case.as_curl_command()}\n{answer.status_code}"
    assert answer.status_code != 500, f"{about} {answer.text}"
    if answer.status_code >= 400:
        kind = answer.headers["content-type"]
        assert (kind[0] if isinstance(kind, list) else kind) == "application/problem+json", about
        problem = answer.json()
        assert problem["status"] == answer.status_code and problem["code"] and problem["detail"], about
        # A head that is too large, and comes in pieces, is no request.
        assert problem.get("request_id") or problem["detail"] == "that was not an HTTP request", about
    elif case.path != "/v1/events":
        case.validate_response(answer, checks=[schemathesis.checks.response_schema_conformance])


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_an_answer_is_no_fault_and_as_the_document_says(there: There, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]

    @seed(20261130)
    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=operation.as_strategy(generation_mode=mode),
        real=st.booleans(),
        who=st.sampled_from(["operate"] * 4 + ["read", ""]),
    )
    def run(case: schemathesis.Case, real: bool, who: str) -> None:
        if real:
            _about_what_there_is(there, case)
        try:
            answer = ask(there, case, who)
        except requests.ConnectionError as error:
            # Of a head that is too large the rest is not read: its answer may be lost with the connection.
            if error.request is None or len(error.request.url or "") < HEAD:
                raise
            return
        judge(case, answer)

    try:
        run()
    except Exception as error:
        if "Unsatisfiable" not in type(error).__name__:  # there is nothing about this operation that could be wrong
            raise
    assert there.agent.process is not None and there.agent.process.poll() is None
    assert there.agent.get("/healthz", timeout=SLOWEST) == {"ok": True}


def _about_what_there_is(there: There, case: schemathesis.Case) -> None:
    """Ids and paths that mean something, in place of any."""
    if case.path_parameters and "id" in case.path_parameters:
        case.path_parameters["id"] = there.ids(case.path)
    if isinstance(case.query, dict) and "path" in case.query:
        case.query["path"] = there.image
    if isinstance(case.body, dict):
        for member, value in (("target", there.image), ("image", there.image), ("dest", there.free)):
            if isinstance(case.body.get(member), str):
                case.body[member] = value


def test_the_agent_has_no_fault_in_its_log(there: There) -> None:
    lines = [json.loads(line) for line in there.agent.log.read_text().splitlines() if line.startswith("{")]
    assert not [line for line in lines if "traceback" in line or "fault" in line["message"]]
