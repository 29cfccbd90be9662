"""Block jobs that somebody else starts on guests' disks: shown, followed to what the chain proves, and let be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json, backing_of, reachable, same_content
from tests.libvirt.guest import Guest
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.test_guest_pull import (
    SLOW,
    Disk,
    abort,
    block_job,
    command,
    error_of,
    index_of,
    pull,
    running,
    speed_up,
)
from tests.qemu.faults import HASTE


@pytest.fixture(scope="module")
def module_agent(tmp_path_factory: pytest.TempPathFactory, daemon: PrivateLibvirt) -> Iterator[AgentProcess]:
    home = tmp_path_factory.mktemp("agent")
    settings = {
        **HASTE,
        "JOBS_WIDTH": "1",
        "LIBVIRT_AGREE_TIMEOUT": "1",
        "LIBVIRT_URI": daemon.uri,
        "LIBVIRT_RECONNECT_WAIT": "0.1",
        "LIBVIRT_RECONNECT_WAIT_MAX": "0.5",
    }
    with reachable(home), AgentProcess(home, settings) as process:
        yield process


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    return module_agent


@pytest.fixture
def chain(folder: Path) -> Disk:
    return Disk(folder)


@pytest.fixture
def paused(libvirt: PrivateLibvirt, agent: AgentProcess, chain: Disk) -> Guest:
    guest = libvirt.guest("web1", chain.top)
    guest.start(paused=True)
    return guest


def theirs(guest: Guest, speed: int = SLOW, base: str | None = None) -> None:
    """Somebody's pull: `virsh blockpull`."""
    with guest.domain() as domain:
        if base is None:
            domain.blockPull("vda", speed, 64)
        else:
            domain.blockRebase("vda", base, speed, 64)


def external(agent: AgentProcess, state: str = "running", target: str = "web1/vda") -> list[Json]:
    found: list[Json] = agent.get(f"/v1/jobs?origin=external&state={state}")["items"]
    return [job for job in found if job["target"] == target]


def found(agent: AgentProcess, target: str = "web1/vda") -> Json:
    job: Json = until(lambda: external(agent, target=target), "it is found")[0]
    return job


def kinds(agent: AgentProcess, job: Json) -> list[str]:
    events = [event for event in agent.events() if event["data"].get("job") == job["id"]]
    assert {event["data"]["origin"] for event in events} == {"external"}
    return [event["type"].split(".")[-2] for event in events if not event["type"].endswith(".progress.v1")]


