"""What happens to a transfer when its NBD server is killed, hangs, has no room, or will not have us: soon, and clearly."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent.data.backends.base import ImageBackend
from hostagent.data.backends.nbd import NbdBackend, NbdSettings, nbd_factory
from hostagent.data.backends.registry import Opening
from hostagent.data.streams import Stopped
from hostagent.errors import AgentError
from hostagent.nbdclient.dial import Server
from tests.contract.backend_guards import ended_by, refused
from tests.contract.backend_suite import MIB, Collected, Given, pattern
from tests.harness import raw_image
from tests.qemu.faults import ROOT, Tmpfs, eventually
from tests.qemu.nbd_servers import Serving, qemu_nbd, storage_daemon

pytestmark = pytest.mark.qemu
SIZE = 32 * MIB
SHORT = NbdSettings(connect_timeout=1.0, timeout=1.0)
BOUND = 10.0
"""Seconds within which a second's timeout is noticed on a busy machine."""


@pytest.fixture
def image(folder: Path) -> Path:
    return raw_image(folder / "disk.raw", SIZE)


@pytest.fixture
def serving(image: Path) -> Iterator[Serving]:
    with storage_daemon(image, "raw") as serving:
        yield serving


def opened(serving: Serving, settings: NbdSettings | None = None, writable: bool = True) -> ImageBackend:
    return nbd_factory(settings or NbdSettings())(Opening(serving.url, SIZE, writable=writable))


class Meanwhile(Collected):
    """A Sink that does something once, when the first bytes have come."""

    def __init__(self, do: Callable[[], object]) -> None:
        super().__init__()
        self._do: Callable[[], object] | None = do

    def write(self, data: memoryview | bytes | bytearray) -> None:
        super().write(data)
        if self._do is not None:
            do, self._do = self._do, None
            do()


class MeanwhileGiven(Given):
    """A Source that does something once, after the first bytes."""

    def __init__(self, data: bytes, do: Callable[[], object]) -> None:
        super().__init__(data)
        self._do: Callable[[], object] | None = do

    def read_into(self, buffer: memoryview) -> int:
        if self._done and self._do is not None:
            do, self._do = self._do, None
            do()
        return super().read_into(buffer)


def within(bound: float, call: Callable[[], object]) -> None:
    began = time.monotonic()
    call()
    assert time.monotonic() - began < bound


# Killed


def test_a_server_killed_in_mid_read_is_unavailable_and_nothing_wrong_was_sent(serving: Serving, image: Path) -> None:
    with opened(serving) as backend, backend.open_session() as session:
        sink = Meanwhile(serving.kill)
        with refused("unavailable"):
            session.copy_to(sink, 0, SIZE)
        assert len(sink.data) < SIZE
        assert image.read_bytes().startswith(sink.data)
        with refused("unavailable"):  # and from now on nobody is there
            session.copy_to(sink, 0, SIZE)


def test_a_server_killed_in_mid_write_leaves_nothing_that_is_called_durable(serving: Serving) -> None:
    with opened(serving) as backend:
        with refused("unavailable"):
            backend.write_from(MeanwhileGiven(pattern(SIZE), serving.kill), 0, SIZE)
        with pytest.raises(AgentError):
            backend.flush()


# Stopped


def stopped_in_the_middle(
    serving: Serving, backend: ImageBackend, doing: str
) -> contextlib.AbstractContextManager[None]:
    """Transfers until the server is stopped, which is then a timeout; it goes on when the context ends."""

    @contextlib.contextmanager
    def stalled() -> Iterator[None]:
        with contextlib.ExitStack() as stack:

            def stall() -> None:
                stack.enter_context(serving.stalled())

            with pytest.raises(AgentError, match=r"did not answer within 1 s \(data\.nbd_timeout\)") as error:
                if doing == "reading":
                    backend.open_session().copy_to(Meanwhile(stall), 0, SIZE)
                else:
                    backend.write_from(MeanwhileGiven(pattern(SIZE), stall), 0, SIZE)
            assert error.value.code == "timeout"
            yield

    return stalled()


def test_a_server_that_hangs_in_mid_read_is_a_timeout_and_later_read_again(serving: Serving, image: Path) -> None:
    with opened(serving, SHORT) as backend:
        late = pytest.raises(AgentError, match=r"data\.nbd_connect_timeout")
        with stopped_in_the_middle(serving, backend, "reading"), late:
            backend.read(0, 1)
        assert backend.read(0, SIZE) == image.read_bytes()


def test_a_server_that_hangs_in_mid_write_is_a_timeout_and_what_came_is_not_durable(serving: Serving) -> None:
    with opened(serving, SHORT) as backend:
        with stopped_in_the_middle(serving, backend, "writing"):
            pass
        with refused("io_error"):
            backend.flush()
        assert len(backend.read(0, 10)) == 10


# Fenced: what libnbd itself cannot do


