"""One capture: a pcapng file of what moves through the ports of a guest.

The file has two interfaces: ``usb`` with the transfers of the devices, ``wire`` with the bytes of the connections below
TLS. Events are rows of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from farplug.capture import pcapng
from farplug.capture.usb import UsbTap
from farplug.capture.wire import WireTap
from farplug.capture.writer import HEADERS_LIMIT, QUEUE_LIMIT, STANDARD_OUTPUT, Writer, is_pipe, open_capture
from farplug.errors import FarplugError, Reason, StateError, UsageError, from_oserror
from farplug.usb.types import Buffer
from farplug.version import __version__

MAX_PIPE_TRANSFER: Final = 261_000
"""Bytes of a transfer in a capture that is read while it is written: Wireshark ends at a block above 262,144 bytes."""
MAX_TRANSFER: Final = 16 << 20
"""Bytes of a transfer in a file: all of it."""
USB, WIRE = 0, 1
"""The numbers of the interfaces."""

CONTENTS: Final = (
    "it will hold everything that the VM reads from and writes to the devices, keys and PINs too; share it with care"
)
"""What a user must know about a capture."""
_COMMENT = (
    "What moved through the usbredir ports of a VM. It holds everything that the VM read from and wrote to the "
    "devices, keys and PINs too: share it with care. The SPICE ticket is blanked."
)
_USB_TEXT = "USB transfers of the devices; bus: the port of the VM, from 1"
_WIRE_TEXT = "SPICE and usbredir, below TLS; addresses and ports are made up"


class Recording:
    """A capture that is being written.

    ::

        async with Recording("trace.pcapng") as recording, MemoryGuest(device, capture=recording) as guest:
            await guest.enumerate()

    Args:
        path: of the file, or of a named pipe; ``-``: standard output. An existing capture is replaced.
        max_bytes: bytes of each transfer that are kept, and no interface ``wire``; None: everything.
        on_failed: called on the event loop when the file cannot be written any more: the capture has ended.

    Attributes:
        path: as above.
        max_transfer: the most bytes of a transfer that are kept.
        has_wire: whether the capture has the interface ``wire``.
        dropped: the number of packets that are missing, by interface: the file was written too slowly.
        cut: the number of transfers whose data is missing for the same reason.
    """

    def __init__(
        self,
        path: str,
        max_bytes: int | None = None,
        *,
        on_failed: Callable[[FarplugError], None] = lambda error: None,
    ) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}, less than 0")
        self.path = path
        self.max_transfer = MAX_TRANSFER if max_bytes is None else min(max_bytes, MAX_TRANSFER)
        self.has_wire = max_bytes is None
        self.dropped = [0, 0]
        self.cut = 0
        self._on_failed = on_failed
        self._writer: Writer | None = None
        self._connections = 0
        self._taps: dict[int, UsbTap] = {}

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Open the file, and begin.

        Args:
            waiting: called once if the file is a named pipe from which no program reads yet.

        Raises:
            UsageError: the file cannot be used: see :func:`~farplug.capture.writer.open_capture`.
            StateError: the capture was opened before.
        """
        if self._writer is not None:
            raise StateError("the capture was opened before")
        descriptor = await open_capture(self.path, waiting)
        if is_pipe(descriptor):
            self.max_transfer = min(self.max_transfer, MAX_PIPE_TRANSFER)
        self._writer = Writer(descriptor, self._failed)
        head = [
            pcapng.section_header(f"farplug {__version__}", _COMMENT),
            pcapng.interface(pcapng.LINKTYPE_USB_LINUX_MMAPPED, "usb", _USB_TEXT),
        ]
        if self.has_wire:
            head.append(pcapng.interface(pcapng.LINKTYPE_RAW, "wire", _WIRE_TEXT))
        self._writer.write(head)

    async def close(self) -> None:
        """End the capture: write what is queued. Does nothing the second time."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        now = time.time_ns()
        for interface in (USB, WIRE)[: 1 + self.has_wire]:
            if self.dropped[interface]:
                writer.write([pcapng.statistics(interface, now, self.dropped[interface])])
        await writer.close()

    # Taps ---------------------------------------------------------------------------------------------------------

    def port(self, number: int) -> UsbTap:
        """Return what writes the packets of a port.

        Args:
            number: of the port, from 0.
        """
        if number not in self._taps:
            self._taps[number] = UsbTap(self, number + 1)
        return self._taps[number]

    def tap(self, name: str) -> WireTap:
        """Return what writes the bytes of a new connection, with a name for people."""
        self._connections += 1
        return WireTap(self, self._connections - 1, name)

    def event(self, message: str, fields: Mapping[str, str], *, warning: bool = False) -> None:
        """Write an event as a row of its own, with fields of the journal besides its message."""
        if self._writer is not None and self._writer.has_room(len(message), HEADERS_LIMIT):
            entry = {
                "MESSAGE": message,
                "PRIORITY": "4" if warning else "6",
                "SYSLOG_IDENTIFIER": "farplug",
                **fields,
            }
            self._writer.write([pcapng.journal(time.time_ns(), entry)])

    # What the taps write to ---------------------------------------------------------------------------------------

    def has_room(self, size: int) -> bool:
        """Return whether ``size`` bytes of a transfer can be kept now."""
        if self._writer is not None and self._writer.has_room(size):
            return True
        self.cut += 1
        return False

    def usb_packet(self, time: int, parts: Sequence[Buffer], length: int, *, comment: str = "") -> None:
        """Write a transfer's submission or completion: see :class:`~farplug.capture.usb.UsbSink`."""
        self._packet(USB, time, parts, length, HEADERS_LIMIT, comment)

    def wire_packet(self, parts: Sequence[Buffer], *, sent: bool, comment: str = "", essential: bool = False) -> bool:
        """Write an IP packet: see :class:`~farplug.capture.wire.WireSink`."""
        length = sum(map(len, parts))
        flags = pcapng.OUTBOUND if sent else pcapng.INBOUND
        limit = HEADERS_LIMIT if essential else QUEUE_LIMIT
        return self._packet(WIRE, time.time_ns(), parts, length, limit, comment, flags)

    def _packet(
        self,
        interface: int,
        time: int,
        parts: Sequence[Buffer],
        length: int,
        limit: int,
        comment: str,
        flags: int = 0,
    ) -> bool:
        writer = self._writer
        if writer is None:
            return False
        if not writer.has_room(sum(map(len, parts)), limit):
            self.dropped[interface] += 1
            return False
        writer.write(pcapng.packet(interface, time, parts, length, comment=comment, flags=flags))
        return True

    def _failed(self, error: OSError) -> None:
        name = "standard output" if self.path == STANDARD_OUTPUT else self.path
        if isinstance(error, BrokenPipeError):
            failure = UsageError(f"the reader of {name} has left", reason=Reason.IO_ERROR)
        else:
            failure = from_oserror(name, error, as_=UsageError, problem="cannot be written")
        self._on_failed(failure)
