"""What may happen in generated stories: each asks for something whose end the model foresees, and tells the model of it.

Hypothesis gives each step one number, the seed of all that is chosen in it. The choice itself depends on the state of
the story, which races make another one when it is told again, and hypothesis insists on the same questions in the same
order. Each story has likings of its own, so that some are all commits, and others all exports.
"""

from __future__ import annotations

import contextlib
import random
import sys
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.harness import ApiError, Json
from tests.qemu.faults import PATIENCE, eventually
from tests.stories import checks
from tests.stories.bitmaps import handle_bitmap, read_bitmap
from tests.stories.commits import commit
from tests.stories.copies import copy, copy_group, end_waiting, start_waiting
from tests.stories.foresight import choose
from tests.stories.model import CLUSTER, CLUSTERS
from tests.stories.refusals import REFUSALS
from tests.stories.stage import Between, Stage
from tests.stories.tally import Tally

IMAGES_MAX = 10
EXPORTS_MAX = 3
HAPPENINGS = {
    "overlay_made": 3,
    "export_started": 4,
    "guest_writes": 3,
    "export_stopped": 2,
    "killed": 1,
    "pulled": 5,
    "copied": 5,
    "group_copied": 3,
    "copy_waits": 3,
    "committed": 8,
    "job_deleted": 1,
    "bitmap": 6,
    "refused": 3,
    "drained": 1,
}
"""How often each happens beside the others."""


