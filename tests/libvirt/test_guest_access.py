"""What libvirt leaves open after a pull is taken back, when nobody needs it: tried as the user that guests run as."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, backing_of, overlay, raw_image, reachable, user_can_read
from tests.libvirt.guest import Guest
from tests.libvirt.jobs import live_paths
from tests.libvirt.private import PrivateLibvirt, until
from tests.qemu.faults import HASTE

ALICE = (64051, 64051)
SLOW = MIB


@pytest.fixture
def agent(tmp_path: Path, libvirt: PrivateLibvirt) -> Iterator[AgentProcess]:
    home = tmp_path / "agent"
    home.mkdir()
    settings = {
        **HASTE,
        "LIBVIRT_URI": libvirt.uri,
        "LIBVIRT_RECONNECT_WAIT": "0.1",
        "LIBVIRT_RECONNECT_WAIT_MAX": "0.5",
        "LIBVIRT_REFRESH": "1",
        "JOBS_SETTLE_RETRY_MAX": "0.5",
    }
    with reachable(home), AgentProcess(home, settings) as process:
        until(lambda: domains_of(process).startswith("of 0"), "no domain is known")
        yield process


@pytest.fixture
def base(folder: Path) -> Path:
    """Alice's."""
    path = raw_image(folder / "base.raw", 8 * MIB)
    os.chown(path, *ALICE)
    return path


def owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def domains_of(agent: AgentProcess) -> str:
    return str(agent.get("/readyz")["checks"]["domains"]["detail"])


def holders(agent: AgentProcess, path: Path) -> set[str]:
    """Who needs the file, and has it: its owner was seen, and what is to be given was."""
    items = agent.get(f"/v1/grants?path={path}")["items"]
    return {item["holder"]["id"] for item in items if item["state"] == "granted"}


def defined(agent: AgentProcess, libvirt: PrivateLibvirt, name: str, base: Path, **more: bool) -> Guest:
    """A guest on an overlay of the base, which the agent knows of."""
    top = overlay(base.parent / f"{name}.qcow2", base)
    os.chown(top, *ALICE)
    guest = libvirt.guest(name, top, **more)
    mine = f"{guest.uuid}/vda"
    until(lambda: all(mine in holders(agent, path) for path in (base, top)), f"{name} is known")
    return guest


def writing(agent: AgentProcess, libvirt: PrivateLibvirt, name: str, base: Path, **more: bool) -> Guest:
    """A guest that runs, and flushes what it writes."""
    guest = defined(agent, libvirt, name, base, **more)
    guest.start()
    guest.until_flushed(2)
    return guest


def pull(agent: AgentProcess, name: str = "web1", **spec: object) -> Json:
    job: Json = agent.post("/v1/jobs", {"operation": "pull", "target": f"{name}/vda", **spec})
    return job


def pulled(agent: AgentProcess) -> Json | None:
    """A slow pull of web1/vda; None while another job still has the domain."""
    try:
        return pull(agent, bandwidth=SLOW)
    except ApiError as error:
        assert error.code == "busy"
        return None


def can_open(libvirt: PrivateLibvirt, path: Path) -> bool:
    assert libvirt.user
    return user_can_read(path, libvirt.user)


