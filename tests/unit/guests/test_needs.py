"""Which files a disk needs, on real images: what libvirt says, what headers say, and when neither can be trusted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hostagent.drivers.domain_xml import base_label, parse
from hostagent.guests import labels
from hostagent.guests.labels import Labels
from hostagent.guests.needs import DiskNeeds, read_needs
from hostagent.images.member import ChainLimits
from hostagent.records import Label
from jobs.errors import JobError
from jobs.model import FileId
from tests.harness import MIB, overlay, raw_image

QEMU, OTHER = Label(64055, 64055), Label(107, 108)
UUID = "11111111-2222-3333-4444-555555555555"
NO = "<seclabel model='dac' relabel='no'/>"


class Images:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = raw_image(folder / "base.raw", MIB)
        self.middle = overlay(folder / "middle.qcow2", self.base)
        self.top = overlay(folder / "top.qcow2", self.middle, "qcow2")


@pytest.fixture
def images(tmp_path: Path) -> Images:
    return Images(tmp_path)


def disk(path: Path, *, format: str = "qcow2", below: str = "", source: str = "", more: str = "") -> str:
    return (
        f"<disk type='file' device='disk'><driver type='{format}'/><source file='{path}'>{source}</source>{below}{more}"
        "<target dev='vda'/></disk>"
    )


def layer(path: Path, format: str, below: str = "<backingStore/>", source: str = "") -> str:
    what = f"<format type='{format}'/><source file='{path}'>{source}</source>{below}"
    return f"<backingStore type='file'>{what}</backingStore>"


def domain(disks: str, seclabel: str = "") -> str:
    return f"<domain><name>web1</name><uuid>{UUID}</uuid><devices>{disks}</devices>{seclabel}</domain>"


def needs(
    *texts: str, default: Label | None = QEMU, limits: ChainLimits | None = None, relabels: bool = True
) -> DiskNeeds:
    described = [parse(text, size=MIB) for text in texts]
    (found,) = read_needs(described, Labels(default, QEMU.uid, relabels=relabels), limits or ChainLimits())
    return found


def modes(found: DiskNeeds) -> dict[str, str]:
    return {Path(use.need.layer.path).name: use.need.mode for use in found.uses}


ALL = {"top.qcow2": "rw", "middle.qcow2": "r", "base.raw": "r"}


def test_of_a_domain_that_is_off_the_headers_say_the_chain(images: Images) -> None:
    found = needs(domain(disk(images.top)))
    assert (modes(found), found.missing, found.unknown) == (ALL, False, None)
    assert {use.label for use in found.uses} == {QEMU}
    assert {use.need.layer.file.ino for use in found.uses} == {
        path.stat().st_ino for path in (images.top, images.middle, images.base)
    }
    assert modes(needs(domain(disk(images.top, more="<readonly/>")))) == ALL | {"top.qcow2": "r"}


def test_of_a_running_domain_libvirts_chain_counts_and_the_definitions_too(images: Images) -> None:
    live = domain(disk(images.top, below="<backingStore/>"))
    assert modes(needs(live)) == {"top.qcow2": "rw"}  # a pull is done, and the definition says no more than the top
    assert modes(needs(live, domain(disk(images.top)))) == {"top.qcow2": "rw"}
    named = domain(disk(images.top, below=layer(images.base, "raw")))
    assert modes(needs(live, named)) == {"top.qcow2": "rw", "base.raw": "r"}
    other = overlay(images.folder / "other.qcow2", images.middle, "qcow2")
    assert modes(needs(live, domain(disk(other)))) == ALL | {"other.qcow2": "rw"}


def test_the_target_of_a_copy_is_needed_with_what_it_stands_on(images: Images) -> None:
    other = raw_image(images.folder / "other.raw", MIB)
    target = overlay(images.folder / "target.qcow2", other)
    mirror = f"<mirror type='file' job='copy'><format type='qcow2'/><source file='{target}'/></mirror>"
    found = needs(domain(disk(images.top, below="<backingStore/>", more=mirror)))
    assert modes(found) == {"top.qcow2": "rw", "target.qcow2": "rw", "other.raw": "r"}


def test_links_lead_to_their_files(images: Images) -> None:
    link = images.folder / "link"
    link.symlink_to(images.top)
    assert modes(needs(domain(disk(link)))) == ALL


@pytest.mark.parametrize("gone", ["top", "base"])
def test_a_file_that_is_not_there_is_missing(images: Images, gone: str) -> None:
    getattr(images, gone).unlink()
    found = needs(domain(disk(images.top)))
    assert (found.missing, found.unknown) == (True, None)
    assert modes(found) == ({} if gone == "top" else {"top.qcow2": "rw", "middle.qcow2": "r"})


def test_what_a_header_names_elsewhere_is_not_touched_and_the_chain_not_known(images: Images, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    far = overlay(tmp_path / "far" / "shadow", raw_image(tmp_path / "far" / "base.raw", MIB))
    top = overlay(images.folder / "far.qcow2", far, "qcow2")
    found = needs(domain(disk(top)))
    assert modes(found) == {"far.qcow2": "rw"}
    assert found.unknown is not None and "images.pools" in str(found.unknown.remedy)
    all_ = {"far.qcow2": "rw", "shadow": "r", "base.raw": "r"}
    assert modes(needs(domain(disk(top)), limits=ChainLimits((str(far.parent),)))) == all_


def test_of_a_raw_file_that_a_header_names_elsewhere_it_is_known_which_it_is(images: Images, tmp_path: Path) -> None:
    """It stands on nothing. That it has a qcow2 header, which its guest wrote, makes no difference."""
    (tmp_path / "far").mkdir()
    far = tmp_path / "far" / "base"
    far.write_bytes(images.top.read_bytes())
    top = overlay(images.folder / "far.qcow2", far)
    found = needs(domain(disk(top)))
    assert (modes(found), found.unknown, found.missing) == ({"far.qcow2": "rw"}, None, False)
    assert found.names == {FileId(far.stat().st_dev, far.stat().st_ino)}
    far.unlink()
    assert needs(domain(disk(top))).missing
    far.mkdir()
    assert needs(domain(disk(top))).names == frozenset()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_links_that_headers_name_are_followed_as_libvirt_does_and_judged_by_where_they_lead(
    images: Images, tmp_path: Path, format: str
) -> None:
    named = images.base if format == "raw" else images.middle
    link = images.folder / "link"
    link.symlink_to(named)
    top = overlay(images.folder / "linked.qcow2", link, format)
    assert modes(needs(domain(disk(top)))) == {"linked.qcow2": "rw"} | {
        name: "r" for name in ("base.raw", *(["middle.qcow2"] if format == "qcow2" else []))
    }
    (tmp_path / "far").mkdir()
    link.unlink()
    link.symlink_to(named.rename(tmp_path / "far" / named.name))
    found = needs(domain(disk(top)))
    assert modes(found) == {"linked.qcow2": "rw"} and (found.unknown is None) == (format == "raw")


def test_a_cdrom_with_a_chain_is_read_and_writes_nothing(images: Images) -> None:
    found = needs(domain(disk(images.top, more="<readonly/>").replace("device='disk'", "device='cdrom'")))
    assert modes(found) == ALL | {"top.qcow2": "r"}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("type='network'><source protocol='nbd' name='x'/>", id="network"),
        pytest.param("type='dir'><source dir='/etc'/>", id="dir"),
        pytest.param("type='nvme'><source type='pci' managed='yes' namespace='1'/>", id="nvme"),
        pytest.param("type='vhostuser'><source type='unix' path='/run/x.sock'/>", id="vhostuser"),
        pytest.param("type='block'><source dev='/dev/null'/>", id="a device that is none of blocks"),
    ],
)
def test_what_is_no_file_of_this_host_is_not_held(text: str) -> None:
    found = needs(domain(f"<disk {text}<driver type='raw'/><target dev='vda'/></disk>"))
    assert (found.uses, found.missing, found.unknown) == ((), False, None)


def test_below_a_network_image_libvirts_xml_alone_says_what_there_is(images: Images) -> None:
    top = "<disk type='network'><driver type='qcow2'/><source protocol='nbd' name='x'/>{}<target dev='vda'/></disk>"
    assert modes(needs(domain(top.format(layer(images.base, "raw"))))) == {"base.raw": "r"}
    assert modes(needs(domain(top.format(layer(images.middle, "qcow2", below=""))))) == {
        "middle.qcow2": "r",
        "base.raw": "r",
    }


def test_what_the_xml_alone_says_counts_more_than_headers(images: Images) -> None:
    other = raw_image(images.folder / "other.raw", MIB)
    found = needs(domain(disk(images.top, below=layer(other, "raw"))))
    assert modes(found) == {"top.qcow2": "rw", "other.raw": "r"}


def test_the_format_is_what_the_xml_and_the_headers_say(images: Images) -> None:
    found = needs(domain(disk(images.top)))
    formats = {Path(use.need.layer.path).name: use.need.layer.format for use in found.uses}
    assert formats == {"top.qcow2": "qcow2", "middle.qcow2": "qcow2", "base.raw": "raw"}
    bare = domain(f"<disk type='file'><source file='{images.top}'/><target dev='vda'/></disk>")
    assert [use.need.layer.format for use in needs(bare).uses] == ["raw"]  # libvirt probes nothing
    part = "<slices><slice type='storage' offset='512' size='1024'/></slices>"
    for format, read_only, noted in (("raw", "", "raw"), ("raw", "<readonly/>", ""), ("qcow2", "", "")):
        found = needs(domain(disk(images.base, format=format, source=part, more=read_only)))
        assert [use.need.layer.format for use in found.uses] == [noted]


def test_a_volume_whose_path_nobody_knows_is_not_known(images: Images) -> None:
    text = "<disk type='volume'><source pool='p' volume='v'/><driver type='qcow2'/><target dev='vda'/></disk>"
    described = parse(domain(text), size=MIB)
    (one,) = described.disks
    untold = replace(one.layers[0], trouble="storage pool 'p' is not active")
    (found,) = read_needs(
        [replace(described, disks=(replace(one, layers=(untold,)),))],
        Labels(QEMU, QEMU.uid, relabels=True),
        ChainLimits(),
    )
    assert found.uses == () and found.unknown is not None and "not active" in found.unknown.message


def test_a_volume_that_is_gone_is_a_file_that_is_not_there(images: Images) -> None:
    text = "<disk type='volume'><source pool='p' volume='v'/><driver type='qcow2'/><target dev='vda'/></disk>"
    described = parse(domain(text), size=MIB)
    (one,) = described.disks
    gone = replace(described, disks=(replace(one, layers=(replace(one.layers[0], gone=True),)),))
    (found,) = read_needs([gone], Labels(QEMU, QEMU.uid, relabels=True), ChainLimits())
    assert (found.uses, found.missing, found.unknown) == ((), True, None)


def test_a_chain_that_cannot_be_read_is_not_known(images: Images) -> None:
    images.middle.write_bytes(images.middle.read_bytes().replace(b"base.raw", b"nbd:x:10", 1))
    assert needs(domain(disk(images.top))).unknown is not None
    found = needs(domain(disk(images.base, format="vmdk")))
    assert found.unknown is not None and modes(found) == {"base.raw": "rw"}
    assert needs(domain(disk(images.base, format="raw"))).unknown is None
    deep = needs(domain(disk(images.top)), limits=ChainLimits(max_depth=2))
    assert deep.unknown is not None


def test_a_loop_ends(images: Images) -> None:
    images.middle.write_bytes(images.top.read_bytes())
    found = needs(domain(disk(images.top)))
    assert (modes(found), found.unknown) == ({"top.qcow2": "rw", "middle.qcow2": "r"}, None)


def dac(**attributes: str) -> str:
    label = attributes.pop("label", "")
    said = " ".join(f"{key}='{value}'" for key, value in attributes.items())
    return f"<seclabel model='dac' {said}>{f'<label>{label}</label>' if label else ''}</seclabel>"


@pytest.mark.parametrize(
    ("seclabel", "source", "label"),
    [
        ("", "", QEMU),
        (dac(type="dynamic", relabel="yes", label="+107:+108"), "", OTHER),
        (dac(type="static", relabel="yes", label="+107:+108"), "", OTHER),
        (dac(type="static", relabel="no", label=f"+{QEMU.uid}:+{QEMU.gid}"), "", None),
        (dac(type="static", label=f"+{QEMU.uid}:+{QEMU.gid}"), "", None),
        (dac(type="static", relabel="no", label="+107:+108"), "", OTHER),  # not the user whom the agent gives access
        (dac(type="none"), "", None),
        ("<seclabel type='dynamic' model='selinux'/>", "", QEMU),
        ("", NO, None),
        (dac(type="dynamic", relabel="yes", label="+107:+108"), NO, OTHER),
        ("", dac(label="+107:+108"), OTHER),
        (dac(type="none"), dac(label="+107:+108"), OTHER),
    ],
)
def test_the_label_that_a_file_is_opened_by(images: Images, seclabel: str, source: str, label: Label | None) -> None:
    found = needs(domain(disk(images.top, source=source), seclabel))
    assert {use.label for use in found.uses} == {label}  # a disk's own is that of all its layers


def test_a_layer_may_have_a_label_of_its_own(images: Images) -> None:
    found = needs(domain(disk(images.middle, below=layer(images.base, "raw", source=NO))))
    assert {Path(use.need.layer.path).name: use.label for use in found.uses} == {"middle.qcow2": QEMU, "base.raw": None}


def test_where_libvirt_has_no_such_labels_it_changes_no_owner(images: Images) -> None:
    assert {use.label for use in needs(domain(disk(images.top)), default=None).uses} == {None}
    assert {use.label for use in needs(domain(disk(images.top)), relabels=False).uses} == {None}
    other = domain(disk(images.top), dac(type="static", relabel="yes", label="+107:+108"))
    assert {use.label for use in needs(other, relabels=False).uses} == {OTHER}, "the agent gives it nothing"


def test_labels_are_numbers_or_names(images: Images) -> None:
    assert labels.parse("+107:+108") == OTHER
    assert labels.parse("root:root") == Label(0, 0)
    assert labels.parse("64055:64055") == QEMU
    for text in ("nobody-of-this-name:root", "", "+x:+y"):
        with pytest.raises(JobError):
            labels.parse(text)
    found = needs(domain(disk(images.top), dac(type="static", relabel="yes", label="nobody-of-this-name:root")))
    assert found.unknown is not None


def test_the_label_of_domains_that_say_none() -> None:
    model = "<secmodel><model>{}</model><doi>0</doi><baselabel type='kvm'>{}</baselabel></secmodel>"
    text = f"<capabilities><host>{model.format('selinux', 'x')}{model.format('dac', '+107:+108')}</host></capabilities>"
    assert base_label(text, size=MIB) == "+107:+108"
    assert base_label("<capabilities><host/></capabilities>", size=MIB) is None


def test_what_cannot_be_looked_at_is_not_known(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> os.stat_result:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hostagent.guests.needs.os.stat", fail)
    assert needs(domain(disk(images.top))).unknown is not None
