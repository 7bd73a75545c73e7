from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from tests.scsi.media import FakeMedium

from farplug.errors import StateError
from farplug.scsi.cdb import Action, Command, Done, Fail, Read, Receive, Respond, Verify
from farplug.scsi.cdrom import COMMANDS, CdromUnit
from farplug.scsi.mmc import Profile, configuration, disc_information, dvd_structure, raw_toc, sessions, toc
from farplug.scsi.mmc import track_information as track
from farplug.scsi.sense import (
    ILLEGAL_MODE_FOR_THIS_TRACK,
    INCOMPATIBLE_FORMAT,
    INVALID_COMMAND,
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_PARAMETER_LIST,
    LBA_OUT_OF_RANGE,
    MEDIUM_MAY_HAVE_CHANGED,
    MEDIUM_NOT_PRESENT_TRAY_CLOSED,
    MEDIUM_NOT_PRESENT_TRAY_OPEN,
    NO_SENSE,
    REMOVAL_PREVENTED,
    RESET_OCCURRED,
    SAVING_PARAMETERS_NOT_SUPPORTED,
)

FIELD, RANGE = Fail(INVALID_FIELD_IN_CDB), Fail(LBA_OUT_OF_RANGE)
OPEN, CLOSED = Fail(MEDIUM_NOT_PRESENT_TRAY_OPEN), Fail(MEDIUM_NOT_PRESENT_TRAY_CLOSED)
CHANGED = Fail(MEDIUM_MAY_HAVE_CHANGED)

INQUIRY = bytes.fromhex("05 80 06 02 1f 00 00 02") + b"farplug Virtual CD-ROM  1.0 "
PAGE_01 = "01 0a 00 00 00 00 00 00 00 00 00 00"
PAGE_0D = "0d 06 00 0d 00 3c 00 4b"
PAGE_0E = "0e 0e 04 00 00 00 00 00 00 00 00 00 00 00 00 00"
PAGE_2A = "2a 14 0b 00 00 00 29 00 22 60 00 00 08 00 22 60 00 00 00 00 00 00"
LOCKED = PAGE_2A.replace("29", "2b")
PAGES = bytes.fromhex(PAGE_01 + PAGE_0D + PAGE_0E + PAGE_2A)

TUR = "00 00 00 00 00 00"
SENSE = "03 00 00 00 12 00"
EJECT, LOAD = "1b 00 00 00 02 00", "1b 00 00 00 03 00"
PREVENT, ALLOW = "1e 00 00 00 01 00", "1e 00 00 00 00 00"
EVENT = "4a 01 00 00 10 00 00 00 08 00"


def cdb(text: str) -> bytes:
    return bytes.fromhex(text)


class Drive:
    """A unit and its callbacks."""

    def __init__(self, blocks: int | None = 1000) -> None:
        self.ejected = 0
        self.prevented: list[bool] = []
        medium = None if blocks is None else disc(blocks)
        self.unit = CdromUnit(medium, serial_number="0042", ejected=self._ejected, prevented=self.prevented.append)

    def _ejected(self) -> None:
        self.ejected += 1

    def __call__(self, text: str) -> Action:
        return self.unit.execute(cdb(text))


def disc(blocks: int = 1000) -> FakeMedium:
    return FakeMedium(blocks, 2048, read_only=True, unmaps=False)


