"""The requests and the input reports that all human interface devices have in common.

Source: Device Class Definition for HID 1.11, chapters 6.2 and 7.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar, Final

from farplug.usb.device import Reception
from farplug.usb.transfer import Status
from farplug.usb.types import Recipient, RequestType, Setup, Speed, StandardRequest
from farplug.virtual.async_function import AsyncFunction, Setting, Stall, control_in, control_out, interrupt_in
from farplug.virtual.function import Numbers

CLASS_HID: Final = 3
SUBCLASS_BOOT: Final = 1
PROTOCOL_KEYBOARD: Final = 1
PROTOCOL_MOUSE: Final = 2

REPORT_SIZE: Final = 8
"""wMaxPacketSize. SeaBIOS accepts 8 to 10 bytes for a keyboard."""

OPEN_DELAY: Final = 0.2
"""Seconds from when the guest starts to receive to the first report. Linux drops reports for 50 ms (usbhid_open)."""

_HID_DESCRIPTOR, _REPORT_DESCRIPTOR = 0x21, 0x22
_INPUT, _OUTPUT = 1, 2
_CLASS, _INTERFACE = RequestType.CLASS, Recipient.INTERFACE


class HidFunction(AsyncFunction):
    """A human interface device: one interface, input reports without report ids, at most 8 bytes each.

    A subclass sets :attr:`report_descriptor`, and sends reports with :meth:`report`.

    Attributes:
        report_descriptor: the report descriptor, raw (HID 1.11, chapter 6.2.2).
        boot_protocol: whether the guest has selected the boot protocol, as firmware does.
    """

    settings = (Setting(interface_class=CLASS_HID),)
    report_descriptor: ClassVar[bytes]
    reports = interrupt_in(REPORT_SIZE, microseconds=1000, keep=True)

    boot_protocol = False
    _idle_rate = 0
    _input_report = b""

    async def report(self, *reports: bytes) -> None:
        """Send input reports, which nothing can separate: of a key that is pressed and released, or of a click.

        The last one is the state of the device: it is sent again when the guest starts to receive again.

        Raises:
            Detached: the guest has not configured the device, or resets or unplugs it.
        """
        await self.reports.read_by_guest()
        delay = self.reports.read_since + OPEN_DELAY - asyncio.get_running_loop().time()
        if delay > 0 and not self.reports.restarts:
            await asyncio.sleep(delay)
        await self.reports.write_together(*reports)
        self._input_report = reports[-1]

    def output_report(self, data: bytes) -> None:
        """Take an output report of the guest, such as the LEDs of a keyboard.

        Raises:
            Stall: the device has no such report.
        """
        raise Stall

    def class_descriptors(self, setting: Setting, numbers: Numbers) -> bytes:
        """Return the HID descriptor (chapter 6.2.1)."""
        size = len(self.report_descriptor).to_bytes(2, "little")
        return bytes((9, _HID_DESCRIPTOR, 0x11, 0x01, 0, 1, _REPORT_DESCRIPTOR)) + size

    def configured(self, speed: Speed) -> None:
        self.boot_protocol = False
        self._idle_rate = 0
        self._input_report = b""
        super().configured(speed)

    def receiving(self, endpoint: int, reception: Reception) -> Status:
        status = super().receiving(endpoint, reception)
        self.notify()  # conditions may depend on restarts
        return status

    @control_in(StandardRequest.GET_DESCRIPTOR, RequestType.STANDARD, Recipient.INTERFACE)
    def _get_descriptor(self, setup: Setup) -> bytes:
        match setup.value >> 8:
            case descriptor if descriptor == _REPORT_DESCRIPTOR:
                return self.report_descriptor
            case descriptor if descriptor == _HID_DESCRIPTOR:
                return self.class_descriptors(self.settings[0], self.host.numbers)
        raise Stall

    @control_in(0x01, _CLASS, _INTERFACE)
    def _get_report(self, setup: Setup) -> bytes:
        if setup.value != _INPUT << 8:
            raise Stall
        return self._input_report or bytes(setup.length)

    @control_out(0x09, _CLASS, _INTERFACE)
    def _set_report(self, setup: Setup, data: bytes) -> None:
        if setup.value != _OUTPUT << 8:
            raise Stall
        self.output_report(data)

    @control_in(0x02, _CLASS, _INTERFACE)
    def _get_idle(self, setup: Setup) -> bytes:
        return bytes((self._idle_rate,))

    @control_out(0x0A, _CLASS, _INTERFACE)
    def _set_idle(self, setup: Setup, data: bytes) -> None:
        """Accept the rate; reports are sent only at changes. Firmware that repeats keys itself works with that."""
        self._idle_rate = setup.value >> 8

    @control_in(0x03, _CLASS, _INTERFACE)
    def _get_protocol(self, setup: Setup) -> bytes:
        return bytes((not self.boot_protocol,))

    @control_out(0x0B, _CLASS, _INTERFACE)
    def _set_protocol(self, setup: Setup, data: bytes) -> None:
        """Select the boot protocol (0) or the report protocol (1): reports have the same format in both."""
        if setup.value > 1:
            raise Stall
        self.boot_protocol = not setup.value
