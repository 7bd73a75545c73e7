"""The kernel's own test of USB devices against a real one: what passes natively passes in the far guest as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.guest.nested import FAR, REAL_DEVICES, Machine, from_inside, running
from tests.guest.plugging import SCRIPTS, usb_folder_by_ids, usb_node
from tests.guest.test_usbtest import BULK, CONTROL, HALT, UNLINK, failing

if TYPE_CHECKING:
    from tests.guest.conftest import GuestPool

ZERO = "0525:a4a0"
CASES = (*CONTROL, *BULK, *UNLINK, *HALT)


async def test_gadget_zero(guests: GuestPool) -> None:
    machine, far = Machine(await guests.get(REAL_DEVICES)), await guests.get(FAR)
    await machine.check(f"ln -sfn {SCRIPTS} /scripts")
    async with machine.gadget(ZERO, "SourceSink.0", "Loopback.0") as real:
        await machine.check("busybox modprobe usbtest")
        natively = await failing(machine.guest, await usb_node(machine.guest, real.folder), 0, *CASES)
        print(natively)
        await machine.check("rmmod usbtest")
        await far.check("modprobe usbtest")
        async with running(machine.guest, f"usbredirect --device {real.bus} --to {from_inside(far.targets[0])[6:]}"):
            node = await usb_node(far, await usb_folder_by_ids(far, ZERO))
            r = await failing(far, node, 0, *CASES)
            print(r)
            print(await far.check("dmesg | tail -30"))
        await far.check("rmmod usbtest")
    assert r == natively
