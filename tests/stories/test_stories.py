"""Random jobs, exports, writes and kills on a tree of real images; after each, the files are what the model says.

`STORIES=600` tells stories for so many seconds, each round with a seed that it prints; `STORIES_SEED` repeats one.
Without them there is one short round, the same every time. At the end stands what was done how often: a long run that
was refused too much, or did too little, fails, because it is no evidence.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.harness import Json
from tests.stories.copies import end_waiting, start_waiting
from tests.stories.rules import Stories
from tests.stories.stage import Between
from tests.stories.tally import Tally

pytestmark = pytest.mark.qemu

LONG = 300.0
"""Seconds from which on a run must be evidence."""


def tell(tally: Tally, seeded: int | None = None, **limits: Any) -> None:
    phases = (Phase.generate,)  # a real agent repeats no race well enough to make an example smaller
    health = list(HealthCheck)
    story: Any = type("Story", (Stories,), {"tally": tally, "salt": seeded})
    if seeded is not None:
        story = seed(seeded)(story)
    chosen = settings(database=None, deadline=None, phases=phases, suppress_health_check=health, **limits)
    try:
        run_state_machine_as_test(story, settings=chosen)
    except BaseException:
        if story.failure is not None:  # hypothesis speaks of a test that does not fail twice in one way
            raise story.failure from None
        raise


def test_a_told_story_has_every_job_do_its_work() -> None:
    """Generated stories may be refused something; this one must not be."""
    story = Stories()
    stage, tree = story.stage, story.tree
    work = stage.work
    first, second, top = (image.path for image in list(tree.images.values())[1:4])

    def does(kind: str, between: Between, **body: Any) -> Json:
        request = {"target": str(top), **{key: str(value) for key, value in body.items()}}
        jobs = work(kind, "/v1/jobs", request, None, between)
        assert jobs is not None
        return jobs[0]

    killed = Between("kill agent", 0.1)
    try:
        export = stage.asked("export", None, "/v1/exports", {"image": str(top), "writable": True})
        assert export is not None
        stage.exports[export["id"]] = export
        story.guest_writes(random.Random(1))
        story.the_files_are_what_the_model_says()
        story.stop(export["id"])
        copied = stage.name("qcow2")
        does("copy", killed, operation="copy", dest=copied, source_format="qcow2", completion="finish")
        tree.copied(top, copied, shallow=False, format="qcow2")
        story.the_files_are_what_the_model_says()
        does("commit below", Between(), operation="commit", top=second, base=first)
        tree.committed(second, first)
        tree.pulled(top, first)
        tree.forget([second])
        story.the_files_are_what_the_model_says()
        start_waiting(stage, random.Random(1), tree.images[top])
        story.the_files_are_what_the_model_says()
        end_waiting(stage, random.Random(1))
        story.the_files_are_what_the_model_says()
        does("pull", killed, operation="pull")
        tree.pulled(top, None)
        story.the_files_are_what_the_model_says()
    finally:
        story.teardown()


@pytest.mark.slow
def test_a_short_story() -> None:
    tally = Tally()
    tell(tally, derandomize=True, max_examples=2, stateful_step_count=10)
    assert tally.facts["looks at everything"] > 4, tally.table()


@pytest.mark.slow
@pytest.mark.skipif("STORIES" not in os.environ, reason="STORIES says for how many seconds: make test-full")
def test_stories_for_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    given, seconds = os.environ.get("STORIES_SEED"), float(os.environ["STORIES"])
    deadline, tally = time.monotonic() + seconds, Tally()
    try:
        while time.monotonic() < deadline:
            chosen = int(given or random.SystemRandom().randrange(1 << 32))
            with capsys.disabled():
                print(f"\nstories: STORIES=1 STORIES_SEED={chosen} pytest tests/stories -k for_a_time", flush=True)
            tell(tally, seeded=chosen, max_examples=3, stateful_step_count=30)
    finally:
        with capsys.disabled():
            print(f"\n{tally.table()}", flush=True)
    if given is None and seconds >= LONG:
        assert (lacks := tally.shortcomings(seconds)) == [], f"no evidence: {lacks}"
