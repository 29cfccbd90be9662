"""How the host is at the moment: for `status`, for readiness and for `drain`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Reversible
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from events.model import now
from hostagent import __version__
from hostagent.access.subject import Subject
from hostagent.api import views
from hostagent.api.trouble import Trouble
from hostagent.drain import Drain
from hostagent.guests.holding import Holding
from hostagent.live import Live
from hostagent.nbd import serving
from hostagent.nbd.chains import Chains
from hostagent.nbd.exports import Exports
from hostagent.nbd.prepared import PreparedChain
from hostagent.nbd.watch import Watch
from hostagent.store import Store
from jobs.engine import Engine
from jobs.errors import JobError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What does not change while the agent runs."""

    host: str
    qemu: str
    state_dir: Path
    runtime_dir: Path
    started: datetime
    min_free: int
    settings: Mapping[str, object]


class Status:
    """`troubles` are the last errors, the oldest first; `data` tells of the data daemon, None where there is none;
    `dbus` is the check of the message bus."""

    def __init__(
        self,
        facts: HostFacts,
        subject: Subject,
        *,
        store: Store,
        engine: Engine,
        exports: Exports,
        chains: Chains,
        drain: Drain,
        watch: Watch,
        live: Live,
        holding: Holding,
        data: Callable[[], Json] | None,
        dbus: Callable[[], Json],
        troubles: Reversible[Trouble],
    ) -> None:
        self._facts = facts
        self._subject = subject
        self._store = store
        self._engine = engine
        self._exports = exports
        self._chains = chains
        self._drain = drain
        self._watch = watch
        self._live = live
        self._holding = holding
        self._data = data
        self._dbus = dbus
        self._troubles = troubles

    async def host(self) -> Json:
        owed = await self._store.owed_files()
        tried = [file for file in owed if file.verdict == "pending"]
        oldest = min(tried, key=lambda file: file.since, default=None)
        exports: dict[str, int] = {}
        for record in self._exports.active():
            if record.active:  # a lost one may not be recorded yet
                exports[record.state] = exports.get(record.state, 0) + 1
        return {
            "host": self._facts.host,
            "version": __version__,
            "qemu": self._facts.qemu,
            "libvirt": self._live.facts(),
            "user": {"name": self._subject.name, "uid": self._subject.uid},
            "access": "own" if self._subject.own else "acl",
            "pid": os.getpid(),
            "started": views.time(self._facts.started),
            "state_dir": str(self._facts.state_dir),
            "runtime_dir": str(self._facts.runtime_dir),
            "storage_daemons": [self._daemon(chain) for chain in self._chains.all() if chain.daemon],
            "orphans": [
                {"id": o.id, "pid": o.pid, "image": None, "exports": list(o.exports), "holds": o.holds}
                for o in self._chains.orphans
            ],
            "revocations": {
                "pending": len(owed),
                "oldest_seconds": (now() - oldest.since).total_seconds() if oldest else None,
                "oldest": {"path": oldest.path, "reason": oldest.reason} if oldest else None,
            },
            "changed_files": [
                {"path": d.path, "what": d.what, "lost": d.lost, "remedy": d.remedy} for d in self._watch.found
            ],
            "last_errors": [
                {"time": views.time(t.time), "what": t.what, "message": t.message, "remedy": t.remedy}
                for t in reversed(self._troubles)
            ],
            "store": {
                "path": str(self._facts.state_dir),
                "events": self._store.last_seq(),
                "free": self._free(),
                "min_free": self._facts.min_free,
            },
            "jobs": await self._store.counts(),
            "exports": exports,
            "data_daemon": self._data() if self._data else None,
            "dbus": self._dbus()["detail"],
            "drain": {"draining": self._drain.on, "since": views.time(self._drain.record.since)},
            "settings": dict(self._facts.settings),
        }

    async def drain(self) -> Json:
        clients = await asyncio.to_thread(serving.clients_of, self._exports.active())
        exports = [(one, [c._asdict() for c in clients.get(one.id, [])]) for one in self._exports.active()]
        return views.drain(
            self._drain.record,
            jobs=[*self._drain.holding(), *self._engine.settling()],
            exports=exports,
            revocations=len(await self._store.owed_files()),
            beginning=self._drain.beginning,
        )

    def _daemon(self, chain: PreparedChain) -> Json:
        assert chain.daemon is not None
        users = sorted(str(user) for user in chain.users)
        return {
            "id": chain.daemon.id,
            "pid": chain.daemon.pid,
            "state": "running" if chain.answers else "unresponsive",
            "since": views.time(chain.silent),
            "image": chain.path,
            "exports": sum(1 for user in chain.users if user.kind == "export"),
            "job": next((user.removeprefix("job:") for user in users if user.startswith("job:")), None),
            "writable": bool(chain.writable) or chain.writer is not None,
        }

    async def ready(self) -> Json:
        checks: Json = {}
        try:
            await self._store.counts()
            self.require_room()
            checks["store"] = {"ok": True, "detail": str(self._facts.state_dir)}
        except JobError as error:
            checks["store"] = {"ok": False, "detail": error.message, "remedy": error.remedy}
        stuck = [chain.path for chain in self._chains.all() if not chain.answers]
        detail = f"unresponsive: {', '.join(stuck)}" if stuck else "all answer"
        checks["storage_daemons"] = {"ok": True, "detail": detail}
        since = views.time(self._drain.record.since)
        drain = f"since {since}: no new work is taken" if self._drain.on else "not being drained"
        checks["drain"] = {"ok": not self._drain.on, "detail": drain}
        checks["libvirt"] = self._live.check()
        if self._live.off is None:
            checks["domains"] = self._holding.check()
        checks["dbus"] = self._dbus()
        return {"ready": all(check["ok"] for check in checks.values()), "checks": checks}

    def _free(self) -> int:
        """Bytes that are free beside the store."""
        room = os.statvfs(self._facts.state_dir)
        return room.f_bavail * room.f_frsize

    def require_room(self) -> None:
        """Raises JobError store_full when new work could not be recorded."""
        free = self._free()
        if free < self._facts.min_free:
            raise JobError(
                "store_full",
                f"only {free} bytes are free beside the store in {str(self._facts.state_dir)!r}",
                remedy="make space there, or lower store.min_free; running work goes on",
            )
