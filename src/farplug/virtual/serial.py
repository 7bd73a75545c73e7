"""A serial line: CDC-ACM, which Linux, Windows 10 and macOS have drivers for.

Source: Class Definitions for Communications Devices, Subclass Specification for PSTN Devices 1.2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, Self

from farplug.ends.base import End
from farplug.usb.types import Recipient, RequestType, Setup, Speed
from farplug.virtual import cdc
from farplug.virtual.async_function import Setting, Stall, bulk_in, bulk_out, control_in, control_out, interrupt_in
from farplug.virtual.device import VirtualDevice
from farplug.virtual.end_function import EndFunction
from farplug.virtual.events import LineBreak, LineChanged
from farplug.virtual.function import Numbers

_CODING: Final = struct.Struct("<IBBB")
_LINE_CODING_AND_BREAK: Final = 0x06
"""bmCapabilities (PSTN, table 4): the requests of line coding and line state, and SEND_BREAK."""
_BREAK_BEGINS, _BREAK_ENDS = 0xFFFF, 0
_CLASS, _INTERFACE = RequestType.CLASS, Recipient.INTERFACE


class Parity(IntEnum):
    """bParityType (PSTN, table 17)."""

    NONE = 0
    ODD = 1
    EVEN = 2
    MARK = 3
    SPACE = 4


class LineState(IntFlag):
    """The signals of SERIAL_STATE (PSTN, table 31). BREAK and the ones after it are reported once."""

    DCD = 1
    DSR = 2
    BREAK = 4
    RING = 8
    FRAMING_ERROR = 16
    PARITY_ERROR = 32
    OVERRUN = 64


STEADY: Final = LineState.DCD | LineState.DSR
"""The signals that stay as they are; the others happen."""


@dataclass(frozen=True, slots=True)
class LineCoding:
    """What the guest has set with SET_LINE_CODING (PSTN, table 17). Nothing is slowed down to the rate.

    Attributes:
        rate: bits per second.
        bits: data bits of a character: 5, 6, 7, 8 or 16.
        parity: the parity bit.
        stop: stop bits: 1, 1.5 or 2.
    """

    rate: int = 9600
    bits: int = 8
    parity: Parity = Parity.NONE
    stop: float = 1

    def __bytes__(self) -> bytes:
        return _CODING.pack(self.rate, round(self.stop * 2) - 2, self.parity, self.bits)

    def __str__(self) -> str:
        return f"{self.rate} {self.bits}{self.parity.name[0]}{self.stop:g}"

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Return what the data of SET_LINE_CODING describes.

        Raises:
            ValueError: the data has another length, or a value that is not defined.
        """
        if len(data) != _CODING.size:
            raise ValueError(f"a line coding has {_CODING.size} bytes, not {len(data)}")
        rate, stop, parity, bits = _CODING.unpack(data)
        if stop > 2 or bits not in (5, 6, 7, 8, 16):
            raise ValueError(f"{data.hex()} is not a valid line coding")
        return cls(rate, bits, Parity(parity), 1 + stop / 2)


