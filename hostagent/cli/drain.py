"""`hostagent drain`: take no new work, and say what still holds this host.

It stays so over a restart of the agent, until `--undo`. Ctrl-C and `--timeout` end the waiting, not the draining.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from hostagent.cli import arguments
from hostagent.cli.client import Client, CliError, Json, once, patient
from hostagent.cli.terminal import Column, Terminal, counted, remark
from hostagent.errors import EXIT_BUSY, EXIT_OK
from hostagent.sizes import format_size

ADDRESS = "/v1/host/drain"
POLL = 1.0  # seconds between two looks while waiting
MOST_ROWS = 20  # of one table, as in `status`


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    text = "take no new work, let what runs end, and say what still holds"
    parser = nouns.add_parser("drain", help=text, description=text, parents=[common])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--pause", action="store_true", help="pause the running jobs instead of waiting for their ends")
    how.add_argument("--check", action="store_true", help="change nothing; exit 6 while something holds")
    how.add_argument("--undo", action="store_true", help="take new work again, and resume what --pause has paused")
    parser.add_argument("--wait", action="store_true", help="return when nothing holds any more")
    parser.add_argument("--timeout", metavar="S", type=arguments.seconds, help="with --wait: exit 5 after S seconds")
    parser.set_defaults(run=_drain)


def _drain(args: argparse.Namespace) -> int:
    client, terminal = arguments.connect(args), Terminal.of(args)
    if (args.undo or args.check) and args.wait:
        raise CliError("invalid", f"--{'undo' if args.undo else 'check'} waits for nothing", remedy="leave out --wait")
    if args.timeout and not args.wait:
        raise CliError("invalid", "--timeout is for --wait", remedy="say --wait as well")
    if args.check:
        return _check(terminal, patient(lambda: client.get(ADDRESS).data))
    if args.undo:
        state = once(lambda: client.delete(ADDRESS))
    else:
        state = once(lambda: client.post(ADDRESS, {"pause": args.pause}))
    late = False
    if args.wait:
        state, late = _until_drained(client, state, args.timeout)
    if terminal.json:
        terminal.data(state)
    else:
        _print(terminal, state)
    if late:
        what = f"the host was not drained within {args.timeout:g} s; it still takes no new work"
        raise CliError("timeout", what, remedy="end what holds it (above), wait again, or `hostagent drain --undo`")
    return EXIT_OK


def _check(terminal: Terminal, state: Json) -> int:
    """Whether anything holds, whoever may begin something meanwhile."""
    held = _summary(state)
    if terminal.json:
        terminal.data(state)
    else:
        terminal.line(f"{held} still here" if held else "nothing holds this host", "pending" if held else "ok")
        _print_what_holds(terminal, state)
    return EXIT_BUSY if held else EXIT_OK


def _until_drained(client: Client, state: Json, timeout: float | None) -> tuple[Json, bool]:
    """The state when nothing holds, or when the time is up, and whether that was so. An agent that restarts is waited
    for: it is drained still."""
    end = None if timeout is None else time.monotonic() + timeout
    shown = ""
    while not state["drained"]:
        if not state["draining"]:
            raise CliError("conflict", "draining was lifted meanwhile", data=state)
        if end is not None and time.monotonic() >= end:
            return state, True
        if (summary := _summary(state)) != shown:
            remark(f"waiting for {summary}{'; `hostagent export stop` ends an export' if state['exports'] else ''}")
            shown = summary
        time.sleep(POLL if end is None else max(0.0, min(POLL, end - time.monotonic())))
        state = patient(lambda: client.get(ADDRESS).data)
    return state, False


def _summary(state: Json) -> str:
    counts = (
        (len(state["jobs"]), "jobs"),
        (len(state["exports"]), "exports"),
        (state["revocations"], "revocations"),
        (state["beginning"], "requests"),
    )
    return ", ".join(f"{count} {what if count > 1 else what.removesuffix('s')}" for count, what in counts if count)


def _print(terminal: Terminal, state: Json) -> None:
    if not state["draining"]:
        terminal.line("new work is taken", "ok")
        return
    if state["drained"]:
        terminal.line("drained: nothing holds this host, and no new work is taken", "ok")
    else:
        terminal.line(f"draining: no new work is taken; {_summary(state)} still here", "pending")
    if state["paused"]:
        terminal.line(f"paused until --undo: {', '.join(state['paused'][:MOST_ROWS])}")
    _print_what_holds(terminal, state)


def _print_what_holds(terminal: Terminal, state: Json) -> None:
    _print_jobs(terminal, state["jobs"])
    _print_exports(terminal, state["exports"])
    if state["revocations"]:
        terminal.line("")
        terminal.line(f"access to {counted(state['revocations'], 'file')} is to be taken back: `hostagent grant list`")


def _print_jobs(terminal: Terminal, jobs: list[Json]) -> None:
    if not jobs:
        return
    terminal.line("")
    columns = ("job", "operation", "target", "state", Column("cursor", right=True))
    terminal.table(columns, [_job(job) for job in jobs[:MOST_ROWS]])
    _print_more(terminal, len(jobs), "hostagent job list")


def _job(job: Json) -> tuple[str, ...]:
    cursor = job["cursor"]
    shown = f"{format_size(cursor['cur'])} / {format_size(cursor['end'])}"
    return str(job["id"]), str(job["operation"]), str(job["target"]), str(job["state"]), shown


def _print_exports(terminal: Terminal, exports: list[Json]) -> None:
    if not exports:
        return
    terminal.line("")
    terminal.table(("export", "image", "clients"), [_export(export) for export in exports[:MOST_ROWS]])
    _print_more(terminal, len(exports), "hostagent export list")


def _export(export: Json) -> tuple[str, ...]:
    clients = ", ".join(_client(client) for client in export["clients"])
    return str(export["id"]), str(export["image"]), clients or "none: `hostagent export stop`"


def _client(client: Json) -> str:
    return f"{client['name']} (pid {client['pid']})" if client["pid"] else _remote(client)


def _print_more(terminal: Terminal, count: int, command: str) -> None:
    if count > MOST_ROWS:
        terminal.line(f"… and {count - MOST_ROWS} more: {command}")


def _remote(client: Json) -> str:
    return "one that is not seen from here" if client["name"] == "?" else str(client["name"])
