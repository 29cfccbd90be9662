"""Whatever is sent to the agent, it answers, and goes on: generated arguments, generated heads, and bytes that are no
message."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostagent.api import dbus
from hostagent.api.projection import interface
from hostagent.api.projection.message import BusError, Kind, Message, Variant
from tests.dbus.bus import NAME, Caller, PrivateBus
from tests.dbus.conftest import check
from tests.harness import AgentProcess

pytestmark = pytest.mark.qemu

ROOT = "/org/hostagent1"
words = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)
UINTS = {"y": 8, "q": 16, "u": 32, "t": 64}
INTS = {"n": 16, "i": 32, "x": 64}


def values(type_: str) -> st.SearchStrategy[Any]:
    """Values of a complete type."""
    if type_ in UINTS:
        return st.integers(0, 2 ** UINTS[type_] - 1)
    if type_ in INTS:
        return st.integers(-(2 ** (INTS[type_] - 1)), 2 ** (INTS[type_] - 1) - 1)
    match type_:
        case "s":
            return words | st.sampled_from(["pull", "/", "/dev/null", "a/b", "nbd://x/y", "org.hostagent1.Job"])
        case "b":
            return st.booleans()
        case "d":
            return st.floats()
        case "o":
            return st.sampled_from(["/", ROOT])
        case "v":
            return variants
        case "a{sv}":
            return st.dictionaries(options | words, variants, max_size=4)
        case "a{ss}":
            return st.dictionaries(words, words, max_size=3)
        case "as":
            return st.lists(words, max_size=3)
        case "ay":
            return st.binary(max_size=20)
        case "(st)":
            return st.tuples(words, values("t")).map(list)
    raise AssertionError(type_)


options = st.sampled_from(
    [
        "id",
        "base",
        "increment",
        "bandwidth",
        "labels",
        "check",
        "dest",
        "format",
        "force",
        "cursor",
        "completion",
        "ttl",
    ]
)
variants: st.SearchStrategy[Any] = st.deferred(
    lambda: st.sampled_from(["s", "b", "t", "x", "y", "d", "as", "a{ss}", "ay", "(st)", "v", "a{sv}"]).flatmap(
        lambda type_: values(type_).map(lambda value: Variant(type_, value))
    )
)


def arguments(signature: str) -> st.SearchStrategy[tuple[Any, ...]]:
    parts = signature.replace("a{sv}", "D")
    return st.tuples(*(values("a{sv}" if part == "D" else part) for part in parts))


METHODS = [(name, member, takes[0]) for name, one in interface.ALL.items() for member, takes in one.methods.items()]
calls = st.sampled_from(METHODS).flatmap(lambda one: st.tuples(st.just(one), arguments(one[2])))
paths = st.sampled_from(["/", "/org", ROOT, f"{ROOT}/job", f"{ROOT}/job/none", f"{ROOT}/grant/x"])

quickly = settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quickly
@given(call=calls, path=paths, named=st.booleans(), flags=st.sampled_from([0, 2, 4, 0x80]))
def test_generated_arguments_are_answered(
    caller: Caller, call: tuple[tuple[str, str, str], tuple[Any, ...]], path: str, named: bool, flags: int
) -> None:
    (name, member, signature), body = call
    began = time.monotonic()
    try:
        caller.call(path, name if named else "", member, signature, *body, flags=flags)
    except BusError as error:
        assert error.name.startswith(("org.hostagent1.Error.", "org.freedesktop.DBus.Error."))
        assert error.name != "org.hostagent1.Error.Internal", error.message
        assert "Traceback" not in error.message
        assert 'File "' not in error.message
    assert time.monotonic() - began < 10


@quickly
@given(signature=st.sampled_from(["", "s", "a{sv}", "sv", "t", "ssa{sv}"]), data=st.data())
def test_other_signatures_are_refused_by_name(caller: Caller, signature: str, data: st.DataObject) -> None:
    parts = signature.replace("a{sv}", "D")
    body = [data.draw(values("a{sv}" if part == "D" else part)) for part in parts]
    name, member, takes = data.draw(st.sampled_from([one for one in METHODS if one[2] != signature]))
    with pytest.raises(BusError) as refused:
        caller.call(ROOT, name, member, signature, *body)
    assert refused.value.name.startswith("org.freedesktop.DBus.Error."), (takes, refused.value)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_changed_byte_harms_nobody_but_its_sender(
    agent: AgentProcess, bus: PrivateBus, caller: Caller, at: int, byte: int
) -> None:
    """The bus cuts off who sends what is no message; what it lets through is answered, or ignored."""
    body = ("pull", "/nowhere", {"increment": Variant("t", 1)})
    frame = bytearray(
        dbus.encode(
            Message(Kind.CALL, ROOT, "org.hostagent1.Manager", "StartJob", "ssa{sv}", body, destination=NAME), 99
        )
    )
    frame[at % len(frame)] = byte
    with Caller(bus.socket) as odd:
        odd.send_raw(bytes(frame))
    assert caller.call(ROOT, "org.freedesktop.DBus.Peer", "Ping") == ()


def test_after_all_that_it_is_the_same_connection(agent: AgentProcess, caller: Caller) -> None:
    assert check(agent)["detail"].startswith("connected as org.hostagent1 (:1.")
    log = agent.log.read_text()
    assert "not on the bus" not in log
    assert "fault" not in log
