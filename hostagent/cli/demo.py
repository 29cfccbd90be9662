"""`hostagent demo`: the main job, shown on a real storage daemon in about a minute.

It works as a user does: with `hostagent …` on the command line and the tools that everybody has. Each line that starts
with `$` is a command that is run as it stands there. Each line with `✓` was tried, not assumed; the first that does not
hold ends the demonstration with exit status 1. Nothing stays behind, however it ends, but for `--keep`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hostagent.cli import arguments
from hostagent.cli.client import CliError, Json
from hostagent.errors import EXIT_JOB_FAILED, EXIT_OK
from hostagent.sizes import format_size

if TYPE_CHECKING:
    from types import FrameType

    from hostagent.cli.demo_stage import Stage

SIZE = 1 << 30
SMALLEST = 16 << 20  # bytes; below it an increment is less than a request of 1 MiB
ROOM = 3  # times the size: base, overlay, copy, download and upload, each half holes, and some air
PACE = 8  # seconds that a whole pull would take at the demonstration's bandwidth
INCREMENTS = 16  # of a whole pull
PULL_TIMEOUT = 60.0  # seconds until a pull is half-way: at its pace 4, on a busy machine some more
AWAY = 1.5  # seconds that the agent stays dead, long enough to see that nobody misses it


def register(nouns: Any, common: argparse.ArgumentParser) -> None:
    text = "show it at work on a real storage daemon, in a folder of its own"
    parser = nouns.add_parser("demo", help=text, description=text, parents=[common])
    parser.add_argument("--keep", action="store_true", help="leave the agent running, and say how to talk to it")
    parser.add_argument("--size", metavar="SIZE", type=arguments.size, default=SIZE, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from hostagent.cli.demo_stage import Stage

    size = max(args.size, SMALLEST)
    console = Console(highlight=False, markup=False, emoji=False, no_color=args.no_color or None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    began = time.monotonic()
    folder = _folder(size)
    stage = Stage(folder, console)
    try:
        _play(stage, size)
        if args.keep:
            _hand_over(stage)
            return EXIT_OK
        stage.heading("Clean up")
    except BaseException as problem:  # whatever it is, an interrupt too: first clean up
        if isinstance(problem, CliError):
            stage.last_words()
        stage.close()
        if isinstance(problem, OSError):
            raise CliError("io_error", f"the demonstration cannot go on: {problem}") from problem
        raise
    stage.close()
    stage.say(f"the agent, its storage daemon and {folder} are gone; {time.monotonic() - began:.0f} s in all", "green")
    return EXIT_OK


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def _folder(size: int) -> Path:
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    if free < size * ROOM:
        raise CliError(
            "no_space",
            f"{place} has {format_size(free)} free; the demonstration needs {format_size(size * ROOM)}",
            remedy="make space, or name a folder that has it: TMPDIR=/var/tmp hostagent demo",
        )
    return Path(tempfile.mkdtemp(prefix="hostagent-demo-", dir=place))


def _play(stage: Stage, size: int) -> None:
    _introduce(stage)
    checksum = _make_images(stage, size)
    _start_agent(stage)
    export = _export(stage, checksum)
    _abort_half_way(stage, size)
    _pull_on(stage, size, export)
    _prove(stage, export, checksum)
    _move(stage, size, checksum)


def _introduce(stage: Stage) -> None:
    stage.heading("A pull from end to end")
    stage.say(
        "A guest's disk is an overlay on a base image. A pull copies into the overlay what it needs from the base,\n"
        "while clients read it. When the chain proves that the base is no longer needed, access to it is taken back."
    )
    if stage.user:
        stage.say(f"As root: storage daemons run as the user {stage.user}, which gets each file by an ACL.")
    else:
        stage.say("Without root: storage daemons run as you. Nothing is granted, and no file's mode is touched.")
    stage.say(f"$ cd {stage.folder}", "bold")
    stage.prepare()


def _make_images(stage: Stage, size: int) -> str:
    """The copy's checksum: what the overlay must read as, whatever happens to it."""
    from hostagent.cli.demo_images import make_base, own_data

    stage.heading("1  A base image, and an overlay on it")
    make_base(stage.folder / "base.raw", size)
    stage.say(f"base.raw: {format_size(size)}, mode 0600; a quarter random, a quarter text, the rest holes", "dim")
    stage.run("qemu-img create -q -f qcow2 -b base.raw -F raw disk.qcow2 && chmod 0600 disk.qcow2")
    writes = [f'-c "{write}"' for write in own_data(size)]
    stage.run(f"qemu-io {' '.join(writes)} disk.qcow2")
    stage.run("ls -lsh base.raw disk.qcow2")
    stage.run("hostagent image inspect ./disk.qcow2")
    stage.say("An independent copy, to compare everything with:", "dim")
    stage.run("qemu-img convert -O raw disk.qcow2 copy.raw")
    return stage.output("sha256sum <copy.raw")


