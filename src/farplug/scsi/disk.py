"""A disk as a SCSI logical unit: a direct-access block device (SPC-4, SBC-3)."""

from __future__ import annotations

import struct
from functools import partial

from farplug.scsi.cdb import (
    DESPITE_ATTENTION,
    Action,
    Command,
    CommandTable,
    Compare,
    Done,
    Fail,
    Fill,
    Flush,
    Outcome,
    Read,
    Receive,
    Respond,
    Verify,
    Write,
    Zero,
    cdb_length,
    extent,
)
from farplug.scsi.inquiry import standard_inquiry, vital_product_data
from farplug.scsi.medium import (
    MAX_TRANSFER_BLOCKS,
    MAX_UNMAP_BLOCKS,
    MAX_UNMAP_EXTENTS,
    MAX_WRITE_SAME_BLOCKS,
    Medium,
    blocks_per_physical_block,
)
from farplug.scsi.modes import ALL_PAGES, ModePages
from farplug.scsi.opcodes import report_supported_opcodes
from farplug.scsi.sense import (
    CAPACITY_CHANGED,
    INVALID_COMMAND,
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETER_LIST,
    LBA_OUT_OF_RANGE,
    LOGICAL_UNIT_NOT_SUPPORTED,
    NO_SENSE,
    PARAMETER_LIST_LENGTH_ERROR,
    SAVING_PARAMETERS_NOT_SUPPORTED,
    WRITE_PROTECTED,
    Sense,
)
from farplug.usb.types import Buffer

_WRITE_PROTECTED = 0x80
_DPOFUA = 0x10
"""Bits of the device-specific parameter (SBC-3, chapter 6.5.1)."""

_PROTECT, _FUA, _UNMAP, _BYTCHK, _NDOB = 0xE0, 0x08, 0x08, 0x02, 0x01
"""Bits of byte 1 of a CDB."""

_LBPME, _LBPRZ = 0x80, 0x40
"""Bits of byte 14 of the READ CAPACITY(16) data: thin provisioned; unmapped blocks read as zeros."""

_UNMAP_HEADER = struct.Struct(">HH4x")
_UNMAP_EXTENT = struct.Struct(">QI4x")


