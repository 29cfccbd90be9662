"""A message bus of the tests' own, and callers on it. It serves one folder, knows nothing of the host's, and may be
stopped and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostagent.api import dbus
from hostagent.api.projection.message import BusError, Kind, Message, to_bus
from tests.harness import stand_still

NAME = "org.hostagent1"
WAIT = 30.0
CONF = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
  </policy>
  <include>{policy}</include>
  <limit name="max_replies_per_connection">50000</limit>
</busconfig>
"""
POLICY = Path(__file__).resolve().parents[2] / "units/dbus/org.hostagent1.conf"


class PrivateBus:
    """dbus-daemon with the rules of a system bus, and the policy that we ship."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.socket = folder / "bus"
        self.address = f"unix:path={self.socket}"
        self._conf = folder / "bus.conf"
        policy = folder / "policy.conf"
        policy.write_text(POLICY.read_text().replace('user="root"', f'user="{os.geteuid()}"'))
        self._conf.write_text(CONF.format(socket=self.socket, policy=policy))
        self._log = folder / "bus.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateBus:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        command = ["dbus-daemon", f"--config-file={self._conf}", "--nofork", "--nopidfile", "--nosyslog"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until(self._listens, "the bus listens")

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._log.read_text()
        with contextlib.suppress(OSError), Caller(self.socket):
            return True
        return False

    def freeze(self) -> None:
        assert self.process is not None
        stand_still(self.process.pid)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT)
            self.process = None


class Caller:
    """A blocking connection to the bus, as `user` if that is said. It keeps the signals that it gets."""

    def __init__(self, path: Path, uid: int | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT)
        self._buffer = b""
        self._serial = 0
        self.signals: list[Message] = []
        self._answers: dict[int, Message] = {}
        with _as(uid):  # the bus asks the kernel who has connected
            self._socket.connect(str(path))
            self._socket.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
            line = self._socket.recv(4096)
        assert line.startswith(b"OK "), line
        self._socket.sendall(b"BEGIN\r\n")
        self.name: str = self.ask(to_bus("Hello"))[0]

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, message: Message, timeout: float = WAIT) -> tuple[Any, ...]:
        """The answer's body, or BusError."""
        return self.answer(self.send(message), timeout)

    def send(self, message: Message) -> int:
        self._serial += 1
        self._socket.sendall(dbus.encode(message, self._serial))
        return self._serial

    def send_raw(self, frame: bytes) -> None:
        self._socket.sendall(frame)

    def answer(self, serial: int, timeout: float = WAIT) -> tuple[Any, ...]:
        deadline = time.monotonic() + timeout
        while serial not in self._answers:
            message = self.read(max(0.01, deadline - time.monotonic()))
            if message.kind is Kind.SIGNAL:
                self.signals.append(message)
            else:
                self._answers[message.reply_to] = message
        message = self._answers.pop(serial)
        if message.kind is Kind.ERROR:
            raise BusError(message.error, message.body[0])
        return message.body

    def read(self, timeout: float = WAIT) -> Message:
        """The next message, whatever it is. Raises TimeoutError."""
        self._socket.settimeout(timeout)
        while True:
            if len(self._buffer) >= dbus.FIXED:
                size = sum(dbus.sizes(self._buffer))
                if len(self._buffer) >= size:
                    frame, self._buffer = self._buffer[:size], self._buffer[size:]
                    return dbus.decode(frame)
            data = self._socket.recv(1 << 20)
            if not data:
                raise ConnectionError("the bus has closed the connection")
            self._buffer += data

    # What is often asked

    def call(self, path: str, name: str, member: str, signature: str = "", *body: Any, flags: int = 0) -> Any:
        """The only value of the answer, or all of them."""
        message = Message(Kind.CALL, path, name, member, signature, body, destination=NAME, flags=flags)
        found = self.ask(message)
        return found[0] if len(found) == 1 else found

    def get(self, path: str, name: str, member: str) -> Any:
        return self.call(path, "org.freedesktop.DBus.Properties", "Get", "ss", name, member)

    def get_all(self, path: str, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call(path, "org.freedesktop.DBus.Properties", "GetAll", "s", name)
        return found

    def managed(self) -> dict[str, dict[str, dict[str, Any]]]:
        found: dict[str, Any] = self.call("/", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        return found

    def listen(self) -> None:
        """For all signals of the agent, and for who owns its name."""
        self.ask(to_bus("AddMatch", "s", f"type='signal',sender='{NAME}'"))
        self.ask(to_bus("AddMatch", "s", f"type='signal',member='NameOwnerChanged',arg0='{NAME}'"))

    def heard(self, member: str, good: Callable[[Message], bool] = lambda _: True, timeout: float = WAIT) -> Message:
        """The first signal of that name for which `good`; it and those before it are taken out."""
        deadline = time.monotonic() + timeout
        looked = 0
        while True:
            for number, message in enumerate(self.signals[looked:], looked):
                if message.member == member and good(message):
                    del self.signals[: number + 1]
                    return message
            looked = len(self.signals)
            found = self.read(max(0.01, deadline - time.monotonic()))
            if found.kind is Kind.SIGNAL:
                self.signals.append(found)


@contextlib.contextmanager
def _as(uid: int | None) -> Iterator[None]:
    if uid is None:
        yield
        return
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


class Polkit:
    """Stands in for polkitd: it says what it is told to say, and remembers what it was asked."""

    NAME = "org.freedesktop.PolicyKit1"

    def __init__(self, path: Path) -> None:
        self.answer = "yes"
        """yes, no, challenge, error, nonsense, or silence"""
        self.asked: list[tuple[Any, ...]] = []
        self.cancelled = 0
        self._caller = Caller(path)
        assert self._caller.ask(to_bus("RequestName", "su", self.NAME, 4)) == (1,)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._caller._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT)
        self._caller._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError, ConnectionError):
            while True:
                message = self._caller.read(3600)
                if message.member == "CancelCheckAuthorization":
                    self.cancelled += 1
                elif message.kind is Kind.CALL:
                    self.asked.append((*message.body, message.sender))
                    self._answer(message)

    def _answer(self, message: Message) -> None:
        to = {"destination": message.sender, "reply_to": message.serial}
        if self.answer in ("yes", "no", "challenge"):
            said = [self.answer == "yes", self.answer == "challenge", {}]
            self._caller.send(Message(Kind.REPLY, signature="(bba{ss})", body=(said,), **to))  # type: ignore[arg-type]
        elif self.answer == "nonsense":
            self._caller.send(Message(Kind.REPLY, signature="s", body=("yes",), **to))  # type: ignore[arg-type]
        elif self.answer == "error":
            name = "org.freedesktop.PolicyKit1.Error.Failed"
            self._caller.send(Message(Kind.ERROR, error=name, signature="s", body=("no",), **to))  # type: ignore[arg-type]


def until(good: Callable[[], Any], what: str, timeout: float = WAIT) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := good()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)
    return found
