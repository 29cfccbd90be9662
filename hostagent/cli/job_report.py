"""A job in words: one line of a list, everything that is known, and what its end means for the files."""

from __future__ import annotations

from datetime import datetime

from hostagent.cli.client import Json
from hostagent.cli.progress import percent, speed
from hostagent.cli.terminal import Column, Terminal, age
from hostagent.sizes import format_duration, format_rate, format_size

COLUMNS = ("id", "operation", "target", "state", Column("progress", right=True), "speed", Column("age", right=True))


SHORTEST = 0.1  # seconds; what took less is not told as 0


def row(job: Json) -> tuple[str, ...]:
    return (
        str(job["id"]),
        str(job["operation"]) if job.get("origin", "agent") == "agent" else f"{job['operation']} ({job['origin']})",
        str(job["target"]),
        str(job["state"]),
        percent(job),
        speed(job),
        age(job.get("finished") or job.get("created")),
    )


def outcome(terminal: Terminal, job: Json) -> None:
    """What a person wants to know when a job ended."""
    took = _took(job)
    state = str(job["state"])
    terminal.line(f"job {job['id']} {state}" + (f" after {took}" if took else ""), state)
    if state == "ready":
        end = f"end it with `hostagent job complete --pivot|--finish {job['id']}`, or abort it"
        terminal.fields([("ready", end), *_copy(job)])
        return
    terminal.fields([*_error(job), *_copy(job), *chain(job.get("chain") or {}), *_access(job), *_warnings(job)])


def whole(terminal: Terminal, job: Json) -> None:
    """Everything that is known of a job."""
    terminal.heading(f"job {job['id']}")
    terminal.fields(
        [
            ("operation", _operation(job)),
            ("target", str(job["target"])),
            ("path", _unless(job.get("path"), job["target"])),
            *_copy(job),
            ("state", str(job["state"])),
            ("since", _ago(job.get("since"))),
            ("progress", _progress(job)),
            ("writes", "synchronous: the guest's wait for the copy" if job.get("synchronous_writes") else ""),
            ("bandwidth", format_rate(job["bandwidth"]) if job.get("bandwidth") else ""),
            ("created", _ago(job.get("created"))),
            ("took", _took(job) if job.get("finished") else ""),
            ("origin", _unless(job.get("origin"), "agent")),
            ("group", _group(job)),
            ("labels", ", ".join(f"{k}={v}" for k, v in (job.get("labels") or {}).items())),
            *_error(job),
            *chain(job.get("chain") or {}),
            *_access(job),
            *_warnings(job),
        ]
    )


def plan(terminal: Terminal, found: Json, *, kept_by: str) -> None:
    """What a job would do; nothing has been changed. `kept_by`: the option after which the image stays on top."""
    terminal.heading("nothing was changed; this is what the job would do")
    space = found.get("space") or {}
    lost = {
        "before": found.get("before"),
        "after": found.get("after"),
        "revoked": [entry["path"] for entry in found.get("revoke") or []],
        "kept": found.get("keep"),
    }
    undecided = found.get("completion") is None and (found.get("after") or [])[:1] != (found.get("before") or [])[:1]
    becomes = "with --pivot" if undecided else "becomes"
    terminal.fields(
        [
            *chain(lost, becomes=becomes, revoked="would revoke", kept="would stay open"),
            (f"with {kept_by}", "the chain stays as it is, and nothing is revoked" if undecided else ""),
            ("space needed", _size(space.get("need"), "at most ")),
            ("space free", _size(space.get("free"))),
            *_bitmaps(found.get("bitmaps") or []),
            *_warnings(found),
        ]
    )


def total(terminal: Terminal, plans: list[Json]) -> None:
    """What all copies of a group need; each says what is free where it goes, which may be the same for some."""
    needs = [plan["space"]["need"] for plan in plans if (plan.get("space") or {}).get("need") is not None]
    unknown = f", and what {len(plans) - len(needs)} of them need is not known" if len(needs) < len(plans) else ""
    terminal.heading(f"all {len(plans)} disks")
    terminal.fields([("space needed", f"at most {format_size(sum(needs))}{unknown}")])


