"""The guests that tests share: which are closed, and when."""

from __future__ import annotations

import asyncio

import pytest

from farplug.testing.guest_pool import MAX_GUESTS, GuestPool
from farplug.vm.agent import CommandResult
from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import GuestConfig


class Guest(QemuGuest):
    """A guest without QEMU."""

    runs = False

    async def _start(self) -> None:
        await asyncio.sleep(0)
        self.runs = True

    @property
    def alive(self) -> bool:
        return self.runs

    async def run(self, command: str, *, stdin: bytes = b"", timeout: float | None = None) -> CommandResult:
        await asyncio.sleep(0)
        return CommandResult(0, b"")

    async def close(self) -> None:
        self.runs = False


def config(number: int) -> GuestConfig:
    return GuestConfig(memory=128 + number)


async def test_what_a_test_has_is_not_closed_for_another_one() -> None:
    pool = GuestPool(Guest)
    lent = [await pool.get(config(number)) for number in range(MAX_GUESTS + 2)]
    assert all(guest.alive for guest in lent)
    for guest in lent:
        await pool.release(guest)
    assert all(guest.alive for guest in lent)
    other = await pool.get(config(100))
    assert [guest.alive for guest in lent] == [False] * 3 + [True] * 2, "the ones used least recently"
    assert await pool.get(config(3)) is lent[3]
    await pool.close()
    assert not any(guest.alive for guest in (other, *lent))


async def test_a_guest_that_two_have_is_closed_after_the_last() -> None:
    pool = GuestPool(Guest)
    guest = await pool.get(config(0))
    assert await pool.get(config(0)) is guest
    await pool.release(guest, broken=True)
    assert guest.alive
    other = await pool.get(config(0))
    assert other is not guest, "it may be broken"
    await pool.release(guest)
    assert not guest.alive
    assert other.alive


async def test_a_fresh_guest_is_closed_when_it_is_released() -> None:
    pool = GuestPool(Guest)
    guest = await pool.get(config(0))
    fresh = await pool.get(config(0), fresh=True)
    paused = await pool.get(GuestConfig(paused=True))
    assert len({guest, fresh, paused}) == 3
    for one in (guest, fresh, paused):
        await pool.release(one)
    assert [one.alive for one in (guest, fresh, paused)] == [True, False, False]


@pytest.mark.parametrize("is_lent", [False, True])
async def test_a_dead_guest_is_replaced(is_lent: bool) -> None:
    pool = GuestPool(Guest)
    guest = await pool.get(config(0))
    if not is_lent:
        await pool.release(guest)
    assert isinstance(guest, Guest)
    guest.runs = False
    other = await pool.get(config(0))
    assert other is not guest
    assert other.alive
    if is_lent:
        await pool.release(guest)
    await pool.release(other)


async def test_two_that_ask_at_once_get_the_same_guest() -> None:
    pool = GuestPool(Guest)
    first, second = await asyncio.gather(pool.get(config(0)), pool.get(config(0)))
    assert first is second