def test_a_pull_of_somebody_elses_is_shown_and_followed(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    theirs(paused)
    job = found(agent)
    assert (job["operation"], job["origin"], job["domain"], job["disk"]) == ("pull", "external", "web1", "vda")
    assert job["bandwidth"] == SLOW and job["path"] == str(chain.top)
    moved = agent.until(job["id"], lambda job: job["cursor"]["cur"] > 0)
    assert moved["cursor"]["end"] == 16 * MIB
    name = "hostagent_block_job_cursor_bytes{"
    series = [line for line in agent.get("/metrics").splitlines() if line.startswith(name)]
    assert len(series) == 1 and 'domain="web1"' in series[0] and 'target_device="vda"' in series[0]
    assert block_job(paused)["bandwidth"] == SLOW
    speed_up(paused)
    until(lambda: backing_of(chain.top) is None and block_job(paused) is None, "QEMU is done")
    assert agent.job(job["id"])["state"] == "running", "its data are in QEMU's memory only"
    paused.destroy()
    job = agent.until_ended(job["id"])
    assert job["state"] == "completed"
    assert job["chain"]["before"] == [str(chain.top), str(chain.middle), str(chain.base)]
    assert job["chain"]["after"] == [str(chain.top)]
    assert set(job["chain"]["revoked"]) == {str(chain.middle), str(chain.base)}
    assert kinds(agent, job) == ["started", "completed"]
    assert chain.whole()


def test_a_pull_to_a_base_leaves_what_is_below(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    theirs(paused, base=f"vda[{index_of(paused, chain.base)}]")
    job = found(agent)
    speed_up(paused)
    until(lambda: block_job(paused) is None, "QEMU is done")
    paused.destroy()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["chain"]["after"]) == ("completed", [str(chain.top), str(chain.base)])
    assert job["chain"]["revoked"] == [str(chain.middle)]
    assert chain.whole()


def test_nothing_is_done_to_it_and_ours_is_told_of_it(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    theirs(paused)
    job = found(agent)
    for verb in ("abort", "pause"):
        with pytest.raises(ApiError) as refused:
            agent.post(f"/v1/jobs/{job['id']}/{verb}")
        assert refused.value.body["code"] == "conflict"
        assert "virsh blockjob web1 vda --abort" in refused.value.body["remedy"]
    with pytest.raises(ApiError):
        agent.patch(f"/v1/jobs/{job['id']}", {"bandwidth": 0})
    assert block_job(paused)["bandwidth"] == SLOW
    busy = error_of(agent)
    assert busy["code"] == "busy" and job["id"] in busy["detail"]
    abort(paused)
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["revocation"]) == ("aborted", "cancelled", "none")
    assert job["chain"]["after"] == job["chain"]["before"]
    assert kinds(agent, job) == ["started", "cancelled"]
    paused.destroy()
    assert backing_of(chain.top) == "middle.qcow2" and chain.whole()


def test_ours_that_waits_for_a_slot_is_told_of_it_when_it_begins(
    agent: AgentProcess, libvirt: PrivateLibvirt, chain: Disk, paused: Guest, folder: Path
) -> None:
    (folder / "web2").mkdir(mode=0o755)
    other = libvirt.guest("web2", Disk(folder / "web2").top)
    other.start(paused=True)
    first = agent.until(pull(agent, "web2/vda", bandwidth=SLOW)["id"], lambda job: job["state"] == "running")
    ours = pull(agent)
    assert ours["state"] == "queued"
    theirs(paused)
    job = found(agent)
    agent.post(f"/v1/jobs/{first['id']}/abort")
    ours = agent.until_ended(ours["id"])
    assert (ours["state"], ours["error"]["code"]) == ("failed", "busy") and job["id"] in ours["error"]["message"]
    assert block_job(paused)["bandwidth"] == SLOW and agent.job(job["id"])["state"] == "running"


def test_a_pull_that_came_after_ours_while_the_agent_was_away_is_theirs(
    agent: AgentProcess, chain: Disk, paused: Guest
) -> None:
    ours = running(agent, pull(agent, base=str(chain.base), bandwidth=SLOW // 16), least=0)
    agent.kill()
    speed_up(paused)
    until(lambda: block_job(paused) is None, "ours is done")
    theirs(paused)
    agent.start()
    agent.post(f"/v1/jobs/{ours['id']}/abort")
    ours = agent.until_ended(ours["id"])
    assert ours["state"] == "aborted", "what it has pulled is in QEMU's memory only"
    job = found(agent)
    assert (block_job(paused) or {})["bandwidth"] == SLOW and job["path"] == str(chain.top)
    speed_up(paused)
    until(lambda: block_job(paused) is None, "theirs is done")
    paused.destroy()
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert chain.whole()


def test_what_became_of_it_while_the_agent_was_away_is_told_by_the_chain(
    agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path
) -> None:
    guests, jobs = [], []
    for name in ("web1", "web2", "web3"):
        (folder / name).mkdir(mode=0o755)
        disk = Disk(folder / name)
        guest = libvirt.guest(name, disk.top)
        guest.start(paused=True)
        guests.append((guest, disk))
        theirs(guest)
        jobs.append(found(agent, f"{name}/vda"))
    agent.kill()
    speed_up(guests[0][0])
    abort(guests[1][0])
    until(lambda: not any(block_job(guest) for guest, _ in guests[:2]), "two have ended")
    guests[0][0].destroy()
    agent.start()
    done, ended = (agent.until_ended(job["id"]) for job in jobs[:2])
    assert (done["state"], done["chain"]["after"]) == ("completed", [str(guests[0][1].top)])
    assert (ended["state"], ended["chain"]["after"]) == ("failed", ended["chain"]["before"])
    again = agent.until(jobs[2]["id"], lambda job: job["state"] == "running")
    assert again["origin"] == "external" and len(external(agent, target="web3/vda")) == 1
    abort(guests[2][0])
    assert agent.until_ended(jobs[2]["id"])["state"] == "aborted"
    for guest, disk in guests:
        if guest.name != "web1":
            guest.destroy()
        assert disk.whole()


def test_libvirtd_killed_under_it(agent: AgentProcess, libvirt: PrivateLibvirt, chain: Disk, paused: Guest) -> None:
    theirs(paused)
    job = found(agent)
    libvirt.kill()
    agent.until(job["id"], lambda job: job["state"] == "unknown")
    libvirt.start()
    agent.until(job["id"], lambda job: job["state"] == "running")
    abort(paused)
    assert agent.until_ended(job["id"])["state"] == "aborted"
    assert len(kinds(agent, job)) == 2


@pytest.mark.parametrize("how", ["destroy", "kill"])
def test_a_guest_that_ends_under_it(agent: AgentProcess, chain: Disk, paused: Guest, how: str) -> None:
    theirs(paused)
    job = found(agent)
    getattr(paused, how)()
    job = agent.until_ended(job["id"])
    assert (job["state"], job["error"]["code"], job["revocation"]) == ("failed", "guest_stopped", "none")
    assert kinds(agent, job) == ["started", "failed"]
    assert backing_of(chain.top) == "middle.qcow2" and chain.whole()


def test_a_commit_of_the_top_completes_with_its_pivot(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    with paused.domain() as domain:
        domain.blockCommit("vda", None, None, 0, libvirt_flags("BLOCK_COMMIT_ACTIVE"))
    job = found_in(agent, "ready")
    assert job["operation"] == "commit"
    pivot(paused)
    job = agent.until_ended(job["id"])
    assert (job["state"], job["chain"]["after"]) == ("completed", [str(chain.base)])
    assert set(job["chain"]["revoked"]) == {str(chain.top), str(chain.middle)}
    assert kinds(agent, job) == ["started", "ready", "completed"]
    paused.destroy()
    assert same_content(chain.base, chain.truth, first="raw")


@pytest.mark.parametrize("end", ["pivot", "abort"])
def test_a_copy_completes_with_its_pivot_and_no_other_way(
    agent: AgentProcess, chain: Disk, paused: Guest, folder: Path, end: str
) -> None:
    target = folder / "copy.qcow2"
    xml = f"<disk type='file'><source file='{target}'/><driver type='qcow2'/></disk>"
    with paused.domain() as domain:
        domain.blockCopy("vda", xml, {}, libvirt_flags("BLOCK_COPY_TRANSIENT_JOB"))
    job = found_in(agent, "ready")
    assert job["operation"] == "copy"
    if end == "pivot":
        pivot(paused)
        job = agent.until_ended(job["id"])
        assert (job["state"], job["chain"]["after"]) == ("completed", [str(target)])
        assert set(job["chain"]["revoked"]) == {str(chain.top), str(chain.middle), str(chain.base)}
        paused.destroy()
        assert same_content(target, chain.truth, first="qcow2")
    else:
        abort(paused)
        job = agent.until_ended(job["id"])
        assert (job["state"], job["chain"]["after"]) == ("aborted", job["chain"]["before"])
        paused.destroy()
    assert chain.whole()


def test_one_that_is_over_before_a_look_is_known_by_its_event(
    tmp_path_factory: pytest.TempPathFactory, libvirt: PrivateLibvirt, chain: Disk
) -> None:
    guest = libvirt.guest("web1", chain.top)
    home = tmp_path_factory.mktemp("seldom")
    settings = {**HASTE, "LIBVIRT_URI": libvirt.uri, "LIBVIRT_SAMPLE": "600"}
    with reachable(home), AgentProcess(home, settings) as agent:
        until(lambda: agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
        guest.start(paused=True)
        until(lambda: agent.get("/metrics").count('call="describe",result="ok"'), "it has seen the guest")
        theirs(guest, 0)
        job = until(lambda: agent.get("/v1/jobs?origin=external")["items"], "it is found")[0]
        guest.destroy()
        job = agent.until_ended(job["id"])
        assert (job["state"], job["chain"]["after"]) == ("completed", [str(chain.top)]), job["error"]
        assert kinds(agent, job) == ["started", "completed"]
        assert len(agent.get("/v1/jobs")["items"]) == 1
    assert chain.whole()


def test_a_disk_with_a_job_on_it_is_not_detached(agent: AgentProcess, paused: Guest) -> None:
    import libvirt

    theirs(paused)
    job = found(agent)
    xml = "<disk type='file' device='disk'><target dev='vda' bus='virtio'/></disk>"
    with paused.domain() as domain, pytest.raises(libvirt.libvirtError, match="active block job"):
        domain.detachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    agent.until(job["id"], lambda now: now["cursor"]["cur"] > job["cursor"]["cur"])
    command_list = command(agent, "job", "list", "--origin", "external", "--state", "running").stdout
    assert job["id"] in command_list and "pull (external)" in command_list
    refused = command(agent, "job", "abort", job["id"])
    assert refused.returncode == 6 and "virsh blockjob web1 vda --abort" in refused.stderr


def test_ours_is_never_taken_for_somebody_elses(agent: AgentProcess, chain: Disk, paused: Guest) -> None:
    before = len(agent.get("/v1/jobs?origin=external")["items"])
    for _ in range(3):
        job = agent.until(pull(agent, bandwidth=SLOW)["id"], lambda job: job["state"] == "running")
        agent.post(f"/v1/jobs/{job['id']}/abort")
        agent.until_ended(job["id"])
    job = pull(agent)
    until(lambda: backing_of(chain.top) is None and block_job(paused) is None, "QEMU is done")
    paused.destroy()
    assert agent.until_ended(job["id"])["state"] == "completed"
    assert len(agent.get("/v1/jobs?origin=external")["items"]) == before


def found_in(agent: AgentProcess, state: str) -> Json:
    job: Json = until(lambda: external(agent, state), f"it is {state}")[0]
    return job


def pivot(guest: Guest) -> None:
    with guest.domain() as domain:
        domain.blockJobAbort("vda", libvirt_flags("BLOCK_JOB_ABORT_PIVOT"))


def libvirt_flags(name: str) -> int:
    import libvirt

    return int(getattr(libvirt, f"VIR_DOMAIN_{name}"))
