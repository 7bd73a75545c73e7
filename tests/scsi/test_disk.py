from __future__ import annotations

import random
import re
import struct
from pathlib import Path

import pytest
from tests.scsi.media import FakeMedium

from farplug.scsi.cdb import (
    Action,
    Command,
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
)
from farplug.scsi.disk import COMMANDS, COMMANDS_WITHOUT_UNMAP, DiskUnit
from farplug.scsi.sense import (
    CAPACITY_CHANGED,
    INVALID_COMMAND,
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETER_LIST,
    LBA_OUT_OF_RANGE,
    NO_SENSE,
    PARAMETER_LIST_LENGTH_ERROR,
    RESET_OCCURRED,
    SAVING_PARAMETERS_NOT_SUPPORTED,
    WRITE_PROTECTED,
    Sense,
)

INQUIRY = bytes.fromhex("00 00 06 02 1f 00 00 02") + b"farplug Virtual Disk    1.0 "
PAGES = bytes.fromhex("010a" + "00" * 10 + "081204" + "00" * 17 + "0a0a0210" + "00" * 8 + "1c0a08" + "00" * 9)
PAGE_08 = bytes.fromhex("08 12 04") + bytes(17)
FIELD, RANGE, READ_ONLY = Fail(INVALID_FIELD_IN_CDB), Fail(LBA_OUT_OF_RANGE), Fail(WRITE_PROTECTED)
LIST_LENGTH, LIST_FIELD = Fail(PARAMETER_LIST_LENGTH_ERROR), Fail(INVALID_FIELD_IN_PARAMETER_LIST)


def disk(*, read_only: bool = False, blocks: int = 1000, block_size: int = 512, unmaps: bool = True) -> DiskUnit:
    return DiskUnit(FakeMedium(blocks, block_size, read_only, unmaps=unmaps and not read_only))


def cdb(text: str) -> bytes:
    return bytes.fromhex(text)


