"""The alerts and the dashboard that are shipped: whole, and about metrics and labels that there are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hostagent.metrics import METRICS, PREFIX
from jobs.model import TERMINAL, Operation, State
from tests import promql
from tests.promql import Query

CASES = Path(__file__).with_name("alerts.test.yml")
MANUAL = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
TARGET = {"job", "instance"}
"""Labels that Prometheus gives to all that it scrapes."""
OF_OTHERS = {
    "up": TARGET,
    "libvirt_domain_openstack_info": TARGET | {"domain", "instance_name", "project_name"},
}
VALUES = {
    "outcome": set(TERMINAL),
    "operation": set(Operation),
    "state": {*State, "running", "unresponsive", "orphan"},
    "job": {"hostagent"},
    "result": {"ok", "error", "timeout"},
}
QUERIES = [*promql.alerts(), *promql.panels()]


def labels_of(name: str) -> set[str] | None:
    """Those of a series of that name; None when there is no such series."""
    if name in OF_OTHERS:
        return set(OF_OTHERS[name])
    base = name.removeprefix(PREFIX)
    if base in METRICS and METRICS[base].kind != "histogram":
        return {*METRICS[base].labels, *TARGET}
    part = re.fullmatch(r"(\w+)_(bucket|count|sum)", base)
    if part and part[1] in METRICS and METRICS[part[1]].kind == "histogram":
        return {*METRICS[part[1]].labels, *TARGET} | ({"le"} if part[2] == "bucket" else set())
    return None


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_it_asks_for_metrics_and_labels_that_there_are(query: Query) -> None:
    found = list(promql.selectors(query.expr))
    assert found
    there: set[str] = set()
    for selector in found:
        labels = labels_of(selector.name)
        assert labels is not None, f"there is no {selector.name}"
        assert selector.labels <= labels, selector
        there |= labels
    assert promql.grouped(query.expr) <= there
    assert query.shown <= there


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_the_values_that_it_asks_for_are_ours(query: Query) -> None:
    for label, value in re.findall(r'(\w+)\s*!?="([^"]*)"', query.expr):
        assert value in VALUES[label]


@pytest.mark.parametrize("query", promql.panels(), ids=str)
def test_a_counter_or_a_histogram_is_shown_as_its_growth(query: Query) -> None:
    for selector in promql.selectors(query.expr):
        grows = selector.name.endswith(("_total", "_bucket", "_count", "_sum"))
        before = query.expr[: query.expr.index(str(selector.name))]
        assert grows == before.endswith(("rate(", "increase(")), selector


def test_the_check_of_names_finds_what_is_wrong() -> None:
    assert labels_of("hostagent_block_job_duration_seconds") is None
    assert labels_of("hostagent_block_jobs_finished") is None
    assert labels_of("hostagent_block_job_duration_seconds_bucket") == {*TARGET, "operation", "outcome", "le"}
    assert promql.grouped("sum by (a, b) (x) * on(c) group_left (d) y") == {"a", "b", "c", "d"}
    (one,) = promql.selectors('rate(hostagent_x{a="b", c!~"d"}[5m])')
    assert (one.name, one.labels) == ("hostagent_x", {"a", "c"})


# Alerts


def promtool(*words: str | Path) -> None:
    done = subprocess.run([promql.program("promtool"), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_understands_rules_and_settings() -> None:
    promtool("check", "rules", promql.RULES)
    promtool("check", "config", promql.SCRAPE)


def test_alerts_fire_when_they_should_and_not_before() -> None:
    promtool("test", "rules", CASES)


def test_each_alert_has_cases_in_which_it_fires_and_in_which_it_does_not() -> None:
    tried: dict[str, set[bool]] = {}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for check in case["alert_rule_test"]:
            tried.setdefault(check["alertname"], set()).add(bool(check["exp_alerts"]))
    assert tried == {query.where: {True, False} for query in promql.alerts()}


@pytest.mark.parametrize("rule", promql.rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_where_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert "$labels.instance" in " ".join(rule["annotations"].values())


def test_each_alert_is_explained() -> None:
    assert set(re.findall(r"^\| `(Hostagent\w+)` \|", MANUAL, re.MULTILINE)) == {q.where for q in promql.alerts()}


def test_the_port_of_the_example_is_that_of_the_manual() -> None:
    jobs = yaml.safe_load(promql.SCRAPE.read_text())["scrape_configs"]
    (ours,) = next(job["static_configs"][0]["targets"] for job in jobs if job["job_name"] == "hostagent")
    assert f"as {ours})" in (promql.UNITS / "hostagent.toml").read_text().replace("\n# ", " ")
    assert not ours.endswith(":9177")  # a libvirt exporter's


# The dashboard


def test_the_dashboard_is_one() -> None:
    found = promql.dashboard()
    assert found["schemaVersion"] >= 39 and found["uid"] == "hostagent" and found["title"] == "hostagent"
    assert "id" not in found  # it is the database's of some Grafana
    source, host = found["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (host["name"], host["type"], host["datasource"]["uid"]) == ("instance", "query", "${datasource}")
    assert host["query"]["query"] == "label_values(hostagent_build_info, instance)"


PANELS = [panel for panel in promql.dashboard()["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_can_be_read(panel: dict[str, Any]) -> None:
    assert panel["type"] in ("stat", "timeseries", "table")
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == source
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"] == source
        ours = [one for one in promql.selectors(target["expr"]) if one.name.startswith(PREFIX)]
        assert all('instance=~"$instance"' in one.matchers for one in ours)
        if panel["type"] == "timeseries":
            assert target["legendFormat"]
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_have_names_and_places_of_their_own() -> None:
    everything = promql.dashboard()["panels"]
    for key in ("id", "title"):
        values = [panel[key] for panel in PANELS]
        assert len(set(values)) == len(values)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells


def test_the_manual_lists_every_metric() -> None:
    row = re.compile(r"^\| `hostagent_(\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", re.MULTILINE)
    listed = {
        name: (kind, tuple(re.findall(r"\w+", labels)), text) for name, kind, labels, text in row.findall(MANUAL)
    }
    assert listed == {name: (entry.kind, entry.labels, entry.help) for name, entry in METRICS.items()}