class DiskUnit:
    """Turns CDBs into actions. Nothing is read or written here.

    It holds what SCSI keeps between commands: mode pages, unit attentions, and the sense of the last command for
    transports that do not send it with the status.

    Args:
        medium: the figures of the place where the blocks are. A new size is reported by a unit attention.
    """

    def __init__(self, medium: Medium) -> None:
        self._medium = medium
        self._block_count = medium.block_count
        self._modes = ModePages(medium.write_cache)
        self._commands = COMMANDS if medium.unmaps else COMMANDS_WITHOUT_UNMAP
        self._attentions: list[Sense] = []
        self._sense = NO_SENSE

    def attend(self, sense: Sense) -> None:
        """Raise a unit attention: a command to come reports it, once (SPC-4, chapter 5.14)."""
        if sense not in self._attentions:
            self._attentions.append(sense)

    def keep_sense(self, sense: Sense) -> None:
        """Remember why a command failed until the next command; only for transports that do not send sense."""
        self._sense = sense

    def execute(self, cdb: Buffer) -> Action:
        """Decide what a command does.

        Args:
            cdb: at least one byte; bytes beyond the command's own length are ignored.
        """
        if self._medium.block_count != self._block_count:
            self._block_count = self._medium.block_count
            self.attend(CAPACITY_CHANGED)
        command = self._commands.find(cdb)
        if self._attentions and cdb[0] not in DESPITE_ATTENTION:
            return Fail(self._attentions.pop(0))
        if command is None:
            action: Action = Fail(INVALID_COMMAND)
        elif len(cdb) < command.length or int.from_bytes(cdb[: command.length]) & command.forbidden:
            action = Fail(INVALID_FIELD_IN_CDB)
        else:
            action = command.handler(self, cdb)
        self._sense = NO_SENSE
        return action

    # What the disk is

    def _test_unit_ready(self, cdb: Buffer) -> Action:
        return Done()

    def _request_sense(self, cdb: Buffer) -> Action:
        sense = self._sense
        if sense is NO_SENSE and self._attentions:
            sense = self._attentions.pop(0)
        return Respond(_sense_data(sense, cdb))

    def _inquiry(self, cdb: Buffer) -> Action:
        vital, page = cdb[1] & 0x01, cdb[2]
        data = vital_product_data(self._medium, page) if vital else standard_inquiry(0x00)
        if data is None or (page and not vital):
            return Fail(INVALID_FIELD_IN_CDB)
        return Respond(data[: int.from_bytes(cdb[3:5])])

    def _report_luns(self, cdb: Buffer) -> Action:
        select, allocation = cdb[2], int.from_bytes(cdb[6:10])
        if select > 2:
            return Fail(INVALID_FIELD_IN_CDB)
        luns = b"" if select == 1 else bytes(8)  # 1: well known logical units only
        return Respond((struct.pack(">I4x", len(luns)) + luns)[:allocation])

    def _opcodes(self, cdb: Buffer) -> Action:
        return report_supported_opcodes(self._commands, cdb)

    def _capacity_10(self, cdb: Buffer) -> Action:
        return Respond(struct.pack(">II", min(self._block_count - 1, 0xFFFFFFFF), self._medium.block_size))

    def _capacity_16(self, cdb: Buffer) -> Action:
        exponent = blocks_per_physical_block(self._medium).bit_length() - 1
        provisioning = _LBPME | _LBPRZ if self._medium.unmaps else 0
        data = struct.pack(">QIBBB17x", self._block_count - 1, self._medium.block_size, 0, exponent, provisioning)
        return Respond(data[: int.from_bytes(cdb[10:14])])

    def _format_capacities(self, cdb: Buffer) -> Action:
        blocks = min(self._block_count, 0xFFFFFFFF)
        data = struct.pack(">3xBII", 8, blocks, 0x02 << 24 | self._medium.block_size)  # 02: formatted medium
        return Respond(data[: int.from_bytes(cdb[7:9])])

    # Modes

    def _mode_sense(self, cdb: Buffer) -> Action:
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == 3:
            return Fail(SAVING_PARAMETERS_NOT_SUPPORTED)
        pages = self._modes.sense(control, page)
        if pages is None or (subpage and (page, subpage) != (ALL_PAGES, 0xFF)):
            return Fail(INVALID_FIELD_IN_CDB)
        parameter = _DPOFUA | (_WRITE_PROTECTED if self._medium.read_only else 0)
        if cdb_length(cdb[0]) == 6:
            return Respond((struct.pack(">BBBB", 3 + len(pages), 0, parameter, 0) + pages)[: cdb[4]])
        return Respond((struct.pack(">HBB4x", 6 + len(pages), 0, parameter) + pages)[: int.from_bytes(cdb[7:9])])

    def _mode_select(self, cdb: Buffer) -> Action:
        six = cdb_length(cdb[0]) == 6
        length = cdb[4] if six else int.from_bytes(cdb[7:9])
        return Receive(length, partial(self._mode_selected, 4 if six else 8)) if length else Done()

    def _mode_selected(self, header: int, data: Buffer) -> Outcome:
        if len(data) < header:
            return Fail(PARAMETER_LIST_LENGTH_ERROR)
        block_descriptors = data[3] if header == 4 else int.from_bytes(data[6:8])
        if block_descriptors:
            return Fail(INVALID_FIELD_IN_PARAMETER_LIST)
        cached = self._modes.write_cache
        sense = self._modes.select(data[header:])
        if sense is not None:
            return Fail(sense)
        return Flush() if cached and not self._modes.write_cache else Done()

    # The medium as a whole

    def _start_stop_unit(self, cdb: Buffer) -> Action:
        # Stopping does nothing else: hosts stop a disk when it is ejected and never start it again.
        stops = not cdb[4] & 0x01
        return Flush() if stops else Done()

    def _prevent_allow(self, cdb: Buffer) -> Action:
        return Done()

    def _synchronize(self, cdb: Buffer) -> Action:
        return Flush()  # all of it, whatever range was named

    # Blocks

    def _read(self, cdb: Buffer) -> Action:
        lba, count, flags = extent(cdb)
        refusal = self._refuse(lba, count, flags)
        if refusal is not None or not count:
            return refusal or Done()
        return Read(lba, count, bool(flags & _FUA))

    def _write(self, cdb: Buffer) -> Action:
        lba, count, flags = extent(cdb)
        refusal = self._refuse(lba, count, flags, writes=True)
        if refusal is not None or not count:
            return refusal or Done()
        return Write(lba, count, self._write_through or bool(flags & _FUA))

    def _write_verify(self, cdb: Buffer) -> Action:
        # What was written and is durable need not be compared: reading it back would read the host's page cache.
        lba, count, flags = extent(cdb)
        refusal = self._refuse(lba, count, flags, writes=True)
        if refusal is not None or not count:
            return refusal or Done()
        return Write(lba, count, durable=True)

    def _verify(self, cdb: Buffer) -> Action:
        lba, count, flags = extent(cdb)
        refusal = self._refuse(lba, count, flags)
        if refusal is not None or not count:
            return refusal or Done()
        return (Compare if flags & _BYTCHK else Verify)(lba, count)

    def _write_same(self, cdb: Buffer) -> Action:
        lba, count, flags = extent(cdb)
        unmap = bool(flags & _UNMAP)
        if not count or (unmap and not self._medium.unmaps):
            return Fail(INVALID_FIELD_IN_CDB)
        refusal = self._refuse(lba, count, flags, writes=True, limit=MAX_WRITE_SAME_BLOCKS)
        if refusal is not None:
            return refusal
        if flags & _NDOB:
            return Zero(((lba, count),), unmap, self._write_through)
        return Receive(self._medium.block_size, partial(self._write_same_block, lba, count, unmap))

    def _write_same_block(self, lba: int, count: int, unmap: bool, block: Buffer) -> Outcome:
        if any(block):  # unmapped blocks would not read as this: they are written
            return Fill(lba, count, bytes(block), self._write_through)
        return Zero(((lba, count),), unmap, self._write_through)

    def _unmap(self, cdb: Buffer) -> Action:
        if self._medium.read_only:
            return Fail(WRITE_PROTECTED)
        length = int.from_bytes(cdb[7:9])
        return Receive(length, self._unmap_list) if length else Done()

    def _unmap_list(self, data: Buffer) -> Outcome:
        if len(data) < _UNMAP_HEADER.size:
            return Fail(PARAMETER_LIST_LENGTH_ERROR)
        data_length, length = _UNMAP_HEADER.unpack_from(data)
        if data_length + 2 > len(data) or length + _UNMAP_HEADER.size > len(data):
            return Fail(PARAMETER_LIST_LENGTH_ERROR)
        whole = length - length % _UNMAP_EXTENT.size  # SBC-3, chapter 5.28.2: an incomplete one is ignored
        listed = data[_UNMAP_HEADER.size : _UNMAP_HEADER.size + whole]
        extents = tuple((lba, count) for lba, count in _UNMAP_EXTENT.iter_unpack(listed) if count)
        if whole // _UNMAP_EXTENT.size > MAX_UNMAP_EXTENTS or sum(count for _, count in extents) > MAX_UNMAP_BLOCKS:
            return Fail(INVALID_FIELD_IN_PARAMETER_LIST)
        if any(lba + count > self._block_count for lba, count in extents):
            return Fail(LBA_OUT_OF_RANGE)
        return Zero(extents, unmap=True, durable=self._write_through) if extents else Done()

    @property
    def _write_through(self) -> bool:
        return not self._modes.write_cache

    def _refuse(
        self, lba: int, count: int, flags: int, *, writes: bool = False, limit: int = MAX_TRANSFER_BLOCKS
    ) -> Fail | None:
        """Why a command on blocks is not performed: found before any data moves, also if it names no block."""
        if flags & _PROTECT or count > limit:
            return Fail(INVALID_FIELD_IN_CDB)
        if writes and self._medium.read_only:
            return Fail(WRITE_PROTECTED)
        if lba + count > self._block_count:
            return Fail(LBA_OUT_OF_RANGE)
        return None