TABLE: list[tuple[str, Action]] = [
    ("00 00 00 00 00 00", Done()),
    ("00 00 00 00 00 00 ff ff", Done()),
    ("00 e0 00 00 00 00", Done()),  # a logical unit number, as SCSI-2 has it
    ("00 00 00 00 00", FIELD),
    ("00 00 00 00 00 04", FIELD),  # NACA
    ("00 01 00 00 00 00", FIELD),
    ("03 00 00 00 12 00", Respond(bytes(NO_SENSE))),
    ("03 00 00 00 04 00", Respond(bytes(NO_SENSE)[:4])),
    ("03 00 00 00 60 00", Respond(bytes(NO_SENSE))),
    ("03 01 00 00 12 00", Respond(cdb("72 00 00 00 00 00 00 00"))),
    ("03 01 00 00 02 00", Respond(cdb("72 00"))),
    ("03 02 00 00 12 00", FIELD),
    ("08 00 00 00 01 00", Read(0, 1)),
    ("08 00 00 00 00 00", Read(0, 256)),
    ("08 e0 03 e7 01 00", Read(999, 1)),
    ("08 00 03 e8 01 00", RANGE),
    ("08 08 00 00 01 00", RANGE),  # not FUA, but a block number
    ("08 00 02 e9 00 00", RANGE),
    ("0a 00 00 05 02 00", Write(5, 2, durable=False)),
    ("0a 1f ff ff 01 00", RANGE),
    ("12 00 00 00 24 00", Respond(INQUIRY)),
    ("12 00 00 00 ff 00", Respond(INQUIRY)),
    ("12 00 00 01 00 00", Respond(INQUIRY)),
    ("12 00 00 00 05 00", Respond(INQUIRY[:5])),
    ("12 00 00 00 00 00", Respond(b"")),
    ("12 02 00 00 24 00", FIELD),
    ("12 00 80 00 24 00", FIELD),
    ("12 01 00 00 04 00", Respond(cdb("00 00 00 06"))),
    ("12 01 00 00 ff 00", Respond(cdb("00 00 00 06 00 80 83 b0 b1 b2"))),
    ("12 01 80 00 ff 00", Respond(cdb("00 80 00 10") + b"0123456789ABCDEF")),
    ("12 01 81 00 ff 00", FIELD),
    ("12 01 b2 00 ff 00", Respond(cdb("00 b2 00 04 00 e4 02 00"))),
    ("15 10 00 00 00 00", Done()),
    ("15 11 00 00 00 00", FIELD),  # SP: nothing is saved
    ("1a 00 3f 00 c0 00", Respond(cdb("3b 00 10 00") + PAGES)),
    ("1a 08 3f 00 c0 00", Respond(cdb("3b 00 10 00") + PAGES)),
    ("1a 00 3f ff c0 00", Respond(cdb("3b 00 10 00") + PAGES)),
    ("1a 00 3f 00 04 00", Respond(cdb("3b 00 10 00"))),
    ("1a 00 08 00 c0 00", Respond(cdb("17 00 10 00") + PAGE_08)),
    ("1a 00 88 00 c0 00", Respond(cdb("17 00 10 00") + PAGE_08)),
    ("1a 00 48 00 c0 00", Respond(cdb("17 00 10 00") + PAGE_08)),  # the mask of WCE looks the same
    ("1a 00 c8 00 c0 00", Fail(SAVING_PARAMETERS_NOT_SUPPORTED)),
    ("1a 00 04 00 c0 00", FIELD),
    ("1a 00 08 ff c0 00", FIELD),
    ("1a 00 3f 01 c0 00", FIELD),
    ("1a 10 3f 00 c0 00", FIELD),
    ("1b 00 00 00 01 00", Done()),
    ("1b 00 00 00 00 00", Flush()),
    ("1b 01 00 00 02 00", Flush()),
    ("1e 00 00 00 01 00", Done()),
    ("1e 00 00 00 00 00", Done()),
    ("23 00 00 00 00 00 00 00 fc 00", Respond(cdb("00 00 00 08 00 00 03 e8 02 00 02 00"))),
    ("23 00 00 00 00 00 00 00 04 00", Respond(cdb("00 00 00 08"))),
    ("25 00 00 00 00 00 00 00 00 00", Respond(cdb("00 00 03 e7 00 00 02 00"))),
    ("28 00 00 00 00 00 00 00 01 00", Read(0, 1)),
    ("28 10 00 00 03 e7 00 00 01 00", Read(999, 1)),
    ("28 08 00 00 03 e7 00 00 01 00", Read(999, 1, fua=True)),
    ("28 00 00 00 00 00 00 03 e8 00", Read(0, 1000)),
    ("28 00 00 00 00 00 00 03 e9 00", RANGE),
    ("28 00 00 00 03 e8 00 00 01 00", RANGE),
    ("28 00 ff ff ff ff 00 ff ff 00", RANGE),
    ("28 00 00 00 00 05 00 00 00 00", Done()),
    ("28 00 00 00 03 e8 00 00 00 00", Done()),
    ("28 00 00 00 03 e9 00 00 00 00", RANGE),
    ("28 20 00 00 00 00 00 00 01 00", FIELD),
    ("28 e0 00 00 00 00 00 00 00 00", FIELD),
    ("2a 00 00 00 00 01 00 00 02 00", Write(1, 2, durable=False)),
    ("2a 08 00 00 00 01 00 00 02 00", Write(1, 2, durable=True, forced=True)),
    ("2a 00 00 00 00 01 00 00 00 00", Done()),
    ("2a 00 00 00 03 e7 00 00 02 00", RANGE),
    ("2a 60 00 00 00 00 00 00 01 00", FIELD),
    ("2e 00 00 00 00 01 00 00 02 00", Write(1, 2, durable=True, forced=True)),
    ("2e 12 00 00 00 01 00 00 02 00", Write(1, 2, durable=True, forced=True)),
    ("2e 00 00 00 00 01 00 00 00 00", Done()),
    ("2e 04 00 00 00 01 00 00 02 00", FIELD),
    ("2e 00 00 00 03 e7 00 00 02 00", RANGE),
    ("2f 00 00 00 00 01 00 00 02 00", Verify(1, 2)),
    ("2f 10 00 00 00 01 00 00 00 00", Done()),
    ("2f 02 00 00 00 01 00 00 02 00", Compare(1, 2)),
    ("2f 02 00 00 00 01 00 00 00 00", Done()),
    ("2f 04 00 00 00 01 00 00 02 00", FIELD),
    ("2f 06 00 00 00 01 00 00 02 00", FIELD),
    ("2f 20 00 00 00 01 00 00 02 00", FIELD),
    ("2f 00 00 00 03 e9 00 00 00 00", RANGE),
    ("2f 02 00 00 03 e7 00 00 02 00", RANGE),
    ("35 00 00 00 00 00 00 00 00 00", Flush()),
    ("35 02 ff ff ff ff 00 ff ff 00", Flush()),
    ("41 00 00 00 00 01 00 00 00 00", FIELD),  # WSNZ
    ("41 20 00 00 00 01 00 00 01 00", FIELD),
    ("41 10 00 00 00 01 00 00 01 00", FIELD),  # ANCHOR
    ("41 01 00 00 00 01 00 00 01 00", FIELD),  # NDOB is for WRITE SAME(16)
    ("41 00 00 00 03 e7 00 00 02 00", RANGE),
    ("41 08 00 00 03 e7 00 00 02 00", RANGE),
    ("42 00 00 00 00 00 00 00 00 00", Done()),
    ("42 01 00 00 00 00 00 00 18 00", FIELD),  # ANCHOR
    ("55 10 00 00 00 00 00 00 00 00", Done()),
    ("5a 00 3f 00 00 00 00 00 c0 00", Respond(cdb("00 3e 00 10 00 00 00 00") + PAGES)),
    ("5a 18 08 00 00 00 00 00 c0 00", Respond(cdb("00 1a 00 10 00 00 00 00") + PAGE_08)),
    ("5a 00 08 00 00 00 00 00 08 00", Respond(cdb("00 1a 00 10 00 00 00 00"))),
    ("5a 00 2a 00 00 00 00 00 c0 00", FIELD),
    ("88 08 00 00 00 00 00 00 00 05 00 00 00 02 00 00", Read(5, 2, fua=True)),
    ("88 00 00 00 00 01 00 00 00 05 00 00 00 02 00 00", RANGE),
    ("88 00 ff ff ff ff ff ff ff ff ff ff ff ff 00 00", FIELD),
    ("88 00 ff ff ff ff ff ff ff ff 00 00 00 01 00 00", RANGE),
    ("88 00 00 00 00 00 00 00 00 00 00 01 00 00 00 00", FIELD),  # more than the maximum transfer length
    ("8a 00 00 00 00 00 00 00 00 05 00 00 00 02 00 00", Write(5, 2, durable=False)),
    ("8e 00 00 00 00 00 00 00 00 05 00 00 00 02 00 00", Write(5, 2, durable=True, forced=True)),
    ("8f 00 00 00 00 00 00 00 00 05 00 00 00 02 00 00", Verify(5, 2)),
    ("8f 02 00 00 00 00 00 00 00 05 00 00 00 02 00 00", Compare(5, 2)),
    ("91 02 00 00 00 00 00 00 00 05 00 00 00 02 00 00", Flush()),
    ("93 01 00 00 00 00 00 00 00 05 00 00 00 02 00 00", Zero(((5, 2),), unmap=False, durable=False)),
    ("93 09 00 00 00 00 00 00 00 05 00 00 00 02 00 00", Zero(((5, 2),), unmap=True, durable=False)),
    ("93 09 00 00 00 00 00 00 00 05 00 00 00 00 00 00", FIELD),
    ("93 09 00 00 00 00 00 00 00 05 00 80 00 00 00 00", FIELD),
    ("93 09 00 00 00 00 00 00 00 05 00 7f ff ff 00 00", RANGE),
    ("9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00",
     Respond(cdb("00000000 000003e7 00000200 00 03 c000") + bytes(16))),
    ("9e 10 00 00 00 00 00 00 00 00 00 00 00 0c 00 00", Respond(cdb("00000000 000003e7 00000200"))),
    ("9e 11 00 00 00 00 00 00 00 00 00 00 00 20 00 00", Fail(INVALID_COMMAND)),
    ("a0 00 00 00 00 00 00 00 10 00 00 00", Respond(cdb("00000008 00000000") + bytes(8))),
    ("a0 00 02 00 00 00 00 00 00 08 00 00", Respond(cdb("00000008 00000000"))),
    ("a0 00 01 00 00 00 00 00 10 00 00 00", Respond(bytes(8))),
    ("a0 00 03 00 00 00 00 00 10 00 00 00", FIELD),
    ("a3 0a 00 00 00 00 00 00 00 10 00 00", Fail(INVALID_COMMAND)),
    ("a8 00 00 00 00 05 00 00 00 02 00 00", Read(5, 2)),
    ("aa 08 00 00 00 05 00 00 00 02 00 00", Write(5, 2, durable=True, forced=True)),
    ("ae 00 00 00 00 05 00 00 00 02 00 00", Write(5, 2, durable=True, forced=True)),
    ("af 02 00 00 00 05 00 00 00 02 00 00", Compare(5, 2)),
    ("85 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00", Fail(INVALID_COMMAND)),
    ("ff", Fail(INVALID_COMMAND)),
    ("9e", Fail(INVALID_COMMAND)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "action"), TABLE, ids=[text for text, _ in TABLE])
