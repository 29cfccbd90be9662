"""After a reboot file systems may have other device numbers: files are found again by path and inode."""

from __future__ import annotations

import os
from dataclasses import replace

from hostagent.drivers import process
from hostagent.store import Store
from jobs.model import Chain, FileId


async def renumber(store: Store) -> None:
    """Bring what the store knows of files to the numbers of this boot; nothing when it is the one that it knows."""
    boot = process.boot_id()
    if await store.fact("boot_id") == boot:
        return
    found = {entry.file: _renumbered(entry.path, entry.file) for entry in await store.access_files()}
    await store.rekey({old: new for old, new in found.items() if new != old})
    for job in await store.unsettled():
        before, after = _renumbered_chain(job.before), _renumbered_chain(job.after)
        if before != job.before:
            await store.save(replace(job, before=before, after=after))
    await store.set_fact("boot_id", boot)


def _renumbered(path: str, file: FileId) -> FileId:
    """The file under the number that its device has now; as it was when it cannot be seen to be the same."""
    try:
        found = os.lstat(path)
    except OSError:
        return file
    return FileId(found.st_dev, found.st_ino) if found.st_ino == file.ino else file


def _renumbered_chain(chain: Chain) -> Chain:
    return Chain(tuple(replace(layer, file=_renumbered(layer.path, layer.file)) for layer in chain.layers))