_h = bytes.fromhex

COMMANDS = CommandTable(
    (
        Command("TEST UNIT READY", _h("00 00 00 00 00 00"), DiskUnit._test_unit_ready),
        Command("REQUEST SENSE", _h("03 01 00 00 ff 00"), DiskUnit._request_sense),
        Command("READ(6)", _h("08 1f ff ff ff 00"), DiskUnit._read),
        Command("WRITE(6)", _h("0a 1f ff ff ff 00"), DiskUnit._write),
        Command("INQUIRY", _h("12 01 ff ff ff 00"), DiskUnit._inquiry),
        Command("MODE SELECT(6)", _h("15 10 00 00 ff 00"), DiskUnit._mode_select),
        Command("MODE SENSE(6)", _h("1a 08 ff ff ff 00"), DiskUnit._mode_sense),
        Command("START STOP UNIT", _h("1b 01 00 0f f7 00"), DiskUnit._start_stop_unit),
        Command("PREVENT ALLOW MEDIUM REMOVAL", _h("1e 00 00 00 03 00"), DiskUnit._prevent_allow),
        Command("READ FORMAT CAPACITIES", _h("23 00 00 00 00 00 00 ff ff 00"), DiskUnit._format_capacities),
        Command("READ CAPACITY(10)", _h("25 00 ff ff ff ff 00 00 01 00"), DiskUnit._capacity_10),
        Command("READ(10)", _h("28 1a ff ff ff ff 3f ff ff 00"), DiskUnit._read),
        Command("WRITE(10)", _h("2a 1a ff ff ff ff 3f ff ff 00"), DiskUnit._write),
        Command("WRITE AND VERIFY(10)", _h("2e 12 ff ff ff ff 3f ff ff 00"), DiskUnit._write_verify),
        Command("VERIFY(10)", _h("2f 12 ff ff ff ff 3f ff ff 00"), DiskUnit._verify),
        Command("SYNCHRONIZE CACHE(10)", _h("35 06 ff ff ff ff 3f ff ff 00"), DiskUnit._synchronize),
        Command("WRITE SAME(10)", _h("41 08 ff ff ff ff 3f ff ff 00"), DiskUnit._write_same),
        Command("UNMAP", _h("42 00 00 00 00 00 3f ff ff 00"), DiskUnit._unmap),
        Command("MODE SELECT(10)", _h("55 10 00 00 00 00 00 ff ff 00"), DiskUnit._mode_select),
        Command("MODE SENSE(10)", _h("5a 18 ff ff 00 00 00 ff ff 00"), DiskUnit._mode_sense),
        Command("READ(16)", _h("88 1a ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._read),
        Command("WRITE(16)", _h("8a 1a ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write),
        Command("WRITE AND VERIFY(16)", _h("8e 12 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write_verify),
        Command("VERIFY(16)", _h("8f 12 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._verify),
        Command("SYNCHRONIZE CACHE(16)", _h("91 06 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._synchronize),
        Command("WRITE SAME(16)", _h("93 09 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write_same),
        Command("READ CAPACITY(16)", _h("9e 10 ff ff ff ff ff ff ff ff ff ff ff ff 01 00"), DiskUnit._capacity_16),
        Command("REPORT LUNS", _h("a0 00 ff 00 00 00 ff ff ff ff 00 00"), DiskUnit._report_luns),
        Command("REPORT SUPPORTED OPERATION CODES", _h("a3 0c 87 ff ff ff ff ff ff ff 00 00"), DiskUnit._opcodes),
        Command("READ(12)", _h("a8 1a ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._read),
        Command("WRITE(12)", _h("aa 1a ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write),
        Command("WRITE AND VERIFY(12)", _h("ae 12 ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write_verify),
        Command("VERIFY(12)", _h("af 12 ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._verify),
    )
)
"""Every command that a disk knows. All others end with INVALID COMMAND OPERATION CODE."""

COMMANDS_WITHOUT_UNMAP = CommandTable(row for row in COMMANDS if row.name != "UNMAP")
"""Of a disk whose store cannot give space back."""


class AbsentUnit:
    """What answers for a logical unit number that does not exist (SPC-4, chapter 4.5.1 and 6.6.2)."""

    def execute(self, cdb: Buffer) -> Action:
        """INQUIRY says that nothing is there, REQUEST SENSE says why, everything else fails."""
        if len(cdb) >= 6 and cdb[0] == 0x12 and not cdb[1] & 1:
            return Respond(standard_inquiry(0x7F)[: int.from_bytes(cdb[3:5])])
        if len(cdb) >= 6 and cdb[0] == 0x03:
            return Respond(_sense_data(LOGICAL_UNIT_NOT_SUPPORTED, cdb))
        return Fail(LOGICAL_UNIT_NOT_SUPPORTED)


def _sense_data(sense: Sense, cdb: Buffer) -> bytes:
    """What a REQUEST SENSE is answered, in the format that it asks for."""
    data = sense.descriptor_format() if cdb[1] & 0x01 else bytes(sense)
    return data[: cdb[4]]
