"""Lists as SQL: which rows, newest first, page by page. Text and values alone; the store runs them.

Times may be equal, so the order is (created, id), and a page begins after the last row of the one before. LIMIT is the
last value, and the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Condition = tuple[str, Sequence[str]]
"""SQL, and the values of its question marks."""
Order = tuple[str, str]
JOBS: Order = ("jobs.created", "jobs.id")
EXPORTS: Order = ("exports.created", "exports.id")
FEW = 1000
"""Jobs that may be read to find those on one page: a few milliseconds."""


class Selection(NamedTuple):
    sql: str
    values: tuple[str, ...]


def jobs(
    state: str | None,
    path: str | None,
    origin: str | None,
    group: str | None,
    labels: Mapping[str, str],
    after: str | None,
    *,
    in_state: int,
) -> Selection:
    """`in_state` is how many jobs are in that state now."""
    live = path if path is not None and not path.startswith("/") else None  # DOMAIN/DISK, as it was asked for
    path = None if live else path
    few = state is not None and (in_state <= FEW or (path is None and not labels))
    source, order, where = _fewest(state if few else None, path, group, labels)
    for column, value in (("state", state), ("path", path), ("origin", origin)):
        if value is not None:
            where.append((f"jobs.{column}=?", (value,)))
    if live is not None:
        where.append(("json_extract(jobs.body, '$.spec.target')=?", (live,)))
    if group is not None:
        where.append(("json_extract(jobs.body, '$.group.id')=?", (group,)))
    for label in labels.items():
        where.append(("EXISTS (SELECT 1 FROM job_labels x WHERE x.job=jobs.id AND x.key=? AND x.value=?)", label))
    return _page("jobs", source, order, where, after)


def _fewest(
    state: str | None, path: str | None, group: str | None, labels: Mapping[str, str]
) -> tuple[str, Order, list[Condition]]:
    """What to select from, its columns of (created, id), and the conditions that go with it.

    Each filter has an index, and the one that names the fewest leads: a group, a state with few jobs in it, a disk, a
    label, any other state. SQLite cannot know that, and would read all jobs to find one.
    """
    if group is not None:
        return "jobs INDEXED BY jobs_by_group", JOBS, []
    if state is not None:
        return "jobs INDEXED BY jobs_by_state", JOBS, []
    if path is not None:
        return "jobs INDEXED BY jobs_by_path", JOBS, []
    if labels:
        first = next(iter(labels.items()))
        source = "job_labels l CROSS JOIN jobs ON jobs.id=l.job"  # CROSS: in this order
        return source, ("l.created", "l.job"), [("l.key=? AND l.value=?", first)]
    return "jobs INDEXED BY jobs_by_created", JOBS, []


def exports(
    active: bool | None, state: str | None, image: str | None, labels: Mapping[str, str], after: str | None
) -> Selection:
    """Only the order has an index: retention bounds how many exports there are."""
    where: list[Condition] = []
    if active is not None:
        where.append((f"stopped IS {'' if active else 'NOT '}NULL", ()))
    if state is not None:
        where.append(("state=?", (state,)))
    if image is not None:
        where.append(("? IN (json_extract(body, '$.path'), json_extract(body, '$.image'))", (image,)))
    for label in labels.items():
        where.append(("EXISTS (SELECT 1 FROM json_each(body, '$.labels') WHERE key=? AND value=?)", label))
    return _page("exports", "exports", EXPORTS, where, after)


def _page(table: str, source: str, order: Order, where: list[Condition], after: str | None) -> Selection:
    conditions = [*where]
    if after is not None:
        last = f"(SELECT created, id FROM {table} WHERE id=?)"  # noqa: S608
        conditions.append((f"({order[0]}, {order[1]}) < {last}", (after,)))
    text = " AND ".join(condition for condition, _ in conditions) or "1"
    sql = f"SELECT {table}.body FROM {source} WHERE {text} ORDER BY {order[0]} DESC, {order[1]} DESC LIMIT ?"  # noqa: S608
    return Selection(sql, tuple(value for _, values in conditions for value in values))
