from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostagent import calls, refusals
from hostagent.audit import Audit, Settings, shown


class Lines:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.lost = 0
        self.made: list[Audit] = []

    def audit(self, size: int = 1 << 20, keep: int = 2, queue: int = 1000, refusals: int = 1000) -> Audit:
        def lost() -> None:
            self.lost += 1

        self.made.append(Audit(Settings(self.file, size, keep, queue, refusals), lost))
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


def test_who_is_refused_all_the_time_takes_no_lines_of_others_away(lines: Lines) -> None:
    audit = lines.audit(size=16384, keep=1, refusals=3)
    with calls.serving(calls.Call("r1", "unix", "uid 1000", "pid 7")):
        for _ in range(2000):
            audit.tell("job delete", "not_found", id="y" * 60000, target="/t" * 2000, disks=[{"dest": "/d" * 999}] * 99)
        audit.tell("job delete", "ok", id="j")
    with calls.serving(calls.Call("r2", "tcp", "token ci", "192.0.2.1:5")):
        audit.tell("job start", "denied", target="/img/a")
    audit.close(5)
    *mine, done, other, summary = lines.read()
    assert [one["id"] for one in mine] == ["y" * 64] * 3 and len(json.dumps(mine[0])) < 2500
    assert (done["result"], other["who"]) == ("ok", "token ci"), "what changed something, and who else was refused"
    assert summary.pop("time")
    assert summary == {
        **{"request": "", "who": "uid 1000", "surface": "unix", "from": "", "what": "refused calls"},
        **{"times": 1997, "calls": {"job delete: not_found": 1997}, "result": "limit"},
    }
    assert lines.lost == 0


def test_what_was_done_is_told_however_often(lines: Lines) -> None:
    audit = lines.audit(refusals=1)
    for result in ("ok", "internal", "cancelled", "timeout") * 5:
        audit.tell("job pause", result, id="j")
    for _ in range(5):
        audit.tell("job start", "ok", id="j", new=False)
    audit.close(5)
    found = lines.read()
    assert len(found) == 20 + 1 + 1 and found[-1]["calls"] == {"job start: ok": 4}, "asked again is not done again"


def test_the_summary_comes_when_the_minute_is_over(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "WINDOW", 0.3)
    audit = lines.audit(refusals=1)
    for _ in range(4):
        audit.tell("job abort", "denied")
    eventually(lambda: lines.file.exists() and len(lines.read()) == 2)
    assert lines.read()[-1]["times"] == 3
    audit.tell("job abort", "denied")
    eventually(lambda: len(lines.read()) == 3)
    assert lines.read()[-1]["result"] == "denied", "and the next minute begins anew"


def test_callers_are_told_apart_as_far_as_there_is_room() -> None:
    now = 100.0
    found = refusals.Refusals(1, clock=lambda: now)

    def refused(surface: str, who: str, origin: str) -> bool:
        return found.whole(calls.Call("", surface, who, origin), "job start", "denied")

    assert refused("tcp", "nobody", "192.0.2.1:5") and not refused("tcp", "nobody", "192.0.2.1:6")
    assert refused("tcp", "nobody", "192.0.2.2:5"), "another address is another"
    assert refused("tcp", "token a", "192.0.2.1:5") and not refused("tcp", "token a", "192.0.2.9:5")
    assert refused("unix", "uid 1", "pid 1") and refused("dbus", "uid 1", "pid 1")
    assert sum(refused("tcp", "nobody", f"198.51.100.{n}:5") for n in range(200)) == refusals.CALLERS - 2 + 1
    assert refused("unix", "uid 2", "pid 2"), "a crowd of strangers hides nobody who has a name"
    assert found.over() == [] and found.left() == refusals.WINDOW
    now += refusals.WINDOW
    told = found.over()
    assert {(one.who, one.origin): one.calls.total() for one in told} == {
        **{("nobody", "192.0.2.1"): 1, ("token a", ""): 1},
        ("others", ""): 200 - (refusals.CALLERS - 2) - 1,
    }
    assert found.over() == [] and found.left() is None and refused("unix", "uid 1", "")


def test_no_secret_of_a_uri_is_shown() -> None:
    uri = "nbd://me:secret@host:10809/name?tls-psk=secret"
    assert shown({"dest": uri, "disks": [{"dest": uri}]}) == {
        "dest": "nbd://host:10809/name",
        "disks": [{"dest": "nbd://host:10809/name"}],
    }
    assert "secret" not in json.dumps(shown(["nbd+unix:///x?socket=secret", "a" * 9000]))
    assert len(str(shown("a" * 9000))) == 4096
    assert shown("nbd://me:secret@[bad") == "nbd://"


def test_what_a_call_leaves_running_is_no_part_of_it() -> None:
    with calls.serving(calls.Call("r1")) as call:
        assert calls.present() is call
    with calls.serving(calls.Call("r2")) as other:
        other.running = False
        assert calls.present() is None
    assert calls.present() is None