def command(agent: AgentProcess, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "hostagent.cli.main", *words, "--socket", str(agent.socket)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def finding(agent: AgentProcess, name: str) -> Json:
    checks = json.loads(command(agent, "doctor", "--json").stdout)["checks"]
    found: Json = next(one for one in checks if one["name"] == name)
    return found


def test_the_base_is_its_owners_again_and_closed_and_the_guest_goes_on(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path
) -> None:
    guest = writing(agent, libvirt, "web1", base)
    assert (can_open(libvirt, base), owner(base) != ALICE) == (True, True)  # libvirt's doing
    job = agent.until_ended(pull(agent)["id"])
    assert (job["state"], job["revocation"]) == ("completed", "done")
    assert (job["chain"]["revoked"], job["chain"]["kept"]) == ([str(base)], [])
    assert (owner(base), can_open(libvirt, base)) == (ALICE, False)
    assert can_open(libvirt, guest.disk)
    guest.until_flushed(guest.flushed + 2)
    (grant,) = agent.get(f"/v1/grants?path={base}")["items"]
    assert (grant["access"], grant["state"]) == ("owner", "revoked")
    undone = command(agent, "grant", "undo", grant["id"])
    assert undone.returncode == 0, undone.stderr
    assert can_open(libvirt, base)
    guest.destroy()
    guest.verify()


@pytest.mark.parametrize("operation", ["copy", "commit"])
def test_what_a_guest_has_gone_over_from_is_its_owners_again(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, operation: str
) -> None:
    guest = defined(agent, libvirt, "web1", base)
    guest.start(paused=True)
    until(lambda: can_open(libvirt, base), "libvirt has given it")
    copy = base.with_name("copy.qcow2")
    spec = {"operation": operation, "target": "web1/vda", "completion": "pivot"}
    job = agent.post("/v1/jobs", {**spec, "dest": str(copy)} if operation == "copy" else spec)
    job = agent.until_ended(job["id"])
    assert job["state"] == "completed", job["error"]
    dropped, stays = ([guest.disk, base], copy) if operation == "copy" else ([guest.disk], base)
    assert (job["revocation"], job["chain"]["kept"]) == ("done", [])
    assert job["chain"]["revoked"] == [str(path) for path in dropped]
    assert not any(can_open(libvirt, path) for path in dropped)
    assert owner(guest.disk) in (
        ALICE,
        (0, 0),
    )  # libvirt has closed it itself, and does not always remember whose it was
    assert operation == "commit" or owner(base) == ALICE
    assert can_open(libvirt, stays)
    guest.destroy()
    guest.start(paused=True)
    assert can_open(libvirt, stays)


def test_the_base_of_a_pull_of_somebody_elses_is_given_back(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path
) -> None:
    guest = writing(agent, libvirt, "web1", base)
    with guest.domain() as domain:
        domain.blockPull("vda", 0)
    until(lambda: agent.get("/v1/jobs?origin=external")["items"], "it is seen")
    items = agent.get("/v1/jobs?origin=external")["items"]
    assert len(items) == 1, (items, agent.log.read_text()[-3000:])
    (job,) = items
    job = agent.until_ended(job["id"])
    assert (job["state"], job["revocation"], job["chain"]["revoked"]) == ("completed", "done", [str(base)]), job
    assert (owner(base), can_open(libvirt, base)) == (ALICE, False)
    guest.until_flushed(guest.flushed + 1)
    guest.destroy()
    guest.verify()


@pytest.mark.parametrize(("runs", "end"), [(True, "pull"), (False, "undefine"), (True, "undefine")])
def test_a_base_of_two_guests_is_kept_for_the_second_and_named(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, runs: bool, end: str
) -> None:
    writing(agent, libvirt, "web1", base)
    second = writing(agent, libvirt, "web2", base) if runs else defined(agent, libvirt, "web2", base)
    job = agent.until_ended(pull(agent)["id"])
    assert (job["state"], job["revocation"], job["chain"]["revoked"]) == ("completed", "kept", [])
    (kept,) = job["chain"]["kept"]
    assert (kept["path"], kept["holders"]) == (str(base), [f"domain:{second.uuid}/vda (web2/vda)"])
    assert (owner(base) != ALICE, can_open(libvirt, base)) == (True, True)
    if end == "pull":
        job = agent.until_ended(pull(agent, "web2")["id"])
        assert (job["revocation"], job["chain"]["revoked"]) == ("done", [str(base)])
        second.until_flushed(second.flushed + 1)
    else:
        if runs:
            second.until_flushed(second.flushed + 1)
        second.remove()
        until(lambda: owner(base) == ALICE, "the base is given back")
    assert (owner(base), can_open(libvirt, base)) == (ALICE, False)


@pytest.fixture
def unreadable(agent: AgentProcess, libvirt: PrivateLibvirt, tmp_path: Path) -> Callable[[], None]:
    """While there is a guest of which nobody can say what it needs, nothing is given back; this mends it."""
    place = tmp_path / "other"
    place.mkdir(mode=0o755)
    top = overlay(place / "top.qcow2", raw_image(place / "base.raw", MIB))
    whole = top.read_bytes()
    top.write_bytes(whole.replace(b"base.raw", b"nbd:x:10", 1))
    assert top.read_bytes() != whole
    libvirt.guest("odd", top)
    until(lambda: "odd" in domains_of(agent), "it is said")
    return lambda: top.write_bytes(whole) and None


@pytest.mark.parametrize("who", ["libvirtd", "agent"])
def test_who_dies_between_the_end_and_the_revocation_is_no_reason_to_forget_it(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, unreadable: Callable[[], None], who: str
) -> None:
    writing(agent, libvirt, "web1", base)
    said = finding(agent, "agent: domains")
    assert said["result"] == "warn" and "odd" in said["message"] and said["remedy"], said
    job = agent.until(pull(agent)["id"], lambda job: job["state"] == "completed")
    assert (job["revocation"], owner(base) != ALICE) == ("pending", True)
    (libvirt if who == "libvirtd" else agent).kill()
    unreadable()
    if who == "libvirtd":
        until(lambda: not agent.get("/v1/host")["libvirt"]["connected"], "the agent knows")
        assert (agent.job(job["id"])["revocation"], can_open(libvirt, base)) == ("pending", True)
        libvirt.start()
    else:
        agent.start()
    job = agent.until_ended(job["id"])
    assert (job["revocation"], job["chain"]["revoked"]) == ("done", [str(base)])
    assert (owner(base), can_open(libvirt, base)) == (ALICE, False)
    until(lambda: domains_of(agent).startswith("of 2"), "all are known")
    assert finding(agent, "agent: domains")["result"] == "ok"


def test_a_guest_that_starts_before_the_revocation_keeps_the_base(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, unreadable: Callable[[], None]
) -> None:
    writing(agent, libvirt, "web1", base)
    job = agent.until(pull(agent)["id"], lambda job: job["state"] == "completed")
    assert job["revocation"] == "pending"
    second = libvirt.guest("web2", overlay(base.parent / "web2.qcow2", base))
    second.start()
    unreadable()
    job = agent.until_ended(job["id"])
    (kept,) = job["chain"]["kept"]
    assert (kept["path"], kept["holders"]) == (str(base), [f"domain:{second.uuid}/vda (web2/vda)"])
    second.until_flushed(2)
    second.remove()
    until(lambda: owner(base) == ALICE, "the base is given back")


def test_a_pull_that_does_not_complete_takes_nothing(agent: AgentProcess, libvirt: PrivateLibvirt, base: Path) -> None:
    guest = writing(agent, libvirt, "web1", base)
    before = owner(base)
    for end in ("abort", "kill"):
        job = until(lambda: pulled(agent), "the domain is free")
        agent.until(job["id"], lambda job: job["state"] == "running" and job["cursor"]["cur"] > 0)
        if end == "abort":
            agent.post(f"/v1/jobs/{job['id']}/abort")
        else:
            guest.kill()
        job = agent.until_ended(job["id"])
        assert (job["state"], job["revocation"]) == ("aborted" if end == "abort" else "failed", "none")
        assert (owner(base), can_open(libvirt, base)) == (before, True)
        assert holders(agent, base) >= {f"{guest.uuid}/vda"}
    assert backing_of(guest.disk) == "base.raw"
    guest.start()
    guest.until_flushed(1)


def test_a_pull_that_was_lost_leaves_the_base_to_the_image_that_must_stand_on_it_again(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path
) -> None:
    guest = defined(agent, libvirt, "web1", base)
    guest.start(paused=True)  # it flushes nothing
    before, job = owner(base), pull(agent)
    until(lambda: backing_of(guest.disk) is None, "QEMU has rewritten the header")
    until(lambda: holders(agent, base) == {job["id"], str(guest.disk)}, "libvirt's chain has lost it")
    assert owner(base) == before
    guest.kill()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["revocation"]) == ("failed", "guest_stopped", "none")
    assert (owner(base), can_open(libvirt, base)) == (before, True)
    assert holders(agent, base) == {str(guest.disk)}


