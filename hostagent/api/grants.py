"""The use-cases of access: who may open which file, and what of it is taken back by hand."""

from __future__ import annotations

from typing import Any

from hostagent.access.ledger import Ledger
from hostagent.api import views
from hostagent.nbd.exports import Exports
from hostagent.nbd.offline_bitmaps import Bitmaps
from hostagent.store import Store
from jobs.engine import Engine
from jobs.errors import JobError
from jobs.model import Holder

Json = dict[str, Any]


class Grants:
    """The ledger's rows, and the files that it has not closed, as `grant` shows them."""

    def __init__(self, *, store: Store, ledger: Ledger, engine: Engine, exports: Exports, bitmaps: Bitmaps) -> None:
        self._store = store
        self._ledger = ledger
        self._engine = engine
        self._exports = exports
        self._bitmaps = bitmaps

    async def page(self, *, path: str | None, holder: str | None, limit: int, after: str | None) -> Json:
        items = [
            item
            for item in await self._all()
            if path in (None, item["path"])
            and holder in (None, item["holder"]["id"], f"{item['holder']['kind']}:{item['holder']['id']}")
        ]
        if after is not None:
            items = items[1 + next((n for n, item in enumerate(items) if item["id"] == after), len(items)) :]
        return {"items": items[:limit], "next": items[limit - 1]["id"] if len(items) > limit else None}

    async def get(self, id: str) -> Json:
        for item in await self._all():
            if item["id"] == id:
                return item
        raise JobError("not_found", f"no grant {id}", field="id", value=id, remedy="see `hostagent grant list`")

    async def revoke(self, id: str) -> Json:
        """Take back what nobody who lives needs; what somebody needs is `busy`, naming them."""
        grant = await self.get(id)
        entry = next((row for row in await self._store.access_rows() if row.id == id), None)
        if entry is None:
            files = [f for f in await self._store.access_files() if views.leftover(f)["id"] == id]
        else:
            rows = await self._store.access_rows([entry.file])
            needy = [row.title for row in rows if await self._needs(row.holder)]
            if needy:
                raise JobError(
                    "busy",
                    f"{grant['path']!r} is needed by {', '.join(needy)}",
                    field="id",
                    value=id,
                    remedy="end them first; their access ends with them",
                    holders=needy,
                )
            await self._store.delete_rows([id])
            files = await self._store.access_files([entry.file])
        results = await self._ledger.converge([f.file for f in files], trigger="operator")
        for result in results.values():
            grant |= {"state": result.verdict.value, "detail": result.reason}
        return grant

    async def undo(self, id: str) -> Json:
        """Give a file back to the user from whom libvirt's ownership of it was taken."""
        await self.get(id)
        entry = next((f for f in await self._store.access_files() if views.leftover(f)["id"] == id), None)
        if entry is None or entry.taken is None:
            raise JobError(
                "conflict",
                f"grant {id} is none whose owner was changed at its end",
                field="id",
                value=id,
                remedy="see `hostagent grant list`: those have the access `owner` and the state `revoked`",
            )
        result = await self._ledger.undo(entry.file)
        after = next(iter(await self._store.access_files([entry.file])), entry)
        return views.leftover(after) | {"state": result.verdict.value, "detail": result.reason}

    async def _needs(self, holder: Holder) -> bool:
        """Whether the holder lives. An image that merely stands on a file is not open; it gets access when it is."""
        if holder.kind == "job":
            return any(job.id == holder.id for job in self._engine.active())
        if holder.kind == "export":
            return any(export.id == holder.id for export in self._exports.active())
        if holder.kind == "tool":
            return self._bitmaps.runs(holder)
        return holder.kind == "domain"

    async def _all(self) -> list[Json]:
        files = {entry.file: entry for entry in await self._store.access_files()}
        rows = await self._store.access_rows()
        held = {row.file for row in rows}
        left = [f for f in files.values() if f.file not in held and (f.verdict != "revoked" or f.taken)]
        return [*(views.grant(row, files.get(row.file)) for row in rows), *(views.leftover(f) for f in left)]
