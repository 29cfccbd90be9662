"""Moves images between local files and data daemons (`hostagent data`, ovirt-imageio): the library behind the commands.

    from hostagent import client

    client.upload(client.Upload("disk.qcow2", "https://host:54322/images/ID"), client.Options())
    client.download(client.Download("https://host:54322/images/ID", "disk.raw"), client.Options(workers=2))
    client.checksum("disk.qcow2", client.Options())           # the same for every format
    client.checksum("https://host:54322/images/ID", client.Options())
    client.extents("https://host:54322/images/ID", client.Options())
    client.info("https://host:54322/images/ID", client.Options())

Blocking, with threads of its own; all raise AgentError, with a code and a remedy. Ctrl-C in the calling thread ends a
transfer, and leaves its journal. A ticket's id is in no error, no remark and no journal.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from hostagent.client.address import is_url
from hostagent.client.checksum import Checksum, local_checksum, remote_checksum
from hostagent.client.download import Download, download
from hostagent.client.extents import Extent
from hostagent.client.local import open_image
from hostagent.client.options import Options, Patience, Storage, Tls
from hostagent.client.progress import Progress, Show, Tell, nobody
from hostagent.client.remote import Remote
from hostagent.client.result import Result
from hostagent.client.server import ask, contact, read_extents, size_of
from hostagent.client.upload import Upload, upload
from hostagent.extents import clipped

__all__ = [
    "Checksum", "Download", "Extent", "Options", "Patience", "Progress", "Result", "Storage", "Tls", "Upload",
    "checksum", "download", "extents", "info", "upload",
]  # fmt: skip


def checksum(
    where: str, options: Options, *, format: str | None = None, show: Show = nobody, tell: Tell = nobody
) -> Checksum:
    """Of a local image, or as the server of a ticket's URL computes it."""
    if is_url(where):
        server = contact(where, options, tell)
        return ask(server, lambda remote: remote_checksum(server, remote), tell)
    with open_image(where, format, options.storage) as (image, layers):
        size = image.size
        found = local_checksum(
            image, size, options, lambda done: show(Progress("running", done, size)), threading.Event()
        )
        layers.refuse_change()
    return found


def extents(
    url: str,
    options: Options,
    *,
    dirty: bool = False,
    start: int = 0,
    length: int | None = None,
    tell: Tell = nobody,
) -> Iterable[Extent]:
    """What the server says that the image has where, in order; `dirty`: and what has changed since its bitmap."""
    server = contact(url, options, tell)
    found = ask(server, lambda remote: read_extents(remote, server, dirty=dirty, start=start, length=length), tell)
    return clipped(found, start, found.size if length is None else start + length)


def info(url: str, options: Options, *, tell: Tell = nobody) -> dict[str, object]:
    """What the server can do with the image, and its size (None where it does not tell)."""
    server = contact(url, options, tell)
    features = server.features

    def look(remote: Remote) -> int | None:
        whole = read_extents(remote, server, dirty=False) if features.extents and features.size is None else None
        return size_of(server, remote, whole)

    size = ask(server, look, tell)
    return {
        "server": str(server.dial.addresses[0]),
        "size": size,
        "writable": features.writable,
        "features": [name for name in ("checksum", "extents", "flush", "zero") if getattr(features, name)],
        "max_readers": features.readers,
        "max_writers": features.writers,
        "etag": features.etag,
    }
