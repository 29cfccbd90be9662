"""What runs here, without an agent: image, doctor, serve --show-config; and the command line as a whole."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fake_agent import FakeAgent
from test_cli_objects import grant, host

from hostagent.cli import arguments, client
from hostagent.cli.judged import judged
from hostagent.config_text import load, plain

PLAIN = {key: value for key, value in os.environ.items() if not key.startswith("HOSTAGENT_")}


@pytest.fixture(autouse=True)
def own_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Settings under which nothing of the host is touched."""
    monkeypatch.setenv("HOSTAGENT_ACCESS_HYPERVISOR_USER", "")
    monkeypatch.setenv("HOSTAGENT_AGENT_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HOSTAGENT_AGENT_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M"], check=True)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2"], check=True
    )
    return tmp_path


def _checks(out: str) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(out)["checks"]}


@pytest.mark.qemu
def test_image_inspect_shows_the_chain(images: Path, run, capsys) -> None:
    assert run("image", "inspect", "./top.qcow2", "--json") == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["path"] for layer in layers] == [str(images / "top.qcow2"), str(images / "base.qcow2")]
    assert [layer["virtual_size"] for layer in layers] == [8 << 20, 8 << 20]
    assert run("image", "inspect", "top.qcow2") == 0
    assert "base.qcow2" in capsys.readouterr().out


@pytest.mark.qemu
def test_image_check_says_which_layer_is_damaged(images: Path, run, capsys) -> None:
    assert run("image", "check", "top.qcow2") == 0
    capsys.readouterr()
    with (images / "base.qcow2").open("r+b") as file:  # a refcount table entry that points nowhere sensible
        file.seek(0x10000)
        file.write(b"\x00\xff\xff\xff\xff\xff\x00\x00")
    assert run("image", "check", "top.qcow2", "--json") == 1
    results = [layer["result"] for layer in json.loads(capsys.readouterr().out)["layers"]]
    assert results == ["ok", "fail"]


def test_image_inspect_of_what_is_not_there_exits_3(run, capsys) -> None:
    assert run("image", "inspect", "/nowhere/x.qcow2") == 3
    assert "/nowhere/x.qcow2" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["inspect", "check", "map"])
def test_a_network_image_is_not_looked_at_here(run, capsys, verb: str) -> None:
    assert run("image", verb, "nbd://host/disk") == 2
    assert "is an NBD URI" in capsys.readouterr().err


@pytest.mark.qemu
def test_doctor_works_without_an_agent_and_says_how_to_start_it(run, capsys) -> None:
    assert run("doctor", "--json") == 1
    checks = _checks(capsys.readouterr().out)
    assert checks["qemu-storage-daemon"]["result"] == "ok"
    assert checks["agent"]["result"] == "fail"
    assert "hostagent serve" in checks["agent"]["remedy"]


def _healthy(agent: FakeAgent) -> None:
    agent.on("GET", "/readyz", (200, {"ready": True, "checks": {"store": {"ok": True, "detail": "writable"}}}))
    agent.on("GET", "/v1/host", (200, host()))
    agent.on("GET", "/v1/grants", (200, {"items": [], "next": None}))


@pytest.mark.qemu
def test_doctor_exits_0_when_all_is_well(agent: FakeAgent, run, capsys) -> None:
    _healthy(agent)
    assert run("doctor") == 0
    assert "0 failed" in (out := capsys.readouterr().out)
    assert "1 warnings" not in out


def test_doctor_judges_the_running_agents_settings_and_says_so(agent: FakeAgent, run, capsys, tmp_path: Path) -> None:
    settings = plain(load(env={"HOSTAGENT_QSD_BINARY": "/the/agents/qsd"}))
    _healthy(agent)
    agent.on("GET", "/v1/host", (200, host(settings={**settings, "of.later": 1})))
    assert run("doctor", "--json") == 1
    checks = _checks(capsys.readouterr().out)
    assert "/the/agents/qsd" in checks["qsd"]["message"]
    assert f"the agent's at {agent.path}" in checks["judged by"]["message"]
    (file := tmp_path / "h.toml").touch()
    run("doctor", "--json", "--config", str(file))
    checks = _checks(capsys.readouterr().out)
    assert "qemu-storage-daemon" in checks and str(file) in checks["judged by"]["message"]