TABLE: list[tuple[str, Action]] = [
    (TUR, Done()),
    (SENSE, Respond(bytes(NO_SENSE))),
    ("12 00 00 00 24 00", Respond(INQUIRY)),
    ("12 00 00 00 05 00", Respond(INQUIRY[:5])),
    ("12 01 00 00 ff 00", Respond(cdb("05 00 00 03 00 80 83"))),
    ("12 01 80 00 ff 00", Respond(cdb("05 80 00 04") + b"0042")),
    ("12 01 b0 00 ff 00", FIELD),
    ("1a 00 3f 00 ff 00", Respond(cdb("3d 00 00 00") + PAGES)),
    ("1a 08 2a 00 1a 00", Respond(cdb("19 00 00 00" + PAGE_2A))),
    ("5a 00 2a 00 00 00 00 00 80 00", Respond(cdb("00 1c 00 00 00 00 00 00" + PAGE_2A))),
    ("5a 00 2a 00 00 00 00 00 0a 00", Respond(cdb("00 1c 00 00 00 00 00 00 2a 14"))),
    ("5a 08 01 00 00 00 00 00 80 00", Respond(cdb("00 12 00 00 00 00 00 00" + PAGE_01))),
    ("5a 08 0d 00 00 00 00 00 80 00", Respond(cdb("00 0e 00 00 00 00 00 00" + PAGE_0D))),
    ("5a 08 0e 00 00 00 00 00 80 00", Respond(cdb("00 16 00 00 00 00 00 00" + PAGE_0E))),
    ("5a 08 6a 00 00 00 00 00 80 00", Respond(cdb("00 1c 00 00 00 00 00 00 2a 14") + bytes(20))),
    ("5a 08 ea 00 00 00 00 00 80 00", Fail(SAVING_PARAMETERS_NOT_SUPPORTED)),
    ("5a 00 08 00 00 00 00 00 80 00", FIELD),
    ("1b 00 00 00 00 00", Done()),
    ("1b 00 00 00 01 00", Done()),
    ("1b 00 00 00 32 00", Done()),  # a power condition: LOEJ does not count
    ("25 00 00 00 00 00 00 00 00 00", Respond(cdb("00 00 03 e7 00 00 08 00"))),
    ("28 00 00 00 00 10 00 00 01 00", Read(16, 1)),
    ("28 e0 00 00 00 10 00 00 01 00", Read(16, 1)),  # a logical unit number, as SCSI-2 has it
    ("28 18 00 00 00 10 00 00 01 00", Read(16, 1)),
    ("28 00 00 00 00 00 00 03 e8 00", Read(0, 1000)),
    ("28 00 00 00 00 01 00 03 e8 00", RANGE),
    ("28 00 ff ff ff ff 00 00 01 00", RANGE),
    ("28 00 00 00 03 e8 00 00 00 00", Done()),
    ("28 00 00 00 03 e9 00 00 00 00", RANGE),
    ("a8 00 00 00 00 10 00 00 00 02 00 00", Read(16, 2)),
    ("a8 00 00 00 00 10 00 00 00 02 80 00", Read(16, 2)),  # streaming
    ("a8 00 00 00 00 00 00 01 00 00 00 00", FIELD),
    ("a8 00 ff ff ff ff ff ff ff ff 00 00", FIELD),
    ("2b 00 00 00 03 e7 00 00 00 00", Done()),
    ("2b 00 00 00 03 e8 00 00 00 00", RANGE),
    ("2f 00 00 00 00 10 00 00 02 00", Verify(16, 2)),
    ("2f 00 00 00 00 10 00 00 00 00", Done()),
    ("2f 00 00 00 03 e7 00 00 02 00", RANGE),
    ("2f 02 00 00 00 10 00 00 02 00", FIELD),
    ("be 00 00 00 00 10 00 00 02 10 00 00", Read(16, 2)),
    ("be 08 00 00 00 10 00 00 02 10 00 00", Read(16, 2)),
    ("be 00 00 00 00 10 00 00 02 00 00 00", Done()),
    ("be 00 00 00 00 10 00 00 00 10 00 00", Done()),
    ("be 00 00 00 03 e7 00 00 02 10 00 00", RANGE),
    ("be 00 00 00 00 00 ff ff ff 10 00 00", FIELD),
    ("be 04 00 00 00 10 00 00 02 10 00 00", Fail(ILLEGAL_MODE_FOR_THIS_TRACK)),  # audio
    ("be 0c 00 00 00 10 00 00 02 10 00 00", Fail(ILLEGAL_MODE_FOR_THIS_TRACK)),  # mode 2
    ("be 00 00 00 00 10 00 00 02 f8 00 00", FIELD),
    ("be 00 00 00 00 10 00 00 02 10 01 00", FIELD),
    ("43 00 00 00 00 00 00 03 24 00", Respond(toc(1000, 0, msf=False) or b"")),
    ("43 02 00 00 00 00 aa 00 0c 00", Respond(toc(1000, 0xAA, msf=True) or b"")),
    ("43 00 00 00 00 00 00 00 0c 00", Respond((toc(1000, 0, msf=False) or b"")[:12])),
    ("43 00 00 00 00 00 02 03 24 00", FIELD),
    ("43 00 01 00 00 00 00 00 0c 00", Respond(sessions(msf=False))),
    ("43 02 00 00 00 00 00 00 0c 40", Respond(sessions(msf=True))),
    ("43 02 00 00 00 00 00 ff fe 80", Respond(raw_toc(1000))),
    ("43 00 02 00 00 00 01 ff fe 00", Respond(raw_toc(1000))),
    ("43 02 02 00 00 00 02 ff fe 00", FIELD),
    ("43 02 01 00 00 00 00 ff fe 80", Respond(sessions(msf=True))),  # the format is where MMC has it
    ("43 02 00 00 00 00 00 ff fe c0", FIELD),
    ("43 00 04 00 00 00 00 00 0c 00", FIELD),
    ("46 00 00 00 00 00 00 ff ff 00", Respond(configuration(Profile.CD_ROM, 0))),
    ("46 00 00 28 00 00 00 00 10 00", Respond(cdb("00000004 00000008"))),
    ("46 01 00 1d 00 00 00 00 14 00", Respond(configuration(Profile.CD_ROM, 0x1D, current=True))),
    ("46 02 00 00 00 00 00 00 0c 00", Respond(configuration(Profile.CD_ROM, 0, single=True)[:12])),
    ("46 03 00 00 00 00 00 00 0c 00", FIELD),
    (EVENT, Respond(cdb("00 06 04 10 00 02 00 00"))),
    ("4a 01 00 00 7e 00 00 00 04 00", Respond(cdb("00 06 04 10"))),
    ("4a 01 00 00 6e 00 00 00 08 00", Respond(cdb("00 02 80 10"))),
    ("4a 01 00 00 00 00 00 00 08 00", Respond(cdb("00 02 80 10"))),
    ("4a 00 00 00 10 00 00 00 08 00", FIELD),
    ("51 00 00 00 00 00 00 00 02 00", Respond(cdb("00 20"))),
    ("51 00 00 00 00 00 00 00 ff 00", Respond(disc_information())),
    ("51 01 00 00 00 00 00 00 ff 00", FIELD),
    ("52 01 00 00 00 01 00 00 24 00", Respond(track(1000))),
    ("52 02 00 00 00 01 00 00 24 00", Respond(track(1000))),
    ("52 00 00 00 03 e7 00 00 08 00", Respond(track(1000)[:8])),
    ("52 00 00 00 03 e8 00 00 24 00", FIELD),
    ("52 01 00 00 00 02 00 00 24 00", FIELD),
    ("52 01 00 00 00 ff 00 00 24 00", FIELD),
    ("52 03 00 00 00 01 00 00 24 00", FIELD),
    ("52 05 00 00 00 01 00 00 24 00", FIELD),
    ("a0 00 00 00 00 00 00 00 10 00 00 00", Respond(cdb("00000008 00000000") + bytes(8))),
    ("a3 0c 00 00 00 00 00 00 10 00 00 00", Fail(INVALID_COMMAND)),  # here it is SEND KEY
    ("a4 00 00 00 00 00 00 00 00 08 3f 00", Fail(INVALID_COMMAND)),
    ("ad 00 00 00 00 00 00 00 08 04 00 00", Fail(INCOMPATIBLE_FORMAT)),
    ("bd 00 00 00 00 00 00 00 00 08 00 00", Respond(cdb("00 00 00 00 00 01 00 00"))),
    ("2a 00 00 00 00 01 00 00 02 00", Fail(INVALID_COMMAND)),
    ("35 00 00 00 00 00 00 00 00 00", Fail(INVALID_COMMAND)),
    ("42 02 40 01 00 00 00 00 10 00", Fail(INVALID_COMMAND)),
]  # fmt: skip


