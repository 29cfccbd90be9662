"""Why a guest ended, for people: what libvirt's lifecycle event says of it."""

from __future__ import annotations

from events.model import DomainEvent, DomainEventKind, HypervisorEvent

_WORDS = {
    "shutdown": "was shut down",
    "destroyed": "was destroyed",
    "crashed": "crashed",
    "migrated": "was migrated to another host",
    "saved": "was saved",
    "failed": "lost its QEMU, which was killed or crashed (see the guest's log)",
    "from_snapshot": "went back to a snapshot",
}


def said(event: HypervisorEvent) -> str | None:
    """None for an event that is no end."""
    if isinstance(event, DomainEvent) and event.kind is DomainEventKind.STOPPED:
        return _WORDS.get(event.reason or "", "ended")
    return None
