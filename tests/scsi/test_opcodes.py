from __future__ import annotations

import struct

import pytest
from tests.scsi.media import FakeMedium

from farplug.scsi.cdb import Fail, Respond
from farplug.scsi.disk import COMMANDS, DiskUnit
from farplug.scsi.sense import INVALID_FIELD_IN_CDB

NO_TIMEOUTS = bytes.fromhex("000a 0000 00000000 00000000")


def report(text: str, allocation: int = 0xFFFF, *, unmaps: bool = True) -> bytes | None:
    """``text``: bytes 2 to 5 of the CDB. None: INVALID FIELD IN CDB."""
    cdb = bytes.fromhex("a30c" + text) + struct.pack(">Ixx", allocation)
    action = DiskUnit(FakeMedium(unmaps=unmaps)).execute(cdb)
    if action == Fail(INVALID_FIELD_IN_CDB):
        return None
    assert isinstance(action, Respond)
    return action.data


@pytest.mark.parametrize("timeouts", [False, True])
def test_all(timeouts: bool) -> None:
    size = 20 if timeouts else 8
    data = report("80 00 0000" if timeouts else "00 00 0000")
    assert data is not None
    assert int.from_bytes(data[:4]) == len(data) - 4 == size * len(list(COMMANDS))
    reported = [struct.unpack_from(">BxHxBH", data, begin) for begin in range(4, len(data), size)]
    flags = 2 if timeouts else 0
    assert reported == [
        (row.opcode, row.service_action or 0, flags | (row.service_action is not None), row.length) for row in COMMANDS
    ]
    assert all(data[begin + 8 : begin + size] == NO_TIMEOUTS[: size - 8] for begin in range(4, len(data), size))
    assert report("00 00 0000", 4) == struct.pack(">I", 8 * len(reported))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("01 12 0000", "00 03 0006 12 01 ff ff ff 00"),
        ("81 12 0000", "00 83 0006 12 01 ff ff ff 00" + NO_TIMEOUTS.hex()),
        ("01 ff 0000", "00 01 0000"),
        ("81 85 0000", "00 01 0000"),
        ("01 9e 0000", None),  # has service actions
        ("02 9e 0010", "00 03 0010 9e 10 ff ff ff ff ff ff ff ff ff ff ff ff 01 00"),
        ("02 a3 000c", "00 03 000c a3 0c 87 ff ff ff ff ff ff ff 00 00"),
        ("02 9e 0011", "00 01 0000"),
        ("02 9e 0030", "00 01 0000"),
        ("02 12 0000", None),  # has none
        ("03 12 0000", "00 03 0006 12 01 ff ff ff 00"),
        ("03 12 0001", "00 01 0000"),
        ("03 9e 0010", "00 03 0010 9e 10 ff ff ff ff ff ff ff ff ff ff ff ff 01 00"),
        ("03 9e 0000", "00 01 0000"),
        ("04 12 0000", None),
        ("07 12 0000", None),
        ("08 12 0000", None),
    ],
)
def test_one(text: str, answer: str | None) -> None:
    assert report(text) == (None if answer is None else bytes.fromhex(answer))


def test_linux_uses_an_allocation_length_of_ten_bytes() -> None:
    assert report("01 12 0000", 10) == bytes.fromhex("00 03 0006 12 01 ff ff ff 00")


def test_unsupported_commands_are_not_reported() -> None:
    assert report("01 42 0000") == bytes.fromhex("00 03 000a 42 00 00 00 00 00 3f ff ff 00")
    assert report("01 42 0000", unmaps=False) == bytes.fromhex("00 01 0000")


def test_exactly_the_reported_commands_are_supported() -> None:
    unit = DiskUnit(FakeMedium())
    for opcode in range(256):
        for action in (0x00, 0x0C, 0x10, 0x11, 0x1F):
            answer = report(f"03 {opcode:02x} {action:04x}")
            assert answer is not None
            sent = unit.execute(bytes((opcode, action)) + bytes(14))
            unknown = isinstance(sent, Fail) and sent.sense.asc == 0x20
            if action == 0 or opcode in (0x9E, 0x9F, 0xA3, 0xA4):
                assert (answer[1] == 1) is unknown
