"""What libvirt names of a guest's disk that the guest does not stand on any more."""

from __future__ import annotations

from dataclasses import replace

from jobs.keeper import still_named
from jobs.model import Chain, Drive, FileId, Job, JobSpec, Kept, Layer, Operation, State
from tests.unit.guests.fake_libvirt import NOW

DRIVE = Drive("u-u-i-d", "web1", "vda")
TOP, BASE = (
    Layer(f"/images/{name}", name[-3:], FileId(1, number), 1, 1) for number, name in enumerate(("a.qed", "b.raw"))
)
JOB = Job(
    "4711",
    JobSpec(Operation.COMMIT, "web1/vda"),
    State.COMPLETED,
    NOW,
    NOW,
    Chain((TOP, BASE)),
    Chain((BASE,)),
    drive=DRIVE,
)


def kept(*holders: str) -> Kept:
    return Kept(TOP.path, "still needed", holders)


def test_its_own_disk_is_told_what_its_definition_must_name() -> None:
    (warning,) = still_named(JOB, [kept("export:1", "domain:u-u-i-d/vda (web1/vda)")])
    assert all(word in warning for word in ("/images/a.qed", "/images/b.raw (raw)", "virsh edit web1"))


def test_who_else_needs_it_is_no_fault_of_the_definition() -> None:
    assert still_named(JOB, [kept("domain:u-u-i-d/vdab (web1/vdab)", "domain:other/vda (web2/vda)")]) == []
    assert still_named(JOB, []) == []
    assert still_named(replace(JOB, drive=None), [kept("domain:u-u-i-d/vda (web1/vda)")]) == []
