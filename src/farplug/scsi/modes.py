"""Mode pages: what MODE SENSE tells and MODE SELECT changes (SPC-4, chapter 7.5; SBC-3, chapter 6.5).

There are no block descriptors. All pages together stay below 192 bytes: Linux looks for the cache no further.
"""

from __future__ import annotations

from farplug.scsi.sense import INVALID_FIELD_IN_PARAMETER_LIST, PARAMETER_LIST_LENGTH_ERROR, Sense
from farplug.usb.types import Buffer

ALL_PAGES = 0x3F

_CACHING = 0x08
_WCE = 0x04


def _page(text: str, length: int) -> bytes:
    """A page of which the first bytes are given."""
    content = bytes.fromhex(text)
    return bytes((content[0], length)) + content[1:].ljust(length, b"\0")


_CACHED, _UNCACHED = _page("08 04", 0x12), _page("08", 0x12)
"""Caching: with WCE there is a write cache."""


class ModePages:
    """The mode pages of a disk. What is changed lasts as long as the disk; nothing is saved.

    Args:
        write_cache: the disk has one: WCE is set and can be changed, which nothing else can.
    """

    def __init__(self, write_cache: bool = True) -> None:
        caching = _CACHED if write_cache else _UNCACHED
        pages = (
            _page("01", 0x0A),  # read-write error recovery: nothing is retried or replaced
            caching,
            _page("0a 02 10", 0x0A),  # control: GLTSD, nothing is logged; commands may be reordered
            _page("1c 08", 0x0A),  # informational exceptions: DEXCPT, none are reported
        )
        self._defaults = {page[0]: page for page in pages}
        self._changeable = {page[0]: page[:2] + bytes(len(page) - 2) for page in pages} | {_CACHING: caching}
        """A mask for each page, behind its code and length."""
        self._current = dict(self._defaults)

    @property
    def write_cache(self) -> bool:
        """WCE: a write may be acknowledged before it is durable."""
        return bool(self._current[_CACHING][2] & _WCE)

    def sense(self, control: int, code: int) -> bytes | None:
        """Build what MODE SENSE tells; None if there is no such page.

        Args:
            control: 0 the current values, 1 masks of the bits that can be changed, 2 the defaults.
            code: of a page, or :data:`ALL_PAGES`.
        """
        pages = (self._current, self._changeable, self._defaults)[control]
        return b"".join(pages.values()) if code == ALL_PAGES else pages.get(code)

    def select(self, pages: Buffer) -> Sense | None:
        """Change the current values to what these pages say: all of it, or nothing and the reason is returned."""
        changed = dict(self._current)
        while pages:
            if len(pages) < 2:
                return PARAMETER_LIST_LENGTH_ERROR
            code = pages[0] & 0x7F  # PS is reserved here
            page = changed.get(code)
            if page is None or pages[1] != len(page) - 2:
                return INVALID_FIELD_IN_PARAMETER_LIST
            if len(pages) < len(page):
                return PARAMETER_LIST_LENGTH_ERROR
            wanted = page[:2] + bytes(pages[2 : len(page)])
            if any((old ^ new) & ~mask for old, new, mask in zip(page, wanted, self._changeable[code], strict=True)):
                return INVALID_FIELD_IN_PARAMETER_LIST
            changed[code] = wanted
            pages = pages[len(page) :]
        self._current = changed
        return None
