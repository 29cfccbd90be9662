"""What the virtual machine is provisioned and tried with, on this machine itself, with a libvirtd of the tests' own."""

from __future__ import annotations

from pathlib import Path

from tests.harness import AgentProcess
from tests.libvirt.private import PrivateLibvirt, until
from tests.vagrant import provision, smoke


def test_provisioned_it_does_what_it_should_to_a_guests_disk(
    module_agent: AgentProcess, libvirt: PrivateLibvirt, tmp_path: Path
) -> None:
    done = provision(tmp_path / "bin")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "make setup" in done.stdout
    until(lambda: module_agent.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
    agent = {"HOSTAGENT_SOCKET": str(module_agent.socket), "LIBVIRT_DEFAULT_URI": libvirt.uri}
    done = smoke(tmp_path / "bin", "live", **agent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    for command in ("job pull", "job next", "job copy", "job commit"):
        assert f"$ hostagent {command} " in done.stdout
    assert done.stdout.endswith("all held\n")
    assert not list((tmp_path / "images").iterdir())
    with libvirt.connection() as connection:
        assert connection.listAllDomains() == []
    assert module_agent.get("/v1/host")["storage_daemons"] == []
