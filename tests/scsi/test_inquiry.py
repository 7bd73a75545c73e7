from __future__ import annotations

import pytest
from tests.scsi.media import FakeMedium

from farplug.scsi.inquiry import disk_pages, identity_pages, standard_inquiry, vital_product_data


def page(code: int, medium: FakeMedium | None = None) -> bytes:
    data = vital_product_data(0x00, disk_pages(medium or FakeMedium()), code)
    assert data is not None
    assert (data[0], data[1], int.from_bytes(data[2:4])) == (0x00, code, len(data) - 4)
    return data[4:]


def test_standard_data() -> None:
    data = standard_inquiry(0x00)
    assert data == bytes.fromhex("00 00 06 02 1f 00 00 02") + b"farplug Virtual Disk    1.0 "
    data = standard_inquiry(0x25, product="Drive", removable=True)
    assert data == bytes.fromhex("25 80 06 02 1f 00 00 02") + b"farplug Drive           1.0 "


@pytest.mark.parametrize(("unmaps", "pages"), [(True, "00 80 83 b0 b1 b2"), (False, "00 80 83 b0 b1")])
def test_supported_pages(unmaps: bool, pages: str) -> None:
    medium = FakeMedium(unmaps=unmaps)
    assert page(0x00, medium) == bytes.fromhex(pages)
    for code in range(256):
        assert (vital_product_data(0x00, disk_pages(medium), code) is not None) is (code in bytes.fromhex(pages))


def test_pages_of_another_type() -> None:
    pages = identity_pages("Drive", "0042")
    assert vital_product_data(0x05, pages, 0x00) == bytes.fromhex("05 00 00 03 00 80 83")
    assert vital_product_data(0x05, pages, 0x80) == bytes.fromhex("05 80 00 04") + b"0042"
    assert (vital_product_data(0x05, pages, 0x83) or b"")[8:26] == b"farplug Drive 0042"
    assert vital_product_data(0x05, pages, 0xB0) is None


def test_serial_number() -> None:
    assert page(0x80) == b"0123456789ABCDEF"


def test_device_identification() -> None:
    data = page(0x83)
    words = b"farplug Virtual Disk 0123456789ABCDEF"
    assert data[: 4 + len(words)] == bytes((0x02, 0x01, 0x00, len(words))) + words
    number = data[4 + len(words) :]
    assert (number[:4], len(number), number[4] >> 4) == (bytes.fromhex("01 03 00 08"), 12, 3)  # NAA, locally assigned
    assert page(0x83) == data
    assert page(0x83, FakeMedium(serial_number="0123456789ABCDEE")) != data
    assert page(0x83, FakeMedium(serial_number=""))[:4] == bytes((0x02, 0x01, 0x00, 21))


@pytest.mark.parametrize(
    ("medium", "limits"),
    [
        (FakeMedium(), "01 00 0008 0000ffff 00000800 00000000 007fffff 00000100 00000008 80000000 00000000007fffff"),
        (
            FakeMedium(block_size=4096),
            "01 00 0001 0000ffff 00000100 00000000 007fffff 00000100 00000001 80000000 00000000007fffff",
        ),
        (
            FakeMedium(block_count=1, unmaps=False),
            "01 00 0001 0000ffff 00000800 00000000 00000000 00000000 00000000 00000000 00000000007fffff",
        ),
    ],
)
def test_block_limits(medium: FakeMedium, limits: str) -> None:
    assert page(0xB0, medium) == bytes.fromhex(limits).ljust(0x3C, b"\0")


def test_characteristics_and_provisioning() -> None:
    assert page(0xB1) == bytes.fromhex("00 01").ljust(0x3C, b"\0")
    assert page(0xB2) == bytes.fromhex("00 e4 02 00")
