"""A disk as a SCSI logical unit: a direct-access block device (SPC-4, SBC-3)."""

from __future__ import annotations

import struct

from farplug.scsi.cdb import Action, Command, Done, Fail, Flush, Read, Respond, Write, command_table
from farplug.scsi.sense import (
    INVALID_COMMAND,
    INVALID_FIELD_IN_CDB,
    LBA_OUT_OF_RANGE,
    LOGICAL_UNIT_NOT_SUPPORTED,
    NO_SENSE,
    SAVING_PARAMETERS_NOT_SUPPORTED,
    WRITE_PROTECTED,
    Sense,
)
from farplug.usb.types import Buffer

VENDOR = "farplug"
"""Not "QEMU": for that vendor SeaBIOS asks for the mode page of a disk geometry and does not boot without."""

PRODUCT = "Virtual Disk"
REVISION = "1.0"

_SPC4 = 0x06
_MODE_CACHING = 0x08
_MODE_ALL = 0x3F
_CACHING_PAGE = bytes((_MODE_CACHING, 0x12, 0x04)) + bytes(17)  # 04: WCE, there is a write cache
_WRITE_PROTECTED = 0x80
_DPOFUA = 0x10

_LBA_COUNT_10 = struct.Struct(">xBIxH")


def standard_inquiry(peripheral: int) -> bytes:
    """Build the standard INQUIRY data, 36 bytes (SPC-4, chapter 6.6.2). ``peripheral``: qualifier and device type."""
    names = f"{VENDOR:8}{PRODUCT:16}{REVISION:4}".encode("ascii")
    return bytes((peripheral, 0x00, _SPC4, 0x02, 5 + 26, 0, 0, 0)) + names


class DiskUnit:
    """Turns CDBs into actions. Nothing is read or written here.

    It holds what SCSI keeps between commands: a unit attention, and the sense of the last command for transports that
    do not send it with the status.

    Args:
        block_count: blocks of the medium, 1 at least.
        block_size: bytes.
        read_only: writes end with DATA PROTECT.
    """

    def __init__(self, block_count: int, block_size: int, *, read_only: bool) -> None:
        self.block_count = block_count
        self.block_size = block_size
        self.read_only = read_only
        self._attention: Sense | None = None
        self._sense = NO_SENSE

    def attend(self, sense: Sense) -> None:
        """Raise a unit attention: the next command reports it, once (SPC-4, chapter 5.14)."""
        self._attention = sense

    def keep_sense(self, sense: Sense) -> None:
        """Remember why a command failed until the next command; only for transports that do not send sense."""
        self._sense = sense

    def execute(self, cdb: Buffer) -> Action:
        """Decide what a command does.

        Args:
            cdb: at least one byte; bytes beyond the command's own length are ignored.
        """
        command = COMMANDS.get(cdb[0])
        if self._attention is not None and (command is None or not command.despite_attention):
            sense, self._attention = self._attention, None
            return Fail(sense)
        if command is None:
            action: Action = Fail(INVALID_COMMAND)
        elif len(cdb) < command.length or int.from_bytes(cdb[: command.length]) & command.forbidden:
            action = Fail(INVALID_FIELD_IN_CDB)
        else:
            action = command.handler(self, cdb)
        self._sense = NO_SENSE
        return action

    def _test_unit_ready(self, cdb: Buffer) -> Action:
        return Done()

    def _request_sense(self, cdb: Buffer) -> Action:
        sense = self._sense
        if sense is NO_SENSE and self._attention is not None:
            sense, self._attention = self._attention, None
        return Respond(bytes(sense)[: cdb[4]])

    def _inquiry(self, cdb: Buffer) -> Action:
        if cdb[1] or cdb[2]:  # no vital product data; a page code needs EVPD
            return Fail(INVALID_FIELD_IN_CDB)
        return Respond(standard_inquiry(0x00)[: int.from_bytes(cdb[3:5])])

    def _mode_sense_6(self, cdb: Buffer) -> Action:
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == 3:
            return Fail(SAVING_PARAMETERS_NOT_SUPPORTED)
        if page not in (_MODE_CACHING, _MODE_ALL) or (subpage and (page, subpage) != (_MODE_ALL, 0xFF)):
            return Fail(INVALID_FIELD_IN_CDB)
        caching = _CACHING_PAGE
        if control == 1:  # the mask of what MODE SELECT can change: nothing
            caching = _CACHING_PAGE[:2] + bytes(len(_CACHING_PAGE) - 2)
        parameters = _DPOFUA | (_WRITE_PROTECTED if self.read_only else 0)
        return Respond((bytes((3 + len(caching), 0x00, parameters, 0)) + caching)[: cdb[4]])

    def _start_stop_unit(self, cdb: Buffer) -> Action:
        # Stopping does nothing else: hosts stop a disk when it is ejected and never start it again.
        stops = not cdb[4] & 0x01
        return Flush() if stops else Done()

    def _prevent_allow(self, cdb: Buffer) -> Action:
        return Done()

    def _read_capacity_10(self, cdb: Buffer) -> Action:
        return Respond(struct.pack(">II", min(self.block_count - 1, 0xFFFFFFFF), self.block_size))

    def _read_10(self, cdb: Buffer) -> Action:
        _, lba, count = _LBA_COUNT_10.unpack_from(cdb)
        if lba + count > self.block_count:
            return Fail(LBA_OUT_OF_RANGE)
        return Read(lba, count) if count else Done()

    def _write_10(self, cdb: Buffer) -> Action:
        flags, lba, count = _LBA_COUNT_10.unpack_from(cdb)
        if self.read_only:
            return Fail(WRITE_PROTECTED)
        if lba + count > self.block_count:
            return Fail(LBA_OUT_OF_RANGE)
        return Write(lba, count, bool(flags & 0x08)) if count else Done()

    def _synchronize_cache(self, cdb: Buffer) -> Action:
        return Flush()  # all of it, whatever range was named


