"""The kernel's own test of USB devices, its driver usbtest: against our disk, and against gadget zero of the examples.

Case 24 is left out: it cancels transfers in the middle of a queue, and QEMU's xHCI then drops the whole queue of the
endpoint, so the guest waits forever, whatever the device does.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from examples.gadget_zero import PRODUCT_ID, SINK, SOURCE, VENDOR_ID, SourceSink, gadget_zero
from tests.guest.plugging import LABORATORY, MIB, STORAGE, disk_of, plugged, raw, usb_folder, usb_node
from tests.guest.test_survival import still_works
from tests.long import every_value

from farplug.store import MemoryStore
from farplug.testing import QemuGuest
from farplug.usb import Device, Speed, Status, Transfer
from farplug.virtual import VirtualDevice, disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

CONTROL = (0, 9, 10, 14, 21)
BULK = (*range(1, 9), *range(17, 21), 27, 28)
UNLINK = (11, 12)
HALT = (13, 29)
ITERATIONS, PARTS = 16, 8
LENGTH, VARY = 16384, 1024
"""Multiples of every max packet size: usbtest takes a short packet for an error."""
CONTROL_LENGTH, CONTROL_VARY = 1024, 33


async def cases(pool: Guests, device: Device, interface: int, *numbers: int) -> dict[int, bytes | str]:
    """The cases that fail with one of our devices, and the error of each."""
    guest = await pool.get(LABORATORY)
    return await failing(guest, await usb_node(guest, await usb_folder(guest, device)), interface, *numbers)


async def failing(guest: QemuGuest, node: str, interface: int, *numbers: int) -> dict[int, bytes | str]:
    """The cases that fail in a guest whose usbtest has the interface, and the error of each."""
    tests = [
        ("usbtest", interface, number, ITERATIONS)
        + ((CONTROL_LENGTH, CONTROL_VARY, PARTS) if number in CONTROL else (LENGTH, VARY, PARTS))
        for number in numbers
    ]
    results = await raw(guest, node, *tests)
    return {number: result for number, result in zip(numbers, results, strict=True) if result != b""}


@pytest.mark.parametrize("speed", [Speed.SUPER, Speed.HIGH], ids=str)
async def test_gadget_zero(guests: Guests, speed: Speed) -> None:
    guest = await guests.get(LABORATORY)
    device = gadget_zero(speeds=(speed,))
    await guest.check("dmesg -c >/dev/null; modprobe usbtest")
    try:
        async with plugged(guest.targets[0], device):
            assert await cases(guests, device, 0, *CONTROL, *BULK, *UNLINK, *HALT) == {}, await guest.check("dmesg")
    finally:
        await guest.check("rmmod usbtest")


class Slow(SourceSink):
    """Answers bulk transfers after a while, so that the guest can cancel them before."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: dict[Transfer, asyncio.TimerHandle] = {}

    def submit(self, transfer: Transfer) -> None:
        self.pending[transfer] = asyncio.get_running_loop().call_later(0.2, self.answer, transfer)

    def answer(self, transfer: Transfer) -> None:
        del self.pending[transfer]
        super().submit(transfer)

    def cancel(self, transfer: Transfer) -> None:
        self.pending.pop(transfer).cancel()
        transfer.complete(Status.CANCELLED)

    def reset(self, *, port_reset: bool) -> None:
        for transfer in tuple(self.pending):
            self.cancel(transfer)


async def test_transfers_of_a_slow_device_that_are_cancelled(guests: Guests) -> None:
    guest = await guests.get(LABORATORY)
    device = VirtualDevice(Slow(), vendor_id=VENDOR_ID, product_id=PRODUCT_ID)
    await guest.check("dmesg -c >/dev/null; modprobe usbtest")
    try:
        async with plugged(guest.targets[0], device) as hub:
            assert await cases(guests, device, 0, *UNLINK) == {}, await guest.check("dmesg")
            cancelled = {figures.endpoint: figures.cancelled for figures in hub.attachments[0].endpoints}
            assert cancelled[SOURCE] > 0, cancelled
            assert cancelled[SINK] > 0, cancelled
    finally:
        await guest.check("rmmod usbtest")


@every_value(storage=STORAGE, speed=[Speed.HIGH, Speed.SUPER])
async def test_the_disk(guests: Guests, storage: str, speed: Speed) -> None:
    guest = await guests.get(LABORATORY)
    device = disk_device(MemoryStore(16 * MIB), speeds=(speed,), transport=STORAGE[storage].transport)
    async with plugged(guest.targets[0], device):
        await disk_of(guest, device)
        node = await usb_node(guest, await usb_folder(guest, device))
        await guest.check("dmesg -c >/dev/null")
        await raw(guest, node, ("detach", 0))
        identity = device.identity
        await guest.check(f"modprobe usbtest vendor={identity.vendor_id:#x} product={identity.product_id:#x}")
        try:
            assert await cases(guests, device, 0, *CONTROL[:3]) == {}, await guest.check("dmesg")
        finally:
            await guest.check("rmmod usbtest")
        assert await raw(guest, node, ("attach", 0)) == [b""]
        await still_works(guest, await disk_of(guest, device))
    await device.dispose()
