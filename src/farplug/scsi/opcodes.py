"""REPORT SUPPORTED OPERATION CODES, made from the command table of the unit (SPC-4, chapter 6.35)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

from farplug.scsi.cdb import SERVICE_ACTION_OPCODES, Action, Command, CommandTable, Fail, Respond
from farplug.scsi.sense import INVALID_FIELD_IN_CDB
from farplug.usb.types import Buffer

_NO_TIMEOUTS = struct.pack(">HxxII", 0x0A, 0, 0)
"""A command timeouts descriptor without timeouts."""


class _Reporting(IntEnum):
    """REPORTING OPTIONS field."""

    ALL = 0
    OPCODE = 1
    """One opcode, without service actions."""
    SERVICE_ACTION = 2
    """One opcode and service action."""
    EITHER = 3


class _Support(IntEnum):
    """SUPPORT field."""

    NOT_SUPPORTED = 1
    STANDARD = 3


def report_supported_opcodes(commands: CommandTable[Any], cdb: Buffer) -> Action:
    """Return the descriptors of all commands, or the usage data of one."""
    timeouts, option, opcode = bool(cdb[2] & 0x80), cdb[2] & 0x07, cdb[3]
    service_action, allocation = int.from_bytes(cdb[4:6]), int.from_bytes(cdb[6:10])
    if option == _Reporting.ALL:
        descriptors = b"".join(_descriptor(row, timeouts) for row in commands)
        return Respond((struct.pack(">I", len(descriptors)) + descriptors)[:allocation])
    has_service_actions = opcode in SERVICE_ACTION_OPCODES
    if option > _Reporting.EITHER or option == (
        _Reporting.OPCODE if has_service_actions else _Reporting.SERVICE_ACTION
    ):
        return Fail(INVALID_FIELD_IN_CDB)
    command = None
    if option == _Reporting.OPCODE:
        command = commands.find(bytes((opcode,)))
    elif service_action <= (0x1F if has_service_actions else 0):
        command = commands.find(bytes((opcode, service_action)))
    return Respond(_one_command(command, timeouts)[:allocation])


def _descriptor(command: Command[Any], timeouts: bool) -> bytes:
    action = command.service_action
    flags = timeouts << 1 | (action is not None)
    descriptor = struct.pack(">BxHxBH", command.opcode, action or 0, flags, command.length)
    return descriptor + (_NO_TIMEOUTS if timeouts else b"")


def _one_command(command: Command[Any] | None, timeouts: bool) -> bytes:
    if command is None:
        return struct.pack(">BBH", 0, _Support.NOT_SUPPORTED, 0)
    head = struct.pack(">BBH", 0, timeouts << 7 | _Support.STANDARD, command.length)
    return head + command.usage + (_NO_TIMEOUTS if timeouts else b"")
