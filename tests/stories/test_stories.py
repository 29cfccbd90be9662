"""Random jobs, exports, writes and kills on a tree of real images; after each, the files are what the model says.

`STORIES=600` tells stories for so many seconds, each round with a seed that it prints; `STORIES_SEED` repeats one.
Without them there is one short round, the same every time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.harness import AgentProcess, ApiError, Json, overlay, reachable
from tests.qemu.faults import HASTE, PATIENCE, eventually, send, storage_daemons
from tests.stories import checks
from tests.stories.model import CLUSTER, CLUSTERS, Image, Tree

pytestmark = pytest.mark.qemu

BANDWIDTH = 4 << 20
"""Bytes a second: a job takes half a second, so that what comes between does."""
IMAGES_MAX = 9
ENDED = ("completed", "failed", "aborted")
REFUSED = {"busy", "conflict", "invalid", "unsupported"}
BETWEEN = ("nothing", "nothing", "kill agent", "kill daemons", "abort", "pause")

number = st.integers(0, 99)
between = st.tuples(st.sampled_from(BETWEEN), st.floats(0, 0.6))


class Stories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="stories-"))
        self.folder = self.home / "images"
        self.folder.mkdir(mode=0o755)
        self._reach = reachable(self.folder)
        self._reach.__enter__()
        self.agent = AgentProcess(self.home, HASTE)
        self.agent.start()
        self.tree = Tree()
        self.exports: dict[str, Json] = {}
        self.jobs: dict[str, str] = {}
        self.names = 0
        below = self._base()
        for _ in range(3):  # a chain that commits may go down
            below = self._overlay(below)
        shared = self._base()
        for _ in range(2):
            self._overlay(shared)

    # Images

    def _base(self) -> Image:
        path = self._name("raw")
        view = [n % 7 + 1 + len(self.tree.images) * 10 for n in range(CLUSTERS)]
        path.write_bytes(checks.bytes_of(view))
        path.chmod(0o600)
        image = self.tree.images[path] = Image(path, "raw", None, view)
        return image

    def _overlay(self, backing: Image) -> Image:
        path = overlay(self._name("qcow2"), backing.path, backing.format)
        assert backing.view is not None
        view = list(backing.view)
        tag, begin = 100 + self.names, self.names * 5 % CLUSTERS
        command = f"write -q -P {tag} {begin * CLUSTER} {CLUSTER}"
        subprocess.run(["qemu-io", "-c", command, str(path)], check=True, timeout=PATIENCE)
        view[begin] = tag
        image = self.tree.images[path] = Image(path, "qcow2", backing.path, view)
        return image

    def _name(self, suffix: str) -> Path:
        self.names += 1
        return self.folder / f"image{self.names}.{suffix}"

    def _pick(self, index: int, *, overlays: bool = False) -> Image | None:
        known = [i for i in self.tree.images.values() if i.view is not None and (i.backing or not overlays)]
        return known[index % len(known)] if known else None

    @precondition(lambda self: len(self.tree.images) < IMAGES_MAX)
    @rule(index=number)
    def overlay_made(self, index: int) -> None:
        backing = self._pick(index)
        if backing and not self._written(backing.path):
            self._overlay(backing)

    # Exports

    def _written(self, path: Path) -> bool:
        return any(e["writable"] and path in self.tree.chain(Path(e["image"])) for e in self.exports.values())

    def _exported(self, path: Path) -> bool:
        return any(path in self.tree.chain(Path(export["image"])) for export in self.exports.values())

    @precondition(lambda self: len(self.exports) < 3)
    @rule(index=number, writable=st.booleans())
    def export_started(self, index: int, writable: bool) -> None:
        image = self._pick(index)
        if image is None:
            return
        excused = self._exported(image.path) or any(map(self._written, self.tree.chain(image.path)))
        forbidden = writable and (self.tree.dependents(image.path) or self._exported(image.path))
        try:
            export = self.agent.export(image.path, format=image.format, writable=writable)
        except ApiError as error:
            assert error.code in REFUSED and (forbidden or excused), (image, error)
            return
        self.exports[export["id"]] = export
        assert not forbidden, (image, export)

    @precondition(lambda self: self.exports)
    @rule(index=number, cluster=st.integers(0, CLUSTERS - 1), tag=st.integers(0, 255))
    def guest_writes(self, index: int, cluster: int, tag: int) -> None:
        writable = [export for export in self.exports.values() if export["writable"]]
        if writable:
            export = writable[index % len(writable)]
            checks.write_export(export["uri"], cluster, tag)
            view = self.tree.images[Path(export["image"])].view
            if view is not None:
                view[cluster] = tag

    @precondition(lambda self: self.exports)
    @rule(index=number)
    def export_stopped(self, index: int) -> None:
        name = list(self.exports)[index % len(self.exports)]
        eventually(lambda: not self.agent.get(f"/v1/exports/{name}")["clients"])
        self.agent.delete(f"/v1/exports/{name}")
        del self.exports[name]

    # Kills

    @rule()
    def agent_killed(self) -> None:
        self.agent.kill()
        self.agent.start()

    @precondition(lambda self: self.exports)
    @rule()
    def daemons_killed(self) -> None:
        self._kill_daemons()

    def _kill_daemons(self) -> None:
        send(signal.SIGKILL, *storage_daemons(self.agent))

    # Jobs

    @rule(index=number, base=number, steps=st.booleans(), between=between)
    def pulled(self, index: int, base: int, steps: bool, between: tuple[str, float]) -> None:
        image = self._pick(index, overlays=True)
        if image is None:
            return
        choices = [None, *self.tree.chain(image.path)[2:]]
        stop = choices[base % len(choices)]
        spec: Json = {"operation": "pull", "base": str(stop) if stop else None}
        spec["increment"] = 10 * CLUSTER if steps else None
        job = self._work(image, spec, between)
        if job and job["state"] == "completed":
            self.tree.pulled(image.path, stop)

    @precondition(lambda self: len(self.tree.images) < IMAGES_MAX)
    @rule(index=number, shallow=st.booleans(), completion=st.sampled_from(["pivot", "finish"]), between=between)
    def copied(self, index: int, shallow: bool, completion: str, between: tuple[str, float]) -> None:
        image = self._pick(index)
        if image is None:
            return
        shallow = shallow and image.backing is not None
        dest = self._name(image.format)
        spec = {"operation": "copy", "dest": str(dest), "completion": completion, "source_format": image.format}
        job = self._work(image, {**spec, "shallow": shallow}, between)
        if job and job["state"] == "completed":
            self.tree.copied(image.path, dest, shallow=shallow)
        else:
            assert not dest.exists(), job

    @rule(
        index=number,
        kind=st.sampled_from(["pivot", "finish", "below"]),
        base=number,
        delete=st.booleans(),
        between=between,
    )
    def committed(self, index: int, kind: str, base: int, delete: bool, between: tuple[str, float]) -> None:
        image = self._pick(index, overlays=True)
        if image is None:
            return
        chain = self.tree.chain(image.path)
        upper = chain[1] if kind == "below" else image.path
        choices = chain[chain.index(upper) + 1 :]
        if not choices or self.tree.images[upper].view is None:
            return
        low = choices[base % len(choices)]
        dropped = [] if kind == "finish" else [upper, *self.tree.between(upper, low)]
        spec: Json = {"operation": "commit", "base": str(low)}
        spec |= {"top": str(upper)} if kind == "below" else {"completion": kind}
        delete = delete and bool(dropped)
        inside = set(chain)
        changed = [*self.tree.between(upper, low), low, *([upper] if kind != "finish" else [])]
        others = [p for path in changed for p in self.tree.dependents(path) if p not in inside]
        job = self._work(image, {**spec, "delete": delete or None}, between)
        assert not (job and others), (job, others)
        if job and job["state"] == "completed":
            self.tree.committed(upper, low)
            if kind == "below":
                self.tree.pulled(image.path, low)
            assert [path for path in dropped if path.exists()] == ([] if delete else dropped), job
            for path in dropped:
                path.unlink(missing_ok=True)
            self._follow()
            self.tree.forget(dropped)
        elif job:
            self.tree.torn(upper, low)

    def _work(self, image: Image, spec: Json, between: tuple[str, float]) -> Json | None:
        """The job when it has ended, None when it was refused, for which there must be a reason."""
        name = str(uuid.uuid4())
        body = {key: value for key, value in spec.items() if value is not None}
        body |= {"id": name, "target": str(image.path), "bandwidth": BANDWIDTH}
        try:
            self.agent.post("/v1/jobs", body)
        except ApiError as error:
            chain = self.tree.chain(image.path)
            shared = any(self._exported(path) or len(self.tree.dependents(path)) > 1 for path in chain)
            assert error.code in REFUSED and (shared or self.tree.dependents(image.path)), (body, error, error.body)
            note(f"refused: {error}")
            return None
        what, delay = between
        time.sleep(delay)
        self._interfere(what, name)
        job = self._until_ended(name, spec.get("completion") or "pivot")
        self.jobs[name] = job["state"]
        lawful = {"completed"} | ({"failed"} if what == "kill daemons" else {"aborted"} if what == "abort" else set())
        assert job["state"] in lawful, (what, job)
        (self.tree.keeps.discard if job["state"] == "completed" else self.tree.keeps.add)(image.path)
        if spec["operation"] == "copy":
            self._follow()
        return job

    def _interfere(self, what: str, name: str) -> None:
        if what == "kill agent":
            self.agent.kill()
            self.agent.start()
        elif what == "kill daemons":
            self._kill_daemons()
        elif what in ("abort", "pause"):
            try:
                self.agent.post(f"/v1/jobs/{name}/{what}")
            except ApiError as error:
                assert error.code == "conflict", error

    def _until_ended(self, name: str, completion: str) -> Json:
        asks: dict[str, tuple[str, Any]] = {
            "paused": ("resume", None),
            "waiting": ("next", None),
            "ready": ("complete", {"completion": completion}),
        }
        deadline = time.monotonic() + 2 * PATIENCE
        while time.monotonic() < deadline:
            job = self.agent.job(name)
            if job["state"] in ENDED and job["revocation"] != "pending":
                return job
            if job["state"] in asks:
                what, body = asks[job["state"]]
                try:
                    self.agent.post(f"/v1/jobs/{name}/{what}", body)
                except ApiError as error:
                    assert error.code in ("conflict", "busy"), error
            time.sleep(0.02)
        raise AssertionError(f"the job stays {self.agent.job(name)}")

    def _follow(self) -> None:
        """A pivot takes exports along, and a killed storage daemon ends them."""
        gone = eventually(self._daemons_known)
        assert gone, "a dead storage daemon is not noticed"
        for name in list(self.exports):
            export = self.agent.get(f"/v1/exports/{name}")
            if export["state"] == "running":
                self.exports[name] = export
            else:
                assert export["state"] == "lost", export
                del self.exports[name]

    def _daemons_known(self) -> bool:
        alive = set(storage_daemons(self.agent))
        exports = [self.agent.get(f"/v1/exports/{name}") for name in self.exports]
        return all(export["pid"] in alive for export in exports if export["state"] == "running")

    # Judgement

    @invariant()
    def the_files_are_what_the_model_says(self) -> None:
        self._follow()
        checks.check_images(self.tree, self.exports, self.home / "read.raw")
        checks.check_access(self.agent, self.tree, self.exports)

    def teardown(self) -> None:
        try:
            for name in self.exports:
                eventually(lambda name=name: not self.agent.get(f"/v1/exports/{name}")["clients"])
                self.agent.delete(f"/v1/exports/{name}")
            self.exports = {}
            checks.check_nothing_left(self.agent, self.folder)
            checks.check_images(self.tree, {}, self.home / "read.raw")
            checks.check_events(self.agent, self.jobs)
        finally:
            self.agent.close()
            self._reach.__exit__(None, None, None)
            shutil.rmtree(self.home, ignore_errors=True)


def tell(seeded: int | None = None, **limits: Any) -> None:
    phases = (Phase.generate,)  # a real agent repeats no race well enough to make an example smaller
    health = list(HealthCheck)
    story: Any = type("Story", (Stories,), {})
    if seeded is not None:
        story = seed(seeded)(story)
    run_state_machine_as_test(
        story, settings=settings(database=None, deadline=None, phases=phases, suppress_health_check=health, **limits)
    )


def test_a_told_story_has_every_job_do_its_work() -> None:
    """Generated stories may be refused much; this one must not be."""
    story: Any = Stories()
    ends = []
    try:
        story.export_started(index=3, writable=True)
        story.guest_writes(index=0, cluster=3, tag=77)
        story.the_files_are_what_the_model_says()
        story.export_stopped(index=0)
        work = story._work

        def noted(*args: Any) -> Any:
            job = work(*args)
            ends.append((args[1]["operation"], job and job["state"]))
            return job

        story._work = noted
        story.copied(index=3, shallow=False, completion="finish", between=("kill agent", 0.1))
        story.the_files_are_what_the_model_says()
        story.committed(index=2, kind="below", base=0, delete=False, between=("nothing", 0))
        story.the_files_are_what_the_model_says()
        story.committed(index=1, kind="pivot", base=0, delete=True, between=("kill agent", 0.1))
        story.the_files_are_what_the_model_says()
        story.pulled(index=0, base=0, steps=True, between=("kill agent", 0.1))
        story.the_files_are_what_the_model_says()
    finally:
        story.teardown()
    assert ends == [("copy", "completed"), ("commit", "completed"), ("commit", "completed"), ("pull", "completed")]


@pytest.mark.slow
def test_a_short_story() -> None:
    tell(derandomize=True, max_examples=2, stateful_step_count=8)


@pytest.mark.slow
@pytest.mark.skipif("STORIES" not in os.environ, reason="STORIES says for how many seconds: make test-full")
def test_stories_for_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    given = os.environ.get("STORIES_SEED")
    deadline = time.monotonic() + float(os.environ["STORIES"])
    while time.monotonic() < deadline:
        chosen = int(given or random.SystemRandom().randrange(1 << 32))
        with capsys.disabled():
            print(f"\nstories: STORIES=1 STORIES_SEED={chosen} pytest tests/stories -k for_a_time", flush=True)
        tell(seeded=chosen, max_examples=3, stateful_step_count=25)
