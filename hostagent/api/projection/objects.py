"""What the use-cases answer, as properties. Pure; one function a noun."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from time import time as unix_time
from typing import Any

from hostagent.api.projection.interface import EXPORT, GRANT, JOB, NAME

Json = dict[str, Any]

ROOT = "/" + NAME.replace(".", "/")
UNKNOWN_UID = 2**32 - 1
INTERFACES = {"job": JOB, "export": EXPORT, "grant": GRANT}
ENDED = frozenset({"completed", "failed", "aborted"})
LIVE_EXPORTS = frozenset({"running", "unresponsive"})


def path_of(kind: str, id: str) -> str:
    return f"{ROOT}/{kind}/{re.sub('[^A-Za-z0-9]', '_', id) or '_'}"


def job(value: Json, *, exports: Sequence[str] = (), uid: int = UNKNOWN_UID) -> Json:
    """`exports` are the paths of those of the same image, `uid` who started it."""
    cur, end = value["cursor"]["cur"], value["cursor"]["end"]
    ended, error = value["state"] in ENDED, value["error"] or {}
    moves = value["state"] in ("ready", "completing", "aborting") and value["operation"] != "pull"
    valid = end > 0 and not moves
    eta = None if ended else value["eta"]
    return {
        "Operation": value["operation"],
        "Progress": cur / end if valid else 0.0,
        "ProgressValid": valid,
        "Bytes": end,
        "Rate": 0 if ended else value["rate"],
        "StartTime": micros(value["started"]),
        "ExpectedEndTime": 0 if eta is None else round((unix_time() + eta) * 1e6),
        "Objects": sorted(exports),
        "StartedByUID": uid,
        "Cancelable": not ended and value["state"] != "aborting" and value["origin"] == "agent",
        "Id": value["id"],
        "State": value["state"],
        "Error": error.get("code"),
        "ErrorMessage": error.get("message"),
        "Remedy": error.get("remedy"),
        "Cursor": [cur, end],
        "Target": value["target"],
        "Path": value["path"],
        "Dest": (value["dest"] or {}).get("path"),
        "Domain": value["domain"],
        "Disk": value["disk"],
        "Group": (value["group"] or {}).get("id"),
        "Origin": value["origin"],
        "Labels": value["labels"],
        "Bandwidth": value["bandwidth"],
        "Finished": micros(value["finished"]),
        "Revocation": value["revocation"],
        "Chain": value["chain"]["after" if value["state"] == "completed" else "before"],
        "Revoked": value["chain"]["revoked"],
        "Kept": [[one["path"], one["reason"]] for one in value["chain"]["kept"]],
        "Warnings": value["warnings"],
        "Revision": value["revision"],
    }


def export(value: Json) -> Json:
    return {
        "Id": value["id"],
        "Image": value["image"],
        "Path": value["path"],
        "Uri": value["uri"],
        "Format": value["format"],
        "Size": value["size"],
        "Writable": value["writable"],
        "Bitmaps": value["bitmaps"],
        "State": value["state"],
        "Reason": value["reason"],
        "Created": micros(value["created"]),
        "Expires": micros(value["expires"]),
        "Labels": value["labels"],
        "Revision": value["revision"],
    }


def grant(value: Json) -> Json:
    holder = value["holder"]
    return {
        "Id": value["id"],
        "Path": value["path"],
        "Mode": value["mode"],
        "Holder": [holder["kind"], holder["id"], holder.get("name")],
        "Since": micros(value["since"]),
        "Reason": value["reason"],
        "Access": value["access"],
        "State": value["state"],
        "Detail": value["detail"],
    }


def micros(time: str | None) -> int:
    """RFC 3339 as microseconds since 1970; 0 is none."""
    return 0 if time is None else round(datetime.fromisoformat(time).timestamp() * 1e6)
