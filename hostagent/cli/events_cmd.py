"""`hostagent events`: what happened, from the agent's log and then live.

Without `--follow` it ends where the log ended when it was asked. With it, a lost agent is waited for, and the stream
goes on after the last number seen, so that nothing is missed and nothing comes twice.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from hostagent.cli import arguments
from hostagent.cli.client import PATIENCE, RETRY_PAUSE, STREAM_SILENCE, Client, CliError, Json, StreamEvent
from hostagent.cli.terminal import Terminal, remark
from hostagent.errors import EXIT_OK

END_OF_LOG = 0.5  # seconds of silence after which the replay is over; from the log, events come in one go
RESYNC = "resync"


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    text = "what happened, and with --follow what happens"
    parser = nouns.add_parser("events", help=text, description=text, parents=[common])
    parser.add_argument("--follow", action="store_true", help="stay, and print events as they come")
    parser.add_argument("--since", metavar="SEQ", type=_sequence, help="only events after this number")
    parser.set_defaults(run=_events)


def _sequence(text: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is not a sequence number")
    return int(text)


def _events(args: argparse.Namespace) -> int:
    client, terminal = arguments.connect(args), Terminal.of(args)
    if args.follow:
        _follow(client, terminal, args.since)
    else:
        _replay(client, terminal, args.since or 0)
    return EXIT_OK


def _replay(client: Client, terminal: Terminal, since: int) -> None:
    asked = datetime.now(UTC)
    try:
        for event in client.events({"since": since}, silence=END_OF_LOG):
            if event.type != RESYNC and (not event.id or _time(_body(event)) > asked):
                return  # it happened after we asked, so the log has been printed
            _print(terminal, event)
    except TimeoutError:
        return


def _follow(client: Client, terminal: Terminal, since: int | None) -> None:
    """Without `since` only what comes from now on; after a break, all that came meanwhile."""
    last = since
    lost = None
    while True:
        try:
            for event in client.events({"since": last}, silence=STREAM_SILENCE):
                lost = None
                last = int(event.id) if event.id.isdecimal() else last
                _print(terminal, event)
            problem = CliError("unreachable", "the agent ended the event stream")
        except TimeoutError:
            problem = CliError("unreachable", f"the agent was silent for {STREAM_SILENCE:g} s")
        except CliError as error:
            if error.code not in ("unreachable", "unavailable"):
                raise
            problem = error
        lost = time.monotonic() if lost is None else lost
        if time.monotonic() - lost > PATIENCE:
            raise problem
        time.sleep(RETRY_PAUSE)


def _print(terminal: Terminal, event: StreamEvent) -> None:
    body = _body(event)
    if event.type == RESYNC:
        remark(f"the log has no more what was before number {body.get('from', '?')}: read the objects anew")
    elif terminal.json:
        print(json.dumps(body), flush=True)
    else:
        _print_line(terminal, event, body)


def _print_line(terminal: Terminal, event: StreamEvent, body: Json) -> None:
    data = body.get("data") or {}
    kind = str(body.get("type", event.type)).removeprefix("org.hostagent.").removesuffix(".v1")
    time_of_day = f"{_time(body).astimezone():%H:%M:%S}"
    subject = str(body.get("subject") or "")
    words = [f"{event.id or '·':>6}", time_of_day, f"{kind:<17}", subject if subject != data.get("path") else ""]
    describe = _DETAILS.get(kind.partition(".")[0])
    if describe is not None:
        words.append(describe(data))
    terminal.line("  ".join(word for word in words if word), kind.rpartition(".")[2])


def _job(data: Json) -> str:
    words = [str(data.get("path") or "")]
    if data.get("end"):
        words.append(f"{data.get('cur', 0)}/{data['end']}")
    if data.get("status"):
        words.append(str(data["status"]) + (f" ({data['reason']})" if data.get("reason") else ""))
    error = data.get("error") or {}
    return "  ".join([*words, *([str(error["message"])] if error.get("message") else [])])


def _file(data: Json) -> str:
    return "  ".join(str(data[key]) for key in ("path", "mode", "trigger", "reason") if data.get(key))


def _export(data: Json) -> str:
    return "  ".join(str(data[key]) for key in ("path", "uri", "reason") if data.get(key))


def _host(data: Json) -> str:
    return str(data.get("reason") or "")


_DETAILS: dict[str, Callable[[Json], str]] = {"job": _job, "grant": _file, "export": _export, "host": _host}


def _body(event: StreamEvent) -> Json:
    try:
        body = json.loads(event.data)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _time(body: Json) -> datetime:
    try:
        return datetime.fromisoformat(str(body.get("time"))).astimezone(UTC)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
