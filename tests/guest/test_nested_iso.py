"""Streams of a real kernel, redirected from one guest into another: isochronous ones, and bulk that is read ahead."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_asyncio
from tests.guest.nested import FAR, Plugger
from tests.guest.plugging import raw, usb_folder_by_name, usb_node
from tests.guest.test_nested_functions import ECHOED, first
from tests.guest.usbip import Urb, UsbipDevice, configuration, device_descriptor, endpoint, interface

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

    from farplug.testing import QemuGuest

SERIAL = "0403:6001 *"
ZERO = "0525:a4a0"
"""The ids that Linux's usbtest looks for."""
SINK, SOURCE, COMMANDS, REPORTS = 0x02, 0x82, 0x01, 0x81
ISOCHRONOUS, INTERRUPT = 0x0D, 3
"""bmAttributes; this isochronous one is synchronous, as of a speaker."""
PACKET = 192
INTERVAL, PERIOD = 6, 0.004
"""bInterval of a high-speed endpoint, and the seconds between its packets (USB 2.0, table 9-13). Python in an emulated
guest has no time for much more of them."""
CASES = (15, 16, 22, 23, 25, 26)
"""Of usbtest: isochronous out and in, both again with buffers that are not aligned; interrupt out and in."""
ITERATIONS, LENGTH, QUEUED = 4, 16 * PACKET, 2
COUNT = 250
PER_URB, URBS = 8, 8


def packet(number: int) -> bytes:
    """Return a packet that differs from all others, also in length."""
    return struct.pack("<I", number) * (1 + number % 7)


def numbers(packets: list[bytes]) -> list[int]:
    """The numbers of packets that are all whole."""
    found = [int.from_bytes(data[:4], "little") for data in packets]
    assert packets == list(map(packet, found))
    return found


def split(arrived: bytes | str) -> list[bytes]:
    """Return the packets that the script received."""
    assert isinstance(arrived, bytes), arrived
    packets, position = [], 0
    while position < len(arrived):
        start = position + 2
        position = start + int.from_bytes(arrived[position:start], "little")
        packets.append(arrived[start:position])
    return packets


def rises(sequence: list[int]) -> bool:
    """Return whether each number is greater than the one before."""
    return all(earlier < later for earlier, later in itertools.pairwise(sequence))


@dataclass(eq=False)
class Clocked(UsbipDevice):
    """Takes and gives one isochronous packet each period, as a device with a clock does.

    Attributes:
        played: the packets that came.
        given: how many it gave.
        limit: how many it gives; then its transfers wait.
        packet: what it gives.
    """

    played: list[bytes] = field(default_factory=list)
    given: int = 0
    limit: float = math.inf
    packet: Callable[[int], bytes] = packet
    _free: dict[int, float] = field(default_factory=dict)

    def submit(self, urb: Urb) -> None:
        loop = asyncio.get_running_loop()
        due = max(self._free.get(urb.endpoint, 0), loop.time()) + max(1, len(urb.packets)) * PERIOD
        self._free[urb.endpoint] = due
        loop.call_at(due, self._answer, urb)

    def _answer(self, urb: Urb) -> None:
        if urb.number not in self.pending:
            return  # cancelled
        if urb.endpoint == SINK:
            offset = 0
            for length in urb.packets:
                self.played.append(urb.data[offset : offset + length])
                offset += length
            self.complete(urb)
        elif urb.endpoint == SOURCE and self.given + len(urb.packets) > self.limit:
            asyncio.get_running_loop().call_later(PERIOD, self._answer, urb)
        elif urb.endpoint == SOURCE:
            packets = [self.packet(self.given + number) for number in range(len(urb.packets))]
            self.given += len(packets)
            self.complete(urb, b"".join(packets), moved=list(map(len, packets)))
        else:
            self.complete(urb, bytes(urb.length))


def clocked() -> Clocked:
    """A device whose first setting has no endpoints, as USB 2.0 (5.6.3) demands of those that reserve bandwidth."""
    setting = interface(
        0,
        endpoint(SINK, ISOCHRONOUS, PACKET, INTERVAL),
        endpoint(SOURCE, ISOCHRONOUS, PACKET, INTERVAL),
        endpoint(COMMANDS, INTERRUPT, 64, INTERVAL),
        endpoint(REPORTS, INTERRUPT, 64, INTERVAL),
        alternate=1,
    )
    return Clocked(device_descriptor(ZERO), [configuration(interface(0), setting)])