@pytest.mark.parametrize(("text", "action"), TABLE, ids=[text for text, _ in TABLE])
def test_commands(text: str, action: Action) -> None:
    drive = Drive()
    assert drive(text) == action
    assert drive.unit.execute(memoryview(cdb(text))) == action


def test_every_other_opcode_is_invalid() -> None:
    drive = Drive()
    known = bytes.fromhex("00 03 12 15 1a 1b 1e 25 28 2b 2f 43 46 4a 51 52 55 5a a0 a8 ad bd be")
    assert [row.opcode for row in COMMANDS] == list(known)
    for opcode in set(range(256)) - set(known):
        assert drive.unit.execute(bytes((opcode,)) + bytes(15)) == Fail(INVALID_COMMAND)


def test_the_documentation_lists_every_command() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cdrom.md").read_text()
    listed = re.findall(r"^\| ([0-9A-F]{2}) \| ([^|]+) \|", text, re.MULTILINE)
    assert [(int(opcode, 16), name) for opcode, name in listed] == [(row.opcode, row.name) for row in COMMANDS]


@pytest.mark.parametrize("row", [*COMMANDS], ids=str)
def test_reserved_bits_and_short_cdbs(row: Command[CdromUnit]) -> None:
    drive = Drive()
    plain = row.usage[:1].ljust(row.length, b"\0")
    for index in range(1, row.length):
        ignored = row.usage[index] | (0xE0 if index == 1 else 0)
        for bit in (1 << number for number in range(8)):
            if not ignored & bit:
                assert drive.unit.execute(plain[:index] + bytes((bit,)) + plain[index + 1 :]) == FIELD
    for length in range(1, row.length):
        assert drive.unit.execute(plain[:length]) == FIELD


