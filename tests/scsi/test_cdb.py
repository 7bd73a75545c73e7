from __future__ import annotations

import pytest

from farplug.scsi.cdb import Action, Command, Done, cdb_length, command_table
from farplug.usb import Buffer


def ready(unit: object, cdb: Buffer) -> Action:
    return Done()


@pytest.mark.parametrize(
    ("opcode", "length"),
    [(0x00, 6), (0x1F, 6), (0x28, 10), (0x5A, 10), (0x7F, None), (0x88, 16), (0xA8, 12), (0xC0, None), (0xFF, None)],
)
def test_length_by_group(opcode: int, length: int | None) -> None:
    assert cdb_length(opcode) == length


def test_row() -> None:
    command = Command("READ(10)", bytes.fromhex("28 1a ff ff ff ff 3f ff ff 00"), ready)
    assert (command.opcode, command.length, str(command)) == (0x28, 10, "READ(10)")
    assert command.forbidden == int.from_bytes(bytes.fromhex("00 e5 00 00 00 00 c0 00 00 ff"))
    assert command_table([command]) == {0x28: command}


@pytest.mark.parametrize("usage", ["28 00", "7f 00 00 00 00 00", "00 00 00 00 00 00 00"])
def test_a_row_of_the_wrong_length_is_refused(usage: str) -> None:
    with pytest.raises(ValueError, match="opcode"):
        Command("BAD", bytes.fromhex(usage), ready)
