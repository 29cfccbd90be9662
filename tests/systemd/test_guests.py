"""The service as it is shipped, beside libvirt's as Debian ships it: jobs on the disks of guests that run, whose owners
libvirt changes and remembers. The agent has not the right to see what libvirt remembers."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.systemd import container, hypervisor
from tests.systemd.container import Container
from tests.systemd.hypervisor import IMAGES, Guest, Image

AGENT, LIBVIRT = "hostagent.service", "libvirtd.service"
ALICE = (64051, 64051)
QEMU = (64055, 64055)
REFUSED = re.compile(r"not permitted|denied|EPERM|EACCES|Traceback|a fault of the agent", re.IGNORECASE)
CHAIN = """
cd /var/lib/libvirt/images
dd if=/dev/urandom of=base.raw bs=1M count=32 status=none
qemu-img create -q -f qcow2 -F raw -b base.raw mid.qcow2
qemu-img create -q -f qcow2 -F qcow2 -b mid.qcow2 top.qcow2
qemu-io -f qcow2 -c 'write -P 7 1M 1M' mid.qcow2 >/dev/null
qemu-io -f qcow2 -c 'write -P 8 3M 2M' top.qcow2 >/dev/null
qemu-img convert -O raw top.qcow2 /srv/before.raw
chmod 600 *
chown 64051:64051 *
"""
BEFORE = "/srv/before.raw"


@pytest.fixture(scope="module")
def host() -> Iterator[Container]:
    if (why := container.missing() or hypervisor.missing()) is not None:
        pytest.skip(why)
    with Container.made() as host:
        hypervisor.install(host)
        try:
            host.boot()
        except container.Unbootable as error:
            pytest.skip(f"no container boots here: {error}")
        until_up(host)
        yield host


def until_up(host: Container) -> None:
    host.until(lambda: host.show(AGENT, "ActiveState") == "active", "the agent is up")
    host.until(lambda: connected(host), "it is connected to libvirt")


def connected(host: Container) -> bool:
    return bool(asked(host, "host")["libvirt"]["connected"])


def asked(host: Container, path: str) -> Any:
    """What the agent answers: much quicker than its command, where something is waited for."""
    curl = ("curl", "-sf", "--unix-socket", "/run/hostagent/hostagent.sock", f"http://localhost/v1/{path}")
    return json.loads(host.run(*curl))


@pytest.fixture(autouse=True)
def nothing_is_refused(host: Container) -> Iterator[None]:
    """Neither by what the service may do, nor by who it is."""
    yield
    said = host.run("journalctl", "--no-pager", "--output=cat", f"--unit={AGENT}")
    assert "agent ready" in said
    assert not (found := [line for line in said.splitlines() if REFUSED.search(line)]), found
    checks = json.loads(host.hostagent("doctor", "--json"))["checks"]
    assert not (found := [check for check in checks if check["result"] == "fail"]), found


@pytest.fixture
def guest(host: Container) -> Iterator[Guest]:
    """web1 is defined, on top.qcow2, mid.qcow2 and base.raw, all of them Alice's, and the agent knows it."""
    host.run("sh", "-ec", CHAIN)
    guest = Guest(host, "web1", "top.qcow2")
    guest.define()
    host.until(lambda: holders(host, "base.raw") == ["web1"], "the agent knows what it needs")
    yield guest
    guest.remove()
    host.run("sh", "-c", f"rm -f {IMAGES}/*")


def grants(host: Container, name: str) -> list[Any]:
    return list(asked(host, f"grants?path={IMAGES}/{name}")["items"])


def holders(host: Container, name: str) -> list[str]:
    """The domains for whose disks the file is held."""
    found = (grant["holder"] for grant in grants(host, name) if grant["state"] == "granted")
    return [str(holder["name"]).partition("/")[0] for holder in found if holder["kind"] == "domain"]


def images(host: Container, *names: str) -> list[Image]:
    return [Image(host, name) for name in names]


def shown(host: Container, job: str) -> Any:
    return asked(host, f"jobs/{job}")


def begun(host: Container, *words: str) -> str:
    """A job that is slow, and has done something. Its id."""
    job = json.loads(host.hostagent("job", *words, "--bandwidth", "1MiB/s", "--json"))["id"]
    host.until(lambda: shown(host, job)["cursor"]["cur"] > 0, "it works")
    return str(job)


def completes(host: Container, job: str) -> Any:
    """From now on as quick as can be. What it says of the chain."""
    host.run("/usr/lib/hostagent/bin/hostagent", "job", "speed", job, "1GiB/s", check=False)  # it may have ended
    host.until(lambda: shown(host, job)["finished"] and shown(host, job)["revocation"] != "pending", "it ends")
    found = shown(host, job)
    assert found["state"] == "completed", found
    return found["chain"]


def restart_libvirt(host: Container, job: str) -> None:
    """In the midst of a job."""
    before = host.show(LIBVIRT, "MainPID")
    assert shown(host, job)["state"] == "running"
    host.run("systemctl", "restart", LIBVIRT)
    assert host.show(LIBVIRT, "MainPID") != before
    host.until(lambda: connected(host), "the agent is connected again")
    host.until(lambda: shown(host, job)["state"] != "unknown", "it is known again")


