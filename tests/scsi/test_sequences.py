"""Commands that systems send to a disk and to a CD-ROM drive, byte by byte, and the required data.

A line is a CDB, of the length in the wrapper, and the answer to it: bytes, ``ok``, sense as key/code/qualifier, or
what is done with blocks. SeaBIOS, OVMF and Linux as captured; the others from their sources and from traces.
"""

from __future__ import annotations

import pytest
from tests.scsi.media import FakeMedium

from farplug.scsi.cdb import Action, Done, Fail, Flush, Read, Receive, Respond, Verify, Write, Zero
from farplug.scsi.cdrom import COMMANDS as CDROM_COMMANDS
from farplug.scsi.cdrom import CdromUnit
from farplug.scsi.disk import COMMANDS as DISK_COMMANDS
from farplug.scsi.disk import DiskUnit
from farplug.scsi.unit import Unit

SERIAL = "0123456789ABCDEF"

TUR = "00 00 00 00 00 00"
RESET = "06/29/00"
ZEROS = "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"
NO_SENSE = "70 00 00 00000000 0a 00000000 00 00 00000000"
RESET_SENSE = "70 00 06 00000000 0a 00000000 29 00 00000000"
CHANGED_SENSE = "70 00 06 00000000 0a 00000000 28 00 00000000"
OPEN_SENSE = "70 00 02 00000000 0a 00000000 3a 02 00000000"
FIELD_SENSE = "70 00 05 00000000 0a 00000000 24 00 00000000"
OPCODE_SENSE = "70 00 05 00000000 0a 00000000 20 00 00000000"

DISK = "00 00 06 02 1f 00 00 02 66 61 72 70 6c 75 67 20 56 69 72 74 75 61 6c 20 44 69 73 6b 20 20 20 20 31 2e 30 20"
"""INQUIRY: farplug, Virtual Disk, 1.0"""
DISK_SIZE = "00 ef ff ff 00 00 02 00"
"""READ CAPACITY(10): 7.5 GiB"""
DISK_PAGES = """01 0a 00 00 00 00 00 00 00 00 00 00
    08 12 04 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
    0a 0a 02 10 00 00 00 00 00 00 00 00
    1c 0a 08 00 00 00 00 00 00 00 00 00"""
SERIAL_PAGE = "80 00 10 30 31 32 33 34 35 36 37 38 39 41 42 43 44 45 46"
DISK_ID = """00 83 00 35
    02 01 00 25 66 61 72 70 6c 75 67 20 56 69 72 74 75 61 6c 20 44 69 73 6b 20
    30 31 32 33 34 35 36 37 38 39 41 42 43 44 45 46
    01 03 00 08 31 25 b2 c3 32 b1 11 3a"""
LIMITS = f"""00 b0 00 3c 01 00 0008 0000ffff 00000800 00000000 007fffff 00000100 00000008 80000000
    00000000007fffff 00000000 {ZEROS}"""

CD = "05 80 06 02 1f 00 00 02 66 61 72 70 6c 75 67 20 56 69 72 74 75 61 6c 20 43 44 2d 52 4f 4d 20 20 31 2e 30 20"
CD_SIZE = "00 05 43 20 00 00 08 00"
"""344865 blocks: 673 MiB; 76:40.15 with the lead-in."""
CAPABILITIES = "2a 14 0b 00 00 00 29 00 22 60 00 00 08 00 22 60 00 00 00 00 00 00"
LOCKED = "2a 14 0b 00 00 00 2b 00 22 60 00 00 08 00 22 60 00 00 00 00 00 00"
PROFILES = "00 00 03 08 00 10 00 00 00 08 01 00"
CURRENT = f"""{PROFILES} 00 01 03 04 00 00 00 08  00 02 03 04 00 00 00 00  00 03 03 04 29 00 00 00
    00 10 01 08 00 00 08 00 00 01 01 00  00 1d 01 00  00 1e 01 04 00 00 00 00"""
CD_ID = """05 83 00 37
    02 01 00 27 66 61 72 70 6c 75 67 20 56 69 72 74 75 61 6c 20 43 44 2d 52 4f 4d 20
    30 31 32 33 34 35 36 37 38 39 41 42 43 44 45 46
    01 03 00 08 31 25 b2 c3 32 b1 11 3a"""

# Disks

