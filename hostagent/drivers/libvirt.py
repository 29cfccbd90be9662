"""The only code that imports libvirt-python: one connection, as blocking calls, and libvirt's words as ours.

Everything here blocks and belongs into a worker (hypervisor.py). Without libvirt-python this module can be imported
all the same, and `absent()` says what is missing. libvirt's own event loop is one for the process: it runs in a daemon
thread from before the first connection on, serves every connection's socket and keepalive, and calls back from there,
so a callback only puts what it is told into a queue.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from events.normalize import RawEvent
from jobs.errors import JobError

PACKAGE = "python3-libvirt"

BEAT = 1.0
"""Seconds between two signs of life of libvirt's event loop."""

SYNCHRONOUS_WRITES = 8
"""VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES, which a libvirt-python before 8.0 does not name."""
SYNCHRONOUS_SINCE = (8, 0)
"""libvirtd's version."""


class Lost(JobError):
    """The connection broke, before the call or in the middle of it: then nobody knows whether it was carried out."""

    def __init__(self, message: str) -> None:
        super().__init__("unavailable", message, remedy="it is connected again by itself; see whether libvirtd runs")


def absent() -> str | None:
    """Why nothing here can work; None when libvirt-python is there."""
    try:
        _libvirt()
    except JobError as error:
        return error.message
    return None


@functools.cache
def _libvirt() -> ModuleType:
    """libvirt-python, loaded when it is first needed: it takes 15 MiB."""
    try:
        import libvirt
    except ImportError:
        what = f"libvirt-python is not installed ({PACKAGE} on Debian, Fedora and RHEL)"
        raise JobError("not_supported", what, remedy=f"install {PACKAGE} and start the agent again") from None
    found: ModuleType = libvirt
    return found


@functools.cache
def deaf() -> str | None:
    """Why QEMU's own events cannot be heard; None when they can, as far as that is known without a connection."""
    try:
        import libvirt_qemu  # noqa: F401
    except ImportError:
        return f"the Python module libvirt_qemu, a part of {PACKAGE}, is not installed"
    return None


# The event loop of the process


@functools.cache
def start_event_loop() -> None:
    """Register and run it, once; what was connected before would hear no events."""
    binding = _libvirt()
    binding.registerErrorHandler(lambda context, error: None, None)  # else every error is also printed
    binding.virEventRegisterDefaultImpl()
    _beats()
    binding.virEventAddTimeout(round(BEAT * 1000), _beats, None)
    threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True).start()


_beat: float | None = None


def _beats(*_: Any) -> None:
    global _beat
    _beat = time.monotonic()


def last_beat() -> float | None:
    """When the event loop last ran, by time.monotonic(), at most BEAT seconds old while it does; None before its
    start."""
    return _beat


def _run_event_loop() -> None:
    while True:
        with contextlib.suppress(_libvirt().libvirtError):
            _libvirt().virEventRunDefaultImpl()


# One connection


@dataclass(frozen=True, slots=True)
class DomainRef:
    uuid: str
    name: str
    active: bool


@dataclass(frozen=True, slots=True)
class PoolRef:
    """A storage pool, defined or running, and its description."""

    active: bool
    xml: str


@dataclass(frozen=True, slots=True)
class BlockJobInfo:
    """virDomainBlockJobInfo: `type` as in normalize.OPERATIONS; `bandwidth` in bytes/s, 0 is no limit."""

    type: int
    cur: int
    end: int
    bandwidth: int


@dataclass(frozen=True, slots=True)
class CopyCall:
    """virDomainBlockCopy: `xml` is the target as a disk; `reuse` that it is written over as it is; `synchronous` that
    the guest's writes wait for it; `bandwidth` in bytes/s, 0 is no limit."""

    xml: str
    shallow: bool
    reuse: bool
    synchronous: bool
    bandwidth: int