def test_commands(text: str, action: Action) -> None:
    unit = disk()
    assert unit.execute(cdb(text)) == action
    assert unit.execute(memoryview(cdb(text))) == action


def test_every_other_opcode_is_invalid() -> None:
    unit = disk()
    known = bytes.fromhex(
        "00 03 08 0a 12 15 1a 1b 1e 23 25 28 2a 2e 2f 35 41 42 55 5a 88 8a 8e 8f 91 93 9e a0 a3 a8 aa ae af"
    )
    assert [row.opcode for row in COMMANDS] == list(known)
    for opcode in set(range(256)) - set(known):
        assert unit.execute(bytes((opcode,)) + bytes(15)) == Fail(INVALID_COMMAND)


def test_the_documentation_lists_every_command() -> None:
    text = (Path(__file__).parents[2] / "docs" / "disk.md").read_text()
    listed = re.findall(r"^\| ([0-9A-F]{2})(?:/([0-9A-F]{2}))? \| ([^|]+) \|", text, re.MULTILINE)
    assert [(int(opcode, 16), int(action, 16) if action else None, name) for opcode, action, name in listed] == [
        (row.opcode, row.service_action, row.name) for row in COMMANDS
    ]


@pytest.mark.parametrize("row", [*COMMANDS], ids=str)
def test_reserved_bits_and_short_cdbs(row: Command[DiskUnit]) -> None:
    unit = disk()
    fixed = 1 if row.service_action is None else 2
    plain = row.usage[:fixed].ljust(row.length, b"\0")
    for index in range(fixed, row.length):
        ignored = row.usage[index] | (0xE0 if index == 1 else 0)
        for bit in (1 << number for number in range(8)):
            if not ignored & bit:
                assert unit.execute(plain[:index] + bytes((bit,)) + plain[index + 1 :]) == FIELD
    for length in range(fixed, row.length):
        assert unit.execute(plain[:length]) == FIELD