def test_a_dvd() -> None:
    drive = Drive(500_000)
    assert drive("ad 00 00 00 00 00 00 00 08 04 00 00") == Respond(dvd_structure(500_000, 0) or b"")
    assert drive("ad 00 00 00 00 00 00 01 00 08 00 00") == Respond(dvd_structure(500_000, 1) or b"")
    assert drive("ad 00 00 00 00 00 00 04 08 04 00 00") == FIELD
    assert drive("ad 01 00 00 00 00 00 00 08 04 00 00") == FIELD  # Blu-ray
    assert drive("ad 00 00 00 00 00 01 00 08 04 00 00") == FIELD  # a second layer
    assert drive("46 00 ff ff 00 00 00 00 08 00") == Respond(cdb("00000004 00000010"))
    assert drive("25 00 00 00 00 00 00 00 00 00") == Respond(cdb("00 07 a1 1f 00 00 08 00"))


def test_mode_select_accepts_unchanged_pages() -> None:
    action = Drive()("55 10 00 00 00 00 00 00 1e 00")
    assert isinstance(action, Receive)
    assert action.then(bytes(8) + cdb(PAGE_2A)) == Done()
    assert action.then(bytes(8) + cdb(LOCKED)) == Fail(INVALID_FIELD_IN_PARAMETER_LIST)


def test_other_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="2048 bytes, not 512"):
        CdromUnit(FakeMedium(), serial_number="0042")
    drive = Drive(None)
    with pytest.raises(ValueError, match="2048 bytes, not 4096"):
        drive.unit.insert(FakeMedium(block_size=4096))
    assert not drive.unit.loaded


