"""`hostagent export`, `grant` and `status`: what is asked of the agent, and what is shown."""

from __future__ import annotations

import json

import pytest
from fake_agent import ID, FakeAgent, job, problem

EXPORT = f"/v1/exports/{ID}"
URI = "nbd+unix:///disk?socket=/run/hostagent/x.sock"


def export(state: str = "running", **more: object) -> dict[str, object]:
    return {
        "id": ID, "image": "/images/top.qcow2", "uri": URI, "socket": "/run/hostagent/x.sock", "name": "disk",
        "format": "qcow2", "size": 1 << 30, "shallow": False, "writable": False, "state": state, "reason": None,
        "created": "2024-05-01T10:00:00Z", "stopped": None, "expires": None, "ttl": None, "idle_timeout": None,
        "clients": [{"pid": 7, "name": "nbdcopy", "uid": 0}], "daemon": "d", "pid": 99, "labels": {}, "revision": 1,
        **more,
    }  # fmt: skip


def grant(state: str = "granted", **more: object) -> dict[str, object]:
    return {
        "id": "g1", "path": "/images/base.qcow2", "mode": "r", "holder": {"kind": "job", "id": ID},
        "since": "2024-05-01T10:00:00Z", "reason": "reads it as backing", "access": "acl", "given": None, "state": state,
        "detail": None, **more,
    }  # fmt: skip


def host(**more: object) -> dict[str, object]:
    return {
        "host": "node7", "version": "0.1.0", "qemu": "7.2.22", "libvirt": {"connected": False, "version": None},
        "user": {"name": "qemu", "uid": 107},
        "access": "acl", "pid": 4711, "started": "2024-05-01T10:00:00Z", "storage_daemons": [], "orphans": [],
        "revocations": {"pending": 0, "oldest_seconds": None}, "last_errors": [],
        "store": {"path": "/var/lib/hostagent/hostagent.db", "events": 5, "jobs": 3}, "jobs": {"completed": 2},
        "exports": {"running": 1}, **more,
    }  # fmt: skip