# Data-out that says what to do


def finish(unit: DiskUnit, text: str, data: bytes) -> Outcome:
    """A command that receives parameters, and what it does with them."""
    action = unit.execute(cdb(text))
    assert isinstance(action, Receive)
    assert action.length >= len(data)
    return action.then(data)


BLOCK = bytes(511) + b"\1"


@pytest.mark.parametrize(
    ("text", "block", "outcome"),
    [
        ("41 00 00 00 00 05 00 00 02 00", bytes(512), Zero(((5, 2),), unmap=False, durable=False)),
        ("41 08 00 00 00 05 00 00 02 00", bytes(512), Zero(((5, 2),), unmap=True, durable=False)),
        ("41 08 00 00 00 05 00 00 02 00", BLOCK, Fill(5, 2, BLOCK, durable=False)),
        ("93 00 00 00 00 00 00 00 00 05 00 00 00 02 00 00", BLOCK, Fill(5, 2, BLOCK, durable=False)),
        (
            "93 08 00 00 00 00 00 00 00 05 00 00 00 02 00 00",
            bytes(512),
            Zero(((5, 2),), unmap=True, durable=False),
        ),
    ],
)
def test_write_same(text: str, block: bytes, outcome: Outcome) -> None:
    unit = disk()
    action = unit.execute(cdb(text))
    assert isinstance(action, Receive)
    assert action.length == 512
    assert action.then(bytearray(block)) == outcome


def test_write_same_takes_what_linux_sends_without_knowing_the_limits() -> None:
    unit = disk(blocks=2**33)
    text = "93 08 00 00 00 01 00 00 00 00 00 7f ff ff 00 00"
    assert finish(unit, text, bytes(512)) == Zero(((2**32, 0x7FFFFF),), unmap=True, durable=False)


UNMAP = "42 00 00 00 00 00 00 ff ff 00"


def unmap_list(*extents: tuple[int, int], lie: int = 0, data_lie: int = 0) -> bytes:
    listed = b"".join(struct.pack(">QI4x", lba, count) for lba, count in extents)
    return struct.pack(">HH4x", len(listed) + 6 + data_lie, len(listed) + lie) + listed


