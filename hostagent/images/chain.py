"""Backing chains: which files an image stands on, found without trusting the image.

The walk goes from the top down. Each member is opened by hostagent.images.member, which judges where it lies before any
byte of it is read; its format is said by the request or by the overlay's header, never guessed; and it must not stand
in the chain already. What comes back are open descriptors and identities (device, inode): later steps use those, never
the path, and `verify` compares two looks at a chain by them. All calls block: use a thread.
"""

from __future__ import annotations

import os
import shlex
import stat
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hostagent.images.header import Qcow2Header, is_plain, read_header, shown
from hostagent.images.member import ChainLimits, Wanted, changed, open_member
from jobs.errors import JobError
from jobs.model import Chain, FileId, Layer

PATH_MAX = 4096  # the kernel's own limit
FORMATS = ("raw", "qcow2")

__all__ = ["ChainLimits", "OpenChain", "open_chain", "verify"]


@dataclass(frozen=True, slots=True)
class _Member:
    fd: int
    layer: Layer
    header: Qcow2Header | None


class OpenChain:
    """A chain whose files are open for reading; `fds` and `headers` stand beside `chain.layers`. Close it."""

    def __init__(self, members: tuple[_Member, ...]) -> None:
        self.chain = Chain(tuple(member.layer for member in members))
        self.headers = tuple(member.header for member in members)
        self._fds = tuple(member.fd for member in members)
        self._turn = threading.Lock()

    @property
    def fds(self) -> tuple[int, ...]:
        if not self._fds:
            raise ValueError("the chain is closed")
        return self._fds

    def keep(self, files: Collection[FileId]) -> None:
        """Close the layers that are not among `files`, and forget them first: threads may do so at one time, as when a
        storage daemon dies while its chain changes, and a number that is closed twice is by then somebody else's."""
        with self._turn:
            members = list(zip(self.chain.layers, self.headers, self._fds, strict=True))
            gone = [fd for layer, _, fd in members if layer.file not in files]
            members = [member for member in members if member[0].file in files]
            self.chain = Chain(tuple(layer for layer, _, _ in members))
            self.headers = tuple(header for _, header, _ in members)
            self._fds = tuple(fd for _, _, fd in members)
        for fd in gone:
            os.close(fd)

    def put_on_top(self, layer: Layer, fd: int) -> None:
        """A layer that came to stand on the chain; `fd` is taken over."""
        with self._turn:
            self.chain = Chain((layer, *self.chain.layers))
            self.headers = (None, *self.headers)
            self._fds = (fd, *self._fds)

    def close(self) -> None:
        with self._turn:
            fds, self._fds = self._fds, ()
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> OpenChain:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_chain(path: str, *, limits: ChainLimits, format: str | None = None) -> OpenChain:
    """Open the image at `path` and all that it stands on; `format` None accepts a qcow2 image only."""
    _check_request(path, format)
    members: list[_Member] = []
    try:
        wanted: Wanted | None = Wanted(path, format)
        while wanted is not None:
            member = _open(wanted, limits)
            members.append(member)
            _refuse_loop(members)
            wanted = _below(member)
            if wanted is not None and len(members) >= limits.max_depth:
                raise _too_deep(members[0], limits.max_depth)
    except BaseException:
        for member in members:
            os.close(member.fd)
        raise
    return OpenChain(tuple(members))


def verify(opened: OpenChain, earlier: Chain) -> None:
    """Raise `image_changed`, naming what changed, unless the chain is what it was: files, formats, sizes, links."""
    now, was = opened.chain.layers, earlier.layers
    for new, old in zip(now, was, strict=False):
        for name, words in _COMPARED:
            before, after = getattr(old, name), getattr(new, name)
            if before != after:
                raise changed(old.path, f"{words} was {_plain(before)} and is {_plain(after)}")
        if new.length < old.length:
            raise changed(old.path, f"it has {new.length} bytes and had {old.length}: what lay beyond is lost")
    if len(now) != len(was):
        raise changed(earlier.top.path, f"the chain had {len(was)} layers and has {len(now)}")


_COMPARED = (
    ("file", "the file behind the path (device:inode)"),
    ("format", "the format"),
    ("virtual_size", "the virtual size"),
    ("backing", "the backing file"),
)


