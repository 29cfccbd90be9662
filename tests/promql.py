"""What the alerts and the dashboard ask of Prometheus, for tests: read from the files that are shipped."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

UNITS = Path(__file__).resolve().parents[1] / "units"
RULES = UNITS / "prometheus" / "hostagent.rules.yml"
SCRAPE = UNITS / "prometheus" / "prometheus.yml"
DASHBOARD = UNITS / "grafana" / "hostagent.json"


@dataclass(frozen=True)
class Query:
    """`where` says it to people; `shown` are the labels that its legend or its text names."""

    where: str
    expr: str
    shown: frozenset[str]

    def __str__(self) -> str:
        return self.where


@dataclass(frozen=True)
class Selector:
    """A series that a query reads: its name and its matchers, as they are written."""

    name: str
    matchers: str

    def __str__(self) -> str:
        return f"{self.name}{{{self.matchers}}}"

    @property
    def labels(self) -> set[str]:
        return set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", self.matchers))


def program(name: str) -> str:
    """Where tools/setup.sh puts it, or the distribution."""
    mine = Path(sys.executable).with_name(name)
    found = str(mine) if mine.exists() else shutil.which(name)
    assert found, f"{name} is missing (tools/setup.sh develop)"
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def alerts() -> list[Query]:
    found = []
    for rule in rules():
        text = " ".join(rule["annotations"].values())
        found.append(Query(rule["alert"], rule["expr"], frozenset(re.findall(r"\$labels\.(\w+)", text))))
    return found


def panels() -> list[Query]:
    return [
        Query(f"{panel['title']} {target['refId']}", target["expr"], _legend(target))
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
    ]


def concrete(expr: str, *, window: str) -> str:
    """The query as Grafana sends it, for all hosts; `window` in place of what it takes from the graph's width."""
    return expr.replace("$__rate_interval", window).replace("$instance", ".*")


def selectors(expr: str) -> Iterator[Selector]:
    """Of metrics; names of functions and labels have another form."""
    for name, matchers in re.findall(r"\b((?:hostagent|libvirt)_\w+|up)\b(?:\s*\{([^}]*)\})?", expr):
        yield Selector(name, matchers)


def grouped(expr: str) -> set[str]:
    """The labels that it groups and joins by."""
    lists = re.findall(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)", expr)
    return {label.strip() for each in lists for label in each.split(",")} - {""}


def _legend(target: dict[str, Any]) -> frozenset[str]:
    return frozenset(re.findall(r"\{\{\s*(\w+)\s*\}\}", target.get("legendFormat", "")))
