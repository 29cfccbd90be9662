"""What each route asks of its caller. This table is the only place that says so: it is enforced before a body is read,
printed in SECURITY.md, and driven by a test from end to end.

`read` is for who watches: it changes nothing, and makes the agent open no file. So whatever takes a path that the
caller names (`inspect`, the list of bitmaps, a dry run) is `operate`: an answer tells whether there is such a file and
what is in its header, and costs a reader of images. `admin` is what only root could ask for on the unix socket. Within
a route it also decides, where a table of routes cannot: images outside of `images.pools`, exports by TCP, and servers
of network images beyond `images.network` are for owners of the host alone.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from starlette.routing import compile_path

from hostagent.tokens import Scope


class Rule(NamedTuple):
    """`changes`: something that outlasts the call, so that the audit tells of it."""

    scope: Scope
    changes: bool = False


OPEN = Rule(Scope.NONE)
READ = Rule(Scope.READ)
LOOK = Rule(Scope.OPERATE)
OPERATE = Rule(Scope.OPERATE, changes=True)
ADMIN = Rule(Scope.ADMIN, changes=True)

ROUTES: dict[tuple[str, str], Rule] = {
    ("GET", "/healthz"): OPEN,
    ("GET", "/readyz"): READ,
    ("GET", "/metrics"): READ,
    ("GET", "/openapi.json"): READ,
    ("GET", "/v1/host"): READ,
    ("GET", "/v1/host/drain"): READ,
    ("POST", "/v1/host/drain"): ADMIN,
    ("DELETE", "/v1/host/drain"): ADMIN,
    ("GET", "/v1/jobs"): READ,
    ("POST", "/v1/jobs"): OPERATE,
    ("GET", "/v1/jobs/{id}"): READ,
    ("PATCH", "/v1/jobs/{id}"): OPERATE,
    ("DELETE", "/v1/jobs/{id}"): OPERATE,
    ("POST", "/v1/jobs/{id}/next"): OPERATE,
    ("POST", "/v1/jobs/{id}/abort"): OPERATE,
    ("POST", "/v1/jobs/{id}/pause"): OPERATE,
    ("POST", "/v1/jobs/{id}/resume"): OPERATE,
    ("POST", "/v1/jobs/{id}/complete"): OPERATE,
    ("POST", "/v1/groups"): OPERATE,
    ("GET", "/v1/groups/{id}"): READ,
    ("GET", "/v1/exports"): READ,
    ("POST", "/v1/exports"): OPERATE,
    ("GET", "/v1/exports/{id}"): READ,
    ("DELETE", "/v1/exports/{id}"): OPERATE,
    ("GET", "/v1/images/inspect"): LOOK,
    ("GET", "/v1/images/bitmaps"): LOOK,
    ("POST", "/v1/images/bitmaps"): OPERATE,
    ("DELETE", "/v1/images/bitmaps"): OPERATE,
    ("POST", "/v1/images/bitmaps/merge"): OPERATE,
    ("GET", "/v1/grants"): READ,
    ("GET", "/v1/grants/{id}"): READ,
    ("DELETE", "/v1/grants/{id}"): OPERATE,
    ("POST", "/v1/grants/{id}/undo"): ADMIN,
    ("GET", "/v1/events"): READ,
}

UNKNOWN = READ
"""Of what is no route: a stranger does not learn even that."""


def _pattern(path: str) -> re.Pattern[str]:
    """As the router reads it: what this does not match, no route does."""
    return compile_path(path)[0]


_PATTERNS = [(method, _pattern(path), path, rule) for (method, path), rule in ROUTES.items()]


class Found(NamedTuple):
    """`path` is the route's, empty where there is none."""

    rule: Rule
    path: str


def find(method: str, path: str) -> Found:
    method = "GET" if method == "HEAD" else method
    for known, pattern, template, rule in _PATTERNS:
        if known == method and pattern.match(path):
            return Found(rule, template)
    return Found(UNKNOWN, "")


# For people

CALLERS: dict[str, Scope | None] = {
    "TCP: nobody": Scope.NONE,
    "TCP: read": Scope.READ,
    "TCP: operate": Scope.OPERATE,
    "TCP: admin": Scope.ADMIN,
    "unix: a member of the group": Scope.OPERATE,
    "unix: root, the agent's user": Scope.ADMIN,
    "unix: others": None,
}
"""Who there is, with the scope that they have. None: not even what is open."""


def refused_with(rule: Rule, scope: Scope | None) -> int | None:
    """The status that one with `scope` gets before anything else is looked at; None: none."""
    if scope is None:
        return 403
    if scope >= rule.scope:
        return None
    return 401 if scope is Scope.NONE else 403


def table() -> str:
    """Markdown, for SECURITY.md."""
    rows = [["Verb", "Route", *CALLERS], ["---"] * (2 + len(CALLERS))]
    for (method, path), rule in ROUTES.items():
        answers = [refused_with(rule, scope) for scope in CALLERS.values()]
        rows.append([method, f"`{path}`", *(str(status) if status else "yes" for status in answers)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(table(), end="")