def _start_agent(stage: Stage) -> None:
    stage.heading("2  The agent")
    stage.start_agent()
    stage.say(f"$ export HOSTAGENT_SOCKET={stage.socket}", "bold")
    stage.run("hostagent status")


def _export(stage: Stage, checksum: str) -> Json:
    stage.heading("3  The overlay over NBD, and a client that never stops reading")
    if stage.user:
        _try_to_read(stage, works=False)
    stage.run("hostagent export start ./disk.qcow2")
    export = stage.client.items("/v1/exports", {"state": "running"})[0]
    stage.name("URI", export["uri"])
    stage.name("EXPORT", export["uri"])
    stage.run("nbdinfo \"$URI\" | grep -E 'size:|read_only|base:|qemu:'")
    stage.held(stage.output('nbdcopy "$URI" - | sha256sum') == checksum, "the export reads like the copy")
    if stage.user:
        stage.run("getfacl -c base.raw")
        _try_to_read(stage, works=True)
    _show_descriptors(stage, export)
    stage.start_reader()
    stage.run("hostagent export list")
    return export


def _abort_half_way(stage: Stage, size: int) -> None:
    stage.heading("4  A pull, aborted half-way")
    stage.run("hostagent job pull ./disk.qcow2 --dry-run")
    stage.run(f"hostagent job pull ./disk.qcow2 --bandwidth {_bandwidth(size)}")
    job = stage.active_jobs()[0]
    watched = stage.follow(f"hostagent job watch {job['id']}")
    _until_at(stage, job, 0.5)
    stage.say("In another terminal:", "dim")
    stage.run(f"hostagent job abort {job['id']}")
    watched(EXIT_JOB_FAILED)
    stage.run("ls -lsh base.raw disk.qcow2")
    stage.held(stage.reading().total > 0, "the client reads on: the overlay is right at every moment")


def _pull_on(stage: Stage, size: int, export: Json) -> None:
    stage.heading("5  Pulled on with a cursor, and the agent killed in the middle")
    increment = f"{size // INCREMENTS >> 20}M"
    waited = stage.follow(
        f"hostagent job pull ./disk.qcow2 --increment {increment} --bandwidth {_bandwidth(size)} --wait"
    )
    job = stage.until("the job is there", lambda: next(iter(stage.active_jobs()), None), PULL_TIMEOUT)
    before = _until_at(stage, job, 0.75)
    assert stage.agent is not None
    pid = stage.agent.pid
    stage.kill_agent()
    stage.say(f"$ kill -9 {pid}   # the agent", "bold")
    read = stage.reading().total
    time.sleep(AWAY)
    stage.run(f"ps -o pid,user,etime,comm -p {export['pid']}   # its storage daemon goes on")
    more = stage.reading().total - read
    stage.held(more > 0, f"while the agent was dead, the client has read another {format_size(more)}")
    stage.start_agent()
    after = stage.client.get(f"/v1/jobs/{job['id']}").data["cursor"]["cur"]
    cursors = f"{_percent(before, size)}, then the kill, then {_percent(after, size)}"
    stage.held(after >= before, f"the job goes on from its cursor: {cursors}")
    waited(EXIT_OK)


def _prove(stage: Stage, export: Json, checksum: str) -> None:
    stage.heading("6  What is true now")
    stage.run("hostagent events | grep -E ' (job|grant)[.](started|cancelled|completed|revoked|kept) '")
    stage.run("hostagent image inspect ./disk.qcow2")
    _prove_revocation(stage, export)
    last = stage.reading()
    stage.stop_reader()
    read = f"the client read {format_size(last.total)} over one connection"
    stage.proved(f"{read}; all of it was right, and its slowest answer took {last.slowest} ms")
    stage.held(stage.output('nbdcopy "$URI" - | sha256sum') == checksum, "the export reads as it did before")
    stage.run("qemu-img compare copy.raw disk.qcow2")
    series = "block_jobs_finished_total|access_revocations_total|access_revocation_lag_seconds_(sum|count)|nbd_exports"
    stage.run(
        'curl -s --unix-socket "$HOSTAGENT_SOCKET" http://localhost/metrics'
        f" | grep -E '^hostagent_({series}|storage_daemons)' | grep -v ' 0[.]0$'"
    )


