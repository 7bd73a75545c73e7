"""Plug a device of your own into a VM until Ctrl-C: the test device that Linux calls "gadget zero".

The device has a bulk endpoint that takes zeros, one that gives zeros, and a buffer that vendor requests write (5B) and
read (5C). Linux's driver ``usbtest`` finds the device by its ids, and tests USB stacks with it.

python examples/gadget_zero.py tcp://127.0.0.1:4000
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence

import farplug
from farplug.usb import Speed, Transfer
from farplug.usb.descriptors import InterfaceDescriptor
from farplug.usb.endpoints import bulk_endpoint
from farplug.usb.types import Direction, RequestType
from farplug.virtual import Function, FunctionHost, Numbers, VirtualDevice

VENDOR_ID, PRODUCT_ID = 0x0525, 0xA4A0
SOURCE, SINK = 0x81, 0x01
VENDOR_CLASS = 0xFF
WRITE_BUFFER, READ_BUFFER = 0x5B, 0x5C


class SourceSink(Function):
    """Gives zeros from the source, and takes zeros at the sink, which halts when something else comes."""

    def __init__(self) -> None:
        self._buffer = b""

    def bind(self, host: FunctionHost) -> None:
        """Keep the device that this function belongs to: it can halt endpoints."""
        self._host = host

    def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
        """Return one interface with two bulk endpoints."""
        endpoints = tuple(bulk_endpoint(address, speed) for address in (SOURCE, SINK))
        return (InterfaceDescriptor(0, 0, VENDOR_CLASS, 0, 0, endpoints),)

    def control(self, transfer: Transfer) -> bool:
        """Answer the two vendor requests; the device stalls all others."""
        setup = transfer.setup
        if setup is None or setup.type is not RequestType.VENDOR:
            return False
        if setup.request == WRITE_BUFFER and setup.direction is Direction.OUT:
            self._buffer = bytes(transfer.data)
            transfer.complete()
        elif setup.request == READ_BUFFER and setup.direction is Direction.IN:
            transfer.complete(reply=self._buffer[: setup.length])
        else:
            return False
        return True

    def submit(self, transfer: Transfer) -> None:
        """Complete a bulk transfer at once: nothing here takes time."""
        if transfer.endpoint == SOURCE:
            transfer.complete(reply=bytes(transfer.length))
        else:
            if bytes(transfer.data) != bytes(transfer.length):
                self._host.halt(SINK)
            transfer.complete()

    def cancel(self, transfer: Transfer) -> None:
        """Do nothing: no transfer is ever pending."""

    def reset(self, *, port_reset: bool) -> None:
        """Do nothing: no transfer is ever pending."""


def gadget_zero(speeds: Sequence[Speed] = (Speed.SUPER, Speed.HIGH)) -> VirtualDevice:
    """Return the device, with the ids that Linux's usbtest looks for."""
    return VirtualDevice(SourceSink(), vendor_id=VENDOR_ID, product_id=PRODUCT_ID, product="Gadget Zero", speeds=speeds)


async def main(target: str) -> None:
    """Plug the device into the VM at ``target``, and stay until the VM ends or this task is cancelled."""
    async with farplug.connect(target) as guest, guest.plug(gadget_zero()) as attachment:
        await attachment.configured()
        print("the VM has configured the device; Ctrl-C unplugs it", flush=True)
        await attachment.ended()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
