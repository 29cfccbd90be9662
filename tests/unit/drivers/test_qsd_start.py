"""A storage daemon that ends while it is being started: by itself, or because somebody killed it."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest

from hostagent.drivers.process import User
from hostagent.drivers.qsd import StorageDaemon
from hostagent.drivers.qsd_process import Places, Settings
from jobs.errors import JobError


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [("kill -9 $$", "storage_daemon_died", "killed by SIGKILL"), ("exit 3", "unavailable", "exit status 3")],
)
def test_a_daemon_that_ends_at_its_start_says_how(end: str, code: str, words: str) -> None:
    async def start(folder: Path) -> JobError:
        binary = folder / "daemon"
        binary.write_text(f"#!/bin/sh\n{end}\n")
        binary.chmod(0o755)
        settings = Settings(
            binary=str(binary),
            user=User.current(),
            connect_timeout=30.0,
            call_timeout=30.0,
            start_timeout=30.0,
            stop_timeout=30.0,
            flush_timeout=30.0,
            open_files=1024,
            max_connections=1,
        )
        places = Places(folder, folder / "qmp.sock", folder / "nbd.sock")
        daemon = StorageDaemon("d1", places, settings, on_event=lambda name, data: None, on_exit=lambda: None)
        with pytest.raises(JobError) as refused:
            await daemon.launch([])
        return refused.value

    with tempfile.TemporaryDirectory(prefix="t-") as short:  # socket names have 107 bytes
        error = asyncio.run(start(Path(short)))
    assert (error.code, words in error.message) == (code, True), error.message