# The tray

NEEDS_MEDIUM = [
    TUR,
    "25 00 00 00 00 00 00 00 00 00",
    "28 00 00 00 00 10 00 00 01 00",
    "28 00 00 00 00 10 00 00 00 00",
    "2b 00 00 00 00 00 00 00 00 00",
    "2f 00 00 00 00 10 00 00 02 00",
    "43 00 00 00 00 00 00 03 24 00",
    "51 00 00 00 00 00 00 00 02 00",
    "52 01 00 00 00 01 00 00 24 00",
    "a8 00 00 00 00 10 00 00 00 02 00 00",
    "ad 00 00 00 00 00 00 00 08 04 00 00",
    "be 00 00 00 00 10 00 00 02 10 00 00",
]


def test_without_a_medium() -> None:
    drive = Drive(None)
    assert not drive.unit.loaded
    for text in NEEDS_MEDIUM:
        assert drive(text) == CLOSED
    for text, action in TABLE:
        if text[:2] in ("03", "12", "1a", "1e", "5a", "a0", "bd"):
            assert drive(text) == action
    assert drive("46 00 ff ff 00 00 00 00 08 00") == Respond(cdb("00000004 00000000"))
    assert drive(EVENT) == Respond(cdb("00 06 04 10 00 00 00 00"))
    assert drive(EJECT) == Done()
    for text in NEEDS_MEDIUM:
        assert drive(text) == OPEN
    assert drive(EVENT) == Respond(cdb("00 06 04 10 00 01 00 00"))
    assert drive("bd 00 00 00 00 00 00 00 00 08 00 00") == Respond(cdb("00 10 00 00 00 01 00 00"))
    assert drive(LOAD) == Done()
    assert drive(TUR) == CLOSED
    assert drive.ejected == 0


def test_the_guest_ejects() -> None:
    drive = Drive()
    assert drive(EJECT) == Done()
    assert (drive.ejected, drive.unit.loaded) == (1, False)
    assert drive(TUR) == OPEN  # no unit attention: the guest ejected the medium
    assert drive(EVENT) == Respond(cdb("00 06 04 10 03 01 00 00"))
    assert drive(EVENT) == Respond(cdb("00 06 04 10 00 01 00 00"))
    assert drive(EJECT) == Done()
    assert drive.ejected == 1
    assert drive(EVENT) == Respond(cdb("00 06 04 10 00 01 00 00"))
    assert drive(LOAD) == Done()
    assert drive(TUR) == CLOSED


def test_insert() -> None:
    drive = Drive(None)
    drive(EJECT)
    drive.unit.insert(disc(2000))
    assert drive.unit.loaded
    assert drive("4a 01 00 00 10 00 00 00 04 00") == Respond(cdb("00 06 04 10"))  # the event was not reported
    assert drive("46 00 ff ff 00 00 00 00 08 00") == Respond(cdb("00000004 00000008"))
    assert drive(EVENT) == Respond(cdb("00 06 04 10 02 02 00 00"))
    assert drive(EVENT) == Respond(cdb("00 06 04 10 00 02 00 00"))
    assert drive(TUR) == CHANGED
    assert drive(TUR) == Done()
    assert drive("25 00 00 00 00 00 00 00 00 00") == Respond(cdb("00 00 07 cf 00 00 08 00"))
    with pytest.raises(StateError, match="eject it first"):
        drive.unit.insert(disc())


def test_eject() -> None:
    drive = Drive()
    assert drive.unit.eject()
    assert drive.ejected == 0  # the caller ejected the medium
    assert drive(EVENT) == Respond(cdb("00 06 04 10 03 01 00 00"))
    assert drive(TUR) == CHANGED
    assert drive(TUR) == OPEN
    assert drive.unit.eject()
    assert drive(TUR) == OPEN


