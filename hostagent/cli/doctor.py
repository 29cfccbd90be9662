"""`hostagent doctor`: is this host fit for the agent, and is the agent well?

It works without an agent: half of what can be wrong keeps it from starting. Each finding is ok, warn or fail with what
to do about it; a fail makes the exit status 1. Nothing is changed, but for nameless temporary files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostagent.cli import arguments
from hostagent.cli.client import Client, CliError, Json
from hostagent.cli.finding import Finding, Result, fail, ok, warn
from hostagent.cli.judged import judged
from hostagent.cli.status import obstacle
from hostagent.cli.terminal import Terminal, counted
from hostagent.errors import EXIT_ERROR, EXIT_OK, AgentError

MOST_GRANTS = 20  # warnings about kept files; hundreds of the same would hide the rest
MOST_FILES = 20  # that have changed; likewise


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    text = "is this host fit for the agent, and is the agent well?"
    parser = nouns.add_parser("doctor", help=text, description=text, parents=[common])
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings (default: /etc/hostagent/hostagent.toml)")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    findings = list(_findings(args))
    failed = any(finding.result is Result.FAIL for finding in findings)
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data({"ok": not failed, "checks": [finding.to_json() for finding in findings]})
    else:
        _print(terminal, findings)
    return EXIT_ERROR if failed else EXIT_OK


def _print(terminal: Terminal, findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        terminal.line(f"{finding.result:<4}  {finding.name:<{width}}  {finding.message}", str(finding.result))
        for line in (finding.remedy or "").splitlines():
            terminal.line(f"{'':<6}{'':<{width}}  → {line}", "remedy")
    bad = [sum(finding.result is result for finding in findings) for result in (Result.FAIL, Result.WARN)]
    terminal.line("")
    terminal.heading(f"{counted(len(findings), 'check')}: {bad[0]} failed, {counted(bad[1], 'warning')}")


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    from hostagent import config_text
    from hostagent.cli import doctor_doors, doctor_host

    if (away := arguments.away(args)) is not None:
        if args.config:
            message, remedy = "--config is a file of this host, and the agent is another's", "leave one of them out"
            raise AgentError("invalid", message, field="config", remedy=remedy)
        yield ok("host", f"not looked at: this is not the host of {away}")
        yield from _agent(Client(away))
        return
    try:
        settings = config_text.load(file=args.config or config_text.default_file(os.environ))
        yield ok("settings", "understood")
    except AgentError as error:
        yield fail("settings", error.message, error.remedy)
        plain = {key: value for key, value in os.environ.items() if not key.startswith(config_text.ENV_PREFIX)}
        settings = config_text.load(env=plain)  # the defaults, so that the other checks can still be made
    named = arguments.named_socket(args)
    socket = named or settings.api.socket
    if args.config:  # asked for by name
        yield ok("judged by", f"the settings of {args.config}, whatever a running agent has")
    else:
        found = judged(socket, settings)
        yield ok("judged by", f"settings, {found.whose}")
        settings = found.settings
    yield from doctor_host.findings(settings)
    yield from doctor_doors.space(settings)
    yield from doctor_doors.findings(settings)
    yield from _agent(Client(socket, owners=arguments.trusted(named)))


# What the running agent says


def _agent(client: Client) -> Iterator[Finding]:
    try:
        state = client.get("/readyz").data
    except CliError as error:
        if error.code == "unreachable":
            yield fail("agent", error.message, error.remedy)
            return
        if error.code != "unavailable" or error.data is None:
            yield fail("agent", error.message, error.remedy)
            return
        state = error.data
    yield from _ready(state)
    try:
        yield from _host(client.get("/v1/host").data)
        grants = list(client.items("/v1/grants", {}))
        yield from _kept(grants)
        yield from _network(grants)
    except CliError as error:
        yield fail("agent", error.message, error.remedy)


def _ready(state: Json) -> Iterator[Finding]:
    checks = dict(state.get("checks") or {})
    drain = checks.pop("drain", None)
    checks.pop("storage_daemons", None)  # each of them is judged below
    if state.get("ready"):
        yield ok("agent", "answers and is ready")
    elif drain and not drain.get("ok") and all(check.get("ok") for check in checks.values()):
        yield ok("agent", "answers")  # and takes no new work because somebody wanted that
    else:
        yield fail("agent", "answers, but is not ready", "see the checks below, and its log")
    if drain and not drain.get("ok"):
        yield warn("agent: drain", str(drain.get("detail")), "`hostagent drain --undo`, when it is to take work again")
    for name, check in sorted(checks.items()):
        text = str(check.get("detail") or ("ok" if check.get("ok") else "not ok"))
        remedy = str(check.get("remedy") or "see the agent's log")
        if not check.get("ok"):
            yield fail(f"agent: {name}", text, remedy)
        elif check.get("remedy"):  # it keeps nobody from working, and yet somebody may want to do something
            yield warn(f"agent: {name}", text, remedy)
        else:
            yield ok(f"agent: {name}", text)


def _host(host: Json) -> Iterator[Finding]:
    data = host.get("data_daemon")
    if data and data.get("running") and data.get("outdated"):
        text = f"pid {data['pid']} began with another version, or other settings"
        yield warn("data daemon", text, "it begins anew when nobody has a ticket of it")
    elif data and data.get("running"):
        yield ok("data daemon", f"answers, pid {data['pid']}")
    elif data and data.get("starting"):
        yield warn("data daemon", "it is being started", "ask again in a moment")
    elif data:
        yield fail("data daemon", str(data.get("error")), "see the agent's log; it is tried again by itself")
    daemons = host.get("storage_daemons") or []
    stuck = [daemon for daemon in daemons if daemon.get("state") == "unresponsive"]
    for daemon in stuck:
        text = f"pid {daemon['pid']} of {daemon.get('image')} does not answer"
        yield fail("storage daemons", text, _unstick(daemon))
    for orphan in host.get("orphans") or []:
        holds = orphan.get("holds") or "nothing"
        text = f"pid {orphan['pid']} belongs to no job or export that is known, and holds {holds}"
        yield warn("storage daemons", text, f"when nothing uses that: kill {orphan['pid']}")
    if not stuck:
        yield ok("storage daemons", f"{len(daemons)} run, all answer")
    yield from _changed(host.get("changed_files") or [])
    pending = host.get("revocations") or {}
    if pending.get("pending"):
        text = f"{pending['pending']} not settled, the oldest for {pending.get('oldest_seconds') or 0:.0f} s"
        remedy = f"{obstacle(pending)}`hostagent grant list` shows all; the agent goes on trying"
        yield warn("revocations", text, remedy)
    else:
        yield ok("revocations", "all settled")


def _changed(files: list[Json]) -> Iterator[Finding]:
    """Files that are open, and that somebody else has cut, deleted or replaced."""
    for file in sorted(files, key=lambda one: not one.get("lost"))[:MOST_FILES]:
        report = fail if file.get("lost") else warn
        yield report("files", f"{file['path']} {file['what']}", str(file.get("remedy") or ""))
    if len(files) > MOST_FILES:
        yield warn("files", f"and {len(files) - MOST_FILES} more", "`hostagent status --json`")


def _unstick(daemon: Json) -> str:
    if daemon.get("job") and not daemon.get("exports"):
        return f"look at its storage (`dmesg`); to give the job up: hostagent job abort --force {daemon['job']}"
    if daemon.get("writable", True) or daemon.get("job"):
        return "look at its storage (`dmesg`); it is never killed by itself, for its clients may have unwritten data"
    return f"look at its storage (`dmesg`); it writes nothing, and `kill -9 {daemon['pid']}` only cuts its readers off"


def _kept(grants: list[Json]) -> Iterator[Finding]:
    """Files that nobody needs any longer and that the hypervisor user can still open, by rights that are not ours."""
    kept = [grant for grant in grants if grant.get("state") == "kept"]
    for grant in kept[:MOST_GRANTS]:
        text = f"{grant['path']} can still be opened: {grant.get('detail') or grant.get('reason')}"
        what = "chown" if grant.get("access") == "owner" else "chmod or chgrp"
        yield warn("kept files", text, f"{what} it, if guests must not read it")
    if len(kept) > MOST_GRANTS:
        yield warn("kept files", f"and {len(kept) - MOST_GRANTS} more", "`hostagent grant list`")
    if not kept:
        yield ok("kept files", "none: what was revoked cannot be opened")


def _network(grants: list[Json]) -> Iterator[Finding]:
    """Network images: nothing that is said of access holds for them."""
    used = {grant["path"] for grant in grants if grant.get("access") == "none" and grant.get("state") == "granted"}
    if used:
        text = "who may open them is for their servers to say, and is never revoked here"
        yield ok("network images", f"{counted(len(used), 'image')} in use: {text}")