def test_files_that_libvirt_leaves_alone_are_given_and_taken_by_acl(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path
) -> None:
    guest = writing(agent, libvirt, "web1", base, relabel=False)  # it could not start without the grants
    assert (owner(base), owner(guest.disk), can_open(libvirt, base)) == (ALICE, ALICE, True)
    job = agent.until_ended(pull(agent)["id"])
    assert (job["state"], job["chain"]["revoked"]) == ("completed", [str(base)])
    assert (owner(base), can_open(libvirt, base), can_open(libvirt, guest.disk)) == (ALICE, False, True)
    guest.remove()
    until(lambda: not can_open(libvirt, guest.disk), "the top is taken back")
    assert owner(guest.disk) == ALICE


def test_a_guest_that_hangs_holds_up_no_other(agent: AgentProcess, libvirt: PrivateLibvirt, base: Path) -> None:
    hung = defined(agent, libvirt, "hung", raw_image(base.parent / "other.raw", MIB))
    hung.start(paused=True)
    writing(agent, libvirt, "web1", base)
    with hung.frozen():
        job = agent.until_ended(pull(agent)["id"])
    assert (job["revocation"], job["chain"]["revoked"], owner(base)) == ("done", [str(base)], ALICE)


VOLUMES = "<pool type='dir'><name>images</name><target><path>{}</path></target></pool>"


