"""Where the figures are measured: a folder, agents in it, fresh images, and jobs followed by long poll."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.harness import AgentProcess, Json, overlay

JOB_WAIT = 120.0  # seconds until a job must have ended; the longest takes a few
POLL = 30  # seconds of one long poll, below the agent's api.wait_limit


@dataclass(frozen=True, slots=True)
class Stage:
    """`runs` None is each figure's own number. `say` shows progress to a person."""

    folder: Path
    runs: int | None
    say: Callable[[str], None]

    def count(self, usual: int) -> int:
        return usual if self.runs is None else self.runs

    @contextlib.contextmanager
    def agent(self, settings: Mapping[str, str] | None = None) -> Iterator[AgentProcess]:
        """An agent with the settings that it ships with, but for `settings`; a second one has the state of the first."""
        folder = self.folder / "agent"
        folder.mkdir(exist_ok=True)
        with AgentProcess(folder, settings) as agent:
            yield agent

    @contextlib.contextmanager
    def filled_overlay(self, base: Path, data: Path) -> Iterator[Path]:
        """A new overlay of `base` that holds all that the raw image `data` has."""
        with self.overlay(base, "filled.qcow2") as path:
            command = ["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", str(data), str(path)]
            subprocess.run(command, check=True)
            os.sync()
            yield path

    @contextlib.contextmanager
    def overlay(self, base: Path, name: str = "overlay.qcow2") -> Iterator[Path]:
        """A new overlay of `base`, on a disk that has nothing left to write from the run before."""
        path = overlay(self.folder / name, base)
        os.sync()
        try:
            yield path
        finally:
            path.unlink()


def done(agent: AgentProcess, request: Json) -> Json:
    """A job from its request until it is completed and its access settled."""
    job = until(agent, agent.post("/v1/jobs", request), settled)
    if job["state"] != "completed":
        raise AssertionError(f"{request} is {job['state']}: {job['error']}")
    return job


def pull(agent: AgentProcess, target: Path, **spec: int | str) -> Json:
    """A pull from the request until it is completed and its revocation done, as a client sees it by long poll."""
    return done(agent, {"operation": "pull", "target": str(target), **spec})


def settled(job: Json) -> bool:
    return job["state"] in ("completed", "failed", "aborted") and job["revocation"] != "pending"


def until(agent: AgentProcess, job: Json, done: Callable[[Json], bool]) -> Json:
    deadline = time.monotonic() + JOB_WAIT
    while not done(job):
        if time.monotonic() > deadline:
            raise AssertionError(f"job {job['id']} stays {job['state']}")
        path, known = f"/v1/jobs/{job['id']}?wait={POLL}", {"If-None-Match": f'"{job["revision"]}"'}
        status, _, found = agent.call("GET", path, headers=known, timeout=POLL + 10)
        if status == 200:
            job = found
        elif status != 304:
            raise AssertionError(f"{path}: {status} {found}")
    return job


def alternate(number: int, *runs: Callable[[], None]) -> None:
    """Each of `runs` once, beginning with another one each time: no peer always comes first."""
    first = number % len(runs)
    for run in runs[first:] + runs[:first]:
        run()
