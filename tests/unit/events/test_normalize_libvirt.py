from __future__ import annotations

import pytest

from events.model import (
    DiskErrorEvent,
    DiskJobEvent,
    DiskJobKind,
    DomainEvent,
    DomainEventKind,
    QemuJobEvent,
    ThresholdEvent,
)
from events.normalize import RawEvent, of_libvirt

UUID = "11111111-2222-3333-4444-555555555555"


def raw(kind: str, *args: object) -> RawEvent:
    return RawEvent(kind, UUID, "web1", args)


@pytest.mark.parametrize(
    ("type", "status", "kind", "operation", "active", "reason"),
    [
        pytest.param(1, 0, DiskJobKind.COMPLETED, "pull", False, None, id="a pull"),
        pytest.param(2, 3, DiskJobKind.READY, "copy", False, None, id="a mirror in sync"),
        pytest.param(3, 0, DiskJobKind.COMPLETED, "commit", False, None, id="a commit below the top"),
        pytest.param(4, 3, DiskJobKind.READY, "commit", True, None, id="one of the top"),
        pytest.param(5, 2, DiskJobKind.FAILED, "backup", False, "cancelled", id="a backup that was ended"),
        pytest.param(1, 1, DiskJobKind.FAILED, "pull", False, "failed", id="a failure"),
        pytest.param(77, 0, DiskJobKind.COMPLETED, "unknown", False, None, id="an operation that is newer than we"),
    ],
)
def test_a_block_job(
    type: int, status: int, kind: DiskJobKind, operation: str, active: bool, reason: str | None
) -> None:
    expected = DiskJobEvent(kind, UUID, "web1", "vda", operation, active=active, reason=reason)
    assert of_libvirt(raw("block_job", "vda", type, status)) == expected


@pytest.mark.parametrize(
    ("event", "detail", "kind", "reason"),
    [
        (0, 0, DomainEventKind.DEFINED, None),
        (2, 0, DomainEventKind.STARTED, None),
        (5, 1, DomainEventKind.STOPPED, "destroyed"),
        (5, 5, DomainEventKind.STOPPED, "failed"),
        (5, 99, DomainEventKind.STOPPED, None),
        (3, 2, DomainEventKind.SUSPENDED, "io_error"),
        (8, 0, DomainEventKind.CRASHED, None),
    ],
)
def test_a_domains_life(event: int, detail: int, kind: DomainEventKind, reason: str | None) -> None:
    assert of_libvirt(raw("lifecycle", event, detail)) == DomainEvent(kind, UUID, "web1", reason)


def test_errors_and_thresholds() -> None:
    told = of_libvirt(raw("io_error", "/a.qcow2", "virtio-disk0", 1, "enospc"))
    assert told == DiskErrorEvent(UUID, "web1", "/a.qcow2", "virtio-disk0", "pause", "enospc")
    told = of_libvirt(raw("block_threshold", "vda[3]", None, 1000, 24))
    assert told == ThresholdEvent(UUID, "web1", "vda[3]", "", 1000, 24)


@pytest.mark.parametrize(
    "unknown",
    [raw("block_job", "vda", 1, 9), raw("lifecycle", 44, 0), raw("reboot"), raw("block_job"), raw("lifecycle", "a", 0)],
)
def test_what_is_not_understood_is_no_event(unknown: RawEvent) -> None:
    assert of_libvirt(unknown) is None


@pytest.mark.parametrize(
    ("event", "more", "good", "error"),
    [
        ("BLOCK_JOB_COMPLETED", "", True, None),
        ("BLOCK_JOB_COMPLETED", ',"error":"No space left on device"', False, "No space left on device"),
        ("BLOCK_JOB_CANCELLED", "", False, None),
    ],
)
def test_qemus_own_word(event: str, more: str, good: bool, error: str | None) -> None:
    details = '{"device":"copy-vda-libvirt-1-format","len":5,"offset":5,"speed":0,"type":"mirror"' + more + "}"
    assert of_libvirt(raw("monitor", event, details)) == QemuJobEvent(UUID, "web1", "vda", "copy", good, error)


@pytest.mark.parametrize(
    "details", ["", "[]", "{", "{}", '{"device":"mine"}', '{"device":"copy-vda-libvirt-x-format"}']
)
def test_a_job_that_libvirt_did_not_begin_is_passed_over(details: str) -> None:
    assert of_libvirt(raw("monitor", "BLOCK_JOB_COMPLETED", details)) is None
