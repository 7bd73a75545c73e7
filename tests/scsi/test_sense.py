from __future__ import annotations

import pytest

from farplug.scsi.sense import RESET_OCCURRED, Sense, SenseKey

FIXED = bytes.fromhex("70 00 06 00000000 0a 00000000 29 00 00000000")


def test_fixed_format() -> None:
    assert bytes(RESET_OCCURRED) == FIXED
    assert Sense.parse(FIXED) == RESET_OCCURRED
    assert str(RESET_OCCURRED) == "unit attention (06/29/00)"


@pytest.mark.parametrize("key", range(16))
def test_every_key_survives(key: int) -> None:
    sense = Sense(SenseKey(key), 0xAB, 0xCD)
    assert Sense.parse(bytes(sense) + b"tail") == sense


@pytest.mark.parametrize("code", [0x70, 0x71, 0xF0, 0xF1])
def test_current_and_deferred_and_valid(code: int) -> None:
    assert Sense.parse(bytes((code,)) + FIXED[1:]) == RESET_OCCURRED


@pytest.mark.parametrize("data", [b"", FIXED[:17], b"\x72" + FIXED[1:], b"\x00" + FIXED[1:]])
def test_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="fixed format"):
        Sense.parse(data)


def test_descriptor_format() -> None:
    assert RESET_OCCURRED.descriptor_format() == bytes.fromhex("72 06 29 00 00 00 00 00")
