"""Names of vendors and products, from the usb.ids file of this machine.

Source: the comment at the start of usb.ids (http://www.linux-usb.org/usb-ids.html).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

PLACES = ("usr/share/misc/usb.ids", "usr/share/hwdata/usb.ids", "var/lib/usbutils/usb.ids")
"""Where distributions have it, below the root."""

MAX_SIZE = 8 << 20
"""Bytes that are read of it: it had 730 kB in 2025."""
MAX_NAME = 128
"""Characters of a name; longer ones are cut."""

_LINE = re.compile(r"(\t?)([0-9a-fA-F]{4})  (.*)")


@dataclass(frozen=True, slots=True)
class UsbIds:
    """Names by number. Unknown ones are empty."""

    vendors: Mapping[int, str] = field(default_factory=dict)
    products: Mapping[tuple[int, int], str] = field(default_factory=dict)

    def vendor(self, vendor_id: int) -> str:
        """The name of a vendor."""
        return self.vendors.get(vendor_id, "")

    def product(self, vendor_id: int, product_id: int) -> str:
        """The name of a product."""
        return self.products.get((vendor_id, product_id), "")

    @classmethod
    def parse(cls, text: str) -> UsbIds:
        """Read the part about vendors and products. Lines that are written wrong are skipped; never raises."""
        vendors: dict[int, str] = {}
        products: dict[tuple[int, int], str] = {}
        vendor = -1
        for line in text.split("\n"):
            if not line or line[0] == "#":
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                if line[0] != "\t":  # another part begins: classes, languages and the like
                    vendor = -1
                continue
            indent, number, name = match[1], int(match[2], 16), printable(match[3])[:MAX_NAME]
            if not indent:
                vendor = number
                vendors.setdefault(number, name)
            elif vendor >= 0:
                products.setdefault((vendor, number), name)
        return cls(vendors, products)


def printable(text: str) -> str:
    """Text of a device or a file, in one line: what does not print reads as a replacement character."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.strip())


@lru_cache(maxsize=4)
def usb_ids(root: Path = Path("/")) -> UsbIds:
    """The names of this machine; none where there is no usb.ids."""
    for place in PLACES:
        try:
            with (root / place).open("rb") as file:
                return UsbIds.parse(file.read(MAX_SIZE).decode(errors="replace"))
        except OSError:
            continue
    return UsbIds()
