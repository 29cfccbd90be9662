"""A data daemon for tests, with its own folder, port and sockets: ours, or ovirt-imageio's from PyPI.

    with Ours(tmp_path) as daemon:
        ticket = daemon.ticket(f"file://{image}", size)
        with daemon.tcp() as wire:
            reply = wire.ask("GET", f"/images/{ticket}")

The other one is there so that the tests of the dialect are known to describe it, and for the figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.data.pki import Pki
from tests.data.wire import Reply, Wire, tcp, unix
from tests.harness import start_ours
from tests.zygote import Spawned

START = 20.0
STOP = 20.0
BIN = Path(sys.executable).parent


class Daemon(ABC):
    """`tls`: the port speaks TLS, with the server's certificate of that authority. `settings` are the daemon's own."""

    name: str
    remote_scheme: str

    def __init__(
        self, folder: Path, *, tls: Pki | None = None, settings: Mapping[str, Any] | None = None, log: bool = True
    ) -> None:
        self.folder = folder
        self.pki = tls
        self.settings = dict(settings or {})
        # Socket names have 107 bytes, and pytest's folders are deep.
        self.runtime = Path(tempfile.mkdtemp(prefix="hd-"))
        self.runtime.chmod(0o755)
        self.control_path = str(self.runtime / "control.sock")
        self.local_path = str(self.runtime / "local.sock")
        self.port = free_port()
        self.log = folder / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | Spawned | None = None

    def __enter__(self) -> Daemon:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Process

    @abstractmethod
    def spawn(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | Spawned:
        """Start it, once its files of configuration are written."""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HOSTAGENT_")}
        self.process = self.spawn(environment)
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError), self.control(), Wire(tcp(self.port)):
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.name} is not ready: {self.log.read_text()[-3000:]}")

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(STOP)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        if self.process is not None and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.runtime, ignore_errors=True)

    # Connections

    def tcp(self, *, receive_buffer: int = 0) -> Wire:
        """As its clients connect: with TLS where it has that."""
        connection = tcp(self.port, receive_buffer=receive_buffer)
        return Wire(self.pki.context().wrap_socket(connection, server_hostname="127.0.0.1") if self.pki else connection)

    def raw(self) -> socket.socket:
        return tcp(self.port)

    def tls(self, context: ssl.SSLContext) -> Wire:
        return Wire(context.wrap_socket(tcp(self.port), server_hostname="127.0.0.1"))

    def local(self) -> Wire:
        return Wire(unix(self.local_path))

    def control(self) -> Wire:
        return Wire(unix(self.control_path))

    def url(self, ticket: str) -> str:
        return f"{'https' if self.pki else 'http'}://127.0.0.1:{self.port}/images/{ticket}"

    @property
    def cafile(self) -> str | None:
        return str(self.pki.ca) if self.pki else None

    # Tickets

    def put(self, ticket: Mapping[str, Any]) -> Reply:
        with self.control() as wire:
            return wire.ask_json("PUT", f"/tickets/{ticket['uuid']}", ticket)

    def ticket(self, url: str, size: int, *ops: str, **more: Any) -> str:
        """The id of a new one, that may read unless `ops` says otherwise."""
        ticket = {"uuid": str(uuid.uuid4()), "url": url, "size": size, "ops": list(ops) or ["read"], "timeout": 300}
        reply = self.put(ticket | more)
        assert reply.status in (200, 201), reply
        return str((ticket | more)["uuid"])

    def show(self, ticket: str) -> Any:
        with self.control() as wire:
            reply = wire.ask("GET", f"/tickets/{ticket}")
            assert reply.status == 200, reply
            return json.loads(reply.body)

    def delete(self, ticket: str) -> Reply:
        with self.control() as wire:
            return wire.ask("DELETE", f"/tickets/{ticket}")


class Ours(Daemon):
    """`settings`: those of the configuration's section [data]."""

    name = "ours"
    level = "info"

    def spawn(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | Spawned:
        settings: dict[str, Any] = {"listen": "127.0.0.1", "port": self.port}
        if self.pki:
            settings |= {"cert": str(self.pki.server.cert), "key": str(self.pki.server.key)}
        settings |= {"control_socket": self.control_path, "local_socket": self.local_path, "allow_paths": ["/"]}
        settings |= self.settings
        file = self.folder / "hostagent.toml"
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        file.write_text("".join(["[data]\n", *lines, f'[logs]\nlevel = "{self.level}"\n']))
        return start_ours(["data", "--config", str(file)], environment=environment, log=self.log)


class Imageio(Daemon):
    """`settings`: {"section": {"key": value}}."""

    name = "imageio"

    def spawn(self, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        pki = self.pki
        tls = {"enable": "false"}
        if pki:
            tls = {"enable": "true", "key_file": pki.server.key, "cert_file": pki.server.cert, "ca_file": pki.ca}
        sections: dict[str, dict[str, Any]] = {
            "daemon": {
                "run_dir": self.runtime,
                "drop_privileges": "false",
                "systemd_enable": "false",
                "poll_interval": 0.1,
            },
            "tls": tls,
            "remote": {"host": "127.0.0.1", "port": self.port},
            "local": {"enable": "true", "socket": self.local_path},
            "control": {"transport": "unix", "socket": self.control_path, "remove_timeout": 2},
            "profile": {"filename": self.runtime / "profile"},
            "handlers": {"keys": "stderr"},
            "logger_root": {"handlers": "stderr", "level": "INFO"},
        }
        for section, values in self.settings.items():
            sections.setdefault(section, {}).update(values)
        folder = self.folder / "imageio" / "conf.d"
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for section, values in sections.items():
            lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items()), ""]
        (folder / "test.conf").write_text("\n".join(lines))
        command = [str(BIN / "ovirt-imageio"), "-c", str(folder.parent)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )


def free_port() -> int:
    """A port that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
