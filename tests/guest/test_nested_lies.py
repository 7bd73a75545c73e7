"""Devices of a real kernel whose descriptors contradict themselves: plugged as far as they make sense, or refused."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from tests.guest.nested import FAR, Plugger, from_inside
from tests.guest.plugging import until, usb_folder_by_name
from tests.guest.usbip import UsbipDevice, configuration, device_descriptor, endpoint, interface

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

ISOCHRONOUS, BULK, INTERRUPT = 1, 2, 3
OUT, IN = 0x01, 0x81
HONEST = interface(0, endpoint(OUT, BULK, 512), endpoint(IN, BULK, 512))


@dataclass(frozen=True)
class Lie:
    """A device with wrong descriptors.

    Attributes:
        configurations: its configuration descriptors.
        warnings: the warnings of farplug.
        refused: the error of farplug if it refuses the device; else empty.
        bos: its binary object store; it is a device of USB 2.1 then.
    """

    configurations: tuple[bytes, ...]
    warnings: tuple[str, ...] = ()
    refused: str = ""
    bos: bytes | None = None


UNREADABLE = "device-fault: libusb cannot read the descriptors of the USB device"
LIES = {
    "longer than it is": Lie((configuration(HONEST, total=400),)),
    "shorter than it is": Lie((configuration(HONEST, total=20),), refused=UNREADABLE),
    "interfaces that are not there": Lie((configuration(HONEST, interfaces=9),)),
    "endpoints that are not there": Lie((configuration(HONEST[:4] + b"\x1e" + HONEST[5:]),), refused=UNREADABLE),
    "an endpoint twice": Lie(
        (configuration(interface(0, *[endpoint(IN, BULK, 512)] * 2, endpoint(OUT, BULK, 512))),),
        (
            "endpoint 81 occurs twice in a setting: the second was skipped",
            "interface 0 setting 0 has 2 endpoints, not 3",
        ),
    ),
    "an interface twice": Lie(
        (configuration(HONEST, HONEST),),
        (
            "interface 0 setting 0 occurs twice: the second was skipped",
            *["a descriptor of type 5 of a skipped interface was skipped"] * 2,
        ),
    ),
    "packets of no bytes": Lie(
        (configuration(interface(0, endpoint(IN, BULK, 0), endpoint(0x82, INTERRUPT, 0, 4))),),
    ),
    "no interval": Lie(
        (configuration(interface(0, endpoint(0x82, INTERRUPT, 8, 0), endpoint(0x83, ISOCHRONOUS, 64, 0))),),
    ),
    "a descriptor without length": Lie((configuration(HONEST, b"\0\x24\0\0"),)),
    "a descriptor beyond the end": Lie((configuration(HONEST, b"\xff\x24\0\0"),)),
    "one value for two configurations": Lie((configuration(HONEST), configuration(interface(0)))),
    "interface 255": Lie((configuration(interface(255, endpoint(IN, BULK, 512))),)),
    "an endpoint 80": Lie(
        (configuration(interface(0, endpoint(0x80, BULK, 512), endpoint(IN, BULK, 512))),),
        ("an endpoint with the address 80 was skipped", "interface 0 setting 0 has 1 endpoints, not 2"),
    ),
    "packets of 64 KiB": Lie((configuration(interface(0, endpoint(IN, BULK, 0xFFFF))),)),
    "a store cut short": Lie((configuration(HONEST),), bos=b"\x05\x0f\xff\x00\x09\x07\x10\x02\x1e"),
    "a store that has no end": Lie((configuration(HONEST),), bos=b"\x05\x0f\x09\x00\x02\x00\x10\x02\x1e"),
}
NAMES = {0: b"\x04\x03\x09\x04", 1: b"\x00\x03a\x00", 2: b"\x05\x03a\x00b", 3: b"\x04"}
"""String descriptors of all of them: of length 0, of half a character, and one that is never there as a whole."""
TOGETHER = 8
"""Ports of vhci_hcd for high speed, and SPICE ports of the far guest."""


@pytest.mark.parametrize("first", range(0, len(LIES), TOGETHER))
async def test_what_makes_sense_is_plugged(plugger: Plugger, guests: Guests, first: int) -> None:
    machine, far = plugger.machine, await guests.get(FAR)
    target = from_inside(far.targets[-1])
    async with AsyncExitStack() as stack:
        devices: dict[str, UsbipDevice] = {}
        for number, name in enumerate(list(LIES)[first : first + TOGETHER], start=1):
            lie = LIES[name]
            usb = 0x0200 if lie.bos is None else 0x0201
            descriptor = device_descriptor(f"1d6b:02{number:02d}", usb=usb, configurations=len(lie.configurations))
            descriptor = descriptor[:14] + bytes((1, 2, 3)) + descriptor[17:]
            devices[name] = UsbipDevice(descriptor, lie.configurations, strings=NAMES, bos=lie.bos)
            await stack.enter_async_context(devices[name].attached(machine.guest))
        await plugger.ask("connect", target)
        stack.push_async_callback(plugger.ask, "leave", target)
        offered: dict[str, object] = {}
        for number, (name, device) in enumerate(devices.items(), start=-TOGETHER):
            real = await machine.find(f"{device.ids} *")
            try:
                offered[name] = tuple(await plugger.ask("offer", number, target, real.bus))
            except AssertionError as error:
                offered[name] = str(error)[: len(UNREADABLE)]
        assert offered == {name: LIES[name].refused or LIES[name].warnings for name in devices}
        for name, device in devices.items():
            if not LIES[name].refused:
                folder = await usb_folder_by_name(far, f"{device.ids} *")
                await until(far, f"busybox grep -q . {folder}/bConfigurationValue")
    assert far.alive
