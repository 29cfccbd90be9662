"""What is durable, and what is lost: one's own flush, another's, one that failed, and a server that was another one."""

from __future__ import annotations

import pytest

from hostagent.data.durability import Durability
from hostagent.errors import AgentError

ONE, OTHER = "one", "other"


class Image:
    """`gone`: writers whose server is not there any more."""

    def __init__(self) -> None:
        self.of = Durability()
        self.gone: set[str] = set()

    def write(self, writer: str, begin: int, end: int, done: int | None = None) -> None:
        with self.of.writing(writer, object(), begin, end, lambda: end - begin if done is None else done):
            pass

    def flush(self, writer: str, *, shared: bool = True, fails: bool = False) -> None:
        with self.of.flushing(writer, shared=shared, intact=lambda one: one not in self.gone):
            if fails:
                raise OSError("gone")

    def refused(self, writer: str, **how: bool) -> None:
        with pytest.raises(AgentError, match="may be lost") as refused:
            self.flush(writer, **how)
        assert refused.value.code == "io_error"


@pytest.fixture
def image() -> Image:
    return Image()


def test_what_was_written_is_durable_after_a_flush(image: Image) -> None:
    image.write(ONE, 0, 10)
    assert image.of.durable() == []
    assert image.of.pending(ONE)
    image.flush(ONE)
    assert image.of.durable() == [(0, 10)]
    assert not image.of.pending(ONE)


def test_a_flush_covers_what_others_wrote_where_the_image_says_so(image: Image) -> None:
    image.write(ONE, 0, 10)
    image.write(OTHER, 20, 30)
    image.flush(ONE, shared=False)
    assert image.of.durable() == [(0, 10)]
    image.flush(ONE)
    assert image.of.durable() == [(0, 10), (20, 30)]


def test_what_a_failed_flush_may_have_lost_is_lost_until_it_is_written_again(image: Image) -> None:
    image.write(ONE, 0, 10)
    with pytest.raises(OSError, match="gone"):
        image.flush(ONE, fails=True)
    image.refused(ONE)
    image.refused(OTHER)
    assert image.of.durable() == []
    image.write(OTHER, 0, 9)
    image.refused(OTHER)
    image.write(OTHER, 9, 10)
    image.flush(OTHER)
    assert image.of.durable() == [(0, 10)]


def test_the_flush_of_another_server_covers_nothing_and_fails(image: Image) -> None:
    image.write(ONE, 0, 10)
    image.gone.add(ONE)
    image.refused(OTHER)
    assert image.of.durable() == []
    image.refused(ONE)


def test_who_leaves_without_a_flush_loses_what_he_wrote(image: Image) -> None:
    image.write(ONE, 0, 10)
    image.of.left(ONE)
    image.refused(OTHER)


def test_what_is_written_while_a_flush_runs_is_not_durable_by_it(image: Image) -> None:
    image.write(ONE, 0, 10)
    with image.of.flushing(ONE, shared=True, intact=lambda _: True):
        image.write(ONE, 4, 6)
        image.write(OTHER, 20, 30)
    assert image.of.durable() == [(0, 4), (6, 10)]
    image.flush(ONE)
    assert image.of.durable() == [(0, 10), (20, 30)]


def test_one_who_leaves_while_a_flush_runs_fails_it(image: Image) -> None:
    image.write(ONE, 0, 10)
    with (
        pytest.raises(AgentError, match="may be lost"),
        image.of.flushing(OTHER, shared=True, intact=lambda _: True),
    ):
        image.of.left(ONE)
    assert image.of.durable() == []


def test_what_is_being_written_anew_is_durable_no_more(image: Image) -> None:
    image.write(ONE, 0, 10)
    image.flush(ONE)
    with image.of.writing(ONE, object(), 2, 3, lambda: 1):
        assert image.of.durable() == [(0, 2), (3, 10)]


def test_a_write_that_failed_is_nothing_that_a_flush_could_cover(image: Image) -> None:
    with pytest.raises(OSError, match="full"), image.of.writing(ONE, object(), 0, 10, lambda: 5):
        raise OSError("full")
    image.flush(ONE)
    assert image.of.durable() == []


def test_of_two_writes_to_one_place_the_later_one_counts(image: Image) -> None:
    with image.of.writing(ONE, "long", 0, 10, lambda: 10):
        image.write(OTHER, 5, 8)
        image.flush(OTHER)
        assert image.of.durable() == []
    image.flush(ONE)
    assert image.of.durable() == [(0, 10)]


def test_others_come_and_go_while_a_flush_ends(image: Image) -> None:
    for number in range(4):
        image.write(str(number), number, number + 1)

    def intact(_: object) -> bool:
        image.of.left("0")
        image.write("new", 20, 30)
        return True

    image.write(ONE, 0, 10)
    with image.of.flushing(ONE, shared=True, intact=intact):
        pass
    assert image.of.durable() == [(0, 10)]


def test_of_too_many_ranges_none_is_called_durable_that_was_not_written_and_none_is_lost_unsaid(image: Image) -> None:
    """More than are told apart."""
    many = 66_000
    for number in range(many):
        image.write(ONE, number * 10, number * 10 + 1)
    image.of.left(ONE)
    image.refused(OTHER)
    for number in range(0, many, 2):
        image.write(OTHER, number * 10, number * 10 + 1)
    image.refused(OTHER)
    image.write(OTHER, 0, many * 10)
    image.flush(OTHER)
    assert image.of.durable() == [(0, many * 10)]


def test_a_body_that_was_shorter_counts_as_far_as_it_came(image: Image) -> None:
    image.write(ONE, 0, 100, done=7)
    image.flush(ONE)
    assert image.of.durable() == [(0, 7)]
