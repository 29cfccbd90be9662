from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.model import Cursor
from jobs.progress import WINDOW, Progress, advance

cursors = st.builds(Cursor, st.integers(0, 1 << 60), st.integers(0, 1 << 60))
MIB = 1 << 20


@given(st.lists(cursors, max_size=20))
def test_a_cursor_never_goes_back_and_stays_within_its_end(reports: list[Cursor]) -> None:
    cursor = Cursor()
    for report in reports:
        after = advance(cursor, report)
        assert after.cur >= cursor.cur
        assert after.end >= cursor.end
        assert 0 <= after.cur <= after.end
        cursor = after


def test_the_end_may_grow() -> None:
    assert advance(Cursor(5, 10), Cursor(6, 20)) == Cursor(6, 20)
    assert advance(Cursor(5, 10), Cursor(3, 8)) == Cursor(5, 10)


def test_rate_and_time_left_come_from_what_was_reported() -> None:
    progress = Progress(0.0, Cursor(0, 100 * MIB))
    progress.update(1.0, Cursor(10 * MIB, 100 * MIB))
    progress.update(2.0, Cursor(20 * MIB, 100 * MIB))
    view = progress.view(2.0)
    assert view.rate == 10 * MIB
    assert view.eta == 8.0
    assert view.stalled == 0.0


def test_a_job_that_does_not_move_has_no_time_left_and_is_stalled() -> None:
    progress = Progress(0.0, Cursor(5, 10))
    progress.update(3.0, Cursor(5, 10))
    view = progress.view(4.0)
    assert (view.rate, view.eta, view.stalled) == (0.0, None, 4.0)
    progress.update(5.0, Cursor(6, 10))
    assert progress.view(5.0).stalled == 0.0


def test_a_first_look_invents_nothing() -> None:
    view = Progress(7.0, Cursor(3, 10)).view(7.0)
    assert (view.rate, view.eta, view.stalled) == (0.0, None, 0.0)


def test_the_rate_forgets_what_is_older_than_the_window() -> None:
    progress = Progress(0.0, Cursor(0, 1000))
    for second in range(1, 50):
        progress.update(float(second), Cursor(second * 10 if second < 10 else 100 + second, 1000))
    assert progress.view(50.0).rate == pytest.approx((149 - 130) / (WINDOW - 1))


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 100)), max_size=30))
def test_no_series_of_reports_gives_a_negative_rate_or_time(steps: list[tuple[float, int]]) -> None:
    at, cursor = 0.0, Cursor(0, 10_000)
    progress = Progress(at, cursor)
    for pause, moved in steps:
        at, cursor = at + pause, Cursor(cursor.cur + moved, cursor.end)
        progress.update(at, cursor)
        view = progress.view(at)
        assert view.rate >= 0
        assert view.stalled >= 0
        assert view.eta is None or view.eta >= 0
