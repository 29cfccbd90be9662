"""Counts what happened in stories, so that a run which did nothing cannot pass for one that found nothing."""

from __future__ import annotations

from collections import Counter, defaultdict

ACCEPTED = 0.5
"""The least part of all jobs that must have been accepted and have come to an end of their own: not refused."""
FLOORS = {
    "pull": 4,
    "pull by steps": 4,
    "copy": 4,
    "copy onto an image": 2,
    "copy that waits": 2,
    "group of copies": 2,
    "commit, pivot": 2,
    "commit, finish": 2,
    "commit below": 1,
    "bitmap add": 2,
    "bitmap read": 1,
    "export": 4,
    "writable export": 2,
    "guest write": 4,
}
"""How often each must have been completed in ten minutes."""
JOBS = ("pull", "copy", "commit", "group")
TEN_MINUTES = 600.0


class Tally:
    def __init__(self) -> None:
        self.outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.facts: Counter[str] = Counter()

    def count(self, kind: str, outcome: str) -> None:
        self.outcomes[kind][outcome] += 1

    def table(self) -> str:
        width = max([len(name) for name in [*self.outcomes, *self.facts]], default=0)
        lines = []
        for kind in sorted(self.outcomes):
            counts = ", ".join(f"{number} {what}" for what, number in self.outcomes[kind].most_common())
            lines.append(f"{kind:{width}}  {sum(self.outcomes[kind].values()):4}: {counts}")
        lines += [f"{fact:{width}}  {number:4}" for fact, number in sorted(self.facts.items())]
        return "\n".join(lines)

    def shortcomings(self, seconds: float) -> list[str]:
        """Why a run of so many seconds is no evidence."""
        found = []
        for kind, least in FLOORS.items():
            wanted, done = int(least * seconds / TEN_MINUTES), self.outcomes[kind]["completed"]
            if done < wanted:
                found.append(f"{kind}: {done} completed, {wanted} are the least")
        jobs = [counts for kind, counts in self.outcomes.items() if kind.startswith(JOBS)]
        asked = sum(sum(counts.values()) for counts in jobs)
        refused = sum(number for counts in jobs for what, number in counts.items() if what.startswith("refused"))
        if not asked or (asked - refused) / asked < ACCEPTED:
            found.append(f"{asked - refused} of {asked} jobs accepted")
        return found