class SerialLine(EndFunction):
    """A serial line, whose other end is on this machine.

    The guest's data waits while the peer at the end does not read, and the peer's while the guest does not: nothing is
    lost but what the guest sends without a peer. DCD and DSR are on while a peer is there.

    Without an end, a program reads ``received`` and writes ``sent`` itself, and sets the state of the line.

    Attributes:
        received: what the guest sends.
        sent: what the guest receives.
        coding: the line coding that the guest has set.
        dtr: Data Terminal Ready: on Linux, a program has the line open.
        rts: Request To Send.
        breaks: how often the guest has sent a break.
        in_break: the guest is sending one now.
        state: what was shown to the guest last.
    """

    kind = "serial line"
    settings = (
        Setting(0, interface_class=cdc.CLASS_COMMUNICATIONS, subclass=cdc.SUBCLASS_ACM),
        Setting(1, interface_class=cdc.CLASS_DATA),
    )
    received = bulk_out(interface=1)
    sent = bulk_in(interface=1)
    states = interrupt_in(16, microseconds=16_000, keep=True)

    def __init__(self, end: End | None = None) -> None:
        super().__init__(end)
        self._reset_line()

    def _reset_line(self) -> None:
        self.coding = LineCoding()
        self.dtr = self.rts = self.in_break = False
        self.breaks = 0
        self.state = LineState(0)

    def configured(self, speed: Speed) -> None:
        self._reset_line()
        super().configured(speed)

    def class_descriptors(self, setting: Setting, numbers: Numbers) -> bytes:
        if setting.interface:
            return b""
        control, data = numbers.interface(0), numbers.interface(1)
        return (
            cdc.header()
            + cdc.call_management(data)
            + cdc.abstract_control(_LINE_CODING_AND_BREAK)
            + cdc.union(control, data)
        )

    async def set_state(self, state: LineState) -> None:
        """Show the guest the signals of the line. Waits while no program of the guest has the line open.

        BREAK, RING and the errors are shown once; DCD and DSR stay, and are shown again to the next program that opens
        the line.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
        """
        steady = state & STEADY
        states = (state,) if state == steady else (state, steady)
        await self.states.write_together(*map(self._notification, states))
        self.state = steady

    async def send_break(self) -> None:
        """Send the guest a break. Waits and raises as :meth:`set_state`."""
        await self.set_state(self.state | LineState.BREAK)

    def _notification(self, state: LineState) -> bytes:
        interface = self.host.numbers.interface(0)
        return cdc.notification(cdc.SERIAL_STATE, 0, interface, state.to_bytes(2, "little"))

    # The end

    async def show_connected(self, connected: bool) -> None:
        await self.set_state(STEADY if connected else LineState(0))

    async def to_guest(self, end: End) -> None:
        while True:
            await self.sent.write(b"".join(await end.read()))

    async def from_guest(self, end: End) -> None:
        async for data in self.received:
            if not await end.write((data,)):
                self.dropped += len(data)

    # Requests (PSTN, section 6.3)

    @control_out(0x20, _CLASS, _INTERFACE)
    def _set_line_coding(self, setup: Setup, data: bytes) -> None:
        try:
            coding = LineCoding.parse(data)
        except ValueError as error:
            raise Stall from error
        self._change(coding, self.dtr, self.rts)

    @control_in(0x21, _CLASS, _INTERFACE)
    def _get_line_coding(self, setup: Setup) -> bytes:
        return bytes(self.coding)

    @control_out(0x22, _CLASS, _INTERFACE)
    def _set_control_line_state(self, setup: Setup, data: bytes) -> None:
        self._change(self.coding, bool(setup.value & 1), bool(setup.value & 2))

    def _change(self, coding: LineCoding, dtr: bool, rts: bool) -> None:
        if (coding, dtr, rts) != (self.coding, self.dtr, self.rts):
            self.coding, self.dtr, self.rts = coding, dtr, rts
            self.notify()
            self.host.report(LineChanged(str(coding), dtr, rts))

    @control_out(0x23, _CLASS, _INTERFACE)
    def _send_break(self, setup: Setup, data: bytes) -> None:
        """Begin or end a break, or send one of wValue milliseconds."""
        self.in_break = setup.value == _BREAK_BEGINS
        if setup.value != _BREAK_ENDS:
            self.breaks += 1
            self.host.report(LineBreak())
        self.notify()


def serial_device(end: End | None = None, *, product: str = "Serial Line", serial_number: str = "") -> VirtualDevice:
    """Return a USB device with one serial line.

    Args:
        end: what is at the other end; None: the program uses the endpoints of the function.
        product: its name, for the guest.
        serial_number: distinguishes several of them: Linux makes ``/dev/serial/by-id`` of both.
    """
    return VirtualDevice(SerialLine(end), product=product, serial_number=serial_number, speeds=(Speed.HIGH,))
