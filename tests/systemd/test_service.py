"""The units as they are shipped, under a real systemd: hardened, activated by sockets, watched, and rebooted."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.systemd import container
from tests.systemd.container import Container

MIB = 1 << 20
SIZE = 64 * MIB
AGENT = "hostagent.service"


@pytest.fixture(scope="module")
def host() -> Iterator[Container]:
    if (why := container.missing()) is not None:
        pytest.skip(why)
    with Container.made() as host:
        host.drop_in(AGENT, "[Service]\nWatchdogSec=4\n")
        images = host.root / "srv/images"
        images.mkdir(parents=True)
        try:
            host.boot()
        except container.Unbootable as error:
            pytest.skip(f"no container boots here: {error}")
        host.until(lambda: host.show(AGENT, "ActiveState") == "active", "the agent is up")
        yield host


@pytest.fixture
def top(host: Container) -> Iterator[str]:
    """An image of 64 MiB, all of which is in its backing file, beside a copy of what it reads as. Its name in there."""
    script = (
        "cd /srv/images && dd if=/dev/urandom of=base.raw bs=1M count=64 status=none && "
        "cp base.raw truth.raw && qemu-img create -q -f qcow2 -F raw -b /srv/images/base.raw top.qcow2 && chmod 600 *"
    )
    host.run("sh", "-c", script)
    yield "/srv/images/top.qcow2"
    host.run("sh", "-c", "rm /srv/images/*")


def pull(host: Container, path: str, rate: int = 16 * MIB) -> str:
    """Begun, and not done yet: at `rate` bytes per second. Its id."""
    curl = ["curl", "-sf", "--unix-socket", "/run/hostagent/hostagent.sock", "http://localhost/v1/jobs"]
    body = json.dumps({"operation": "pull", "target": path, "bandwidth": rate})
    job = json.loads(host.run(*curl, "-H", "Content-Type: application/json", "-d", body))
    host.until(lambda: shown(host, job["id"])["cursor"]["cur"] > 0, "it pulls")
    return str(job["id"])


def shown(host: Container, job: str) -> Any:
    return json.loads(host.hostagent("job", "show", job, "--json"))


def completes(host: Container, job: str, path: str) -> None:
    host.until(lambda: shown(host, job)["state"] not in ("running", "unknown", "completing", "starting"), "it ended")
    found = shown(host, job)
    assert found["state"] == "completed", found
    host.until(lambda: shown(host, job)["chain"]["revoked"] == ["/srv/images/base.raw"], "the base is taken back")
    host.run("qemu-img", "compare", path, "/srv/images/truth.raw")
    assert json.loads(host.run("qemu-img", "info", "--output=json", path)).get("backing-filename") is None


def test_it_is_up_after_a_boot_as_its_units_say(host: Container) -> None:
    status = host.show(AGENT, "StatusText")
    assert status.startswith("0 jobs, 0 exports, libvirt"), status
    pid = host.show(AGENT, "MainPID")
    bits = host.run("sed", "-n", "s/^CapBnd:\\t//p", f"/proc/{pid}/status").strip()
    allowed = {0, 1, 3, 5, 6, 7, 19}  # CHOWN DAC_OVERRIDE FOWNER KILL SETGID SETUID SYS_PTRACE
    assert {bit for bit in range(64) if int(bits, 16) >> bit & 1} == allowed
    assert host.run("sed", "-n", "s/^Seccomp:\\t//p", f"/proc/{pid}/status").strip() == "2"
    assert host.run("stat", "-c", "%a %U %G", "/run/hostagent/hostagent.sock").split() == ["660", "root", "hostagent"]
    assert host.run("stat", "-c", "%a %G", "/run/hostagent/nbd").split() == ["750", "hostagent"]
    assert "not permitted" not in host.log(), "a child speaks to the service manager"
    found = json.loads(host.hostagent("status", "--json"))
    assert found["host"]["data_daemon"]["running"], found


def test_a_pull_goes_on_over_a_restart_in_a_unit_of_its_own(host: Container, top: str) -> None:
    job = pull(host, top, 2 * MIB)  # a restart takes seconds where much else runs
    host.until(lambda: scopes(host), "the storage daemon has its scope")
    (scope,) = scopes(host)
    (before,) = host.run("cat", f"/sys/fs/cgroup{host.show(scope, 'ControlGroup')}/cgroup.procs").split()
    host.run("systemctl", "restart", AGENT)
    assert scopes(host) == [scope], "it was left alone"
    assert host.run("sed", "-n", "s/^Uid:\\t\\([0-9]*\\).*/\\1/p", f"/proc/{before}/status") != "0\n"
    assert host.run("sed", "-n", "s/^Max open files *\\([0-9]*\\).*/\\1/p", f"/proc/{before}/limits") == "4096\n"
    host.hostagent("job", "speed", job, "1GiB/s")
    completes(host, job, top)
    host.until(lambda: not scopes(host), "its scope is gone with it")


def scopes(host: Container) -> list[str]:
    listed = host.run("systemctl", "list-units", "--plain", "--no-legend", "hostagent-qsd-*.scope")
    return [line.split()[0] for line in listed.splitlines()]


def test_who_connects_during_a_restart_waits_and_is_answered(host: Container) -> None:
    ask = "for i in $(seq 40); do curl -sf --max-time 20 --unix-socket /run/hostagent/hostagent.sock "
    ask += "-o /dev/null http://localhost/v1/host || exit 1; sleep 0.05; done"
    asking = subprocess.Popen(host.command("sh", "-c", ask))
    for _ in range(2):
        time.sleep(0.5)
        host.run("systemctl", "restart", AGENT)
    assert asking.wait(container.WAIT) == 0


def test_a_stopped_agent_is_started_by_whoever_asks(host: Container) -> None:
    host.run("systemctl", "stop", AGENT)
    assert host.show(AGENT, "ActiveState") == "inactive"
    host.hostagent("status")
    assert host.show(AGENT, "ActiveState") == "active"


BUS = ("busctl", "--system", "--no-pager")
OBJECT = ("org.hostagent1", "/org/hostagent1", "org.hostagent1.Manager")


def test_it_is_on_the_system_bus_where_polkit_decides_who_changes_anything(host: Container, top: str) -> None:
    """With dbus-daemon, polkitd and our files for both as they are on a host."""
    if not (host.root / "usr/bin/pkaction").exists():
        pytest.skip("polkitd is not installed (tools/setup.sh develop)")
    host.run("useradd", "--groups=hostagent", "member")
    host.run("useradd", "stranger")
    host.until(lambda: "org.hostagent1" in host.run(*BUS, "list"), "it is on the bus")
    options = ("2", "bandwidth", "t", str(MIB), "id", "s", "7b0e3f5c-6a44-4c1a-9d0f-3a3f6f2f9a01")
    start = (*BUS, "call", *OBJECT, "StartJob", "ssa{sv}", "pull", top, *options)
    job = "/org/hostagent1/job/7b0e3f5c_6a44_4c1a_9d0f_3a3f6f2f9a01"
    member, stranger = (("runuser", "-u", name, "--") for name in ("member", "stranger"))
    assert "lacks the authorisation org.hostagent1.job-start" in fails(host, *stranger, *start)
    for action in ("job-start", "job-control", "export", "grant-revoke"):
        assert host.run("pkaction", f"--action-id=org.hostagent1.{action}") == f"org.hostagent1.{action}\n"
    assert host.run(*start) == f'o "{job}"\n'
    cancel = (*BUS, "call", OBJECT[0], job, "org.hostagent1.Job", "Cancel", "a{sv}", "0")
    assert "lacks the authorisation org.hostagent1.job-control" in fails(host, *stranger, *cancel)
    get = (*BUS, "get-property", OBJECT[0], job, "org.hostagent1.Job", "State")
    assert host.run(*stranger, *get) in ('s "running"\n', 's "starting"\n', 's "queued"\n')
    host.run(*member, *cancel)  # the group of the agent's socket
    host.until(lambda: host.run(*get) == 's "aborted"\n', "it is aborted")
    bus = ("org.freedesktop.DBus", "/", "org.freedesktop.DBus")
    assert "Access denied" in fails(
        host, *stranger, *BUS, "call", *bus, "RequestName", "su", "org.hostagent1", "4"
    )


def test_whoever_calls_it_on_the_bus_starts_it(host: Container) -> None:
    host.run("systemctl", "stop", AGENT)
    version = host.run(*BUS, "get-property", *OBJECT, "Version")
    assert version.startswith('s "')
    assert host.show(AGENT, "ActiveState") == "active"


def fails(host: Container, *words: str) -> str:
    """What it says, when it fails."""
    done = subprocess.run(host.command(*words), capture_output=True, text=True, timeout=container.WAIT)
    assert done.returncode != 0, done.stdout
    return done.stderr


def test_an_agent_that_hangs_is_killed_and_its_job_goes_on(host: Container, top: str) -> None:
    job, restarts = pull(host, top), int(host.show(AGENT, "NRestarts"))
    pid = host.show(AGENT, "MainPID")
    host.run("kill", "-STOP", pid)
    host.until(lambda: int(host.show(AGENT, "NRestarts")) > restarts, "the watchdog bites")
    host.until(lambda: host.show(AGENT, "ActiveState") == "active", "it is there again")
    assert host.show(AGENT, "MainPID") != pid
    completes(host, job, top)


def test_a_reload_reads_the_settings(host: Container) -> None:
    settings = host.root / "etc/hostagent/hostagent.toml"
    settings.parent.mkdir(exist_ok=True)
    pid = host.show(AGENT, "MainPID")
    try:
        settings.write_text("[jobs]\nwidth = 5\n")
        host.run("systemctl", "reload", AGENT)
        host.until(lambda: '"at_the_next_start": ["jobs.width"]' in host.log(), "it is said")
        settings.write_text("[jobs]\nwidth = 0\n")
        fails(host, "systemctl", "reload", AGENT)
        host.until(lambda: "set jobs.width to" in host.log(), "it is said, with the remedy")
        host.run("systemctl", "kill", "-s", "HUP", "--kill-whom=main", AGENT)
        host.until(lambda: "the settings are wrong" in host.show(AGENT, "StatusText"), "and where nobody has checked")
        assert (host.show(AGENT, "MainPID"), host.show(AGENT, "ActiveState")) == (pid, "active")
    finally:
        settings.unlink()
    host.run("systemctl", "reload", AGENT)
    assert host.show(AGENT, "StatusText").startswith("0 jobs")


def test_an_agent_that_settings_keep_from_starting_comes_back_with_its_socket(host: Container) -> None:
    drop_in = host.root / "etc/hostagent/hostagent.d/tcp.toml"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[api]\nmax_body = 1024\n[api]\nlisten = []\n")
    try:
        host.run("systemctl", "restart", AGENT, check=False)
        host.until(lambda: host.show("hostagent.socket", "ActiveState") == "failed", "it is given up")
        said = fails(host, "/usr/lib/hostagent/bin/hostagent", "status")
        assert "journalctl -u hostagent" in said and "systemctl restart hostagent" in said, said
        assert "put the keys below it under the [api] that is there already (line 1)" in host.log()
    finally:
        drop_in.unlink()
        drop_in.parent.rmdir()
    host.run("systemctl", "reset-failed", "hostagent*")
    host.run("systemctl", "restart", AGENT)
    host.until(lambda: active(host), "both are back")
    assert "no job is active" in host.hostagent("status")


def active(host: Container) -> bool:
    return {host.show(unit, "ActiveState") for unit in (AGENT, "hostagent.socket")} == {"active"}


def test_a_reboot_ends_a_pull_which_another_completes(host: Container, top: str) -> None:
    job = pull(host, top)
    host.reboot()
    host.until(lambda: host.show(AGENT, "ActiveState") == "active", "the agent is up")
    host.until(lambda: shown(host, job)["finished"], "the job has ended")
    found = shown(host, job)
    assert found["state"] == "failed" and found["error"]["remedy"], found
    host.run("qemu-img", "check", "-q", top)
    host.run("qemu-img", "compare", top, "/srv/images/truth.raw")
    completes(host, pull(host, top), top)


def test_the_data_daemon_as_a_service_moves_an_export(host: Container, top: str) -> None:
    (host.root / "etc/hostagent").mkdir(exist_ok=True)
    settings = host.root / "etc/hostagent/hostagent.toml"
    settings.write_text("[data]\nstart = false\n")
    try:
        host.run("systemctl", "restart", AGENT)
        host.run("systemctl", "start", "hostagent-data.service")
        export = json.loads(host.hostagent("export", "start", top, "--json"))
        ticket = {"uuid": "t-1", "url": nbd_url(export["uri"]), "size": SIZE, "ops": ["read"], "timeout": 60}
        control = ["curl", "-sf", "--unix-socket", "/run/hostagent/data-control.sock"]
        host.run(*control, "-X", "PUT", "-d", json.dumps(ticket), "http://localhost/tickets/t-1")
        host.run("curl", "-sf", "-o", "/srv/images/got.raw", "http://127.0.0.1:54322/images/t-1")
        host.run("cmp", "/srv/images/got.raw", "/srv/images/truth.raw")
        pid = host.show("hostagent-data.service", "MainPID")
        assert host.run("stat", "-c", "%U", f"/proc/{pid}").strip() == "hostagent-data"
        host.run(*control, "-X", "DELETE", "http://localhost/tickets/t-1")
        host.hostagent("export", "stop", export["id"])
    finally:
        settings.unlink()
        host.run("systemctl", "stop", "hostagent-data.service", "hostagent-data.socket")
        host.run("systemctl", "restart", AGENT)


def nbd_url(uri: str) -> str:
    """A ticket's words for an export: nbd+unix:///NAME?socket=PATH."""
    name, _, socket = uri.removeprefix("nbd+unix:///").partition("?socket=")
    return f"nbd:unix:{socket}:exportname={name}"
