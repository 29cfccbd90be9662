"""`hostagent job copy` of several disks: one group, whose copies complete together or not at all.

As with a single job, the id is chosen here, and under `--wait` Ctrl-C and `--timeout` abort: one abort ends them all.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from collections.abc import Callable, Sequence

from hostagent.cli import arguments, follow, job_report, progress
from hostagent.cli.client import Client, CliError, Json, once, patient, quoted
from hostagent.cli.terminal import Terminal, remark
from hostagent.errors import EXIT_INTERRUPTED, EXIT_JOB_FAILED, EXIT_OK, EXIT_TIMEOUT

OF_EACH = ("target", "dest", "format", "source_format")
GROUPS = "/v1/groups"


def work(args: argparse.Namespace, request: Json) -> int:
    """`request` is that of a copy of the first disk alone."""
    body = {key: value for key, value in request.items() if key not in (*OF_EACH, "operation")}
    each = {key: value for key, value in request.items() if key in OF_EACH}
    others = [{**each, "target": target, "dest": dest} for target, dest in args.more]
    body["disks"] = [each, *others]
    client, terminal = arguments.connect(args), Terminal.of(args)
    if args.dry_run:
        return _dry_run(client, terminal, body)
    body["id"] = args.id or str(uuid.uuid4())
    if args.wait:
        return _wait(client, terminal, body, args)
    group = _start(client, body)
    if terminal.json:
        terminal.data(group)
    else:
        terminal.line(f"group {group['id']}")
        for job in group["jobs"]:
            terminal.line(f"job {job['id']} {job['state']}")
    return EXIT_OK


def unless_one(client: Client, some_id: str, ask: Callable[[], Json]) -> Json | None:
    """What `ask` says of the job with this id; None where the id is a group's."""
    try:
        return ask()
    except CliError as error:
        if error.code != "not_found":
            raise
        try:
            client.get(_address(some_id))
        except CliError:
            raise error from None
        return None


def show(client: Client, args: argparse.Namespace) -> int:
    """Everything that is known of its jobs."""
    group, terminal = _group(client, args.id), Terminal.of(args)
    if terminal.json:
        terminal.data(group)
        return EXIT_OK
    for job in group["jobs"]:
        job_report.whole(terminal, job)
    return EXIT_OK


def watch(client: Client, args: argparse.Namespace) -> int:
    """Until all its jobs have ended; it aborts none."""
    terminal = Terminal.of(args)
    with progress.shown(args.progress, terminal) as display:
        group = _to_the_end(client, _group(client, args.id), display, None, _terminal)
    return _ended(args, terminal, group, None)


def abort(client: Client, args: argparse.Namespace, body: Json) -> int:
    """One abort ends all; by force each that goes on, for each has a storage daemon of its own."""
    jobs, terminal = _group(client, args.id)["jobs"], Terminal.of(args)
    going = [job for job in jobs if not _terminal(job)] or jobs
    for job in going if args.force else going[:1]:
        client.post(f"{follow.address_of(job)}/abort", body)
    group = _group(client, args.id)
    if terminal.json:
        terminal.data(group)
        return EXIT_OK
    for job in group["jobs"]:
        terminal.line(f"job {job['id']} {job['state']}", str(job["state"]))
    return EXIT_OK


def _address(group_id: str) -> str:
    return f"{GROUPS}/{quoted(group_id)}"


def _start(client: Client, body: Json) -> Json:
    return once(lambda: client.post(GROUPS, body))


def _dry_run(client: Client, terminal: Terminal, body: Json) -> int:
    plan = client.post(GROUPS, {**body, "dry_run": True})
    if terminal.json:
        terminal.data(plan)
    else:
        for disk in plan["disks"]:
            job_report.plan(terminal, disk, kept_by="--finish")
        job_report.total(terminal, plan["disks"])
    return EXIT_OK


