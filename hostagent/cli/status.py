"""`hostagent status`: the one screen for 3 a.m.

What needs a person comes first: storage daemons that do not answer, access that is not settled, what failed last. Then
what runs. Everything is the agent's own knowledge; nothing is asked of a storage daemon that may hang.
"""

from __future__ import annotations

import argparse
from typing import Any

from hostagent.cli import arguments
from hostagent.cli.client import Client, Json
from hostagent.cli.terminal import Column, Terminal, age, counted
from hostagent.errors import EXIT_OK
from hostagent.sizes import format_duration, format_size

ACTIVE = ("running", "ready", "completing", "aborting", "starting", "paused", "waiting", "unknown", "queued")
MOST_FILES = 5  # alarms about files; one storage that went bad changes many
MOST_ROWS = 20  # of one table; a screen has no more room, `job list` and `export list` have them all


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    text = "jobs, exports, and whatever needs a person, on one screen"
    parser = nouns.add_parser("status", help=text, description=text, parents=[common])
    parser.set_defaults(run=_status)


def _status(args: argparse.Namespace) -> int:
    client, terminal = arguments.connect(args), Terminal.of(args)
    host = client.get("/v1/host").data
    jobs = _jobs(client, host)
    exports = _exports(client, host)
    if terminal.json:
        terminal.data({"host": host, "jobs": jobs, "exports": exports})
        return EXIT_OK
    _print_head(terminal, host)
    _print_alarms(terminal, host, jobs, exports)
    _print_jobs(terminal, jobs)
    _print_exports(terminal, exports)
    _print_errors(terminal, host.get("last_errors") or [])
    return EXIT_OK


def _jobs(client: Client, host: Json) -> list[Json]:
    """The active ones. A host keeps thousands of finished jobs, so each state that has any is asked for by itself."""
    counts = host.get("jobs") or {}
    return [job for state in ACTIVE if counts.get(state, 1) for job in client.items("/v1/jobs", {"state": state})]


def _exports(client: Client, host: Json) -> list[Json]:
    """The present ones: the host names their states."""
    return [export for state in host.get("exports") or {} for export in client.items("/v1/exports", {"state": state})]


def _print_head(terminal: Terminal, host: Json) -> None:
    terminal.heading(f"{host['host']}: hostagent {host['version']}")
    user = host.get("user") or {}
    modes = {"acl": "access by ACL", "own": "own images only, no grants"}
    access = modes.get(str(host.get("access")), str(host.get("access")))
    daemons = host.get("storage_daemons") or []
    terminal.fields(
        [
            ("running", f"for {age(host.get('started'))}, pid {host.get('pid', '?')}"),
            ("hypervisor", f"user {user.get('name', '?')}, {access}"),
            ("qemu", f"{host.get('qemu') or 'unknown'}, {counted(len(daemons), 'storage daemon')}"),
            ("libvirt", _libvirt(host.get("libvirt") or {})),
            ("data", _data(host.get("data_daemon"))),
            ("D-Bus", str(host.get("dbus") or "unknown")),
        ]
    )


def _libvirt(state: Json) -> str:
    if not state.get("connected"):
        return f"not connected: {state.get('reason') or 'live disks are not looked after'}"
    return str(state.get("version") or "connected")


def _data(state: Json | None) -> str:
    if not state:
        return "no data daemon of this agent's (data.start)"
    if state.get("starting"):
        return "data daemon: it is being started"
    return f"data daemon, pid {state.get('pid')}" if state.get("running") else f"no data daemon: {state.get('error')}"


def _print_alarms(terminal: Terminal, host: Json, jobs: list[Json], exports: list[Json]) -> None:
    alarms = [
        *_store_alarms(host),
        *_daemon_alarms(host),
        *_job_alarms(jobs),
        *_export_alarms(exports),
        *_file_alarms(host),
        *_revocation_alarms(host),
        *_drain_alarms(host),
    ]
    terminal.line("")
    if not alarms:
        terminal.line("nothing needs attention", "ok")
    for text, remedy in alarms:
        terminal.line(f"! {text}", "fail")
        terminal.line(f"    {remedy}", "remedy")


def _store_alarms(host: Json) -> list[tuple[str, str]]:
    store = host.get("store") or {}
    free = store.get("free")
    if free is None or free >= store.get("min_free", 0):
        return []
    text = f"no new work is taken: {format_size(free)} are free beside the store in {store['path']}"
    return [(text, f"make space there: {format_size(store['min_free'])} (store.min_free); running work goes on")]


def _daemon_alarms(host: Json) -> list[tuple[str, str]]:
    found = []
    for daemon in host.get("storage_daemons") or []:
        if daemon.get("state") == "unresponsive":
            what = f"storage daemon {daemon['pid']} of {daemon['image']} is unresponsive{_since(daemon)}"
            found.append((what, _unstick(daemon)))
    for orphan in host.get("orphans") or []:
        what = f"storage daemon {orphan['pid']} runs, but belongs to no job or export that is known"
        remedy = f"it holds {orphan.get('holds') or 'nothing'}; when nothing uses that: kill {orphan['pid']}"
        found.append((what, remedy))
    return found


