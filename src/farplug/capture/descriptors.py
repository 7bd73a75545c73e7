"""Read the descriptors of a device that is in use: a capture that begins then has not seen the guest read them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

from farplug.capture.usb import descriptors_in
from farplug.usb.device import Device
from farplug.usb.transfer import Status, Transfer
from farplug.usb.types import DescriptorType, Setup, StandardRequest, TransferType

READ_TIMEOUT: Final = 1.0
"""Seconds for each descriptor; a device that is stuck must not delay the capture."""
_DEVICE_SIZE, _HEAD_SIZE = 18, 9
_HID_CLASS, _HID_DESCRIPTOR, _REPORT_DESCRIPTOR = 3, 0x21, 0x22


async def read_descriptors(device: Device) -> list[tuple[Setup, bytes]]:
    """Return the descriptors by which Wireshark decodes a device: requests, and what the device answers to each.

    These are the device descriptor, the first configuration descriptor, and the report descriptors of input devices.
    Those that cannot be read are left out.
    """
    found = []
    first = _standard(DescriptorType.DEVICE, _DEVICE_SIZE)
    found.append((first, await _read(device, first)))
    head = await _read(device, _standard(DescriptorType.CONFIGURATION, _HEAD_SIZE))
    if len(head) == _HEAD_SIZE:
        whole = _standard(DescriptorType.CONFIGURATION, int.from_bytes(head[2:4], "little"))
        configuration = await _read(device, whole)
        found.append((whole, configuration))
        for interface, size in _report_descriptors(configuration):
            request = Setup(0x81, StandardRequest.GET_DESCRIPTOR, _REPORT_DESCRIPTOR << 8, interface, size)
            found.append((request, await _read(device, request)))
    return [(setup, data) for setup, data in found if data]


def _standard(kind: DescriptorType, length: int) -> Setup:
    return Setup(0x80, StandardRequest.GET_DESCRIPTOR, kind << 8, 0, length)


async def _read(device: Device, setup: Setup) -> bytes:
    """Return the answer to a request; empty if the device fails, or does not answer in time."""
    done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def completed(transfer: Transfer) -> None:
        if not done.done():
            done.set_result(bytes(transfer.reply) if transfer.status is Status.SUCCESS else b"")

    transfer = Transfer(TransferType.CONTROL, 0x80, completed, length=setup.length, setup=setup)
    try:
        device.submit(transfer)
        async with asyncio.timeout(READ_TIMEOUT):
            return await done
    except TimeoutError:
        device.cancel(transfer)
    except Exception:
        pass  # the device violates its contract: the engine reports that when the guest's transfers fail
    return b""


def _report_descriptors(configuration: bytes) -> Iterator[tuple[int, int]]:
    """Yield the interfaces of input devices, each with the size of its report descriptor in bytes."""
    interface, is_hid = 0, False
    for one in descriptors_in(configuration):
        if one[1] == DescriptorType.INTERFACE and len(one) >= 9:
            interface, is_hid = one[2], one[5] == _HID_CLASS
        elif one[1] == _HID_DESCRIPTOR and is_hid and len(one) >= 9:
            yield interface, int.from_bytes(one[7:9], "little")
