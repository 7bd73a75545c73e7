"""Standard INQUIRY data and vital product data (SPC-4, chapters 6.6 and 7.8)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

from farplug.scsi.medium import (
    MAX_TRANSFER_BLOCKS,
    MAX_UNMAP_BLOCKS,
    MAX_UNMAP_EXTENTS,
    MAX_WRITE_SAME_BLOCKS,
    OPTIMAL_TRANSFER,
    Medium,
    blocks_per_physical_block,
)

VENDOR = "farplug"
"""Not "QEMU": for that vendor SeaBIOS reads the mode page of the disk geometry, and does not boot without it."""

PRODUCT = "Virtual Disk"
CDROM_PRODUCT = "Virtual CD-ROM"
REVISION = "1.0"

DIRECT_ACCESS, MULTIMEDIA = 0x00, 0x05
"""Peripheral device types (SPC-4, table 138)."""

_SPC4 = 0x06
_REMOVABLE = 0x80
_CMDQUE = 0x02


def standard_inquiry(peripheral: int, *, product: str = PRODUCT, removable: bool = False) -> bytes:
    """Build the standard INQUIRY data, 36 bytes (SPC-4, chapter 6.6.2). ``peripheral``: qualifier and device type."""
    names = f"{VENDOR:8}{product:16}{REVISION:4}".encode("ascii")
    return bytes((peripheral, _REMOVABLE if removable else 0, _SPC4, 0x02, 5 + 26, 0, 0, _CMDQUE)) + names


def vital_product_data(peripheral: int, pages: Mapping[int, bytes], code: int) -> bytes | None:
    """Build a VPD page of a unit that has ``pages`` and page 00, their list; None if the unit has no such page."""
    content = bytes((0x00, *pages)) if code == 0x00 else pages.get(code)
    return None if content is None else struct.pack(">BBH", peripheral, code, len(content)) + content


def identity_pages(product: str, serial_number: str) -> dict[int, bytes]:
    """Build the VPD pages unit serial number (80) and device identification (83).

    The identification has a name (T10 vendor ID) and a locally assigned number (NAA 3), both made of the serial number.
    """
    serial = serial_number.encode("ascii")
    words = f"{VENDOR:8}{product} ".encode("ascii") + serial
    digest = int.from_bytes(hashlib.sha256(serial).digest()[:8])
    number = (0x3 << 60 | digest & (1 << 60) - 1).to_bytes(8)
    identification = bytes((0x02, 0x01, 0x00, len(words))) + words + bytes((0x01, 0x03, 0x00, len(number))) + number
    return {0x80: serial, 0x83: identification}


def disk_pages(medium: Medium) -> dict[int, bytes]:
    """Build the contents of a disk's VPD pages."""
    pages = identity_pages(PRODUCT, medium.serial_number) | {
        0xB0: _block_limits(medium),
        0xB1: struct.pack(">H", 0x0001).ljust(0x3C, b"\0"),  # block device characteristics: non-rotating
    }
    if medium.unmaps:
        # Logical block provisioning. LBPU, LBPWS, LBPWS10: all three ways to unmap; LBPRZ: unmapped blocks read as
        # zeros; thin provisioned
        pages[0xB2] = bytes((0x00, 0xE4, 0x02, 0x00))
    return pages


def _block_limits(medium: Medium) -> bytes:
    """Build page B0 (SBC-3, chapter 6.6.4). WSNZ: WRITE SAME of zero blocks is invalid. UGAVALID: alignment 0."""
    granularity = blocks_per_physical_block(medium)
    return struct.pack(
        ">BBHIII III I Q 20x",
        0x01,  # WSNZ
        0,  # no COMPARE AND WRITE
        granularity,
        MAX_TRANSFER_BLOCKS,
        OPTIMAL_TRANSFER // medium.block_size,
        0,  # no PRE-FETCH
        MAX_UNMAP_BLOCKS if medium.unmaps else 0,
        MAX_UNMAP_EXTENTS if medium.unmaps else 0,
        granularity if medium.unmaps else 0,
        0x80000000 if medium.unmaps else 0,  # UGAVALID
        MAX_WRITE_SAME_BLOCKS,
    )
