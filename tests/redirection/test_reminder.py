"""Reminders to a silent guest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.redirection.scripted import ScriptedDevice

from farplug.redirection import reminder
from farplug.redirection.reminder import Reminder
from farplug.testing.memory import MemoryGuest
from farplug.usb import Status
from farplug.usbredir import packets


class Clock:
    """An event loop whose timers the test fires."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def call_later(self, seconds: float, callback: Callable[..., None], *arguments: Any) -> Clock:
        self.waiting.append((seconds, callback, arguments))
        return self

    def cancel(self) -> None:
        self.waiting.clear()

    def fire(self) -> float:
        """Fire the timer, and return its delay in seconds."""
        seconds, callback, arguments = self.waiting.pop()
        callback(*arguments)
        return seconds


def test_the_delay_doubles_until_the_guest_sends_data(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sent = Clock(), []
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    reminder = Reminder(lambda: sent.append("reminder"))
    reminder.start()
    assert [clock.fire() for _ in range(5)] == [1, 2, 4, 5, 5]
    assert len(sent) == 5
    reminder.received = True
    assert [clock.fire() for _ in range(3)] == [5, 1, 2]
    assert len(sent) == 7
    reminder.start()
    assert len(clock.waiting) == 1
    reminder.stop()
    assert clock.waiting == []
    reminder.stop()


async def test_a_port_that_loses_wakeups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reminder, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(reminder, "MAX_DELAY", 0.001)
    async with MemoryGuest() as guest:
        guest.redirection.port.loses_wakeups = True
        await guest.redirection.attach(ScriptedDevice())
        reminded = guest.stream(packets.InterruptReceivingStatus, 0x80)
        for _ in range(3):
            assert (await reminded()).status is Status.SUCCESS
        await guest.redirection.detach()
        count = len(guest.received)
        await asyncio.sleep(0.02)
        assert len(guest.received) == count
