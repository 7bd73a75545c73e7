"""A network adapter: CDC-NCM, which Linux, Windows 11, Windows 10 (version 2004) and macOS have drivers for.

Source: Subclass Specification for Network Control Model Devices 1.0 (Errata 1).
"""

from __future__ import annotations

import hashlib
import re
import secrets
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from farplug.ends.base import End
from farplug.rate_limit import limited_logger
from farplug.usb.platform import WindowsDriver
from farplug.usb.types import Buffer, Recipient, RequestType, Setup, Speed
from farplug.virtual import cdc
from farplug.virtual.async_function import Setting, Stall, bulk_in, bulk_out, control_in, control_out, interrupt_in
from farplug.virtual.device import VirtualDevice
from farplug.virtual.end_function import EndFunction
from farplug.virtual.function import Numbers
from farplug.virtual.ntb import ALIGNMENT, MIN_FRAME, BlockReader, BlockWriter

log = limited_logger(__name__)

MAX_FRAME: Final = 1514
"""Bytes of a frame: 1500, and the Ethernet header."""

MAX_TAGGED: Final = MAX_FRAME + 4
"""The same with a VLAN tag, which is not counted."""

BLOCK_SIZE: Final = 16384
"""Bytes of a transfer block, at most, in both directions."""

MIN_BLOCK_SIZE: Final = 2048
"""The smallest size of blocks that a guest may set (NCM, section 6.2.7)."""

RATE: Final = 1_000_000_000
"""Bits per second that the guest is shown. Nothing is slowed down to it."""

PACKET_FILTER: Final = 0x01
"""bmNetworkCapabilities (NCM, table 5-2): SET_ETHERNET_PACKET_FILTER."""

_16_BIT: Final = 0x0001
_CLASS, _INTERFACE = RequestType.CLASS, Recipient.INTERFACE