def test_export_start_asks_for_what_was_said_and_prints_the_uri(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/exports", (202, export()))
    words = ["--writable", "--shallow", "--bitmap", "b0", "--bitmap", "b1", "--ttl", "60", "--idle-timeout", "5.5"]
    words += ["--offset", "1MiB", "--size", "512", "--max-clients", "3", "--tcp", "auto", "--tls", "psk"]
    assert run("export", "start", "/images/top.qcow2", *words, "--format", "qcow2", "--label", "a=1", "--id", ID) == 0
    assert capsys.readouterr().out == f"export {ID} running\n  uri  {URI}\n"
    assert agent.calls[0].body == {
        "image": "/images/top.qcow2", "writable": True, "shallow": True, "bitmaps": ["b0", "b1"], "ttl": 60.0,
        "offset": 1 << 20, "size": 512, "max_clients": 3, "tcp": "auto", "tls": "psk",
        "idle_timeout": 5.5, "format": "qcow2", "labels": {"a": "1"}, "id": ID,
    }  # fmt: skip


def test_exports_are_shown_as_the_file_that_they_stand_on_now(agent: FakeAgent, run, capsys) -> None:
    moved = export(path="/images/copy.qcow2", max_clients=1)
    agent.on("GET", "/v1/exports", (200, {"items": [moved], "next": None}))
    agent.on("GET", EXPORT, (200, moved))
    assert run("export", "list") == 0
    out = capsys.readouterr().out
    assert "/images/copy.qcow2" in out and "/images/top.qcow2" not in out
    assert run("export", "show", ID) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "image /images/copy.qcow2 (qcow2, 1 GiB) named /images/top.qcow2" in out
    assert "at most 1 client " in out
    agent.on("GET", EXPORT, (200, export(path="/images/top.qcow2")))
    assert run("export", "show", ID) == 0
    assert "named" not in capsys.readouterr().out


def test_export_start_returns_when_clients_can_connect(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/exports", (202, export("starting")))
    agent.on("GET", EXPORT, (304, None), (200, export("starting")), (200, export("running", revision=2)))
    assert run("--json", "export", "start", "/images/top.qcow2") == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"


def test_an_export_that_did_not_start_is_an_error(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/exports", (202, export("failed", reason="the daemon ended")))
    assert run("export", "start", "/images/top.qcow2") == 1
    assert "the daemon ended" in capsys.readouterr().err


def test_export_list_and_show_say_who_is_connected(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/exports", (200, {"items": [export()], "next": None}))
    agent.on("GET", EXPORT, (200, export()))
    assert run("export", "list", "--state", "running", "--label", "a=1") == 0
    assert agent.calls[0].query == {"state": ["running"], "label": ["a=1"]}
    assert "read-only" in capsys.readouterr().out
    assert run("export", "show", ID) == 0
    assert "nbdcopy (pid 7, uid 0)" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "query"), [([], {}), (["--force"], {"force": ["true"]})])
def test_export_stop_forces_only_when_told(
    agent: FakeAgent, run, words: list[str], query: dict[str, list[str]]
) -> None:
    agent.on("DELETE", EXPORT, (200, export("stopped")))
    assert run("export", "stop", ID, *words) == 0
    assert agent.calls[0].query == query


def test_an_empty_list_is_said_on_stderr_and_is_empty_json(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/exports", (200, {"items": [], "next": None}))
    assert run("export", "list") == 0
    assert capsys.readouterr() == ("", "no exports\n")
    assert run("export", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"items": []}


def test_grant_list_filters_by_path_and_holder(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/grants", (200, {"items": [grant()], "next": None}))
    assert run("grant", "list", "--path", "/images/base.qcow2", "--holder", f"job:{ID}") == 0
    assert agent.calls[0].query == {"path": ["/images/base.qcow2"], "holder": [f"job:{ID}"]}
    out = capsys.readouterr().out
    assert f"job:{ID}" in out and "reads it as backing" in out


def test_revoking_what_is_needed_exits_6_and_names_the_holder(agent: FakeAgent, run, capsys) -> None:
    agent.on("DELETE", "/v1/grants/g1", (409, problem("busy", f"job:{ID} needs it", remedy="abort the job")))
    assert run("grant", "revoke", "g1") == 6
    assert f"job:{ID} needs it" in capsys.readouterr().err


def test_grant_list_given_leaves_out_what_was_not_given_or_is_taken_back(agent: FakeAgent, run, capsys) -> None:
    others = [grant("revoked"), grant("kept"), grant(), grant(access="owner"), grant(access="none")]
    given = [grant(id="g7", given="r"), grant("kept", id="g8", given="rw")]
    agent.on("GET", "/v1/grants", (200, {"items": [*others, *given], "next": None}))
    assert run("grant", "list", "--given", "--json") == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)["items"]] == ["g7", "g8"]
    agent.on("GET", "/v1/grants", (200, {"items": others, "next": None}))
    assert run("grant", "list", "--given") == 0
    assert capsys.readouterr().out == "", "nothing, for who keeps the list in a file"


def test_a_domains_grant_is_shown_with_its_name_and_what_was_given_back_with_its_owner(
    agent: FakeAgent, run, capsys
) -> None:
    domain = grant(access="owner", holder={"kind": "domain", "id": "6d1a/vda", "name": "web1/vda"})
    given_back = grant("revoked", access="owner", detail="given back to root:root")
    agent.on("GET", "/v1/grants", (200, {"items": [domain, given_back], "next": None}))
    assert run("grant", "list") == 0
    out = capsys.readouterr().out
    assert "domain:6d1a/vda (web1/vda)" in out and "given back to root:root" in out


def test_undoing_a_revocation_is_asked_of_the_agent(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/grants/g1/undo", (200, grant("kept", detail="owned by qemu with mode 0600")))
    assert run("grant", "undo", "g1") == 0
    assert "owned by qemu" in capsys.readouterr().out


def test_an_id_cannot_become_another_path(agent: FakeAgent, run) -> None:
    assert run("grant", "show", "../host?x=1") == 3
    assert agent.calls[0].path == "/v1/grants/..%2Fhost%3Fx%3D1"


def test_status_says_when_nothing_needs_attention(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/host", (200, host()))
    agent.on("GET", "/v1/exports", (200, {"items": [], "next": None}))
    agent.on("GET", "/v1/jobs", (200, {"items": [], "next": None}))
    assert run("status") == 0
    out = capsys.readouterr().out
    assert out.startswith("node7: hostagent 0.1.0\n")
    for words in ("nothing needs attention", "no job is active", "nothing is exported", "not connected"):
        assert words in out


def test_status_shows_first_what_needs_a_person(agent: FakeAgent, run, capsys) -> None:
    stuck = {"id": "d", "pid": 99, "state": "unresponsive", "image": "/images/a.qcow2", "exports": 0, "job": ID,
             "since": "2024-05-01T10:00:00Z"}  # fmt: skip
    orphan = {"pid": 98, "id": "e", "image": None, "exports": ["disk"], "holds": "export disk"}
    failed = {"time": "2024-05-01T10:00:00Z", "what": "job 5", "message": "no space left", "remedy": "make room"}
    pending = {"pending": 2, "oldest_seconds": 90, "oldest": {"path": "/images/b", "reason": "it hangs"}}
    told = host(
        storage_daemons=[stuck], orphans=[orphan], revocations=pending, last_errors=[failed], jobs={"running": 1}
    )
    agent.on("GET", "/v1/host", (200, told))
    agent.on("GET", "/v1/exports", (200, {"items": [export()], "next": None}))
    agent.on("GET", "/v1/jobs", lambda call: (200, {"items": [job()] if call.query == {"state": ["running"]} else [],
                                                    "next": None}))  # fmt: skip
    assert run("status") == 0
    out = capsys.readouterr().out
    for words in (
        "storage daemon 99 of /images/a.qcow2 is unresponsive", f"hostagent job abort --force {ID}",
        "storage daemon 98 runs, but belongs to no job", "it holds export disk",
        "access to 2 files is to be taken back", "1 min 30 s", "jobs (1 active)",
        "exports (1)", "job 5: no space left", "make room", "/images/b: it hangs; hostagent grant list",
    ):  # fmt: skip
        assert words in out
    assert out.index("unresponsive") < out.index("jobs (1 active)")


def test_status_names_files_that_changed_lost_ones_first_and_not_all_of_many(agent: FakeAgent, run, capsys) -> None:
    gone = [{"path": f"/{n}", "what": "was deleted", "lost": False, "remedy": "see who"} for n in range(7)]
    cut = {"path": "/base.raw", "what": "was cut from 9 to 5 bytes", "lost": True, "remedy": "restore it"}
    agent.on("GET", "/v1/host", (200, host(changed_files=[*gone, cut])))
    agent.on("GET", "/v1/exports", (200, {"items": [], "next": None}))
    agent.on("GET", "/v1/jobs", (200, {"items": [], "next": None}))
    assert run("status") == 0
    alarms = [line for line in capsys.readouterr().out.splitlines() if line.startswith("! ")]
    assert alarms[0] == "! /base.raw was cut from 9 to 5 bytes"
    assert len(alarms) == 6 and alarms[-1] == "! 3 more files have changed"


@pytest.mark.parametrize(
    ("daemon", "says"),
    [
        ({"exports": 1, "job": None, "writable": False}, "it writes nothing, and kill -9 99 only cuts its readers off"),
        ({"exports": 1, "job": None, "writable": True}, "killing it loses what its clients have not flushed"),
        ({"exports": 1, "job": ID, "writable": False}, "killing it loses what its clients have not flushed"),
        ({"exports": 1, "job": None}, "killing it loses what its clients have not flushed"),
        ({"exports": 0, "job": ID, "writable": True}, f"hostagent job abort --force {ID}"),
    ],
)
def test_only_of_a_daemon_that_writes_nothing_status_says_that_it_may_be_killed(
    agent: FakeAgent, run, capsys, daemon: dict[str, object], says: str
) -> None:
    stuck = {"id": "d", "pid": 99, "state": "unresponsive", "image": "/a", **daemon}
    agent.on("GET", "/v1/host", (200, host(storage_daemons=[stuck], exports={})))
    agent.on("GET", "/v1/jobs", (200, {"items": [], "next": None}))
    assert run("status") == 0
    out = capsys.readouterr().out
    assert says in out
    assert ("kill -9" in out) == ("kill -9" in says)


def test_status_says_first_that_the_store_is_full(agent: FakeAgent, run, capsys) -> None:
    store = {"path": "/var/lib/hostagent", "events": 5, "free": 4096, "min_free": 16 << 20}
    agent.on("GET", "/v1/host", (200, host(store=store, exports={})), (200, host(store=store | {"free": 16 << 20})))
    agent.on("GET", "/v1/jobs", (200, {"items": [], "next": None}))
    agent.on("GET", "/v1/exports", (200, {"items": [], "next": None}))
    assert run("status") == 0
    assert "! no new work is taken: 4 KiB are free beside the store in /var/lib/hostagent" in capsys.readouterr().out
    assert run("status") == 0
    assert "nothing needs attention" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "reason", "says"),
    [
        ("running", "its server went away", "read what is there from another client now"),
        ("stopping", "it is not served any more, but the disk is full", "mend that, and stop it again"),
        ("stopping", None, "nothing needs attention"),
    ],
)
def test_status_names_the_exports_that_need_a_person(
    agent: FakeAgent, run, capsys, state: str, reason: str | None, says: str
) -> None:
    agent.on("GET", "/v1/host", (200, host(exports={state: 1})))
    agent.on("GET", "/v1/jobs", (200, {"items": [], "next": None}))
    agent.on("GET", "/v1/exports", (200, {"items": [export(state, path="/images/top.qcow2", reason=reason)], "next": None}))
    assert run("status") == 0
    out = capsys.readouterr().out
    assert says in out
    assert (f"! export {ID} of /images/top.qcow2: {reason}" in out) == (reason is not None)


def test_grant_list_says_what_is_in_the_way_of_a_file_that_nobody_needs(agent: FakeAgent, run, capsys) -> None:
    left = grant("pending", holder={"kind": "none", "id": ""}, reason="nobody needs it", detail="it hangs")
    agent.on("GET", "/v1/grants", (200, {"items": [left, grant(detail="unseen")], "next": None}))
    assert run("grant", "list") == 0
    out = capsys.readouterr().out
    assert "nobody needs it; it hangs" in out and "unseen" not in out


def test_status_as_json_has_the_host_the_active_jobs_and_the_exports(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/host", (200, host()))
    agent.on("GET", "/v1/exports", (200, {"items": [export()], "next": None}))
    agent.on("GET", "/v1/jobs", (200, {"items": [], "next": None}))
    assert run("status", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["host"]["host"] == "node7"
    assert [item["id"] for item in data["exports"]] == [ID]


BITMAPS = {
    "path": "/a.qcow2",
    "items": [{"name": "b0", "granularity": 65536, "recording": True, "state": "consistent"}],
    "lost": False,
    "holders": None,
}


def test_bitmaps_are_listed_and_who_has_them_in_memory_is_said(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/images/bitmaps", (200, BITMAPS), (200, BITMAPS | {"holders": ["qemu (pid 7)"]}))
    assert run("bitmap", "list", "/a.qcow2") == 0
    assert capsys.readouterr().out.split()[4:] == ["b0", "64", "KiB", "yes", "consistent"]
    assert run("bitmap", "list", "/a.qcow2") == 0
    assert "qemu (pid 7) writes to the image" in capsys.readouterr().err


def test_bitmaps_are_changed_as_was_said(agent: FakeAgent, run, capsys) -> None:
    agent.on("POST", "/v1/images/bitmaps", (200, BITMAPS))
    agent.on("POST", "/v1/images/bitmaps/merge", (200, BITMAPS))
    agent.on("DELETE", "/v1/images/bitmaps", (200, BITMAPS))
    assert run("bitmap", "add", "/a.qcow2", "b0", "--granularity", "64K", "--disabled") == 0
    assert run("bitmap", "merge", "/a.qcow2", "b0", "--from", "b1", "--source", "/b.qcow2") == 0
    assert run("bitmap", "remove", "/a.qcow2", "b 0", "--json") == 0
    assert [call.query["path"] for call in agent.calls] == [["/a.qcow2"]] * 3
    assert agent.calls[2].query["name"] == ["b 0"]
    assert [call.body for call in agent.calls] == [
        {"name": "b0", "granularity": 65536, "disabled": True},
        {"name": "b0", "source_name": "b1", "source": "/b.qcow2"},
        None,
    ]
