"""The document of the interface, the code, what a running agent answers, and what busctl makes of it: all the same."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from hostagent.api.projection import interface, objects, verbs
from tests.dbus.bus import Caller, PrivateBus, until
from tests.harness import MIB, AgentProcess, overlay, raw_image

MANAGER, JOB, EXPORT, GRANT = (f"org.hostagent1.{noun}" for noun in ("Manager", "Job", "Export", "Grant"))
ROOT = "/org/hostagent1"
DOCUMENT = Path(interface.__file__).with_name("org.hostagent1.xml")
busctl = pytest.mark.skipif(shutil.which("busctl") is None, reason="busctl is not installed (tools/setup.sh develop)")


def plain(element: ET.Element) -> Any:
    """An element without its white space."""
    return element.tag, dict(element.attrib), [plain(child) for child in element]


def documented() -> dict[str, Any]:
    return {element.get("name", ""): plain(element) for element in ET.parse(DOCUMENT).getroot()}


def test_every_documented_method_has_its_code_and_no_other() -> None:
    assert {(name, member) for name, one in interface.OURS.items() for member in one.methods} == set(verbs.VERBS)


def test_every_annotated_constant_is_a_property_that_the_code_gives() -> None:
    for name, one in interface.OURS.items():
        assert len(one.properties) == len(ET.fromstring(one.xml).findall("property")), name


@pytest.mark.qemu
def test_what_is_introspected_is_the_document(caller: Caller, agent: AgentProcess, folder: Path) -> None:
    top = overlay(folder / "top.qcow2", raw_image(folder / "base.raw", MIB))
    export = caller.call(ROOT, MANAGER, "StartExport", "sa{sv}", str(top), {})
    job = caller.call(ROOT, MANAGER, "StartJob", "ssa{sv}", "pull", str(top), {})
    grant = until(lambda: next((p for p, o in caller.managed().items() if GRANT in o), None), "there is a grant")
    for path, name in ((ROOT, MANAGER), (job, JOB), (export, EXPORT), (grant, GRANT)):
        found = ET.fromstring(caller.call(path, "org.freedesktop.DBus.Introspectable", "Introspect"))
        ours = {one.get("name"): plain(one) for one in found.iter("interface") if one.get("name") in interface.OURS}
        assert ours == {name: documented()[name]}
        assert set(caller.get_all(path, name)) == set(interface.OURS[name].properties)
    agent.until_ended(caller.get(job, JOB, "Id"))
    caller.call(export, EXPORT, "Stop", "a{sv}", {})


@pytest.mark.qemu
@busctl
def test_busctl_shows_the_tree_and_each_object(
    caller: Caller, agent: AgentProcess, bus: PrivateBus, folder: Path
) -> None:
    def run(*words: str) -> str:
        command = ["busctl", f"--address={bus.address}", "--no-pager", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return done.stdout

    top = overlay(folder / "top.qcow2", raw_image(folder / "base.raw", MIB))
    job = caller.call(ROOT, MANAGER, "StartJob", "ssa{sv}", "pull", str(top), {})
    agent.until_ended(caller.get(job, JOB, "Id"))
    until(lambda: caller.get(job, JOB, "State") == "completed", "that is shown")
    tree = run("tree", "org.hostagent1").splitlines()
    shown = [line.strip(" │├└─") for line in tree]
    assert shown[:2] == ["/org", ROOT], tree
    assert job in shown[shown.index(f"{ROOT}/job") :], tree

    lines = run("introspect", "org.hostagent1", job).splitlines()
    for name in interface.OURS[JOB].properties:
        assert any(re.match(rf"\.{name}\s+property", line) for line in lines), name
    assert any(re.match(r"\.State\s+property\s+s\s+\"completed\"\s+emits-change", line) for line in lines), lines
    assert any(re.match(r"\.Cancel\s+method\s+a\{sv\}", line) for line in lines)
    assert any(re.match(r"\.Completed\s+signal\s+bs", line) for line in lines)
    assert "ObjectManager" in run("introspect", "org.hostagent1", "/")
    assert run("call", "org.hostagent1", ROOT, MANAGER, "GetJob", "s", caller.get(job, JOB, "Id")) == f'o "{job}"\n'


def test_paths_are_what_busctl_can_complete() -> None:
    assert objects.path_of("job", "3f2a-1b") == "/org/hostagent1/job/3f2a_1b"
    assert objects.path_of("grant", "file--12-3") == "/org/hostagent1/grant/file__12_3"
