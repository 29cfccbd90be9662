"""Agent, libvirtd and QEMU are killed at random moments of jobs on a running guest's disk, and nothing is lost or left.

A job whose guest lives completes; or it fails, where what proves it may have gone with who was killed, and completes
when it is started again. One whose QEMU was killed failed, or had completed: all that the guest flushed is there, in one
of two files where it was just going over. TEST_SEED repeats the moments of a run that failed, TEST_ROUND one of them alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.harness import MIB, AgentProcess, ApiError, Json
from tests.libvirt import holds
from tests.libvirt.booted import Booted
from tests.libvirt.holds import COMPLETED, End
from tests.libvirt.jobs import block_job, live_paths
from tests.libvirt.live import Cell
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.works import WORKS, Scene, Work
from tests.qemu.kills import SEED, Client, Moment, noted

VICTIMS = ("agent", "libvirtd", "qemu", "agent+libvirtd")
ONLY = os.environ.get("TEST_ROUND")
UNDECIDED = ("gone over", "has lost it", "may not be what the guest's QEMU writes")
"""Of a disk that was just going over: one of two files has all."""
STILL_NAMED = "libvirt still names"
BANDWIDTH = 24 * MIB
"""Bytes a second: a job takes some 1.5 s, and the moments are spread over that and what comes before and after."""


@pytest.fixture
def agent(module_agent: AgentProcess, libvirt: PrivateLibvirt) -> AgentProcess:
    if module_agent.process is None:
        module_agent.start()
    connected(module_agent)
    return module_agent


def connected(agent: AgentProcess) -> None:
    until(lambda: agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")


@pytest.mark.slow
@pytest.mark.parametrize("work", WORKS, ids=str)
def test_nothing_is_lost_whenever_something_is_killed(
    agent: AgentProcess, libvirt: PrivateLibvirt, booted: Booted, folder: Path, work: Work
) -> None:
    rounds(agent, libvirt, booted, folder, work, [int(ONLY)] if ONLY else range(20))


def rounds(
    agent: AgentProcess, libvirt: PrivateLibvirt, booted: Booted, folder: Path, work: Work, numbers: Iterable[int]
) -> None:
    print(f"TEST_SEED={SEED}")
    for number in numbers:
        dice = random.Random(f"{SEED} {work} {number}")
        moment, victim = Moment.chosen(dice), dice.choice(VICTIMS)
        with noted(agent, f"{work}, round {number}, {victim} killed {moment}"):
            scene = Scene(folder / f"round{number}", work)
            cell = Cell(agent, libvirt, booted, scene)
            with stated(cell):
                Round(agent, libvirt, cell, victim, dice).play(moment)
        libvirt.remove_guests()
        scene.remove()


@contextlib.contextmanager
def stated(cell: Cell) -> Iterator[None]:
    """A failure says how the disk stands."""
    try:
        yield
    except BaseException as error:
        if cell.guest.runs:
            error.add_note(f"QEMU's job {block_job(cell.guest)}, libvirt's chain {live_paths(cell.guest)}")
        error.add_note(f"headers {cell.scene.headers(cell.scene.before)}")
        raise


class Round:
    """`victim` is killed at a moment of the cell's job, and started again if it is no guest."""

    def __init__(
        self, agent: AgentProcess, libvirt: PrivateLibvirt, cell: Cell, victim: str, dice: random.Random
    ) -> None:
        self.agent, self.libvirt, self.cell, self.victim, self._dice = agent, libvirt, cell, victim, dice

    def play(self, moment: Moment) -> None:
        cell = self.cell
        cell.flushed = cell.guest.flushed
        client = Client(self.agent, self._request())
        moment.wait(lambda: self._ending(client))
        self._kill()
        with self.libvirt.kept_running():
            cell.job = self._settled(client)
            self._judge()

    def _judge(self) -> None:
        cell = self.cell
        if cell.job and any(words in str(cell.job["error"]) for words in UNDECIDED):
            assert self.victim == "qemu" or "libvirtd" in self.victim
            if cell.guest.runs:
                cell.guest.destroy()
            lost = cell.guest.kill_what_is_lost()
            holds.gone_over_or_not(cell, cell.job)
            holds.nothing_left(cell, but=[cell.scene.copy] if lost else [])  # libvirt never gave that back
            return
        if cell.job and any(STILL_NAMED in warning for warning in cell.job["warnings"]):
            assert "libvirtd" in self.victim and cell.work.completion == "pivot"
            self._named_anew()
            return
        if cell.job:
            self._ended(cell.job)
        if cell.guest.runs and (not cell.job or cell.job["state"] == "failed"):
            self._again()
            cell.completes()
        if not cell.guest.runs:
            cell.guest.kill_what_is_lost()
        cell.close()

    def _again(self) -> None:
        """Begun anew. What a libvirtd that was killed has left in QEMU may be in the way of the first try."""
        for _ in range(3):
            self.cell.begin()
            job = self.cell.until("running", "ready", "failed")
            if "Duplicate nodes" not in str(job["error"]):
                return

    def _named_anew(self) -> None:
        """The guest stands on the result, which libvirt has not written down. When it has, as the warning says, what the
        chain has lost is closed."""
        cell, after = self.cell, self.cell.scene.after
        assert live_paths(cell.guest) == after
        cell.guest.stand_on(Path(after[0]))
        for path in cell.scene.dropped:
            until(lambda path=path: not cell.can_open(path), f"{path} is closed")
        holds.written(cell, after)
        holds.nothing_left(cell)

    def _request(self) -> Json:
        completion = {"completion": self.cell.work.completion} if self.cell.work.completion else {}
        return self.cell.scene.request(bandwidth=BANDWIDTH, **completion)

    def _ending(self, client: Client) -> bool:
        """Whether the job's end was asked for, or seen."""
        with contextlib.suppress(ApiError, OSError):
            return self.agent.job(client.request["id"])["state"] in ("completing", "completed", "failed")
        return False

    def _kill(self) -> None:
        kills = {"agent": self.agent.kill, "libvirtd": self.libvirt.kill, "qemu": self.cell.kill}
        starts = {"agent": self.agent.start, "libvirtd": self.libvirt.start}
        for work in (kills, starts):
            victims = self.victim.split("+")
            self._dice.shuffle(victims)
            for victim in victims:
                if victim in work:
                    work[victim]()
        if self.victim == "qemu":
            until(lambda: not self.cell.guest.runs, "libvirt knows that it ended")
        connected(self.agent)

    def _settled(self, client: Client) -> Json:
        """The job at its end; nothing where it was never heard of. One that was not acknowledged is not there, or is
        whole: asked for again, it is the one."""
        client.join()
        try:
            self.agent.get(f"/v1/jobs/{client.request['id']}")
        except ApiError as error:
            assert error.status == 404 and not client.acknowledged, "an acknowledged job is lost"
            if self.victim == "qemu":
                return {}
        job = self.agent.post("/v1/jobs", client.request)
        assert job["id"] == client.request["id"]
        return client.drive()

    def _ended(self, job: Json) -> None:
        """It completed, or it says why it could not: that its guest ended, that libvirt was not there when it was to
        begin, or that nobody was there to hear QEMU's last word, which alone proves it."""
        if job["state"] == "completed":
            self.cell.ends(COMPLETED)
            return
        allowed = {"qemu": {"guest_stopped", "conflict", "not_found"}, "agent": set[str]()}.get(
            self.victim, {"unavailable"}
        )
        if "libvirtd" in self.victim or (self.victim == "agent" and self.cell.work.completion == "finish"):
            allowed |= {"job_failed"}  # the request to begin may have died with libvirtd
        assert job["error"]["code"] in allowed, job
        remedy = job["error"]["message"].partition("before it is used: ")[2]
        if remedy:
            subprocess.run(shlex.split(remedy), check=True, capture_output=True, timeout=60)
        self.cell.ends(End("failed", job["error"]["code"]))
