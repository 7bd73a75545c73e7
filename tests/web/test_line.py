"""When pictures are compressed, by how long a browser takes for them."""

from __future__ import annotations

from itertools import pairwise

from farplug.web.line import MAX_HOLD, MIN_HOLD, ScreenLine

PICTURE, SMALL = 4 << 20, 20_000


def show(line: ScreenLine, size: int, seconds: float, now: float) -> float:
    """Let a picture be acknowledged; return when."""
    line.sent(7, size, now)
    line.acknowledged(7, now + seconds)
    return now + seconds


def test_pictures_are_compressed_until_one_shows_that_the_line_is_fast() -> None:
    line = ScreenLine()
    assert line.level == 1
    now = show(line, 500, 0.001, 0)
    assert line.level == 1, "a small one shows nothing"
    now = show(line, 50_000, 0.05, now)
    assert line.level == 1
    now = show(line, 50_000, 0.01, now)
    assert line.level == 0
    show(line, PICTURE, 0.25, now)
    assert line.level == 0


def test_a_slow_line() -> None:
    line = ScreenLine()
    now = 0.0
    for _ in range(10):
        now = show(line, 250_000, 25, now)
        assert line.level == 6, "fewer bytes are worth the time"
    now = show(line, 30_000, 0.3, now)
    assert line.level == 1


def test_a_line_that_seems_fast_is_tried_less_and_less() -> None:
    line = ScreenLine()
    tries: list[int] = []
    for number in range(3 * int(MAX_HOLD)):
        if line.level == 0:
            tries.append(number)
        show(line, PICTURE if line.level == 0 else SMALL, 0.5 if line.level == 0 else 0.01, float(number))
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 2 * MIN_HOLD
    assert max(gaps) > MAX_HOLD / 4
    assert len(tries) < 12


def test_two_pictures_in_flight() -> None:
    line = ScreenLine()
    line.sent(1, 100_000, 0.0)
    line.sent(1, 100_000, 0.0)
    line.acknowledged(1, 0.02)
    assert line.level == 0
    line.acknowledged(1, 0.04)
    assert line.level == 0, "the second one was in flight for half of the time"
    for unknown in (1, 99, None, "x", 0.5):
        line.acknowledged(unknown, 100.0)
    assert line.level == 0


def test_pictures_that_are_not_acknowledged_cost_no_memory() -> None:
    line = ScreenLine()
    for number in range(1000):
        line.sent(number, 1, 0.0)
    assert len(line._sent) < 10
    line.acknowledged(999, 0.0)
    assert not line._sent
