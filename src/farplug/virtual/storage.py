"""Mass storage: logical units over Bulk-Only Transport or USB Attached SCSI."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from farplug.errors import DeviceError, Reason
from farplug.usb.descriptors import EndpointDescriptor, InterfaceDescriptor
from farplug.usb.endpoints import bulk_endpoint, bulk_packet_size
from farplug.usb.figures import Figures
from farplug.usb.transfer import Transfer
from farplug.usb.types import Speed
from farplug.virtual.bot import BulkOnly
from farplug.virtual.function import Function, FunctionHost, Numbers
from farplug.virtual.storage_transport import StorageTransport
from farplug.virtual.uas import STREAMS_EXPONENT, Uas
from farplug.virtual.unit import LogicalUnit

CLASS_MASS_STORAGE = 0x08
SUBCLASS_SCSI = 0x06
PROTOCOL_BULK_ONLY = 0x50
PROTOCOL_UAS = 0x62

BULK_IN = 0x81
BULK_OUT = 0x02
"""Endpoints of Bulk-Only Transport, and the data pipes of USB Attached SCSI."""
STATUS_PIPE = 0x83
COMMAND_PIPE = 0x04

MAX_UNITS = 16
"""bCBWLUN has four bits."""

REFRESH_INTERVAL = 1.0
"""Seconds between two checks of the size of the stores."""

_MAX_BURST = 15

_PIPES = ((COMMAND_PIPE, 1), (STATUS_PIPE, 2), (BULK_IN, 3), (BULK_OUT, 4))
"""The endpoints of USB Attached SCSI with the pipe ids of their pipe usage descriptors (UAS-2, table 10)."""

_PIPE_USAGE = 0x24


class MassStorage(Function):
    """Up to 16 logical units on one interface.

    The function owns the stores of the units: :meth:`close` makes durable what was written, so that the device can be
    plugged again; :meth:`dispose` closes the stores.

    At Full Speed there is only Bulk-Only Transport.

    Raises:
        ValueError: there is no unit, or more than 16.
    """

    used_at_once = True
    """Every system, and every firmware with a driver, reads the capacity of a disk as soon as it has found the disk."""

    def __init__(self, *units: LogicalUnit, transport: StorageTransport = StorageTransport.AUTO) -> None:
        if not 1 <= len(units) <= MAX_UNITS:
            raise ValueError(f"a mass storage device has 1 to {MAX_UNITS} logical units, not {len(units)}")
        self.units = units
        for number, unit in enumerate(units):
            unit.number = number
        if transport is StorageTransport.AUTO and not any(unit.queues for unit in units):
            transport = StorageTransport.BOT
        self._transport = transport
        self._without_uas = False
        self._bot = BulkOnly(units, BULK_IN, BULK_OUT)
        self._uas = Uas(units, command=COMMAND_PIPE, status=STATUS_PIPE, data_in=BULK_IN, data_out=BULK_OUT)
        self._active: BulkOnly | Uas = self._bot
        self._speed = Speed.HIGH
        self._refreshing: asyncio.TimerHandle | None = None

    def optional(self, speed: Speed) -> str:
        """Return USB Attached SCSI where the device also has Bulk-Only Transport."""
        return "USB Attached SCSI" if self._transport is StorageTransport.AUTO and speed >= Speed.HIGH else ""

    def leave_out(self, optional: bool) -> None:
        self._without_uas = optional

    def _settings(self, speed: Speed) -> Sequence[BulkOnly | Uas]:
        """Return the transport of each alternate setting."""
        if self._transport is StorageTransport.BOT or self._without_uas or speed < Speed.HIGH:
            return (self._bot,)
        return (self._uas,) if self._transport is StorageTransport.UAS else (self._bot, self._uas)

    def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
        return tuple(
            InterfaceDescriptor(
                0, alternate, CLASS_MASS_STORAGE, SUBCLASS_SCSI, PROTOCOL_BULK_ONLY, _bulk_only_endpoints(speed)
            )
            if transport is self._bot
            else InterfaceDescriptor(
                0, alternate, CLASS_MASS_STORAGE, SUBCLASS_SCSI, PROTOCOL_UAS, _uas_endpoints(speed)
            )
            for alternate, transport in enumerate(self._settings(speed))
        )

    def bind(self, host: FunctionHost) -> None:
        self._bot.bind(host)
        for unit in self.units:
            unit.report = host.report

    def configured(self, speed: Speed) -> None:
        self._speed = speed
        self._start(0)

    def set_alternate(self, interface: int, alternate: int) -> None:
        self._active.reset()
        self._start(alternate)

    def _start(self, alternate: int) -> None:
        self._active = self._settings(self._speed)[alternate]
        if self._active is self._uas:
            self._uas.start(bulk_packet_size(self._speed), streams=self._speed >= Speed.SUPER)

    def control(self, transfer: Transfer) -> bool:
        return self._active is self._bot and self._bot.control(transfer)

    def submit(self, transfer: Transfer) -> None:
        self._active.submit(transfer)

    def cancel(self, transfer: Transfer) -> None:
        self._active.cancel(transfer)

    def halt_cleared(self, endpoint: int) -> None:
        if self._active is self._bot:
            self._bot.halt_cleared(endpoint)

    def reset(self, *, port_reset: bool) -> None:
        self._active.reset()
        if port_reset:
            for unit in self.units:
                unit.scsi.reset()

    @property
    def figures(self) -> Figures:
        return Figures(
            read=sum(unit.bytes_read for unit in self.units),
            written=sum(unit.bytes_written for unit in self.units),
            commands=sum(unit.commands for unit in self.units),
            errors=sum(unit.errors for unit in self.units),
        )

    async def open(self) -> None:
        for unit in self.units:
            unit.use(self.share)
        self._bot.share = self._uas.share = self.share
        self._refresh()

    def _refresh(self) -> None:
        """Check the sizes of the stores again and again while the device is plugged: units report new sizes."""
        self._refreshing = asyncio.get_running_loop().call_later(REFRESH_INTERVAL, self._refresh)
        for unit in self.units:
            if unit.store is not None:
                unit.store.refresh()

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
        for unit in self.units:
            unit.scsi.reset()  # the medium must not stay locked
            unit.unflushed.forget()
        failed = [error for unit in self.units if (error := await _make_durable(unit)) is not None]
        if failed:
            raise failed[0]

    async def dispose(self) -> None:
        for unit in self.units:
            await unit.close()


async def _make_durable(unit: LogicalUnit) -> DeviceError | None:
    """Flush a unit. Returns the error of the flush, or the deferred error of an earlier job."""
    if unit.store is None:
        return None
    flushed: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()

    def done(error: OSError | None) -> None:
        if not flushed.done():  # it is done if the caller was cancelled
            flushed.set_result(error)

    unit.store.flush(done)
    error = await flushed or unit.deferred_error
    unit.deferred_error = None
    if error is None:
        return None
    what = error.strerror or error
    return DeviceError(f"{unit.name}: what was written may be lost: {what}", reason=Reason.IO_ERROR)


def _bulk_only_endpoints(speed: Speed) -> tuple[EndpointDescriptor, ...]:
    return tuple(bulk_endpoint(address, speed, max_burst=_MAX_BURST) for address in (BULK_IN, BULK_OUT))


def _uas_endpoints(speed: Speed) -> tuple[EndpointDescriptor, ...]:
    """Return the pipes: all but the command pipe have streams (UASP, chapter 3.3)."""
    return tuple(
        bulk_endpoint(
            address,
            speed,
            max_burst=_MAX_BURST,
            streams_exponent=0 if address == COMMAND_PIPE else STREAMS_EXPONENT,
            extra=bytes((4, _PIPE_USAGE, pipe, 0)),
        )
        for address, pipe in _PIPES
    )
