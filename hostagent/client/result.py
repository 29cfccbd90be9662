"""What a transfer did, and what its two ends have in common."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from hostagent.client.checksum import Checksum, local_checksum, refuse_unknown, remote_checksum
from hostagent.client.local import Image
from hostagent.client.options import REQUEST_MOST, Options
from hostagent.client.progress import Progress, Show, Tell
from hostagent.client.remote import Remote
from hostagent.client.server import Server, ask
from hostagent.client.trouble import Replaced
from hostagent.errors import AgentError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Result:
    """Bytes: `size` of the image, `moved` over the wire, `zeroed` without, `resumed` that were durable before. `server`
    is where, without the ticket. `seconds` until all was durable, before it was verified."""

    operation: str
    path: str
    server: str
    size: int
    moved: int
    zeroed: int
    resumed: int
    retries: int
    workers: int
    seconds: float
    checksum: Checksum | None = None


def checked(options: Options) -> Options:
    """The options within their bounds; AgentError invalid names the one that is not."""
    bounds = {
        "workers": (1, 64),
        "request_size": (64 << 10, REQUEST_MOST),
        "flush_interval": (0.1, 3600),
        "restarts": (0, 100),
        "extents_most": (1, 100_000_000),
    }
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if not least <= value <= most:
            message = f"{name} is {value}; {least} to {most} are allowed"
            raise AgentError("invalid", message, field=name, value=value)
    refuse_unknown(options.algorithm, options.block_size)
    return options


def anew(run: Callable[[Options], T], options: Options, tell: Tell) -> T:
    """`run`; and again from the beginning when the server says that its image was replaced meanwhile."""
    for _ in range(options.restarts):
        try:
            return run(options)
        except Replaced as error:
            tell(f"{error.message}; starting over")
            options = dataclasses.replace(options, resume="never")
    return run(options)


def verified(server: Server, image: Image, size: int, show: Show, tell: Tell) -> Checksum:
    """Both sides' checksum, computed at the same time; AgentError mismatch when they differ."""
    stop, found, remotes = threading.Event(), list[Any](), list[Remote]()

    def theirs() -> None:
        try:
            found.append(
                ask(server, lambda remote: remote_checksum(server, remote), tell, stop=stop, watch=remotes.append)
            )
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asks for it
            found.append(error)

    asking = threading.Thread(target=theirs, name="remote-checksum", daemon=True)
    asking.start()
    try:
        done = _shown(show, size)
        ours = local_checksum(image, size, server.options, done, stop)
        while asking.is_alive():
            asking.join(0.25)
            done(size)
    finally:
        stop.set()
        for remote in remotes:
            remote.abort()
        asking.join(server.dial.patience.stop)
    if isinstance(found[0], BaseException):
        raise found[0]
    if found[0] != ours:
        raise AgentError(
            "mismatch",
            f"THE IMAGES DIFFER: the server's {ours.algorithm} checksum is {found[0].checksum}, the local one "
            f"{ours.checksum}",
            remedy="do not use the copy; see whether somebody else writes to either image, then copy it again",
        )
    return ours


def _shown(show: Show, size: int) -> Callable[[int], None]:
    last = [0.0]

    def done(number: int) -> None:
        if time.monotonic() - last[0] > 0.25:
            last[0] = time.monotonic()
            show(Progress("verifying", number, size))

    return done
