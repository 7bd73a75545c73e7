"""The kernel's own test of USB devices against a real one: what passes natively passes in the far guest as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.guest.nested import FAR, Plugger
from tests.guest.plugging import usb_folder_by_name, usb_node
from tests.guest.test_usbtest import BULK, CONTROL, HALT, UNLINK, failing

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

ZERO = "0525:a4a0"
CASES = (*CONTROL, *BULK, *UNLINK, *HALT)


async def test_gadget_zero(plugger: Plugger, guests: Guests) -> None:
    machine, far = plugger.machine, await guests.get(FAR)
    async with machine.gadget(ZERO, "SourceSink.0", "Loopback.0") as real:
        await machine.check("busybox modprobe usbtest")
        natively = await failing(machine.guest, await usb_node(machine.guest, real.folder), 0, *CASES)
        await machine.check("busybox rmmod usbtest")
        await far.check("dmesg -c >/dev/null; modprobe usbtest")
        try:
            async with plugger.plugged(far.targets[0], real):
                node = await usb_node(far, await usb_folder_by_name(far, f"{ZERO} *"))
                assert await failing(far, node, 0, *CASES) == natively == {}, await far.check("dmesg")
        finally:
            await far.check("rmmod usbtest")
