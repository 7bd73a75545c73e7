from __future__ import annotations

import pytest

from farplug.scsi.sense import INVALID_COMMAND
from farplug.virtual.iu import (
    COMMAND,
    TASK_MANAGEMENT,
    IuId,
    ResponseCode,
    ready_iu,
    response_iu,
    sense_iu,
    task_set_full_iu,
)


@pytest.mark.parametrize(
    ("iu", "golden"),
    [
        (sense_iu(0x0102, None), "0300010200000000000000000000 0000"),
        (
            sense_iu(5, INVALID_COMMAND),
            "0300000500000200000000000000 0012 700005000000000a00000000 200000000000",
        ),
        (task_set_full_iu(0xFFFE), "0300fffe00002800000000000000 0000"),
        (response_iu(0x0102, ResponseCode.OVERLAPPED_TAG), "040001020000000a"),
        (response_iu(1, ResponseCode.COMPLETE), "0400000100000000"),
        (ready_iu(IuId.READ_READY, 0x0203), "06000203"),
        (ready_iu(IuId.WRITE_READY, 1), "07000001"),
    ],
)
def test_what_is_sent(iu: bytes, golden: str) -> None:
    assert iu == bytes.fromhex(golden)


def test_what_is_received() -> None:
    command = bytes.fromhex("01000102a1000c00 4003000000000000 28000000000a00000100 000000000000")
    lun, cdb = bytes.fromhex("4003000000000000"), bytes.fromhex("28000000000a00000100000000000000")
    assert COMMAND.unpack(command) == (1, 0x0102, 0xA1, 0x0C, lun, cdb)
    management = bytes.fromhex("0500000a01000009 0001000000000000")
    assert TASK_MANAGEMENT.unpack(management) == (5, 10, 1, 9, bytes.fromhex("0001000000000000"))