SEABIOS_DISK = [
    # every wrapper has bCBWCBLength 12
    ("12 00 00 00 24 00 00 00 00 00 00 00", DISK),
    ("00 00 00 00 00 00 00 00 00 00 00 00", RESET),
    ("03 00 00 00 12 00 00 00 00 00 00 00", RESET_SENSE),
    ("00 00 00 00 00 00 00 00 00 00 00 00", "ok"),
    ("25 00 00 00 00 00 00 00 00 00 00 00", DISK_SIZE),
    ("28 00 00 00 00 00 00 00 01 00 00 00", "read 0 1"),
    ("28 00 00 00 08 00 00 00 40 00 00 00", "read 2048 64"),
]
OVMF_DISK = [
    ("12 00 00 00 24 00", DISK),
    (TUR, RESET),
    ("03 00 00 00 12 00", RESET_SENSE),
    (TUR, "ok"),
    ("25 00 00 00 00 00 00 00 00 00", DISK_SIZE),
    ("1a 00 3f 00 04 00", "3b 00 10 00"),
    ("28 00 00 00 00 01 00 00 80 00", "read 1 128"),
    ("2a 00 00 ef ff fe 00 00 01 00", "write 15728638 1"),
]
OVMF_LARGE_DISK = [
    ("12 00 00 00 24 00", DISK),
    (TUR, RESET),
    (TUR, "ok"),
    ("25 00 00 00 00 00 00 00 00 00", "ff ff ff ff 00 00 02 00"),
    (
        "9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00",
        f"00 00 00 01 7f ff ff ff 00 00 02 00 00 03 c0 00 {ZEROS}",
    ),
    ("88 00 00 00 00 01 7f ff ff ff 00 00 00 01 00 00", "read 6442450943 1"),
]
LINUX_BULK_ONLY_DISK = [
    ("12 00 00 00 24 00", DISK),
    (TUR, RESET),
    ("03 00 00 00 60 00", RESET_SENSE),
    (TUR, "ok"),
    ("25 00 00 00 00 00 00 00 00 00", DISK_SIZE),
    ("1a 00 3f 00 c0 00", f"3b 00 10 00 {DISK_PAGES}"),
    ("1a 00 3f 00 c0 00", f"3b 00 10 00 {DISK_PAGES}"),
    ("28 00 00 00 00 00 00 00 01 00", "read 0 1"),
    ("28 00 00 00 00 00 00 08 00 00", "read 0 2048"),
    ("2a 08 00 00 08 00 00 00 08 00", "write durably 2048 8"),
    ("35 00 00 00 00 00 00 00 00 00", "flush"),
    # hdparm, smartctl and udev
    ("a1 08 2e 00 01 00 00 00 00 ec 00 00", "05/20/00"),
    ("03 00 00 00 60 00", OPCODE_SENSE),
    ("85 08 0e 00 00 00 01 00 00 00 00 00 00 40 ec 00", "05/20/00"),
    ("03 00 00 00 60 00", OPCODE_SENSE),
]
LINUX_UAS_DISK = [
    ("12 00 00 00 24 00", DISK),
    ("12 00 00 00 60 00", DISK),
    ("12 01 00 00 04 00", "00 00 00 06"),
    ("12 01 00 00 0a 00", "00 00 00 06 00 80 83 b0 b1 b2"),
    ("12 01 80 00 04 00", "00 80 00 10"),
    ("12 01 80 00 14 00", f"00 {SERIAL_PAGE}"),
    ("12 01 83 00 39 00", DISK_ID),
    ("a0 00 00 00 00 00 00 00 10 00 00 00", "00 00 00 08 00 00 00 00 00 00 00 00 00 00 00 00"),
    (TUR, RESET),
    (TUR, "ok"),
    (
        "9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00",
        f"00 00 00 00 00 ef ff ff 00 00 02 00 00 03 c0 00 {ZEROS}",
    ),
    ("12 01 b0 00 40 00", LIMITS),
    ("12 01 b1 00 40 00", f"00 b1 00 3c 00 01 {ZEROS} {ZEROS} {ZEROS} 00 00 00 00 00 00 00 00 00 00"),
    ("12 01 b2 00 08 00", "00 b2 00 04 00 e4 02 00"),
    ("1a 00 3f 00 04 00", "3b 00 10 00"),
    ("1a 00 08 00 04 00", "17 00 10 00"),
    ("1a 00 08 00 18 00", "17 00 10 00 08 12 04 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"),
    ("a3 0c 01 12 00 00 00 00 00 0a 00 00", "00 03 00 06 12 01 ff ff ff 00"),
    ("a3 0c 01 93 00 00 00 00 02 00 00 00", "00 03 00 10 93 09 ff ff ff ff ff ff ff ff ff ff ff ff 3f 00"),
    ("42 00 00 00 00 00 00 00 18 00", "receive 24"),
    ("93 01 00 00 00 00 00 00 10 00 00 00 ff ff 00 00", "zero 4096 65535"),
]
WINDOWS_DISK = [
    ("12 00 00 00 24 00", DISK),
    ("23 00 00 00 00 00 00 00 fc 00", RESET),
    ("03 00 00 00 12 00 00 00 00 00 00 00", RESET_SENSE),
    ("23 00 00 00 00 00 00 00 fc 00", "00 00 00 08 00 f0 00 00 02 00 02 00"),
    ("12 01 00 00 ff 00", "00 00 00 06 00 80 83 b0 b1 b2"),
    ("12 01 80 00 ff 00", f"00 {SERIAL_PAGE}"),
    ("12 01 83 00 ff 00", DISK_ID),
    ("25 00 00 00 00 00 00 00 00 00", DISK_SIZE),
    ("28 00 00 00 00 00 00 00 01 00", "read 0 1"),
    ("1a 00 1c 00 c0 00", "0f 00 10 00 1c 0a 08 00 00 00 00 00 00 00 00 00"),
    ("1a 00 3f 00 c0 00", f"3b 00 10 00 {DISK_PAGES}"),
    (TUR, "ok"),
    ("1e 00 00 00 01 00", "ok"),
    ("2a 00 00 00 00 3f 00 00 80 00", "write 63 128"),
    ("2f 00 00 00 00 3f 00 00 80 00", "verify 63 128"),  # formatting
    ("35 00 00 00 00 00 00 00 00 00", "flush"),
    ("1e 00 00 00 00 00", "ok"),
    ("1b 00 00 00 02 00", "flush"),  # "safely remove": an eject, after which it may be used again
    (TUR, "ok"),
]
MACOS_DISK = [
    ("12 00 00 00 24 00", DISK),
    (TUR, RESET),
    ("03 00 00 00 12 00", RESET_SENSE),
    (TUR, "ok"),
    ("1b 00 00 00 01 00", "ok"),
    ("1e 00 00 00 01 00", "ok"),
    ("25 00 00 00 00 00 00 00 00 00", DISK_SIZE),
    (
        "9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00",
        f"00 00 00 00 00 ef ff ff 00 00 02 00 00 03 c0 00 {ZEROS}",
    ),
    ("1a 00 3f 00 c0 00", f"3b 00 10 00 {DISK_PAGES}"),
    ("1a 00 08 00 18 00", "17 00 10 00 08 12 04 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"),
    ("15 10 00 00 18 00", "receive 24"),
    ("28 00 00 00 00 00 00 08 00 00", "read 0 2048"),
    ("2a 00 00 00 10 00 00 01 00 00", "write 4096 256"),
    (TUR, "ok"),
    ("35 00 00 00 00 00 00 00 00 00", "flush"),
    ("1e 00 00 00 00 00", "ok"),
    ("1b 00 00 00 02 00", "flush"),
]
FREEBSD_DISK = [
    ("12 00 00 00 24 00", DISK),
    ("12 01 00 00 ff 00", "00 00 00 06 00 80 83 b0 b1 b2"),
    ("12 01 80 00 ff 00", f"00 {SERIAL_PAGE}"),
    (TUR, RESET),
    ("03 00 00 00 fc 00", RESET_SENSE),
    (TUR, "ok"),
    ("25 00 00 00 00 00 00 00 00 00", DISK_SIZE),
    (
        "9e 10 00 00 00 00 00 00 00 00 00 00 00 20 00 00",
        f"00 00 00 00 00 ef ff ff 00 00 02 00 00 03 c0 00 {ZEROS}",
    ),
    ("28 00 00 00 00 00 00 00 80 00", "read 0 128"),
    ("2a 00 00 00 10 00 00 00 80 00", "write 4096 128"),
    ("35 00 00 00 00 00 00 00 00 00", "flush"),
]
OPENBSD_DISK = [
    ("12 00 00 00 24 00", DISK),
    (TUR, RESET),
    ("03 00 00 00 12 00", RESET_SENSE),
    (TUR, "ok"),
    ("1b 00 00 00 01 00", "ok"),
    ("25 00 00 00 00 00 00 00 00 00", DISK_SIZE),
    ("1a 00 04 00 20 00", "05/24/00"),  # no geometry
    ("03 00 00 00 12 00", FIELD_SENSE),
    ("1a 00 05 00 20 00", "05/24/00"),
    ("1a 00 08 00 18 00", "17 00 10 00 08 12 04 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00"),
    ("28 00 00 00 00 00 00 00 01 00", "read 0 1"),
    ("35 00 00 00 00 00 00 00 00 00", "flush"),
]