@dataclass(frozen=True, slots=True)
class CommitCall:
    """virDomainBlockCommit: `base` and `top` as vda[3], top None for what the guest writes; `relative` that a header
    that names a layer by a relative name goes on doing so."""

    base: str
    top: str | None
    relative: bool
    bandwidth: int


@dataclass(frozen=True, slots=True)
class Keepalive:
    """A peer that has not answered `count` times, every `interval` seconds, is gone: its connection closes."""

    interval: int
    count: int


@dataclass(frozen=True, slots=True)
class Versions:
    """Of libvirt (the daemon's), and of the hypervisor that it runs."""

    libvirt: str
    hypervisor: str


class Session:
    """Every method may block for as long as libvirtd does, and raises JobError: Lost when the connection broke.

    A domain is named by its UUID: names change hands.
    """

    def __init__(self, uri: str, keepalive: Keepalive) -> None:
        start_event_loop()
        self._callbacks: list[int] = []
        self._monitor: int | None = None
        self.deaf: str | None = "it was not asked for QEMU's events"
        """Why QEMU's own events are not heard here; None when they are."""
        self._watched = False
        with translated(f"connect to {uri}"):
            self._connection: Any = _libvirt().open(uri)
        with contextlib.suppress(_libvirt().libvirtError):  # local drivers (test:///) have no peer to keep alive
            self._connection.setKeepAlive(keepalive.interval, keepalive.count)

    def watch(self, on_event: Callable[[RawEvent], None], on_close: Callable[[str], None]) -> None:
        """Hear of all domains' events, and once of the connection's end. Both are called in libvirt's thread."""

        def told(kind: str) -> Callable[..., None]:
            def call(_: Any, domain: Any, *args: Any) -> None:
                on_event(RawEvent(kind, domain.UUIDString(), domain.name(), args[:-1]))

            return call

        def closed(_: Any, reason: int, __: Any) -> None:
            on_close(_CLOSE_REASONS.get(reason, f"reason {reason}"))

        with translated("register for events"):
            with contextlib.suppress(_libvirt().libvirtError):  # local drivers never close
                self._connection.registerCloseCallback(closed, None)
                self._watched = True
            for kind, number in _event_ids().items():
                self._callbacks.append(self._connection.domainEventRegisterAny(None, number, told(kind), None))
        self._watch_monitors(on_event)

    def _watch_monitors(self, on_event: Callable[[RawEvent], None]) -> None:
        """Hear of QEMU itself how block jobs end: libvirt says neither why one failed nor, of a copy that was ended
        when it was in sync, that its last bytes came through. Only events: commands would taint the guest."""

        def call(_: Any, domain: Any, event: str, seconds: int, micros: int, details: str, __: Any) -> None:
            on_event(RawEvent("monitor", domain.UUIDString(), domain.name(), (event, details or "")))

        self.deaf = deaf()
        if self.deaf is not None:
            return
        import libvirt_qemu

        everyone: Any = None
        flags = libvirt_qemu.VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX
        try:
            self._monitor = libvirt_qemu.qemuMonitorEventRegister(
                self._connection, everyone, "^BLOCK_JOB_(COMPLETED|CANCELLED)$", call, None, flags
            )
        except _libvirt().libvirtError as error:  # a hypervisor that is not QEMU, or one who may not
            self.deaf = f"libvirt does not pass on QEMU's events: {error.get_error_message() or error}"

    @property
    def alive(self) -> bool:
        try:
            return bool(self._connection.isAlive())
        except _libvirt().libvirtError:
            return False

    def close(self) -> None:
        """Let go. What is under way in another thread ends with its own error."""
        with contextlib.suppress(_libvirt().libvirtError):
            if self._watched:
                self._connection.unregisterCloseCallback()
        with contextlib.suppress(ImportError, _libvirt().libvirtError):
            if self._monitor is not None:
                import libvirt_qemu

                libvirt_qemu.qemuMonitorEventDeregister(self._connection, self._monitor)
        for number in self._callbacks:
            with contextlib.suppress(_libvirt().libvirtError):
                self._connection.domainEventDeregisterAny(number)
        with contextlib.suppress(_libvirt().libvirtError):
            self._connection.close()

    def versions(self) -> Versions:
        with translated("ask for versions"):
            daemon = _version(self._connection.getLibVersion())
            return Versions(daemon, _version(self._connection.getVersion()))

    # Domains

    def domains(self) -> list[DomainRef]:
        """All that are defined or run."""
        with translated("list domains"):
            active = _libvirt().VIR_CONNECT_LIST_DOMAINS_ACTIVE  # two calls, where isActive() would be one for each
            run = {domain.UUIDString() for domain in self._connection.listAllDomains(active)}
            found = [(domain.UUIDString(), domain.name()) for domain in self._connection.listAllDomains()]
            return [DomainRef(uuid, name, uuid in run) for uuid, name in found]

    def find(self, name: str) -> DomainRef:
        """By UUID, else by name."""
        with translated(f"look for domain {name!r}"):
            with contextlib.suppress(ValueError):
                wanted = str(uuid.UUID(name))
                try:
                    return _ref(self._connection.lookupByUUIDString(wanted))
                except _libvirt().libvirtError as error:
                    if error.get_error_code() != _libvirt().VIR_ERR_NO_DOMAIN:
                        raise
            return _ref(self._connection.lookupByName(name))

    def describe(self, domain: str) -> str:
        """The domain's XML: the live one while it runs. Without secrets, which need a flag."""
        with translated(f"describe domain {domain}"):
            return str(self._domain(domain).XMLDesc(0))

    def descriptions(self, domain: str) -> tuple[DomainRef, list[str]]:
        """The domain, and the XML of what it is now; of one that runs also of what it will be when it is started anew,
        which a transient one will not."""
        with translated(f"describe domain {domain}"):
            found = self._domain(domain)
            now, texts = _ref(found), [str(found.XMLDesc(0))]
            if now.active and found.isPersistent():
                texts.append(str(found.XMLDesc(_libvirt().VIR_DOMAIN_XML_INACTIVE)))
            return now, texts

    # Storage pools

    def volume_path(self, pool: str, volume: str) -> str:
        """Where a volume of a pool that runs is. A JobError otherwise, for a pool or volume that is not known, too."""
        with translated(f"look for volume {volume!r} of storage pool {pool!r}"):
            return str(self._connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())

    def pool(self, name: str) -> PoolRef:
        with translated(f"describe storage pool {name!r}"):
            found = self._connection.storagePoolLookupByName(name)
            return PoolRef(bool(found.isActive()), str(found.XMLDesc(0)))

    # The host, and block jobs

    def capabilities(self) -> str:
        """The host's, as XML."""
        with translated("ask for capabilities"):
            return str(self._connection.getCapabilities())

    def block_job(self, domain: str, disk: str) -> BlockJobInfo | None:
        """The job that runs on the disk's target; None when none does. Asks QEMU."""
        with translated(f"ask for the block job of {domain}/{disk}"):
            return _block_job(self._domain(domain), disk)

    def look(self, domain: str, disk: str) -> tuple[int | None, BlockJobInfo | None]:
        """The running domain's id, which is another one after each start, and the job on its disk. None when it does
        not run; a JobError `not_found` when it is not even defined."""
        with translated(f"look at domain {domain}"):
            found = self._domain(domain)
        number = found.ID()  # as of the lookup: no call
        if number < 0:
            return None, None
        try:
            with translated(f"ask for the block job of {domain}/{disk}"):
                return number, _block_job(found, disk)
        except JobError as error:
            if error.code != "invalid":
                raise
            return number, None  # the guest has lost the disk

    def block_pull(self, domain: str, disk: str, base: str | None, bandwidth: int) -> None:
        """Begin to pull, down to the layer `base` (vda[3]), at so many bytes/s; 0 is no limit."""
        with translated(f"pull {domain}/{disk}"):
            if base is None:
                flags = _libvirt().VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES
                self._domain(domain).blockPull(disk, bandwidth, flags)
            else:
                flags = _libvirt().VIR_DOMAIN_BLOCK_REBASE_BANDWIDTH_BYTES
                self._domain(domain).blockRebase(disk, base, bandwidth, flags)

    def block_copy(self, domain: str, disk: str, wanted: CopyCall) -> None:
        flags = _libvirt().VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB  # of a defined domain there is no other
        flags |= _libvirt().VIR_DOMAIN_BLOCK_COPY_SHALLOW if wanted.shallow else 0
        flags |= _libvirt().VIR_DOMAIN_BLOCK_COPY_REUSE_EXT if wanted.reuse else 0
        flags |= SYNCHRONOUS_WRITES if wanted.synchronous else 0
        speed = {_libvirt().VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: wanted.bandwidth} if wanted.bandwidth else {}
        with translated(f"copy {domain}/{disk}"):
            self._domain(domain).blockCopy(disk, wanted.xml, speed, flags)

    def block_commit(self, domain: str, disk: str, wanted: CommitCall) -> None:
        flags = _libvirt().VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
        flags |= _libvirt().VIR_DOMAIN_BLOCK_COMMIT_ACTIVE if wanted.top is None else 0
        flags |= _libvirt().VIR_DOMAIN_BLOCK_COMMIT_RELATIVE if wanted.relative else 0
        with translated(f"commit {domain}/{disk}"):
            self._domain(domain).blockCommit(disk, wanted.base, wanted.top, wanted.bandwidth, flags)

    def block_pivot(self, domain: str, disk: str) -> None:
        """Let the guest go over to what its disk is mirrored to; not waited for. A JobError when it is not in sync."""
        flags = _libvirt().VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT | _libvirt().VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC
        with translated(f"pivot {domain}/{disk}"):
            self._domain(domain).blockJobAbort(disk, flags)

    def block_speed(self, domain: str, disk: str, bandwidth: int) -> None:
        with translated(f"set the speed of the block job of {domain}/{disk}"):
            flags = _libvirt().VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
            self._domain(domain).blockJobSetSpeed(disk, bandwidth, flags)

    def block_abort(self, domain: str, disk: str) -> None:
        """Ask for the job's end, and do not wait for it: one whose storage hangs would hold up everything."""
        with translated(f"abort the block job of {domain}/{disk}"):
            self._domain(domain).blockJobAbort(disk, _libvirt().VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC)

    def _domain(self, domain: str) -> Any:
        return self._connection.lookupByUUIDString(domain)