def test_another_medium_before_the_guest_polls() -> None:
    drive = Drive()
    assert drive.unit.eject()
    drive.unit.insert(disc(5))
    assert drive(EVENT) == Respond(cdb("00 06 04 10 02 02 00 00"))
    assert drive("28 00 00 00 00 10 00 00 01 00") == CHANGED
    assert drive("28 00 00 00 00 10 00 00 01 00") == RANGE


def test_a_locked_tray() -> None:
    drive = Drive()
    assert drive(PREVENT) == Done()
    assert drive(PREVENT) == Done()
    assert drive.unit.locked
    assert drive("5a 00 2a 00 00 00 00 00 80 00") == Respond(cdb("00 1c 00 00 00 00 00 00" + LOCKED))
    assert drive(EJECT) == Fail(REMOVAL_PREVENTED)
    assert not drive.unit.eject()
    assert drive.unit.loaded
    assert drive(EVENT) == Respond(cdb("00 06 04 10 01 02 00 00"))  # EjectRequest
    assert drive(TUR) == Done()
    assert drive(LOAD) == Done()
    assert drive(ALLOW) == Done()
    assert drive("5a 00 2a 00 00 00 00 00 80 00") == Respond(cdb("00 1c 00 00 00 00 00 00" + PAGE_2A))
    assert drive(EJECT) == Done()
    assert drive.prevented == [True, False]
    assert drive.ejected == 1


def test_a_forced_eject() -> None:
    drive = Drive()
    drive(PREVENT)
    assert drive.unit.eject(force=True)
    assert not drive.unit.locked
    assert drive.prevented == [True, False]
    assert drive("28 00 00 00 00 10 00 00 01 00") == CHANGED
    assert drive("28 00 00 00 00 10 00 00 01 00") == OPEN


def test_an_empty_drive_can_be_locked_too() -> None:
    drive = Drive(None)
    drive(PREVENT)
    assert drive(EJECT) == Fail(REMOVAL_PREVENTED)
    assert drive.unit.eject()
    assert drive(EVENT) == Respond(cdb("00 06 04 10 00 00 00 00"))
    drive.unit.insert(disc())
    assert drive.unit.locked


def test_a_reset_unlocks() -> None:
    drive = Drive()
    drive(PREVENT)
    drive.unit.reset()
    assert drive.prevented == [True, False]
    assert drive("46 00 ff ff 00 00 00 00 08 00") == Respond(cdb("00000004 00000008"))
    assert drive(EVENT) == Respond(cdb("00 06 04 10 00 02 00 00"))
    assert drive(TUR) == Fail(RESET_OCCURRED)
    assert drive(EJECT) == Done()


def test_an_iso_that_grows_stays_as_it_was_inserted() -> None:
    medium = disc()
    unit = CdromUnit(medium, serial_number="0042")
    medium.block_count = 2000
    assert unit.execute(cdb("25 00 00 00 00 00 00 00 00 00")) == Respond(cdb("00 00 03 e7 00 00 08 00"))


def test_the_action_for_any_cdb_stays_inside_the_medium() -> None:
    source = random.Random(1)
    drive = Drive()
    rows = [*COMMANDS]
    for _ in range(20_000):
        row = source.choice(rows)
        masked = bytes(source.randrange(256) & mask if source.random() < 0.3 else 0 for mask in row.usage)
        raw = row.usage[:1] + masked[1:]
        if source.random() < 0.2:
            raw = source.randbytes(source.randrange(1, 17))
        if not drive.unit.loaded:
            drive.unit.insert(disc())
        match drive.unit.execute(raw):
            case Read(lba, count) | Verify(lba, count):
                assert count > 0
                assert lba + count <= 1000
            case Respond(data):
                assert len(data) <= 2052
            case Receive(length):
                assert 0 < length <= 0xFFFF
            case other:
                assert isinstance(other, Done | Fail)
