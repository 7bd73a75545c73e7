"""A CD-ROM drive: mass storage whose medium, an ISO image, comes and goes while it is plugged."""

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
    """A medium while it is in the drive; afterwards nothing of it can be read, also by commands that are under way."""

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
            done(b"", OSError(errno.ENOMEDIUM, "the medium was ejected"))
        else:
            self._store.read(offset, length, done)

    def write(self, offset: int, data: Buffer, done: WriteDone) -> None:
        done(OSError(errno.EROFS, "a CD is read-only"))

    def zero(self, offset: int, length: int, done: WriteDone, *, unmap: bool) -> None:
        self.write(offset, b"", done)

    def flush(self, done: WriteDone) -> None:
        done(None)

    async def close(self) -> None:
        await self._store.close()


class CdromDrive(LogicalUnit):
    """A logical unit whose medium comes and goes. Media belong to it from their insertion to their ejection, which
    closes them.

    Args:
        iso: the first medium; None: the drive is empty.
        serial_number: of the drive: upper-case hex digits. Empty: that of the first medium, or a random one.
        luns: how many logical units the device has.

    Raises:
        ImageError: the image cannot be used, or is none of a CD.
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
        """The name of what is in it: a path. None: nothing."""
        return None if self._disc is None else self._disc.name

    @property
    def locked(self) -> bool:
        """The guest prevents that the medium is taken out."""
        return self._scsi.locked

    async def insert(self, iso: Iso, *, force: bool = False) -> None:
        """Put a medium in, in place of the one that is there.

        Args:
            iso: what.
            force: eject the other one although the guest has locked it, and take an image that has no volume of a CD.

        Raises:
            ImageError: the image cannot be used, or is none of a CD. Nothing has changed.
            DeviceError: MEDIUM_LOCKED: the guest has locked the other one.
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
        """Take the medium out, if there is one, and close it.

        Args:
            force: although the guest has locked it: what it has mounted fails from now on.

        Raises:
            DeviceError: MEDIUM_LOCKED: the guest has locked it, and now knows that somebody wants it.
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
                remedy="unmount it in the guest, or eject it by force: then the guest's reads of it fail",
            )
        self._take_out(disc, by_guest=False)
        return disc

    async def close(self) -> None:
        """Close the medium, and wait until what was ejected is closed."""
        await super().close()
        await asyncio.gather(*self._closing)

    def _ejected_by_guest(self) -> None:
        assert self._disc is not None
        disc = self._disc
        self._take_out(disc, by_guest=True)
        closing = asyncio.ensure_future(disc.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def _take_out(self, disc: _Disc, *, by_guest: bool) -> None:
        disc.remove()
        self.store = None
        self.report(MediumEjected(disc.name, by_guest, lun=self.number))


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
        iso: the path of an ISO image, which is opened and locked here; or a store. None: the drive is empty.
        serial_number: 12 or more upper-case hex digits. Empty: that of the image, or a random one.
        speeds: what the drive may run at, the best first.
        transport: how the guest may talk to it.

    Returns:
        The device; :func:`drives_of` gives what changes the medium. ``dispose()`` it when it will not be plugged any
        more.

    Raises:
        ImageError: the image cannot be used, or is none of a CD.
        ValueError: the store does not have blocks of 2048 bytes.
    """
    drive = CdromDrive(iso, serial_number=serial_number)
    function = MassStorage(drive, transport=transport)
    return VirtualDevice(function, product=CDROM_PRODUCT, serial_number=drive.serial_number, speeds=speeds)
