from __future__ import annotations

import pytest

from farplug.usb.share import MAX_MEMORY, NO_PORT, Callback, Memory, Turn


class Loop:
    """An event loop of which each turn is run by hand."""

    def __init__(self) -> None:
        self.ready: list[Callback] = []

    def run(self) -> None:
        ready, self.ready = self.ready, []
        for callback in ready:
            callback()


def test_work_is_renewed_in_the_next_turn() -> None:
    loop = Loop()
    turn = Turn(lambda callback: loop.ready.append(callback), 10)
    turn.spend(4)
    assert loop.ready == []  # little work is counted across turns
    turn.spend(9)
    assert (turn.left, len(loop.ready)) == (-3, 1)
    loop.run()
    assert (turn.left, loop.ready) == (10, [])


def test_callbacks_take_turns() -> None:
    loop = Loop()
    turn = Turn(lambda callback: loop.ready.append(callback), 10)
    called: list[str] = []

    def greedy() -> None:
        called.append("greedy")
        turn.spend(10)
        turn.call_next(greedy)

    def other() -> None:
        called.append("other")
        turn.call_next(other)

    for callback in (greedy, other, greedy):
        turn.call_next(callback)
    for _ in range(4):
        loop.run()
    assert called == ["greedy", *["other", "greedy"] * 3]


def test_an_exception_loses_no_other_callback() -> None:
    loop = Loop()
    turn = Turn(lambda callback: loop.ready.append(callback))
    called: list[str] = []

    def broken() -> None:
        raise ZeroDivisionError

    turn.call_next(broken)
    turn.call_next(lambda: called.append("other"))
    with pytest.raises(ZeroDivisionError):
        loop.run()
    loop.run()
    assert called == ["other"]


def test_without_a_port_nothing_is_bounded() -> None:
    left = NO_PORT.turn.left
    NO_PORT.turn.spend(1 << 40)
    assert NO_PORT.turn.left == left > 0


def test_memory() -> None:
    memory = Memory()
    memory.take(5)
    memory.take(3)
    memory.give(5)
    assert (memory.used, memory.limit) == (3, MAX_MEMORY)
