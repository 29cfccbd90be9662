"""Every route, asked by everybody there is: what the table says, the agent does; and SECURITY.md shows the table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from away import Away, away, bearer, site
from running_agent import serving

from events.bus import Bus
from hostagent.api import peercred, scopes
from hostagent.api.http import HttpSettings, build_app
from hostagent.api.peercred import PeerPolicy
from hostagent.api.projection import verbs
from hostagent.tokens import Scope
from tests.data.pki import Certificate

ROOT = Path(__file__).parents[3]
CALLERS = {
    "nobody": Scope.NONE,
    "bad token": None,
    "expired token": None,
    "read": Scope.READ,
    "operate": Scope.OPERATE,
    "admin": Scope.ADMIN,
    "certificate: read": Scope.READ,
    "certificate: operate": Scope.OPERATE,
    "certificate: admin": Scope.ADMIN,
    "certificate without scope": "without",
}
"""None: 401 whatever is asked for."""


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    here = site(tmp_path_factory.mktemp("site"))
    for word in ("read", "operate", "admin", "other"):
        here.pki.issue(f"{word}-client", extension="extendedKeyUsage=clientAuth")
    given = [f"CN:{word}-client={word}" for word in ("read", "operate", "admin")]
    with away(here, tmp_path_factory.mktemp("s"), scopes=given, tls_client_ca=here.pki.ca) as found:
        yield found


def certificate(there: Away, word: str) -> Certificate:
    folder = there.site.pki.folder
    return Certificate(folder / f"{word}-client.pem", folder / f"{word}-client-key.pem")


def concrete(path: str) -> str:
    return path.replace("{id}", "00000000-0000-0000-0000-000000000001")


def test_every_route_is_in_the_table_and_no_other() -> None:
    app = build_app(None, Bus(), settings=HttpSettings(host="h"), metrics=lambda: (b"", ""))  # type: ignore[arg-type]
    served = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    assert served | {("GET", "/openapi.json")} == scopes.ROUTES.keys()


@pytest.mark.parametrize("caller", CALLERS)
def test_each_route_answers_each_caller_of_tcp_as_the_table_says(there: Away, caller: str) -> None:
    scope = CALLERS[caller]
    word = caller.rpartition(" ")[2]
    shown = None
    headers = {
        "bad token": bearer(f"hostagent.read.{'x' * 43}"),
        "expired token": bearer(there.site.secrets["expired"]),
    }
    if caller.startswith("certificate"):
        shown = certificate(there, word if word in ("read", "operate", "admin") else "other")
    elif caller in there.site.secrets:
        headers[caller] = bearer(there.site.secrets[caller])
    wrong = []
    for (method, path), rule in scopes.ROUTES.items():
        if scope is None:
            expected: int | None = 401
        elif scope == "without":
            expected = None if rule.scope is Scope.NONE else 403
        else:
            assert isinstance(scope, Scope)
            expected = scopes.refused_with(rule, scope)
        status = there.status(method, concrete(path), headers.get(caller, {}), shown)
        if status != expected if expected else status in (401, 403):
            wrong.append((method, path, status, expected))
    assert not wrong


@pytest.mark.parametrize(
    ("uid", "scope"),
    [(os.geteuid(), Scope.ADMIN), (4711, Scope.OPERATE), (4712, None)],
    ids=["owner", "group", "others"],
)
def test_each_route_answers_each_process_as_the_table_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, scope: Scope | None
) -> None:
    callers = peercred.peer_of
    monkeypatch.setattr(peercred, "peer_of", lambda sock: callers(sock)._replace(uid=uid, gid=uid, groups=()))
    policy = PeerPolicy(uids=frozenset({0, os.geteuid()}), gids=frozenset({4711}))
    wrong = []
    with serving(tmp_path / "s", policy=policy) as agent:
        for (method, path), rule in scopes.ROUTES.items():
            if path == "/v1/events" and scope is not None:
                continue  # it would not end; tests of streams have it
            expected = scopes.refused_with(rule, scope)
            status = agent.call(method, concrete(path)).status
            if status != expected if expected else status in (401, 403):
                wrong.append((method, path, status, expected))
    assert not wrong


def test_a_token_on_the_unix_socket_gives_nothing(tmp_path: Path) -> None:
    here = site(tmp_path)
    with away(here, tmp_path, policy=PeerPolicy(uids=frozenset(), gids=frozenset())) as there:
        assert there.agent.call("GET", "/v1/jobs", headers=bearer(here.secrets["admin"])).status == 403
        assert there.call("GET", "/v1/jobs", token="admin").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/v1",
        "//healthz",
        "/healthz/",
        "/healthz%2f",
        "/healthz/../v1/host",
        "/%2e/healthz",
        "/HEALTHZ",
        "/v1/jobs/",
    ],
)
def test_what_is_no_route_is_told_to_nobody_who_is_unknown(there: Away, path: str) -> None:
    assert there.status("GET", path, {}) == 401
    assert there.status("POST", "/healthz", {}) == 401
    assert there.status("GET", path, bearer(there.site.secrets["read"])) == 404


@pytest.mark.parametrize("target", ["http://x/healthz", "*", "/healthz?x=1", "/healthz%0a", "/v1/host#/healthz"])
def test_no_way_of_writing_an_address_opens_another_route(there: Away, target: str) -> None:
    assert there.status("GET", target, {}) in ({200, 400, 404} if target.startswith("/healthz") else {400, 401})


def test_the_document_shows_who_may_what_on_the_bus() -> None:
    found = re.search(r"<!-- bus -->\n(.*?)<!-- end bus -->", (ROOT / "SECURITY.md").read_text(), re.DOTALL)
    assert found is not None and found[1] == verbs.table(), "write it anew: hostagent.api.projection.verbs.table()"


def test_the_document_shows_the_table() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    found = re.search(r"<!-- table -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found is not None and found[1] == scopes.table(), "write it anew: python -m hostagent.api.scopes"
