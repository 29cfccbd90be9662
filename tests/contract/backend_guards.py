"""What a backend of the data daemon refuses by itself, and how it is ended from outside."""

from __future__ import annotations

import contextlib
import io
import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from hostagent.data.backends.base import ImageBackend
from hostagent.data.streams import Stopped
from hostagent.errors import AgentError
from tests.contract.backend_suite import BackendSuite, Collected, Given, Rig

SOON = 5.0
"""Seconds within which a fenced call ends; on a busy machine."""


class GuardSuite(BackendSuite):
    def test_beyond_the_end_is_refused(self, rig: Rig, backend: ImageBackend) -> None:
        end = len(rig.content)
        sink = Collected()
        for first, length in [(end, 1), (end - 1, 2), (0, end + 1), (end + 10, 1)]:
            with refused("range"):
                backend.read(first, length)
            with backend.open_session() as session, refused("range"):
                session.copy_to(sink, first, length)
        assert not sink.data

    def test_writing_beyond_the_end_is_refused_and_changes_nothing(self, rig: Rig, backend: ImageBackend) -> None:
        end = len(rig.content)
        for call in (
            lambda: backend.write(b"ab", end - 1),
            lambda: backend.write_from(Given(b"ab"), end - 1, 2),
            lambda: backend.write_from(Given(b"ab"), end - 1, None),
            lambda: backend.zero(end - 1, 2),
            lambda: backend.write_full(io.BytesIO(bytes(end + 1)), end + 1, False),
        ):
            with refused("range"):
                call()
        backend.flush()
        backend.close()
        assert rig.now() == rig.content

    def test_one_for_reading_does_not_write(self, rig: Rig) -> None:
        with rig.open(writable=False) as backend:
            for call in (
                lambda: backend.write(b"a", 0),
                lambda: backend.write_from(Given(b"a"), 0, 1),
                lambda: backend.zero(0, 1),
                lambda: backend.write_full(io.BytesIO(rig.content), len(rig.content), False),
            ):
                with pytest.raises(AgentError) as error:
                    call()
                assert error.value.code in ("denied", "not_supported")
            assert backend.read(0, 100) == rig.content[:100]
        assert rig.now() == rig.content

    def test_a_fenced_one_does_nothing_more(self, rig: Rig, backend: ImageBackend) -> None:
        assert backend.read(0, 1) == rig.content[:1]
        session = backend.open_session()
        for _ in range(2):
            backend.fence()
        for call in (
            lambda: backend.read(0, 1),
            lambda: session.read(0, 1),
            lambda: session.copy_to(Collected(), 0, len(rig.content)),
        ):
            with pytest.raises((Stopped, AgentError)):
                call()
        if backend.supports_range_write:
            with pytest.raises((Stopped, AgentError)):
                backend.write(b"a", 0)
            with pytest.raises((Stopped, AgentError)):
                backend.flush()
        assert rig.now() == rig.content


class StallSuite(GuardSuite):
    """For a backend whose storage can be made to answer nothing."""

    @pytest.mark.parametrize("doing", ["reading", "writing", "opening"])
    def test_a_fence_ends_what_waits_for_the_storage(self, rig: Rig, doing: str) -> None:
        assert rig.stalled is not None
        with rig.open() as backend:
            if doing != "opening":
                backend.size()
            calls: dict[str, Callable[[], object]] = {
                "reading": lambda: backend.read(0, len(rig.content)),
                "writing": lambda: backend.write_from(Given(rig.content), 0, len(rig.content)),
                "opening": backend.size,
            }
            with rig.stalled():
                assert isinstance(ended_by(backend.fence, calls[doing]), Stopped | AgentError)


def ended_by(end: Callable[[], None], call: Callable[[], object]) -> Exception:
    """What `call` raises, which waits in a thread, soon after `end` was called in this one."""
    raised: queue.SimpleQueue[Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - looked at by the test
            raised.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive(), raised.get_nowait()
    end()
    return raised.get(timeout=SOON)


@contextlib.contextmanager
def refused(code: str) -> Iterator[None]:
    with pytest.raises(AgentError) as error:
        yield
    assert error.value.code == code, error.value
