"""A libvirtd that is another host's: what it tells is shown, and nothing is done to files that have the same names here.

It is reached by a transport that libvirt has for other hosts (ext: a command's pipes), with a real libvirtd behind it.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.live import leads_elsewhere
from tests.harness import AgentProcess, ApiError, Json, overlay, raw_image, reachable
from tests.libvirt.private import PrivateLibvirt, until
from tests.qemu.faults import HASTE

RELAY = f"""#!{sys.executable}
import os, socket, sys, threading
far = socket.socket(socket.AF_UNIX)
far.connect({{path!r}})
def up():
    while data := os.read(0, 65536):
        far.sendall(data)
    os._exit(0)
threading.Thread(target=up, daemon=True).start()
while data := far.recv(65536):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
"""


@pytest.fixture
def agent(tmp_path: Path, libvirt: PrivateLibvirt) -> Iterator[AgentProcess]:
    relay = tmp_path / "relay"
    relay.write_text(RELAY.format(path=f"{libvirt.runtime}/libvirt-sock"))
    relay.chmod(0o755)
    settings = {**HASTE, "LIBVIRT_URI": f"qemu+ext:///system?command={relay}"}
    with reachable(tmp_path), AgentProcess(tmp_path, settings) as process:
        until(lambda: process.get("/v1/host")["libvirt"]["connected"], "the agent is connected")
        yield process


def check(agent: AgentProcess, name: str) -> str:
    detail: str = agent.call("GET", "/readyz")[2]["checks"][name]["detail"]
    return detail


def test_nothing_is_done_to_the_files_of_another_hosts_domains(
    agent: AgentProcess, libvirt: PrivateLibvirt, folder: Path
) -> None:
    guest = libvirt.guest("web1", overlay(folder / "top.qcow2", raw_image(folder / "base.raw", 1 << 20)))
    guest.start(paused=True)
    assert "another host's" in check(agent, "libvirt")
    assert "nothing is given back" in check(agent, "domains")
    for operation, more in (("pull", {}), ("copy", {"dest": str(folder / "copy.qcow2")}), ("commit", {})):
        with pytest.raises(ApiError) as refused:
            agent.post("/v1/jobs", {"operation": operation, "target": "web1/vda", **more})
        error: Json = refused.value.body
        assert (error["code"], "another host's" in error["detail"]) == ("not_supported", True), error
        assert "agent of that host" in error["remedy"]
    owners = {path: (os.stat(path).st_uid, stat.S_IMODE(os.stat(path).st_mode)) for path in folder.iterdir()}
    with guest.domain() as domain:
        domain.blockPull("vda", 0)
        until(lambda: not domain.blockJobInfo("vda"), "the pull is over")
    assert not agent.get("/v1/grants")["items"]
    assert not agent.get("/v1/jobs")["items"], "files of these names here are not what that pull worked on"
    assert {path: (os.stat(path).st_uid, stat.S_IMODE(os.stat(path).st_mode)) for path in folder.iterdir()} == owners


@pytest.mark.parametrize(
    ("uri", "elsewhere"),
    [
        ("qemu:///system", False),
        ("qemu:///session", False),
        ("qemu+unix:///system?socket=/run/x", False),
        ("test:///default", False),
        ("qemu://host/system", True),
        ("qemu+tls://host:16514/system", True),
        ("qemu+ssh:///system", True),
        ("qemu+tcp:///system", True),
        ("alias", True),
    ],
)
def test_a_uri_leads_elsewhere_unless_it_is_this_hosts(uri: str, elsewhere: bool) -> None:
    assert leads_elsewhere(uri) is elsewhere
