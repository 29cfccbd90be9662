"""The doors to the API: who a client is, and those who would rather be somebody else, or in the way."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from away import Away, Site, away, bearer, parsed, request, site, until, until_end

from hostagent.addresses import network_of
from hostagent.api.identities import ADDRESSES, Anew, Failures, Identities, Identity, Shown
from hostagent.config import DEFAULTS
from hostagent.errors import AgentError
from hostagent.listening import address_of, certificate_of, scopes_of
from hostagent.tokens import Scope, Tokens

PULL = {"operation": "pull", "target": "/img/top.qcow2"}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def there(here: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Away]:
    with away(here, tmp_path_factory.mktemp("s")) as found:
        yield found


def eventually(true: Callable[[], Any], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def curl(there: Away, path: str, *words: str) -> tuple[int, Any]:
    command = ["curl", "-sS", "-m", "20", "--cacert", str(there.site.pki.ca), "-w", "\n%{http_code}", *words]
    done = subprocess.run([*command, f"https://127.0.0.1:{there.port}{path}"], capture_output=True, text=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status or 0), json.loads(body) if body.startswith("{") else body or done.stderr


# Who somebody is


def test_the_certificate_of_a_client_reaches_the_application(here: Site, tmp_path: Path) -> None:
    client = ["--cert", str(here.pki.client.cert), "--key", str(here.pki.client.key)]
    body = ["-H", "content-type: application/json", "-d", json.dumps(PULL)]
    with away(here, tmp_path, tls_client_ca=here.pki.ca, scopes=["CN:client=operate"], tls_clients="required") as there:
        status, job = curl(there, "/v1/jobs", *client, *body)
        assert (status, job["state"]) == (202, "running")
        peer = there.agent.service.calls[0][1][1]
        assert peer.remote.name == "certificate CN:client" and peer.remote.scope is Scope.OPERATE
        assert peer.remote.address.startswith("127.0.0.1:") and not peer.owner
        assert there.agent.audit == [
            there.agent.audit[0]
            | {"what": "job start", "result": "ok", "who": "certificate CN:client", "target": PULL["target"]}
        ]
        assert curl(there, "/healthz")[0] == 0, "without a certificate there is no answer at all"
        stranger = ["--cert", str(here.pki.stranger.cert), "--key", str(here.pki.stranger.key)]
        assert curl(there, "/healthz", *stranger)[0] == 0


def test_a_token_says_who_it_is_also_with_a_certificate(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, tls_client_ca=here.pki.ca, scopes=["CN:client=admin"]) as there:
        answer = there.call("POST", "/v1/jobs", PULL, token="read", certificate=here.pki.client)
        assert (answer.status, answer.body["scope"]) == (403, "operate")
        bad = there.call("GET", "/healthz", certificate=here.pki.client, headers=bearer("hostagent.read.x"))
        assert bad.status == 401, "nobody falls back to another identity"
        assert there.call("POST", "/v1/host/drain", {}, certificate=here.pki.client).status == 200


def test_every_name_of_a_certificate_counts_to_the_letter(here: Site, tmp_path: Path) -> None:
    names = (
        "extendedKeyUsage=clientAuth\nsubjectAltName=DNS:backup.example,URI:spiffe://h/b,email:b@example,DNS:*.example"
    )
    cert = here.pki.issue("many", extension=names)
    for scopes, status in (
        (["DNS:backup.example=read"], 200),
        (["URI:spiffe://h/b=read"], 200),
        (["email:b@example=read"], 200),
        (["DNS:other.example=read", "CN:backup.example=read", "DNS:BACKUP.example=read"], 403),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        with away(here, folder, tls_client_ca=here.pki.ca, scopes=scopes) as there:
            answer = there.call("GET", "/v1/jobs", certificate=cert)
            assert answer.status == status, scopes
            if status == 403:
                assert "CN:many=read" in answer.body["remedy"]


def test_owners_of_the_host_come_by_tcp_as_admin_alone(there: Away) -> None:
    there.agent.service.forget()
    for name in ("operate", "admin"):
        assert there.call("POST", "/v1/jobs", PULL, token=name).status == 202
    assert [call[1][1].owner for call in there.agent.service.calls] == [False, True]


def test_refusals_say_what_is_missing_and_how_to_come_by_it(there: Away) -> None:
    nobody = there.call("GET", "/v1/jobs")
    assert (nobody.status, nobody.body["code"]) == (401, "unauthenticated")
    assert nobody.headers["www-authenticate"] == 'Bearer realm="hostagent"'
    bad = there.call("GET", "/v1/jobs", token="hostagent.nobody.x")
    assert bad.headers["www-authenticate"] == 'Bearer realm="hostagent", error="invalid_token"'
    assert "hostagent token add" in bad.body["remedy"]
    poor = there.call("POST", "/v1/host/drain", {}, token="operate")
    assert poor.headers["www-authenticate"].endswith('error="insufficient_scope", scope="admin"')
    assert (poor.body["code"], poor.body["value"], poor.body["scope"]) == ("denied", "'operate'", "admin")
    assert poor.headers["content-type"] == nobody.headers["content-type"] == "application/problem+json"
    assert there.agent.audit[-1]["what"] == "POST /v1/host/drain" and there.agent.audit[-1]["result"] == "denied"


def test_who_is_refused_while_he_sends_hears_why(there: Away) -> None:
    body = b'{"operation": "pull"}'.ljust(60000)
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    for token, status in (("read", 403), ("", 401)):
        with there.connect() as sock:
            sock.sendall(request("POST", "/v1/jobs", {**headers, **bearer(there.site.secrets.get(token, ""))}))
            for part in range(0, len(body), 20000):
                time.sleep(0.1)
                sock.sendall(body[part : part + 20000])
            assert parsed(until_end(sock)).status == status


def test_and_who_is_refused_and_sends_nothing_is_not_waited_for(there: Away) -> None:
    for length in (b"content-length: 10", b"content-length: 99999999999", b"transfer-encoding: chunked"):
        with there.connect(timeout=20) as sock:
            sock.sendall(b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\n" + length + b"\r\n\r\n")
            assert parsed(until_end(sock)).status == 401


def test_a_request_has_an_id_wherever_it_is_named(there: Away) -> None:
    given = there.call("GET", "/v1/nowhere", token="read", headers={"x-request-id": "backup-7.1"})
    assert given.headers["x-request-id"] == given.body["request_id"] == "backup-7.1"
    made = [there.call("GET", "/v1/jobs", headers={"x-request-id": bad}) for bad in ("a b", "x" * 129, "é", "")]
    ids = [answer.headers["x-request-id"] for answer in made]
    assert all(len(one) == 32 for one in ids) and len(set(ids)) == 4
    assert [answer.body["request_id"] for answer in made] == ids
    assert there.agent.call("GET", "/v1/jobs").headers["x-request-id"]


# What is taken away


@pytest.mark.parametrize("ended", ["removed", "expires", "replaced"])
def test_a_stream_ends_soon_after_its_token(here: Site, tmp_path: Path, ended: str) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=1.5) if ended == "expires" else None
    here.add(ended, Scope.READ, soon)
    with away(here, tmp_path) as there, there.connect() as sock:
        sock.sendall(request("GET", "/v1/events", bearer(here.secrets[ended])))
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        if ended != "expires":
            here.remove(ended)
        if ended == "replaced":
            here.add(ended, Scope.READ)
        began = time.monotonic()
        until_end(sock)
        assert time.monotonic() - began < 20
        eventually(lambda: not len(there.agent.front.streams.places))
        assert "identity_ended" in there.agent.refusals
        old = here.secrets[ended] if ended != "replaced" else "hostagent.replaced.x"
        assert there.call("GET", "/v1/jobs", token=old).status == 401


def test_a_connection_that_is_kept_has_no_more_than_its_token_has(here: Site, tmp_path: Path) -> None:
    here.add("kept", Scope.ADMIN)
    with away(here, tmp_path, identity_interval=60) as there, there.connect() as sock:
        for scope, status in ((Scope.ADMIN, b"200"), (Scope.READ, b"403")):
            here.change("kept", scope=scope)
            there.agent.doors.reload()  # type: ignore[union-attr]
            headers = {**bearer(here.secrets["kept"]), "content-length": "0"}
            sock.sendall(request("POST", "/v1/host/drain", headers))
            assert until(sock, b"}").split()[1] == status


def test_an_authority_that_is_replaced_takes_its_clients_with_it(here: Site, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(here.pki.ca, ca)
    with away(here, tmp_path, tls_client_ca=ca, scopes=["CN:client=read"]) as there:
        with there.connect(here.pki.client) as sock:
            sock.sendall(request("GET", "/v1/events", {}))
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
            shutil.copy(here.pki.folder / "stranger-ca.pem", ca)
            until_end(sock)
        with pytest.raises((OSError, AssertionError)):
            there.status("GET", "/healthz", {}, here.pki.client)
        assert there.status("GET", "/healthz", {}, here.pki.stranger) == 200


def test_a_tokens_file_that_cannot_be_believed_has_no_token_in_it(here: Site, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    shutil.copy(here.tokens_file, file)
    file.chmod(0o600)
    mine = Site(here.pki, file, here.secrets)
    with away(mine, tmp_path) as there:
        status = lambda: there.call("GET", "/v1/jobs", token="read").status  # noqa: E731
        assert status() == 200
        for spoil in (lambda: file.chmod(0o622), lambda: file.write_text("{"), file.unlink):
            spoil()
            eventually(lambda: status() == 401)
            shutil.copy(here.tokens_file, file)
            file.chmod(0o600)
            eventually(lambda: status() == 200)


def test_the_servers_certificate_is_read_anew_and_a_bad_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own").mkdir()
    mine = site(tmp_path / "own")
    with away(mine, tmp_path) as there:

        def served() -> str:
            with there.connect() as sock:
                return str(sock.getpeercert()["serialNumber"])  # type: ignore[attr-defined]

        first = served()
        good = mine.pki.server.cert.read_bytes()
        mine.pki.server.cert.write_text("no certificate")
        eventually(lambda: "the old certificate stays in force" in caplog.text)
        assert served() == first
        mine.pki.server.cert.write_bytes(good)
        key = mine.pki.server.key.read_bytes()
        expired(mine, "server")
        eventually(lambda: any("time was over" in str(getattr(one, "fields", "")) for one in caplog.records))
        assert served() == first
        mine.pki.server.key.write_bytes(key)
        mine.pki.issue("server")
        eventually(lambda: served() != first)


def expired(here: Site, name: str) -> None:
    """Its certificate, signed anew for a time that is over."""
    folder = here.pki.folder
    (folder / "index.txt").write_text("")
    (folder / "ca.cnf").write_text(
        f"[ca]\ndefault_ca=own\n[own]\ndatabase={folder}/index.txt\nserial={folder}/serial\nnew_certs_dir={folder}\n"
        "default_md=sha256\npolicy=any\nunique_subject=no\n[any]\ncommonName=supplied\n"
    )
    (folder / "serial").write_text("77\n")
    command = ["openssl", "ca", "-batch", "-config", "ca.cnf", "-cert", "ca.pem", "-keyfile", "ca-key.pem", "-notext"]
    command += ["-in", f"{name}.csr", "-extfile", f"{name}.ext", "-out", f"{name}.pem"]
    command += ["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)


# Who is in the way


def test_http_without_tls_gets_no_answer_and_hinders_nobody(there: Away) -> None:
    with socket.create_connection(("127.0.0.1", there.port), 5) as sock:
        sock.sendall(request("GET", "/healthz", {}))
        assert b"200" not in until_end(sock)
    assert there.call("GET", "/healthz").status == 200
    assert "handshake" in there.agent.refusals


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_is_refused(there: Away) -> None:
    context = there.site.pki.context()
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", there.port), 5) as sock, pytest.raises(OSError):
        context.wrap_socket(sock, server_hostname="127.0.0.1")


def test_a_handshake_that_does_not_go_on_is_ended_and_others_are_served_meanwhile(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, handshake_timeout=4.0) as there:
        slow = [socket.create_connection(("127.0.0.1", there.port), 10) for _ in range(20)]
        for sock in slow:
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        assert there.call("GET", "/healthz").status == 200
        assert "handshake" not in there.agent.refusals, "nobody waited for them"
        for sock in slow:
            until_end(sock)
            sock.close()
        eventually(lambda: not len(there.agent.doors))  # type: ignore[arg-type]


def test_who_waits_without_an_identity_makes_room_for_others_of_his_address(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, tcp_client_connections=4) as there, there.connect() as known:
        known.sendall(request("GET", "/v1/events", bearer(here.secrets["read"])))
        assert known.recv(4096).startswith(b"HTTP/1.1 200")
        idle = [there.connect(), *(socket.create_connection(("127.0.0.1", there.port), 10) for _ in range(2))]
        eventually(lambda: len(there.agent.doors) == 4)  # type: ignore[arg-type]
        time.sleep(1.1)  # the grace of who has just come
        assert there.call("GET", "/v1/jobs", token="operate").status == 200
        assert there.agent.refusals.count("stranger") == 1
        assert until_end(idle[0]) == b"", "the one that came first"
        there.agent.on_loop(lambda: there.agent.service.happen("still there"))
        until(known, b"still there")
        for sock in idle:
            sock.close()


def test_one_address_has_no_more_than_its_share(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, tcp_client_connections=8, body_timeout=1.5) as there:
        idle = [socket.create_connection(("127.0.0.1", there.port), 10) for _ in range(200)]
        turned_away = ("client_connections", "stranger")  # on a slow machine some are there for long enough to be cut
        eventually(lambda: sum(map(there.agent.refusals.count, turned_away)) >= 192)
        assert len(there.agent.doors) == 8  # type: ignore[arg-type]
        for sock in idle:
            sock.close()
        eventually(lambda: not len(there.agent.doors))  # type: ignore[arg-type]
        assert there.call("GET", "/healthz").status == 200


def test_who_waits_without_an_identity_makes_room_and_who_has_one_does_not(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, tcp_connections=4) as there, there.connect() as known:
        known.sendall(request("GET", "/v1/events", bearer(here.secrets["read"])))
        assert known.recv(4096).startswith(b"HTTP/1.1 200")
        idle = [there.connect() for _ in range(3)]
        time.sleep(1.1)  # the grace of who has just come
        assert there.call("GET", "/healthz").status == 200
        assert there.agent.refusals.count("stranger") == 1
        there.agent.on_loop(lambda: there.agent.service.happen("still there"))
        until(known, b"still there")
        for sock in idle:
            sock.close()


def test_who_never_asks_is_cut(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, body_timeout=0.5) as there, there.connect() as silent, there.connect() as half:
        half.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n")
        assert until_end(silent) == until_end(half) == b""


def test_a_token_is_one_as_soon_as_it_is_made(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, identity_interval=30) as there:
        assert there.call("GET", "/v1/jobs", token="hostagent.fresh.x").status == 401
        here.add("fresh", Scope.READ)
        assert there.call("GET", "/v1/jobs", token="fresh").status == 200
    here.remove("fresh")


def test_unknown_tokens_share_the_looks_at_their_file_and_wait_for_no_disk() -> None:
    looks = 0
    hang = threading.Event()

    def look() -> None:
        nonlocal looks
        looks += 1
        hang.wait(10)

    async def flood() -> None:
        anew = Anew(look, patience=0.3)
        await asyncio.wait_for(asyncio.gather(*(anew.look() for _ in range(100))), 5)
        await asyncio.wait_for(asyncio.gather(*(anew.look() for _ in range(100))), 5)
        assert looks == 1, "one hangs, and no other begins"
        hang.set()
        await asyncio.gather(*(anew.look() for _ in range(100)))
        assert looks == 2

    asyncio.run(flood())


def test_who_shows_nothing_has_failed_too(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, auth_failures=3) as there:
        assert [there.call("POST", "/v1/jobs", PULL).status for _ in range(5)] == [401] * 3 + [429] * 2
        assert {(line["who"], line["what"]) for line in there.agent.audit} == {("nobody", "POST /v1/jobs")}
        assert [line["result"] for line in there.agent.audit] == ["unauthenticated"] * 3 + ["limit"] * 2
        assert there.call("GET", "/healthz").status == 200, "which is for everybody"
        assert there.call("GET", "/v1/jobs", token="read").status == 200


def test_tokens_are_not_guessed_and_the_noise_is_bounded(
    here: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with away(here, tmp_path, auth_failures=5) as there:
        guesses = [f"hostagent.admin.{n:043}" for n in range(12)]
        answers = [there.call("GET", "/v1/jobs", token=guess) for guess in guesses]
        assert [answer.status for answer in answers] == [401] * 5 + [429] * 7
        assert answers[-1].body["field"] == "api.auth_failures" and answers[-1].headers["retry-after"] == "60"
        assert all(answer.headers["connection"] == "close" for answer in answers)
        assert there.call("GET", "/v1/jobs", token="read").status == 200, "who has a good one is let in"
    assert caplog.text.count("too many failed authentications") == 1
    assert caplog.text.count("authentication failed") == 5
    assert not any(guess in caplog.text or here.secrets["read"] in caplog.text for guess in guesses)
    assert there.agent.refusals.count("too_many_failures") == 7


@pytest.mark.parametrize(
    "value",
    ["Bearer", "Bearer ", "bearer x", "Basic cm9vdDpyb290", "hostagent.admin.x", "Bearer hostagent.admin.x y", "Bearer é",
     "Bearer " + "A" * 8000, "Bearer hostagent..", "Bearer hostagent.admin", "Bearer ..", "\x0b"],
)  # fmt: skip
def test_an_authorization_that_is_none_is_refused(there: Away, value: str) -> None:
    status = there.status("GET", "/v1/jobs", {"authorization": value})
    assert status in (400, 401)
    assert there.status("GET", "/healthz", {}) == 200


def test_a_header_that_is_too_large_is_refused(there: Away) -> None:
    with there.connect() as sock:
        sock.sendall(b"GET /v1/jobs HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ")
        with pytest.raises(OSError):
            for _ in range(1000):
                sock.sendall(b"A" * 65536)
    assert there.call("GET", "/healthz").status == 200


def test_two_authorizations_are_none(there: Away) -> None:
    lines = f"authorization: Bearer {there.site.secrets['read']}\r\n"
    with there.connect() as sock:
        sock.sendall(f"GET /v1/jobs HTTP/1.1\r\nhost: x\r\n{lines * 2}\r\n".encode())
        assert parsed(until_end(sock)).status == 401


SMUGGLED = b"GET /v1/host HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 4\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n",
        b"transfer-encoding: identity, chunked\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"content-length: 4\r\ncontent-length: 5\r\n",
        b"content-length: +4\r\n",
        b"content-length: 4, 4\r\n",
        b"content-length: 0x4\r\n",
        b"content-length : 4\r\n",
        b"transfer-encoding\x0b: chunked\r\n",
        b" content-length: 4\r\n",
    ],
)
def test_a_request_that_could_mean_two_is_not_answered_as_two(there: Away, framing: bytes) -> None:
    """What stands behind it is never taken for a request with the identity of the first."""
    token = there.site.secrets["admin"].encode()
    head = (
        b"POST /v1/host/drain HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nauthorization: Bearer " + token
    )
    with there.connect(timeout=3) as sock:
        sock.sendall(head + b"\r\n" + framing + b"\r\n0\r\n\r\n" + SMUGGLED)
        try:
            data = until_end(sock)
        except TimeoutError:
            data = b""
    answers = [int(part.split()[0]) for part in data.split(b"HTTP/1.1 ")[1:]]
    assert not [status for status in answers[1:] if status not in (400, 401)], answers
    assert b'"host"' not in data, "the second was answered with the first one's identity"
    assert there.call("GET", "/healthz").status == 200


def test_two_lengths_of_one_body_are_refused(there: Away) -> None:
    headers = {"content-length": "2", "transfer-encoding": "chunked", "content-type": "application/json"}
    with there.connect() as sock:
        sock.sendall(
            request("POST", "/v1/jobs", {**headers, **bearer(there.site.secrets["operate"])}) + b"2\r\n{}\r\n0\r\n\r\n"
        )
        answer = parsed(until_end(sock))
    assert (answer.status, answer.body["field"], answer.headers["connection"]) == (400, "content-length", "close")


def test_handshakes_begin_no_faster_than_they_may(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, handshake_rate=10) as there:
        began = time.monotonic()
        for _ in range(25):  # ten at once, for nobody came before
            assert there.call("GET", "/healthz").status == 200
        assert time.monotonic() - began > 1.3


def test_many_at_once_are_served(there: Away) -> None:
    wrong: list[int] = []

    def ask() -> None:
        for _ in range(5):
            if (status := there.call("GET", "/v1/jobs", token="read").status) != 200:
                wrong.append(status)

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_who_does_not_read_an_answer_is_cut_off(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, body_timeout=0.5) as there, there.connect() as sock:
        sock.sendall(request("GET", "/v1/events", bearer(here.secrets["read"])))
        until(sock, b"retry")
        until_cut = time.monotonic() + 30
        while len(there.agent.front.streams.places):
            assert time.monotonic() < until_cut
            there.agent.on_loop(lambda: [there.agent.service.happen("x" * 1000) for _ in range(100)])
        eventually(lambda: not len(there.agent.doors))  # type: ignore[arg-type]


def test_the_agent_ends_while_clients_are_there(here: Site, tmp_path: Path) -> None:
    began = time.monotonic()
    with away(here, tmp_path) as there:
        sock = there.connect()
        sock.sendall(request("GET", "/v1/events", bearer(here.secrets["read"])))
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        half = socket.create_connection(("127.0.0.1", there.port), 5)
    assert time.monotonic() - began < 30
    assert until_end(sock).endswith(b"0\r\n\r\n"), "an ended stream is a whole answer"
    sock.close()
    half.close()


# Without TLS


def test_the_loopback_address_may_be_served_without_tls_when_somebody_says_so(here: Site, tmp_path: Path) -> None:
    with away(here, tmp_path, plain=True) as there:
        assert there.call("GET", "/healthz").status == 200
        assert there.call("GET", "/v1/jobs").status == 401
        assert there.call("GET", "/v1/jobs", token="read").status == 200


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"listen": ("0.0.0.0:1",), "plain_loopback": True}, "api.tls_certificate"),
        ({"listen": ("[::]:1",), "plain_loopback": True}, "api.tls_certificate"),
        ({"listen": ("127.0.0.1:1",)}, "api.plain_loopback"),
        ({"listen": ("127.0.0.1:1",), "plain_loopback": True, "tls_client_ca": Path("/ca")}, "api.tls_certificate"),
    ],
)
def test_nothing_else_is(settings: dict[str, Any], field: str) -> None:
    import dataclasses

    with pytest.raises(AgentError) as refused:
        certificate_of(dataclasses.replace(DEFAULTS.api, **settings))
    assert refused.value.field == field and refused.value.remedy


@pytest.mark.parametrize("text", ["", "x", "127.0.0.1", "localhost:1", "127.0.0.1:65536", "::1:5", "[::1]", "1.2.3:4"])
def test_an_address_to_listen_on_is_one(text: str) -> None:
    with pytest.raises(AgentError):
        address_of(text)
    assert address_of("[::1]:5") == ("::1", 5)


@pytest.mark.parametrize("text", ["", "x", "CN:a", "CN:a=", "CN:a=root", "a=read", "OU:a=read", "DNS:*.example=read"])
def test_a_scope_of_a_certificate_is_one(text: str) -> None:
    with pytest.raises(AgentError) as refused:
        scopes_of([text])
    assert refused.value.field == "api.certificate_scopes" and refused.value.remedy
    assert scopes_of(["CN:a=b=read"]) == {"CN:a=b": Scope.READ}
    with pytest.raises(AgentError):
        scopes_of(["CN:a=read", "CN:a=admin"])


def test_a_certificate_ends_also_while_it_is_connected(tmp_path: Path) -> None:
    refused: list[str] = []
    none, told = Tokens(tmp_path / "none", 1), refused.append
    known = Identities(none, ["CN:a=read"], failures=9, patience=1, told=told, authorities=lambda: "x")
    now = datetime.now(UTC).timestamp()

    def shown_until(ends: float) -> Identity:
        return asyncio.run(known.of([], Shown(("CN:a",), ends, "x"), "192.0.2.1:5", Scope.READ))

    identity = shown_until(now + 0.3)
    assert identity.stands() and identity.peer.scope is Scope.READ
    eventually(lambda: not identity.stands())
    with pytest.raises(AgentError):
        shown_until(now - 1)
    assert refused == ["certificate"]
    identity = shown_until(now + 60)
    known.rescope(["CN:a=operate"])
    assert not identity.stands(), "a scope that has changed ends what ran with the one before"


def test_failures_of_many_addresses_take_a_bounded_room() -> None:
    failures = Failures(2)
    assert [failures.count("a") for _ in range(4)] == [False, False, True, True]
    for number in range(10 * ADDRESSES):
        failures.count(str(number))
    assert len(failures._of) == ADDRESSES
    assert not failures.count("a"), "and is forgotten"


def test_one_host_is_one_client_however_many_addresses_it_has() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:192.0.2.1") == "192.0.2.1" == network_of("192.0.2.1")
    assert network_of("fe80::1%eth0") == network_of("fe80::2%eth0")
