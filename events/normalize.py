"""Raw hypervisor events → what concerns us. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STATES_THAT_MATTER = frozenset({"pending", "concluded", "ready", "null"})


def job_of(name: str, data: Mapping[str, Any]) -> str | None:
    """The hypervisor's id of the block job that a QMP event tells news of; None when it tells none.

    running ⇄ paused and ready ⇄ standby come in pairs whenever QEMU drains the graph, and mean nothing by themselves.
    BLOCK_JOB_* name the job `device` or `id` (qapi/block-core.json), JOB_STATUS_CHANGE `id` (qapi/job.json).
    """
    if name == "JOB_STATUS_CHANGE":
        return str(data.get("id")) if data.get("status") in _STATES_THAT_MATTER else None
    if name.startswith("BLOCK_JOB_"):
        found = data.get("device", data.get("id"))
        return None if found is None else str(found)
    return None
