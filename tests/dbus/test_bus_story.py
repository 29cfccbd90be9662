"""A minute in which everything happens to the bus, while jobs and exports come and go: no job notices, and when the bus
is at rest it shows what there is."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostagent.api.projection.message import BusError, Variant
from tests.dbus.bus import Caller, PrivateBus, until
from tests.dbus.conftest import SETTINGS, on_the_bus
from tests.harness import MIB, AgentProcess, Json, overlay, raw_image, reachable, same_content

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

SEED = os.environ.get("TEST_SEED") or str(random.SystemRandom().randrange(1 << 32))
SECONDS = 60
ROOT, MANAGER, JOB = "/org/hostagent1", "org.hostagent1.Manager", "org.hostagent1.Job"


class Story:
    def __init__(self, bus: PrivateBus, agent: AgentProcess, folder: Path) -> None:
        self.dice = random.Random(SEED)
        self.bus, self.agent, self.folder = bus, agent, folder
        self.base = raw_image(folder / "base.raw", 4 * MIB)
        self.jobs: dict[str, Path] = {}
        self.exports: list[str] = []
        self.frozen = False

    def image(self) -> Path:
        number = len(list(self.folder.iterdir()))
        own = self.folder / f"base{number}.raw"
        shutil.copy(self.base, own)
        own.chmod(0o600)
        return overlay(self.folder / f"{number}.qcow2", own)

    def begin(self) -> None:
        """Over REST, which is there in any case."""
        image = self.image()
        self.jobs[self.agent.pull(image, bandwidth=self.dice.choice([2, 8]) * MIB)["id"]] = image

    def begin_on_the_bus(self) -> None:
        if self.frozen or self.bus.process is None:
            return
        image = self.image()
        try:
            with Caller(self.bus.socket) as caller:
                options = {"bandwidth": Variant("t", 4 * MIB)}
                path = caller.call(ROOT, MANAGER, "StartJob", "ssa{sv}", "pull", str(image), options)
                self.jobs[caller.get(path, JOB, "Id")] = image
        except BusError as error:
            assert error.name in ("org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NoReply")

    def export(self) -> None:
        self.exports.append(self.agent.export(self.image())["id"])

    def stop(self) -> None:
        if self.exports:
            self.agent.delete(f"/v1/exports/{self.exports.pop()}")

    def kill(self) -> None:
        self.bus.kill()
        self.frozen = False

    def start(self) -> None:
        if self.bus.process is None:
            self.bus.start()

    def freeze(self) -> None:
        if self.bus.process is not None and not self.frozen:
            self.bus.freeze()
            self.frozen = True

    def thaw(self) -> None:
        if self.frozen:
            self.bus.thaw()
            self.frozen = False

    def rest(self) -> None:
        self.thaw()
        self.start()
        on_the_bus(self.agent)

    def shown(self) -> bool:
        """What is on the bus is what REST says."""
        with Caller(self.bus.socket) as caller:
            found = caller.managed()
        jobs = {one[JOB]["Id"]: (one[JOB]["State"], one[JOB]["Revision"]) for one in found.values() if JOB in one}
        truth = {job["id"]: (job["state"], job["revision"]) for job in self._jobs()}
        exports = {one["org.hostagent1.Export"]["Id"] for one in found.values() if "org.hostagent1.Export" in one}
        grants = {one["org.hostagent1.Grant"]["Id"] for one in found.values() if "org.hostagent1.Grant" in one}
        said = {grant["id"] for grant in self.agent.get("/v1/grants?limit=1000")["items"]}
        return jobs == truth and exports == set(self.exports) and grants == said

    def _jobs(self) -> list[Json]:
        found: list[Json] = self.agent.get("/v1/jobs?limit=1000")["items"]
        return found


def test_a_minute_of_it(tmp_path: Path) -> None:
    (home := tmp_path / "bus").mkdir()
    (images := tmp_path / "images").mkdir(mode=0o755)
    settings = {**SETTINGS, "DBUS_FINISHED_COUNT": "10000", "JOBS_WIDTH": "4"}
    with (
        reachable(images),
        PrivateBus(home) as bus,
        AgentProcess(tmp_path, {**settings, "DBUS_ADDRESS": bus.address}) as agent,
    ):
        story = Story(bus, agent, images)
        acts: list[Callable[[], None]] = [
            *(story.begin, story.begin, story.begin_on_the_bus, story.begin_on_the_bus, story.export, story.stop),
            *(story.kill, story.start, story.start, story.freeze, story.thaw, story.thaw, story.rest),
        ]
        print(f"TEST_SEED={SEED}")
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            story.dice.choice(acts)()
            time.sleep(story.dice.uniform(0, 0.5))
        for id, image in story.jobs.items():
            assert agent.until_ended(id)["state"] == "completed"
            assert same_content(image, story.base, running=True)
        story.rest()
        until(story.shown, "the bus shows what there is")
        print(
            f"{len(story.jobs)} jobs, {len(story.exports)} exports, {agent.log.read_text().count('on the bus')} times"
        )
        assert "Traceback" not in agent.log.read_text()
