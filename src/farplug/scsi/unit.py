"""The base class of logical units (SPC-4): unit attentions, sense, INQUIRY, mode pages, REPORT LUNS."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

from farplug.scsi.cdb import (
    Action,
    Command,
    CommandTable,
    Done,
    Fail,
    Flush,
    Outcome,
    Receive,
    Respond,
    cdb_length,
)
from farplug.scsi.inquiry import standard_inquiry
from farplug.scsi.modes import ALL_PAGES, ModePages
from farplug.scsi.sense import (
    INVALID_COMMAND,
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETER_LIST,
    LOGICAL_UNIT_NOT_SUPPORTED,
    NO_SENSE,
    PARAMETER_LIST_LENGTH_ERROR,
    RESET_OCCURRED,
    SAVING_PARAMETERS_NOT_SUPPORTED,
    Sense,
)
from farplug.usb.types import Buffer


class Unit(ABC):
    """Turns CDBs into actions, without I/O.

    A unit keeps the state between commands: mode pages, unit attentions, and the sense data of the last command for
    transports that do not send sense data with the status.

    Args:
        commands: the supported commands; the handlers are methods of the same class.
        modes: the mode pages.
        luns: the number of logical units of the device, which are numbered from 0.
    """

    bypasses_unit_attention = frozenset((0x03, 0x12, 0xA0))
    """Opcodes performed also while a unit attention is pending: REQUEST SENSE, INQUIRY, REPORT LUNS."""

    def __init__(self, commands: CommandTable[Any], modes: ModePages, luns: int) -> None:
        self._commands = commands
        self._modes = modes
        self._luns = luns
        self._attentions: list[Sense] = []
        self._sense = NO_SENSE

    def raise_unit_attention(self, sense: Sense) -> None:
        """Establish a unit attention condition: a later command reports it, once (SPC-4, chapter 5.14)."""
        if sense not in self._attentions:
            self._attentions.append(sense)

    def reset(self) -> None:
        """Raise a unit attention, because the guest reset the device. Mode pages keep their values."""
        self.raise_unit_attention(RESET_OCCURRED)

    def keep_sense(self, sense: Sense) -> None:
        """Keep the sense data of a failed command for REQUEST SENSE; only for transports that do not send it."""
        self._sense = sense

    def execute(self, cdb: Buffer) -> Action:
        """Return what a command does.

        Args:
            cdb: at least one byte; bytes beyond the length of the command are ignored.
        """
        self._check_medium()
        command = self._commands.find(cdb)
        if self._attentions and cdb[0] not in self.bypasses_unit_attention:
            return Fail(self._attentions.pop(0))
        if command is None:
            action: Action = Fail(INVALID_COMMAND)
        elif len(cdb) < command.length or int.from_bytes(cdb[: command.length]) & command.forbidden:
            action = Fail(INVALID_FIELD_IN_CDB)
        else:
            action = command.handler(self, cdb)
        self._sense = NO_SENSE
        return action

    # Overridden by device types

    def _check_medium(self) -> None:
        """Raise a unit attention if the medium has changed; called before each command."""

    @abstractmethod
    def _inquiry_data(self) -> bytes:
        """Return the standard INQUIRY data."""

    @abstractmethod
    def _vital_product_data(self, page: int) -> bytes | None:
        """Return a VPD page; None if there is no such page."""

    @abstractmethod
    def _device_specific_parameter(self) -> int:
        """Return the device-specific parameter of the mode parameter header."""

    # Commands

    def _request_sense(self, cdb: Buffer) -> Action:
        sense = self._sense
        if sense is NO_SENSE and self._attentions:
            sense = self._attentions.pop(0)
        return Respond(_sense_data(sense, cdb))

    def _inquiry(self, cdb: Buffer) -> Action:
        vital, page = cdb[1] & 0x01, cdb[2]
        data = self._vital_product_data(page) if vital else self._inquiry_data()
        if data is None or (page and not vital):
            return Fail(INVALID_FIELD_IN_CDB)
        return Respond(data[: int.from_bytes(cdb[3:5])])

    def _report_luns(self, cdb: Buffer) -> Action:
        return _report_luns(self._luns, cdb)

    def _mode_sense(self, cdb: Buffer) -> Action:
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == 3:
            return Fail(SAVING_PARAMETERS_NOT_SUPPORTED)
        pages = self._modes.sense(control, page)
        if pages is None or (subpage and (page, subpage) != (ALL_PAGES, 0xFF)):
            return Fail(INVALID_FIELD_IN_CDB)
        parameter = self._device_specific_parameter()
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


_h = bytes.fromhex

COMMON_COMMANDS: tuple[Command[Unit], ...] = (
    Command("REQUEST SENSE", _h("03 01 00 00 ff 00"), Unit._request_sense),
    Command("INQUIRY", _h("12 01 ff ff ff 00"), Unit._inquiry),
    Command("MODE SELECT(6)", _h("15 10 00 00 ff 00"), Unit._mode_select),
    Command("MODE SENSE(6)", _h("1a 08 ff ff ff 00"), Unit._mode_sense),
    Command("MODE SELECT(10)", _h("55 10 00 00 00 00 00 ff ff 00"), Unit._mode_select),
    Command("MODE SENSE(10)", _h("5a 18 ff ff 00 00 00 ff ff 00"), Unit._mode_sense),
    Command("REPORT LUNS", _h("a0 00 ff 00 00 00 ff ff ff ff 00 00"), Unit._report_luns),
)
"""The commands of all device types."""


class AbsentUnit:
    """Answers commands to a logical unit number that does not exist (SPC-4, chapters 4.5.1 and 6.6.2).

    Args:
        luns: the number of logical units that exist.
    """

    def __init__(self, luns: int = 1) -> None:
        self._luns = luns

    def execute(self, cdb: Buffer) -> Action:
        """Return what a command does: INQUIRY, REPORT LUNS and REQUEST SENSE return data, all others fail."""
        length = cdb_length(cdb[0])
        if length is not None and len(cdb) >= length:
            if cdb[0] == 0x12 and not cdb[1] & 1:
                return Respond(standard_inquiry(0x7F)[: int.from_bytes(cdb[3:5])])
            if cdb[0] == 0x03:
                return Respond(_sense_data(LOGICAL_UNIT_NOT_SUPPORTED, cdb))
            if cdb[0] == 0xA0:
                return _report_luns(self._luns, cdb)
        return Fail(LOGICAL_UNIT_NOT_SUPPORTED)

    def reset(self) -> None:
        """Do nothing."""

    def keep_sense(self, sense: Sense) -> None:
        """Do nothing: the sense is always LOGICAL UNIT NOT SUPPORTED."""


def _report_luns(luns: int, cdb: Buffer) -> Action:
    """Build REPORT LUNS data (SPC-4, chapter 6.33) with peripheral device addressing (SAM-5, chapter 4.7.4)."""
    select, allocation = cdb[2], int.from_bytes(cdb[6:10])
    if select > 2:
        return Fail(INVALID_FIELD_IN_CDB)
    listed = b"" if select == 1 else b"".join(struct.pack(">H6x", lun) for lun in range(luns))  # 1: well known LUNs
    return Respond((struct.pack(">I4x", len(listed)) + listed)[:allocation])


def _sense_data(sense: Sense, cdb: Buffer) -> bytes:
    """Return the data of REQUEST SENSE, in the requested format."""
    data = sense.descriptor_format() if cdb[1] & 0x01 else bytes(sense)
    return data[: cdb[4]]
