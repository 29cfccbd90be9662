"""A real agent for tests: its own folders, its own process, the API over its socket, images with real data.

    with AgentProcess(tmp_path) as agent:
        job = agent.post("/v1/jobs", {"operation": "pull", "target": str(overlay)})
        job = agent.until_ended(job["id"])

Everything that it starts ends with it: the agent by SIGTERM, storage daemons by the agent or by pid.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.zygote import Spawned, Zygote

Json = dict[str, Any]

TEST_USER = "hostagent-test"
"""As root, storage daemons run as this user, which the tests make."""
MIB = 1 << 20


zygote: Zygote | None = None
"""Where processes of ours are forked from; None where they begin as users' do. The tests' conftest makes it."""


def start_ours(
    arguments: Sequence[str], *, environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes] | Spawned:
    """`hostagent ARGUMENTS` in the background."""
    if zygote is not None and zygote.began_like(environment):
        return zygote.spawn(arguments, environment=environment, log=log)
    command = [sys.executable, "-m", "hostagent.cli.main", *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


class ApiError(Exception):
    def __init__(self, status: int, body: Json) -> None:
        super().__init__(f"{status} {body.get('code')}: {body.get('detail')}")
        self.status = status
        self.body = body
        self.code = body.get("code")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ensure_user() -> str | None:
    """The user that storage daemons run as: made when we are root, None (ourselves) otherwise."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(TEST_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", TEST_USER]
        subprocess.run(command, check=True, capture_output=True)
    return TEST_USER


class AgentProcess:
    """An agent with its state and sockets in short-lived folders. `settings` are HOSTAGENT_SECTION_KEY values."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.state = folder / "state"
        # Socket names have 107 bytes, and pytest's folders are deep.
        self.runtime = Path(tempfile.mkdtemp(prefix="ha-"))
        self.runtime.chmod(0o755)
        self.socket = self.runtime / "hostagent.sock"
        self.log = folder / "agent.log"
        self.user = ensure_user()
        # Not the host's libvirt or bus: they are none of a test's business. No data daemon where nothing is moved.
        quiet = {"LIBVIRT_URI": "", "DBUS_ADDRESS": "off", "DATA_START": "false"}
        self.settings = {"LOGS_FORMAT": "json", **quiet, **(settings or {})}
        self.process: subprocess.Popen[bytes] | Spawned | None = None

    def __enter__(self) -> AgentProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Process

    def start(self, timeout: float = 20.0) -> None:
        arguments = ["serve", "--state-dir", str(self.state), "--runtime-dir", str(self.runtime)]
        if self.user:
            arguments += ["--hypervisor-user", self.user]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HOSTAGENT_")} | {
            f"HOSTAGENT_{key}": value for key, value in self.settings.items()
        }
        self.process = start_ours(arguments, environment=environment, log=self.log)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the agent ended: {self.log.read_text()[-2000:]}")
            with contextlib.suppress(OSError, http.client.HTTPException, ApiError):
                self.get("/healthz", timeout=2)
                return
            time.sleep(0.02)
        raise AssertionError(f"the agent is not ready: {self.log.read_text()[-2000:]}")

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(20)
        self.process = None
        return status

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)
        self.process = None

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
        for pid in self.daemons():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.runtime, ignore_errors=True)

    def daemons(self) -> list[int]:
        """Pids of this agent's storage daemons, by the folders that its runtime directory has or had."""
        ids = {path.name for path in (self.runtime / "qsd").glob("*")}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().decode(errors="replace")
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state not in "ZX" and any(f"id=hostagent-{i}," in line for i in ids):
                        found.append(int(entry.name))
        return found

    # API

    def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 30
    ) -> tuple[int, Mapping[str, str], Any]:
        connection = _Connection(str(self.socket), timeout)
        try:
            data = None if body is None else json.dumps(body).encode()
            sent = {"Content-Type": "application/json", **(headers or {})} if data is not None else dict(headers or {})
            connection.request(method, path, body=data, headers=sent)
            reply = connection.getresponse()
            raw = reply.read()
            kind = reply.headers.get("Content-Type", "")
            value = json.loads(raw) if raw and "json" in kind else raw.decode()
            return reply.status, dict(reply.headers), value
        finally:
            connection.close()

    def _ok(self, method: str, path: str, body: Any = None, timeout: float = 30) -> Any:
        status, _, value = self.call(method, path, body, timeout=timeout)
        if status >= 400:
            raise ApiError(status, value if isinstance(value, dict) else {"detail": value})
        return value

    def get(self, path: str, timeout: float = 30) -> Any:
        return self._ok("GET", path, timeout=timeout)

    def post(self, path: str, body: Any = None, timeout: float = 60) -> Any:
        return self._ok("POST", path, {} if body is None else body, timeout=timeout)

    def patch(self, path: str, body: Any) -> Any:
        return self._ok("PATCH", path, body)

    def delete(self, path: str) -> Any:
        return self._ok("DELETE", path)

    # Shortcuts

    def pull(self, target: Path, **spec: Any) -> Json:
        job: Json = self.post("/v1/jobs", {"operation": "pull", "target": str(target), **spec})
        return job

    def job(self, job_id: str) -> Json:
        job: Json = self.get(f"/v1/jobs/{job_id}")
        return job

    def until(self, job_id: str, done: Callable[[Json], bool], timeout: float = 60) -> Json:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if done(job):
                return job
            time.sleep(0.02)
        raise AssertionError(f"job {job_id} stays {self.job(job_id)}; log: {self.log.read_text()[-3000:]}")

    def until_ended(self, job_id: str, timeout: float = 60) -> Json:
        """The job when it is terminal and its revocation is not pending."""
        return self.until(
            job_id,
            lambda job: job["state"] in ("completed", "failed", "aborted") and job["revocation"] != "pending",
            timeout,
        )

    def export(self, image: Path, **spec: Any) -> Json:
        export: Json = self.post("/v1/exports", {"image": str(image), **spec})
        return export

    def events(self) -> list[Json]:
        """All events that are stored."""
        connection = _Connection(str(self.socket), 5)
        found: list[Json] = []
        try:
            connection.request("GET", "/v1/events", headers={"Last-Event-ID": "0"})
            reply = connection.getresponse()
            last = self.get("/v1/host")["store"]["events"]
            while not found or int(found[-1]["id"]) < last:
                line = reply.readline().decode().strip()
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    if event["id"].isdigit():
                        found.append(event)
                if last == 0:
                    break
        finally:
            connection.close()
        return found


