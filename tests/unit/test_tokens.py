from __future__ import annotations

import json
import logging
import multiprocessing
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent import tokens
from hostagent.cli.tokens import SCOPES
from hostagent.errors import AgentError
from hostagent.tokens import Scope, Tokens


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def add(file: Path, name: str, scope: Scope = Scope.READ, expires: datetime | None = None) -> str:
    token, text = tokens.new(name, scope, expires)
    with tokens.changing(file) as found:
        found.append(token)
    return text


def test_the_file_has_no_token_in_it_and_is_nobody_elses(file: Path) -> None:
    text = add(file, "backup", Scope.OPERATE, datetime(2030, 1, 1, tzinfo=UTC))
    kept = file.read_text()
    assert text not in kept and text.rpartition(".")[2] not in kept
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    (token,) = tokens.read(file)
    assert (token.name, token.scope, token.expires) == ("backup", Scope.OPERATE, datetime(2030, 1, 1, tzinfo=UTC))


def test_the_command_line_knows_the_scopes() -> None:
    assert SCOPES == tokens.WORDS


def test_a_token_is_found_and_nothing_like_it(file: Path) -> None:
    text, other = add(file, "a"), add(file, "b")
    known = Tokens(file, 10)
    known.look()
    found = known.find(text)
    assert found is not None and found.name == "a" and known.holds(found)
    secret = other.rpartition(".")[2]
    for wrong in (
        f"hostagent.a.{secret}",
        text[:-1],
        text + "x",
        text.upper(),
        f"x.{text}",
        text.replace("hostagent", "x"),
    ):
        assert known.find(wrong) is None


@given(st.text(max_size=400))
def test_any_text_is_judged_without_a_crash(text: str) -> None:
    assert Tokens(Path("/nonexistent"), 1).find(text.encode("utf-8", "replace").decode()) is None


def test_what_changes_is_seen(file: Path) -> None:
    known = Tokens(file, 10)
    known.look()
    assert len(known) == 0
    text = add(file, "a", expires=datetime.now(UTC) + timedelta(hours=1))
    known.look()
    token = known.find(text)
    assert token is not None and known.holds(token)
    with tokens.changing(file) as found:
        found.clear()
    known.look()
    assert known.find(text) is None and not known.holds(token)
    add(file, "a")
    known.look()
    assert not known.holds(token), "one of the same name is another one"


def test_one_whose_time_is_over_is_known_and_not_in_force(file: Path) -> None:
    text = add(file, "a", expires=datetime.now(UTC) - timedelta(seconds=1))
    known = Tokens(file, 10)
    known.look()
    token = known.find(text)
    assert token is not None and not known.holds(token)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_change_is_refused(file: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    text = add(file, "a")
    file.chmod(mode)
    known = Tokens(file, 10)
    known.look()
    assert known.find(text) is None and "no token is accepted" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"tokens": {}}', '{"tokens": [1]}', '{"tokens": [{}]}', "[" * 100000,
        '{"tokens": [{"name": "a", "sha256": "00", "scope": "read", "created": "2030-01-01T00:00:00Z", "expires": null}]}',
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_ours_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(AgentError) as refused:
        tokens.read(file)
    assert refused.value.field == "api.tokens_file" and refused.value.remedy


@pytest.mark.parametrize("member", ["scope", "created", "expires", "name"])
def test_a_line_with_something_wrong_spoils_the_file(file: Path, member: str) -> None:
    add(file, "a")
    data = json.loads(file.read_text())
    data["tokens"][0][member] = "Root"
    file.write_text(json.dumps(data))
    with pytest.raises(AgentError):
        tokens.read(file)
    data["tokens"] = [json.loads(file.read_text())["tokens"][0] | {member: 7}]
    file.write_text(json.dumps(data))
    with pytest.raises(AgentError):
        tokens.read(file)


def test_names_are_checked(file: Path) -> None:
    for name in ("", "A", "a.b", "a b", "-a", "a" * 64, "ä"):
        with pytest.raises(AgentError):
            tokens.new(name, Scope.READ, None)


def test_more_than_there_may_be_are_none(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    text = add(file, "a")
    add(file, "b")
    known = Tokens(file, 1)
    known.look()
    assert known.find(text) is None and "no token is accepted" in caplog.text


def _add_some(file: Path, prefix: str) -> None:
    for number in range(10):
        add(file, f"{prefix}-{number}")


def test_two_who_change_the_file_at_once_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_some, args=(file, prefix)) for prefix in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert len(tokens.read(file)) == 20


def test_a_write_that_fails_leaves_the_file_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(file, "a")
    before = file.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        add(file, "b")
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1
