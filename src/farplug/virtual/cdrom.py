"""A CD-ROM drive: mass storage whose medium, an ISO image, can be changed while the drive is plugged."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
from collections.abc import Sequence
from typing import TypeAlias

from farplug.errors import DeviceError, Reason
from farplug.scsi.cdrom import CdromUnit, check_blocks
from farplug.scsi.inquiry import CDROM_PRODUCT
from farplug.store import ReadDone, Store, WriteDone, open_iso
from farplug.store.base import CompareDone, Stopped, never_stopped
from farplug.usb.device import Device
from farplug.usb.types import Buffer, Speed
from farplug.virtual.device import VirtualDevice
from farplug.virtual.events import MediumEjected, MediumInserted, MediumLocked
from farplug.virtual.storage import MassStorage
from farplug.virtual.storage_transport import StorageTransport
from farplug.virtual.unit import LogicalUnit

Iso: TypeAlias = str | os.PathLike[str] | Store
"""The path of an ISO image; or a store of 2048-byte blocks."""


class _Disc(Store):
    """A medium while it is in the drive. After :meth:`remove` reads fail, also those of running commands."""

    read_only = True
    write_cache = False

    def __init__(self, store: Store) -> None:
        self.name = store.name
        self.block_count = store.block_count
        self.block_size = store.block_size
        self.serial_number = store.serial_number
        self._store = store
        self._removed = False

    def remove(self) -> None:
        self._removed = True

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        if self._removed:
            done(b"", OSError(errno.ENXIO, "the medium was ejected"))
        else:
            self._store.read(offset, length, done)

    def verify(self, offset: int, length: int, done: WriteDone) -> None:
        if self._removed:
            done(OSError(errno.ENXIO, "the medium was ejected"))
        else:
            self._store.verify(offset, length, done)

    def compare(self, offset: int, data: Buffer, done: CompareDone) -> None:
        if self._removed:
            done(False, OSError(errno.ENXIO, "the medium was ejected"))
        else:
            self._store.compare(offset, data, done)

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        done(OSError(errno.EROFS, "a CD is read-only"))

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool, stopped: Stopped = never_stopped) -> None:
        self.write(offset, b"", done)

    def flush(self, done: WriteDone) -> None:
        done(None)

    async def close(self) -> None:
        await self._store.close()


class CdromDrive(LogicalUnit):
    """A logical unit with a removable medium. The drive owns a medium from its insertion, and closes it on ejection.

    Args:
        iso: the first medium; None for an empty drive.
        serial_number: of the drive: upper-case hex digits. Empty: that of the first medium, or a random one.
        luns: the number of logical units of the device.

    Raises:
        ImageError: the image cannot be used, or is not an image of a CD.
        ValueError: the store does not have blocks of 2048 bytes.
    """

    def __init__(self, iso: Iso | None = None, *, serial_number: str = "", luns: int = 1) -> None:
        disc = None if iso is None else _disc(iso)
        self.serial_number = serial_number or (secrets.token_hex(8).upper() if disc is None else disc.serial_number)
        self._scsi = CdromUnit(
            disc,
            serial_number=self.serial_number,
            luns=luns,
            ejected=self._ejected_by_guest,
            prevented=lambda locked: self.report(MediumLocked(locked, lun=self.number)),
        )
        super().__init__(self._scsi, disc)
        self.queues = False  # a CD-ROM has one reader
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def _disc(self) -> _Disc | None:
        assert self.store is None or isinstance(self.store, _Disc)
        return self.store

    @property
    def medium(self) -> str | None:
        """Return the name of the medium, a path; None if the drive is empty."""
        return None if self._disc is None else self._disc.name

    @property
    def locked(self) -> bool:
        """Return whether the guest has locked the medium."""
        return self._scsi.locked

    async def insert(self, iso: Iso, *, force: bool = False) -> None:
        """Insert a medium. The previous medium is ejected.

        Args:
            iso: the new medium.
            force: eject the previous medium although the guest has locked it, and accept an image without a CD volume.

        Raises:
            ImageError: the image cannot be used, or is not an image of a CD. Nothing has changed.
            DeviceError: MEDIUM_LOCKED: the guest has locked the previous medium.
            ValueError: the store does not have blocks of 2048 bytes.
        """
        disc = _disc(iso, force=force)
        try:
            ejected = self._eject(force=force)
        except DeviceError:
            if not isinstance(iso, Store):
                await disc.close()
            raise
        self._scsi.insert(disc)
        self.store = disc
        self.report(MediumInserted(disc.name, lun=self.number))
        if ejected is not None:
            await ejected.close()

    async def eject(self, *, force: bool = False) -> None:
        """Eject the medium, if there is one, and close it.

        Args:
            force: eject the medium although the guest has locked it: reads of a mounted file system then fail.

        Raises:
            DeviceError: MEDIUM_LOCKED: the guest has locked the medium. The guest has received an eject request.
        """
        ejected = self._eject(force=force)
        if ejected is not None:
            await ejected.close()

    def _eject(self, *, force: bool) -> _Disc | None:
        disc = self._disc
        if disc is None:
            return None
        if not self._scsi.eject(force=force):
            raise DeviceError(
                f"{disc.name} is locked by the guest",
                reason=Reason.MEDIUM_LOCKED,
                remedy="unmount it in the guest, or eject it by force: reads of the guest then fail",
            )
        self._take_out(disc, by_guest=False)
        return disc

    async def close(self) -> None:
        """Close the medium, and wait until ejected media are closed."""
        await super().close()
        await asyncio.gather(*self._closing)

    def take_out(self, why: str) -> None:
        """Eject the medium, if there is one, also if the guest has locked it: it cannot be read any more.

        Args:
            why: for people.
        """
        disc = self._disc
        if disc is not None:
            self._scsi.eject(force=True)
            self._take_out(disc, by_guest=False, why=why)
            self._close_later(disc)

    def _ejected_by_guest(self) -> None:
        assert self._disc is not None
        disc = self._disc
        self._take_out(disc, by_guest=True)
        self._close_later(disc)

    def _close_later(self, disc: _Disc) -> None:
        closing = asyncio.ensure_future(disc.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _take_out(self, disc: _Disc, *, by_guest: bool, why: str = "") -> None:
        disc.remove()
        self.store = None
        self.report(MediumEjected(disc.name, by_guest, why, lun=self.number))


def _disc(iso: Iso, *, force: bool = False) -> _Disc:
    store = iso if isinstance(iso, Store) else open_iso(iso, force=force)
    check_blocks(store)
    return _Disc(store)


def drives_of(device: Device) -> Sequence[CdromDrive]:
    """Return the drives of a device, in the order of its logical units."""
    functions = device.functions if isinstance(device, VirtualDevice) else ()
    storage = [function for function in functions if isinstance(function, MassStorage)]
    return [unit for function in storage for unit in function.units if isinstance(unit, CdromDrive)]


def cdrom_device(
    iso: Iso | None = None,
    *,
    serial_number: str = "",
    speeds: Sequence[Speed] = (Speed.SUPER, Speed.HIGH),
    transport: StorageTransport = StorageTransport.AUTO,
) -> VirtualDevice:
    """Make a USB CD-ROM drive with an ISO image in it.

    Args:
        iso: the path of an ISO image, which is opened and locked; or a store. None for an empty drive.
        serial_number: 12 or more upper-case hex digits. Empty: that of the image, or a random one.
        speeds: the speeds that the drive can run at, the best first.
        transport: the USB transports that the drive offers.

    Returns:
        The device; :func:`drives_of` returns its drive, which changes the medium. Call ``dispose()`` when the device
        is no longer needed.

    Raises:
        ImageError: the image cannot be used, or is not an image of a CD.
        ValueError: the store does not have blocks of 2048 bytes.
    """
    drive = CdromDrive(iso, serial_number=serial_number)
    function = MassStorage(drive, transport=transport)
    return VirtualDevice(function, product=CDROM_PRODUCT, serial_number=drive.serial_number, speeds=speeds)