@pytest.fixture
def pool(libvirt: PrivateLibvirt, base: Path) -> Iterator[Path]:
    """The folder of the base as a storage pool that runs."""
    with libvirt.connection() as connection:
        found = connection.storagePoolDefineXML(VOLUMES.format(base.parent))
        found.create()
        yield base.parent
        if found.isActive():
            found.destroy()
        found.undefine()


def as_volume(libvirt: PrivateLibvirt, name: str, disk: Path, pool: str = "images") -> Guest:
    with libvirt.connection() as connection:
        connection.storagePoolLookupByName("images").refresh()
    return libvirt.guest(name, disk, pool=pool)


@pytest.mark.parametrize("runs", [True, False])
def test_a_guest_that_is_off_and_whose_disk_is_a_volume_keeps_its_base(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, pool: Path, runs: bool
) -> None:
    web1 = defined(agent, libvirt, "web1", base)
    second = as_volume(libvirt, "web2", overlay(pool / "web2.qcow2", base))
    if not runs:
        with libvirt.connection() as connection:
            connection.storagePoolLookupByName("images").destroy()
    mine = f"{second.uuid}/vda"
    until(lambda: mine in holders(agent, base), "its chain is held")
    web1.start(paused=True)
    job = pull(agent)
    until(lambda: backing_of(web1.disk) is None, "QEMU is done")
    web1.destroy()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["revocation"], job["chain"]["revoked"]) == ("completed", "kept", [])
    assert job["chain"]["kept"][0]["holders"] == [f"domain:{mine} (web2/vda)"]
    assert can_open(libvirt, base)
    second.remove()
    until(lambda: owner(base) == ALICE, "the base is given back")


def test_a_volume_of_a_pool_that_is_not_known_gives_nothing_back(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, pool: Path
) -> None:
    web1 = defined(agent, libvirt, "web1", base)
    second = as_volume(libvirt, "web2", overlay(pool / "web2.qcow2", base), pool="elsewhere")
    until(lambda: "elsewhere" in domains_of(agent), "it is said")
    web1.start(paused=True)
    until(lambda: can_open(libvirt, base), "libvirt has given it")
    job = pull(agent)
    until(lambda: backing_of(web1.disk) is None, "QEMU is done")
    web1.destroy()
    job = agent.until(job["id"], lambda job: job["state"] == "completed")
    assert (job["revocation"], can_open(libvirt, base)) == ("pending", True), job["chain"]["kept"]
    second.remove()
    job = agent.until_ended(job["id"])
    assert job["revocation"] == "done", job["chain"]["kept"]
    assert owner(base) == ALICE


