from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hostagent import client
from tests.client import images
from tests.data.daemons import Daemon, Imageio, Ours
from tests.data.pki import Pki
from tests.harness import ensure_user

HOSTAGENT = [sys.executable, "-m", "hostagent.cli.main"]


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module", params=[Ours, Imageio], ids=["ours", "imageio"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pki: Pki) -> Iterator[Daemon]:
    """With TLS, as the remote one is."""
    with request.param(tmp_path_factory.mktemp("daemon"), tls=pki) as process:
        yield process


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that are only read."""
    folder = tmp_path_factory.mktemp("images")
    images.sparse(folder / "disk.raw")
    images.chain(folder)
    return folder


@pytest.fixture(scope="session")
def storage() -> client.Storage:
    """As root, storage daemons run as a user of the tests."""
    return client.Storage(user=ensure_user() or "")


@pytest.fixture
def options(storage: client.Storage, daemon: Daemon) -> client.Options:
    return replace(client.Options(storage=storage), tls=client.Tls(cafile=daemon.cafile or ""))


@pytest.fixture
def start(storage: client.Storage) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The command line, as a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOSTAGENT_")}
    if storage.user:
        environment["HOSTAGENT_QSD_USER"] = storage.user
    started: list[subprocess.Popen[str]] = []

    def command(*words: object) -> subprocess.Popen[str]:
        argv = [*HOSTAGENT, *(str(word) for word in words)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(argv, text=True, env=environment, **pipes))  # type: ignore[call-overload]
        return started[-1]

    yield command
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