def _move(stage: Stage, size: int, checksum: str) -> None:
    stage.heading("7  Out over HTTP, and in again")
    stage.say("The data daemon may open no image: it has the export, and a ticket says who may read it.", "dim")
    _give_ticket(stage, "read", size, '"$EXPORT"')
    stage.run('hostagent download "$URL" ./down.raw --verify')
    stage.held(stage.output("sha256sum <down.raw") == checksum, "what came out is the copy")
    stage.run(_REVOKE)
    stage.run(f"qemu-img create -q -f qcow2 restored.qcow2 {size} && chmod 0600 restored.qcow2")
    stage.run("hostagent export start ./restored.qcow2 --writable")
    listed = stage.client.items("/v1/exports", {"state": "running"})
    writable = next(one for one in listed if one["image"].endswith("/restored.qcow2"))
    stage.name("EXPORT", writable["uri"])
    _give_ticket(stage, "write", size, '"$EXPORT"')
    stage.run('hostagent upload ./down.raw "$URL" --verify')
    stage.run(_REVOKE)
    stage.run(f"hostagent export stop {writable['id']}")
    stage.run("qemu-img compare copy.raw restored.qcow2")
    stage.run("ls -lsh down.raw restored.qcow2")


_CONTROL = "curl -sS --fail --unix-socket run/data-control.sock"
_REVOKE = f"{_CONTROL} -X DELETE http://localhost/tickets/$TICKET"


def _give_ticket(stage: Stage, op: str, size: int, url: str) -> None:
    """A name for it, and for where it is used."""
    stage.name("TICKET", str(uuid.uuid4()))
    fields = f'"ops": ["{op}"], "size": {size}, "timeout": 300, "sparse": true'
    body = f'\'{{"uuid": "\'$TICKET\'", {fields}, "url": "\'{url}\'"}}\''.replace('\\"', '"')
    stage.run(f"{_CONTROL} -X PUT http://localhost/tickets/$TICKET -d {body}")
    stage.name("URL", f"http+unix:///images/{stage.value('TICKET')}?socket={stage.folder}/run/data.sock")


def _prove_revocation(stage: Stage, export: Json) -> None:
    _show_descriptors(stage, export)
    reached = _reached(stage, export)
    stage.held("base.raw" not in reached, "the storage daemon has closed the base")
    stage.run("hostagent grant list")
    if stage.user:
        stage.run("getfacl -c base.raw")
        _try_to_read(stage, works=False)
        stage.proved(f"{stage.user} can no longer open the base")
    else:
        grants = stage.client.items("/v1/grants", {"path": str(stage.folder / "base.raw")})
        held = any(grant["holder"]["kind"] != "none" for grant in grants)
        stage.held(not held, "nobody holds the base in the ledger any more")
        stage.say("File modes were not touched: the storage daemon runs as you. As root, the ACL goes as well.", "dim")


def _show_descriptors(stage: Stage, export: Json) -> None:
    from hostagent.cli.demo_images import descriptors

    stage.say(f"What storage daemon {export['pid']} has open here (/proc/{export['pid']}/fdinfo):", "dim")
    for item in descriptors(export["pid"], stage.folder):
        stage.say(f"  {item.number:>3}  {item.name:<11}  {item.says}", "" if item.opens else "dim")


def _reached(stage: Stage, export: Json) -> set[str]:
    from hostagent.cli.demo_images import descriptors

    return {item.name for item in descriptors(export["pid"], stage.folder) if item.opens}


def _try_to_read(stage: Stage, *, works: bool) -> None:
    command = f"runuser -u {stage.user} -- head -c 0 base.raw"
    stage.run(f"{command} && echo {stage.user} can open it" if works else command, status=0 if works else 1)


def _until_at(stage: Stage, job: Json, part: float) -> int:
    """The cursor when a job has done this part. Without a terminal there is no bar, so that a line says it."""

    def look() -> int | None:
        found = stage.client.get(f"/v1/jobs/{job['id']}").data
        if found["state"] in ("completed", "failed", "aborted"):
            raise CliError("internal", f"job {job['id']} is {found['state']} before it was at {part:.0%}")
        cursor = found["cursor"]
        return int(cursor["cur"]) if cursor["cur"] >= part * cursor["end"] else None

    cur = stage.until(f"job {job['id']} is at {part:.0%}", look, PULL_TIMEOUT)
    if not sys.stderr.isatty():
        stage.say(f"… {_percent(cur, job['cursor']['end'])} pulled", "dim")
    return cur


def _bandwidth(size: int) -> str:
    return f"{size // PACE >> 20}MiB/s"


def _percent(cur: int, end: int) -> str:
    return f"{cur * 100 // end} %"


def _hand_over(stage: Stage) -> None:
    assert stage.agent is not None
    stage.heading("The agent runs on")
    stage.say("Talk to it:")
    stage.say(f"  export HOSTAGENT_SOCKET={stage.socket}", "bold")
    path = os.path.relpath(Path(sys.executable).parent / "hostagent")
    stage.say(f"  {path} status", "bold")
    stage.say("End it:")
    for export in stage.client.items("/v1/exports", {"state": "running"}):
        stage.say(f"  {path} export stop {export['id']}", "bold")
    stage.say(f"  kill {stage.agent.pid} && sleep 2 && rm -rf {stage.folder}", "bold")
    if stage.made_user:
        stage.say(f"  userdel {stage.user}", "bold")
