"""One block operation on a domain at a time.

QEMU runs several jobs on several disks of a guest, but libvirt's calls for one wait for the other's for up to 30 s, and
some queries crash a QEMU below 10.2 while a stream ends (docs/qemu.md): so who works on one disk has the whole domain.
"""

from __future__ import annotations

import asyncio

from jobs.errors import JobError


class DomainClaims:
    """Domains by UUID. A holder is a text that a person understands, as "job 4711"; several disks of one domain can
    have a common one. In memory: after a restart claims are made again from the store. Of one event loop."""

    def __init__(self) -> None:
        self._holders: dict[str, str] = {}
        self._released = asyncio.Event()

    def claim(self, domain: str, name: str, holder: str) -> None:
        """For `holder` until `release`; again for the same is no change. A JobError busy that names who has it."""
        present = self._holders.setdefault(domain, holder)
        if present != holder:
            raise JobError(
                "busy",
                f"{present} works on domain {name!r}: one block operation on a domain at a time",
                field="target",
                value=name,
                remedy=f"wait for {present}, or end it",
                holders=[present],
            )

    async def take(self, domain: str, holder: str) -> None:
        """As `claim`, but wait for who has it; in the order in which they came. It may be cancelled."""
        while self._holders.setdefault(domain, holder) != holder:
            await self._released.wait()

    def release(self, domain: str, holder: str) -> None:
        """No change for one who does not hold it."""
        if self._holders.get(domain) == holder:
            del self._holders[domain]
            self._released.set()  # who waits looks again, and waits for the next such moment
            self._released = asyncio.Event()

    def holder(self, domain: str) -> str | None:
        return self._holders.get(domain)
