from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent import calls
from hostagent.audit import Audit, Settings, shown


class Lines:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.lost = 0
        self.made: list[Audit] = []

    def audit(self, size: int = 1 << 20, keep: int = 2, queue: int = 1000) -> Audit:
        def lost() -> None:
            self.lost += 1

        self.made.append(Audit(Settings(self.file, size, keep, queue), lost))
        return self.made[-1]

    def read(self, name: str = "") -> list[dict[str, Any]]:
        path = self.file.with_name(name) if name else self.file
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    found = Lines(tmp_path / "audit.jsonl")
    yield found
    for audit in found.made:
        audit.close(5)


def eventually(true: Callable[[], Any]) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_line_says_who_did_what_from_where_and_how_it_ended(lines: Lines) -> None:
    audit = lines.audit()
    with calls.serving(calls.Call("r1", "tcp", "token ci", "192.0.2.1:5")):
        audit.tell("job start", "ok", target="/img/a", id="j", base=None, seconds=0.1)
    audit.tell("job abort", "busy", id="j")
    audit.close(5)
    first, second = lines.read()
    assert first.pop("time").endswith("+00:00")
    assert first == {
        **{"request": "r1", "who": "token ci", "surface": "tcp", "from": "192.0.2.1:5", "what": "job start"},
        **{"target": "/img/a", "id": "j", "seconds": 0.1, "result": "ok"},
    }
    assert (second["who"], second["result"]) == ("", "busy")
    assert lines.file.stat().st_mode & 0o777 == 0o600


def test_it_is_added_to_and_bounded(lines: Lines) -> None:
    lines.file.write_text('{"what": "before"}\n')
    audit = lines.audit(size=4096)
    for number in range(200):
        audit.tell("job start", "ok", target=f"/img/{number}")
        if number % 10 == 0:
            eventually(audit._lines.empty)
    audit.close(5)
    assert sorted(path.name for path in lines.file.parent.iterdir()) == [
        "audit.jsonl",
        "audit.jsonl.1",
        "audit.jsonl.2",
    ]
    kept = [one["target"] for name in ("audit.jsonl.2", "audit.jsonl.1", "") for one in lines.read(name)]
    assert kept == [f"/img/{number}" for number in range(200 - len(kept), 200)], "the newest, in order, none lost"
    assert lines.lost == 0


def test_one_that_was_moved_is_left_alone(lines: Lines) -> None:
    audit = lines.audit()
    audit.tell("first", "ok")
    eventually(lines.file.exists)
    moved = lines.file.with_name("moved")
    eventually(lambda: lines.file.stat().st_size)
    lines.file.rename(moved)
    audit.reopen()
    audit.tell("second", "ok")
    audit.close(5)
    assert [one["what"] for one in lines.read()] == ["second"]
    assert [one["what"] for one in lines.read("moved")] == ["first"]


@pytest.mark.parametrize("hindrance", ["folder", "link", "pipe"])
def test_what_cannot_be_written_is_counted_and_told_once_and_waited_for_by_nobody(
    lines: Lines, hindrance: str, caplog: pytest.LogCaptureFixture
) -> None:
    if hindrance == "folder":
        lines.file.mkdir()
    elif hindrance == "link":
        lines.file.symlink_to(lines.file.with_name("elsewhere"))
    else:
        os.mkfifo(lines.file)
    audit = lines.audit()
    for _ in range(5):
        audit.tell("job start", "ok")
    eventually(lambda: lines.lost == 5)
    assert caplog.text.count("the audit cannot be written") == 1
    if hindrance == "folder":
        lines.file.rmdir()
    else:
        lines.file.unlink()
    audit.tell("again", "ok")
    audit.close(5)
    assert [one["what"] for one in lines.read()] == ["again"]


def test_a_disk_that_hangs_keeps_nobody_waiting(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = lines.audit(queue=3)
    monkeypatch.setattr(audit, "_write", lambda batch: time.sleep(1))
    audit.tell("first", "ok")
    eventually(audit._lines.empty)
    began = time.monotonic()
    for _ in range(10):
        audit.tell("job start", "ok")
    assert time.monotonic() - began < 0.5 and lines.lost == 7


def test_no_secret_of_a_uri_is_shown() -> None:
    uri = "nbd://me:secret@host:10809/name?tls-psk=secret"
    assert shown({"dest": uri, "disks": [{"dest": uri}]}) == {
        "dest": "nbd://host:10809/name",
        "disks": [{"dest": "nbd://host:10809/name"}],
    }
    assert "secret" not in json.dumps(shown(["nbd+unix:///x?socket=secret", "a" * 9000]))
    assert len(str(shown("a" * 9000))) == 4096


def test_what_a_call_leaves_running_is_no_part_of_it() -> None:
    with calls.serving(calls.Call("r1")) as call:
        assert calls.present() is call
    with calls.serving(calls.Call("r2")) as other:
        other.running = False
        assert calls.present() is None
    assert calls.present() is None