@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        (unmap_list((0, 1)), Zero(((0, 1),), unmap=True, durable=False)),
        (unmap_list((0, 1000)), Zero(((0, 1000),), unmap=True, durable=False)),
        (unmap_list((5, 2), (999, 1)), Zero(((5, 2), (999, 1)), unmap=True, durable=False)),
        (unmap_list((5, 2), (7, 0)), Zero(((5, 2),), unmap=True, durable=False)),
        (unmap_list((5, 0)), Done()),
        (unmap_list(), Done()),
        (unmap_list((5, 2)) + bytes(9), Zero(((5, 2),), unmap=True, durable=False)),
        (unmap_list((5, 2), lie=-1), Done()),  # an incomplete one is ignored
        (unmap_list((5, 2), (7, 1), lie=-1), Zero(((5, 2),), unmap=True, durable=False)),
        (unmap_list((0, 1), (999, 2)), RANGE),
        (unmap_list((2**64 - 1, 2**32 - 1)), LIST_FIELD),
        (unmap_list((2**64 - 1, 1)), RANGE),
        (unmap_list((5, 2), lie=1), LIST_LENGTH),
        (unmap_list((5, 2), lie=0x8000), LIST_LENGTH),
        (unmap_list((5, 2), data_lie=1), LIST_LENGTH),
        (unmap_list((5, 2))[:-1], LIST_LENGTH),
        (bytes(7), LIST_LENGTH),
        (b"\0", LIST_LENGTH),
        (bytes(8), Done()),
        (unmap_list(*[(0, 1)] * 256), Zero(((0, 1),) * 256, unmap=True, durable=False)),
        (unmap_list(*[(0, 1)] * 257), LIST_FIELD),
    ],
)
def test_unmap(data: bytes, outcome: Outcome) -> None:
    unit = disk()
    assert finish(unit, UNMAP, data) == outcome
    assert finish(unit, UNMAP, bytearray(data)) == outcome  # type: ignore[arg-type]


def test_a_store_that_cannot_enable_unmap() -> None:
    unit = disk(unmaps=False)
    assert unit.execute(cdb(UNMAP)) == Fail(INVALID_COMMAND)
    assert unit.execute(cdb("41 08 00 00 00 05 00 00 02 00")) == FIELD
    assert unit.execute(cdb("93 09 00 00 00 00 00 00 00 05 00 00 00 02 00 00")) == FIELD
    assert finish(unit, "41 00 00 00 00 05 00 00 02 00", BLOCK) == Fill(5, 2, BLOCK, durable=False)
    capacity = unit.execute(cdb("9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00"))
    assert isinstance(capacity, Respond)
    assert capacity.data[14:16] == b"\0\0"
    assert {row.name for row in COMMANDS} - {row.name for row in COMMANDS_WITHOUT_UNMAP} == {"UNMAP"}


UNCACHED = bytes.fromhex("08 12 00") + bytes(17)


@pytest.mark.parametrize(
    ("text", "data", "outcome"),
    [
        ("15 10 00 00 18 00", bytes(4) + UNCACHED, Flush()),
        ("15 00 00 00 18 00", bytes(4) + UNCACHED, Flush()),
        ("15 10 00 00 18 00", bytes(4) + PAGE_08, Done()),
        ("55 10 00 00 00 00 00 00 1c 00", bytes(8) + UNCACHED, Flush()),
        ("55 10 00 00 00 00 00 00 1c 00", cdb("17 00 90 00 00 00 00 00") + PAGE_08, Done()),
        ("15 10 00 00 04 00", bytes(4), Done()),
        ("15 10 00 00 03 00", bytes(3), LIST_LENGTH),
        ("55 10 00 00 00 00 00 00 07 00", bytes(7), LIST_LENGTH),
        ("15 10 00 00 17 00", bytes(4) + UNCACHED[:19], LIST_LENGTH),
        ("15 10 00 00 20 00", cdb("00 00 00 08") + bytes(8) + UNCACHED, LIST_FIELD),
        ("55 10 00 00 00 00 00 00 24 00", cdb("00 00 00 00 00 00 00 08") + bytes(8) + UNCACHED, LIST_FIELD),
        ("15 10 00 00 18 00", bytes(4) + b"\x08\x12\x05" + bytes(17), LIST_FIELD),
    ],
)
def test_mode_select(text: str, data: bytes, outcome: Outcome) -> None:
    assert finish(disk(), text, data) == outcome


