"""The units: understood by systemd, no weaker than they were, and with no capability that has no reason."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hostagent import config_text
from hostagent.api.projection import interface, polkit
from hostagent.api.projection.verbs import VERBS
from hostagent.data import listeners

UNITS = Path(__file__).resolve().parents[2] / "units"
SERVICES = {"hostagent.service": 4.0, "hostagent-data.service": 2.0}
"""How exposed each may be, of 10 (systemd-analyze security)."""
CHANGING = [verb for verb in VERBS.values() if verb.action]
ALLOWED = {"CHOWN", "FOWNER", "DAC_OVERRIDE", "SETUID", "SETGID", "KILL", "SYS_PTRACE"}

analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((UNITS / name).read_text())
    return parser


@analyze
@pytest.mark.parametrize("service", SERVICES)
def test_it_is_not_more_exposed_than_it_may_be(service: str) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNITS / service)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"exposure level for \S+: ([0-9.]+)", said)
    assert found is not None and float(found[1]) <= SERVICES[service], said[-400:]


@analyze
def test_systemd_knows_every_word(tmp_path: Path) -> None:
    program = tmp_path / "hostagent"
    program.write_text("")
    program.chmod(0o755)
    names = []
    for path in UNITS.iterdir():
        if path.suffix in (".service", ".socket", ".slice"):
            text = path.read_text().replace("/usr/lib/hostagent/bin/hostagent", str(program))
            text = text.replace("Documentation=man:hostagent(1)\n", "")
            (tmp_path / path.name).write_text(text)
            names.append(str(tmp_path / path.name))
    done = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, timeout=60)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "hostagent" in line]
    assert not ours, ours


def test_every_capability_is_allowed_and_has_its_reason() -> None:
    text = (UNITS / "hostagent.service").read_text()
    found = {
        name.removeprefix("CAP_") for name in unit("hostagent.service")["Service"]["CapabilityBoundingSet"].split()
    }
    assert found == ALLOWED
    reasons = "".join(line for line in text.splitlines() if line.startswith("#"))
    assert all(name in reasons for name in found)
    assert unit("hostagent-data.service")["Service"]["CapabilityBoundingSet"] == ""


def test_the_sockets_are_where_the_settings_say_that_they_are() -> None:
    settings = config_text.load(env={})
    found = {}
    for path in UNITS.glob("*.socket"):
        section = unit(path.name)["Socket"]
        found[section["FileDescriptorName"]] = section.get("ListenStream") or section["ListenSequentialPacket"]
    usual = Path("/run/hostagent")
    assert found == {
        "api": str(usual / settings.api.socket.name),
        "remote": f"127.0.0.1:{settings.data.port}",
        "local": str(usual / settings.data.local_socket.name),
        "control": str(usual / settings.data.control_socket.name),
        "handover": str(usual / listeners.HANDOVER),
    }


def test_the_bus_lets_everybody_call_what_there_is_and_root_alone_be_it() -> None:
    policies = {
        policy.get("context") or policy.get("user"): [(rule.tag, dict(rule.attrib)) for rule in policy]
        for policy in ElementTree.parse(UNITS / "dbus/org.hostagent1.conf").getroot()
    }
    assert set(policies) == {"root", "default"}
    assert ("allow", {"own": interface.NAME}) in policies["root"]
    assert ("deny", {"own": interface.NAME}) in policies["default"]
    rules = [rule for tag, rule in policies["default"] if tag == "allow"]
    assert {rule["send_interface"] for rule in rules} == set(interface.ALL)
    assert {rule["send_destination"] for rule in rules} == {interface.NAME}


def test_whoever_calls_it_on_the_bus_starts_the_unit() -> None:
    section = unit("dbus/org.hostagent1.service")["D-BUS Service"]
    assert dict(section) == {
        "Name": interface.NAME,
        "Exec": "/bin/false",
        "User": "root",
        "SystemdService": "hostagent.service",
    }
    assert (UNITS / section["SystemdService"]).exists()


def test_polkit_knows_every_action_and_asks_for_an_administrator() -> None:
    root = ElementTree.parse(UNITS / "polkit/org.hostagent1.policy").getroot()
    actions = {action.get("id"): action for action in root.iter("action")}
    assert set(actions) == set(polkit.ACTIONS.values()) == {f"org.hostagent1.{verb.action}" for verb in CHANGING}
    for action in actions.values():
        assert {one.tag: one.text for one in action.find("defaults") or ()} == dict.fromkeys(
            ("allow_any", "allow_inactive", "allow_active"), "auth_admin_keep"
        )
        assert action.findtext("description") and action.findtext("message")
