"""`hostagent job …`: what is done to a disk.

A job's id is chosen here, so that a request which was cut off can be sent again without starting a second job. Under
`--wait`, Ctrl-C and `--timeout` abort the job as virsh does; `watch` only looks.
"""

from __future__ import annotations

import argparse
import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from hostagent.cli import arguments
from hostagent.cli.client import Client, CliError, Json, once, patient, quoted
from hostagent.cli.terminal import Terminal, remark
from hostagent.errors import EXIT_INTERRUPTED, EXIT_JOB_FAILED, EXIT_OK, EXIT_TIMEOUT

if TYPE_CHECKING:
    from hostagent.cli.follow import Display

Verbs = Any  # argparse._SubParsersAction, which has no public name


def register(nouns: Verbs, common: argparse.ArgumentParser) -> None:
    noun = nouns.add_parser("job", help="block jobs: pull, copy, commit, and what runs", parents=[common])
    verbs = noun.add_subparsers(dest="verb", metavar="VERB", required=True)
    _register_pull(verbs, common)
    _register_copy(verbs, common)
    _register_commit(verbs, common)
    _register_list(verbs, common)
    for verb, run, text in (
        ("show", _show, "everything that is known of a job"),
        ("watch", _watch, "follow a job to its end; never aborts it"),
        ("next", _next, "the next increment of an incremental pull"),
        ("abort", _abort, "end a job, and with it its group; what was copied stays in place"),
        ("pause", _pause, "stop copying, keep the job"),
        ("resume", _resume, "go on copying"),
        ("complete", _complete, "end a job that is ready, or its group when all of it are"),
        ("speed", _speed, "change the bandwidth limit"),
        ("delete", _delete, "forget a finished job"),
    ):
        parser = verbs.add_parser(verb, help=text, description=text, parents=[common])
        grouped = " or its group's" if verb in ("show", "watch", "abort") else ""
        parser.add_argument("id", metavar="ID", help=f"the job's id{grouped}")
        parser.set_defaults(run=run)
        _add_own_options(verb, parser)


def _add_own_options(verb: str, parser: argparse.ArgumentParser) -> None:
    if verb == "watch":
        _add_progress(parser)
    elif verb == "abort":
        parser.add_argument(
            "--force",
            action="store_true",
            help="after jobs.abort_timeout kill the job's storage daemon, if it serves no writable export; "
            "of a guest's copy into NBD, cut its connection to the server",
        )
    elif verb == "complete":
        end = parser.add_mutually_exclusive_group()
        end.add_argument("--pivot", action="store_true", help="the disk goes over to the copy")
        end.add_argument("--finish", action="store_true", help="the disk stays, the copy is closed")
    elif verb == "speed":
        parser.add_argument("rate", metavar="RATE", type=arguments.rate, help="50MiB/s, or unlimited")


