"""A transfer: one request on one endpoint, completed exactly once with a status and the bytes that moved."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from farplug.errors import DeviceError, Reason
from farplug.usb.types import Buffer, Direction, Setup, TransferType


class Status(IntEnum):
    """How a transfer ended. The numbers are usbredir's (usb-redirection-protocol.md, "Status codes")."""

    SUCCESS = 0
    CANCELLED = 1
    INVALID = 2
    """The request is not valid for this endpoint."""
    IO_ERROR = 3
    STALL = 4
    TIMEOUT = 5
    BABBLE = 6
    """The device sent more than was requested."""

    @classmethod
    def _missing_(cls, value: object) -> Status:
        return cls.IO_ERROR

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


class Transfer:
    """One request on one endpoint (a transfer in libusb, a URB in Linux).

    ``on_complete`` may be called before ``submit`` returns (a disk whose blocks are in the page cache) or much later
    (a keyboard).

    Attributes:
        type: control, bulk, interrupt or isochronous.
        endpoint: bEndpointAddress. For control transfers bit 7 is the direction of the data stage.
        length: IN: the most bytes to receive. OUT: the length of ``data``.
        data: OUT: the payload. IN: empty.
        setup: control transfers only.
        stream_id: bulk streams, 1 and up; 0 for none.
        status: None until completed.
        reply: IN, once completed: the bytes that arrived.
        actual: once completed: the bytes that moved, in either direction.
        holders: how many still use the transfer's memory, see :meth:`hold`.
    """

    __slots__ = (
        "actual",
        "data",
        "endpoint",
        "holders",
        "length",
        "on_complete",
        "reply",
        "setup",
        "status",
        "stream_id",
        "type",
    )

    def __init__(
        self,
        type: TransferType,
        endpoint: int,
        on_complete: Callable[[Transfer], None],
        *,
        length: int = 0,
        data: Buffer = b"",
        setup: Setup | None = None,
        stream_id: int = 0,
    ) -> None:
        self.type = type
        self.endpoint = endpoint
        self.on_complete = on_complete
        self.length = length if endpoint & 0x80 else len(data)
        self.data = data
        self.setup = setup
        self.stream_id = stream_id
        self.status: Status | None = None
        self.reply: Buffer = b""
        self.actual = 0
        self.holders = 0

    def hold(self) -> None:
        """Note that the memory of the transfer is in use until :meth:`release`, perhaps beyond its completion.

        A device calls this before it passes the transfer's data, or a buffer for it, to a thread.
        """
        self.holders += 1

    def release(self) -> None:
        """End a :meth:`hold`."""
        self.holders -= 1

    @property
    def direction(self) -> Direction:
        """Return the direction, as the host sees it."""
        return Direction(self.endpoint & 0x80)

    def complete(self, status: Status = Status.SUCCESS, reply: Buffer = b"", *, actual: int | None = None) -> None:
        """End the transfer. Called by the device, exactly once.

        Args:
            status: how the transfer ended.
            reply: IN: the bytes that arrived, on success or not. More than ``length`` becomes a babble.
            actual: OUT: the bytes that moved; if not given, all of them on success, otherwise none.

        Raises:
            DeviceError: the transfer is already completed (``DEVICE_FAULT``). It does not change.
        """
        if self.status is not None:
            raise DeviceError(f"{self} was completed twice", reason=Reason.DEVICE_FAULT)
        if self.endpoint & 0x80:
            if len(reply) > self.length:
                status, reply = Status.BABBLE, memoryview(reply)[: self.length]
            self.reply = reply
            self.actual = len(reply)
        elif actual is not None:
            self.actual = max(0, min(actual, self.length))
        elif status is Status.SUCCESS:
            self.actual = self.length
        self.status = status
        self.on_complete(self)

    def __str__(self) -> str:
        text = f"{self.type} transfer on endpoint {self.endpoint:02x}, {self.length} bytes"
        if self.setup is not None:
            text += f", setup {self.setup}"
        if self.stream_id:
            text += f", stream {self.stream_id}"
        return text if self.status is None else f"{text}: {self.status}, {self.actual} bytes"