def test_without_a_write_cache_everything_is_durable() -> None:
    unit = disk()
    assert finish(unit, "15 10 00 00 18 00", bytes(4) + UNCACHED) == Flush()
    assert finish(unit, "15 10 00 00 18 00", bytes(4) + UNCACHED) == Done()
    assert unit.execute(cdb("1a 00 08 00 c0 00")) == Respond(cdb("17 00 10 00") + UNCACHED)
    assert unit.execute(cdb("2a 00 00 00 00 01 00 00 02 00")) == Write(1, 2, durable=True)
    assert unit.execute(cdb("0a 00 00 01 02 00")) == Write(1, 2, durable=True)
    assert finish(unit, "41 00 00 00 00 05 00 00 02 00", BLOCK) == Fill(5, 2, BLOCK, durable=True)
    assert finish(unit, "41 08 00 00 00 05 00 00 02 00", bytes(512)) == Zero(((5, 2),), unmap=True, durable=True)
    assert finish(unit, UNMAP, unmap_list((0, 1))) == Zero(((0, 1),), unmap=True, durable=True)
    unit.attend(RESET_OCCURRED)  # a reset must not make a host believe in durability that is no more
    unit.execute(cdb("00 00 00 00 00 00"))
    assert unit.execute(cdb("0a 00 00 01 02 00")) == Write(1, 2, durable=True)
    assert finish(unit, "15 10 00 00 18 00", bytes(4) + PAGE_08) == Done()
    assert unit.execute(cdb("0a 00 00 01 02 00")) == Write(1, 2, durable=False)


def test_a_store_without_a_write_cache() -> None:
    unit = DiskUnit(FakeMedium(write_cache=False))
    assert unit.execute(cdb("1a 00 08 00 c0 00")) == Respond(cdb("17 00 10 00") + UNCACHED)
    assert unit.execute(cdb("1a 00 48 00 c0 00")) == Respond(cdb("17 00 10 00") + UNCACHED)
    assert unit.execute(cdb("2a 00 00 00 00 01 00 00 02 00")) == Write(1, 2, durable=False)  # it is anyway
    assert unit.execute(cdb("2a 08 00 00 00 01 00 00 02 00")) == Write(1, 2, durable=True, forced=True)
    assert finish(unit, "15 10 00 00 18 00", bytes(4) + PAGE_08) == LIST_FIELD
    assert finish(unit, "15 10 00 00 18 00", bytes(4) + UNCACHED) == Done()


# Sizes, protection, attention


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("2a 00 00 00 00 01 00 00 02 00", READ_ONLY),
        ("2a 00 00 00 00 01 00 00 00 00", READ_ONLY),
        ("2a 00 ff ff ff ff 00 00 00 00", READ_ONLY),
        ("0a 00 00 01 02 00", READ_ONLY),
        ("2e 00 00 00 00 01 00 00 02 00", READ_ONLY),
        ("41 00 00 00 00 01 00 00 02 00", READ_ONLY),
        ("93 01 00 00 00 00 00 00 00 05 00 00 00 02 00 00", READ_ONLY),
        (UNMAP, Fail(INVALID_COMMAND)),
        ("28 00 00 00 00 01 00 00 02 00", Read(1, 2)),
        ("2f 00 00 00 00 01 00 00 02 00", Verify(1, 2)),
        ("1a 00 3f 00 04 00", Respond(cdb("3b 00 90 00"))),
        ("35 00 00 00 00 00 00 00 00 00", Flush()),
    ],
)
def test_read_only(text: str, action: Action) -> None:
    assert disk(read_only=True).execute(cdb(text)) == action


def test_a_medium_that_unmaps_although_it_is_read_only() -> None:
    assert DiskUnit(FakeMedium(read_only=True)).execute(cdb(UNMAP)) == READ_ONLY


