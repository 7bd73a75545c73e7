"""A disk as a SCSI logical unit: a direct-access block device (SPC-4, SBC-3)."""

from __future__ import annotations

import struct
from functools import partial

from farplug.scsi.cdb import (
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
    extent,
)
from farplug.scsi.inquiry import DIRECT_ACCESS, disk_pages, standard_inquiry, vital_product_data
from farplug.scsi.medium import (
    MAX_TRANSFER_BLOCKS,
    MAX_UNMAP_BLOCKS,
    MAX_UNMAP_EXTENTS,
    MAX_WRITE_SAME_BLOCKS,
    Medium,
    blocks_per_physical_block,
)
from farplug.scsi.modes import disk_modes
from farplug.scsi.opcodes import report_supported_opcodes
from farplug.scsi.sense import (
    CAPACITY_CHANGED,
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETER_LIST,
    LBA_OUT_OF_RANGE,
    PARAMETER_LIST_LENGTH_ERROR,
    WRITE_PROTECTED,
)
from farplug.scsi.unit import COMMON_COMMANDS, Unit
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


class DiskUnit(Unit):
    """A disk over a medium of fixed block size.

    Args:
        medium: the properties of the store. A new size is reported by a unit attention.
        luns: the number of logical units of the device.
    """

    def __init__(self, medium: Medium, *, luns: int = 1) -> None:
        commands = COMMANDS if medium.unmaps else COMMANDS_WITHOUT_UNMAP
        super().__init__(commands, disk_modes(write_cache=medium.write_cache), luns)
        self._medium = medium
        self._block_count = medium.block_count

    def _check_medium(self) -> None:
        if self._medium.block_count != self._block_count:
            self._block_count = self._medium.block_count
            self.raise_unit_attention(CAPACITY_CHANGED)

    # Identity

    def _inquiry_data(self) -> bytes:
        return standard_inquiry(DIRECT_ACCESS)

    def _vital_product_data(self, page: int) -> bytes | None:
        return vital_product_data(DIRECT_ACCESS, disk_pages(self._medium), page)

    def _device_specific_parameter(self) -> int:
        return _DPOFUA | (_WRITE_PROTECTED if self._medium.read_only else 0)

    def _test_unit_ready(self, cdb: Buffer) -> Action:
        return Done()

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

    # The medium as a whole

    def _start_stop_unit(self, cdb: Buffer) -> Action:
        # A stopped disk stays usable: hosts stop a disk when it is ejected and never start it again.
        stops = not cdb[4] & 0x01
        return Flush() if stops else Done()

    def _prevent_allow(self, cdb: Buffer) -> Action:
        return Done()

    def _synchronize(self, cdb: Buffer) -> Action:
        return Flush()  # of all blocks: the range is ignored

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
        forced = bool(flags & _FUA)
        return Write(lba, count, durable=forced or self._write_through, forced=forced)

    def _write_verify(self, cdb: Buffer) -> Action:
        # No comparison: reading durable blocks back would only read the page cache of this machine.
        lba, count, flags = extent(cdb)
        refusal = self._refuse(lba, count, flags, writes=True)
        if refusal is not None or not count:
            return refusal or Done()
        return Write(lba, count, durable=True, forced=True)

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
        if any(block):  # unmapped blocks would read as zeros
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
        """Return whether the guest has turned off the write cache of the store."""
        return self._medium.write_cache and not self._modes.write_cache

    def _refuse(
        self, lba: int, count: int, flags: int, *, writes: bool = False, limit: int = MAX_TRANSFER_BLOCKS
    ) -> Fail | None:
        """Return why a command on blocks fails, before any data moves, also for zero blocks; None if it is valid."""
        if flags & _PROTECT or count > limit:
            return Fail(INVALID_FIELD_IN_CDB)
        if writes and self._medium.read_only:
            return Fail(WRITE_PROTECTED)
        if lba + count > self._block_count:
            return Fail(LBA_OUT_OF_RANGE)
        return None


_h = bytes.fromhex

COMMANDS: CommandTable[DiskUnit] = CommandTable(
    (
        *COMMON_COMMANDS,
        Command("TEST UNIT READY", _h("00 00 00 00 00 00"), DiskUnit._test_unit_ready),
        Command("READ(6)", _h("08 1f ff ff ff 00"), DiskUnit._read),
        Command("WRITE(6)", _h("0a 1f ff ff ff 00"), DiskUnit._write),
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
        Command("READ(16)", _h("88 1a ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._read),
        Command("WRITE(16)", _h("8a 1a ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write),
        Command("WRITE AND VERIFY(16)", _h("8e 12 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write_verify),
        Command("VERIFY(16)", _h("8f 12 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._verify),
        Command("SYNCHRONIZE CACHE(16)", _h("91 06 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._synchronize),
        Command("WRITE SAME(16)", _h("93 09 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write_same),
        Command("READ CAPACITY(16)", _h("9e 10 ff ff ff ff ff ff ff ff ff ff ff ff 01 00"), DiskUnit._capacity_16),
        Command("REPORT SUPPORTED OPERATION CODES", _h("a3 0c 87 ff ff ff ff ff ff ff 00 00"), DiskUnit._opcodes),
        Command("READ(12)", _h("a8 1a ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._read),
        Command("WRITE(12)", _h("aa 1a ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write),
        Command("WRITE AND VERIFY(12)", _h("ae 12 ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._write_verify),
        Command("VERIFY(12)", _h("af 12 ff ff ff ff ff ff ff ff 3f 00"), DiskUnit._verify),
    )
)
"""The commands of a disk. All others end with INVALID COMMAND OPERATION CODE."""

COMMANDS_WITHOUT_UNMAP = CommandTable(row for row in COMMANDS if row.name != "UNMAP")
"""The commands of a disk whose store cannot release space."""
