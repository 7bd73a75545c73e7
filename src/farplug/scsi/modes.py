"""Mode pages for MODE SENSE and MODE SELECT (SPC-4, chapter 7.5; SBC-3, chapter 6.5).

There are no block descriptors. All pages together have less than 192 bytes, in which Linux searches the caching page.
"""

from __future__ import annotations

from collections.abc import Iterable

from farplug.scsi.sense import INVALID_FIELD_IN_PARAMETER_LIST, PARAMETER_LIST_LENGTH_ERROR, Sense
from farplug.usb.types import Buffer

ALL_PAGES = 0x3F

_CACHING = 0x08
_WCE = 0x04


def _page(text: str, length: int) -> bytes:
    """Return a page of ``length`` bytes after its header, from its first bytes."""
    content = bytes.fromhex(text)
    return bytes((content[0], length)) + content[1:].ljust(length, b"\0")


_READ_WRITE_ERROR_RECOVERY = _page("01", 0x0A)  # nothing is retried or replaced
_CACHE = _page("08 04", 0x12)  # WCE: there is a write cache; also the mask for changing it
_NO_CACHE = _page("08", 0x12)
_CONTROL = _page("0a 02 10", 0x0A)  # GLTSD, nothing is logged; commands may be reordered
_INFORMATIONAL_EXCEPTIONS = _page("1c 08", 0x0A)  # DEXCPT, none are reported

# MMC-3, chapter 5.5; MMC-2 for page 0D
_CD_DEVICE_PARAMETERS = _page("0d 00 0d 003c 004b", 0x06)  # 60 seconds of 75 frames
_CD_AUDIO_CONTROL = _page("0e 04", 0x0E)  # no port plays anything
_CAPABILITIES = _page("2a 0b 00 00 00 29 00 2260 0000 0800 2260", 0x14)
"""Reads CD-R, CD-RW and DVD-ROM, writes nothing; a tray that ejects and locks; 50 times 176 kB/s."""
_LOCKED_CAPABILITIES = _page("2a 0b 00 00 00 2b 00 2260 0000 0800 2260", 0x14)


class ModePages:
    """The mode pages of a logical unit. Changes are not saved.

    Args:
        defaults: the pages with their default values.
        changeable: for each page with changeable bits: its code, its length, and the mask of these bits.
    """

    def __init__(self, defaults: Iterable[bytes], changeable: Iterable[bytes] = ()) -> None:
        self._defaults = {page[0]: page for page in defaults}
        self._changeable = {code: page[:2] + bytes(len(page) - 2) for code, page in self._defaults.items()}
        self._changeable |= {mask[0]: mask for mask in changeable}
        self._current = dict(self._defaults)

    @property
    def write_cache(self) -> bool:
        """Return WCE: whether a write may end before it is durable."""
        return bool(self._current.get(_CACHING, _NO_CACHE)[2] & _WCE)

    def sense(self, control: int, code: int) -> bytes | None:
        """Return a page, or all of them, for MODE SENSE; None if there is no such page.

        Args:
            control: page control: 0 current values, 1 masks of the changeable bits, 2 default values.
            code: the code of a page, or :data:`ALL_PAGES`.
        """
        pages = (self._current, self._changeable, self._defaults)[control]
        return b"".join(pages.values()) if code == ALL_PAGES else pages.get(code)

    def replace(self, page: bytes) -> None:
        """Replace the current values of a page, for changes by the unit itself."""
        self._current[page[0]] = page

    def select(self, pages: Buffer) -> Sense | None:
        """Change the current values to those of ``pages``. If one is invalid, change nothing and return the sense."""
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


def disk_modes(*, write_cache: bool) -> ModePages:
    """Make the pages of a disk. Only WCE can be changed, if the disk has a write cache."""
    cache = _CACHE if write_cache else _NO_CACHE
    pages = (_READ_WRITE_ERROR_RECOVERY, cache, _CONTROL, _INFORMATIONAL_EXCEPTIONS)
    return ModePages(pages, (cache,))


def cdrom_modes() -> ModePages:
    """Make the pages of a CD-ROM drive. Nothing can be changed."""
    return ModePages((_READ_WRITE_ERROR_RECOVERY, _CD_DEVICE_PARAMETERS, _CD_AUDIO_CONTROL, _CAPABILITIES))


def cdrom_capabilities(*, locked: bool) -> bytes:
    """Build the capabilities page of a CD-ROM drive, 2A, which also has the lock state of the tray."""
    return _LOCKED_CAPABILITIES if locked else _CAPABILITIES
