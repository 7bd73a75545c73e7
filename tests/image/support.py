"""Make folders, and read the images that are made of them."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from farplug.image.names import fold
from farplug.image.volume import Format, Partition, Volume

MIB = 1 << 20
WHEN = 1_000_000_000
"""Time of every file: an even second, which FAT can hold."""

PLAIN = {
    "empty": b"",
    "UPPER.TXT": b"upper",
    "lower.txt": b"lower",
    "Mixed Case.Txt": b"mixed",
    ".hidden": b"hidden",
    "-dash": b"dash",
    "longfilename1.txt": b"1",
    "longfilename2.txt": b"2",
    "l" * 180 + ".txt": b"long",
    "it's $a `b`;c, [d]": b"quoted",
    "Größe der Dateien.txt": b"umlaut",
    "中文 name.txt": b"chinese",
    "d[1]/x[y]/z": b"brackets",
    "d1/xy/z": b"no brackets",
    "d1/xy/[z]": b"a pattern for the other",
    "/".join(["deep"] * 20) + "/end": b"deep",
    "big.bin": random.Random(1).randbytes(3 * MIB + 1),
}
"""Names that mtools keeps."""

ODD = {
    "ä.txt": b"short umlaut",
    "Á": b"capital",
    "e\u0301": b"combining",
    "½": b"half",
    "😀.txt": b"emoji",
    "dir 😀/中": b"in emoji",
    "con": b"device",
    "LONGFI~1.TXT": b"short name of another",
    "m" * 255: b"longest",
}
"""Names that mtools changes."""

SIMILAR = {f"similar/IMG_2026 {number}.jpeg": b"%d" % number for number in range(300)}
"""Names for which mtools is too slow."""


def alike(format: Format) -> dict[str, bytes]:
    """Return files whose names are equal except for case for Python, but not for the file system."""
    characters = [chr(code) for code in range(0x21, 0x10450) if not 0xD800 <= code < 0xE000]
    pairs = set()
    for change in (str.upper, str.lower, str.casefold):
        groups: dict[str, list[str]] = {}
        for character in characters:
            groups.setdefault(change(character), []).append(character)
        pairs |= {pair for group in groups.values() for pair in combinations(group, 2)}
    return {
        f"alike/{ord(one):X} {ord(other):X}/{name}.txt": name.encode()
        for one, other in pairs
        if fold(one, format) != fold(other, format)
        for name in (one, other)
    }


ISO = {
    name: content
    for name, content in {**PLAIN, **ODD, "a*b?": b"stars", "n" * 253: b"longest"}.items()
    if len(name) < 254
}
"""Names for ISO 9660."""


def make_folder(path: Path, files: dict[str, bytes], *, many: int = 0) -> Path:
    """A folder with these files, and ``many`` more."""
    rest = {f"many/{number:03} of many": b"%d" % number * number for number in range(many)}
    for name, content in {**files, **rest}.items():
        place = path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        os.utime(place, (WHEN, WHEN))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(place.relative_to(folder)): place.read_bytes() for place in folder.rglob("*") if place.is_file()}


def partition(image: Path, volume: Volume, place: Path) -> Path:
    """The filesystem in an image, as a file of its own. Holes are not read: each page would be filled with zeros."""
    with image.open("rb") as source, place.open("wb") as target:
        target.truncate(volume.length)
        for begin, end in stretches(source.fileno(), MIB, MIB + volume.length):
            source.seek(begin)
            target.seek(begin - MIB)
            target.write(source.read(end - begin))
    return place


def stretches(fd: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where the data of a file between two offsets begins and ends."""
    while begin < end:
        try:
            begin = os.lseek(fd, begin, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # no data follows
        hole = os.lseek(fd, begin, os.SEEK_HOLE)
        if begin < end:
            yield begin, min(hole, end)
        begin = hole


def run(*command: str) -> str:
    """Run a program of this machine that must succeed."""
    environment = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LC_ALL": "C.UTF-8", "TZ": "UTC0"}
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=50)
    assert result.returncode == 0, f"{command}: {result.stdout.decode()}{result.stderr.decode()}"
    return (result.stdout + result.stderr).decode()


def table(image: Path, block_size: int) -> str:
    """The partition, as fdisk shows it: start, blocks, type."""
    output = run("fdisk", "-b", str(block_size), "-o", "Start,Sectors,Type", "-l", str(image))
    return " ".join(output.strip().splitlines()[-1].split())


TYPES = {Partition.MBR: "W95 FAT32 (LBA)", Partition.GPT: "Microsoft basic data"}