@pytest.mark.parametrize(
    ("settings", "why"), [(None, "does not tell"), ({"jobs.width": "much"}, "does not tell"), ("x", "does not tell")]
)
def test_an_agent_that_does_not_tell_its_settings_is_not_judged_by_them(
    agent: FakeAgent, settings: object, why: str
) -> None:
    agent.on("GET", "/v1/host", (200, host() if settings is None else host(settings=settings)))
    own = load(env={})
    found = judged(agent.path, own)
    assert (found.settings, found.agent) == (own, False)
    assert why in found.whose


def test_settings_of_another_users_agent_are_not_worked_by(agent: FakeAgent, monkeypatch) -> None:
    agent.on("GET", "/v1/host", (200, host(settings=plain(load(env={})))))
    own = load(env={})
    assert judged(agent.path, own).agent
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    found = judged(agent.path, own)
    assert (found.settings, found.agent) == (own, False)
    assert "another user's" in found.whose


def test_doctor_reports_what_the_agent_knows(agent: FakeAgent, run, capsys) -> None:
    _healthy(agent)
    agent.on("GET", "/readyz", (503, {"ready": False, "checks": {"store": {"ok": False, "detail": "read-only"}}}))
    stuck = {"pid": 9, "image": "/a", "state": "unresponsive", "exports": 1, "job": None}
    agent.on("GET", "/v1/host", (200, host(storage_daemons=[stuck], orphans=[{"pid": 8, "holds": "job x"}])))
    agent.on(
        "GET", "/v1/grants", (200, {"items": [grant("kept", detail="mode 0644 lets everybody read")], "next": None})
    )
    assert run("doctor", "--json") == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    found = {(check["name"], check["result"]): check["message"] for check in checks}
    assert found["agent: store", "fail"] == "read-only"
    assert "pid 9 of /a does not answer" in found["storage daemons", "fail"]
    assert "pid 8 belongs to no job" in found["storage daemons", "warn"]
    assert "mode 0644 lets everybody read" in found["kept files", "warn"]


def test_a_data_daemon_that_is_being_started_is_no_failure(agent: FakeAgent, run, capsys) -> None:
    _healthy(agent)
    facts = {"running": False, "starting": True, "pid": None, "error": "it is being started", "outdated": False}
    late = {**facts, "starting": False, "error": "it ended at once"}
    for given, result in ((facts, "warn"), (late, "fail")):
        agent.on("GET", "/v1/host", (200, host(data_daemon=given)))
        run("doctor", "--json")
        check = _checks(capsys.readouterr().out)["data daemon"]
        assert (check["result"], check["message"]) == (result, given["error"])


