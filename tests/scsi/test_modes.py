from __future__ import annotations

import pytest

from farplug.scsi.modes import ALL_PAGES, ModePages, disk_modes
from farplug.scsi.sense import INVALID_FIELD_IN_PARAMETER_LIST, PARAMETER_LIST_LENGTH_ERROR, Sense

PAGE_01 = bytes.fromhex("01 0a") + bytes(10)
PAGE_08 = bytes.fromhex("08 12 04") + bytes(17)
PAGE_0A = bytes.fromhex("0a 0a 02 10") + bytes(8)
PAGE_1C = bytes.fromhex("1c 0a 08") + bytes(9)
UNCACHED = bytes.fromhex("08 12 00") + bytes(17)


def test_sense() -> None:
    pages = disk_modes(write_cache=True)
    for control in (0, 2):
        assert pages.sense(control, ALL_PAGES) == PAGE_01 + PAGE_08 + PAGE_0A + PAGE_1C
        for page in (PAGE_01, PAGE_08, PAGE_0A, PAGE_1C):
            assert pages.sense(control, page[0]) == page
    masks = b"".join(page[:2] + bytes(len(page) - 2) for page in (PAGE_01, PAGE_08, PAGE_0A, PAGE_1C))
    assert pages.sense(1, ALL_PAGES) == masks[:14] + b"\x04" + masks[15:]
    assert pages.sense(0, 0x04) is None
    assert pages.sense(1, 0x00) is None


def test_all_pages_are_where_linux_looks_for_the_cache() -> None:
    assert len(disk_modes(write_cache=True).sense(0, ALL_PAGES) or b"") + 8 < 192


def test_select() -> None:
    pages = disk_modes(write_cache=True)
    assert pages.write_cache
    assert pages.select(b"") is None
    assert pages.select(UNCACHED) is None
    assert not pages.write_cache
    assert pages.sense(0, 0x08) == UNCACHED
    assert pages.sense(2, 0x08) == PAGE_08
    assert pages.select(memoryview(b"\x88" + PAGE_08[1:] + PAGE_01)) is None  # PS, as MODE SENSE may have set it
    assert pages.write_cache


def test_no_write_cache() -> None:
    pages = disk_modes(write_cache=False)
    assert not pages.write_cache
    for control in (0, 1, 2):
        assert pages.sense(control, 0x08) == UNCACHED
    assert pages.select(PAGE_08) == INVALID_FIELD_IN_PARAMETER_LIST
    assert pages.select(UNCACHED) is None
    assert not ModePages((PAGE_01,)).write_cache


@pytest.mark.parametrize(
    ("data", "sense"),
    [
        (b"\x08", PARAMETER_LIST_LENGTH_ERROR),
        (UNCACHED[:19], PARAMETER_LIST_LENGTH_ERROR),
        (UNCACHED + b"\x01", PARAMETER_LIST_LENGTH_ERROR),
        (UNCACHED + PAGE_01[:11], PARAMETER_LIST_LENGTH_ERROR),
        (b"\x08\x11" + UNCACHED[2:], INVALID_FIELD_IN_PARAMETER_LIST),
        (b"\x48" + UNCACHED[1:], INVALID_FIELD_IN_PARAMETER_LIST),  # SPF: there are no subpages
        (b"\x04\x16" + bytes(22), INVALID_FIELD_IN_PARAMETER_LIST),
        (b"\x08\x12\x01" + bytes(17), INVALID_FIELD_IN_PARAMETER_LIST),
        (UNCACHED + PAGE_0A[:2] + b"\x06" + PAGE_0A[3:], INVALID_FIELD_IN_PARAMETER_LIST),
        (UNCACHED[:19] + b"\x01", INVALID_FIELD_IN_PARAMETER_LIST),
    ],
)
def test_an_invalid_page_changes_nothing(data: bytes, sense: Sense) -> None:
    pages = disk_modes(write_cache=True)
    assert pages.select(data) == sense
    assert pages.sense(0, ALL_PAGES) == PAGE_01 + PAGE_08 + PAGE_0A + PAGE_1C
