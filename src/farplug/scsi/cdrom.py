"""A CD-ROM drive as a SCSI logical unit: a multimedia device with a removable medium (SPC-4, MMC-3)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import TypeAlias

from farplug.errors import StateError
from farplug.scsi.cdb import Action, Command, CommandTable, Done, Fail, Read, Respond, Verify, extent
from farplug.scsi.inquiry import CDROM_PRODUCT, MULTIMEDIA, identity_pages, standard_inquiry, vital_product_data
from farplug.scsi.medium import MAX_TRANSFER_BLOCKS, Medium
from farplug.scsi.mmc import (
    CD_BLOCK_SIZE,
    Profile,
    configuration,
    disc_information,
    dvd_structure,
    raw_toc,
    sessions,
    toc,
    track_information,
)
from farplug.scsi.modes import cdrom_capabilities, cdrom_modes
from farplug.scsi.sense import (
    ILLEGAL_MODE_FOR_THIS_TRACK,
    INCOMPATIBLE_FORMAT,
    INVALID_FIELD_IN_CDB,
    LBA_OUT_OF_RANGE,
    MEDIUM_MAY_HAVE_CHANGED,
    MEDIUM_NOT_PRESENT_TRAY_CLOSED,
    MEDIUM_NOT_PRESENT_TRAY_OPEN,
    REMOVAL_PREVENTED,
    Sense,
)
from farplug.scsi.unit import COMMON_COMMANDS, Unit
from farplug.usb.types import Buffer

_START, _LOEJ, _POWER_CONDITION = 0x01, 0x02, 0xF0
"""Bits of byte 4 of START STOP UNIT."""

_MSF = 0x02
"""Bit of byte 1 of READ TOC."""

_MEDIA_CLASS = 4
_NO_EVENT_AVAILABLE = 0x80
_DOOR_OPEN, _MEDIA_PRESENT = 0x01, 0x02
"""Fields of GET EVENT STATUS NOTIFICATION (MMC-3, chapter 6.7)."""

_USER_DATA = 0x10
"""Byte 9 of READ CD: only the 2048 bytes of user data, without header and error correction."""


class _Event(IntEnum):
    """Media events (MMC-3, table 229)."""

    NO_CHANGE = 0
    EJECT_REQUEST = 1
    NEW_MEDIA = 2
    MEDIA_REMOVAL = 3


class CdromUnit(Unit):
    """A drive with a tray.

    The guest (START STOP UNIT) or :meth:`eject` ejects the medium, and the tray is then open. :meth:`insert` closes the
    tray, and so does the guest, without a medium. While the guest prevents the removal of the medium, only a forced
    :meth:`eject` ejects it.

    Args:
        medium: the first medium, of 2048-byte blocks; its size is read once. None: the tray is closed and empty.
        serial_number: of the drive, in ASCII.
        luns: the number of logical units of the device.
        ejected: called when the guest has ejected the medium.
        prevented: called with True when the guest prevents the removal of the medium, and with False when it allows it.

    Raises:
        ValueError: the medium does not have blocks of 2048 bytes.
    """

    bypasses_unit_attention = Unit.bypasses_unit_attention | {0x46, 0x4A}
    """GET CONFIGURATION and GET EVENT STATUS NOTIFICATION too (MMC-3, chapter 4.1.6)."""

    def __init__(
        self,
        medium: Medium | None,
        *,
        serial_number: str,
        luns: int = 1,
        ejected: Callable[[], None] = lambda: None,
        prevented: Callable[[bool], None] = lambda _: None,
    ) -> None:
        super().__init__(COMMANDS, cdrom_modes(), luns)
        self._serial_number = serial_number
        self._ejected = ejected
        self._prevented = prevented
        self._block_count: int | None = None
        self._tray_open = False
        self._locked = False
        self._event = _Event.NO_CHANGE
        if medium is not None:
            self._load(medium)

    @property
    def loaded(self) -> bool:
        """Return whether the drive has a medium."""
        return self._block_count is not None

    @property
    def locked(self) -> bool:
        """Return whether the guest prevents the removal of the medium."""
        return self._locked

    def insert(self, medium: Medium) -> None:
        """Insert a medium of 2048-byte blocks and close the tray.

        Raises:
            StateError: the drive has a medium.
            ValueError: the medium does not have blocks of 2048 bytes.
        """
        if self.loaded:
            raise StateError("the drive has a medium: eject it first")
        self._load(medium)
        self._event = _Event.NEW_MEDIA
        self.raise_unit_attention(MEDIUM_MAY_HAVE_CHANGED)

    def eject(self, *, force: bool = False) -> bool:
        """Eject the medium, if there is one.

        Returns:
            False if the guest prevents the removal and ``force`` is false: the guest receives an eject request.
        """
        if not self.loaded:
            return True
        if self._locked and not force:
            self._event = _Event.EJECT_REQUEST
            return False
        self._lock(False)
        self._open_tray()
        self.raise_unit_attention(MEDIUM_MAY_HAVE_CHANGED)
        return True

    def reset(self) -> None:
        super().reset()
        self._lock(False)

    def _load(self, medium: Medium) -> None:
        check_blocks(medium)
        self._block_count = medium.block_count
        self._tray_open = False

    def _open_tray(self) -> None:
        if self.loaded:
            self._event = _Event.MEDIA_REMOVAL
        self._block_count = None
        self._tray_open = True

    def _lock(self, locked: bool) -> None:
        if locked is not self._locked:
            self._locked = locked
            self._modes.replace(cdrom_capabilities(locked=locked))
            self._prevented(locked)

    def _not_ready(self) -> Sense:
        return MEDIUM_NOT_PRESENT_TRAY_OPEN if self._tray_open else MEDIUM_NOT_PRESENT_TRAY_CLOSED

    # Identity

    def _inquiry_data(self) -> bytes:
        return standard_inquiry(MULTIMEDIA, product=CDROM_PRODUCT, removable=True)

    def _vital_product_data(self, page: int) -> bytes | None:
        return vital_product_data(MULTIMEDIA, identity_pages(CDROM_PRODUCT, self._serial_number), page)

    def _device_specific_parameter(self) -> int:
        return 0x00

    def _get_configuration(self, cdb: Buffer) -> Action:
        requested, first, allocation = cdb[1] & 0x03, int.from_bytes(cdb[2:4]), int.from_bytes(cdb[7:9])
        if requested == 3:
            return Fail(INVALID_FIELD_IN_CDB)
        data = configuration(Profile.of(self._block_count), first, current=requested == 1, single=requested == 2)
        return Respond(data[:allocation])

    # The tray

    def _start_stop_unit(self, cdb: Buffer) -> Action:
        if cdb[4] & _POWER_CONDITION or not cdb[4] & _LOEJ:
            return Done()
        if cdb[4] & _START:
            self._tray_open = False
        elif self._locked:
            return Fail(REMOVAL_PREVENTED)
        else:
            loaded = self.loaded
            self._open_tray()
            if loaded:
                self._ejected()
        return Done()

    def _prevent_allow(self, cdb: Buffer) -> Action:
        self._lock(bool(cdb[4] & 0x01))
        return Done()

    def _event_status(self, cdb: Buffer) -> Action:
        polled, classes, allocation = cdb[1] & 0x01, cdb[4], int.from_bytes(cdb[7:9])
        if not polled:
            return Fail(INVALID_FIELD_IN_CDB)
        supported = 1 << _MEDIA_CLASS
        if not classes & supported:
            return Respond(struct.pack(">HBB", 2, _NO_EVENT_AVAILABLE, supported)[:allocation])
        status = _DOOR_OPEN if self._tray_open else _MEDIA_PRESENT if self.loaded else 0
        data = struct.pack(">HBBBBxx", 6, _MEDIA_CLASS, supported, self._event, status)
        if allocation > 4:  # otherwise the event was not reported
            self._event = _Event.NO_CHANGE
        return Respond(data[:allocation])

    def _mechanism_status(self, cdb: Buffer) -> Action:
        data = struct.pack(">BB3xBxx", 0, 0x10 if self._tray_open else 0, 1)
        return Respond(data[: int.from_bytes(cdb[8:10])])

    # The medium: the handlers take its size

    def _test_unit_ready(self, cdb: Buffer, block_count: int) -> Action:
        return Done()

    def _capacity(self, cdb: Buffer, block_count: int) -> Action:
        return Respond(struct.pack(">II", block_count - 1, CD_BLOCK_SIZE))

    def _read_toc(self, cdb: Buffer, block_count: int) -> Action:
        # SFF-8020i has the format in the last byte; macOS uses it.
        form, msf, track = cdb[2] & 0x0F or cdb[9] >> 6, bool(cdb[1] & _MSF), cdb[6]
        data = None
        if form == 0:
            data = toc(block_count, track, msf=msf)
        elif form == 1:
            data = sessions(msf=msf)
        elif form == 2 and track <= 1:  # there is one session
            data = raw_toc(block_count)
        return Fail(INVALID_FIELD_IN_CDB) if data is None else Respond(data[: int.from_bytes(cdb[7:9])])

    def _disc_information(self, cdb: Buffer, block_count: int) -> Action:
        if cdb[1] & 0x07:
            return Fail(INVALID_FIELD_IN_CDB)
        return Respond(disc_information()[: int.from_bytes(cdb[7:9])])

    def _track_information(self, cdb: Buffer, block_count: int) -> Action:
        kind, number = cdb[1] & 0x03, int.from_bytes(cdb[2:6])
        if cdb[1] & 0x04 or not (number < block_count if kind == 0 else kind < 3 and number == 1):
            return Fail(INVALID_FIELD_IN_CDB)
        return Respond(track_information(block_count)[: int.from_bytes(cdb[7:9])])

    def _disc_structure(self, cdb: Buffer, block_count: int) -> Action:
        if Profile.of(block_count) is not Profile.DVD_ROM:
            return Fail(INCOMPATIBLE_FORMAT)
        data = None if cdb[1] & 0x0F or cdb[6] else dvd_structure(block_count, cdb[7])
        return Fail(INVALID_FIELD_IN_CDB) if data is None else Respond(data[: int.from_bytes(cdb[8:10])])

    def _seek(self, cdb: Buffer, block_count: int) -> Action:
        return _refuse(int.from_bytes(cdb[2:6]), 1, block_count) or Done()

    def _read(self, cdb: Buffer, block_count: int) -> Action:
        lba, count, _ = extent(cdb)
        return _refuse(lba, count, block_count) or (Read(lba, count) if count else Done())

    def _verify(self, cdb: Buffer, block_count: int) -> Action:
        lba, count, _ = extent(cdb)
        return _refuse(lba, count, block_count) or (Verify(lba, count) if count else Done())

    def _read_cd(self, cdb: Buffer, block_count: int) -> Action:
        lba, count = int.from_bytes(cdb[2:6]), int.from_bytes(cdb[6:9])
        if cdb[1] >> 2 & 0x07 not in (0, 2):  # any type, mode 1
            return Fail(ILLEGAL_MODE_FOR_THIS_TRACK)
        if cdb[9] not in (0, _USER_DATA) or cdb[10]:
            return Fail(INVALID_FIELD_IN_CDB)
        return _refuse(lba, count, block_count) or (Read(lba, count) if count and cdb[9] else Done())


def check_blocks(medium: Medium) -> None:
    """Check that a drive can read the blocks of a medium.

    Raises:
        ValueError: the blocks do not have 2048 bytes.
    """
    if medium.block_size != CD_BLOCK_SIZE:
        raise ValueError(f"a CD has blocks of {CD_BLOCK_SIZE} bytes, not {medium.block_size}")


def _refuse(lba: int, count: int, block_count: int) -> Fail | None:
    """Return why a command on blocks fails, before any data moves, also for zero blocks; None if it is valid."""
    if count > MAX_TRANSFER_BLOCKS:
        return Fail(INVALID_FIELD_IN_CDB)
    return Fail(LBA_OUT_OF_RANGE) if lba + count > block_count else None


_Handler: TypeAlias = Callable[[CdromUnit, Buffer, int], Action]


def _medium(handler: _Handler) -> Callable[[CdromUnit, Buffer], Action]:
    """Make a handler that fails without a medium, and passes the size of the medium."""

    def handle(unit: CdromUnit, cdb: Buffer) -> Action:
        count = unit._block_count
        return Fail(unit._not_ready()) if count is None else handler(unit, cdb, count)

    return handle


_h = bytes.fromhex

COMMANDS: CommandTable[CdromUnit] = CommandTable(
    (
        *COMMON_COMMANDS,
        Command("TEST UNIT READY", _h("00 00 00 00 00 00"), _medium(CdromUnit._test_unit_ready)),
        Command("START STOP UNIT", _h("1b 01 00 0f f7 00"), CdromUnit._start_stop_unit),
        Command("PREVENT ALLOW MEDIUM REMOVAL", _h("1e 00 00 00 03 00"), CdromUnit._prevent_allow),
        Command("READ CAPACITY", _h("25 00 ff ff ff ff 00 00 01 00"), _medium(CdromUnit._capacity)),
        Command("READ(10)", _h("28 18 ff ff ff ff 00 ff ff 00"), _medium(CdromUnit._read)),
        Command("SEEK(10)", _h("2b 00 ff ff ff ff 00 00 00 00"), _medium(CdromUnit._seek)),
        Command("VERIFY(10)", _h("2f 10 ff ff ff ff 00 ff ff 00"), _medium(CdromUnit._verify)),
        Command("READ TOC/PMA/ATIP", _h("43 02 0f 00 00 00 ff ff ff c0"), _medium(CdromUnit._read_toc)),
        Command("GET CONFIGURATION", _h("46 03 ff ff 00 00 00 ff ff 00"), CdromUnit._get_configuration),
        Command("GET EVENT STATUS NOTIFICATION", _h("4a 01 00 00 ff 00 00 ff ff 00"), CdromUnit._event_status),
        Command("READ DISC INFORMATION", _h("51 07 00 00 00 00 00 ff ff 00"), _medium(CdromUnit._disc_information)),
        Command("READ TRACK INFORMATION", _h("52 07 ff ff ff ff 00 ff ff 00"), _medium(CdromUnit._track_information)),
        Command("READ(12)", _h("a8 18 ff ff ff ff ff ff ff ff 80 00"), _medium(CdromUnit._read)),
        Command("READ DISC STRUCTURE", _h("ad 0f ff ff ff ff ff ff ff ff c0 00"), _medium(CdromUnit._disc_structure)),
        Command("MECHANISM STATUS", _h("bd 00 00 00 00 00 00 00 ff ff 00 00"), CdromUnit._mechanism_status),
        Command("READ CD", _h("be 1e ff ff ff ff ff ff ff fe 07 00"), _medium(CdromUnit._read_cd)),
    )
)
"""The commands of a CD-ROM drive. All others end with INVALID COMMAND OPERATION CODE."""
