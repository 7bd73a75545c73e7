from __future__ import annotations

import pytest

from farplug.scsi.cdb import Action, Command, CommandTable, Done, cdb_length, extent
from farplug.usb import Buffer


def ready(unit: object, cdb: Buffer) -> Action:
    return Done()


def row(usage: str) -> Command[object]:
    return Command("NAME", bytes.fromhex(usage), ready)


@pytest.mark.parametrize(
    ("opcode", "length"),
    [(0x00, 6), (0x1F, 6), (0x28, 10), (0x5A, 10), (0x7F, None), (0x88, 16), (0xA8, 12), (0xC0, None), (0xFF, None)],
)
def test_length_by_group(opcode: int, length: int | None) -> None:
    assert cdb_length(opcode) == length


def test_row() -> None:
    command = Command("READ(10)", bytes.fromhex("28 1a ff ff ff ff 3f ff ff 00"), ready)
    assert (command.opcode, command.service_action, command.length, str(command)) == (0x28, None, 10, "READ(10)")
    # the first three bits of byte 1: a logical unit number in SCSI-2
    assert command.forbidden == int.from_bytes(bytes.fromhex("00 05 00 00 00 00 c0 00 00 ff"))


@pytest.mark.parametrize("usage", ["28 00", "7f 00 00 00 00 00", "00 00 00 00 00 00 00"])
def test_a_row_of_the_wrong_length_is_refused(usage: str) -> None:
    with pytest.raises(ValueError, match="opcode"):
        row(usage)


def test_table() -> None:
    ten = row("9e 10" + " 00" * 14)
    twelve = row("9e 12" + " 00" * 14)
    read = row("28" + " 00" * 9)
    table = CommandTable((ten, read, twelve))
    assert list(table) == [read, ten, twelve]
    assert ten.service_action == 0x10
    assert table.find(b"\x28") is read
    assert table.find(b"\x28\x10") is read
    assert table.find(b"\x9e\xf0") is ten
    assert table.find(b"\x9e\x12") is twelve
    for unknown in (b"\x9e", b"\x9e\0", b"\x9e\x11", b"\x9f\x10", b"\x10"):
        assert table.find(unknown) is None


@pytest.mark.parametrize(
    ("cdb", "expected"),
    [
        ("08 ff ff ff 07 00", (0x1FFFFF, 7, 0)),
        ("0a 00 00 01 00 00", (1, 256, 0)),
        ("28 1a 01 02 03 04 00 05 06 00", (0x01020304, 0x0506, 0x1A)),
        ("a8 08 01 02 03 04 05 06 07 08 00 00", (0x01020304, 0x05060708, 0x08)),
        ("88 e8 01 02 03 04 05 06 07 08 11 12 13 14 00 00", (0x0102030405060708, 0x11121314, 0xE8)),
    ],
)
def test_extent(cdb: str, expected: tuple[int, int, int]) -> None:
    assert extent(bytes.fromhex(cdb)) == expected