# CD-ROM drives

SEABIOS_CD = [
    ("12 00 00 00 24 00 00 00 00 00 00 00", CD),
    ("00 00 00 00 00 00 00 00 00 00 00 00", RESET),
    ("03 00 00 00 12 00 00 00 00 00 00 00", RESET_SENSE),
    ("00 00 00 00 00 00 00 00 00 00 00 00", "ok"),
    ("28 00 00 00 00 11 00 00 01 00 00 00", "read 17 1"),  # the boot record of El Torito
]
OVMF_CD = [
    ("12 00 00 00 24 00", CD),
    (TUR, RESET),
    ("03 00 00 00 12 00", RESET_SENSE),
    (TUR, "ok"),
    ("25 00 00 00 00 00 00 00 00 00", CD_SIZE),
    ("28 00 00 00 00 10 00 00 01 00", "read 16 1"),
    ("28 00 00 05 43 20 00 00 01 00", "read 344864 1"),
]
LINUX_CD = [
    ("12 00 00 00 24 00", CD),
    ("12 01 00 00 04 00", "05 00 00 03"),
    ("12 01 00 00 07 00", "05 00 00 03 00 80 83"),
    ("12 01 80 00 14 00", f"05 {SERIAL_PAGE}"),
    ("12 01 83 00 3b 00", CD_ID),
    (TUR, RESET),
    ("03 00 00 00 60 00", RESET_SENSE),
    (TUR, "ok"),
    ("5a 00 2a 00 00 00 00 00 80 00", f"00 1c 00 00 00 00 00 00 {CAPABILITIES}"),
    ("46 00 00 28 00 00 00 00 10 00", "00 00 00 04 00 00 00 08"),  # no MRW
    ("46 00 00 20 00 00 00 00 18 00", "00 00 00 04 00 00 00 08"),  # cannot be written at random
    ("43 00 00 00 00 00 00 00 0c 40", "00 0a 01 01 00 14 01 00 00 00 00 00"),  # first session, the old way
    ("43 00 00 00 00 00 00 00 0c 00", "00 12 01 01 00 14 01 00 00 00 00 00"),
    ("43 02 00 00 00 00 aa 00 0c 00", "00 0a 01 01 00 14 aa 00 00 4c 28 0f"),
    ("25 00 00 00 00 00 00 00 00 00", CD_SIZE),
    ("51 00 00 00 00 00 00 00 02 00", "00 20"),
    ("51 00 00 00 00 00 00 00 22 00", f"00 20 0e 01 01 01 01 20 00 00 {ZEROS} 00 00 00 00 00 00 00 00"),
    ("52 01 00 00 00 01 00 00 08 00", "00 22 01 01 00 04 01 00"),
    (
        "52 01 00 00 00 01 00 00 24 00",
        f"00 22 01 01 00 04 01 00 {ZEROS} 00 05 43 21 00 00 00 00 00 00 00 00",
    ),
    ("4a 01 00 00 10 00 00 00 08 00", "00 06 04 10 00 02 00 00"),
    ("28 00 00 00 00 10 00 00 01 00", "read 16 1"),
    ("1e 00 00 00 01 00", "ok"),
    ("1b 00 00 00 02 00", "05/53/02"),
    ("03 00 00 00 60 00", "70 00 05 00000000 0a 00000000 53 02 00000000"),
    ("1e 00 00 00 00 00", "ok"),
    ("1b 00 00 00 02 00", "ok"),
    ("4a 01 00 00 10 00 00 00 08 00", "00 06 04 10 03 01 00 00"),
    (TUR, "02/3a/02"),
    ("03 00 00 00 60 00", OPEN_SENSE),
    ("insert", ""),
    ("4a 01 00 00 10 00 00 00 08 00", "00 06 04 10 02 02 00 00"),
    (TUR, "06/28/00"),
    ("03 00 00 00 60 00", CHANGED_SENSE),
    (TUR, "ok"),
    ("25 00 00 00 00 00 00 00 00 00", "00 00 00 63 00 00 08 00"),
]
WINDOWS_CD = [
    ("12 00 00 00 24 00", CD),
    ("12 01 80 00 ff 00", f"05 {SERIAL_PAGE}"),
    ("12 01 83 00 ff 00", CD_ID),
    ("46 00 00 00 00 00 00 00 08 00", "00 00 00 44 00 00 00 08"),  # the length of all features
    ("46 00 00 00 00 00 00 00 48 00", f"00 00 00 44 00 00 00 08 {CURRENT} 00 1f 00 00"),
    ("46 02 00 00 00 00 00 00 0c 00", "00 00 00 10 00 00 00 08 00 00 03 08"),  # one feature, and no more
    ("46 01 00 00 00 00 00 00 48 00", f"00 00 00 40 00 00 00 08 {CURRENT}"),
    ("5a 08 2a 00 00 00 00 00 26 00", RESET),
    ("03 00 00 00 12 00 00 00 00 00 00 00", RESET_SENSE),
    ("5a 08 2a 00 00 00 00 00 26 00", f"00 1c 00 00 00 00 00 00 {CAPABILITIES}"),
    ("1a 08 2a 00 22 00", f"19 00 00 00 {CAPABILITIES}"),
    ("25 00 00 00 00 00 00 00 00 00", CD_SIZE),
    ("a4 00 00 00 00 00 00 00 00 08 08 00", "05/20/00"),  # no region
    ("ac 00 00 00 00 00 00 00 00 01 03 00", "05/20/00"),  # no speeds of writing
    ("4a 01 00 00 7e 00 00 00 08 00", "00 06 04 10 00 02 00 00"),
    ("43 00 00 00 00 00 00 03 24 00", "00 12 01 01 00 14 01 00 00 00 00 00 00 14 aa 00 00 05 43 21"),
    ("43 00 01 00 00 00 00 00 0c 00", "00 0a 01 01 00 14 01 00 00 00 00 00"),
    ("43 02 00 00 00 00 00 03 24 00", "00 12 01 01 00 14 01 00 00 00 02 00 00 14 aa 00 00 4c 28 0f"),
    ("51 00 00 00 00 00 00 00 22 00", f"00 20 0e 01 01 01 01 20 00 00 {ZEROS} 00 00 00 00 00 00 00 00"),
    ("28 00 00 00 00 10 00 00 01 00", "read 16 1"),
    ("1e 00 00 00 01 00", "ok"),
    ("28 00 00 00 01 00 00 00 20 00", "read 256 32"),
    ("1e 00 00 00 00 00", "ok"),
    ("1b 00 00 00 02 00", "ok"),
    ("4a 01 00 00 10 00 00 00 08 00", "00 06 04 10 03 01 00 00"),
    ("1b 00 00 00 03 00", "ok"),
    (TUR, "02/3a/01"),
    ("insert", ""),
    ("4a 01 00 00 10 00 00 00 08 00", "00 06 04 10 02 02 00 00"),
    (TUR, "06/28/00"),
    ("43 00 00 00 00 00 00 03 24 00", "00 12 01 01 00 14 01 00 00 00 00 00 00 14 aa 00 00 00 00 64"),
]
MACOS_CD = [
    ("12 00 00 00 24 00", CD),
    (TUR, RESET),
    ("03 00 00 00 12 00", RESET_SENSE),
    ("5a 00 2a 00 00 00 00 00 0a 00", "00 1c 00 00 00 00 00 00 2a 14"),
    ("5a 00 2a 00 00 00 00 00 1e 00", f"00 1c 00 00 00 00 00 00 {CAPABILITIES}"),
    ("46 00 00 00 00 00 00 00 08 00", "00 00 00 44 00 00 00 08"),
    (TUR, "ok"),
    ("1e 00 00 00 01 00", "ok"),
    ("5a 00 2a 00 00 00 00 00 1e 00", f"00 1c 00 00 00 00 00 00 {LOCKED}"),
    ("25 00 00 00 00 00 00 00 00 00", CD_SIZE),
    ("43 00 00 00 00 00 00 00 04 00", "00 12 01 01"),
    # format 2 where SFF-8020i has it: only this table makes macOS mount
    (
        "43 02 00 00 00 00 00 ff fe 80",
        """00 2e 01 01 01 14 00 a0 00 00 00 00 01 00 00 01 14 00 a1 00 00 00 00 01 00 00
           01 14 00 a2 00 00 00 00 4c 28 0f 01 14 00 01 00 00 00 00 00 02 00""",
    ),
    ("28 00 00 00 00 10 00 00 01 00", "read 16 1"),
    ("be 00 00 00 00 10 00 00 01 10 00 00", "read 16 1"),
    ("4a 01 00 00 10 00 00 00 08 00", "00 06 04 10 00 02 00 00"),
    ("1e 00 00 00 00 00", "ok"),
    ("1b 00 00 00 02 00", "ok"),
    (TUR, "02/3a/02"),
]
FREEBSD_CD = [
    ("12 00 00 00 24 00", CD),
    ("12 01 00 00 ff 00", "05 00 00 03 00 80 83"),
    ("12 01 80 00 ff 00", f"05 {SERIAL_PAGE}"),
    (TUR, RESET),
    ("03 00 00 00 fc 00", RESET_SENSE),
    ("1e 00 00 00 01 00", "ok"),
    ("25 00 00 00 00 00 00 00 00 00", CD_SIZE),
    ("43 00 00 00 00 00 00 00 04 00", "00 12 01 01"),
    ("28 00 00 00 00 10 00 00 20 00", "read 16 32"),
    ("1e 00 00 00 00 00", "ok"),
]

