"""The real command line against the real agent: exit statuses, what is on stdout and what on stderr, and its aborts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent.cli.main import main
from tests.harness import MIB, AgentProcess, ApiError, Json, overlay, raw_image, same_content
from tests.qemu.faults import eventually

pytestmark = pytest.mark.qemu

nbd: Any = pytest.importorskip("nbd", reason="needs python3-libnbd")

OK, ERROR, USAGE, NOT_FOUND, JOB_FAILED, TIMEOUT, BUSY, DENIED, UNREACHABLE, INTERRUPTED = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    130,
)
NOBODY = "00000000-0000-4000-8000-000000000000"
SIZE = 4 * MIB
SLOW = "64KiB/s"
"""A limit at which a pull does not end while a test looks at it."""


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    settings = {"JOBS_PROGRESS_INTERVAL": "0.1", "JOBS_SETTLE_RETRY": "0.1"}
    with AgentProcess(tmp_path_factory.mktemp("cli"), settings) as process:
        yield process


class Cli:
    def __init__(self, agent: AgentProcess) -> None:
        self.environment = {**os.environ, "HOSTAGENT_SOCKET": str(agent.socket)}
        if agent.user:  # commands that run here take it from the settings, as the agent does
            self.environment["HOSTAGENT_ACCESS_HYPERVISOR_USER"] = agent.user

    def start(self, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hostagent.cli.main", *map(str, words)]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(self, *words: object, status: int = OK, timeout: float = 30) -> str:
        """What it says on stdout; a success says nothing on stderr that a script would trip over."""
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == status, (process.returncode, out, err)
        assert "Traceback" not in err
        assert status in (OK, JOB_FAILED, TIMEOUT, INTERRUPTED) or err.startswith(("hostagent: ", "usage: ")), err
        self.said = err
        return out

    def json(self, *words: object, status: int = OK) -> Any:
        return json.loads(self(*words, "--json", status=status))


@pytest.fixture
def cli(agent: AgentProcess) -> Iterator[Cli]:
    yield Cli(agent)
    for export in agent.get("/v1/exports?state=running")["items"]:
        agent.delete(f"/v1/exports/{export['id']}?force=true")
    for job in agent.get("/v1/jobs")["items"]:
        if job["finished"] is None:
            with contextlib.suppress(ApiError):  # it may end by itself meanwhile
                agent.post(f"/v1/jobs/{job['id']}/abort")
            agent.until_ended(job["id"])


@pytest.fixture
def top(folder: Path) -> Path:
    return overlay(folder / "top.qcow2", raw_image(folder / "base.raw", SIZE))


# Pull


def test_a_pull_with_wait_ends_with_its_outcome(cli: Cli, top: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth.raw"
    truth.write_bytes((top.parent / "base.raw").read_bytes())
    out = cli("job", "pull", top, "--wait", "--label", "who=me")
    assert "completed" in out
    assert str(top.parent / "base.raw") in out
    assert same_content(top, truth)


def test_a_pull_with_wait_and_json_prints_the_finished_job_and_nothing_else(cli: Cli, top: Path) -> None:
    job = cli.json("job", "pull", top, "--wait")
    assert (job["state"], job["target"], job["chain"]["after"]) == ("completed", str(top), [str(top)])
    assert job["cursor"] == {"cur": SIZE, "end": SIZE}
    assert cli.json("job", "show", job["id"])["id"] == job["id"]


def test_progress_as_json_is_one_object_a_line_that_never_goes_back(cli: Cli, top: Path) -> None:
    lines = cli("job", "pull", top, "--wait", "--progress", "json", "--bandwidth", "4MiB/s").splitlines()
    found = [json.loads(line) for line in lines]
    cursors = [item["cursor"]["cur"] for item in found]
    assert cursors == sorted(cursors)
    assert found[-1]["state"] == "completed"


def test_increments_with_wait_are_stepped_to_the_end(cli: Cli, top: Path) -> None:
    job = cli.json("job", "pull", top, "--increment", "1M", "--wait")
    assert (job["state"], job["increment"]) == ("completed", MIB)


def test_increments_by_hand(cli: Cli, agent: AgentProcess, top: Path) -> None:
    job = cli.json("job", "pull", top, "--increment", "1M")
    for step in (1, 2, 3):
        assert agent.until(job["id"], lambda j: j["state"] == "waiting")["cursor"]["cur"] == step * MIB
        cli("job", "next", job["id"])
    assert agent.until_ended(job["id"])["state"] == "completed"
    cli("job", "next", job["id"], status=OK)  # a retry of the last one


def test_a_dry_run_changes_nothing(cli: Cli, agent: AgentProcess, top: Path) -> None:
    before = top.read_bytes()
    plan = cli.json("job", "pull", top, "--dry-run")
    assert plan["dry_run"] is True and plan["completion"] is None
    assert plan["before"] == [str(top), str(top.parent / "base.raw")]
    assert plan["after"] == [str(top)]
    assert "nothing was changed" in cli("job", "pull", top, "--dry-run")
    assert top.read_bytes() == before
    assert not [job for job in agent.get("/v1/jobs")["items"] if job["target"] == str(top)]


def test_a_target_is_also_found_from_the_present_folder(cli: Cli, top: Path) -> None:
    command = [sys.executable, "-m", "hostagent.cli.main", "job", "pull", "./top.qcow2", "--wait", "--json"]
    environment = {**cli.environment, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=top.parent, env=environment, capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout)["target"] == str(top)
    assert done.returncode == OK


def test_a_job_that_fails_is_exit_4_and_says_why(cli: Cli, agent: AgentProcess, top: Path) -> None:
    program = subprocess.Popen(["qemu-io", "-f", "qcow2", str(top)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert program.stdin is not None
    time.sleep(0.3)
    try:
        out = cli("job", "pull", top, "--wait", status=JOB_FAILED)
        assert f"pid {program.pid}" in out + cli.said
        assert "remedy" in out + cli.said
    finally:
        program.stdin.close()
        program.wait(10)
    job = next(job for job in agent.get("/v1/jobs")["items"] if job["target"] == str(top))
    assert cli.json("job", "watch", job["id"], status=JOB_FAILED)["error"]["code"] == "busy"


# Ends


def test_control_c_under_wait_aborts_the_job(cli: Cli, agent: AgentProcess, top: Path) -> None:
    job_id = uuid.uuid4()
    process = cli.start("job", "pull", top, "--bandwidth", SLOW, "--wait", "--json", "--id", job_id)
    assert eventually(lambda: running(agent, str(job_id)), timeout=10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED, err
    assert json.loads(out)["state"] == "aborted"
    assert "aborting" in err
    assert agent.job(str(job_id))["state"] == "aborted"


def running(agent: AgentProcess, job_id: str) -> bool:
    status, _, job = agent.call("GET", f"/v1/jobs/{job_id}")
    return status == 200 and job["state"] == "running"


def test_a_timeout_under_wait_aborts_the_job_and_is_exit_5(cli: Cli, agent: AgentProcess, top: Path) -> None:
    began = time.monotonic()
    job = cli.json("job", "pull", top, "--bandwidth", SLOW, "--wait", "--timeout", "0.5", status=TIMEOUT)
    assert time.monotonic() - began < 5
    assert job["state"] == "aborted"
    assert agent.get("/v1/jobs?state=running")["items"] == []


def test_watch_never_aborts(cli: Cli, agent: AgentProcess, top: Path) -> None:
    job = agent.pull(top, bandwidth=64 * 1024)
    agent.until(job["id"], lambda j: j["state"] == "running")
    process = cli.start("job", "watch", job["id"])
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == INTERRUPTED
    assert agent.job(job["id"])["state"] == "running"
    cli("job", "speed", job["id"], "unlimited")
    assert "completed" in cli("job", "watch", job["id"])


def test_a_job_is_paused_resumed_slowed_aborted_and_deleted(cli: Cli, agent: AgentProcess, top: Path) -> None:
    job = cli.json("job", "pull", top, "--bandwidth", SLOW)
    agent.until(job["id"], lambda j: j["state"] == "running")
    assert cli.json("job", "pause", job["id"])["state"] == "paused"
    assert cli.json("job", "resume", job["id"])["state"] == "running"
    assert cli.json("job", "speed", job["id"], "128KiB/s")["bandwidth"] == 128 * 1024
    cli("job", "complete", job["id"], status=BUSY)
    cli("job", "delete", job["id"], status=BUSY)
    cli("job", "pull", top, status=BUSY)
    assert job["id"] in cli.said
    cli("job", "abort", job["id"])
    assert agent.until_ended(job["id"])["state"] == "aborted"
    cli("job", "abort", job["id"])  # once more is no error
    cli("job", "pause", job["id"], status=BUSY)
    assert eventually(lambda: gone(cli, job["id"]), timeout=5)
    cli("job", "show", job["id"], status=NOT_FOUND)


def gone(cli: Cli, job_id: str) -> bool:
    process = cli.start("job", "delete", job_id)
    process.communicate(timeout=10)
    return process.returncode == OK


def test_the_same_id_is_the_same_job_and_with_another_request_a_conflict(cli: Cli, top: Path) -> None:
    own = str(uuid.uuid4())
    first = cli.json("job", "pull", top, "--id", own, "--wait")
    assert cli.json("job", "pull", top, "--id", own)["created"] == first["created"]
    cli("job", "pull", top, "--id", own, "--bandwidth", "1MiB/s", status=BUSY)


# Errors


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["job", "show", NOBODY], NOT_FOUND, "remedy"),
        (["job", "watch", NOBODY], NOT_FOUND, "remedy"),
        (["job", "abort", NOBODY], NOT_FOUND, "remedy"),
        (["export", "show", NOBODY], NOT_FOUND, "remedy"),
        (["export", "stop", NOBODY], NOT_FOUND, "remedy"),
        (["grant", "show", NOBODY], NOT_FOUND, "remedy"),
        (["grant", "revoke", NOBODY], NOT_FOUND, "remedy"),
        (["job", "pull", "/no/such/image.qcow2"], NOT_FOUND, "remedy"),
        (["job", "pull", "web1/vda"], ERROR, "remedy"),
        (["job", "pull", "plain-name"], USAGE, "./plain-name"),
        (["job", "pull", ""], USAGE, "target"),
        (["job", "pull", "/x", "--bandwidth", "50"], USAGE, "50MiB/s"),
        (["job", "pull", "/x", "--bandwidth", "fast"], USAGE, "not a rate"),
        (["job", "pull", "/x", "--increment", "0"], USAGE, "increment"),
        (["job", "pull", "/x", "--increment", "-1"], USAGE, "increment"),
        (["job", "pull", "/x", "--increment", "1e400"], USAGE, "increment"),
        (["job", "pull", "/x", "--timeout", "5"], USAGE, "--wait"),
        (["job", "pull", "/x", "--timeout", "nan", "--wait"], USAGE, "timeout"),
        (["job", "pull", "/x", "--label", "novalue"], USAGE, "KEY=VALUE"),
        (["job", "pull", "/x", "--id", "mine"], USAGE, "UUID"),
        (["job", "pull", "/x", "--chek", "auto"], USAGE, "usage"),
        (["job", "list", "--state", "bogus"], USAGE, "state"),
        (["job", "copy", "/x"], USAGE, "DEST"),
        (["export", "start", "./x.raw", "--format", "raw", "--tcp", "auto"], USAGE, "--tls"),
        (["backup", "start", "web1"], ERROR, "not supported"),
        (["events", "--since", "-3"], USAGE, "since"),
        (["nonsense"], USAGE, "nonsense"),
        ([], USAGE, "usage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_has_its_status_and_says_what_to_do(
    agent: AgentProcess,
    words: list[str],
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOSTAGENT_SOCKET", str(agent.socket))
    assert main(words) == status
    out, err = capsys.readouterr()
    assert (out, said in err) == ("", True), err


def test_no_agent_is_exit_8_and_a_socket_that_may_not_be_used_exit_7(cli: Cli, tmp_path: Path) -> None:
    cli("status", "--socket", tmp_path / "none.sock", status=UNREACHABLE)
    assert "hostagent serve" in cli.said
    dead = tmp_path / "file.sock"
    dead.touch()
    cli("job", "list", "--socket", dead, status=UNREACHABLE)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user asks")
def test_a_user_who_may_not_use_the_socket_gets_exit_7(agent: AgentProcess) -> None:
    code = "import sys; sys.path.insert(0, '.'); from hostagent.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "status", "--socket", str(agent.socket)]
    # the tree and the interpreter may lie where that user cannot go: they are loaded before the user is changed
    drop = f"import os; os.setgroups([]); os.setgid(65534); os.setuid(65534); {code}"
    loaded = f"import hostagent.cli.main, hostagent.cli.status, hostagent.unix_http, http.client; {drop}"
    command[2] = loaded
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parents[2])
    assert done.returncode == DENIED, done.stderr
    assert "remedy" in done.stderr


# Images, exports, grants


def test_an_image_is_inspected_and_checked_here(cli: Cli, top: Path) -> None:
    found = cli.json("image", "inspect", top)
    assert [layer["format"] for layer in found["layers"]] == ["qcow2", "raw"]
    assert "base.raw" in cli("image", "inspect", top)
    for image in (top, top.parent / "base.raw"):  # the check runs as the hypervisor user, whom nothing was granted
        image.chmod(0o644)
    assert [layer["result"] for layer in cli.json("image", "check", top)["layers"]] == ["ok", "ok"]
    assert cli("image", "inspect", top.parent / "base.raw", status=USAGE) == ""
    assert "--format raw" in cli.said
    assert cli.json("image", "inspect", top.parent / "base.raw", "--format", "raw")["layers"][0]["virtual_size"] == SIZE


def test_an_export_is_started_used_shown_and_stopped(cli: Cli, top: Path) -> None:
    export = cli.json("export", "start", top, "--label", "for=test", "--idle-timeout", "600")
    assert export["state"] == "running"
    assert export["id"] in cli("export", "list", "--label", "for=test")
    handle = nbd.NBD()
    handle.connect_uri(export["uri"])
    assert handle.pread(SIZE, 0) == (top.parent / "base.raw").read_bytes()
    shown = cli.json("export", "show", export["id"])
    assert [client["pid"] for client in shown["clients"]] == [os.getpid()]
    cli("export", "stop", export["id"], status=BUSY)
    assert str(os.getpid()) in cli.said
    assert "--force" in cli.said
    cli("export", "stop", export["id"], "--force")
    with pytest.raises(nbd.Error):
        handle.pread(512, 0)
    assert cli.json("export", "show", export["id"])["state"] == "stopped"
    cli("export", "stop", export["id"])  # once more is no error


def test_an_export_that_is_refused_is_no_success_also_at_the_second_try(cli: Cli, top: Path) -> None:
    program = subprocess.Popen(["qemu-io", "-f", "qcow2", str(top)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert program.stdin is not None
    time.sleep(0.3)
    own = uuid.uuid4()
    try:
        for _ in range(2):
            cli("export", "start", top, "--id", own, status=BUSY)
            assert f"pid {program.pid}" in cli.said
    finally:
        program.stdin.close()
        program.wait(10)


def test_a_grant_that_is_needed_is_not_taken_and_its_holders_are_named(
    cli: Cli, agent: AgentProcess, top: Path
) -> None:
    job = agent.pull(top, increment=MIB)
    agent.until(job["id"], lambda j: j["state"] == "waiting")
    grants = cli.json("grant", "list", "--holder", f"job:{job['id']}")["items"]
    assert {grant["path"]: grant["mode"] for grant in grants} == {str(top): "rw", str(top.parent / "base.raw"): "r"}
    base = next(grant for grant in grants if grant["mode"] == "r")
    assert cli.json("grant", "show", base["id"])["holder"] == {"kind": "job", "id": job["id"]}
    cli("grant", "revoke", base["id"], status=BUSY)
    assert f"job:{job['id']}" in cli.said
    agent.post(f"/v1/jobs/{job['id']}/abort")
    agent.until_ended(job["id"])
    (left,) = eventually(lambda: cli.json("grant", "list", "--path", base["path"])["items"], timeout=5)
    assert left["holder"] == {"kind": "image", "id": str(top)}
    assert cli.json("grant", "revoke", left["id"])["state"] in ("revoked", "kept")


# What happened, and how it is


def test_events_are_replayed_from_any_number(cli: Cli, agent: AgentProcess, top: Path) -> None:
    job = cli.json("job", "pull", top, "--wait")
    events = [json.loads(line) for line in cli("events", "--json").splitlines()]
    numbers = [int(event["id"]) for event in events]
    assert numbers == sorted(set(numbers))
    mine = [event for event in events if event["data"].get("job") == job["id"]]
    assert [event["type"].split(".")[3] for event in mine] == ["started", "completed"]
    assert mine[-1]["data"]["status"] == "COMPLETED"
    since = mine[-1]["id"]
    later = [json.loads(line) for line in cli("events", "--json", "--since", since).splitlines()]
    assert [int(event["id"]) for event in later] == [number for number in numbers if number > int(since)]


def test_events_are_followed_until_control_c(cli: Cli, agent: AgentProcess, top: Path) -> None:
    process = cli.start("events", "--follow", "--json")
    seen: list[Json] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: seen.extend(json.loads(line) for line in process.stdout or ()))
    reader.start()
    time.sleep(0.7)
    job = agent.pull(top)
    agent.until_ended(job["id"])
    try:
        assert eventually(lambda: [e for e in seen if "job.completed" in e["type"]], timeout=5)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
        reader.join(5)
    assert process.returncode == INTERRUPTED
    assert {event["data"]["job"] for event in seen if ".job." in event["type"]} == {job["id"]}


def test_a_reader_that_goes_away_is_no_traceback(cli: Cli, agent: AgentProcess, top: Path) -> None:
    agent.until_ended(agent.pull(top)["id"])
    process = cli.start("events", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.wait(10)


def test_status_shows_what_runs_and_what_failed(cli: Cli, agent: AgentProcess, top: Path) -> None:
    export = agent.export(top)
    job = agent.pull(top, bandwidth=64 * 1024)
    agent.until(job["id"], lambda j: j["state"] == "running")
    found = cli.json("status")
    assert [one["id"] for one in found["jobs"]] == [job["id"]]
    assert [one["id"] for one in found["exports"]] == [export["id"]]
    assert found["host"]["storage_daemons"][0]["job"] == job["id"]
    text = cli("status")
    assert job["id"] in text
    assert export["id"] in text


def test_doctor_knows_the_agent_and_misses_it(cli: Cli, tmp_path: Path) -> None:
    for words, expected in (((), "ok"), (("--socket", tmp_path / "none.sock"), "fail")):
        process = cli.start("doctor", "--json", *words)
        out, err = process.communicate(timeout=30)
        findings = json.loads(out)["checks"]
        assert process.returncode == (ERROR if any(f["result"] == "fail" for f in findings) else OK), err
        assert [f["result"] for f in findings if f["name"] == "agent"] == [expected]
        assert all(f["remedy"] for f in findings if f["result"] == "fail")


def test_lists_are_filtered_and_empty_ones_are_no_error(cli: Cli, top: Path) -> None:
    job = cli.json("job", "pull", top, "--label", "batch=7", "--wait")
    assert [one["id"] for one in cli.json("job", "list", "--label", "batch=7")["items"]] == [job["id"]]
    assert [one["id"] for one in cli.json("job", "list", "--target", top)["items"]] == [job["id"]]
    assert cli.json("job", "list", "--label", "batch=8")["items"] == []
    assert cli("job", "list", "--label", "batch=8") == ""
    assert "no jobs" in cli.said


# Names that are meant to fool the terminal


def test_control_characters_of_names_and_labels_never_reach_the_terminal(
    cli: Cli, agent: AgentProcess, folder: Path
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\r\nfake line"
    target = folder / f"disk{evil}.qcow2"
    for words in (
        ["job", "pull", target],
        ["job", "pull", target, "--wait"],
        ["export", "start", target],
        ["image", "inspect", target],
        ["job", "show", evil],
        ["job", "list", "--label", f"a={evil}"],
    ):
        process = cli.start(*words)
        out, err = process.communicate(timeout=20)
        assert process.returncode in (OK, USAGE, NOT_FOUND), err
        assert not set("\x1b\x07\r") & set(out + err)
        assert not any(line.startswith("fake line") for line in (out + err).splitlines())
    top = overlay(folder / "top.qcow2", raw_image(folder / "base.raw", MIB))
    job = agent.pull(top, labels={"note": evil})
    agent.until_ended(job["id"])
    for words in (["job", "show", job["id"]], ["job", "list"], ["events"], ["status"]):
        out = cli(*words)
        assert not set("\x1b\x07\r") & set(out)
        assert not any(line.startswith("fake line") for line in out.splitlines())
    log = agent.log.read_text()
    assert "\x1b" not in log
    assert not any(line.startswith("fake line") for line in log.splitlines())


def test_a_name_that_is_not_text_is_refused_not_crashed_on(cli: Cli, folder: Path) -> None:
    for words in (["job", "pull"], ["export", "start"], ["image", "inspect"]):
        process = cli.start(*words, os.fsdecode(bytes(folder) + b"/\xff\xfe.qcow2"))
        _, err = process.communicate(timeout=20)
        assert process.returncode in (USAGE, NOT_FOUND), err
        assert "Traceback" not in err


# An agent that goes away


def test_a_follower_waits_for_an_agent_that_restarts(tmp_path: Path, folder: Path) -> None:
    with AgentProcess(tmp_path, {"JOBS_PROGRESS_INTERVAL": "0.1"}) as agent:
        cli = Cli(agent)
        top = overlay(folder / "top.qcow2", raw_image(folder / "base.raw", SIZE))
        own = str(uuid.uuid4())
        process = cli.start("job", "pull", top, "--bandwidth", "2MiB/s", "--wait", "--json", "--id", own)
        assert eventually(lambda: running(agent, own), timeout=10)
        agent.kill()
        with contextlib.suppress(FileNotFoundError):
            agent.socket.unlink()
        time.sleep(0.5)
        agent.start()
        out, err = process.communicate(timeout=30)
        assert process.returncode == OK, err
        assert json.loads(out)["state"] == "completed"
