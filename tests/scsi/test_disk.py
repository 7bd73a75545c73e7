from __future__ import annotations

import random

import pytest

from farplug.scsi.cdb import Action, Done, Fail, Flush, Read, Respond, Write
from farplug.scsi.disk import COMMANDS, AbsentUnit, DiskUnit
from farplug.scsi.sense import (
    INVALID_COMMAND,
    INVALID_FIELD_IN_CDB,
    LBA_OUT_OF_RANGE,
    LOGICAL_UNIT_NOT_SUPPORTED,
    NO_SENSE,
    RESET_OCCURRED,
    SAVING_PARAMETERS_NOT_SUPPORTED,
    WRITE_PROTECTED,
    Sense,
)

INQUIRY = bytes.fromhex("00 00 06 02 1f 00 00 00") + b"farplug Virtual Disk    1.0 "
PAGE_08 = bytes.fromhex("08 12 04") + bytes(17)


def disk(*, read_only: bool = False, blocks: int = 1000) -> DiskUnit:
    return DiskUnit(blocks, 512, read_only=read_only)


def cdb(text: str) -> bytes:
    return bytes.fromhex(text)


TABLE: list[tuple[str, Action]] = [
    ("00 00 00 00 00 00", Done()),
    ("00 00 00 00 00 00 ff ff", Done()),
    ("00 00 00 00 00", Fail(INVALID_FIELD_IN_CDB)),
    ("00 00 00 00 00 04", Fail(INVALID_FIELD_IN_CDB)),
    ("03 00 00 00 12 00", Respond(bytes(NO_SENSE))),
    ("03 00 00 00 04 00", Respond(bytes(NO_SENSE)[:4])),
    ("03 00 00 00 60 00", Respond(bytes(NO_SENSE))),
    ("03 01 00 00 12 00", Fail(INVALID_FIELD_IN_CDB)),
    ("12 00 00 00 24 00", Respond(INQUIRY)),
    ("12 00 00 00 ff 00", Respond(INQUIRY)),
    ("12 00 00 01 00 00", Respond(INQUIRY)),
    ("12 00 00 00 05 00", Respond(INQUIRY[:5])),
    ("12 00 00 00 00 00", Respond(b"")),
    ("12 01 00 00 24 00", Fail(INVALID_FIELD_IN_CDB)),
    ("12 01 80 00 24 00", Fail(INVALID_FIELD_IN_CDB)),
    ("12 00 80 00 24 00", Fail(INVALID_FIELD_IN_CDB)),
    ("1a 00 3f 00 c0 00", Respond(cdb("17 00 10 00") + PAGE_08)),
    ("1a 08 3f 00 c0 00", Respond(cdb("17 00 10 00") + PAGE_08)),
    ("1a 00 3f ff c0 00", Respond(cdb("17 00 10 00") + PAGE_08)),
    ("1a 00 3f 00 04 00", Respond(cdb("17 00 10 00"))),
    ("1a 00 08 00 c0 00", Respond(cdb("17 00 10 00") + PAGE_08)),
    ("1a 00 88 00 c0 00", Respond(cdb("17 00 10 00") + PAGE_08)),
    ("1a 00 48 00 c0 00", Respond(cdb("17 00 10 00 08 12") + bytes(18))),
    ("1a 00 c8 00 c0 00", Fail(SAVING_PARAMETERS_NOT_SUPPORTED)),
    ("1a 00 04 00 c0 00", Fail(INVALID_FIELD_IN_CDB)),
    ("1a 00 08 ff c0 00", Fail(INVALID_FIELD_IN_CDB)),
    ("1a 00 3f 01 c0 00", Fail(INVALID_FIELD_IN_CDB)),
    ("1b 00 00 00 01 00", Done()),
    ("1b 00 00 00 00 00", Flush()),
    ("1b 01 00 00 02 00", Flush()),
    ("1e 00 00 00 01 00", Done()),
    ("1e 00 00 00 00 00", Done()),
    ("25 00 00 00 00 00 00 00 00 00", Respond(cdb("00 00 03 e7 00 00 02 00"))),
    ("28 00 00 00 00 00 00 00 01 00", Read(0, 1)),
    ("28 18 00 00 03 e7 00 00 01 00", Read(999, 1)),
    ("28 00 00 00 00 00 00 03 e8 00", Read(0, 1000)),
    ("28 00 00 00 00 00 00 03 e9 00", Fail(LBA_OUT_OF_RANGE)),
    ("28 00 00 00 03 e8 00 00 01 00", Fail(LBA_OUT_OF_RANGE)),
    ("28 00 ff ff ff ff 00 ff ff 00", Fail(LBA_OUT_OF_RANGE)),
    ("28 00 00 00 00 05 00 00 00 00", Done()),
    ("28 00 00 00 03 e9 00 00 00 00", Fail(LBA_OUT_OF_RANGE)),
    ("28 20 00 00 00 00 00 00 01 00", Fail(INVALID_FIELD_IN_CDB)),
    ("2a 00 00 00 00 01 00 00 02 00", Write(1, 2, fua=False)),
    ("2a 08 00 00 00 01 00 00 02 00", Write(1, 2, fua=True)),
    ("2a 00 00 00 00 01 00 00 00 00", Done()),
    ("2a 00 00 00 03 e7 00 00 02 00", Fail(LBA_OUT_OF_RANGE)),
    ("2a 60 00 00 00 00 00 00 01 00", Fail(INVALID_FIELD_IN_CDB)),
    ("35 00 00 00 00 00 00 00 00 00", Flush()),
    ("35 02 ff ff ff ff 00 ff ff 00", Flush()),
    ("9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00", Fail(INVALID_COMMAND)),
    ("85 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00", Fail(INVALID_COMMAND)),
    ("ff", Fail(INVALID_COMMAND)),
]