class Stories(RuleBasedStateMachine):
    tally = Tally()
    salt = 0
    failure: BaseException | None = None
    """What ended the story: no race comes again because hypothesis asks for it."""

    def __init__(self) -> None:
        super().__init__()
        if self.failure is not None:
            raise self.failure
        self.steps = 0
        self.likings = HAPPENINGS
        self.stage = Stage(self.tally)
        self.tree = self.stage.tree
        self.agent = self.stage.agent
        below = self.stage.base()
        for _ in range(3):  # a chain that commits may go down
            below = self.stage.overlay(below)
        shared = self.stage.base()
        for _ in range(2):
            self.stage.overlay(shared)

    @rule(number=st.integers(0, 2**32 - 1))
    def something_happens(self, number: int) -> None:
        dice = random.Random(f"{self.salt} {self.steps} {number}")
        if not self.steps:
            self.likings = {name: often * dice.choice([1, 1, 2, 4]) for name, often in HAPPENINGS.items()}
        self.steps += 1
        (name,) = dice.choices(list(self.likings), list(self.likings.values()))
        getattr(self, name)(dice)

    def make_room(self, dice: random.Random) -> None:
        """Delete images that nobody stands on and nobody uses, those without a meaning first."""
        foresight = self.stage.foresight
        while len(self.tree.images) >= IMAGES_MAX:
            free = [path for path in self.tree.leaves() if not foresight.used(path)]
            torn = [path for path in free if self.tree.images[path].view is None]
            if not free:
                return
            chosen = dice.choice(torn or free)
            self.stage.tell("deleted:", chosen.name)
            chosen.unlink()
            self.tree.forget([chosen])

    # Images and exports

    def overlay_made(self, dice: random.Random) -> None:
        self.make_room(dice)
        images = [image for image in self.tree.usable() if not self.stage.foresight.written(image.path)]
        if images and len(self.tree.images) < IMAGES_MAX:
            tops = [image for image in images if image.path in self.tree.leaves() and image.backing]
            image = self.stage.overlay(dice.choice(tops if tops and dice.random() < 0.6 else images))
            self.stage.tell("overlay:", image.path.name, "on", image.backing)

    def export_started(self, dice: random.Random) -> None:
        writable = dice.random() < 0.4
        if len(self.stage.exports) >= EXPORTS_MAX or not self.tree.usable():
            return
        foresight = self.stage.foresight
        foreseen = foresight.write if writable else foresight.read
        image, fate = choose(dice, self.tree.usable(), lambda image: foreseen(image.path))
        names = [name for name, bitmap in image.bitmaps.items() if bitmap.broken is False]
        bitmaps = names[:1] if names and not writable and dice.random() < 0.5 else []
        kind = "writable export" if writable else "export with a bitmap" if bitmaps else "export"
        self.stage.tell(kind, image.path.name, fate)
        body = {"image": str(image.path), "format": image.format, "writable": writable, "bitmaps": bitmaps}
        excused = writable and foresight.excused(image.path)
        export = self.stage.asked(kind, fate, "/v1/exports", body, excused=excused)
        if export:
            self.stage.exports[export["id"]] = export
            self.tally.count(kind, "completed")
        if export and writable:
            self.guest_writes(dice)

    def guest_writes(self, dice: random.Random) -> None:
        writable = [export for export in self.stage.exports.values() if export["writable"]]
        for _ in range(dice.randint(1, 3) if writable else 0):
            export, cluster, tag = dice.choice(writable), dice.randrange(CLUSTERS), dice.randrange(256)
            self.stage.tell("write:", export["path"], cluster, tag)
            checks.write_export(export["uri"], cluster, tag)
            self.tree.written(Path(export["path"]), cluster, tag)
            self.tally.count("guest write", "completed")

    def export_stopped(self, dice: random.Random) -> None:
        if self.stage.exports:
            self.stop(dice.choice(list(self.stage.exports)))

    def stop(self, name: str) -> None:
        self.stage.tell("stop:", self.stage.exports[name]["path"])
        assert eventually(lambda: not self.agent.get(f"/v1/exports/{name}")["clients"])
        self.agent.delete(f"/v1/exports/{name}")
        del self.stage.exports[name]

    def killed(self, dice: random.Random) -> None:
        what = dice.choice(["agent", "daemons", "both"])
        self.stage.tell("kill:", what)
        if what == "agent":
            self.stage.kill_agent()
        else:
            self.stage.kill_daemons(agent=what == "both")

    # Jobs

    def pulled(self, dice: random.Random) -> None:
        steps = dice.random() < 0.5
        images = self.tree.usable(overlays=True)
        if not images:
            return
        foresight = self.stage.foresight
        image, fate = choose(dice, images, lambda image: foresight.pull(image.path))
        stop = dice.choice([None, *self.tree.chain(image.path)[2:]])
        body: Json = {"operation": "pull", "target": str(image.path)} | ({"base": str(stop)} if stop else {})
        body |= {"increment": dice.choice([3, 10]) * CLUSTER} if steps else {}
        between = Between.chosen(dice)
        jobs = self.stage.work("pull by steps" if steps else "pull", "/v1/jobs", body, fate, between)
        if jobs is not None:
            self.tree.pulling(image.path)
            if between.kills_daemons:
                self.tree.doubted(image.path)
            if jobs[0]["state"] == "completed":
                self.tree.pulled(image.path, stop)

    def copied(self, dice: random.Random) -> None:
        self.make_room(dice)
        if self.tree.usable():
            foresight = self.stage.foresight
            image, fate = choose(dice, self.tree.usable(), lambda image: foresight.copy(image.path))
            copy(self.stage, dice, image, fate)

    def group_copied(self, dice: random.Random) -> None:
        self.make_room(dice)
        images = [image for image in self.tree.usable() if self.stage.foresight.copy(image.path) is None]
        if len(images) > 1:
            copy_group(self.stage, dice, dice.sample(images, 2))

    def copy_waits(self, dice: random.Random) -> None:
        if self.stage.waiting:
            end_waiting(self.stage, dice)
            return
        self.make_room(dice)
        images = [image for image in self.tree.usable() if self.stage.foresight.copy(image.path) is None]
        if images:
            start_waiting(self.stage, dice, dice.choice(images))

    def committed(self, dice: random.Random) -> None:
        commit(self.stage, dice)

    def job_deleted(self, dice: random.Random) -> None:
        known = [job["id"] for job in self.agent.get("/v1/jobs?limit=1000")["items"] if job["id"] in self.stage.jobs]
        if known:
            name = dice.choice(known)
            self.stage.tell("delete:", name)
            self.agent.delete(f"/v1/jobs/{name}")
            with contextlib.suppress(ApiError):
                raise AssertionError(f"there is still {self.agent.job(name)}")
            self.tally.count("job delete", "completed")

    def bitmap(self, dice: random.Random) -> None:
        handle_bitmap(self.stage, dice)

    # Refusals

    def refused(self, dice: random.Random, kind: str | None = None) -> None:
        """What no state of the images makes right."""
        kind = kind or dice.choice(sorted(REFUSALS))
        chosen = REFUSALS[kind](self.stage, dice)
        if chosen is not None:
            method, path, body, code = chosen
            self.stage.tell("refusal:", kind, body)
            status, _, answer = self.agent.call(method, path, body)
            assert status >= 400 and answer["code"] == code, (kind, body, code, answer)
            self.tally.count("refused on purpose", code)

    def drained(self, dice: random.Random) -> None:
        self.agent.post("/v1/host/drain")
        if dice.random() < 0.3:
            self.stage.kill_agent()
        self.refused(dice, "draining")
        self.agent.delete("/v1/host/drain")
        self.tally.count("drain", "completed")

    # Judgement

    @invariant()
    def the_files_are_what_the_model_says(self) -> None:
        stage = self.stage
        stage.follow()
        self._end_of_those_that_wait()
        written = [Path(export["path"]) for export in stage.exports.values() if export["writable"]]
        checks.check_images(self.tree, stage.exports, stage.home / "read.raw", stage.seen)
        checks.check_bitmaps(self.agent, self.tree, written)
        waiting = {name: Path(body["target"]) for name, body in stage.waiting.items()}
        checks.check_access(self.agent, self.tree, stage.exports, waiting)
        self.tally.facts["looks at everything"] += 1

    def _end_of_those_that_wait(self) -> None:
        """A copy whose storage daemon was killed has failed; every other one goes on waiting."""
        for name, body in list(self.stage.waiting.items()):
            served = [daemon["image"] for daemon in self.agent.get("/v1/host")["storage_daemons"]]
            ends = ("ready", "failed") if body["target"] in served else ("failed",)
            job = self.agent.until(name, lambda job, ends=ends: job["state"] in ends, 2 * PATIENCE)
            if job["state"] == "failed":
                job = self.agent.until_ended(name)
                assert job["error"]["code"] == "storage_daemon_died", job
                self.stage.judge("copy that waits", [job], None, Between("kill daemons"))
                del self.stage.waiting[name]
                assert not Path(body["dest"]).exists(), job

    def teardown(self) -> None:
        try:
            if (error := sys.exc_info()[1]) is None:
                self._close()
            else:
                type(self).failure = error
                log = self.agent.log.read_text()[-6000:]
                print("the story was:", *self.stage.story, "the agent's log ends:", log, sep="\n", flush=True)
        finally:
            self.stage.close()

    def _close(self) -> None:
        for name in list(self.stage.exports):
            self.stop(name)
        for name in list(self.stage.waiting):
            self.agent.post(f"/v1/jobs/{name}/abort")
            self.stage.judge("copy that waits", [self.agent.until_ended(name)], None, Between("abort"))
            del self.stage.waiting[name]
        checks.check_nothing_left(self.agent, self.stage.folder)
        self.stage.seen.clear()
        self.the_files_are_what_the_model_says()
        checks.check_events(self.agent, self.stage.jobs)
        for image in self.tree.images.values():
            for name in image.bitmaps:
                read_bitmap(self.stage, image, name, None)
        checks.check_nothing_left(self.agent, self.stage.folder)
