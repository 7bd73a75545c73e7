"""Make the tables of keyboard layouts in the package from xkb-data, through libxkbcommon: layouts.py [FOLDER].

Needs the packages xkb-data and libxkbcommon0. A table that is made again from the same xkb-data is the same.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from farplug.keymap.table import write_table
from farplug.keymap.xkb import read_layout

LAYOUTS = (
    *("us", "us-intl", "us-altgr-intl", "us-dvorak", "us-colemak", "us-workman", "gb", "gb-extd", "ie", "ca", "ca-eng"),
    *(
        "de",
        "de-nodeadkeys",
        "at",
        "ch",
        "ch-fr",
        "nl",
        "be",
        "fr",
        "fr-oss",
        "fr-bepo",
        "it",
        "es",
        "es-cat",
        "pt",
        "br",
    ),
    *("latam", "dk", "no", "se", "fi", "is", "fo", "ee", "lv", "lt", "pl", "cz", "cz-qwerty", "sk", "sk-qwerty", "hu"),
    *("si", "hr", "rs", "rs-latin", "ba", "me", "al", "mk", "bg", "ro", "ro-std", "md", "gr", "tr", "tr-f", "mt"),
    *("ru", "ua", "by", "kz", "ge", "am", "il", "ara", "ir", "in", "in-eng", "th", "vn", "jp", "kr", "za", "epo"),
)
FOLDER = Path(__file__).resolve().parent.parent / "src/farplug/keymap/layouts"
RULES = Path("/usr/share/X11/xkb/rules/evdev.lst")


def descriptions() -> dict[str, str]:
    """Return XKB's descriptions of layouts and variants."""
    found: dict[str, str] = {}
    for line in RULES.read_text().splitlines():
        if match := re.fullmatch(r"  (\w+)\s+(?!\w+: )(\S.*)", line):
            found.setdefault(match[1], match[2])
        elif match := re.fullmatch(r"  (\S+)\s+(\w+): (.*)", line):
            found[f"{match[2]}-{match[1]}"] = match[3]
    return found


def main() -> None:
    """Write the tables."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    described = descriptions()
    for name in LAYOUTS:
        layout, _, variant = name.partition("-")
        table = read_layout(layout, variant)
        if not table:
            raise SystemExit(f"{name}: this machine has no such layout, or no libxkbcommon")
        (folder / f"{name}.txt").write_text(write_table(described[name], table), "utf-8")


if __name__ == "__main__":
    main()