@pytest.mark.parametrize(
    ("blocks", "short", "long"),
    [
        (1, "00000000", "0000000000000000"),
        (2**31, "7fffffff", "000000007fffffff"),
        (2**32, "ffffffff", "00000000ffffffff"),
        (2**32 + 1, "ffffffff", "0000000100000000"),
        (6 * 2**30, "ffffffff", "000000017fffffff"),  # 3 TiB
    ],
)
@pytest.mark.parametrize(("block_size", "size"), [(512, "00000200"), (4096, "00001000")])
def test_capacity(blocks: int, short: str, long: str, block_size: int, size: str) -> None:
    unit = disk(blocks=blocks, block_size=block_size)
    assert unit.execute(cdb("25 00 00 00 00 00 00 00 00 00")) == Respond(cdb(short + size))
    answer = unit.execute(cdb("9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00"))
    exponent = "03" if block_size == 512 and blocks % 8 == 0 else "00"
    assert answer == Respond(cdb(long + size + "00" + exponent + "c000") + bytes(16))
    formatted = unit.execute(cdb("23 00 00 00 00 00 00 00 fc 00"))
    count = min(blocks, 2**32 - 1)
    assert formatted == Respond(struct.pack(">3xBIBI", 8, count, 2, block_size)[:9] + struct.pack(">I", block_size)[1:])


def test_the_far_end_of_a_large_disk() -> None:
    unit = disk(blocks=6 * 2**30)
    assert unit.execute(struct.pack(">BxQIxx", 0x88, 6 * 2**30 - 1, 1)) == Read(6 * 2**30 - 1, 1)
    assert unit.execute(struct.pack(">BxQIxx", 0x8A, 6 * 2**30 - 1, 2)) == RANGE
    assert unit.execute(struct.pack(">BxQIxx", 0x88, 2**64 - 1, 0xFFFF)) == RANGE


def test_one_block() -> None:
    unit = disk(blocks=1)
    assert unit.execute(cdb("28 00 00 00 00 00 00 00 01 00")) == Read(0, 1)
    assert unit.execute(cdb("28 00 00 00 00 01 00 00 01 00")) == RANGE
    assert unit.execute(cdb("08 00 00 00 00 00")) == RANGE


def test_a_new_size_is_reported_once() -> None:
    medium = FakeMedium()
    unit = DiskUnit(medium)
    for size in (2000, 500):
        medium.block_count = size
        assert unit.execute(cdb("12 00 00 00 24 00")) == Respond(INQUIRY)
        assert unit.execute(cdb("25 00 00 00 00 00 00 00 00 00")) == Fail(CAPACITY_CHANGED)
        assert unit.execute(cdb("25 00 00 00 00 00 00 00 00 00")) == Respond(struct.pack(">II", size - 1, 512))
        assert unit.execute(struct.pack(">BxIxHx", 0x28, size - 1, 1)) == Read(size - 1, 1)
        assert unit.execute(struct.pack(">BxIxHx", 0x28, size, 1)) == RANGE


def test_unit_attentions_come_in_order() -> None:
    medium = FakeMedium()
    unit = DiskUnit(medium)
    unit.attend(RESET_OCCURRED)
    medium.block_count = 5
    assert unit.execute(cdb("00 00 00 00 00 00")) == Fail(RESET_OCCURRED)
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(CAPACITY_CHANGED))
    assert unit.execute(cdb("00 00 00 00 00 00")) == Done()


def inside(action: Action) -> None:
    """Whatever is asked for stays inside the medium, and below what there is memory for."""
    match action:
        case Read(lba, count) | Write(lba, count) | Compare(lba, count) | Verify(lba, count) | Fill(lba, count):
            assert count > 0
            assert lba + count <= 1000
        case Zero(extents):
            assert all(count > 0 and lba + count <= 1000 for lba, count in extents)
        case Respond(data):
            assert len(data) <= 1000
        case Receive(length):
            assert 0 < length <= 0xFFFF
        case Fail(sense):
            assert isinstance(sense, Sense)


def test_whatever_comes_the_action_stays_inside_the_medium() -> None:
    source = random.Random(1)
    unit = disk()
    opcodes = [row.opcode for row in COMMANDS]
    for _ in range(30_000):
        raw = bytes((source.choice([*opcodes, source.randrange(256)]),)) + source.randbytes(source.randrange(16))
        if source.random() < 0.6:
            row = source.choice([*COMMANDS])
            masked = (source.randrange(256) & mask if source.random() < 0.3 else 0 for mask in row.usage)
            fixed = 1 if row.service_action is None else 2
            raw = row.usage[:fixed] + bytes(masked)[fixed:]
        action = unit.execute(raw)
        inside(action)
        if isinstance(action, Receive):
            data = source.randbytes(action.length)
            if source.random() < 0.5:
                count = source.randrange(5)
                data = unmap_list(*((source.randrange(1100), source.randrange(200)) for _ in range(count)))
                data = data[: action.length]
            inside(action.then(data))