@pytest.mark.parametrize(("text", "action"), TABLE, ids=[text for text, _ in TABLE])
def test_commands(text: str, action: Action) -> None:
    unit = disk()
    assert unit.execute(cdb(text)) == action
    assert unit.execute(memoryview(cdb(text))) == action


def test_every_other_opcode_is_invalid() -> None:
    unit = disk()
    known = {0x00, 0x03, 0x12, 0x1A, 0x1B, 0x1E, 0x25, 0x28, 0x2A, 0x35}
    assert COMMANDS.keys() == known
    for opcode in set(range(256)) - known:
        assert unit.execute(bytes((opcode,)) + bytes(15)) == Fail(INVALID_COMMAND)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("2a 00 00 00 00 01 00 00 02 00", Fail(WRITE_PROTECTED)),
        ("2a 00 00 00 00 01 00 00 00 00", Fail(WRITE_PROTECTED)),
        ("28 00 00 00 00 01 00 00 02 00", Read(1, 2)),
        ("1a 00 3f 00 04 00", Respond(cdb("17 00 90 00"))),
        ("35 00 00 00 00 00 00 00 00 00", Flush()),
    ],
)
def test_read_only(text: str, action: Action) -> None:
    assert disk(read_only=True).execute(cdb(text)) == action


@pytest.mark.parametrize(
    ("blocks", "last"), [(1, "00000000"), (2**32, "ffffffff"), (2**32 + 1, "ffffffff"), (2**31, "7fffffff")]
)
def test_capacity(blocks: int, last: str) -> None:
    answer = disk(blocks=blocks).execute(cdb("25 00 00 00 00 00 00 00 00 00"))
    assert answer == Respond(cdb(last + "00000200"))


def test_unit_attention_comes_once() -> None:
    unit = disk()
    unit.attend(RESET_OCCURRED)
    assert isinstance(unit.execute(cdb("12 00 00 00 24 00")), Respond)
    assert unit.execute(cdb("00 00 00 00 00 00")) == Fail(RESET_OCCURRED)
    assert unit.execute(cdb("00 00 00 00 00 00")) == Done()


def test_unit_attention_comes_before_an_invalid_command() -> None:
    unit = disk()
    unit.attend(RESET_OCCURRED)
    assert unit.execute(cdb("ff")) == Fail(RESET_OCCURRED)
    assert unit.execute(cdb("ff")) == Fail(INVALID_COMMAND)


def test_request_sense_takes_the_attention() -> None:
    unit = disk()
    unit.attend(RESET_OCCURRED)
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(RESET_OCCURRED))
    assert unit.execute(cdb("00 00 00 00 00 00")) == Done()


def test_sense_is_kept_for_the_next_command_only() -> None:
    unit = disk()
    unit.keep_sense(INVALID_COMMAND)
    unit.attend(RESET_OCCURRED)
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(INVALID_COMMAND))
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(RESET_OCCURRED))
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(NO_SENSE))
    unit.keep_sense(INVALID_COMMAND)
    unit.execute(cdb("00 00 00 00 00 00"))
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(NO_SENSE))


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("12 00 00 00 24 00", Respond(b"\x7f" + INQUIRY[1:])),
        ("12 00 00 00 05 00", Respond(b"\x7f" + INQUIRY[1:5])),
        ("12 01 00 00 24 00", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
        ("03 00 00 00 12 00", Respond(bytes(LOGICAL_UNIT_NOT_SUPPORTED))),
        ("00 00 00 00 00 00", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
        ("12", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
        ("03", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
    ],
)
def test_absent_unit(text: str, action: Action) -> None:
    assert AbsentUnit().execute(cdb(text)) == action


def test_whatever_comes_the_action_stays_inside_the_medium() -> None:
    source = random.Random(1)
    unit = disk()
    for _ in range(20_000):
        raw = bytes((source.choice([*COMMANDS, source.randrange(256)]),)) + source.randbytes(source.randrange(16))
        if source.random() < 0.5:
            raw = bytes(byte if source.random() < 0.4 else 0 for byte in raw[1:])
            raw = bytes((source.choice([*COMMANDS]),)) + raw
        match unit.execute(raw):
            case Read(lba, count) | Write(lba, count):
                assert count > 0
                assert lba + count <= 1000
            case Respond(data):
                assert len(data) <= 255
            case Fail(sense):
                assert isinstance(sense, Sense)
