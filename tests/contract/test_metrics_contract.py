"""The documented metrics (metrics.txt), the table in hostagent.metrics and a real exposition say the same."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hostagent.metrics import METRICS, PREFIX, JobGauge, Metrics, Snapshot

LATER = {"transfers", "transfer_bytes_total", "tickets"}


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """name → kind, labels. Two or more spaces part entries; names with commas between them share their labels."""
    found = {}
    for line in (Path(__file__).parent / "metrics.txt").read_text().splitlines():
        for entry in re.split(r"\s{2,}", line.strip()):
            names, labels, histogram = re.fullmatch(r"([\w, ]+?)\s*(?:\{(.*?)\})?\s*(\(histogram\))?", entry).groups()
            for name in names.split(", "):
                kind = "histogram" if histogram else "counter" if name.endswith("_total") else "gauge"
                found[name] = (kind, frozenset((labels or "").split(",")) - {""})
    return found


@pytest.fixture(scope="module")
def exposition() -> str:
    """One with every series in it."""
    snapshot = Snapshot(
        taken=1.0,
        jobs=[JobGauge("/a", "pull", "running", cur=1, end=2, bandwidth=0, stalled=0.0)],
        exports={"ro": 1},
        grants={"r": 2},
        daemons={"running": 1},
        dropped={"sse": 1},
    )
    metrics = Metrics(lambda: snapshot, version="1", qemu="7.2")
    metrics.job_finished("pull", "completed", 1.0)
    metrics.event_lag(0.1)
    metrics.revocation("job", "revoked")
    metrics.revocation_lag(0.1)
    metrics.export_started(0.1)
    metrics.event("qmp", "job.completed")
    metrics.libvirt_call("describe", "ok", 0.1)
    metrics.reconcile("ok")
    metrics.refused("scope")
    return metrics.render()[0].decode()


def test_every_documented_metric_is_there_and_no_other():
    table = {name: (entry.kind, frozenset(entry.labels)) for name, entry in METRICS.items()}
    assert table == {name: what for name, what in documented().items() if name not in LATER}
    assert set(documented()) >= LATER


def test_the_exposition_has_exactly_the_table(exposition):
    shown = {}
    for family in text_string_to_metric_families(exposition):
        name = family.name.removeprefix(PREFIX) + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        shown[name] = (family.type, frozenset(labels))
    assert shown == {name: (entry.kind, frozenset(entry.labels)) for name, entry in METRICS.items()}


def test_promtool_has_nothing_to_say(exposition):
    promtool = shutil.which("promtool") or Path(sys.executable).with_name("promtool")  # tools/setup.sh puts it there
    done = subprocess.run([promtool, "check", "metrics"], input=exposition, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