def _event_ids() -> dict[str, int]:
    return {
        "block_job": _libvirt().VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,  # names the target, where the first version has a path
        "lifecycle": _libvirt().VIR_DOMAIN_EVENT_ID_LIFECYCLE,
        "io_error": _libvirt().VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
        "block_threshold": _libvirt().VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD,
    }


_CLOSE_REASONS = {0: "an error", 1: "end of file", 2: "it does not answer keepalives", 3: "closed by us"}
"""virConnectCloseReason"""


def _ref(domain: Any) -> DomainRef:
    """As it was looked up just now: its id says whether it runs, without another call."""
    return DomainRef(domain.UUIDString(), domain.name(), domain.ID() >= 0)


def _block_job(domain: Any, disk: str) -> BlockJobInfo | None:
    found = domain.blockJobInfo(disk, _libvirt().VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES)
    return BlockJobInfo(found["type"], found["cur"], found["end"], found["bandwidth"]) if found else None


def _version(number: int) -> str:
    """libvirt's versions are major * 1,000,000 + minor * 1,000 + release."""
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"


# libvirt's errors

_LOOK = "see `virsh list --all`"
_AGAIN = "wait for what runs there, or try again"
_ERRORS: dict[str, tuple[str, str | None]] = {
    "VIR_ERR_NO_DOMAIN": ("not_found", _LOOK),
    "VIR_ERR_NO_DOMAIN_CHECKPOINT": ("not_found", None),
    "VIR_ERR_NO_STORAGE_POOL": ("not_found", "see `virsh pool-list --all`"),
    "VIR_ERR_NO_STORAGE_VOL": ("not_found", "see `virsh vol-list POOL`; `virsh pool-refresh POOL` looks anew"),
    "VIR_ERR_INVALID_ARG": ("invalid", None),
    "VIR_ERR_INVALID_DOMAIN": ("not_found", _LOOK),
    "VIR_ERR_XML_ERROR": ("invalid", None),
    "VIR_ERR_NO_SUPPORT": ("not_supported", None),
    "VIR_ERR_CONFIG_UNSUPPORTED": ("not_supported", None),
    "VIR_ERR_ARGUMENT_UNSUPPORTED": ("not_supported", None),
    # Also what a disk says that has a block job already.
    "VIR_ERR_OPERATION_UNSUPPORTED": ("conflict", "see `hostagent job list`, and `virsh blockjob DOMAIN DISK`"),
    "VIR_ERR_OPERATION_INVALID": ("conflict", "see whether the guest runs: `virsh domstate DOMAIN`"),
    "VIR_ERR_BLOCK_COPY_ACTIVE": ("conflict", "it is not ready yet; wait until it is"),
    "VIR_ERR_CHECKPOINT_INCONSISTENT": ("conflict", "its bitmap is gone: make a full backup"),
    "VIR_ERR_RESOURCE_BUSY": ("busy", _AGAIN),
    "VIR_ERR_OPERATION_TIMEOUT": ("busy", _AGAIN),  # the domain's job lock, after 30 s
    "VIR_ERR_OPERATION_DENIED": ("denied", "run the agent as root, or let its user use libvirt"),
    "VIR_ERR_ACCESS_DENIED": ("denied", "let the agent's user do this in libvirt's polkit rules"),
    "VIR_ERR_AUTH_FAILED": ("denied", "run the agent as root, or let its user use libvirt"),
    "VIR_ERR_AUTH_CANCELLED": ("denied", "run the agent as root, or let its user use libvirt"),
    "VIR_ERR_AUTH_UNAVAILABLE": ("denied", "run the agent as root, or let its user use libvirt"),
    "VIR_ERR_NO_CONNECT": ("unavailable", "correct libvirt.uri"),
}
"""libvirt's code → ours, and what to do. One that is not here is `job_failed`, with libvirt's text."""