def _register_pull(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    text = "copy what the backing files hold into the top image, so that it no longer needs them"
    parser = verbs.add_parser("pull", help=text, description=text, parents=[common])
    _add_target(parser)
    parser.add_argument("--base", metavar="PATH|vda[N]", type=arguments.layer, help="the layer that stays as backing")
    parser.add_argument("--increment", metavar="SIZE", type=arguments.size, help="copy in steps, one for each `next`")
    _add_work(parser)


def _register_copy(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    text = "copy the image into another file; with --pivot its exports go over to the copy"
    more = f"{text}. Several disks are one group: they complete together or not at all."
    parser = verbs.add_parser("copy", help=text, description=more, parents=[common])
    _add_target(parser)
    parser.add_argument("dest", metavar="DEST", type=arguments.dest, help="the copy's path, or an NBD URI")
    parser.add_argument(
        "more",
        metavar="TARGET DEST",
        nargs="*",
        action=arguments.Pairs,
        help="further disks, and what is said of the first",
    )
    parser.add_argument("--format", choices=("raw", "qcow2"), help="the copy's; default that of the image")
    text = "the image's; say raw for raw: else the header decides"
    parser.add_argument("--source-format", choices=("raw", "qcow2"), help=text)
    parser.add_argument("--shallow", action="store_true", help="the top layer alone; the backing file is shared")
    parser.add_argument(
        "--reuse-external",
        action="store_true",
        help="write over DEST, which exists (a block device: whatever it holds)",
    )
    parser.add_argument(
        "--synchronous-writes",
        action="store_true",
        help="of a guest's disk: each of its writes waits for the copy, too, so that the copy keeps up with them",
    )
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--pivot", action="store_true", help="in the end exports and chain go over to the copy")
    end.add_argument("--finish", action="store_true", help="in the end the copy is closed; the image stays")
    _add_work(parser)


def _register_commit(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    text = "write what the overlay holds down into a layer below it"
    parser = verbs.add_parser("commit", help=text, description=text, parents=[common])
    _add_target(parser)
    parser.add_argument(
        "--base", metavar="PATH", type=arguments.layer, help="commit into this layer; default the lowest"
    )
    parser.add_argument("--top", metavar="PATH", type=arguments.layer, help="commit from this layer down")
    parser.add_argument("--delete", action="store_true", help="delete the files that the chain no longer has")
    parser.add_argument("--prune-bitmaps", action="store_true", help="first remove all bitmaps of the base")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--pivot", action="store_true", help="in the end exports and chain go over to the base")
    end.add_argument("--keep-overlay", dest="finish", action="store_true", help="in the end the overlay stays on top")
    _add_work(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", type=arguments.target, help="an image's path, or DOMAIN/DISK")


def _add_work(parser: argparse.ArgumentParser) -> None:
    """What all operations have."""
    parser.add_argument("--bandwidth", metavar="RATE", type=arguments.rate, help="limit, such as 50MiB/s")
    parser.add_argument(
        "--check",
        choices=("auto", "always", "never"),
        help="qemu-img check before the start; never also starts where space is short",
    )
    parser.add_argument("--label", metavar="K=V", type=arguments.label, action="append", default=[], help="may repeat")
    parser.add_argument(
        "--id",
        metavar="UUID",
        type=arguments.object_id,
        help="the id (of several disks: of their group), for a safe retry",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, change nothing")
    parser.add_argument("--wait", action="store_true", help="stay until the end; Ctrl-C aborts the job")
    parser.add_argument("--timeout", metavar="S", type=arguments.seconds, help="with --wait: abort after S seconds")
    _add_progress(parser)
    parser.set_defaults(run=_work)


def _add_progress(parser: argparse.ArgumentParser) -> None:
    text = "how progress is shown: a bar on a terminal, or one JSON object a line"
    parser.add_argument("--progress", choices=("auto", "json", "none"), default="auto", help=text)


def _register_list(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    parser = verbs.add_parser("list", help="jobs, running and finished", parents=[common])
    parser.add_argument("--state", metavar="S", help="only those in this state")
    parser.add_argument("--target", metavar="T", type=arguments.target, help="only those of this target")
    parser.add_argument("--label", metavar="K=V", type=arguments.label, action="append", default=[], help="may repeat")
    parser.add_argument("--group", metavar="ID", help="only those of this group")
    parser.add_argument("--origin", choices=["agent", "external"], help="only ours, or only somebody else's")
    parser.set_defaults(run=_list)


def _work(args: argparse.Namespace) -> int:
    if args.timeout and not args.wait:
        raise CliError("invalid", "--timeout is how long --wait waits", remedy="add --wait")
    if vars(args).get("more"):
        from hostagent.cli import groups

        return groups.work(args, _request(args))
    client, terminal = arguments.connect(args), Terminal.of(args)
    if args.dry_run:
        return _dry_run(client, terminal, args)
    request = {**_request(args), "id": args.id or str(uuid.uuid4())}
    if args.wait:
        return _wait(client, terminal, request, args)
    job = _start(client, request)
    if terminal.json:
        terminal.data(job)
    else:
        terminal.line(f"job {job['id']} {job['state']}")
    return EXIT_OK


def _start(client: Client, request: Json) -> Json:
    """The id makes it safe to ask again when the answer was lost: there is one job at most."""
    return once(lambda: client.post("/v1/jobs", request))


def _request(args: argparse.Namespace) -> Json:
    given = vars(args)
    body = {"operation": args.verb, "labels": dict(args.label), "completion": _completion(args)}
    body |= {name: given.get(name) for name in _FIELDS}
    return {key: value for key, value in body.items() if value is not None and value is not False and value != {}}


_FIELDS = (
    "target", "base", "top", "increment", "dest", "format", "source_format",
    "shallow", "reuse_external", "synchronous_writes", "delete", "prune_bitmaps", "bandwidth", "check",
)  # fmt: skip


def _completion(args: argparse.Namespace) -> str | None:
    given = vars(args)
    return "pivot" if given.get("pivot") else "finish" if given.get("finish") else None


def _dry_run(client: Client, terminal: Terminal, args: argparse.Namespace) -> int:
    from hostagent.cli import job_report

    plan = client.post("/v1/jobs", {**_request(args), "dry_run": True})
    if terminal.json:
        terminal.data(plan)
    else:
        job_report.plan(terminal, plan, kept_by="--keep-overlay" if args.verb == "commit" else "--finish")
    return EXIT_OK


def _wait(client: Client, terminal: Terminal, request: Json, args: argparse.Namespace) -> int:
    from hostagent.cli import follow, progress

    deadline = time.monotonic() + args.timeout if args.timeout else None
    limits = follow.Limits(deadline=deadline, advance="increment" in request, ready=True)
    ended_by = None
    with progress.shown(args.progress, terminal) as display:
        try:
            job = follow.to_the_end(client, _start(client, request), display, limits)
        except follow.TimeIsUp:
            remark(f"{args.timeout:g} s are over: aborting job {request['id']}")
            ended_by = EXIT_TIMEOUT
        except KeyboardInterrupt:
            remark(f"interrupted: aborting job {request['id']} (once more to leave it alone)")
            ended_by = EXIT_INTERRUPTED
        if ended_by is not None:
            aborted = _abort_and_wait(client, request, display)
            if aborted is None:
                return ended_by
            job = aborted
    return _ended(args, job, ended_by)


def _abort_and_wait(client: Client, job: Json, display: Display) -> Json | None:
    """The job as it ended; None if it had not been started yet."""
    from hostagent.cli import follow

    try:
        return follow.abort_to_the_end(client, job, display)
    except follow.TimeIsUp as late:
        kills = "" if late.job.get("domain") else f"; `hostagent job abort --force {job['id']}` ends its storage daemon"
        remark(f"the job has not ended yet{kills}")
        return late.job
    except CliError as error:
        if error.code != "not_found":
            raise
        remark(f"the agent knows no job {job['id']}")
        return None


def _ended(args: argparse.Namespace, job: Json, ended_by: int | None = None) -> int:
    """Show the outcome, and say it as an exit status. A job that completed before its abort is a success."""
    from hostagent.cli import job_report

    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data(job)
    elif args.progress == "json":
        print(json.dumps(job))  # the last line, as one-line as those before it
    else:
        job_report.outcome(terminal, job)
    if ended_by == EXIT_INTERRUPTED:
        return EXIT_INTERRUPTED
    if job["state"] in ("completed", "ready"):
        return EXIT_OK
    return ended_by or EXIT_JOB_FAILED


def _watch(args: argparse.Namespace) -> int:
    from hostagent.cli import follow, groups, progress

    client, terminal = arguments.connect(args), Terminal.of(args)
    job = groups.unless_one(client, args.id, lambda: client.get(_address(args)).data)
    if job is None:
        return groups.watch(client, args)
    with progress.shown(args.progress, terminal) as display:
        job = follow.to_the_end(client, job, display, follow.Limits())
    return _ended(args, job)


def _list(args: argparse.Namespace) -> int:
    from hostagent.cli import job_report

    labels = [f"{key}={value}" for key, value in args.label]
    query = {"state": args.state, "target": args.target, "group": args.group, "origin": args.origin, "label": labels}
    jobs = arguments.connect(args).items("/v1/jobs", query)
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data({"items": jobs})
    elif jobs:
        terminal.table(job_report.COLUMNS, [job_report.row(job) for job in jobs])
    else:
        remark("no jobs")
    return EXIT_OK


def _show(args: argparse.Namespace) -> int:
    from hostagent.cli import groups, job_report

    client, terminal = arguments.connect(args), Terminal.of(args)
    job = groups.unless_one(client, args.id, lambda: client.get(_address(args)).data)
    if job is None:
        return groups.show(client, args)
    if terminal.json:
        terminal.data(job)
    else:
        job_report.whole(terminal, job)
    return EXIT_OK


def _next(args: argparse.Namespace) -> int:
    """With the cursor that is read first, the request may be repeated without making two steps."""
    client = arguments.connect(args)
    job = client.get(_address(args)).data
    return _acted(args, patient(lambda: client.post(f"{_address(args)}/next", {"cursor": job["cursor"]["cur"]})))


def _abort(args: argparse.Namespace) -> int:
    from hostagent.cli import groups

    client, body = arguments.connect(args), {"force": True} if args.force else {}
    job = groups.unless_one(client, args.id, lambda: client.post(f"{_address(args)}/abort", body))
    return groups.abort(client, args, body) if job is None else _acted(args, job)


def _pause(args: argparse.Namespace) -> int:
    return _acted(args, arguments.connect(args).post(f"{_address(args)}/pause"))


def _resume(args: argparse.Namespace) -> int:
    return _acted(args, arguments.connect(args).post(f"{_address(args)}/resume"))


def _complete(args: argparse.Namespace) -> int:
    completion = _completion(args)
    body = {"completion": completion} if completion else {}
    return _acted(args, arguments.connect(args).post(f"{_address(args)}/complete", body))


def _speed(args: argparse.Namespace) -> int:
    return _acted(args, arguments.connect(args).patch(_address(args), {"bandwidth": args.rate}))


def _delete(args: argparse.Namespace) -> int:
    arguments.connect(args).delete(_address(args))
    if not args.json:
        Terminal.of(args).line(f"job {args.id} deleted")
    return EXIT_OK


def _acted(args: argparse.Namespace, job: Json) -> int:
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data(job)
    else:
        terminal.line(f"job {job['id']} {job['state']}", str(job["state"]))
    return EXIT_OK


def _address(args: argparse.Namespace) -> str:
    return f"/v1/jobs/{quoted(args.id)}"