def _bitmaps(found: list[Json]) -> list[tuple[str, str]]:
    """The bitmaps of a commit's base, each with what it takes in the file."""
    lines: list[tuple[str, str]] = []
    for bitmap in found:
        words = [f"{_size(bitmap['bytes'])} in the base"]
        words += [] if bitmap["recording"] else ["disabled"]
        words += [bitmap["state"]] if bitmap["state"] != "consistent" else []
        words += ["would be removed"] if bitmap["pruned"] else []
        lines.append(("bitmap" if not lines else " ", f"{bitmap['name']}: {', '.join(words)}"))
    return lines


def chain(
    found: Json, *, becomes: str = "becomes", revoked: str = "revoked", kept: str = "kept"
) -> list[tuple[str, str]]:
    """The chain before and after, top first, and what became of the files that left it."""
    before, after = found.get("before") or [], found.get("after") or []
    lines = [("chain", " ← ".join(_short(before)))]
    if after != before:
        lines.append((becomes, " ← ".join(_short(after))))
    lines += [(revoked, path) for path in found.get("revoked") or []]
    lines += [(kept, _kept(entry)) for entry in found.get("kept") or []]
    return [(name if i == 0 or lines[i - 1][0] != name else " ", value) for i, (name, value) in enumerate(lines)]


def _short(paths: list[str]) -> list[str]:
    """The first path whole, the others by name while they stay in the same folder; of a long chain only the ends."""
    shown: list[str] = []
    folder = None
    for path in paths:
        parent, _, name = path.rpartition("/")
        shown.append(name if parent == folder else path)
        folder = parent
    return shown if len(shown) <= 8 else [*shown[:3], f"({len(shown) - 6} more)", *shown[-3:]]


def _kept(entry: Json) -> str:
    holders = entry.get("holders") or []
    return f"{entry['path']}: {entry['reason']}" + (f" ({', '.join(holders)})" if holders else "")


def _error(job: Json) -> list[tuple[str, str]]:
    error = job.get("error")
    if not error:
        return []
    return [("error", f"{error['message']} ({error['code']})"), ("remedy", error.get("remedy") or "")]


def _access(job: Json) -> list[tuple[str, str]]:
    revocation = job.get("revocation")
    remarks = {
        "pending": "pending: the agent goes on with it (`hostagent status`)",
        "failed": "failed: the agent tries again (`hostagent status`)",
    }
    return [("revocation", remarks[revocation])] if revocation in remarks else []


def _warnings(job: Json) -> list[tuple[str, str]]:
    return [("warning" if i == 0 else " ", text) for i, text in enumerate(job.get("warnings") or [])]


def _operation(job: Json) -> str:
    increment = job.get("increment")
    return f"{job['operation']}, {format_size(increment)} at a time" if increment else str(job["operation"])


def _progress(job: Json) -> str:
    cursor = job.get("cursor") or {}
    if not cursor.get("end"):
        return ""
    parts = [f"{format_size(cursor['cur'])} of {format_size(cursor['end'])}", percent(job), speed(job)]
    return ", ".join(part for part in parts if part)


def _copy(job: Json) -> list[tuple[str, str]]:
    dest = job.get("dest")
    return [("copy", f"{dest['path']} ({dest['format']}, {dest['state']})")] if dest else []


def _group(job: Json) -> str:
    group = job.get("group")
    return f"{group['id']} ({len(group['jobs'])} jobs)" if group else ""


def _took(job: Json) -> str:
    first, last = job.get("started") or job.get("created"), job.get("finished")
    if not first or not last:
        return ""
    seconds = (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
    return format_duration(seconds) if seconds >= SHORTEST else f"less than {format_duration(SHORTEST)}"


def _ago(time: str | None) -> str:
    return f"{time} ({age(time)} ago)" if time else ""


def _unless(value: object, same: object) -> str:
    return "" if value in (None, same) else str(value)


def _size(value: object, prefix: str = "") -> str:
    return f"{prefix}{format_size(value)}" if isinstance(value, int) else ""
