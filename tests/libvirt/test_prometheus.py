"""A real Prometheus scrapes a real agent while jobs run: what the dashboard and the alerts ask is answered."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import promql
from tests.harness import MIB, AgentProcess, Json, overlay, raw_image, reachable
from tests.libvirt.guest import Guest
from tests.libvirt.private import PrivateLibvirt, until
from tests.promql import Query
from tests.qemu.faults import HASTE, eventually, storage_daemons
from tests.scraping import Exporter, Prometheus

WINDOW = "20s"
SIZE = 4 * MIB
STANDS = 1
"""Bytes per second, at which a job does not move while it is looked at."""
# A domain that moves to another host is told of twice for a moment.
OWNERS = """\
# HELP libvirt_domain_openstack_info What OpenStack says of a domain
# TYPE libvirt_domain_openstack_info gauge
libvirt_domain_openstack_info{domain="web1",instance_name="shop",project_name="store",user_name="alice"} 1
libvirt_domain_openstack_info{domain="web1",instance_name="shop",project_name="store",user_name="carol"} 1
libvirt_domain_openstack_info{domain="db1",instance_name="ledger",project_name="bank",user_name="bob"} 1
"""
QUIET = {"Calls to libvirt that failed A"}
"""Queries of the dashboard that find something only where something is wrong."""


@dataclass
class Scene:
    agent: AgentProcess
    prometheus: Prometheus
    guest: Guest
    """web1, on whose disk a job works."""
    offline: Json
    """A job on an image."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, daemon: PrivateLibvirt) -> Iterator[Scene]:
    home = tmp_path_factory.mktemp("scene")
    images = home / "images"
    images.mkdir(mode=0o755)
    settings = {**HASTE, "LIBVIRT_URI": daemon.uri, "METRICS_LISTEN": "127.0.0.1:0", "METRICS_REFRESH": "0.5"}
    with reachable(images), AgentProcess(home, settings) as agent, Exporter(OWNERS) as exporter:
        until(lambda: agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
        with Prometheus(home / "prometheus", hostagent=address_of(agent), libvirt=exporter.address) as prometheus:
            prometheus.until(lambda: [value for _, value in prometheus.query("up")] == [1, 1])
            guest = daemon.guest("web1", chain(images, "guest"))
            guest.start(paused=True)
            agent.post("/v1/jobs", {"operation": "pull", "target": "web1/vda", "bandwidth": STANDS})
            offline = agent.pull(chain(images, "offline"), bandwidth=STANDS)
            agent.export(chain(images, "exported"))
            agent.until_ended(agent.pull(chain(images, "done"))["id"])
            fail(agent, images)
            yield Scene(agent, prometheus, guest, offline)
            daemon.remove_guests()


def address_of(agent: AgentProcess) -> str:
    """Where the agent says that it answers scrapes."""
    return str(eventually(lambda: next((line["address"] for line in said(agent) if line["message"] == "metrics"), None)))


def said(agent: AgentProcess) -> list[Json]:
    return [json.loads(line) for line in agent.log.read_text().splitlines() if line.startswith("{")]


def chain(folder: Path, name: str) -> Path:
    base = raw_image(folder / f"{name}.raw", SIZE)
    return overlay(folder / f"{name}.qcow2", base)


def fail(agent: AgentProcess, folder: Path) -> None:
    """A job fails: its storage daemon is killed."""
    before = set(storage_daemons(agent))
    job = agent.pull(chain(folder, "killed"), bandwidth=STANDS)
    agent.until(job["id"], lambda job: job["state"] == "running")
    (pid,) = set(storage_daemons(agent)) - before
    os.kill(pid, signal.SIGKILL)
    assert agent.until_ended(job["id"])["state"] == "failed"


@pytest.mark.parametrize("query", promql.panels(), ids=str)
def test_the_dashboard_is_filled(scene: Scene, query: Query) -> None:
    expr = promql.concrete(query.expr, window=WINDOW)
    if query.where in QUIET:
        scene.prometheus.query(expr)
        return
    found = scene.prometheus.until(lambda: scene.prometheus.query(expr))
    for labels, _ in found:
        missing = query.shown - labels.keys()
        assert missing <= {"domain"}, labels  # it is empty for an image
    with_domain = any("domain" in labels for labels, _ in found)
    assert with_domain == ("domain" in query.shown or "openstack" in expr)


@pytest.mark.parametrize("alert", promql.alerts(), ids=str)
def test_what_an_alert_looks_at_is_there(scene: Scene, alert: Query) -> None:
    scene.prometheus.query(alert.expr)
    for selector in promql.selectors(alert.expr):
        assert scene.prometheus.until(lambda: scene.prometheus.query(str(selector)))  # noqa: B023


def test_alerts_are_evaluated_and_the_failed_job_is_told(scene: Scene) -> None:
    def rules() -> list[Json]:
        groups = scene.prometheus.ask("/api/v1/rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    scene.prometheus.until(lambda: all(rule["health"] == "ok" for rule in rules()))
    assert {rule["name"] for rule in rules()} == {alert.where for alert in promql.alerts()}
    firing = scene.prometheus.until(lambda: [rule for rule in rules() if rule["state"] == "firing"])
    assert {rule["name"] for rule in firing} == {"HostagentJobFailed"}
    ((told,),) = (rule["alerts"] for rule in firing)
    assert (told["labels"]["operation"], told["labels"]["severity"]) == ("pull", "warning")
    assert told["annotations"]["summary"] == f"A pull has failed on {address_of(scene.agent)}"


def test_jobs_of_guests_are_joined_to_whose_the_guests_are(scene: Scene) -> None:
    (joined,) = [query for query in promql.panels() if "openstack" in query.expr]
    expr = promql.concrete(joined.expr, window=WINDOW)
    ((labels, value),) = scene.prometheus.until(lambda: scene.prometheus.query(expr))
    assert labels == {
        "job": "hostagent",
        "instance": address_of(scene.agent),
        "domain": "web1",
        "target_device": "vda",
        "operation": "pull",
        "instance_name": "shop",
        "project_name": "store",
    }
    assert 0 <= value < 1


def test_a_guest_whose_qemu_hangs_makes_no_scrape_slow(scene: Scene) -> None:
    with scene.guest.frozen():
        connection = http.client.HTTPConnection(address_of(scene.agent), timeout=5)
        try:
            connection.request("GET", "/metrics")
            shown = connection.getresponse().read().decode()
        finally:
            connection.close()
    assert 'hostagent_block_job_end_bytes{domain="web1"' in shown


def test_an_address_that_is_taken_is_waited_for_and_keeps_nobody_from_working(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        agent = AgentProcess(tmp_path, {"METRICS_LISTEN": address, "METRICS_REFRESH": "0.2"})
        try:
            agent.start()
            assert agent.get("/v1/jobs")["items"] == []
            assert eventually(lambda: any("no metrics on metrics.listen" in line["message"] for line in said(agent)))
            taken.close()
            assert address_of(agent) == address
        finally:
            agent.close()


def test_figures_are_those_of_the_job_and_end_with_it(scene: Scene) -> None:
    agent, prometheus = scene.agent, scene.prometheus
    end = f'hostagent_block_job_end_bytes{{target_device="{scene.offline["path"]}"}}'
    assert [value for _, value in prometheus.until(lambda: prometheus.query(end))] == [SIZE]
    agent.patch(f"/v1/jobs/{scene.offline['id']}", {"bandwidth": 0})
    assert agent.until_ended(scene.offline["id"])["state"] == "completed"
    prometheus.until(lambda: not prometheus.query(end))
    completed = 'sum(hostagent_block_jobs_finished_total{operation="pull", outcome="completed"})'
    prometheus.until(lambda: prometheus.query(completed) == [({}, 2)])
