from __future__ import annotations

import pytest
from tests.scsi.media import FakeMedium

from farplug.scsi.cdb import Action, Done, Fail, Respond
from farplug.scsi.disk import COMMANDS, DiskUnit
from farplug.scsi.sense import (
    INVALID_COMMAND,
    INVALID_FIELD_IN_CDB,
    LOGICAL_UNIT_NOT_SUPPORTED,
    NO_SENSE,
    RESET_OCCURRED,
)
from farplug.scsi.unit import AbsentUnit

INQUIRY = bytes.fromhex("00 00 06 02 1f 00 00 02") + b"farplug Virtual Disk    1.0 "


def disk() -> DiskUnit:
    return DiskUnit(FakeMedium())


def cdb(text: str) -> bytes:
    return bytes.fromhex(text)


def test_a_unit_attention_is_reported_once() -> None:
    unit = disk()
    unit.raise_unit_attention(RESET_OCCURRED)
    unit.raise_unit_attention(RESET_OCCURRED)
    assert isinstance(unit.execute(cdb("12 00 00 00 24 00")), Respond)
    assert isinstance(unit.execute(cdb("a0 00 00 00 00 00 00 00 10 00 00 00")), Respond)
    assert unit.execute(cdb("00 00 00 00 00 00")) == Fail(RESET_OCCURRED)
    assert unit.execute(cdb("00 00 00 00 00 00")) == Done()


def test_a_unit_attention_is_reported_before_an_invalid_command() -> None:
    unit = disk()
    unit.raise_unit_attention(RESET_OCCURRED)
    assert unit.execute(cdb("ff")) == Fail(RESET_OCCURRED)
    assert unit.execute(cdb("ff")) == Fail(INVALID_COMMAND)


def test_request_sense_reports_the_unit_attention() -> None:
    unit = disk()
    unit.raise_unit_attention(RESET_OCCURRED)
    assert unit.execute(cdb("03 01 00 00 12 00")) == Respond(RESET_OCCURRED.descriptor_format())
    assert unit.execute(cdb("00 00 00 00 00 00")) == Done()


def test_sense_is_kept_for_the_next_command_only() -> None:
    unit = disk()
    unit.keep_sense(INVALID_COMMAND)
    unit.raise_unit_attention(RESET_OCCURRED)
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(INVALID_COMMAND))
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(RESET_OCCURRED))
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(NO_SENSE))
    unit.keep_sense(INVALID_COMMAND)
    unit.execute(cdb("00 00 00 00 00 00"))
    assert unit.execute(cdb("03 00 00 00 12 00")) == Respond(bytes(NO_SENSE))


def test_a_reset_raises_a_unit_attention() -> None:
    unit = disk()
    unit.reset()
    unit.reset()
    assert unit.execute(cdb("00 00 00 00 00 00")) == Fail(RESET_OCCURRED)
    assert unit.execute(cdb("00 00 00 00 00 00")) == Done()


THREE = "00000018 00000000  0000000000000000 0001000000000000 0002000000000000"


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("a0 00 00 00 00 00 00 00 10 00 00 00", Respond(cdb(THREE))),
        ("a0 00 02 00 00 00 00 00 10 00 00 00", Respond(cdb(THREE))),
        ("a0 00 00 00 00 00 00 00 00 18 00 00", Respond(cdb(THREE)[:24])),
        ("a0 00 00 00 00 00 00 00 00 00 00 00", Respond(b"")),
        ("a0 00 01 00 00 00 00 00 10 00 00 00", Respond(bytes(8))),
        ("a0 00 10 00 00 00 00 00 10 00 00 00", Fail(INVALID_FIELD_IN_CDB)),
    ],
)
def test_several_logical_units(text: str, action: Action) -> None:
    assert DiskUnit(FakeMedium(), luns=3).execute(cdb(text)) == action
    assert AbsentUnit(3).execute(cdb(text)) == action


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("12 00 00 00 24 00", Respond(b"\x7f" + INQUIRY[1:])),
        ("12 00 00 00 05 00", Respond(b"\x7f" + INQUIRY[1:5])),
        ("12 01 00 00 24 00", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
        ("03 00 00 00 12 00", Respond(bytes(LOGICAL_UNIT_NOT_SUPPORTED))),
        ("03 01 00 00 12 00", Respond(LOGICAL_UNIT_NOT_SUPPORTED.descriptor_format())),
        ("00 00 00 00 00 00", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
        ("a0 00 00 00 00 00 00 00 10 00 00 00", Respond(cdb("00000008 00000000") + bytes(8))),
        ("a0 00 00 00 00 00 00 00 10 00 00", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
        ("7f", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
        ("12", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
        ("03", Fail(LOGICAL_UNIT_NOT_SUPPORTED)),
    ],
)
def test_absent_unit(text: str, action: Action) -> None:
    assert AbsentUnit().execute(cdb(text)) == action


def test_no_other_command_reaches_a_logical_unit_that_does_not_exist() -> None:
    for row in COMMANDS:
        if row.opcode not in (0x03, 0x12, 0xA0):
            assert AbsentUnit().execute(row.usage) == Fail(LOGICAL_UNIT_NOT_SUPPORTED)
