"""What was handed over and waits for its ticket: bounded in number and in time."""

from __future__ import annotations

import os

import pytest

from hostagent.data.handover import Descriptors
from hostagent.errors import AgentError


def opened() -> list[int]:
    return [os.open("/dev/null", os.O_RDONLY)]


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_no_more_names_wait_than_are_allowed_also_for_one_ticket() -> None:
    waiting = Descriptors(2, 60)
    for name in ("a", "b"):
        waiting.put("ticket", name, opened())
    refused = opened()
    with pytest.raises(AgentError) as limit:
        waiting.put("ticket", "c", refused)
    assert limit.value.code == "limit" and not is_open(refused[0])
    waiting.put("ticket", "a", [])
    waiting.put("other", "c", opened())
    for ticket in ("ticket", "other"):
        waiting.take(ticket).close()


def test_what_no_ticket_comes_for_is_closed() -> None:
    waiting, fds = Descriptors(2, -1.0), opened()
    waiting.put("ticket", "a", fds)
    waiting.look()
    assert not is_open(fds[0])
    assert len(waiting.take("ticket")) == 0