@pytest.mark.parametrize("doing", ["reading", "writing"])
def test_a_fence_wakes_a_transfer_in_which_the_server_hangs(serving: Serving, doing: str) -> None:
    with opened(serving) as backend, contextlib.ExitStack() as stack:
        hangs = threading.Event()

        def stall() -> None:
            stack.enter_context(serving.stalled())
            hangs.set()

        def transfer() -> None:
            if doing == "reading":
                backend.open_session().copy_to(Meanwhile(stall), 0, SIZE)
            else:
                backend.write_from(MeanwhileGiven(pattern(SIZE), stall), 0, SIZE)

        def fence() -> None:
            assert hangs.wait(BOUND)
            backend.fence()

        assert isinstance(ended_by(fence, transfer), Stopped)
        with pytest.raises(Stopped):
            backend.read(0, 1)


@pytest.mark.parametrize("network", ["unix", "tcp"])
def test_a_fence_wakes_who_waits_for_a_connection_that_nobody_takes(network: str) -> None:
    """A full backlog; of TCP a SYN that the kernel drops."""
    with contextlib.ExitStack() as stack:
        address: Any = stack.enter_context(tempfile.TemporaryDirectory(prefix="nbd-")) + "/s"
        if network == "unix":
            where = Server("", socket=address)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
        else:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            address = listener.getsockname()
            where = Server("", host=address[0], port=address[1])
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket(listener.family))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(address)
        backend = NbdBackend(where, NbdSettings())
        assert isinstance(ended_by(backend.fence, backend.size), Stopped)
        late = NbdBackend(where, SHORT)
        with pytest.raises(AgentError, match=r"within 1 s \(data\.nbd_connect_timeout\)") as error:
            within(BOUND, late.size)
        assert error.value.code == "timeout"


# Refused


def test_a_read_only_export_is_not_written_whatever_the_ticket_says(image: Path) -> None:
    before = image.read_bytes()
    with storage_daemon(image, "raw", writable=False) as serving, opened(serving) as backend:
        assert backend.get_capabilities() == {"read_only": True, "can_flush": True, "can_zero": False}
        for call in (lambda: backend.write(b"a", 0), lambda: backend.zero(0, 1)):
            with refused("denied"):
                call()
        assert backend.read(0, SIZE) == before
    assert image.read_bytes() == before


def test_an_export_that_is_not_there(serving: Serving) -> None:
    backend = nbd_factory(NbdSettings())(Opening(serving.url + "x", SIZE))
    with refused("not_found"):
        backend.size()


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for url in (f"nbd:unix:{tmp_path}/absent", f"nbd:127.0.0.1:{port}", "nbd:name.invalid:10809"):
        with refused("unavailable"):
            within(BOUND, nbd_factory(SHORT)(Opening(url, SIZE)).size)


def test_a_server_that_has_enough_clients_is_a_timeout_and_does_not_hang(image: Path) -> None:
    """qemu-nbd serves one client, and says so: no more are offered."""
    with qemu_nbd(image, "raw") as serving, opened(serving) as first:
        assert (first.max_readers, first.max_writers) == (1, 1)
        with opened(serving, SHORT) as second:
            with pytest.raises(AgentError, match=r"data\.nbd_connect_timeout") as error:
                within(BOUND, second.size)
            assert error.value.code == "timeout"
            first.close()
            assert second.size() == SIZE


def test_it_is_reached_over_tcp(image: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = ["qemu-nbd", "-f", "raw", "-t", "-b", "127.0.0.1", "-p", str(port), "-x", "a b", str(image)]
    process = subprocess.Popen(command)
    try:
        for url in (f"nbd://localhost:{port}/a%20b", f"nbd:127.0.0.1:{port}:exportname=a b"):
            backend = nbd_factory(NbdSettings())(Opening(url, SIZE))

            def there(backend: ImageBackend = backend) -> bool:
                with contextlib.suppress(AgentError):
                    return backend.size() == SIZE
                return False

            assert eventually(there)
            assert backend.read(MIB, 2 * MIB) == image.read_bytes()[MIB : 3 * MIB]
            backend.close()
    finally:
        process.terminate()
        process.wait(BOUND)


# Full


@pytest.mark.skipif(not ROOT, reason="needs root: it mounts a file system")
def test_a_full_disk_is_no_space_and_goes_on_when_there_is_room(folder: Path) -> None:
    with Tmpfs(folder / "small", 8 * MIB) as small:
        image = small.folder / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(SIZE)], check=True)
        with storage_daemon(image, "qcow2") as serving, opened(serving) as backend:
            with refused("no_space"):
                backend.write_from(Given(pattern(SIZE)), 0, SIZE)
            assert backend.read(0, MIB) == pattern(SIZE)[:MIB]
            small.resize(64 * MIB)
            backend.write_from(Given(pattern(SIZE)), 0, SIZE)
            backend.flush()
            assert backend.read(0, SIZE) == pattern(SIZE)


def test_what_was_taken_from_a_source_that_stopped_is_written_when_the_call_ends(serving: Serving, image: Path) -> None:
    """Nothing may be written after a ticket's end, when somebody else may own the image."""
    data = pattern(SIZE)
    with opened(serving) as backend:
        with pytest.raises(Stopped):
            backend.write_from(Given(data, stop=7 * MIB), 0, SIZE)
        with opened(serving) as other:
            assert other.read(0, 7 * MIB) == data[: 7 * MIB]