DISKS = {
    "SeaBIOS": SEABIOS_DISK,
    "OVMF": OVMF_DISK,
    "Linux, Bulk-Only": LINUX_BULK_ONLY_DISK,
    "Linux, UAS": LINUX_UAS_DISK,
    "Windows": WINDOWS_DISK,
    "macOS": MACOS_DISK,
    "FreeBSD": FREEBSD_DISK,
    "OpenBSD": OPENBSD_DISK,
}
CDROMS = {
    "SeaBIOS": SEABIOS_CD,
    "OVMF": OVMF_CD,
    "Linux": LINUX_CD,
    "Windows": WINDOWS_CD,
    "macOS": MACOS_CD,
    "FreeBSD": FREEBSD_CD,
}


def described(action: Action) -> str:
    """Return an action in the notation of the tables; bytes without spaces."""
    match action:
        case Respond(data):
            return data.hex()
        case Done():
            return "ok"
        case Fail(sense):
            return f"{sense.key:02x}/{sense.asc:02x}/{sense.ascq:02x}"
        case Read(lba, count, False):
            return f"read {lba} {count}"
        case Write(lba, count, durable):
            return f"write {'durably ' if durable else ''}{lba} {count}"
        case Verify(lba, count):
            return f"verify {lba} {count}"
        case Zero(((lba, count),)):
            return f"zero {lba} {count}"
        case Receive(length):
            return f"receive {length}"
        case Flush():
            return "flush"
    return str(action)