def _check_request(path: str, format: str | None) -> None:
    if not is_plain(path) or not path.startswith("/"):
        reason = "is not an absolute path" if is_plain(path) else "contains control characters"
        remedy = "give the absolute path of the image file"
        raise JobError("invalid", f"{shown(path)} {reason}", field="path", value=path, remedy=remedy)
    if len(os.fsencode(path)) >= PATH_MAX:
        raise JobError("invalid", f"the path {shown(path)} is longer than {PATH_MAX - 1} bytes", field="path")
    if format not in (None, *FORMATS):
        message = f"the format {shown(format or '')} is not supported; raw and qcow2 are"
        raise JobError("not_supported", message, field="format", value=format)


def _open(wanted: Wanted, limits: ChainLimits) -> _Member:
    fd, path = open_member(wanted, limits)
    try:
        return _describe(fd, path, wanted)
    except BaseException:
        os.close(fd)
        raise


def _describe(fd: int, path: str, wanted: Wanted) -> _Member:
    header = None if wanted.format == "raw" else _qcow2(fd, path, wanted)
    found = os.fstat(fd)
    device = stat.S_ISBLK(found.st_mode)
    length = os.lseek(fd, 0, os.SEEK_END) if device else found.st_size
    layer = Layer(
        path=path,
        format="raw" if header is None else "qcow2",
        file=FileId(found.st_dev, found.st_ino),
        virtual_size=length if header is None else header.virtual_size,
        # st_blocks counts 512 bytes whatever the file system's block is; of a device nobody knows
        allocated=length if device else found.st_blocks * 512,
        backing=None if header is None else header.backing,
        device=device,
        length=length,
    )
    return _Member(fd, layer, header)


def _qcow2(fd: int, path: str, wanted: Wanted) -> Qcow2Header:
    header = read_header(fd)
    if header is None and wanted.format is None:
        remedy = "say --format raw if it is one: raw is never guessed"
        raise JobError("invalid", f"{path} is not a qcow2 image", field="format", value=path, remedy=remedy)
    if header is None:
        who = f"{wanted.overlay.path} says" if wanted.overlay else "the request says"
        remedy = "correct the format, or restore the image from a copy"
        raise JobError("image_invalid", f"{path} is not a qcow2 image, and {who} it is", remedy=remedy, value=path)
    if header.corrupt:
        remedy = f"qemu-img check -r all {shlex.quote(path)}, twice: the mark goes with the second run"
        raise JobError("image_corrupt", f"{path} is marked corrupt", remedy=remedy, value=path)
    if header.has_data_file or header.encrypted:
        what = "an external data file" if header.has_data_file else "encryption"
        remedy = "convert it into a plain qcow2 image with qemu-img convert"
        raise JobError("not_supported", f"{path} uses {what}, not supported yet", remedy=remedy, value=path)
    return header


def _below(member: _Member) -> Wanted | None:
    """What the member stands on, by its header; a relative name starts at the member's own folder, as in QEMU."""
    layer, header = member.layer, member.header
    if header is None or header.backing is None:
        return None
    if header.backing_format is None:
        names = f"-b {shlex.quote(header.backing)} {shlex.quote(layer.path)}"
        remedy = f"say the format that it truly has: qemu-img rebase -u -f qcow2 -F FORMAT {names}"
        message = f"{layer.path} does not say which format its backing file {header.backing} has"
        raise JobError("image_invalid", message, remedy=remedy, value=layer.path)
    if header.backing_format not in FORMATS:
        kind = shown(header.backing_format)
        message = f"{layer.path} stands on an image of format {kind}; raw and qcow2 are supported"
        raise JobError("not_supported", message, value=header.backing_format)
    return Wanted(str(Path(layer.path).parent / header.backing), header.backing_format, layer)


def _refuse_loop(members: list[_Member]) -> None:
    last, above = members[-1].layer, members[:-1]
    if any(member.layer.file == last.file for member in above):
        by = above[-1].layer.path
        remedy = "restore the right backing file with qemu-img rebase -u"
        raise JobError("chain_loop", f"{by} stands on {last.path}, which stands on {by}", remedy=remedy, value=by)


def _too_deep(top: _Member, depth: int) -> JobError:
    remedy = "shorten it with a commit, or raise images.max_depth"
    message = f"the chain of {top.layer.path} has more than {depth} layers"
    return JobError("chain_too_deep", message, remedy=remedy, value=top.layer.path)


def _plain(value: object) -> str:
    return "nothing" if value is None else str(value)