# Images


def raw_image(path: Path, size: int, data: int | None = None, mode: int = 0o600) -> Path:
    """A raw image with `data` bytes of random content (default: all) at its start."""
    with path.open("wb") as image:
        left = size if data is None else data
        while left:
            left -= image.write(os.urandom(min(left, 16 * MIB)))
        image.truncate(size)
    path.chmod(mode)
    return path


def overlay(path: Path, base: Path, base_format: str = "raw", mode: int = 0o600, size: int | None = None) -> Path:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name if base.parent == path.parent else str(base)]
    command += ["-F", base_format, str(path)]
    subprocess.run([*command, str(size)] if size else command, check=True, capture_output=True)
    path.chmod(mode)
    return path


def same_content(one: Path, other: Path, *, running: bool = False, first: str | None = None) -> bool:
    """Whether two images have the same bytes (`running`: read past QEMU's locks; `first`: the format of `one`)."""
    command = ["qemu-img", "compare", *(["-U"] if running else []), *(["-f", first] if first else [])]
    command += [str(one), str(other)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


def check_clean(path: Path) -> bool:
    """Neither corruption nor leaked clusters: what an image is whose QEMU was not killed. One that was told to end may
    have it open for a moment."""
    deadline = time.monotonic() + 20
    while True:
        done = subprocess.run(["qemu-img", "check", str(path)], capture_output=True, text=True)
        if "lock" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return True


def sound(image: Path) -> bool:
    """No corruption. Leaked clusters are what a killed QEMU may leave: space that is lost, and no data."""
    command = ["qemu-img", "check", "-U", "--output=json", str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    result = json.loads(done.stdout)
    return not result.get("corruptions") and not result.get("check-errors")


def backing_of(path: Path) -> str | None:
    done = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", str(path)], capture_output=True, text=True, check=True
    )
    name: str | None = json.loads(done.stdout).get("backing-filename")
    return name


def user_can_read(path: Path, user: str) -> bool:
    """Whether `user` can open the file, tried as that user."""
    entry = pwd.getpwnam(user)
    done = subprocess.run(
        ["/usr/bin/python3", "-c", "import os, sys; os.open(sys.argv[1], os.O_RDONLY)", str(path)],
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=[],
        capture_output=True,
    )
    return done.returncode == 0


def stand_still(pid: int, seconds: float = 10) -> None:
    """Stop a process and wait until all of its threads stand: one that is late still answers."""
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + seconds
    while not _stands(pid):
        assert time.monotonic() < until, f"process {pid} does not stop"
        time.sleep(0.001)


def _stands(pid: int) -> bool:
    try:
        states = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
        return False
    return all(state.rpartition(") ")[2].startswith("T") for state in states)


@contextlib.contextmanager
def reachable(folder: Path) -> Iterator[Path]:
    """Open the way to a test's folder for other users, so that a refusal is the file's own."""
    for parent in [folder, *folder.parents]:
        if parent == Path("/tmp") or parent == Path("/"):
            break
        with contextlib.suppress(OSError):
            parent.chmod(parent.stat().st_mode | 0o011)
    yield folder
