"""The standard requests of USB 2.0 and USB 3.2 (chapter 9), sent by the guest through usbfs, every driver detached.

The list is that of the USB-IF's command verifier. Linux keeps some of it from us: a request to an interface or endpoint
that the configuration does not have is refused by usbfs (ENOENT, EINVAL), SET_ADDRESS belongs to the host controller.
tests/virtual/test_device.py sends those in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from examples.gadget_zero import gadget_zero
from tests.guest.plugging import LABORATORY, MIB, Operation, Result, plugged, raw, usb_folder, usb_node
from tests.long import every_value

from farplug.store import MemoryStore
from farplug.usb import Speed
from farplug.usb.types import DescriptorType, Feature, StandardRequest
from farplug.virtual import VirtualDevice, disk_device

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

STALL = "EPIPE"
REFUSED = "EPROTO"
"""SET_CONFIGURATION and SET_INTERFACE are messages of their own in usbredir, and those know no stall."""
RESETS = 20

DEVICES: dict[str, Callable[[Speed], VirtualDevice]] = {
    "disk": lambda speed: disk_device(MemoryStore(MIB), speeds=(speed,)),
    "gadget": lambda speed: gadget_zero((speed,)),
}

Step: TypeAlias = tuple[Operation, Result]


def control(
    kind: int, request: StandardRequest, value: int, index: int, length: int = 0, data: bytes = b""
) -> Operation:
    return "control", struct.pack("<BBHHH", kind, request, value, index, length), data


def descriptor(kind: int, index: int, length: int = 255, language: int = 0) -> Operation:
    return control(0x80, StandardRequest.GET_DESCRIPTOR, kind << 8 | index, language, length)


def status(recipient: int, index: int) -> Operation:
    return control(0x80 | recipient, StandardRequest.GET_STATUS, 0, index, 2)


def feature(recipient: int, request: StandardRequest, value: int, index: int) -> Operation:
    return control(recipient, request, value, index)


@every_value(kind=DEVICES, speed=[Speed.SUPER, Speed.HIGH])
async def test_chapter_9(guests: Guests, kind: str, speed: Speed) -> None:
    guest = await guests.get(LABORATORY)
    device = DEVICES[kind](speed)
    async with plugged(guest.targets[0], device):
        folder = await usb_folder(guest, device)
        node = await usb_node(guest, folder)
        await guest.run(f"modprobe -r usbtest; for i in {folder}/*:1.*; do echo ${{i##*/}} >$i/driver/unbind; done")
        described = await raw(guest, node, *descriptors_asked_for)
        check_descriptors(device, described)
        steps = [*refused_descriptors(speed), *device_requests(speed), *interface_requests(settings(described[1]))]
        alive = descriptor(DescriptorType.DEVICE, 0)
        # After each step, stalled or not, endpoint 0 answers.
        results = await raw(guest, node, *(one for operation, _ in steps for one in (operation, alive)))
        done = [(operation, result) for (operation, _), result in zip(steps, results[::2], strict=True)]
        assert done == steps
        assert set(results[1::2]) == {described[0]}
        assert {len(settings(described[1])), len(device.interfaces)} == ({1, 2} if kind == "disk" else {1})
        again = await raw(
            guest, node, *[("reset",), alive, control(0x80, StandardRequest.GET_CONFIGURATION, 0, 0, 1)] * RESETS
        )
        assert again == [b"", described[0], b"\1"] * RESETS
        assert await guest.check(f"lsusb -v -s {node[-7:].replace('/', ':')} 2>&1 >/dev/null") == ""
    await device.dispose()


descriptors_asked_for = (
    descriptor(DescriptorType.DEVICE, 0),
    descriptor(DescriptorType.CONFIGURATION, 0),
    descriptor(DescriptorType.CONFIGURATION, 0, length=9),
    descriptor(DescriptorType.STRING, 0),
    *(descriptor(DescriptorType.STRING, index, language=0x0409) for index in (1, 2, 3)),
    descriptor(DescriptorType.BOS, 0),
    descriptor(DescriptorType.DEVICE_QUALIFIER, 0),
    descriptor(DescriptorType.OTHER_SPEED_CONFIGURATION, 0),
)


def check_descriptors(device: VirtualDevice, answers: list[Result]) -> None:
    """Lengths, counts and numbers of the answers to ``descriptors_asked_for``."""
    identity = device.identity
    first, configuration, head, languages, *strings, bos, qualifier, other = answers
    assert isinstance(first, bytes)
    assert isinstance(configuration, bytes)
    size, kind, version, _, _, _, packet_size, vendor, product, _, *_, configurations = struct.unpack(
        "<BBHBBBBHHHBBBB", first
    )
    fast = identity.speed is Speed.SUPER
    assert (size, kind, packet_size, configurations) == (18, 1, 9 if fast else 64, 1)
    assert (vendor, product) == (identity.vendor_id, identity.product_id)
    assert (version >= 0x0300) == fast
    assert int.from_bytes(configuration[2:4], "little") == len(configuration)
    assert head == configuration[:9]
    kinds = walk(configuration)
    assert kinds[0] == DescriptorType.CONFIGURATION
    assert kinds.count(DescriptorType.INTERFACE) >= configuration[4] == len(device.interfaces)
    endpoints = kinds.count(DescriptorType.ENDPOINT)
    assert endpoints >= sum(len(interface.endpoints) for interface in device.interfaces)
    assert kinds.count(DescriptorType.SUPERSPEED_ENDPOINT_COMPANION) == (endpoints if fast else 0)
    assert languages == b"\4\3\x09\4"
    texts = [one[2:].decode("utf-16-le") if isinstance(one, bytes) else "" for one in strings]
    assert texts == [identity.manufacturer, identity.product, identity.serial_number]
    if isinstance(strings[2], bytes):
        assert len(texts[2]) >= 12
        assert set(texts[2]) <= set("0123456789ABCDEF")
    if fast:
        assert isinstance(bos, bytes)
        assert walk(bos) == [DescriptorType.BOS] + [DescriptorType.DEVICE_CAPABILITY] * bos[4]
        assert int.from_bytes(bos[2:4], "little") == len(bos)
        assert (qualifier, other) == (STALL, STALL)
    else:
        assert bos == STALL  # a device that never runs at SuperSpeed is one of USB 2.0
        assert isinstance(qualifier, bytes)
        assert isinstance(other, bytes)
        assert (len(qualifier), qualifier[1]) == (10, DescriptorType.DEVICE_QUALIFIER)
        assert walk(other)[0] == DescriptorType.OTHER_SPEED_CONFIGURATION


def walk(data: bytes) -> list[int]:
    """The types of the descriptors that follow one another."""
    kinds = []
    while data:
        assert data[0] >= 2, data
        kinds.append(data[1])
        data = data[data[0] :]
    return kinds


def refused_descriptors(speed: Speed) -> list[Step]:
    kinds = {0, DescriptorType.INTERFACE, DescriptorType.ENDPOINT, 8, 0x21, 0x22, 0x29, 0x2A, 0x30, 0x7F, 0xFF}
    return [
        *((descriptor(kind, 0), STALL) for kind in sorted(kinds)),
        (descriptor(DescriptorType.CONFIGURATION, 1), STALL),
        (descriptor(DescriptorType.STRING, 200, language=0x0409), STALL),
        (control(0x00, StandardRequest.SET_DESCRIPTOR, 0x0100, 0, 18, bytes(18)), STALL),
        (control(0x82, StandardRequest.SYNCH_FRAME, 0, 0, 2), STALL),
    ]


def device_requests(speed: Speed) -> list[Step]:
    on, off = StandardRequest.SET_FEATURE, StandardRequest.CLEAR_FEATURE
    steps: list[Step] = [
        (control(0x80, StandardRequest.GET_STATUS, 1, 0, 2), STALL),
        (feature(0, on, Feature.DEVICE_REMOTE_WAKEUP, 0), STALL),  # it has none
        (feature(0, on, Feature.LTM_ENABLE, 0), STALL),
        (feature(0, on, 99, 0), STALL),
        (control(0x00, StandardRequest.SET_CONFIGURATION, 9, 0), REFUSED),
        (control(0x80, StandardRequest.GET_CONFIGURATION, 0, 0, 1), b"\1"),
    ]
    if speed is not Speed.SUPER:
        return [
            *steps,
            (feature(0, on, Feature.U1_ENABLE, 0), STALL),
            (control(0x00, StandardRequest.SET_SEL, 0, 0, 6, bytes(6)), STALL),
            (control(0x00, StandardRequest.SET_ISOCH_DELAY, 40, 0), STALL),
            (status(0, 0), b"\1\0"),
        ]
    return [
        *steps,
        (feature(0, off, Feature.U1_ENABLE, 0), b""),
        (feature(0, off, Feature.U2_ENABLE, 0), b""),
        (status(0, 0), b"\1\0"),  # self-powered
        (feature(0, on, Feature.U1_ENABLE, 0), b""),
        (status(0, 0), b"\5\0"),
        (feature(0, on, Feature.U2_ENABLE, 0), b""),
        (status(0, 0), b"\x0d\0"),
        (feature(0, off, Feature.U1_ENABLE, 0), b""),
        (feature(0, off, Feature.U2_ENABLE, 0), b""),
        (status(0, 0), b"\1\0"),
        (control(0x00, StandardRequest.SET_SEL, 0, 0, 6, bytes(6)), b""),
        (control(0x00, StandardRequest.SET_ISOCH_DELAY, 40, 0), b""),
    ]


def settings(configuration: Result) -> dict[tuple[int, int], list[int]]:
    """The endpoints of every interface in every alternate setting."""
    assert isinstance(configuration, bytes)
    found: dict[tuple[int, int], list[int]] = {}
    while configuration:
        if configuration[1] == DescriptorType.INTERFACE:
            endpoints = found[configuration[2], configuration[3]] = []
        elif configuration[1] == DescriptorType.ENDPOINT:
            endpoints.append(configuration[2])
        configuration = configuration[configuration[0] :]
    return found


def interface_requests(interfaces: Mapping[tuple[int, int], list[int]]) -> list[Step]:
    """Every setting is chosen, and each of its endpoints halted and cleared, twice; endpoint 0 cannot be halted."""
    on, off = StandardRequest.SET_FEATURE, StandardRequest.CLEAR_FEATURE
    steps: list[Step] = [(status(2, 0), b"\0\0"), (feature(2, on, Feature.ENDPOINT_HALT, 0), STALL)]
    steps += [(("claim", number), b"") for number in sorted({number for number, _ in interfaces})]
    for (number, alternate), endpoints in interfaces.items():
        chosen = control(0x81, StandardRequest.GET_INTERFACE, 0, number, 1), bytes([alternate])
        steps += [
            (("set_interface", number, alternate), b""),
            chosen,
            (control(0x01, StandardRequest.SET_INTERFACE, 7, number), REFUSED),
            chosen,
            (status(1, number), b"\0\0"),
        ]
        for endpoint in endpoints:
            steps += [
                (status(2, endpoint), b"\0\0"),
                *[(feature(2, on, Feature.ENDPOINT_HALT, endpoint), b""), (status(2, endpoint), b"\1\0")] * 2,
                *[(feature(2, off, Feature.ENDPOINT_HALT, endpoint), b""), (status(2, endpoint), b"\0\0")] * 2,
                (feature(2, on, 99, endpoint), STALL),
            ]
    return steps
