from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from hostagent import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_is_time_level_message_and_fields(stream: io.StringIO) -> None:
    logs.setup("info", "text", stream)
    logging.getLogger("hostagent.x").info("job %s completed", "7", extra={"fields": {"seconds": 1.5, "path": "/a b"}})
    line = stream.getvalue()
    assert line[2] == line[5] == ":"
    assert line[9:] == 'INFO    job 7 completed  seconds=1.5 path="/a b"\n'


def test_json_is_one_object_with_the_fields(stream: io.StringIO) -> None:
    logs.setup("info", "json", stream)
    fields = {"job": "7", "cur": 5, "holders": ["a", "b"], "chain": {"before": ["x"]}, "message": "not this"}
    logging.getLogger("hostagent.x").warning("it is %s", "so", extra={"fields": fields})
    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "warning", "logger": "hostagent.x", "message": "it is so", "job": "7", "cur": 5,
        "holders": ["a", "b"], "chain": {"before": ["x"]},
    }  # fmt: skip


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_hostile_name_neither_makes_a_line_nor_reaches_the_terminal(stream: io.StringIO, format: str) -> None:
    logs.setup("info", format, stream)
    name = "/x\n12:00:00 INFO forged\x1b[2J\udc80\u202e"
    logging.getLogger("hostagent.x").info("opened %s", name, extra={"fields": {"path": name}})
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.removesuffix("\n").isprintable()


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_very_long_value_is_cut(stream: io.StringIO, format: str) -> None:
    logs.setup("info", format, stream)
    logging.getLogger("x").info("m", extra={"fields": {"path": "a" * 10**6, "many": ["b" * 10**4] * 10**4}})
    assert len(stream.getvalue()) < 300_000


def test_an_exception_is_logged_with_its_traceback(stream: io.StringIO) -> None:
    logs.setup("info", "json", stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("x").exception("task ended")
    assert "ValueError: boom" in json.loads(stream.getvalue())["traceback"]


def test_auto_is_json_where_there_is_no_terminal(stream: io.StringIO) -> None:
    logs.setup("info", "auto", stream)
    logging.getLogger("x").info("m")
    assert json.loads(stream.getvalue())["message"] == "m"


def test_the_level_holds_and_qmps_own_errors_are_quiet(stream: io.StringIO) -> None:
    logs.setup("warning", "text", stream)
    logging.getLogger("x").info("not this")
    logging.getLogger("qemu.qmp.protocol").error("nor this")
    logging.getLogger("x").warning("but this")
    assert stream.getvalue().count("\n") == 1 and "but this" in stream.getvalue()


def test_setup_twice_writes_each_line_once(stream: io.StringIO) -> None:
    logs.setup("info", "text", stream)
    logs.setup("info", "text", stream)
    logging.getLogger("x").info("m")
    assert stream.getvalue().count("\n") == 1
