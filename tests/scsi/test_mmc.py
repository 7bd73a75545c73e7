from __future__ import annotations

import pytest

from farplug.scsi.mmc import (
    LEAD_OUT,
    MAX_CD_BLOCKS,
    Profile,
    configuration,
    disc_information,
    dvd_structure,
    features,
    raw_toc,
    sessions,
    toc,
    track_information,
)

SIZE = 0x0C6C
"""Blocks: 3180, 0:42.30 and with the lead-in 0:44.30."""

TRACK_1 = "00 14 01 00"
LEAD = "00 14 aa 00"


@pytest.mark.parametrize(
    ("track", "msf", "answer"),
    [
        (0, False, f"0012 01 01 {TRACK_1} 00000000 {LEAD} 00000c6c"),
        (1, False, f"0012 01 01 {TRACK_1} 00000000 {LEAD} 00000c6c"),
        (0, True, f"0012 01 01 {TRACK_1} 00 00 02 00 {LEAD} 00 00 2c 1e"),
        (LEAD_OUT, False, f"000a 01 01 {LEAD} 00000c6c"),
        (LEAD_OUT, True, f"000a 01 01 {LEAD} 00 00 2c 1e"),
        (2, False, None),
        (0xA9, False, None),
        (0xFF, True, None),
    ],
)
def test_toc(track: int, msf: bool, answer: str | None) -> None:
    assert toc(SIZE, track, msf=msf) == (None if answer is None else bytes.fromhex(answer))


@pytest.mark.parametrize(
    ("blocks", "msf"),
    [
        (1, "00 02 01"),
        (74, "00 02 4a"),
        (75, "00 03 00"),
        (60 * 75 - 150, "01 00 00"),
        (MAX_CD_BLOCKS, "64 00 00"),
        (256 * 60 * 75 - 151, "ff 3b 4a"),
        (256 * 60 * 75, "ff 3b 4a"),  # the highest value of the fields
        (2**32, "ff 3b 4a"),
    ],
)
def test_minutes_seconds_and_frames(blocks: int, msf: str) -> None:
    assert (toc(blocks, LEAD_OUT, msf=True) or b"")[-3:] == bytes.fromhex(msf)


def test_sessions() -> None:
    assert sessions(msf=False) == bytes.fromhex(f"000a 01 01 {TRACK_1} 00000000")
    assert sessions(msf=True) == bytes.fromhex(f"000a 01 01 {TRACK_1} 00 00 02 00")


def test_raw_toc() -> None:
    assert raw_toc(SIZE) == bytes.fromhex(
        """002e 01 01
           01 14 00 a0 00000000 01 00 00
           01 14 00 a1 00000000 01 00 00
           01 14 00 a2 00000000 00 2c 1e
           01 14 00 01 00000000 00 02 00"""
    )


def test_disc_and_track() -> None:
    assert disc_information() == bytes.fromhex("0020 0e 01 01 01 01 20 00").ljust(34, b"\0")
    assert track_information(SIZE) == bytes.fromhex(
        "0022 01 01 00 04 01 00 00000000 00000000 00000000 00000000 00000c6c 00000000 00 00 0000"
    )


def test_dvd_structure() -> None:
    layout = dvd_structure(500_000, 0) or b""
    assert layout[:20] == bytes.fromhex("0802 0000 01 0f 01 00 00030000 000aa11f 00000000")
    assert len(layout) == 2052
    assert dvd_structure(500_000, 1) == bytes.fromhex("0006 0000 00000000")
    assert dvd_structure(500_000, 4) is None


@pytest.mark.parametrize(
    ("blocks", "profile"),
    [
        (None, Profile.NONE),
        (1, Profile.CD_ROM),
        (MAX_CD_BLOCKS, Profile.CD_ROM),
        (MAX_CD_BLOCKS + 1, Profile.DVD_ROM),
        (2**31, Profile.DVD_ROM),
    ],
)
def test_profile(blocks: int | None, profile: Profile) -> None:
    assert Profile.of(blocks) is profile


CORE = "0001 03 04 00000008  0002 03 04 00000000  0003 03 04 29000000"
CD = f"""0000 03 08 0010 00 00 0008 01 00 {CORE}
         0010 01 08 00000800 0001 01 00  001d 01 00  001e 01 04 00000000  001f 00 00"""
DVD = f"""0000 03 08 0010 01 00 0008 00 00 {CORE}
          0010 01 08 00000800 0010 01 00  001d 00 00  001e 00 04 00000000  001f 01 00"""
NONE = f"""0000 03 08 0010 00 00 0008 00 00 {CORE}
           0010 00 08 00000800 0001 01 00  001d 00 00  001e 00 04 00000000  001f 00 00"""


@pytest.mark.parametrize(("profile", "text"), [(Profile.CD_ROM, CD), (Profile.DVD_ROM, DVD), (Profile.NONE, NONE)])
def test_all_features(profile: Profile, text: str) -> None:
    assert b"".join(features(profile).values()) == bytes.fromhex(text)
    data = configuration(profile, 0)
    assert data == (len(data) - 4).to_bytes(4) + profile.to_bytes(4) + bytes.fromhex(text)
    assert len(data) % 4 == 0  # Windows requires this


def test_some_features() -> None:
    assert configuration(Profile.CD_ROM, 0x20) == bytes.fromhex("00000004 0000 0008")
    assert configuration(Profile.CD_ROM, 0x1F) == bytes.fromhex("00000008 0000 0008 001f 00 00")
    assert configuration(Profile.CD_ROM, 0x1E, current=True) == bytes.fromhex("0000000c 0000 0008 001e 01 04 00000000")
    assert configuration(Profile.NONE, 0x03, current=True) == bytes.fromhex("0000000c 0000 0000 0003 03 04 29000000")
    assert configuration(Profile.CD_ROM, 0x1D, single=True) == bytes.fromhex("00000008 0000 0008 001d 01 00")
    assert configuration(Profile.CD_ROM, 0x1C, single=True) == bytes.fromhex("00000004 0000 0008")
