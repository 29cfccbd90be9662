from __future__ import annotations

import pytest

from hostagent.drivers.domain_xml import Disk, LiveLayer, Mirror, SourceType, parse
from jobs.errors import JobError

SIZE = 4 << 20
HEAD = "<name>web1</name><uuid>11111111-2222-3333-4444-555555555555</uuid>"


def domain(*disks: str) -> str:
    return f"<domain type='kvm'>{HEAD}<devices>{''.join(disks)}</devices></domain>"


def only_disk(text: str) -> Disk:
    (disk,) = parse(domain(text), size=SIZE).disks
    return disk


def test_a_running_domains_chain() -> None:
    disk = only_disk(
        """
        <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/i/top.qcow2' index='1'/>
        <backingStore type='block' index='3'><format type='qcow2'/><source dev='/dev/vg/mid'/>
        <backingStore type='network' index='4'><format type='raw'/>
        <source protocol='nbd' name='base'><host name='fd00::7' port='10809'/><host transport='unix' socket='/s'/>
        </source><backingStore/></backingStore></backingStore><target dev='vda' bus='virtio'/></disk>
        """
    )
    assert disk.layers == (
        LiveLayer(SourceType.FILE, "/i/top.qcow2", "qcow2", 1),
        LiveLayer(SourceType.BLOCK, "/dev/vg/mid", "qcow2", 3),
        LiveLayer(SourceType.NETWORK, "base", "raw", 4, "nbd", ("[fd00::7]:10809", "/s")),
    )
    assert disk.whole
    assert (disk.target, disk.device, disk.read_only, disk.mirror) == ("vda", "disk", False, None)
    assert [layer.local for layer in disk.layers] == [True, True, False]


@pytest.mark.parametrize(
    ("slices", "size"),
    [
        ("<slice type='storage' offset='0' size='512'/>", 512),
        ("<slice type='format' offset='0' size='7'/><slice type='storage' offset='8' size='9'/>", 9),
        ("<slice type='format' offset='0' size='7'/>", None),
        ("<slice type='storage' offset='0' size='-1'/>", None),
        ("", None),
    ],
)
def test_a_disk_may_be_a_part_of_what_is_there(slices: str, size: int | None) -> None:
    source = f"<source dev='/dev/a'><slices>{slices}</slices></source>"
    disk = only_disk(f"<disk type='block'><driver type='raw'/>{source}<target dev='vda'/></disk>")
    assert disk.layers == (LiveLayer(SourceType.BLOCK, "/dev/a", "raw", size=size),)


def test_of_a_stopped_domain_the_chain_is_not_known() -> None:
    disk = only_disk(
        "<disk type='file' device='disk'><driver type='qcow2'/><source file='/a'/><target dev='vda'/></disk>"
    )
    assert [layer.path for layer in disk.layers] == ["/a"]
    assert not disk.whole


def test_a_mirror_says_itself_whether_it_is_ready() -> None:
    text = """<disk type='file' device='disk'><driver type='qcow2'/><source file='/a'/><backingStore/>
        <mirror type='block' job='copy'{}><format type='raw'/><source dev='/dev/b'/></mirror>
        <target dev='vda'/></disk>"""
    target = LiveLayer(SourceType.BLOCK, "/dev/b", "raw")
    assert only_disk(text.format("")).mirror == Mirror("copy", False, target)
    assert only_disk(text.format(" ready='abort'")).mirror == Mirror("copy", False, target)
    assert only_disk(text.format(" ready='yes'")).mirror == Mirror("copy", True, target)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        pytest.param("<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>", (), id="an empty drive"),
        pytest.param(
            "<disk type='nvme' device='disk'><source type='pci'/><target dev='sda'/></disk>",
            (LiveLayer(SourceType.OTHER, None, None),),
            id="something without a path",
        ),
        pytest.param(
            "<disk type='file'><source file='/a&amp;&lt;b&#10;' index='x'/><target dev='sda'/></disk>",
            (LiveLayer(SourceType.FILE, "/a&<b\n", None),),
            id="odd characters, and an index that is no number",
        ),
    ],
)
def test_odd_disks(text: str, layers: tuple[LiveLayer, ...]) -> None:
    assert only_disk(text).layers == layers


def test_the_longest_chain() -> None:
    below = "<backingStore type='file'><format type='qcow2'/><source file='/b'/>" * 199
    text = f"<disk type='file'><source file='/a'/>{below}<backingStore/>{'</backingStore>' * 199}<target dev='vda'/></disk>"
    disk = only_disk(text)
    assert len(disk.layers) == 200 and disk.whole


BOMB = "<!DOCTYPE d [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;'>]>"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param(f"{BOMB}<domain><name>&b;</name></domain>", "document type", id="entities"),
        pytest.param(
            "<!DOCTYPE d SYSTEM 'file:///etc/passwd'>" + domain(), "document type", id="a document type elsewhere"
        ),
        pytest.param("<domain><name>&c;</name></domain>", "well-formed", id="an entity that nobody declared"),
        pytest.param(f"<domain>{'<a>' * 1001}{'</a>' * 1001}</domain>", "too deep", id="deep"),
        pytest.param(f"<domain>{'<a/>' * 200_001}</domain>", "too many", id="wide"),
        pytest.param(domain() + " " * SIZE, "libvirt.xml_size", id="long"),
        pytest.param("<domain>", "well-formed", id="cut off"),
        pytest.param("", "well-formed", id="nothing"),
        pytest.param(domain() + domain(), "well-formed", id="two"),
        pytest.param("<domain><name>web1</name></domain>", "name and a UUID", id="no UUID"),
        pytest.param(f"<network>{HEAD}</network>", "name and a UUID", id="no domain"),
        pytest.param(domain("<disk type='file'><source file='/a'/></disk>"), "without a target", id="no target"),
        pytest.param("<domain><name>\ud800</name></domain>", "well-formed", id="half a character"),
        pytest.param("<?xml version='1.0' encoding='utf-7'?>" + domain("+ADw-"), "", id="another encoding"),
    ],
)
def test_what_is_hostile_is_refused(text: str, what: str) -> None:
    if not what:  # read as UTF-8 all the same: nothing hides in it
        assert parse(text, size=SIZE).disks == ()
        return
    with pytest.raises(JobError) as refused:
        parse(text, size=SIZE)
    assert refused.value.code == "invalid"
    assert what in refused.value.message
