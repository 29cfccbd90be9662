"""What a volume of a storage pool is, as libvirt says it, and where it says nothing."""

from __future__ import annotations

from typing import Any

import pytest

from hostagent.drivers.domain_xml import LiveLayer, SourceType, Volume, parse
from hostagent.drivers.libvirt import Lost, PoolRef
from hostagent.drivers.volumes import resolve
from jobs.errors import JobError

DISK = "<disk type='volume'><driver type='qcow2'/><source pool='{}' volume='{}' index='1'/>{}<target dev='vda'/></disk>"
BELOW = "<backingStore type='file' index='2'><format type='raw'/><source file='/i/base'/><backingStore/></backingStore>"


class Pools:
    """A session. `running` have volumes with paths; `kinds` are all that are defined, by type, and lie in /pools/NAME."""

    def __init__(self, running: dict[str, dict[str, str]], **kinds: str) -> None:
        self.running = running
        self.kinds = kinds
        self.lost = False

    def volume_path(self, pool: str, volume: str) -> str:
        if self.lost:
            raise Lost("the connection broke")
        if volume not in self.running.get(pool, {}):
            raise JobError("not_found", f"no volume {volume} of {pool}")
        return self.running[pool][volume]

    def pool(self, name: str) -> PoolRef:
        if name not in self.kinds:
            raise JobError("not_found", f"no pool {name}")
        target = f"<target><path>/pools/{name}</path></target>" if self.kinds[name] != "rbd" else ""
        return PoolRef(name in self.running, f"<pool type='{self.kinds[name]}'><name>{name}</name>{target}</pool>")


def layers(session: Any, pool: str, volume: str = "v", below: str = "") -> tuple[LiveLayer, ...]:
    disk = DISK.format(pool, volume, below)
    text = f"<domain><name>web1</name><uuid>u</uuid><devices>{disk}</devices></domain>"
    return resolve(session, parse(text, size=1 << 20)).disks[0].layers


def test_libvirt_knows_the_path_of_a_volume_whose_pool_runs() -> None:
    session = Pools({"p": {"v": "/pools/p/v"}, "ceph": {"v": "rbd/v"}, "lvm": {"v": "/dev/vg/v"}}, p="dir", ceph="rbd")
    top, base = layers(session, "p", below=BELOW)
    assert top == LiveLayer(SourceType.FILE, "/pools/p/v", "qcow2", 1, volume=Volume("p", "v"))
    assert top.local and base.path == "/i/base"
    assert layers(session, "lvm")[0].path == "/dev/vg/v"
    network = layers(session, "ceph")[0]
    assert (network.type, network.local, network.trouble) == (SourceType.NETWORK, False, None)


@pytest.mark.parametrize(
    ("pool", "volume", "path"),
    [
        pytest.param("off", "v", "/pools/off/v", id="a folder, also when the pool does not run"),
        pytest.param("folder", "new", "/pools/folder/new", id="a file that the pool has not seen"),
        pytest.param("mounted", "new", "/pools/mounted/new", id="the same, where it is mounted"),
        pytest.param("nfs", "v", None, id="what would be mounted first"),
        pytest.param("vg", "v", None, id="a volume group that is not active"),
        pytest.param("nobody", "v", None, id="a pool that is not defined"),
        pytest.param("off", "../../etc/shadow", None, id="what is no name of a file"),
        pytest.param("off", "..", None, id="nor is this"),
        pytest.param("off", "", None, id="nor nothing"),
    ],
)
def test_what_is_known_of_the_others(pool: str, volume: str, path: str | None) -> None:
    running: dict[str, dict[str, str]] = {"folder": {}, "mounted": {}}
    session = Pools(running, off="dir", folder="dir", mounted="netfs", nfs="netfs", vg="logical", ceph="rbd")
    (top,) = layers(session, pool, volume)
    assert top.path == path
    assert (top.trouble is not None) == (path is None), "it is never taken for nothing"


@pytest.mark.parametrize(
    ("pool", "gone"),
    [
        pytest.param("nobody", False, id="a pool that is not defined"),
        pytest.param("active", True, id="a volume that a pool which runs does not have"),
        pytest.param("vg", False, id="a pool that does not run"),
        pytest.param("ceph", False, id="what is no file of this host, whatever its pool does"),
    ],
)
def test_what_a_definition_names_and_is_not_there_holds_up_nobody(pool: str, gone: bool) -> None:
    """Of a guest that runs QEMU may have it all the same."""
    session: Any = Pools({"active": {}}, vg="logical", active="logical", ceph="rbd")
    (running,) = layers(session, pool)
    assert (running.gone, running.trouble is None) == (False, pool == "ceph")
    text = f"<domain><name>web1</name><uuid>u</uuid><devices>{DISK.format(pool, 'v', '')}</devices></domain>"
    (defined,) = resolve(session, parse(text.replace(" index='1'", ""), size=1 << 20)).disks[0].layers
    assert (defined.gone, defined.trouble is None) == (gone, gone or pool == "ceph")
    assert defined.path is None and not defined.local


def test_a_mirror_may_be_one() -> None:
    mirror = "<mirror type='volume' job='copy'><format type='raw'/><source pool='p' volume='m'/></mirror>"
    disk = f"<disk type='file'><source file='/a'/>{mirror}<target dev='vda'/></disk>"
    text = f"<domain><name>web1</name><uuid>u</uuid><devices>{disk}</devices></domain>"
    session: Any = Pools({"p": {"m": "/pools/p/m"}})
    found = resolve(session, parse(text, size=1 << 20)).disks[0].mirror
    assert found is not None and found.layer is not None and found.layer.path == "/pools/p/m"


def test_a_connection_that_breaks_says_nothing_of_volumes() -> None:
    session = Pools({}, p="dir")
    session.lost = True
    with pytest.raises(Lost):
        layers(session, "p")
