"""The dialect as a table: what is asked, what is answered, and where ovirt-imageio is wrong and ours is not.

A row's `answer` is what the daemon has to answer. `flaw` stands beside it where ovirt-imageio answers something else
that no client may rely on; where it is None, both daemons answer the same, and the tests that run against the original
prove it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from tests.data.daemons import Daemon
from tests.data.wire import Ended, NotHttp, Reply, Wire

TEXT = "text/plain; charset=UTF-8"


@dataclass(frozen=True, slots=True)
class Answer:
    """`headers` None is one that must not be there; `body` is a pattern to be found in the text, or the exact bytes.

    `closes`: the connection ends afterwards, and says so; None leaves that open. `dropped`: there is no answer at all.
    `astray`: afterwards the connection answers what was never asked.
    """

    status: int = 200
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: str | bytes | None = None
    closes: bool | None = None
    dropped: bool = False
    astray: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    method: str
    target: str
    answer: Answer
    flaw: Answer | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


def refused(status: int, message: str, *, closes: bool | None = None, **headers: str) -> Answer:
    """An error as the dialect has it: plain text, that ends with a line break."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"content-type": TEXT} | named, message, closes)


def check(daemon: Daemon, wire: Wire, row: Row, target: str | None = None) -> Reply | None:
    """Ask, compare, and see that the connection is where the answer says: ended, or ready for the next request."""
    expected = row.flaw if daemon.name == "imageio" and row.flaw else row.answer
    try:
        reply = wire.ask(row.method, target or row.target, row.headers, row.body)
    except Ended:
        assert expected.dropped, "the connection was closed without an answer"
        return None
    assert not expected.dropped, reply
    compare(reply, expected)
    if expected.astray:
        with pytest.raises((NotHttp, Ended, AssertionError)):
            in_step(wire)
    elif reply.last:
        assert wire.ended(), "it said that it closes the connection, and did not"
    else:
        in_step(wire)
    return reply


def compare(reply: Reply, expected: Answer) -> None:
    assert reply.status == expected.status, reply
    for name, value in expected.headers.items():
        assert reply.get(name) == value, (name, reply)
    if isinstance(expected.body, bytes):
        assert reply.body == expected.body
    elif expected.body is not None:
        assert re.search(expected.body, reply.text), reply
        if reply.status >= 400 and expected.headers.get("content-type") == TEXT:
            assert reply.text.endswith("\n"), reply
    if expected.closes is not None:
        assert reply.last == expected.closes, reply


def in_step(wire: Wire) -> None:
    """The connection's next answer is that to its next request, and to nothing else that came before."""
    reply = wire.ask("OPTIONS", "/images/*")
    assert reply.status == 200 and "features" in reply.json, reply
    assert wire.quiet(0.01), "something more came, that was not asked"