_MONITOR = ("Unable to read from monitor", "Unable to write to monitor", "End of file from qemu monitor")
"""The guest's QEMU went away in the middle of the call (src/qemu/qemu_monitor.c): what it did of it is not known."""


@contextlib.contextmanager
def translated(what: str) -> Any:
    """What libvirt refuses in here is a JobError that says what was tried."""
    try:
        yield
    except _libvirt().libvirtError as error:
        raise _job_error(what, error) from error


def _job_error(what: str, error: Any) -> JobError:
    text = f"libvirt cannot {what}: {(error.get_error_message() or str(error))[:1000]}"
    number, origin = error.get_error_code(), error.get_error_domain()
    # RPC is the wire itself: the daemon is not there, went away, or was given up by keepalive.
    wire = origin in (_libvirt().VIR_FROM_RPC, _libvirt().VIR_FROM_REMOTE, _libvirt().VIR_FROM_STREAMS)
    codes = {getattr(_libvirt(), name): entry for name, entry in _ERRORS.items() if hasattr(_libvirt(), name)}
    code, remedy = codes.get(number, ("job_failed", None))
    if any(words in text for words in _MONITOR):
        code, remedy = "unresponsive", "see whether the guest has ended: `virsh domstate DOMAIN`"
    if wire and code not in ("denied", "not_supported"):
        return Lost(text)
    return JobError(code, text, remedy=remedy, libvirt_code=number)
