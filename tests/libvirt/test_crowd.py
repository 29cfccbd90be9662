"""Fifty guests with jobs at once: no end is missed, and one QEMU that hangs delays nobody else. Minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.bench.figure import percentile
from tests.bench.process import cpu_seconds
from tests.harness import AgentProcess, Json, backing_of, reachable, same_content
from tests.libvirt.crowd import crowd, pull_all
from tests.libvirt.guest import Guest
from tests.libvirt.private import PrivateLibvirt, until
from tests.libvirt.test_guest_pull import abort, block_job, terminal_events

pytestmark = pytest.mark.slow

GUESTS = 50
SCRAPES = 200
PATIENCE = 240.0


@pytest.fixture
def agent(tmp_path_factory: pytest.TempPathFactory, libvirt: PrivateLibvirt) -> Iterator[AgentProcess]:
    """With the settings that it ships with, but for the number of jobs at a time."""
    home = tmp_path_factory.mktemp("agent")
    settings = {"LIBVIRT_URI": libvirt.uri, "JOBS_WIDTH": str(2 * GUESTS)}
    with reachable(home), AgentProcess(home, settings) as process:
        until(lambda: process.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
        yield process


def test_fifty_guests_with_jobs_at_once(
    agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path, record_property: Callable[[str, object], None]
) -> None:
    def say(name: str, value: float) -> None:
        record_property(name, value)
        print(f"{name}: {value:.3f}")

    with crowd(libvirt, folder, GUESTS) as guests:
        jobs = pull_all(agent, guests)
        say("agent_cpu_percent", cpu_percent(agent, 10.0))
        with guests[0].frozen():
            say("scrape_p99_ms", scrape_p99(agent))
            began = time.monotonic()
            others = list(zip(guests, jobs, strict=True))[1:]
            end_all(others)
            for _, job in others:
                ended = agent.until_ended(job["id"])
                assert ended["state"] in ("completed", "failed"), ended
            say("others_settled_s", time.monotonic() - began)
            assert agent.job(jobs[0]["id"])["state"] in ("running", "unknown")
            say("scrape_p99_ms_after", scrape_p99(agent))
        agent.until(jobs[0]["id"], lambda job: job["state"] == "running", timeout=PATIENCE)
        abort(guests[0])
        assert agent.until_ended(jobs[0]["id"])["state"] == "failed"
        for job in jobs:
            assert len(terminal_events(agent, job)) == 1
        for number, (guest, job) in enumerate(others):
            completed = agent.job(job["id"])["state"] == "completed"
            assert completed == (number % 2 == 0) == (backing_of(guest.disk) is None)
        assert same_content(others[0][0].disk, folder / "base.raw", first="qcow2")


def end_all(pairs: list[tuple[Guest, Json]]) -> None:
    """One half completes, the other is aborted by somebody, all at about the same time."""

    def end(number: int, guest: Guest) -> None:
        if number % 2:
            abort(guest)
            return
        with guest.domain() as domain:
            domain.blockJobSetSpeed("vda", 0)
        until(lambda: block_job(guest) is None, f"{guest.name} is done", PATIENCE)
        guest.destroy()

    with ThreadPoolExecutor(8) as pool:
        for ended in [pool.submit(end, number, guest) for number, (guest, _) in enumerate(pairs)]:
            ended.result(PATIENCE)


def cpu_percent(agent: AgentProcess, seconds: float) -> float:
    """Of one processor, over so many seconds."""
    assert agent.process is not None
    before, began = cpu_seconds(agent.process.pid), time.monotonic()
    time.sleep(seconds)
    return 100 * (cpu_seconds(agent.process.pid) - before) / (time.monotonic() - began)


def scrape_p99(agent: AgentProcess) -> float:
    """Milliseconds, as a scraper sees them."""
    found = []
    for _ in range(SCRAPES):
        began = time.perf_counter()
        assert "hostagent_block_jobs" in agent.get("/metrics")
        found.append(1000 * (time.perf_counter() - began))
    return percentile(found, 99)