def test_a_pull_goes_on_over_a_restart_of_libvirt_and_what_it_frees_is_closed(host: Container, guest: Guest) -> None:
    top, mid, base = images(host, "top.qcow2", "mid.qcow2", "base.raw")
    guest.start()
    guest.writes()
    assert [image.owner for image in (top, mid, base)] == [QEMU, QEMU, QEMU]
    assert (mid.opens(), base.opens("r+")) == (True, True), "libvirt has given them"
    assert (top.remembered["ref_dac"], mid.remembered, base.remembered) == ("1", {}, {})
    job = begun(host, "pull", "web1/vda")
    restart_libvirt(host, job)
    chain = completes(host, job)
    assert (chain["revoked"], chain["kept"]) == ([mid.path, base.path], [])
    assert (mid.owner, base.owner, mid.opens(), base.opens()) == (ALICE, ALICE, False, False)
    assert (top.owner, top.opens("r+"), top.remembered["ref_dac"]) == (QEMU, True, "1"), "the guest's own is left alone"
    guest.writes()
    flushed = guest.flushed
    guest.end()
    assert (top.owner, top.remembered) == (ALICE, {}), "libvirt itself has given it back"
    top.verify(BEFORE, flushed)
    guest.start(paused=True)
    assert (top.owner, mid.owner) == (QEMU, ALICE)


def test_a_copy_takes_the_guest_over_and_a_base_of_another_stays(host: Container, guest: Guest) -> None:
    top, mid, base, copy = images(host, "top.qcow2", "mid.qcow2", "base.raw", "copy.qcow2")
    host.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.path, f"{IMAGES}/other.qcow2")
    other = Guest(host, "web2", "other.qcow2")
    other.define()
    try:
        other.start(paused=True)
        guest.start()
        guest.writes()
        host.until(lambda: set(holders(host, "base.raw")) == {"web1", "web2"}, "the agent knows both")
        job = begun(host, "copy", "web1/vda", copy.path, "--pivot")
        restart_libvirt(host, job)
        chain = completes(host, job)
        assert chain["revoked"] == [top.path, mid.path]
        assert [kept["path"] for kept in chain["kept"]] == [base.path], "web2 needs it"
        assert [image.opens() for image in (top, mid, base, copy)] == [False, False, True, True]
        assert (top.owner, mid.owner, top.remembered) == (ALICE, ALICE, {})
        assert copy.path in host.run("virsh", "domblklist", "web1")
        guest.writes()
        flushed = guest.flushed
        guest.end()
        copy.verify(BEFORE, flushed)
    finally:
        other.remove()
    host.until(lambda: base.owner == ALICE, "web2 is gone, and the base is given back")
    assert (base.opens(), base.remembered, copy.remembered) == (False, {}, {})


def test_a_commit_takes_the_guest_to_its_base(host: Container, guest: Guest) -> None:
    top, mid, base = images(host, "top.qcow2", "mid.qcow2", "base.raw")
    guest.start()
    guest.writes()
    chain = completes(host, begun(host, "commit", "web1/vda", "--pivot"))
    assert (chain["revoked"], chain["kept"]) == ([top.path, mid.path], [])
    assert [image.opens("r+") for image in (top, mid, base)] == [False, False, True]
    assert (base.remembered["ref_dac"], top.remembered) == ("1", {}), "libvirt has taken its note along"
    guest.writes()
    flushed = guest.flushed
    guest.end()
    assert (base.owner, mid.owner, base.remembered) == (ALICE, ALICE, {})
    base.verify(BEFORE, flushed)


def test_after_a_loss_of_power_what_libvirt_remembers_counts_no_more(host: Container, guest: Guest) -> None:
    top, mid, base = images(host, "top.qcow2", "mid.qcow2", "base.raw")
    guest.start(paused=True)
    host.lose_power()
    until_up(host)
    assert (top.owner, top.remembered["ref_dac"]) == (QEMU, "1"), "nobody has given it back"
    host.until(lambda: holders(host, "top.qcow2") == ["web1"], "the agent knows what web1 needs")
    assert base.opens(), "it is still defined"
    guest.remove()
    host.until(lambda: [image.owner for image in (top, mid, base)] == [ALICE] * 3, "all are given back")
    assert not any(image.opens() for image in (top, mid, base))
    guest.create()  # libvirt does not say that they are in use
    guest.end()
    assert (top.owner, top.remembered) == (ALICE, {})


def test_what_a_guest_has_open_that_libvirt_has_lost_is_not_taken(host: Container, guest: Guest) -> None:
    """Its QEMU runs on (so does libvirt 9.0 when it is killed in a pivot). When that has ended libvirt's note, which the
    service cannot see, is left, and stands in the way of the next start: docs/libvirt.md."""
    (top,) = images(host, "top.qcow2")
    guest.remove()
    guest.create()
    host.until(lambda: holders(host, "top.qcow2") == ["web1"], "the agent knows it")
    pid = guest.pid
    host.run("systemctl", "stop", "libvirtd.socket", "libvirtd-ro.socket", "libvirtd-admin.socket", LIBVIRT)
    host.run("rm", "/run/libvirt/qemu/web1.xml")
    host.run("systemctl", "start", LIBVIRT)
    assert "web1" not in host.run("virsh", "list", "--all", "--name")
    host.until(lambda: kept(host, "top.qcow2"), "it is needed by nobody")
    (grant,) = kept(host, "top.qcow2")
    assert f"pid {pid}" in grant["detail"], grant
    assert (top.owner, top.remembered["ref_dac"]) == (QEMU, "1")
    host.run("kill", "-9", pid)
    host.until(lambda: not host.run("pgrep", "-f", "guest=web1,", check=False), "QEMU has ended")
    host.hostagent("grant", "revoke", grant["id"])
    assert (top.opens(), top.owner, top.remembered["ref_dac"]) == (False, ALICE, "1")
    refused = subprocess.run(
        host.command("virsh", "create", "--paused", "/srv/web1.xml"), capture_output=True, text=True, timeout=60
    )
    assert "already in use" in refused.stderr, refused
    top.forget()
    guest.create()
    guest.end()
    assert (top.owner, top.remembered) == (ALICE, {})


def kept(host: Container, name: str) -> list[Any]:
    return [grant for grant in grants(host, name) if grant["state"] == "kept"]
