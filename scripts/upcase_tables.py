#!/usr/bin/env python3
"""Write src/farplug/image/upcase.py: the characters that are equal in names of exFAT and NTFS.

Every exFAT and NTFS volume contains a table that maps each UTF-16 code unit to upper case. The tables are read from
volumes of mkfs.exfat (exfatprogs) and mkntfs (ntfs-3g), the programs that farplug makes images with:

* exFAT: the Up-case Table of Microsoft's exFAT specification, section 7.2, compressed as in section 7.2.5.
* NTFS: the metadata file $UpCase, MFT record 10: 65536 little-endian code units.

``--check`` writes nothing, and fails if the file differs from the output for the tools of this machine.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TypeAlias

from farplug.programs import find_program

OUTPUT = Path(__file__).parents[1] / "src" / "farplug" / "image" / "upcase.py"
VOLUME_SIZE = 16 << 20
CODE_UNITS = 1 << 16

Run: TypeAlias = tuple[int, int, int, int]
"""First and last code unit, the step between them, and the offset that is added to each."""

TEXT = '''"""Upper-case tables of exFAT and NTFS volumes, written by scripts/upcase_tables.py: do not edit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Run: TypeAlias = tuple[int, int, int, int]
"""First and last UTF-16 code unit, the step between them, and the offset that is added to each."""

# fmt: off
_BOTH: tuple[Run, ...] = (
{both}
)
_EXFAT: tuple[Run, ...] = (
{exfat}
)
_NTFS: tuple[Run, ...] = (
{ntfs}
)
# fmt: on


def _table(runs: Iterable[Run]) -> dict[int, int]:
    return {{unit: unit + offset for first, last, step, offset in runs for unit in range(first, last + 1, step)}}


EXFAT = _table((*_BOTH, *_EXFAT))
"""For str.translate: the table of mkfs.exfat, the recommended one of the exFAT specification (section 7.2.5.1)."""

NTFS = _table((*_BOTH, *_NTFS))
"""For str.translate: the table of mkntfs, that of Windows."""
'''


def exfat_table() -> list[int]:
    """Return the table of a volume that mkfs.exfat makes."""
    data = _volume("mkfs.exfat")
    sector = 1 << data[108]
    cluster = sector << data[109]
    heap, root = (struct.unpack_from("<I", data, offset)[0] for offset in (88, 96))

    def place(number: int) -> int:
        return int(heap) * sector + (number - 2) * cluster

    entries = (data[at : at + 32] for at in range(place(root), place(root) + cluster, 32))
    entry = next(entry for entry in entries if entry[0] == 0x82)
    first, length = struct.unpack_from("<IQ", entry, 20)
    words = iter(struct.unpack(f"<{length // 2}H", data[place(first) : place(first) + length]))
    table: list[int] = []
    for word in words:
        if word == 0xFFFF and (count := next(words, None)) is not None:
            table.extend(range(len(table), len(table) + count))
        else:
            table.append(word)
    return [*table, *range(len(table), CODE_UNITS)]


def ntfs_table() -> list[int]:
    """Return the table of a volume that mkntfs makes."""
    data = _volume("mkntfs", "-q", "-F", "-f")
    cluster = struct.unpack_from("<H", data, 11)[0] * data[13]
    record = data[struct.unpack_from("<Q", data, 48)[0] * cluster + 10 * 1024 :][:1024]
    offset = struct.unpack_from("<H", record, 20)[0]
    while struct.unpack_from("<I", record, offset)[0] != 0x80:  # $DATA
        offset += struct.unpack_from("<I", record, offset + 4)[0]
    run = record[offset + struct.unpack_from("<H", record, offset + 32)[0] :]
    lengths, places = run[0] & 15, run[0] >> 4
    count = int.from_bytes(run[1 : 1 + lengths], "little")
    place = int.from_bytes(run[1 + lengths : 1 + lengths + places], "little", signed=True)
    assert count * cluster >= 2 * CODE_UNITS, "the table is in several pieces"
    return list(struct.unpack_from(f"<{CODE_UNITS}H", data, place * cluster))


def _volume(program: str, *arguments: str) -> bytes:
    with tempfile.NamedTemporaryFile(prefix="farplug-") as file:
        file.truncate(VOLUME_SIZE)
        subprocess.run([find_program(program), *arguments, file.name], check=True, capture_output=True)
        return Path(file.name).read_bytes()


def runs(table: list[int]) -> list[Run]:
    """Return a table in compressed form."""
    left = {unit: upper - unit for unit, upper in enumerate(table) if upper != unit}
    found = []
    while left:
        first, offset = next(iter(left.items()))
        units = max((_run(left, first, step) for step in (1, 2)), key=len)
        found.append((first, units[-1], units.step, offset))
        for unit in units:
            del left[unit]
    return found


def _run(left: dict[int, int], first: int, step: int) -> range:
    end = first
    while left.get(end) == left[first]:
        end += step
    return range(first, end, step)


def module() -> str:
    """Return the text of the module."""
    exfat, ntfs = runs(exfat_table()), runs(ntfs_table())
    both = [run for run in exfat if run in ntfs]
    parts = {
        "both": both,
        "exfat": [run for run in exfat if run not in both],
        "ntfs": [r for r in ntfs if r not in both],
    }
    return TEXT.format(**{name: _rows(part) for name, part in parts.items()})


def _rows(part: list[Run]) -> str:
    text = " ".join(f"(0x{first:04X},_0x{last:04X},_{step},_{offset})," for first, last, step, offset in part)
    lines = textwrap.wrap(text, 116, break_long_words=False, break_on_hyphens=False)
    return textwrap.indent("\n".join(lines).replace("_", " "), "    ")


def main() -> None:
    """Write the module, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    text = module()
    if not parser.parse_args().check:
        OUTPUT.write_text(text)
    elif OUTPUT.read_text() != text:
        sys.exit(f"{OUTPUT} differs from the output for the tools of this machine: run {Path(__file__).name}")


if __name__ == "__main__":
    main()
