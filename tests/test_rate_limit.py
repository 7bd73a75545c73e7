"""The rate limit: bursts, what follows them, the order, the bounds; and the records of a logger."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from tests.clock import FakeClock

from farplug.rate_limit import BURST, INTERVAL, MAX_KINDS, LogLimit, RateLimit, limited_logger


@dataclass
class Passed:
    """A limit on pairs of a kind and a number, and what has passed it."""

    clock: FakeClock = field(default_factory=FakeClock)
    items: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limit: RateLimit[object] = RateLimit(
            self.items.append, lambda last, n: (last, f"{n} more"), lambda: self.clock
        )

    def add(self, kind: str, number: int) -> None:
        self.limit.add(kind, (kind, number))

    def taken(self) -> list[object]:
        items, self.items[:] = list(self.items), []
        return items


def test_a_burst_passes_at_once() -> None:
    passed = Passed()
    for number in range(BURST):
        passed.add("a", number)
    assert passed.items == [("a", number) for number in range(BURST)]
    assert not passed.clock.pending, "nothing is scheduled as long as nothing is held"


def test_of_a_flood_the_last_item_and_the_number_of_the_others_follow() -> None:
    passed = Passed()
    for number in range(1000):
        passed.add("a", number)
    assert len(passed.taken()) == BURST
    passed.clock.advance(INTERVAL)
    assert passed.taken() == [("a", 999), f"{1000 - BURST - 1} more"]
    passed.clock.advance(100 * INTERVAL)
    assert passed.taken() == []


def test_one_item_too_many_is_only_late() -> None:
    passed = Passed()
    for number in range(BURST + 1):
        passed.add("a", number)
    passed.clock.advance(INTERVAL)
    assert passed.items == [("a", number) for number in range(BURST + 1)]


def test_a_flood_that_goes_on_passes_once_an_interval() -> None:
    passed = Passed()
    for step in range(1000):
        passed.add("a", step)
        passed.clock.advance(INTERVAL / 100)
    assert len(passed.taken()) <= BURST + 2 * 11
    passed.clock.advance(INTERVAL)
    last = passed.taken()
    assert ("a", 999) in last
    assert len(last) <= 2


def test_the_slowest_flood_has_the_same_bound() -> None:
    passed = Passed()
    for step in range(10_000):  # ten a second, for 1000 s: never many at a time
        passed.add("a", step)
        passed.clock.advance(0.1)
    assert len(passed.items) <= BURST + 2 * 1000 / INTERVAL + 2


def test_quiet_restores_the_burst() -> None:
    passed = Passed()
    for number in range(100):
        passed.add("a", number)
    passed.clock.advance(INTERVAL * (BURST + 2))
    passed.taken()
    for number in range(BURST):
        passed.add("a", number)
    assert len(passed.items) == BURST


def test_a_flood_of_one_kind_takes_nothing_from_another() -> None:
    passed = Passed()
    for number in range(1000):
        passed.add("a", number)
    passed.taken()
    for number in range(BURST):
        passed.add("b", number)
    assert passed.items == [], "an earlier item is held"
    passed.clock.advance(INTERVAL)
    assert passed.items == [("a", 999), f"{1000 - BURST - 1} more", *(("b", number) for number in range(BURST))]


@pytest.mark.parametrize("seed", range(20))
def test_order_bounds_and_the_last_of_each_kind(seed: int) -> None:
    rng = random.Random(seed)
    passed, added, number = Passed(), [], 0
    for _ in range(2000):
        if rng.random() < 0.05:
            passed.clock.advance(rng.random() * INTERVAL * 2)
        if rng.random() < 0.01:
            passed.limit.release()
            assert not passed.limit._held
        kind, number = rng.choice("abcde"), number + 1
        passed.add(kind, number)
        added.append((kind, number))
        assert len(passed.limit._held) <= 5 * (BURST + 1)
    passed.clock.advance(INTERVAL)
    numbers = [item[1] for item in passed.items if isinstance(item, tuple)]
    assert numbers == sorted(numbers), "no item overtook another"
    for kind in "abcde":
        last = [item for item in added if item[0] == kind][-1]
        assert [item for item in passed.items if isinstance(item, tuple) and item[0] == kind][-1] == last
    dropped = sum(int(item.split()[0]) for item in passed.items if isinstance(item, str))
    assert dropped + len(numbers) == len(added), "every item passed or was counted"


def test_a_restart_restores_the_burst() -> None:
    passed = Passed()
    for number in range(BURST + 3):
        passed.add("a", number)
    passed.limit.restart()
    assert passed.taken()[BURST:] == [("a", BURST + 2), "2 more"]
    assert not passed.clock.pending
    for number in range(BURST):
        passed.add("a", number)
    assert len(passed.items) == BURST


def test_kinds_without_number_share_a_limit() -> None:
    passed = Passed()
    for number in range(100 * MAX_KINDS):
        passed.add(f"kind {number}", number)
        assert len(passed.limit._kinds) <= MAX_KINDS + 1
    assert len(passed.items) <= MAX_KINDS + BURST
    passed.clock.advance(INTERVAL * (BURST + 1))
    passed.taken()
    passed.add("new", 1)
    assert passed.items == [("new", 1)], "idle kinds are forgotten"


def test_an_item_that_is_added_meanwhile_is_not_lost() -> None:
    clock, items = FakeClock(), list[object]()

    def pass_on(item: object) -> None:
        items.append(item)
        if item == "last":
            limit.add("b", "answer")

    limit: RateLimit[object] = RateLimit(pass_on, lambda last, n: (last, n), lambda: clock)
    for _ in range(BURST + 5):
        limit.add("a", "one")
    limit.add("a", "last")
    clock.advance(INTERVAL)
    assert items[BURST:] == ["last", "answer", 5]
    assert not clock.pending


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("farplug.test-rate-limit")
    yield logger
    logger.filters.clear()


def limited(logger: logging.Logger) -> tuple[LogLimit, FakeClock]:
    clock = FakeClock()
    limit = LogLimit(logger, clock)
    logger.addFilter(limit)
    return limit, clock


def test_log_lines(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger.name)
    limit, clock = limited(logger)
    for block in range(1000):
        logger.warning("%s: block %d cannot be read", "a.raw", block)
    logger.warning("%s: block %d cannot be read", "b.raw", 7)
    assert len(caplog.messages) == BURST
    clock.advance(INTERVAL)
    assert caplog.messages[BURST:] == [
        f"a.raw: block 999 cannot be read ({1000 - BURST - 1} more like this)",
        "b.raw: block 7 cannot be read",
    ]
    caplog.clear()
    for _ in range(3):
        logger.warning("%s: block %d cannot be read", "a.raw", 1)
    logger.warning("no argument")
    limit.release()
    assert caplog.messages == ["a.raw: block 1 cannot be read (2 more like this)", "no argument"]


@pytest.mark.parametrize("log", [logging.Logger.debug, logging.Logger.info, logging.Logger.error])
def test_debug_lines_are_not_limited(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture, log: Callable[..., None]
) -> None:
    caplog.set_level(logging.DEBUG, logger.name)
    limited(logger)
    for _ in range(100):
        log(logger, "%s", "x")
    assert len(caplog.messages) == (100 if log is logging.Logger.debug else BURST)


def test_a_traceback_is_kept(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    _, clock = limited(logger)
    for number in range(BURST + 2):
        logger.error("%s raised", "Function", exc_info=ValueError(str(number)))
    clock.advance(INTERVAL)
    last = caplog.records[-1]
    assert last.getMessage() == "Function raised (1 more like this)"
    assert last.exc_info is not None
    assert str(last.exc_info[1]) == str(BURST + 1)


def test_a_logger_has_one_limit() -> None:
    one, other = limited_logger("farplug.test-limited"), limited_logger("farplug.test-limited")
    assert one is other
    assert len(one.filters) == 1
    one.filters.clear()
