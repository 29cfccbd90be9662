"""What the kernel says in the middle, as an answer."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from hostagent.data.backends.mapping import Unmappable
from hostagent.data.backends.qemu_map import MapLimits, entries


def test_no_descriptor_left_is_a_way_to_nbd_and_leaks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    real, opened = os.open, []

    def few(*arguments: Any, **more: Any) -> int:
        if opened:
            raise OSError(errno.EMFILE, "Too many open files")
        opened.append(real(*arguments, **more))
        return opened[0]

    monkeypatch.setattr(os, "open", few)
    with pytest.raises(Unmappable) as error:
        list(entries(lambda _: "", [0, 0], MapLimits(), lambda: None))
    assert not error.value.lasting
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(opened[0])