async def failing(guest: QemuGuest, folder: str) -> dict[int, bytes | str]:
    """The cases of usbtest that fail in a guest, and the error of each."""
    tests = [("usbtest", 0, case, ITERATIONS, LENGTH, 0, QUEUED) for case in CASES]
    results = await raw(guest, await usb_node(guest, folder), *tests)
    return {case: result for case, result in zip(CASES, results, strict=True) if result != b""}


@pytest_asyncio.fixture(loop_scope="session")
async def far(guests: Guests) -> QemuGuest:
    return await guests.get(FAR)


async def test_usbtest(plugger: Plugger, far: QemuGuest) -> None:
    machine, device = plugger.machine, clocked()
    async with device.attached(machine.guest):
        real = await machine.find(f"{ZERO} *")
        await machine.check("busybox modprobe usbtest")
        natively = await failing(machine.guest, real.folder)
        await machine.check("busybox rmmod usbtest")
        await far.check("dmesg -c >/dev/null; modprobe usbtest")
        try:
            async with plugger.plugged(far.targets[0], real):
                folder = await usb_folder_by_name(far, f"{ZERO} *")
                assert await failing(far, folder) == natively == {}, await far.check("dmesg")
        finally:
            await far.check("rmmod usbtest")


async def test_packets_are_whole_and_in_order(plugger: Plugger, far: QemuGuest) -> None:
    """Late packets are lost and counted, as on the wire, so their number depends on time."""
    machine, device = plugger.machine, clocked()
    async with device.attached(machine.guest):
        real = await machine.find(f"{ZERO} *")
        async with plugger.plugged(far.targets[0], real) as (number,):
            node = await usb_node(far, await usb_folder_by_name(far, f"{ZERO} *"))
            sent = [packet(number) for number in range(2 * COUNT)]
            results = await raw(
                far,
                node,
                ("claim", 0),
                ("set_interface", 0, 1),
                ("listen", SOURCE, PACKET, PER_URB, URBS, COUNT),
                ("play", SINK, PER_URB, URBS, *sent),
                ("set_interface", 0, 0),
            )
            assert (results[:2], results[3:]) == ([b"", b""], [b"", b""])
            figures = await plugger.ask("figures", number)

    received = split(results[2])
    assert len(received) >= COUNT
    assert rises(numbers(received))
    assert figures[f"{SOURCE:02x}"]["errors"] == 0

    assert rises(numbers(device.played))
    out = figures[f"{SINK:02x}"]
    assert (out["transfers"], out["errors"], out["dropped"]) == (len(sent), 0, 0)
    # Packets that were in flight at the end were cancelled, but may have been played.
    assert out["transfers"] - out["cancelled"] <= len(device.played) <= len(sent)
    assert device.played


async def test_serial_line_is_read_ahead(plugger: Plugger, far: QemuGuest, tmp_path: Path) -> None:
    """QEMU knows by its ids that it is one to be read without being asked: buffered bulk receiving."""
    machine = plugger.machine
    async with machine.line(tmp_path / "line") as line, machine.device("usb-serial", SERIAL, chardev=line) as real:
        await plugger.ask("record")
        async with plugger.plugged(far.targets[0], real):
            node = "/dev/" + await first(far, f"{await usb_folder_by_name(far, SERIAL)}/*/ttyUSB*")
            sent = os.urandom(20_000)
            result = await far.run(ECHOED.format(node=node, size=len(sent)), stdin=sent)
            assert result.data == sent
        packets = await plugger.ask("recorded")
    (size, transfers) = re.findall(
        r"< start_bulk_receiving .*bytes_per_transfer=(\d+) .*transfers=(\d+)", str(packets)
    )[0]
    read_ahead = [packet for packet in packets if "> buffered_bulk_packet" in packet]
    assert (
        sum(int(packet.rpartition("data=")[2][:-1]) for packet in read_ahead) > len(sent) > int(size) * int(transfers)
    )
    assert len(read_ahead) > int(transfers)
    assert not [packet for packet in packets if "< bulk_packet" in packet and "ep=81" in packet]
