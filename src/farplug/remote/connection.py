"""A connection to a USB/IP server that has imported a device: URBs out, replies in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, TypeAlias

from farplug.errors import DeviceError, FarplugError, Reason, RemoteProtocolError, TargetError
from farplug.transport.connection import Connection, TcpAddress, Timeouts, dial, start
from farplug.usb.share import MAX_MEMORY
from farplug.usb.transfer import Status
from farplug.usb.types import Setup
from farplug.usbip.messages import (
    Errno,
    ExportedDevice,
    ImportParser,
    ImportRequest,
    Refusal,
    ReplyParser,
    Submit,
    Submitted,
    Unlink,
    Unlinked,
    encode_request,
)

IMPORT_TIMEOUT = 10.0
"""Seconds for the reply to an import."""

CLOSE_TIMEOUT: Final = 1.0
"""Seconds until the event loop has closed a socket."""

MAX_UNLINKS = 16384
"""Unlink commands without a reply. A reset of the guest sends as many as it has requests, which are 4096 at most."""

MAX_UNLINKED_BYTES = 2 * MAX_MEMORY
"""Bytes to the device of these URBs, which the socket may not have taken yet. To the guest they have ended."""

_STATUSES: Final = {
    0: Status.SUCCESS,
    -Errno.ENOENT: Status.CANCELLED,
    -Errno.EINVAL: Status.INVALID,
    -Errno.EPIPE: Status.STALL,
    -Errno.ETIME: Status.TIMEOUT,
    -Errno.EOVERFLOW: Status.BABBLE,
    -Errno.ECONNRESET: Status.CANCELLED,
    -Errno.ETIMEDOUT: Status.TIMEOUT,
    -Errno.EREMOTEIO: Status.SUCCESS,
}
"""EREMOTEIO: the URB is shorter than requested, which is not an error for usbredir."""

Done: TypeAlias = Callable[[Submitted], None]
"""Called once with the reply to an URB; one with ECONNRESET if the URB was unlinked, with ESHUTDOWN if the connection
ended."""


def status_of(error: int) -> Status:
    """Return the status for an error number of a reply."""
    return _STATUSES.get(error, Status.IO_ERROR)


class UrbConnection:
    """An imported device. Made by :meth:`open`.

    Args:
        address: of the server.
        busid: the device's name there.

    Attributes:
        device: what the server says of the device.
        on_lost: called once when the connection ends by itself; with None if the server has closed it.
    """

    device: ExportedDevice

    def __init__(self, address: TcpAddress, busid: str) -> None:
        self.on_lost: Callable[[Exception | None], None] = _ignore
        self._address = address
        self._busid = busid
        self._connection = Connection(self, self._lost)
        self._importing = ImportParser()
        self._imported: asyncio.Future[ExportedDevice | Refusal] = asyncio.get_running_loop().create_future()
        self._urbs: dict[int, tuple[Submit, Done]] = {}
        self._unlinks: dict[int, tuple[int, int]] = {}
        """The URB of each unlink command without a reply, and its bytes to the device."""
        self._unlinked: set[int] = set()
        """These URBs."""
        self._unlinked_bytes = 0
        self._replies = ReplyParser(self._pending)
        self._number = 0
        self._id = 0
        self._violation: RemoteProtocolError | None = None

    @classmethod
    async def open(cls, address: TcpAddress, busid: str) -> UrbConnection:
        """Connect to a server, and import a device.

        Raises:
            DeviceError: the server cannot be reached, or refuses the device; the reason says why.
        """
        timeouts = Timeouts()
        try:
            sock = await dial(address, timeouts.connect)
        except TargetError as error:
            raise DeviceError(
                f"the USB/IP server of {busid}: {error.message}",
                reason=error.reason,
                remedy="check the address, and that usbipd or 'farplug serve' runs there",
            ) from error
        self = cls(address, busid)
        await start(sock, self._connection, tls=None, server_hostname="", timeout=timeouts.handshake)
        try:
            self._connection.write([encode_request(ImportRequest(busid))])
            async with asyncio.timeout(IMPORT_TIMEOUT):
                imported = await self._imported
            if isinstance(imported, Refusal):
                raise _refused(address, busid, imported)
        except TimeoutError:
            await self.close()
            raise DeviceError(
                f"the USB/IP server at {address} did not answer within {IMPORT_TIMEOUT:g} s", reason=Reason.TIMED_OUT
            ) from None
        except RemoteProtocolError as error:
            await self.close()
            raise DeviceError(f"{address}: {error}", reason=Reason.PROTOCOL) from error
        except BaseException:
            await self.close()
            raise
        self.device = imported
        self._id = imported.bus << 16 | imported.address
        return self

    @property
    def is_open(self) -> bool:
        """Return whether URBs can be sent."""
        return self._connection.is_open

    def submit(self, urb: Submit, done: Done) -> int:
        """Send an URB, whose number and device are set here; return its number."""
        number = self._next_number()
        urb.number, urb.device = number, self._id
        if not self._connection.is_open:
            done(Submitted(number, -Errno.ESHUTDOWN, 0))
            return number
        self._urbs[number] = urb, done
        self._connection.write(urb.encode())
        urb.data = b""
        return number

    def unlink(self, number: int) -> None:
        """Cancel an URB; its ``done`` is called with the reply. One that has ended is ignored.

        The connection ends if the server leaves too many of these commands without a reply.
        """
        if number not in self._urbs or number in self._unlinked or not self._connection.is_open:
            return
        urb, _ = self._urbs[number]
        size = 0 if urb.endpoint & 0x80 else urb.length
        if len(self._unlinks) >= MAX_UNLINKS or self._unlinked_bytes + size > MAX_UNLINKED_BYTES:
            self._violation = RemoteProtocolError("the USB/IP server does not answer when transfers are cancelled")
            self._connection.abort()
            return
        command = self._next_number()
        self._unlinks[command] = number, size
        self._unlinked.add(number)
        self._unlinked_bytes += size
        self._connection.write(Unlink(command, self._id, number).encode())

    async def control(self, setup: Setup, data: bytes = b"") -> tuple[Status, bytes]:
        """Send a control transfer; return its status and the data that arrived."""
        reply: asyncio.Future[Submitted] = asyncio.get_running_loop().create_future()
        urb = Submit(0, 0, setup.direction, setup.length, data, bytes(setup))
        number = self.submit(urb, lambda done: None if reply.done() else reply.set_result(done))
        try:
            submitted = await reply
        except BaseException:
            self.unlink(number)
            raise
        return status_of(submitted.status), bytes(submitted.data)

    async def close(self) -> None:
        """Close the connection at once: the server gives the device to others."""
        self.on_lost = _ignore
        self._connection.abort()
        self._end_all()
        await self._connection.close(CLOSE_TIMEOUT)

    def _next_number(self) -> int:
        while True:
            self._number = self._number % 0xFFFFFFFF + 1
            if self._number not in self._urbs and self._number not in self._unlinks:
                return self._number

    def _pending(self, number: int) -> Submit | None:
        found = self._urbs.get(number)
        return None if found is None else found[0]

    def _end_all(self) -> None:
        urbs, self._urbs = self._urbs, {}
        self._unlinks.clear()
        self._unlinked.clear()
        self._unlinked_bytes = 0
        for number, (_, done) in urbs.items():
            done(Submitted(number, -Errno.ESHUTDOWN, 0))

    # The connection

    def data_received(self, data: memoryview) -> None:
        """Handle bytes of the server."""
        try:
            if self._imported.done():
                self._replies.receive_data(data)
            else:
                self._importing.receive_data(data)
                imported = self._importing.next_message()
                if imported is None:
                    return
                self._imported.set_result(imported)
                self._replies.receive_data(self._importing.rest())
            while (message := self._replies.next_message()) is not None:
                self._handle(message)
        except RemoteProtocolError as error:
            if not self._imported.done():
                self._imported.set_exception(error)
            self._violation = error
            self._connection.abort()

    def _handle(self, message: Submitted | Unlinked) -> None:
        if isinstance(message, Submitted):
            _, done = self._urbs.pop(message.number)
            done(message)
            return
        unlinked = self._unlinks.pop(message.number, None)
        if unlinked is None:
            return
        number, size = unlinked
        self._unlinked.discard(number)
        self._unlinked_bytes -= size
        if (found := self._urbs.pop(number, None)) is not None:
            found[1](Submitted(number, -Errno.ECONNRESET, 0))

    def pause_writing(self) -> None:
        """Do nothing: the engine bounds what its guest may have pending."""

    def resume_writing(self) -> None:
        """Do nothing."""

    def _lost(self, error: Exception | None) -> None:
        if not self._imported.done():
            self._imported.set_exception(
                DeviceError(
                    f"the USB/IP server at {self._address} closed the connection",
                    reason=Reason.DEVICE_LOST,
                    remedy="check that this is the address of a USB/IP server",
                )
            )
        self._end_all()
        self.on_lost(self._violation or error)


def _ignore(error: Exception | None) -> None:
    """Do nothing: the connection has no user."""


def _refused(address: TcpAddress, busid: str, refusal: Refusal) -> FarplugError:
    match refusal:
        case Refusal.BUSY:
            what, reason = "another client uses it", Reason.BUSY
            remedy = "detach it there first"
        case Refusal.NO_DEVICE | Refusal.NOT_AVAILABLE:
            what, reason = "it is not exported, or another client uses it", Reason.NOT_FOUND
            remedy = f"list what is exported: usbip list -r {address.host}; export it there: usbip bind -b {busid}"
        case _:
            what, reason = f"its status is {int(refusal)}", Reason.DEVICE_FAULT
            remedy = "read the log of the USB/IP server"
    return DeviceError(f"the USB/IP server at {address} refused {busid}: {what}", reason=reason, remedy=remedy)
