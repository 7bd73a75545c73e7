"""Data of a CD-ROM drive for a medium with one data track: table of contents, disc, track, features (MMC-3).

A DVD differs from a CD only in its profile and in READ DISC STRUCTURE.
"""

from __future__ import annotations

import struct
from enum import IntEnum

CD_BLOCK_SIZE = 2048
"""Bytes of user data in a block of a data track."""

MAX_CD_BLOCKS = 100 * 60 * 75 - 150
"""The most blocks that CD addresses, up to 99:59:74, can name. A larger medium is a DVD."""

LEAD_OUT = 0xAA
"""Track number of the lead-out."""

_DATA_TRACK = 0x14
"""ADR 1 (current position), CONTROL 4 (data track, recorded uninterrupted, digital copy prohibited)."""

_LAST_MSF = 256 * 60 * 75 - 1
"""The highest address that the fields for minutes, seconds and frames hold."""


class Profile(IntEnum):
    """Profile number (MMC-3, table 80)."""

    NONE = 0x0000
    CD_ROM = 0x0008
    DVD_ROM = 0x0010

    @classmethod
    def of(cls, block_count: int | None) -> Profile:
        """Return the profile of a medium of ``block_count`` blocks; None means that there is no medium."""
        if block_count is None:
            return cls.NONE
        return cls.CD_ROM if block_count <= MAX_CD_BLOCKS else cls.DVD_ROM


def _msf(lba: int) -> bytes:
    """Return minutes, seconds, frames: 75 frames are a second, and the lead-in has 2 seconds (MMC-3, table 603)."""
    seconds, frame = divmod(min(lba + 150, _LAST_MSF), 75)
    return bytes((*divmod(seconds, 60), frame))


def _address(lba: int, msf: bool) -> bytes:
    return b"\0" + _msf(lba) if msf else struct.pack(">I", lba)


def toc(block_count: int, first_track: int, *, msf: bool) -> bytes | None:
    """Build the table of contents, READ TOC format 0, from ``first_track`` on; None if there is no such track."""
    if first_track > 1 and first_track != LEAD_OUT:
        return None
    tracks = [(1, 0), (LEAD_OUT, block_count)][first_track == LEAD_OUT :]
    listed = b"".join(struct.pack(">xBBx", _DATA_TRACK, track) + _address(lba, msf) for track, lba in tracks)
    return struct.pack(">HBB", 2 + len(listed), 1, 1) + listed


def sessions(*, msf: bool) -> bytes:
    """Build the session information, READ TOC format 1: one session and its first track."""
    return struct.pack(">HBBxBBx", 10, 1, 1, _DATA_TRACK, 1) + _address(0, msf)


def raw_toc(block_count: int) -> bytes:
    """Build the raw table of contents, READ TOC format 2, as recorded in the lead-in, with addresses in MSF form."""
    points = (
        (0xA0, bytes((1, 0x00, 0))),  # first track; disc type: CD-DA or CD-ROM
        (0xA1, bytes((1, 0, 0))),  # last track
        (0xA2, _msf(block_count)),  # lead-out
        (0x01, _msf(0)),
    )
    listed = b"".join(struct.pack(">BBBB4x3s", 1, _DATA_TRACK, 0, point, value) for point, value in points)
    return struct.pack(">HBB", 2 + len(listed), 1, 1) + listed


def disc_information() -> bytes:
    """Build the standard disc information, 34 bytes: finalized, one complete session with one track."""
    return struct.pack(">HBBBBBBB25x", 32, 0x0E, 1, 1, 1, 1, 0x20, 0x00)


def track_information(block_count: int) -> bytes:
    """Build the track information of track 1, 36 bytes: a data track of mode 1."""
    return struct.pack(">HBBxBBxIIIIIIBBxx", 34, 1, 1, 0x04, 0x01, 0, 0, 0, 0, block_count, 0, 0, 0)


def dvd_structure(block_count: int, code: int) -> bytes | None:
    """Build a structure of a DVD: 0, the physical format, or 1, copyright; None for others (MMC-3, chapter 6.24)."""
    if code == 0x00:
        first = 0x030000  # where the data area begins
        # DVD-ROM; 120 mm, no rate given; one layer, read-only; default densities
        layer = struct.pack(">BBBBIII", 0x01, 0x0F, 0x01, 0x00, first, first + block_count - 1, 0).ljust(2048, b"\0")
    elif code == 0x01:
        layer = bytes(4)  # no copyright protection
    else:
        return None
    return struct.pack(">Hxx", 2 + len(layer)) + layer


_PERSISTENT, _CURRENT = 0x02, 0x01


def features(profile: Profile) -> dict[int, bytes]:
    """Build the feature descriptors of GET CONFIGURATION by feature code, in order (MMC-3, chapter 5.3)."""
    is_cd, is_dvd = profile is Profile.CD_ROM, profile is Profile.DVD_ROM
    listed = struct.pack(">HBxHBx", Profile.DVD_ROM, is_dvd, Profile.CD_ROM, is_cd)
    always = _PERSISTENT | _CURRENT
    rows = (
        (0x0000, always, listed),
        (0x0001, always, bytes.fromhex("00000008")),  # core: USB
        (0x0002, always, bytes(4)),  # morphing
        (0x0003, always, bytes.fromhex("29000000")),  # removable medium: a tray that ejects and locks
        (0x0010, is_cd or is_dvd, struct.pack(">IHBx", CD_BLOCK_SIZE, 16 if is_dvd else 1, 1)),  # random readable
        (0x001D, is_cd, b""),  # multi-read
        (0x001E, is_cd, bytes(4)),  # CD read
        (0x001F, is_dvd, b""),  # DVD read
    )
    return {code: struct.pack(">HBB", code, flags, len(content)) + content for code, flags, content in rows}


def configuration(profile: Profile, first: int, *, current: bool = False, single: bool = False) -> bytes:
    """Build the data of GET CONFIGURATION.

    Args:
        profile: the current profile.
        first: the code of the first feature.
        current: only features that are current.
        single: only the feature ``first``.
    """
    wanted = (
        descriptor
        for code, descriptor in features(profile).items()
        if (code == first if single else code >= first) and not (current and not descriptor[2] & _CURRENT)
    )
    listed = b"".join(wanted)
    return struct.pack(">IxxH", 4 + len(listed), profile) + listed
