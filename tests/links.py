"""Symbolic links that the kernel does not read, as it does not for those of other users' processes in /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def no_link(monkeypatch: pytest.MonkeyPatch, link: Path, kernel: int) -> None:
    """Let readlink(2) of `link` fail with the errno `kernel`."""
    real = os.readlink

    def readlink(path: Any, *, dir_fd: int | None = None) -> Any:
        if dir_fd is None and os.fspath(path) == str(link):
            raise OSError(kernel, os.strerror(kernel), str(link))
        return real(path, dir_fd=dir_fd)

    monkeypatch.setattr("os.readlink", readlink)
