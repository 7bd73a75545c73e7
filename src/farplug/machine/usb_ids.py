"""Names of vendors and products, from the usb.ids file of this machine.

Source: the comment at the start of usb.ids (http://www.linux-usb.org/usb-ids.html).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from farplug.text import printable

PATHS = ("usr/share/misc/usb.ids", "usr/share/hwdata/usb.ids", "var/lib/usbutils/usb.ids")
"""Where distributions install usb.ids, below the root."""

MAX_SIZE = 8 << 20
"""Bytes of usb.ids that are read: the file had 730 kB in 2025."""
MAX_NAME = 128
"""Characters of a name; longer names are cut."""


@dataclass(frozen=True, slots=True)
class UsbIds:
    """Names of vendors and products by number; unknown names are empty.

    Each name is searched in the text: to parse the whole file would take longer than the rest of a listing.

    Attributes:
        text: the text of usb.ids. It is not trusted.
    """

    text: str = ""

    def vendor(self, vendor_id: int) -> str:
        """Return the name of a vendor."""
        return _name(next(self._lines(vendor_id), ""))

    def product(self, vendor_id: int, product_id: int) -> str:
        """Return the name of a product."""
        number = f"\t{product_id:04x}  "
        return next((_name(line[1:]) for line in self._lines(vendor_id) if line[:7].lower() == number), "")

    def _lines(self, vendor_id: int) -> Iterator[str]:
        """Yield the line of a vendor, then those of its products."""
        text = self.text
        vendor = re.search(rf"^{vendor_id:04x}  ", text, re.MULTILINE | re.IGNORECASE)
        start = vendor.start() if vendor else len(text)
        while start < len(text):
            end = text.find("\n", start)
            if end < 0:
                end = len(text)
            yield text[start:end]
            start = end + 1
            if not text.startswith(("\t", "#", "\n"), start):  # the next vendor, or another part of the file
                return


def _name(line: str) -> str:
    return printable(line[6:].strip())[:MAX_NAME]


@lru_cache(maxsize=4)
def usb_ids(root: Path = Path("/")) -> UsbIds:
    """Return the names in this machine's usb.ids; none if there is no such file."""
    for path in PATHS:
        try:
            with (root / path).open("rb") as file:
                return UsbIds(file.read(MAX_SIZE).decode(errors="replace"))
        except OSError:
            continue
    return UsbIds()
