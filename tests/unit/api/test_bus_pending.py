"""What waits to be shown on the bus: the newest of each, news at once, progress once in its time, and no more than its
bound."""

from __future__ import annotations

from hostagent.api.projection.pending import Pending
from hostagent.api.projection.tree import Tree, changed
from hostagent.errors import CODES, bus_name

JOB = ("job", "1")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pending(most: int = 100) -> tuple[Pending, Clock]:
    clock = Clock()
    found = Pending(most, 1.0, clock)
    found.begin()
    return found, clock


def test_progress_is_due_once_in_its_time_and_news_at_once() -> None:
    waiting, clock = pending()
    waiting.touch(JOB, "running")
    assert waiting.due() == [JOB]
    for _ in range(9):
        clock.now += 0.1
        waiting.touch(JOB, "running")
        assert waiting.due() == []
    assert waiting.rest() is not None
    assert 0.05 < waiting.rest() < 0.15
    waiting.touch(JOB, "completed")
    assert waiting.rest() == 0.0
    assert waiting.due() == [JOB]
    assert waiting.rest() is None
    assert waiting.dropped == 0


def test_news_stays_news_when_progress_comes_after_it() -> None:
    waiting, clock = pending()
    waiting.touch(JOB, "running")
    waiting.due()
    clock.now += 0.1
    waiting.touch(JOB, "paused")
    waiting.touch(JOB, "paused")
    assert waiting.due() == [JOB]


def test_states_that_nobody_was_told_of_are_counted() -> None:
    waiting, _ = pending()
    for state in ("running", "completing", "completing", "completed"):
        waiting.touch(JOB, state)
    assert waiting.due() == [JOB]
    assert waiting.dropped == 2


def test_what_is_more_than_its_bound_is_read_anew_as_a_whole() -> None:
    waiting, _ = pending(most=10)
    for number in range(25):
        waiting.touch(("job", str(number)), "running")
        assert len(waiting) <= 10
    assert waiting.everything
    assert waiting.dropped == 20
    waiting.begin()
    assert (len(waiting), waiting.everything) == (0, False)


def test_a_tree_has_a_bound_and_says_what_it_hides() -> None:
    def grant(id: str, state: str = "granted") -> dict[str, object]:
        return {
            "Id": id,
            "Path": f"/{id}",
            "Mode": "r",
            "Holder": ["job", "1", None],
            "Since": 0,
            "Reason": "",
            "Access": "acl",
            "State": state,
            "Detail": None,
        }

    tree = Tree(2, {"Version": "1", "Host": "h"})
    first = tree.put("grant", "a", grant("a"))
    assert first is not None
    assert tree.put("grant", "b", grant("b")) is not None
    assert tree.put("grant", "c", grant("c")) is None
    assert tree.manager["Hidden"] == 1
    second = tree.put("grant", "a", grant("a", "pending"))
    assert second is not None
    assert {name: value.value for name, value in changed(second, first).items()} == {"State": "pending"}
    tree.remove("grant", "b")
    assert tree.put("grant", "c", grant("c")) is not None
    assert tree.manager["Hidden"] == 0
    assert sorted(tree.managed()) == ["/org/hostagent1", "/org/hostagent1/grant/a", "/org/hostagent1/grant/c"]
    assert (tree.children("/"), tree.children("/org"), tree.children("/org/hostagent1")) == (
        ["org"],
        ["hostagent1"],
        ["grant"],
    )
    assert tree.children("/org/hostagent1/job") is None


def test_every_code_has_a_name_on_the_bus() -> None:
    names = {bus_name(code) for code in CODES}
    assert len(names) == len(CODES)
    assert bus_name("no_space") == "org.hostagent1.Error.NoSpace"
    assert bus_name("not a code") == "org.hostagent1.Error.Internal"