def _job_alarms(jobs: list[Json]) -> list[tuple[str, str]]:
    """Jobs that something keeps from ending: they keep their slot meanwhile."""
    return [
        (f"job {job['id']} of {job['path']}: {warning}", f"see to that; hostagent job show {job['id']}")
        for job in jobs
        if job["state"] in ("completing", "aborting")
        for warning in (job.get("warnings") or [])[-1:]
        if warning.startswith("it cannot end yet")
    ]


def _export_alarms(exports: list[Json]) -> list[tuple[str, str]]:
    """Exports of which something is to be said: what was written is not durable, or one cannot be ended."""
    remedies = {
        "running": "read what is there from another client now; `hostagent export stop --force` gives up what is not",
        "stopping": "mend that, and stop it again (--force gives up what is not durable); a full store is retried",
    }
    return [
        (f"export {export['id']} of {export['path']}: {export['reason']}", remedies[export["state"]])
        for export in exports
        if export.get("reason") and export["state"] in remedies
    ]


def _unstick(daemon: Json) -> str:
    if daemon.get("job") and not daemon.get("exports"):
        return f"its job can be ended: hostagent job abort --force {daemon['job']}"
    if daemon.get("writable", True) or daemon.get("job"):
        return "look at its storage (dmesg); killing it loses what its clients have not flushed"
    return f"look at its storage (dmesg); it writes nothing, and kill -9 {daemon['pid']} only cuts its readers off"


def _since(daemon: Json) -> str:
    return f" for {age(daemon['since'])}" if daemon.get("since") else ""


def _file_alarms(host: Json) -> list[tuple[str, str]]:
    """Files that are open, and that somebody else has cut, deleted or replaced; those that lost bytes first."""
    changed = sorted(host.get("changed_files") or [], key=lambda file: not file.get("lost"))
    alarms = [(f"{file['path']} {file['what']}", str(file.get("remedy") or "")) for file in changed[:MOST_FILES]]
    if len(changed) > MOST_FILES:
        more = f"{len(changed) - MOST_FILES} more files have changed"
        alarms.append((more, "hostagent status --json names them all"))
    return alarms


def _revocation_alarms(host: Json) -> list[tuple[str, str]]:
    pending = host.get("revocations") or {}
    if not pending.get("pending"):
        return []
    oldest = format_duration(pending.get("oldest_seconds") or 0)
    text = f"access to {counted(pending['pending'], 'file')} is to be taken back, the oldest for {oldest}"
    return [(text, f"{obstacle(pending)}hostagent grant list shows all; the agent goes on trying")]


def obstacle(pending: Json) -> str:
    """What stands in the way of the oldest revocation, and a semicolon; empty where that is not known."""
    path, reason = ((pending.get("oldest") or {}).get(key) or "" for key in ("path", "reason"))
    return f"{reason if path in reason else f'{path}: {reason}'}; " if reason else ""


def _drain_alarms(host: Json) -> list[tuple[str, str]]:
    drain = host.get("drain") or {}
    if not drain.get("draining"):
        return []
    text = f"the host has been draining for {age(drain.get('since'))}: no new work is taken"
    return [(text, "hostagent drain says what still holds; hostagent drain --undo lifts it")]


def _print_jobs(terminal: Terminal, jobs: list[Json]) -> None:
    from hostagent.cli import job_report

    terminal.line("")
    if not jobs:
        terminal.line("no job is active")
        return
    terminal.heading(f"jobs ({len(jobs)} active)")
    terminal.table(job_report.COLUMNS, [job_report.row(job) for job in jobs[:MOST_ROWS]])
    _print_more(terminal, len(jobs), "hostagent job list")


def _print_exports(terminal: Terminal, exports: list[Json]) -> None:
    from hostagent.cli.exports import row

    terminal.line("")
    if not exports:
        terminal.line("nothing is exported")
        return
    terminal.heading(f"exports ({len(exports)})")
    columns = ("id", "image", "state", "mode", Column("clients", right=True), Column("age", right=True))
    terminal.table(columns, [(*row(export)[:5], row(export)[6]) for export in exports[:MOST_ROWS]])
    _print_more(terminal, len(exports), "hostagent export list")


def _print_more(terminal: Terminal, count: int, command: str) -> None:
    if count > MOST_ROWS:
        terminal.line(f"… and {count - MOST_ROWS} more: {command}")


def _print_errors(terminal: Terminal, errors: list[Json]) -> None:
    if not errors:
        return
    terminal.line("")
    terminal.heading("last errors")
    for error in errors[:10]:
        terminal.line(f"  {age(error.get('time'))} ago, {error['what']}: {error['message']}")
        if error.get("remedy"):
            terminal.line(f"    {error['remedy']}", "remedy")