def test_doctor_finds_missing_programs_users_and_bad_folders(run, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOSTAGENT_QSD_BINARY", "/nowhere/qsd")
    monkeypatch.setenv("HOSTAGENT_ACCESS_HYPERVISOR_USER", "no-such-user")
    monkeypatch.setenv("HOSTAGENT_ACCESS_UNKNOWN_OWNER", "root:root")
    monkeypatch.setenv("HOSTAGENT_IMAGES_POOLS", f"{tmp_path}:{tmp_path}/missing")
    (tmp_path / "state").mkdir(mode=0o755)
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    assert run("doctor", "--json") == 1
    out = capsys.readouterr().out
    checks = _checks(out)
    assert checks["qsd"]["result"] == "fail" and "qsd.binary" in checks["qsd"]["remedy"]
    assert checks["hypervisor user"]["result"] == "fail"
    assert checks["unknown owners"]["result"] == "ok", "that is about another user"
    assert checks["state folder"]["result"] == "warn"
    assert checks["runtime folder"]["result"] == "fail"
    access = [check for check in json.loads(out)["checks"] if check["name"] == "access control"]
    assert access[1]["result"] == "warn" and "missing" in access[1]["message"]
    assert list(tmp_path.iterdir()).__len__() == 2, "the trial file has no name and leaves nothing behind"


def test_doctor_reports_settings_that_cannot_be_used(run, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HOSTAGENT_JOBS_WIDHT", "4")
    assert run("doctor", "--json") == 1
    settings = _checks(capsys.readouterr().out)["settings"]
    assert settings["result"] == "fail" and "HOSTAGENT_JOBS_WIDTH" in settings["message"]


def test_serve_shows_the_settings_in_force(run, capsys, tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text("[jobs]\nwidth = 7\n")
    words = ["--config", str(file), "--state-dir", "/s", "--runtime-dir", "/r", "--hypervisor-user", "qemu"]
    assert run("serve", *words, "--show-config") == 0
    out = capsys.readouterr().out
    shown = tomllib.loads(out)
    assert shown["agent"]["state_dir"] == "/s" and shown["access"]["hypervisor_user"] == "qemu"
    assert shown["jobs"]["width"] == 7 and f"# from: {file}" in out


def test_serve_checks_its_settings_and_says_nothing_when_they_are_right(run, capsys, tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text("[jobs]\nwidth = 7\n")
    assert run("serve", "--config", str(file), "--check-config") == 0
    assert capsys.readouterr().out == ""
    file.write_text("[jobs]\nwidth = 0\n")
    assert run("serve", "--config", str(file), "--check-config") == 2
    assert "jobs.width" in capsys.readouterr().err


@pytest.mark.parametrize("installed", [False, True])
def test_where_systemd_runs_the_agent_it_is_systemd_that_is_asked(
    run, capsys, monkeypatch, socket_path: Path, tmp_path: Path, installed: bool
) -> None:
    monkeypatch.setattr(client, "SYSTEM", socket_path)
    monkeypatch.setattr(client, "BOOTED", tmp_path)
    monkeypatch.setattr(client, "UNITS", (str(tmp_path),))
    if installed:
        (tmp_path / "hostagent.service").touch()
    assert run("status") == 8
    said = capsys.readouterr().err
    assert ("journalctl -u hostagent" in said and "systemctl restart hostagent" in said) == installed
    assert ("hostagent serve" in said) != installed


def test_serve_with_wrong_settings_exits_2_and_names_the_nearest(run, capsys, tmp_path: Path) -> None:
    file = tmp_path / "h.toml"
    file.write_text("[jobs]\nwidht = 7\n")
    assert run("serve", "--config", str(file)) == 2
    assert "jobs.width" in capsys.readouterr().err


@pytest.mark.parametrize("noun", ["backup", "checkpoint", "transfer"])
def test_a_noun_of_later_says_so_whatever_follows(run, capsys, noun: str) -> None:
    assert run(noun, "start", "web1", "--since", "x") == 1
    assert "not supported yet" in capsys.readouterr().err
    assert run(noun, "--help") == 0
    said = capsys.readouterr()
    assert "not supported yet" in said.out and not said.err


def test_an_option_that_a_command_has_not_is_refused_with_that_commands_usage(run, capsys) -> None:
    assert run("job", "pull", "web1/vda", "--follow") == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: hostagent job pull ") and "unrecognized arguments: --follow" in said


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("/a/../b", "/a/../b"), ("web1/vda", "web1/vda"), ("./x", "{here}/x"), ("../x", "{above}/x"),
        ("./../x", "{above}/x"), (".//x", "{here}/x"), ("./a/../x", "{here}/a/../x"),
    ],
)  # fmt: skip
def test_a_target_is_made_absolute_and_its_links_are_left_alone(
    text: str, target: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert arguments.target(text) == target.format(here=tmp_path, above=tmp_path.parent)


def test_the_socket_is_named_by_the_option_else_the_environment_else_the_runtime_folder(monkeypatch) -> None:
    options = arguments.common()
    monkeypatch.setenv("HOSTAGENT_SOCKET", "/from/env")
    defaults = arguments.COMMON_DEFAULTS
    given = options.parse_args(["--socket", "/x"])
    assert str(arguments.socket_path(given)) == "/x"
    empty = options.parse_args([], type(given)(**defaults))
    assert str(arguments.socket_path(empty)) == "/from/env"
    monkeypatch.delenv("HOSTAGENT_SOCKET")
    assert arguments.socket_path(empty).name == "hostagent.sock"


def test_the_common_options_may_stand_before_and_after_the_command(agent: FakeAgent, run, capsys) -> None:
    agent.on("GET", "/v1/jobs", (200, {"items": [], "next": None}))
    assert run("--json", "job", "list") == 0
    assert run("job", "--json", "list") == 0
    assert run("job", "list", "--json") == 0
    assert capsys.readouterr().out.count('"items"') == 3


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    """In processor time, the least of a few runs: the machine may be busy, the program may not be slow."""
    heavy = "{'rich', 'fastapi', 'pydantic', 'uvicorn', 'qemu', 'nbd', 'http', 'asyncio', 'sqlite3'}"
    code = f"import sys; from hostagent.cli.main import main; main(['--help']); print({heavy} & set(sys.modules))"
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], env=PLAIN, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.rstrip().endswith("set()")
    assert min(took) < 0.5


def test_a_reader_that_goes_away_is_no_traceback(agent: FakeAgent, start) -> None:
    items = [grant(path="/images/" + "x" * 200)] * 2000
    agent.on("GET", "/v1/grants", (200, {"items": items, "next": None}))
    process = start("grant", "list")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=10) == 1
    assert process.stderr.read() == ""
    process.stderr.close()
