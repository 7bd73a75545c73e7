"""A disk: a mass storage function over a store."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence

from farplug.errors import DeviceError, Reason
from farplug.scsi.disk import DiskUnit
from farplug.scsi.inquiry import PRODUCT
from farplug.scsi.sense import RESET_OCCURRED
from farplug.store import BLOCK_SIZE, FileStore, Store
from farplug.usb.descriptors import EndpointDescriptor, InterfaceDescriptor, SuperSpeedCompanion
from farplug.usb.transfer import Transfer
from farplug.usb.types import Setup, Speed, TransferType
from farplug.virtual.bot import BulkOnly
from farplug.virtual.device import VirtualDevice
from farplug.virtual.function import Function, FunctionHost

MASS_STORAGE = 0x08
TRANSPARENT_SCSI = 0x06
BULK_ONLY = 0x50

BULK_IN = 0x81
BULK_OUT = 0x02

REFRESH_INTERVAL = 1.0
"""Seconds between two looks at the size of the store."""

_BULK_SIZES = {Speed.FULL: 64, Speed.HIGH: 512, Speed.SUPER: 1024}
_GET_MAX_LUN = Setup(0xA1, 0xFE, 0, 0, 1)
_BULK_ONLY_RESET = Setup(0x21, 0xFF, 0, 0, 0)


class Disk(Function):
    """A disk that the guest reaches over Bulk-Only Transport (USB Mass Storage Class, Bulk-Only Transport 1.0).

    The store belongs to the disk from now on. Each :meth:`close` makes durable what was written, so that the disk can
    be plugged again; :meth:`dispose` closes the store for good.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._unit = DiskUnit(store)
        self._refreshing: asyncio.TimerHandle | None = None
        self._transport = BulkOnly(store, self._unit, BULK_IN, BULK_OUT)

    def interfaces(self, speed: Speed) -> Sequence[InterfaceDescriptor]:
        companion = SuperSpeedCompanion(max_burst=15) if speed >= Speed.SUPER else None
        endpoints = tuple(
            EndpointDescriptor(address, TransferType.BULK, _BULK_SIZES[speed], companion=companion)
            for address in (BULK_IN, BULK_OUT)
        )
        return (InterfaceDescriptor(0, 0, MASS_STORAGE, TRANSPARENT_SCSI, BULK_ONLY, endpoints),)

    def bind(self, host: FunctionHost) -> None:
        self._transport.bind(host)

    def control(self, transfer: Transfer) -> bool:
        setup = transfer.setup
        if setup == _GET_MAX_LUN:
            transfer.complete(reply=b"\0")
        elif setup == _BULK_ONLY_RESET:
            self._transport.bulk_only_reset()
            transfer.complete()
        else:
            return False
        return True

    def submit(self, transfer: Transfer) -> None:
        self._transport.submit(transfer)

    def cancel(self, transfer: Transfer) -> None:
        self._transport.cancel(transfer)

    def halt_cleared(self, endpoint: int) -> None:
        self._transport.halt_cleared(endpoint)

    def reset(self, *, port_reset: bool) -> None:
        self._transport.reset()
        if port_reset:
            self._unit.attend(RESET_OCCURRED)

    @property
    def figures(self) -> Mapping[str, int]:
        return {
            "commands": self._transport.commands,
            "read": self._transport.bytes_read,
            "written": self._transport.bytes_written,
        }

    async def open(self) -> None:
        self._refresh()

    def _refresh(self) -> None:
        """Again and again while the disk is plugged: the unit reports a new size to the guest."""
        self._refreshing = asyncio.get_running_loop().call_later(REFRESH_INTERVAL, self._refresh)
        self.store.refresh()

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
        flushed: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()

        def done(error: OSError | None) -> None:
            if not flushed.done():  # nobody waits any more
                flushed.set_result(error)

        self.store.flush(done)
        error = await flushed or self._transport.unreported
        self._transport.unreported = None
        if error is not None:
            what = error.strerror or error
            raise DeviceError(f"{self.store.name}: what was written may be lost: {what}", reason=Reason.IO_ERROR)

    async def dispose(self) -> None:
        await self.store.close()


def disk_device(
    image: str | os.PathLike[str] | Store,
    *,
    read_only: bool = False,
    block_size: int = BLOCK_SIZE,
    speeds: Sequence[Speed] = (Speed.SUPER, Speed.HIGH),
) -> VirtualDevice:
    """Make a USB disk of an image.

    Args:
        image: the path of a RAW image or a block device, which is opened and locked here; or a store.
        read_only: open the image for reading only. A store says itself whether it is.
        block_size: bytes of a block of the image, 512 or 4096. A store says itself what its blocks have.
        speeds: what the disk may run at, the best first.

    Returns:
        The device. :meth:`~farplug.virtual.device.VirtualDevice.dispose` it when it will not be plugged any more.

    Raises:
        ImageError: the image cannot be used.
    """
    store = image if isinstance(image, Store) else FileStore.open(image, read_only=read_only, block_size=block_size)
    return VirtualDevice(Disk(store), product=PRODUCT, serial_number=store.serial_number, speeds=speeds)
