"""A real agent over a ledger in which a domain's files stand: what `grant` shows, refuses, and undoes."""

from __future__ import annotations

import asyncio
import os
import pwd
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hostagent.access.ledger import Ledger, Settings
from hostagent.access.prober import Prober
from hostagent.access.subject import Subject
from hostagent.records import Label, Use
from hostagent.store import Store
from jobs.model import FileId, Holder, Layer, Need
from jobs.ports import SystemClock
from tests.harness import AgentProcess, ApiError, reachable, user_can_read

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files another owner"),
]

ALICE, DOMAIN = 64051, Holder("domain", "6d1a8f0e/vda")
Act = Callable[[Ledger], Awaitable[object]]


def with_ledger(agent: AgentProcess, act: Act) -> None:
    """Work on the agent's ledger while the agent is down, as what knows the domains does."""
    assert agent.user is not None
    user = pwd.getpwnam(agent.user)

    async def go() -> None:
        store = Store(agent.state, host="h", publish=lambda record: None)
        await store.open()
        with Prober(user.pw_uid, user.pw_gid, timeout=30) as probe:
            ledger = Ledger(
                store,
                Subject(user.pw_name, user.pw_uid, (user.pw_gid,), own=False),
                probe,
                settings=Settings(30.0, manage_shared=False),
                clock=SystemClock(),
                daemons=dict,
                observe=lambda trigger, result: None,
            )
            ledger.know_domains(True)
            try:
                await act(ledger)
            finally:
                ledger.close()
                await store.close()

    asyncio.run(go())


def uses(path: Path, label: Label) -> list[Use]:
    found = path.stat()
    layer = Layer(str(path), "raw", FileId(found.st_dev, found.st_ino), 4096, 4096)
    return [Use(Need(layer, "r", "vda of web1 stands on it"), label)]


def the_grant(agent: AgentProcess, state: str) -> dict[str, object]:
    """The only grant, when it has come to this state."""
    deadline = time.monotonic() + 30
    while True:
        (grant,) = agent.get("/v1/grants")["items"]
        if grant["state"] == state or time.monotonic() > deadline:
            assert grant["state"] == state, grant
            return dict(grant)
        time.sleep(0.05)


def test_a_domains_file_is_shown_kept_given_back_and_given_to_it_again(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"secret")
    base.chmod(0o600)
    os.chown(base, ALICE, ALICE)
    with reachable(tmp_path), AgentProcess(tmp_path, {"IMAGES_POOLS": str(tmp_path)}) as agent:
        assert agent.user is not None
        user = pwd.getpwnam(agent.user)
        label = Label(user.pw_uid, user.pw_gid)
        agent.stop()
        with_ledger(agent, lambda ledger: ledger.hold(DOMAIN, uses(base, label), name="web1/vda", trigger="define"))
        os.chown(base, *label)

        agent.start()
        held = the_grant(agent, "granted")
        assert (held["access"], held["holder"]) == (
            "owner", {"kind": "domain", "id": DOMAIN.id, "name": "web1/vda"}
        )  # fmt: skip
        with pytest.raises(ApiError) as refused:
            agent.delete(f"/v1/grants/{held['id']}")
        assert refused.value.body["code"] == "busy" and "web1/vda" in refused.value.body["detail"]
        with pytest.raises(ApiError) as refused:
            agent.post(f"/v1/grants/{held['id']}/undo")
        assert refused.value.body["code"] == "conflict"
        assert user_can_read(base, agent.user)
        agent.stop()

        with_ledger(agent, lambda ledger: ledger.hold(DOMAIN, [], name="web1/vda", trigger="undefine"))
        assert base.stat().st_uid == ALICE and not user_can_read(base, agent.user)

        agent.start()
        given_back = the_grant(agent, "revoked")
        assert given_back["access"] == "owner" and f"{ALICE}:{ALICE}" in str(given_back["detail"])
        undone = agent.post(f"/v1/grants/{given_back['id']}/undo")
        assert undone["state"] == "kept" and "owned by" in undone["detail"]
        assert (base.stat().st_uid, base.stat().st_gid) == label and user_can_read(base, agent.user)
        with pytest.raises(ApiError) as refused:
            agent.post(f"/v1/grants/{given_back['id']}/undo")
        assert refused.value.body["code"] == "conflict"
