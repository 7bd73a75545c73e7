from __future__ import annotations

import asyncio
import os

import pytest
from tests.transport.fake_spice import Recorder

from farplug.errors import GuestGoneError, StateError
from farplug.transport.connection import HIGH_WATER
from farplug.transport.memory import PIECE, memory_ports


async def test_both_ways() -> None:
    device, guest = memory_ports()
    at_device, at_guest = Recorder(), Recorder()
    await device.open(at_device)
    payload = os.urandom(3 * PIECE)
    device.write([b"before the guest opens ", b"", payload])
    assert not at_guest.data
    await guest.open(at_guest)
    guest.write([b"hello"])
    assert not at_device.data, "bytes arrive later, as on a socket"
    await at_guest.until(lambda: len(at_guest.data) == 23 + len(payload))
    assert bytes(at_guest.data) == b"before the guest opens " + payload
    assert bytes(at_device.data) == b"hello"
    with pytest.raises(StateError):
        await device.open(Recorder())


async def test_views_do_not_outlive_the_call() -> None:
    device, guest = memory_ports()
    kept: list[memoryview] = []

    class Keeper(Recorder):
        def data_received(self, data: memoryview, more: bool = False) -> None:
            super().data_received(data)
            kept.append(data)

    keeper = Keeper()
    await device.open(Recorder())
    await guest.open(keeper)
    device.write([b"first"])
    await keeper.until(lambda: len(keeper.data) == 5)
    device.write([b"other"])
    await keeper.until(lambda: len(keeper.data) == 10)
    assert bytes(kept[0]) == b"other"


async def test_flow_control() -> None:
    device, guest = memory_ports()
    at_device, at_guest = Recorder(), Recorder()
    await device.open(at_device)
    await guest.open(at_guest)
    guest.pause_reading()
    device.write([bytes(HIGH_WATER + 1)])
    device.write([b"x"])
    await asyncio.sleep(0.01)
    assert (at_device.pauses, at_device.resumes, len(at_guest.data)) == (1, 0, 0)
    guest.resume_reading()
    await at_guest.until(lambda: len(at_guest.data) == HIGH_WATER + 2)
    assert (at_device.pauses, at_device.resumes) == (1, 1)


async def test_close_delivers_and_ends_both_sides() -> None:
    device, guest = memory_ports()
    for _ in range(2):
        at_device, at_guest = Recorder(), Recorder()
        await device.open(at_device)
        await guest.open(at_guest)
        device.write([bytes(10 * PIECE)])
        await device.close()
        assert len(at_guest.data) == 10 * PIECE
        assert at_device.closed == [None]
        assert isinstance(at_guest.closed[0], GuestGoneError)
        await device.close()
        device.write([b"dropped"])
        guest.abort()
    assert len(at_device.closed) == len(at_guest.closed) == 1


async def test_abort_loses_what_is_queued() -> None:
    device, guest = memory_ports()
    at_device, at_guest = Recorder(), Recorder()
    await device.open(at_device)
    await guest.open(at_guest)
    device.write([b"lost"])
    device.abort()
    await asyncio.sleep(0.01)
    assert not at_guest.data
    assert at_device.closed == [None]
    assert "broke" in str(at_guest.closed[0])
