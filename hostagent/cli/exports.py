"""`hostagent export …`: images served over NBD."""

from __future__ import annotations

import argparse
import time
import uuid
from typing import Any

from hostagent.cli import arguments
from hostagent.cli.client import Client, CliError, Json, once, patient, quoted
from hostagent.cli.terminal import Column, Terminal, age, counted, remark
from hostagent.errors import EXIT_OK
from hostagent.sizes import format_duration, format_size

READY_WAIT = 30.0  # seconds that a new export may stay `starting`; the agent's own limit is shorter

COLUMNS = ("id", "image", "state", "mode", Column("clients", right=True), "uri", Column("age", right=True))


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    noun = nouns.add_parser("export", help="images served over NBD", parents=[common])
    verbs = noun.add_subparsers(dest="verb", metavar="VERB", required=True)
    _register_start(verbs, common)
    listing = verbs.add_parser("list", help="exports, present and past", parents=[common])
    listing.add_argument("--state", metavar="S", help="only those in this state")
    listing.add_argument("--target", metavar="T", type=arguments.target, help="only those of this image")
    listing.add_argument("--label", metavar="K=V", type=arguments.label, action="append", default=[], help="may repeat")
    listing.set_defaults(run=_list)
    show = verbs.add_parser("show", help="everything that is known of an export", parents=[common])
    show.set_defaults(run=_show)
    stop = verbs.add_parser("stop", help="end an export", parents=[common])
    stop.add_argument("--force", action="store_true", help="also while clients are connected")
    stop.set_defaults(run=_stop)
    for parser in (show, stop):
        parser.add_argument("id", metavar="ID", help="the export's id")


def _register_start(verbs: Any, common: argparse.ArgumentParser) -> None:
    text = "serve an image over NBD, read-only unless --writable"
    start = verbs.add_parser("start", help=text, description=text, parents=[common])
    start.add_argument("image", metavar="IMAGE", type=arguments.target, help="the image's path, or an NBD URI")
    start.add_argument("--format", choices=("raw", "qcow2"), help="say raw for raw: else the header decides")
    start.add_argument("--writable", action="store_true", help="clients may write; needs the image for itself")
    start.add_argument("--bitmap", metavar="NAME", action="append", default=[], help="a dirty bitmap; may repeat")
    start.add_argument("--shallow", action="store_true", help="only this layer, without its backing chain")
    start.add_argument("--offset", metavar="BYTES", type=arguments.size, help="of a raw image: only from here on")
    start.add_argument("--size", metavar="BYTES", type=arguments.size, help="of a raw image: only so many bytes")
    start.add_argument(
        "--max-clients", metavar="N", type=arguments.count, help="connections at a time; one more waits for its turn"
    )
    start.add_argument("--tcp", metavar="[HOST:]PORT|auto", help="over TCP instead of a unix socket; needs --tls")
    start.add_argument("--tls", choices=("x509", "psk"), help="with certificates of both sides, or with shared keys")
    start.add_argument("--ttl", metavar="S", type=arguments.seconds, help="end it after S seconds")
    start.add_argument(
        "--idle-timeout", metavar="S", type=arguments.seconds, help="end it S seconds after its last client"
    )
    start.add_argument("--label", metavar="K=V", type=arguments.label, action="append", default=[], help="may repeat")
    start.add_argument("--id", metavar="UUID", type=arguments.object_id, help="the export's id, for a safe retry")
    start.set_defaults(run=_start)


def _start(args: argparse.Namespace) -> int:
    client, terminal = arguments.connect(args), Terminal.of(args)
    request = _request(args)
    export = _when_ready(client, once(lambda: client.post("/v1/exports", request)))
    if terminal.json:
        terminal.data(export)
    else:
        terminal.line(f"export {export['id']} {export['state']}")
        terminal.fields([("uri", export["uri"])])
    if export["state"] in ("failed", "lost"):
        raise CliError("unavailable", f"the export did not start: {export.get('reason') or 'no reason was given'}")
    return EXIT_OK


