"""Information units (IU) of USB Attached SCSI (UAS-2, chapter 6.2). Big endian."""

from __future__ import annotations

import struct
from enum import IntEnum

from farplug.scsi.sense import Sense

COMMAND = struct.Struct(">BxHBxBx8s16s")
"""IU ID, tag, priority and attribute, additional CDB length in words (bits 7..2), LUN, CDB (table 16)."""

TASK_MANAGEMENT = struct.Struct(">BxHBxH8s")
"""IU ID, tag, function, tag of the task to manage, LUN (table 20)."""

TAGGED = struct.Struct(">BxH")
"""IU ID, tag: the first fields of every IU, and all fields of a READY IU (tables 21 and 22)."""

_SENSE = struct.Struct(">BxHHB7xH")
"""IU ID, tag, status qualifier, status, length of the sense data (table 17)."""

_RESPONSE = struct.Struct(">BxHxxxB")
"""IU ID, tag, response code (table 18)."""

_GOOD, _CHECK_CONDITION, _TASK_SET_FULL = 0x00, 0x02, 0x28
"""Status codes (SAM-5, table 35)."""


class IuId(IntEnum):
    """IU ID (UAS-2, table 14)."""

    COMMAND = 0x01
    SENSE = 0x03
    RESPONSE = 0x04
    TASK_MANAGEMENT = 0x05
    READ_READY = 0x06
    WRITE_READY = 0x07


COMMAND_IU, TASK_MANAGEMENT_IU, _SENSE_IU = int(IuId.COMMAND), int(IuId.TASK_MANAGEMENT), int(IuId.SENSE)


class TaskFunction(IntEnum):
    """Task management function (UAS-2, table 20)."""

    ABORT_TASK = 0x01
    ABORT_TASK_SET = 0x02
    CLEAR_TASK_SET = 0x04
    LOGICAL_UNIT_RESET = 0x08
    I_T_NEXUS_RESET = 0x10
    CLEAR_ACA = 0x40
    QUERY_TASK = 0x80
    QUERY_TASK_SET = 0x81


class ResponseCode(IntEnum):
    """Response code of a RESPONSE IU (UAS-2, table 19)."""

    COMPLETE = 0x00
    INVALID_IU = 0x02
    NOT_SUPPORTED = 0x04
    FAILED = 0x05
    SUCCEEDED = 0x08
    INCORRECT_LUN = 0x09
    OVERLAPPED_TAG = 0x0A


class TaskAttribute(IntEnum):
    """Task attribute: bits 2..0 of priority and attribute (SAM-5, chapter 8.9)."""

    SIMPLE = 0
    HEAD_OF_QUEUE = 1
    ORDERED = 2
    ACA = 4


def sense_iu(tag: int, sense: Sense | None) -> bytes:
    """Build the SENSE IU that ends a command: GOOD status, or CHECK CONDITION with sense data."""
    if sense is None:
        return _SENSE.pack(_SENSE_IU, tag, 0, _GOOD, 0)
    data = bytes(sense)
    return _SENSE.pack(_SENSE_IU, tag, 0, _CHECK_CONDITION, len(data)) + data


def task_set_full_iu(tag: int) -> bytes:
    """Build the SENSE IU that refuses a command with TASK SET FULL."""
    return _SENSE.pack(_SENSE_IU, tag, 0, _TASK_SET_FULL, 0)


def response_iu(tag: int, code: ResponseCode) -> bytes:
    """Build the RESPONSE IU for a task management IU, or for an invalid IU."""
    return _RESPONSE.pack(IuId.RESPONSE, tag, code)


def ready_iu(id: IuId, tag: int) -> bytes:
    """Build the READ READY or WRITE READY IU: the guest then queues the data transfers of the command."""
    return TAGGED.pack(id, tag)
