"""What the kernel says of a file, as AgentError."""

from __future__ import annotations

import errno
import os

from hostagent.errors import AgentError

_CODES: dict[int, tuple[str, str]] = {
    errno.ENOENT: ("not_found", "correct the path, or restore the file"),
    errno.ENOTDIR: ("not_found", "correct the path, or restore the file"),
    errno.EEXIST: ("conflict", "see who made it meanwhile"),
    errno.EACCES: ("denied", "let the data daemon's user open it, or hand it over as a descriptor"),
    errno.EPERM: ("denied", "let the data daemon's user open it; lsattr shows an immutable file"),
    errno.EROFS: ("denied", "mount the file system read-write"),
    errno.ELOOP: ("invalid", "untangle the symbolic links among its folders"),
    errno.ENAMETOOLONG: ("invalid", "use a shorter path"),
    errno.EBUSY: ("busy", "see lsblk: the device is mounted, or a part of another one"),
    errno.ETXTBSY: ("busy", "end the program that runs from it, or the swapping to it"),
    errno.ENOSPC: ("no_space", "make space on the image's file system"),
    errno.EDQUOT: ("no_space", "raise the quota on the image's file system"),
    errno.EFBIG: ("no_space", "the file system takes no file of that size: use another"),
    errno.EMFILE: ("limit", "raise the daemon's limit of open files (LimitNOFILE=)"),
    errno.ENFILE: ("limit", "raise the host's limit of open files (fs.file-max)"),
}


def fault(error: OSError, name: str, verb: str) -> AgentError:
    """`name` could not be `verb` (opened, read, written)."""
    code, remedy = _CODES.get(error.errno or 0, ("io_error", "see the kernel's log for the storage below it"))
    return AgentError(code, f"{name} cannot be {verb}: {os.strerror(error.errno or 0)}", value=name, remedy=remedy)
