"""The data daemon's metrics: the documented table, the code's and a real exposition say the same."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from hostagent.data.metrics import METRICS, Metrics

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
DOCUMENTED = {
    name: tuple(filter(None, labels.strip().split(", ")))
    for name, labels in re.findall(r"^\| `hostagent_(\w+)` \|([^|]*)\|$", TEXT, re.MULTILINE)
}


def test_the_documented_metrics_are_those_of_the_code() -> None:
    assert {name: labels for name, (_, _, labels) in METRICS.items()} == DOCUMENTED


def test_an_exposition_has_them_with_their_labels() -> None:
    metrics = Metrics()
    metrics.connections = lambda: {"remote": 1}
    for name, (kind, _, labels) in METRICS.items():
        if kind == "counter":
            metrics.count(name, *labels)
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found[sample.name.removeprefix("hostagent_")] = set(sample.labels)
    assert found == {name: set(labels) for name, labels in DOCUMENTED.items()}
