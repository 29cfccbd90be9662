"""By which ownership a domain opens its files: libvirt's DAC labels, as numbers."""

from __future__ import annotations

import grp
import pwd
import re
from collections.abc import Callable
from pathlib import Path

from hostagent.drivers.domain_xml import DacLabel, Disk, Domain, LiveLayer
from hostagent.records import Label
from jobs.errors import JobError

_DYNAMIC = re.compile(rb"^[ \t]*dynamic_ownership[ \t]*=[ \t]*(\d+)", re.MULTILINE)
MOST_SETTINGS = 1 << 20
"""Bytes of qemu.conf, of which Debian's has 40,000."""


def relabels(qemu_conf: Path) -> bool:
    """Whether libvirt changes the owners of files; it does where it is told nothing. Blocking; an OSError for settings
    that are there and cannot be read."""
    try:
        with qemu_conf.open("rb") as file:
            said = _DYNAMIC.findall(file.read(MOST_SETTINGS))
    except FileNotFoundError:
        return True
    return not said or int(said[-1]) != 0


def parse(text: str) -> Label:
    """USER:GROUP as libvirt reads it: a number after a +, a name, or a number that is no name. A JobError `invalid`."""
    user, _, group = text.partition(":")
    try:
        uid = _number(user, lambda: pwd.getpwnam(user).pw_uid)
        return Label(uid, _number(group, lambda: grp.getgrnam(group).gr_gid))
    except (KeyError, ValueError):
        message = f"libvirt's label {text[:100]!r} names a user or group that this host does not have"
        raise JobError("invalid", message, remedy="see the seclabel in `virsh dumpxml`") from None


class Labels:
    """`default` is what a domain gets that says none, if libvirt has such labels; `relabels` says whether it changes
    owners at all. `uid` is the hypervisor user's, the only one to whom the agent gives access."""

    def __init__(self, default: Label | None, uid: int, *, relabels: bool) -> None:
        self._default = default
        self._uid = uid
        self._relabels = relabels and default is not None

    def of(self, domain: Domain, disk: Disk, layer: LiveLayer) -> Label | None:
        """The label that the layer is opened by; None where libvirt leaves its owner alone, so that access is the
        agent's to give. A layer may have a label of its own; else its disk's top speaks for it, else the domain."""
        own = next((dac for dac in (layer.dac, disk.layers[0].dac) if dac and (dac.label or not dac.relabel)), None)
        runs_as = self._parse(domain.dac) or self._default
        if self._relabels and own is not None and own.relabel:
            return self._parse(own)
        relabel = self._relabels and own is None and (domain.dac is None or domain.dac.relabel)
        return runs_as if relabel or (runs_as is not None and runs_as.uid != self._uid) else None

    def _parse(self, dac: DacLabel | None) -> Label | None:
        return parse(dac.label) if dac is not None and dac.label else None


def _number(text: str, named: Callable[[], int]) -> int:
    if text.startswith("+"):
        return int(text[1:])
    try:
        return named()
    except KeyError:
        return int(text)
