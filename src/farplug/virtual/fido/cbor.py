"""CBOR as security keys use it: the canonical form of CTAP2, and no other.

Source: CTAP 2.1, chapter 8 (message encoding); RFC 8949. CTAP2 has integers, byte and text strings, arrays, maps and
booleans, nests them at most 4 deep, and writes every value in exactly one way: so ``encode(decode(data)) == data``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

Value: TypeAlias = "int | bytes | str | bool | Sequence[Value] | Mapping[Key, Value]"
"""A value. Maps have integers and text strings as keys."""
Key: TypeAlias = "int | str"

MAX_DEPTH: Final = 8
"""Levels of arrays and maps. CTAP2 allows 4; real clients nest 4 below the parameters of a command."""

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_FALSE, _TRUE = 20, 21
_SIZES: Final = {24: 1, 25: 2, 26: 4, 27: 8}


class CborError(ValueError):
    """The data is not one value in the canonical form of CTAP2."""


def encode(value: Value) -> bytes:
    """Return a value in the canonical form.

    Raises:
        ValueError: an integer does not fit 64 bits, or a value has another type.
    """
    match value:
        case bool():
            return bytes((_SIMPLE << 5 | (_TRUE if value else _FALSE),))
        case int():
            return _head(_UNSIGNED, value) if value >= 0 else _head(_NEGATIVE, -1 - value)
        case bytes():
            return _head(_BYTES, len(value)) + value
        case str():
            text = value.encode()
            return _head(_TEXT, len(text)) + text
        case Mapping():
            items = sorted((encode(key), encode(one)) for key, one in value.items())
            items.sort(key=lambda item: _order(item[0]))
            return _head(_MAP, len(items)) + b"".join(key + one for key, one in items)
        case Sequence():
            return _head(_ARRAY, len(value)) + b"".join(map(encode, value))
    raise ValueError(f"CTAP2 has no CBOR value of the type {type(value).__name__}")


def decode(data: bytes) -> Value:
    """Return the value that the data is, completely.

    Raises:
        CborError: the data is not one value in the canonical form.
    """
    value, end = _Decoder(data).value(0, 0)
    if end != len(data):
        raise CborError(f"{len(data) - end} bytes follow the value")
    return value


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes((major << 5 | number,))
    for information, size in _SIZES.items():
        if number < 1 << 8 * size:
            return bytes((major << 5 | information,)) + number.to_bytes(size, "big")
    raise ValueError(f"{number} does not fit 64 bits")


def _order(key: bytes) -> tuple[int, int, bytes]:
    """Return what the keys of a map are sorted by: major type, length, bytes (CTAP 2.1, chapter 8)."""
    return key[0] >> 5, len(key), key


class _Decoder:
    """Decodes one message. Nothing is allocated that the message does not contain."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def value(self, at: int, depth: int) -> tuple[Value, int]:
        """Return the value at an offset, and the offset behind it."""
        major, number, end = self._head(at)
        match major:
            case 0:
                return number, end
            case 1:
                return -1 - number, end
            case 2:
                return self._bytes(end, number)
            case 3:
                raw, end = self._bytes(end, number)
                try:
                    return raw.decode(), end
                except UnicodeDecodeError:
                    raise CborError("a text string is not UTF-8") from None
            case 4 | 5 if depth == MAX_DEPTH:
                raise CborError(f"more than {MAX_DEPTH} levels")
            case 4:
                return self._array(end, number, depth + 1)
            case 5:
                return self._map(end, number, depth + 1)
            case 7 if self._data[at] & 31 in (_FALSE, _TRUE):
                return number == _TRUE, end
        raise CborError(f"a value begins with {self._data[at]:#04x}: tags, floats and null are not allowed")

    def _head(self, at: int) -> tuple[int, int, int]:
        first, end = self._bytes(at, 1)
        major, information = first[0] >> 5, first[0] & 31
        if information < 24:
            return major, information, end
        if information not in _SIZES or major == _SIMPLE:
            raise CborError(f"a value begins with {first[0]:#04x}: it has an indefinite or reserved length")
        raw, end = self._bytes(end, _SIZES[information])
        number = int.from_bytes(raw, "big")
        if number < 24 or (information > 24 and number < 1 << 8 * _SIZES[information - 1]):
            raise CborError(f"the number {number} is not in its shortest form")
        return major, number, end

    def _bytes(self, at: int, count: int) -> tuple[bytes, int]:
        if count > len(self._data) - at:
            raise CborError("the message ends within a value")
        return self._data[at : at + count], at + count

    def _array(self, at: int, count: int, depth: int) -> tuple[list[Value], int]:
        values: list[Value] = []
        for _ in range(count):  # each takes a byte, so a count that is too large ends with the message
            value, at = self.value(at, depth)
            values.append(value)
        return values, at

    def _map(self, at: int, count: int, depth: int) -> tuple[dict[Key, Value], int]:
        values: dict[Key, Value] = {}
        last: tuple[int, int, bytes] | None = None
        for _ in range(count):
            start = at
            key, at = self.value(at, depth)
            order = _order(self._data[start:at])
            if not isinstance(key, int | str) or isinstance(key, bool):
                raise CborError("a key of a map is neither an integer nor a text string")
            if last is not None and order <= last:
                raise CborError("the keys of a map are not in their order, or one is there twice")
            last = order
            values[key], at = self.value(at, depth)
        return values, at