def test_a_running_guest_whose_disk_is_a_volume_is_pulled_and_named(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, pool: Path
) -> None:
    guest = as_volume(libvirt, "web1", overlay(pool / "web1.qcow2", base))
    until(lambda: f"{guest.uuid}/vda" in holders(agent, base), "its chain is held")
    guest.start(paused=True)
    with pytest.raises(ApiError) as refused:
        agent.pull(guest.disk)
    assert refused.value.code == "busy" and "web1/vda" in str(refused.value.body["remedy"])
    job = pull(agent)
    until(lambda: backing_of(guest.disk) is None, "QEMU is done")
    guest.destroy()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["chain"]["revoked"], owner(base)) == ("completed", [str(base)], ALICE)


def test_a_raw_base_outside_the_pools_is_kept_and_holds_up_no_other(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, tmp_path: Path
) -> None:
    """Of the one it is known that it may be needed, and of all others that they are not."""
    far = tmp_path / "far"
    far.mkdir(mode=0o755)
    os.chown(elsewhere := raw_image(far / "base.raw", MIB), *ALICE)
    odd = libvirt.guest("odd", overlay(base.parent / "odd.qcow2", elsewhere))
    until(lambda: domains_of(agent).startswith("of 1"), "it is known what that needs")
    web1 = defined(agent, libvirt, "web1", base)
    with reachable(far):
        web2 = libvirt.guest("web2", overlay(far / "web2.qcow2", elsewhere))
        until(lambda: f"{web2.uuid}/vda" in holders(agent, elsewhere), "web2 is known")
        for guest, path in ((web1, base), (web2, elsewhere)):
            guest.start(paused=True)
            until(lambda path=path: can_open(libvirt, path), "libvirt has given it")  # type: ignore[misc]
            job = pull(agent, guest.name)
            until(lambda guest=guest: backing_of(guest.disk) is None, "QEMU is done")  # type: ignore[misc]
            guest.destroy()
            job = agent.until_ended(job["id"])
            if guest is web1:
                assert (job["revocation"], job["chain"]["revoked"], owner(base)) == ("done", [str(base)], ALICE)
            else:
                (kept,) = job["chain"]["kept"]
                assert kept["holders"] == [f"domain:{odd.uuid}/vda (odd/vda)"] and owner(elsewhere) != ALICE
        odd.remove()
        until(lambda: owner(elsewhere) == ALICE, "it is given back when that is gone, too")


def test_libvirt_follows_links_and_no_header_of_a_raw_base(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path
) -> None:
    """What the agent leans on where it says what a guest needs that is off."""
    forged = base.with_name("forged.raw")
    forged.write_bytes(overlay(base.with_name("inner.qcow2"), base).read_bytes())
    (link := base.with_name("link")).symlink_to(forged)
    guest = libvirt.guest("web1", overlay(base.with_name("web1.qcow2"), link))
    mine = f"{guest.uuid}/vda"
    until(lambda: mine in holders(agent, forged), "its chain is held")
    guest.start(paused=True)
    assert [os.path.realpath(path or "") for path in live_paths(guest)] == [str(guest.disk), str(forged)]
    until(lambda: can_open(libvirt, forged), "QEMU has it")
    assert mine not in holders(agent, base) and not can_open(libvirt, base)


def test_an_image_that_is_not_there_holds_up_no_other(
    agent: AgentProcess, libvirt: PrivateLibvirt, base: Path, tmp_path: Path
) -> None:
    libvirt.guest("gone", tmp_path / "away" / "gone.qcow2")
    guest = defined(agent, libvirt, "web1", base)
    guest.start(paused=True)
    until(lambda: can_open(libvirt, base), "libvirt has given it")
    job = pull(agent)
    until(lambda: backing_of(guest.disk) is None, "QEMU is done")
    guest.destroy()
    assert agent.until_ended(job["id"])["revocation"] == "done"
    assert owner(base) == ALICE