def _wait(client: Client, terminal: Terminal, body: Json, args: argparse.Namespace) -> int:
    deadline = time.monotonic() + args.timeout if args.timeout else None
    ended_by = None
    with progress.shown(args.progress, terminal) as display:
        try:
            group = _to_the_end(client, _start(client, body), display, deadline, _at_rest)
        except follow.TimeIsUp:
            remark(f"{args.timeout:g} s are over: aborting group {body['id']}")
            ended_by = EXIT_TIMEOUT
        except KeyboardInterrupt:
            remark(f"interrupted: aborting group {body['id']} (once more to leave it alone)")
            ended_by = EXIT_INTERRUPTED
        if ended_by is not None:
            aborted = _abort(client, body["id"], display)
            if aborted is None:
                return ended_by
            group = aborted
    return _ended(args, terminal, group, ended_by)


def _abort(client: Client, group_id: str, display: follow.Display) -> Json | None:
    """The group as it ended; None if it had not been started yet."""
    try:
        group = _group(client, group_id)
    except CliError as error:
        if error.code != "not_found":
            raise
        remark(f"the agent knows no group {group_id}")
        return None
    try:
        for job in [job for job in group["jobs"] if job["state"] not in follow.TERMINAL][:1]:
            follow.abort_to_the_end(client, job, display)
        return _to_the_end(client, _group(client, group_id), display, time.monotonic() + follow.ABORT_WAIT, _terminal)
    except follow.TimeIsUp:
        remark("not all have ended yet; `hostagent job abort --force ID` ends a storage daemon")
        return _group(client, group_id)


def _ended(args: argparse.Namespace, terminal: Terminal, group: Json, ended_by: int | None) -> int:
    """Show the outcomes, and say them as one exit status. A group that completed before its abort is a success."""
    if terminal.json:
        terminal.data(group)
    elif args.progress == "json":
        print(json.dumps(group))
    else:
        for job in group["jobs"]:
            job_report.outcome(terminal, job)
    if ended_by == EXIT_INTERRUPTED:
        return EXIT_INTERRUPTED
    if all(job["state"] in ("completed", "ready") for job in group["jobs"]):
        return EXIT_OK
    return ended_by or EXIT_JOB_FAILED


def _to_the_end(
    client: Client, group: Json, display: follow.Display, deadline: float | None, done: Callable[[Json], bool]
) -> Json:
    """The group when all its jobs are `done`, and their revocations through, or a little later if they are pending."""
    display.update(_sum(group["jobs"], group["id"]))
    while left := [job for job in group["jobs"] if not done(job)]:
        if deadline is not None and time.monotonic() >= deadline:
            raise follow.TimeIsUp(left[0])
        follow.next_reading(client, left[0], display, follow.Limits(deadline=deadline))
        group = _group(client, group["id"])
        display.update(_sum(group["jobs"], group["id"]))
    jobs = [follow.until_revoked(client, job, progress.Silence()) for job in group["jobs"]]
    return {**group, "jobs": jobs}


def _group(client: Client, group_id: str) -> Json:
    found: Json = patient(lambda: client.get(_address(group_id)).data)
    return found


def _terminal(job: Json) -> bool:
    return job["state"] in follow.TERMINAL


def _at_rest(job: Json) -> bool:
    """It has ended, or is ready and waits for its end to be asked for."""
    return _terminal(job) or (job["state"] == "ready" and not job.get("completion"))


def _sum(jobs: Sequence[Json], group_id: str) -> Json:
    """All of them as if they were one job, for the display: as far as the one that is furthest behind."""
    behind = min(jobs, key=lambda job: (_terminal(job), job["cursor"]["cur"] - job["cursor"]["end"]))
    rates = [job["rate"] for job in jobs if job.get("rate") is not None and not _terminal(job)]
    cursor = {key: sum(job["cursor"][key] for job in jobs) for key in ("cur", "end")}
    rate = sum(rates) if rates else None
    return {
        **behind,
        "id": group_id,
        "target": f"{len(jobs)} disks",
        "cursor": cursor,
        "rate": rate,
        "eta": (cursor["end"] - cursor["cur"]) / rate if rate else None,
    }
