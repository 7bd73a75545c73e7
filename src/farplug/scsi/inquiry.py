"""What a disk says about itself: the standard INQUIRY data and the vital product data (SPC-4, chapters 6.6 and 7.8)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

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
"""Not "QEMU": for that vendor SeaBIOS asks for the mode page of a disk geometry and does not boot without."""

PRODUCT = "Virtual Disk"
REVISION = "1.0"

_SPC4 = 0x06


def standard_inquiry(peripheral: int) -> bytes:
    """Build the standard INQUIRY data, 36 bytes (SPC-4, chapter 6.6.2). ``peripheral``: qualifier and device type."""
    names = f"{VENDOR:8}{PRODUCT:16}{REVISION:4}".encode("ascii")
    return bytes((peripheral, 0x00, _SPC4, 0x02, 5 + 26, 0, 0, 0)) + names


def vital_product_data(medium: Medium, page: int) -> bytes | None:
    """Build a VPD page of a disk; None if it has no such page."""
    pages = _pages(medium)
    if page not in pages:
        return None
    content = pages[page](medium)
    return struct.pack(">BBH", 0x00, page, len(content)) + content


def _pages(medium: Medium) -> dict[int, Callable[[Medium], bytes]]:
    return _PAGES if medium.unmaps else {page: build for page, build in _PAGES.items() if page != 0xB2}


def _supported_pages(medium: Medium) -> bytes:
    return bytes(_pages(medium))


def _unit_serial_number(medium: Medium) -> bytes:
    return medium.serial_number.encode("ascii")


def _device_identification(medium: Medium) -> bytes:
    """A name in words (T10 vendor ID) and a locally assigned number (NAA 3), made of the serial number."""
    serial = medium.serial_number.encode("ascii")
    words = f"{VENDOR:8}{PRODUCT} ".encode("ascii") + serial
    digest = int.from_bytes(hashlib.sha256(serial).digest()[:8])
    number = (0x3 << 60 | digest & (1 << 60) - 1).to_bytes(8)
    return bytes((0x02, 0x01, 0x00, len(words))) + words + bytes((0x01, 0x03, 0x00, len(number))) + number


def _block_limits(medium: Medium) -> bytes:
    """SBC-3, chapter 6.6.4. WSNZ: a WRITE SAME of zero blocks is not "all of them". UGAVALID: the alignment is 0."""
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


def _block_device_characteristics(medium: Medium) -> bytes:
    return struct.pack(">H", 0x0001).ljust(0x3C, b"\0")  # non-rotating


def _logical_block_provisioning(medium: Medium) -> bytes:
    # LBPU, LBPWS, LBPWS10: all three ways to unmap; LBPRZ: unmapped blocks read as zeros; thin provisioned
    return bytes((0x00, 0xE4, 0x02, 0x00))


_PAGES: dict[int, Callable[[Medium], bytes]] = {
    0x00: _supported_pages,
    0x80: _unit_serial_number,
    0x83: _device_identification,
    0xB0: _block_limits,
    0xB1: _block_device_characteristics,
    0xB2: _logical_block_provisioning,
}
