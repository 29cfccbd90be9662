"""Which files of a guest's chain somebody may have worked on."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostagent.drivers.domain_xml import Disk, LiveLayer, SourceType
from hostagent.guests.chain import read_chain
from hostagent.images.member import ChainLimits
from jobs.errors import JobError
from tests.harness import MIB, overlay, raw_image


@pytest.mark.parametrize("where", ["pool", "folder", "elsewhere"])
def test_who_may_name_images_in_pools_only_gets_at_no_other_through_a_guest(tmp_path: Path, where: str) -> None:
    folders = {name: tmp_path / name for name in ("images", "pool", "elsewhere")}
    for folder in folders.values():
        folder.mkdir()
    base = raw_image(folders["images" if where == "folder" else where] / "base.raw", MIB)
    top = overlay(folders["images"] / "top.qcow2", base)
    layers = (LiveLayer(SourceType.FILE, str(top), "qcow2", 1), LiveLayer(SourceType.FILE, str(base), "raw", 2))
    disk = Disk("vda", "disk", layers, True, False)
    pools = (str(folders["pool"]), str(folders["images"] / "top.qcow2"))
    assert read_chain(disk, ChainLimits(pools)).paths() == [str(top), str(base)]
    bounded = ChainLimits(pools, top_anywhere=False)
    if where == "elsewhere":
        with pytest.raises(JobError) as refused:
            read_chain(disk, bounded)
        assert refused.value.code == "outside_pools" and refused.value.value == str(base)
    else:
        assert read_chain(disk, bounded).paths() == [str(top), str(base)]