def replay(unit: Unit, sequence: list[tuple[str, str]]) -> None:
    unit.reset()
    for line, (cdb, answer) in enumerate(sequence):
        if cdb == "insert":
            assert isinstance(unit, CdromUnit)
            unit.insert(FakeMedium(100, 2048))
            continue
        action = unit.execute(bytes.fromhex(cdb))
        if isinstance(action, Fail):
            unit.keep_sense(action.sense)
        expected = answer if described(action) == answer else "".join(answer.split())
        assert described(action) == expected, f"line {line}: {cdb}"


@pytest.mark.parametrize("system", DISKS)
def test_disk(system: str) -> None:
    replay(DiskUnit(FakeMedium(0xF00000, serial_number=SERIAL)), DISKS[system])


def test_large_disk() -> None:
    replay(DiskUnit(FakeMedium(6 * 2**30, serial_number=SERIAL)), OVMF_LARGE_DISK)


@pytest.mark.parametrize("system", CDROMS)
def test_cdrom(system: str) -> None:
    replay(CdromUnit(FakeMedium(0x54321, 2048), serial_number=SERIAL), CDROMS[system])


@pytest.mark.parametrize("filler", [0x00, 0x55, 0xAA, 0xFF])
def test_bytes_after_a_cdb_are_ignored(filler: int) -> None:
    for commands, make in ((DISK_COMMANDS, disk), (CDROM_COMMANDS, cdrom)):
        for row in commands:
            fixed = 1 if row.service_action is None else 2
            cdb = row.usage[:fixed].ljust(row.length, b"\0")
            assert described(make().execute(cdb.ljust(16, bytes((filler,))))) == described(make().execute(cdb)), str(
                row
            )


def disk() -> Unit:
    return DiskUnit(FakeMedium())


def cdrom() -> Unit:
    return CdromUnit(FakeMedium(block_size=2048), serial_number=SERIAL)
