"""The CBOR of CTAP2, compared with Yubico's encoder and decoder."""

from __future__ import annotations

import pytest
from fido2 import cbor as oracle
from hypothesis import given
from hypothesis import strategies as st

from farplug.virtual.fido import cbor
from farplug.virtual.fido.cbor import MAX_DEPTH, CborError, Value

SCALARS = st.booleans() | st.integers(-(1 << 64), (1 << 64) - 1) | st.binary(max_size=300) | st.text(max_size=300)
KEYS = st.integers(-(1 << 64), (1 << 64) - 1) | st.text(max_size=30)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=30) | st.dictionaries(KEYS, inner, max_size=30), max_leaves=20
)


@given(VALUES)
def test_values_as_the_oracle_writes_and_reads_them(value: Value) -> None:
    try:
        data = cbor.encode(value)
        assert data == oracle.encode(value)
        decoded = cbor.decode(data)
    except CborError as error:
        assert "levels" in str(error)  # noqa: PT017
    else:
        assert decoded == oracle.decode(data) == value


@pytest.mark.parametrize(
    "value", [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1, -1, -24, -25, -(2**64)]
)
def test_integers(value: int) -> None:
    assert cbor.decode(cbor.encode(value)) == value


def test_the_order_of_keys() -> None:
    """Major type, length, bytes: not the order of integers."""
    assert cbor.encode({"b": 1, "aa": 2, -1: 3, 24: 4, 5: 5}).hex() == "a50505181804200361620162616102"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "ends within"),
        ("18", "ends within"),
        ("42 01", "ends within"),
        ("5b ffffffffffffffff 00", "ends within"),
        ("9b ffffffffffffffff 00", "ends within"),
        ("bb ffffffffffffffff 00", "ends within"),
        ("00 00", "1 bytes follow"),
        ("18 17", "shortest"),
        ("19 00ff", "shortest"),
        ("1a 0000ffff", "shortest"),
        ("1b 00000000ffffffff", "shortest"),
        ("58 01 00", "shortest"),
        ("1c", "indefinite or reserved"),
        ("5f 41 00 ff", "indefinite or reserved"),
        ("9f ff", "indefinite or reserved"),
        ("bf ff", "indefinite or reserved"),
        ("f6", "null"),
        ("f7", "null"),
        ("f93c00", "reserved"),
        ("fb3ff0000000000000", "reserved"),
        ("c0 60", "tags"),
        ("ff", "reserved"),
        ("61 80", "UTF-8"),
        ("63 eda080", "UTF-8"),
        ("a2 01 00 01 00", "order"),
        ("a2 02 00 01 00", "order"),
        ("a2 6161 00 01 00", "order"),
        ("a1 40 00", "key"),
        ("a1 f4 00", "key"),
        ("a1 80 00", "key"),
        ("81" * (MAX_DEPTH + 1) + "00", "levels"),
        ("a100" * (MAX_DEPTH + 1) + "00", "levels"),
        ("81" * 7000, "levels"),
    ],
)
def test_other_forms_are_refused(data: str, message: str) -> None:
    with pytest.raises(CborError, match=message):
        cbor.decode(bytes.fromhex(data))


def test_what_cannot_be_encoded() -> None:
    for value in (None, 1.5, 1 << 64, -(1 << 64) - 1):
        with pytest.raises(ValueError, match=r"type|64 bits"):
            cbor.encode(value)  # type: ignore[arg-type]