def _request(args: argparse.Namespace) -> Json:
    body = {
        "id": args.id or str(uuid.uuid4()),  # chosen here, so that a lost answer does not make a second export
        "image": args.image,
        "format": args.format,
        "writable": args.writable or None,
        "shallow": args.shallow or None,
        "bitmaps": args.bitmap or None,
        "offset": args.offset,
        "size": args.size,
        "max_clients": args.max_clients,
        "tcp": args.tcp,
        "tls": args.tls,
        "ttl": args.ttl,
        "idle_timeout": args.idle_timeout,
        "labels": dict(args.label) or None,
    }
    return {key: value for key, value in body.items() if value is not None}


def _when_ready(client: Client, export: Json) -> Json:
    """The export once its URI can be connected to."""
    end = time.monotonic() + READY_WAIT
    address = f"/v1/exports/{quoted(export['id'])}"
    while export["state"] == "starting" and (left := end - time.monotonic()) > 0:
        revision = export.get("revision")
        export = patient(lambda: client.changed(address, revision=revision, wait=min(left, 1.0)))  # noqa: B023
    return export


def _list(args: argparse.Namespace) -> int:
    labels = [f"{key}={value}" for key, value in args.label]
    query = {"state": args.state, "target": args.target, "label": labels}
    exports = arguments.connect(args).items("/v1/exports", query)
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data({"items": exports})
    elif exports:
        terminal.table(COLUMNS, [row(export) for export in exports])
    else:
        remark("no exports")
    return EXIT_OK


def row(export: Json) -> tuple[str, ...]:
    return (
        str(export["id"]),
        _stands_on(export),
        str(export["state"]),
        _mode(export),
        str(len(export.get("clients") or [])),
        str(export["uri"]),
        age(export.get("created")),
    )


def _show(args: argparse.Namespace) -> int:
    export = arguments.connect(args).get(_address(args)).data
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data(export)
        return EXIT_OK
    terminal.heading(f"export {export['id']}")
    clients = [_client(client) for client in export.get("clients") or []]
    terminal.fields(
        [
            ("image", f"{_stands_on(export)} ({export['format']}, {format_size(export['size'])}{_part(export)})"),
            ("named", str(export["image"]) if export["image"] != _stands_on(export) else ""),
            ("state", str(export["state"])),
            ("reason", export.get("reason") or ""),
            ("mode", _mode(export)),
            ("uri", str(export["uri"])),
            ("clients", ", ".join(clients) or "none"),
            ("bitmaps", ", ".join(export.get("bitmaps") or [])),
            ("at most", counted(export["max_clients"], "client") if export.get("max_clients") else ""),
            ("created", f"{export['created']} ({age(export['created'])} ago)"),
            ("stopped", export.get("stopped") or ""),
            ("expires", export.get("expires") or ""),
            ("idle limit", format_duration(export["idle_timeout"]) if export.get("idle_timeout") else ""),
            ("daemon", f"pid {export['pid']}" if export.get("pid") else ""),
            ("labels", ", ".join(f"{key}={value}" for key, value in (export.get("labels") or {}).items())),
        ]
    )
    return EXIT_OK


def _stop(args: argparse.Namespace) -> int:
    export = arguments.connect(args).delete(_address(args), {"force": "true"} if args.force else None)
    terminal = Terminal.of(args)
    if terminal.json:
        terminal.data(export)
    else:
        terminal.line(f"export {export['id']} {export['state']}")
    return EXIT_OK


def _stands_on(export: Json) -> str:
    """The file that it shows: after a pivot not the one as which it was named."""
    return str(export.get("path") or export["image"])


def _mode(export: Json) -> str:
    return ("writable" if export.get("writable") else "read-only") + (", shallow" if export.get("shallow") else "")


def _client(client: Json) -> str:
    return f"{client['name']} (pid {client['pid']}, uid {client['uid']})" if client.get("pid") else str(client["name"])


def _part(export: Json) -> str:
    return f" at {export['offset']}" if export.get("offset") else ""


def _address(args: argparse.Namespace) -> str:
    return f"/v1/exports/{quoted(args.id)}"
