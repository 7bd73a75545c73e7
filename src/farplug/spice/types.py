"""Constants of SPICE: channel types, capabilities, link errors.

Source: spice-protocol 0.14.3, ``spice/enums.h``, ``spice/protocol.h``, ``spice/error_codes.h``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TypeVar

_Code = TypeVar("_Code", bound=IntEnum)


def _unknown(codes: type[_Code], value: object, largest: int) -> _Code | None:
    """Return a member for an unknown code, which has a name to print; None if the value is not a code."""
    if not isinstance(value, int) or not 0 <= value <= largest:
        return None
    member = int.__new__(codes, value)
    member._name_ = f"UNKNOWN_{value}"
    member._value_ = value
    return member


class ChannelType(IntEnum):
    """SPICE_CHANNEL_*."""

    MAIN = 1
    DISPLAY = 2
    INPUTS = 3
    CURSOR = 4
    PLAYBACK = 5
    RECORD = 6
    TUNNEL = 7
    SMARTCARD = 8
    USBREDIR = 9
    PORT = 10
    WEBDAV = 11

    @classmethod
    def _missing_(cls, value: object) -> ChannelType | None:
        return _unknown(cls, value, 0xFF)

    def __str__(self) -> str:
        return self.name.lower()


CHANNEL_NAMES = frozenset({*map(str, ChannelType), "all"})
"""The names that are valid in ``secure-channels`` of a ``.vv`` file."""


class CommonCapability(IntEnum):
    """SPICE_COMMON_CAP_*: bit numbers."""

    AUTH_SELECTION = 0
    AUTH_SPICE = 1
    AUTH_SASL = 2
    MINI_HEADER = 3


class MainCapability(IntEnum):
    """SPICE_MAIN_CAP_*: bit numbers."""

    SEMI_SEAMLESS_MIGRATE = 0
    NAME_AND_UUID = 1
    AGENT_CONNECTED_TOKENS = 2
    SEAMLESS_MIGRATE = 3


class VmcCapability(IntEnum):
    """SPICE_SPICEVMC_CAP_*: bit numbers."""

    DATA_COMPRESS_LZ4 = 0


class LinkError(IntEnum):
    """SPICE_LINK_ERR_*: the result of a link message, and of a ticket."""

    OK = 0
    ERROR = 1
    INVALID_MAGIC = 2
    INVALID_DATA = 3
    VERSION_MISMATCH = 4
    NEED_SECURED = 5
    NEED_UNSECURED = 6
    PERMISSION_DENIED = 7
    BAD_CONNECTION_ID = 8
    CHANNEL_NOT_AVAILABLE = 9

    @classmethod
    def _missing_(cls, value: object) -> LinkError | None:
        return _unknown(cls, value, 0xFFFFFFFF)

    def __str__(self) -> str:
        return f"link error {self.value} ({self.name})"


def pack_capabilities(bits: Iterable[int]) -> tuple[int, ...]:
    """Return capability words with these bit numbers set.

    >>> pack_capabilities([0, 3, 33])
    (9, 2)
    """
    words: list[int] = []
    for bit in bits:
        while len(words) <= bit // 32:
            words.append(0)
        words[bit // 32] |= 1 << bit % 32
    return tuple(words)


def has_capability(words: Sequence[int], bit: int) -> bool:
    """Return whether a bit number is set in capability words."""
    return bit // 32 < len(words) and bool(words[bit // 32] >> bit % 32 & 1)
