"""One job on a running guest's disk, from its begin to the one check of all that it may have left (holds.py).

cell = Cell(agent, libvirt, booted, scene)
cell.begin()
cell.midway()
…                                # what happens to it
cell.completes()                 # or: cell.ends(STOPPED)
cell.close()
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.harness import MIB, AgentProcess, ApiError, Json, user_can_read
from tests.libvirt import holds
from tests.libvirt.booted import Booted
from tests.libvirt.guest import Guest
from tests.libvirt.holds import COMPLETED, End
from tests.libvirt.jobs import block_job
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.works import SLOW, Scene

PAUSED, FOR_IO_ERROR = 3, 5
"""VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_IOERROR"""


class Cell:
    """`guest` is web1, which writes all the time. `flushed` is what it had flushed when the job's end was asked for,
    `killed` whether its QEMU was, and `others` are guests beside it."""

    def __init__(self, agent: AgentProcess, libvirt: PrivateLibvirt, booted: Booted, scene: Scene) -> None:
        self.agent, self.scene, self.work = agent, scene, scene.work
        self.flushed = 0
        self.killed = False
        self.others: list[Guest] = []
        self.job: Json = {}
        self._libvirt, self._booted = libvirt, booted
        self.guest = self._running("web1", scene.top, scene.before)

    def neighbour(self, disk: Path, base: Path) -> Guest:
        """A second guest, on a disk that stands on that base."""
        guest = self._running("web2", disk, [str(disk), str(base)])
        self.others.append(guest)
        return guest

    def _running(self, name: str, disk: Path, chain: list[str]) -> Guest:
        """It is seen whose its files are, before libvirt makes them QEMU's own."""
        guest = self._booted.define(name, disk)
        mine = f"{guest.uuid}/vda"
        until(lambda: all(mine in self.holders(path) for path in chain), f"{name} is known")
        self._booted.wake(guest)
        guest.until_flushed(1)
        return guest

    # The job

    def begin(self, **more: object) -> Json:
        self.job = self.agent.post("/v1/jobs", self.scene.request(bandwidth=SLOW, **more))
        return self.job

    def midway(self) -> None:
        """It has done something, and is not done; and the guest has written meanwhile."""
        self.until("running")
        least = 16 * MIB if self.work.mirrors else 1
        until(lambda: (block_job(self.guest) or {"cur": 0})["cur"] >= least, "QEMU is at it")
        self.guest.until_flushed(self.guest.flushed + 2)
        assert block_job(self.guest) is not None

    def until(self, *states: str) -> Json:
        return self.agent.until(self.job["id"], lambda job: job["state"] in states)

    def speed(self, bandwidth: int) -> None:
        self.agent.patch(f"/v1/jobs/{self.job['id']}", {"bandwidth": bandwidth})

    def ask(self, verb: str, **body: object) -> None:
        self.agent.post(f"/v1/jobs/{self.job['id']}/{verb}", body)

    def ready(self) -> None:
        self.speed(0)
        self.until("ready")

    def finish(self) -> None:
        """Bring it to its end, as its user does."""
        if self.work.mirrors:
            self.ready()
            self.flushed = self.guest.until_flushed(self.guest.flushed + 2)
            self.ask("complete", completion=self.work.completion)
            return
        self.speed(0)
        while self.work.increment:
            job = self.until("waiting", "completed", "failed", "aborted")
            if job["state"] != "waiting":
                return
            self.ask("next", cursor=job["cursor"]["cur"])

    def completes(self) -> Json:
        self.finish()
        return self.ends(COMPLETED)

    def fails(self) -> Json:
        """It meets what is in its way."""
        try:
            self.speed(0)
        except ApiError as error:
            assert error.code == "conflict", error  # it has ended
        while (job := self.until("failed", "completed", "waiting"))["state"] == "waiting":
            self.ask("next", cursor=job["cursor"]["cur"])
        return job

    def ends(self, end: End) -> Json:
        """It does so, and all that must hold then does; where the guest lives it goes on."""
        job = self.agent.until_ended(self.job["id"])
        holds.after(self, job, end)
        return job

    def close(self) -> None:
        """The guest ends, and is undefined; then nothing is left of anything."""
        job = self.agent.job(self.job["id"]) if self.job else None
        holds.in_the_end(self, self.scene.after if job and job["state"] == "completed" else self.scene.before)

    def give_up(self) -> None:
        """What a test that failed has left is not the next one's."""
        for job in self.agent.get("/v1/jobs")["items"]:
            if job["finished"] is None:
                with contextlib.suppress(ApiError):
                    self.agent.post(f"/v1/jobs/{job['id']}/abort")
                self.agent.until_ended(job["id"])
        self.scene.remove()

    # Its guest

    def kill(self) -> None:
        self.killed = True
        self.guest.kill()

    def resume(self) -> None:
        """Where a request of the guest's has failed, it tries that again."""
        with self.guest.domain() as domain:
            if domain.state() == [PAUSED, FOR_IO_ERROR]:
                domain.resume()

    # Access

    def holders(self, path: Path | str) -> set[str]:
        """Who needs the file, once all was done for that."""
        items = self.agent.get(f"/v1/grants?path={path}")["items"]
        return {item["holder"]["id"] for item in items if item["holder"]["id"] and item["state"] != "pending"}

    def can_open(self, path: Path) -> bool:
        assert self._libvirt.user
        return user_can_read(path, self._libvirt.user)