def parse_mac(text: str) -> bytes:
    """Return an Ethernet address: 12 hex digits, perhaps with ``:`` or ``-`` after each two.

    Raises:
        ValueError: the text is not one, or the address is not of one adapter.
    """
    match = re.fullmatch(r"([0-9a-fA-F]{2})([:-]?)" + r"([0-9a-fA-F]{2})\2" * 4 + r"([0-9a-fA-F]{2})", text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a valid MAC address: write it as 02:00:00:00:00:01")
    address = bytes.fromhex(re.sub("[:-]", "", text))
    if address[0] & 1:
        raise ValueError(f"{text} is the MAC address of a group, not of one adapter: the first byte must be even")
    if not any(address):
        raise ValueError(f"{text} is not the MAC address of an adapter")
    return address


def random_mac() -> bytes:
    """Return a random Ethernet address, locally administered."""
    return b"\x02" + secrets.token_bytes(5)


def stable_mac(identity: str) -> bytes:
    """Return an Ethernet address, locally administered, that follows from a text and from this machine."""
    try:
        machine = Path("/etc/machine-id").read_bytes()
    except OSError:
        machine = socket.gethostname().encode()
    return b"\x02" + hashlib.blake2b(identity.encode(errors="replace"), digest_size=5, key=machine[:64]).digest()


class NetworkAdapter(EndFunction):
    """A network adapter of the guest, whose cable leads to an end on this machine.

    The end carries Ethernet frames. The guest sees a carrier while a peer is there; without one its frames are dropped.
    While the peer takes no frames the guest waits.

    Without an end, a program calls :meth:`read_frames`, :meth:`write_frames` and :meth:`show_connected` itself.

    Args:
        end: carries frames; None: the program does.
        mac: the guest's address, six bytes; None: a random one.

    Attributes:
        mac: the guest's address.
        refused: blocks of the guest that were not valid, and were dropped.
        too_long: frames of peers that do not fit, and were dropped.
    """

    kind = "network adapter"
    settings = (
        Setting(0, interface_class=cdc.CLASS_COMMUNICATIONS, subclass=cdc.SUBCLASS_NCM),
        Setting(1, interface_class=cdc.CLASS_DATA, protocol=1),
        Setting(1, alternate=1, interface_class=cdc.CLASS_DATA, protocol=1),
    )
    windows_driver = WindowsDriver("WINNCM")
    received = bulk_out(interface=1, alternate=1)
    sent = bulk_in(interface=1, alternate=1)
    states = interrupt_in(16, microseconds=16_000, keep=True)

    def __init__(self, end: End | None = None, *, mac: bytes | None = None) -> None:
        super().__init__(end)
        self.mac = random_mac() if mac is None else mac
        if len(self.mac) != 6 or self.mac[0] & 1:
            raise ValueError(f"{self.mac.hex(':')} is not a MAC address of an adapter")
        self.refused = self.too_long = 0
        self._reader = BlockReader(MAX_TAGGED)
        self._reset_blocks()

    def _reset_blocks(self) -> None:
        self._block_size = BLOCK_SIZE
        self._writer = BlockWriter()

    def configured(self, speed: Speed) -> None:
        self._reset_blocks()
        super().configured(speed)

    def set_alternate(self, interface: int, alternate: int) -> None:
        """Select an alternate setting: 0 of the data interface ends the use of the adapter, and resets its blocks."""
        if interface == 1 and not alternate:
            self._reset_blocks()
        super().set_alternate(interface, alternate)

    def class_descriptors(self, setting: Setting, numbers: Numbers) -> bytes:
        if setting.interface:
            return b""
        return (
            cdc.header()
            + cdc.union(numbers.interface(0), numbers.interface(1))
            + cdc.ethernet(numbers.string(self.mac.hex().upper()), MAX_FRAME)
            + cdc.ncm(PACKET_FILTER)
        )

    async def read_frames(self) -> list[memoryview]:
        """Return the frames of the guest's next block. Blocks that are not valid are dropped, and counted.

        Raises:
            Detached: the guest has reset or unplugged the device.
        """
        while True:
            block = await self.received.read()
            if not block:
                continue  # the end of a transfer whose last packet was full, which may follow a block
            try:
                frames = self._reader.frames(block)
            except ValueError as error:
                self.refused += 1
                log.warning("a block of the guest is not valid and is dropped: %s", error)
                continue
            if frames:
                return frames

    async def write_frames(self, frames: Sequence[Buffer]) -> None:
        """Send frames to the guest. Returns when it has taken them. Those that do not fit are dropped, and counted.

        Raises:
            Detached: the guest has reset or unplugged the device.
        """
        fitting = [frame for frame in frames if MIN_FRAME <= len(frame) <= MAX_TAGGED]
        self.too_long += len(frames) - len(fitting)
        for block in self._writer.blocks(fitting, self._block_size):
            await self.sent.write(block)

    async def show_connected(self, connected: bool) -> None:
        """Show the guest whether there is a carrier. Waits while the guest has not set the adapter up.

        Raises:
            Detached: the guest has reset or unplugged the device.
        """
        control = self.host.numbers.interface(0)
        if connected:
            rates = struct.pack("<II", RATE, RATE)
            await self.states.write(cdc.notification(cdc.CONNECTION_SPEED_CHANGE, 0, control, rates))
        await self.states.write(cdc.notification(cdc.NETWORK_CONNECTION, int(connected), control))

    # The end

    async def to_guest(self, end: End) -> None:
        while True:
            await self.write_frames(await end.read())

    async def from_guest(self, end: End) -> None:
        while True:
            frames = await self.read_frames()
            if not await end.write(frames):
                self.dropped += sum(map(len, frames))

    # Requests (NCM, section 6.2)

    @control_in(0x80, _CLASS, _INTERFACE)
    def _get_ntb_parameters(self, setup: Setup) -> bytes:
        limits = struct.pack("<IHHHH", BLOCK_SIZE, ALIGNMENT, 0, ALIGNMENT, 0)
        return struct.pack("<HH", 28, _16_BIT) + limits + limits

    @control_in(0x85, _CLASS, _INTERFACE)
    def _get_ntb_input_size(self, setup: Setup) -> bytes:
        return self._block_size.to_bytes(4, "little")

    @control_out(0x86, _CLASS, _INTERFACE)
    def _set_ntb_input_size(self, setup: Setup, data: bytes) -> None:
        size = int.from_bytes(data, "little")
        if len(data) != 4 or not MIN_BLOCK_SIZE <= size <= BLOCK_SIZE:
            raise Stall
        self._block_size = size

    @control_in(0x83, _CLASS, _INTERFACE)
    def _get_ntb_format(self, setup: Setup) -> bytes:
        return bytes(2)

    @control_out(0x84, _CLASS, _INTERFACE)
    def _set_ntb_format(self, setup: Setup, data: bytes) -> None:
        if setup.value:
            raise Stall

    @control_out(0x43, _CLASS, _INTERFACE)
    def _set_ethernet_packet_filter(self, setup: Setup, data: bytes) -> None:
        """Accept any filter: the guest's driver drops what it does not want, as for the frames of a hub."""


def network_device(
    end: End | None = None, *, mac: bytes | None = None, product: str = "Network Adapter", serial_number: str = ""
) -> VirtualDevice:
    """Return a USB device with one network adapter. Its parameters are those of :class:`NetworkAdapter`."""
    adapter = NetworkAdapter(end, mac=mac)
    return VirtualDevice(adapter, product=product, serial_number=serial_number, speeds=(Speed.HIGH,))