def _usage(text: str) -> bytes:
    return bytes.fromhex(text)


COMMANDS = command_table(
    (
        Command("TEST UNIT READY", _usage("00 00 00 00 00 00"), DiskUnit._test_unit_ready),
        Command("REQUEST SENSE", _usage("03 00 00 00 ff 00"), DiskUnit._request_sense, despite_attention=True),
        Command("INQUIRY", _usage("12 01 ff ff ff 00"), DiskUnit._inquiry, despite_attention=True),
        Command("MODE SENSE(6)", _usage("1a 08 ff ff ff 00"), DiskUnit._mode_sense_6),
        Command("START STOP UNIT", _usage("1b 01 00 0f f7 00"), DiskUnit._start_stop_unit),
        Command("PREVENT ALLOW MEDIUM REMOVAL", _usage("1e 00 00 00 03 00"), DiskUnit._prevent_allow),
        Command("READ CAPACITY(10)", _usage("25 00 ff ff ff ff 00 00 01 00"), DiskUnit._read_capacity_10),
        Command("READ(10)", _usage("28 1a ff ff ff ff 3f ff ff 00"), DiskUnit._read_10),
        Command("WRITE(10)", _usage("2a 1a ff ff ff ff 3f ff ff 00"), DiskUnit._write_10),
        Command("SYNCHRONIZE CACHE(10)", _usage("35 06 ff ff ff ff 3f ff ff 00"), DiskUnit._synchronize_cache),
    )
)
"""Every command that a disk knows, by opcode. All others end with INVALID COMMAND OPERATION CODE."""


class AbsentUnit:
    """What answers for a logical unit number that does not exist (SPC-4, chapter 4.5.1 and 6.6.2)."""

    def execute(self, cdb: Buffer) -> Action:
        """INQUIRY says that nothing is there, REQUEST SENSE says why, everything else fails."""
        if len(cdb) >= 6 and cdb[0] == 0x12 and not cdb[1] & 1:
            return Respond(standard_inquiry(0x7F)[: int.from_bytes(cdb[3:5])])
        if len(cdb) >= 6 and cdb[0] == 0x03:
            return Respond(bytes(LOGICAL_UNIT_NOT_SUPPORTED)[: cdb[4]])
        return Fail(LOGICAL_UNIT_NOT_SUPPORTED)
