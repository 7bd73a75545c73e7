from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
from tests.image.support import alike

from farplug.errors import ImageError, Reason, UsageError
from farplug.image.names import (
    MAX_FAT_FILE,
    check_label,
    check_names,
    fat_slots,
    fold,
    joliet_changes,
    label_from_name,
    utf16_units,
)
from farplug.image.tree import Entry, Tree
from farplug.image.volume import Format

WINDOWS = (Format.FAT32, Format.EXFAT, Format.NTFS)


def tree_of(*paths: str, size: int = 0) -> Tree:
    """A tree of these files and the folders that they are in."""
    folders = {parent: None for path in paths for parent in reversed([str(p) for p in Path(path).parents[:-1]])}
    entries = [Entry(path, True, 0, 0) for path in folders] + [Entry(path, False, size, 0) for path in paths]
    return Tree(Path("/folder"), tuple(entries))


@pytest.mark.parametrize("format", WINDOWS)
@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (("sub/a*b",), r"sub/a\*b \('\*' in the name\)"),
        *(((f"a{bad}b",), re.escape(f"({bad!r} in the name)")) for bad in "?:|"),
        (('a"b',), "in the name"),
        (("a\\b",), "in the name"),
        (("a\nb",), "in the name"),
        (("a<b>",), "'<' in the name"),
        (("dot.",), "'.' at the end of the name"),
        (("space ",), "' ' at the end of the name"),
        (("sub /x",), r"sub  \(' ' at the end"),
        (("x" * 256,), "name of 256 characters, 255 at most"),
        (("😀" * 128,), "name of 256 characters"),
        (("bad\udcff",), r"bad\\udcff \(not UTF-8\)"),
        (("Readme", "README"), "README .equal to Readme except for case"),
        (("ä/x", "Ä/x"), "equal to"),
        (("\u1fb3.txt", "\u1fbc.txt"), "\u1fbc.txt .equal to \u1fb3.txt except for case"),
        (("a*", "b*", "c*", "d*", "e*"), "and 2 more"),
    ],
)  # fmt: skip
def test_names_that_do_not_fit(format: Format, paths: tuple[str, ...], text: str) -> None:
    with pytest.raises(ImageError, match=text) as caught:
        check_names(tree_of(*paths), format)
    assert caught.value.reason is Reason.BAD_NAME
    assert format.full_name in caught.value.message
    check_names(tree_of(*paths), Format.EXT4)


def test_the_tables_are_those_of_the_tools() -> None:
    """The tables equal those of mkfs.exfat and mkntfs on this machine."""
    script = Path(__file__).parents[2] / "scripts" / "upcase_tables.py"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("format", "kept", "equal"), [(Format.EXFAT, 344, 27), (Format.NTFS, 246, 27)])
def test_the_tables_differ_from_unicode(format: Format, kept: int, equal: int) -> None:
    """Counts of pairs that are equal for only one of them."""
    units = [chr(unit) for unit in range(0x10000) if not 0xD800 <= unit < 0xE000]

    def pairs(same: Callable[[str], str], other: Callable[[str], str]) -> int:
        groups: dict[str, list[str]] = {}
        for unit in units:
            groups.setdefault(same(unit), []).append(unit)
        return sum(other(a) != other(b) for group in groups.values() for a, b in combinations(group, 2))

    def upper(character: str) -> str:
        return mapped if len(mapped := character.upper()) == 1 else character

    assert pairs(upper, lambda unit: fold(unit, format)) == kept
    assert pairs(lambda unit: fold(unit, format), upper) == equal
    for character in units:
        assert fold(fold(character, format), format) == fold(character, format)


@pytest.mark.parametrize("format", WINDOWS)
def test_names_that_are_equal_for_python_only(format: Format) -> None:
    names = alike(format)
    assert len(names) > 500
    check_names(tree_of(*names), format)


@pytest.mark.parametrize("format", Format)
def test_names_that_fit(format: Format) -> None:
    check_names(
        tree_of(
            "x" * (253 if format is Format.ISO9660 else 255),
            "😀" * 60,
            ".a",
            "a b",
            "a.b.c",
            "con",
            "a[1]",
            "straße",
            "STRASSE",
            "s\u0131ra",  # a Turkish i
            "sira",
            "10\u00b5m",  # micro sign
            "10\u03bcm",  # mu
            "\U00010400",
            "\U00010428",
            "a/Readme",
            "README",
        ),
        format,
    )


def test_iso_takes_what_linux_takes_in_utf8() -> None:
    check_names(tree_of("a*b", "A*B", "dot.", "a\nb"), Format.ISO9660)
    with pytest.raises(ImageError, match="not UTF-8"):
        check_names(tree_of("a\udc80"), Format.ISO9660)
    check_names(tree_of("x" * 253), Format.ISO9660)
    with pytest.raises(ImageError, match="name of 254 bytes, 253 at most"):
        check_names(tree_of("ä" * 127), Format.ISO9660)


def test_names_that_windows_sees_differently() -> None:
    tree = tree_of("a", "ä" * 103, "x" * 104, "a*b", "a;b", "sub?/x", "😀")
    assert joliet_changes(tree) == ["sub?", "x" * 104, "a*b", "a;b", "😀"]


def test_large_files_and_folders() -> None:
    check_names(tree_of("big", size=MAX_FAT_FILE), Format.FAT32)
    with pytest.raises(ImageError, match="big has 4294967296 bytes, a file on FAT32 at most 4294967295") as caught:
        check_names(tree_of("big", size=MAX_FAT_FILE + 1), Format.FAT32)
    assert caught.value.reason is Reason.TOO_LARGE
    check_names(tree_of("big", size=MAX_FAT_FILE + 1), Format.EXFAT)
    names = [f"sub/{number:026}" for number in range(21846)]  # three entries each, two for . and ..
    with pytest.raises(ImageError, match=r"folder sub need 65540 entries, FAT32 has 65536") as caught:
        check_names(tree_of(*names), Format.FAT32)
    assert caught.value.reason is Reason.TOO_LARGE
    check_names(tree_of(*names[:-2]), Format.FAT32)
    check_names(tree_of(*names), Format.EXFAT)


def test_slots() -> None:
    entries = list(tree_of("a", "b" * 13, "c" * 14, "😀" * 7).entries)
    assert fat_slots(entries) == 2 + 2 + 2 + 3 + 3
    assert utf16_units("a😀") == 3


@pytest.mark.parametrize(
    ("format", "label", "result"),
    [
        (Format.FAT32, "drivers", "DRIVERS"),
        (Format.FAT32, "A B-C_1~(2)", "A B-C_1~(2)"),
        (Format.EXFAT, "Größe", "Größe"),
        (Format.EXFAT, "😀😀😀😀😀x", "😀😀😀😀😀x"),
        (Format.NTFS, "x" * 32, "x" * 32),
        (Format.EXT4, "ä" * 8, "ä" * 8),
        (Format.ISO9660, "cd_1", "CD_1"),
    ],
)
def test_labels(format: Format, label: str, result: str) -> None:
    assert check_label(label, format) == result


@pytest.mark.parametrize(
    ("format", "label"),
    [
        *((format, bad) for format in Format for bad in ("", " a", "a ", "a\nb", "\udcff", "x" * 33)),
        *((Format.FAT32, bad) for bad in ("\u0131", "ß", "\u017f", "x" * 12, "a.b", "a/b", "ä", "a*", "a+b")),
        (Format.EXFAT, "😀" * 6),
        (Format.EXT4, "ä" * 9),
        (Format.ISO9660, "a b"),
        (Format.ISO9660, "x" * 17),
    ],
)
def test_labels_that_do_not_fit(format: Format, label: str) -> None:
    with pytest.raises(
        UsageError, match=f"is not a valid label for {format.full_name}: 1 to [0-9]+ (bytes|characters)"
    ):
        check_label(label, format)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("drivers", ("DRIVERS", "drivers", "drivers", "drivers", "DRIVERS")),
        ("Über uns.2", ("UBER UNS_2", "Über uns.2", "Über uns.2", "Über uns.2", "UBER_UNS_2")),
        ("very long name of it", ("VERY LONG N", "very long n", "very long name o", "very long name of it",
                                  "VERY_LONG_NAME_O")),
        ("中文", ("FARPLUG", "中文", "中文", "中文", "FARPLUG")),
        ("", ("FARPLUG",) * 5),
        ("...", ("FARPLUG", "...", "...", "...", "FARPLUG")),
        ("a\nb\udcff", ("A_B", "a_b_", "a_b_", "a_b_", "A_B")),
        ("😀" * 9, ("FARPLUG", "😀" * 5, "😀" * 4, "😀" * 9, "FARPLUG")),
    ],
)  # fmt: skip
def test_labels_from_names_of_folders(name: str, labels: tuple[str, ...]) -> None:
    formats = (Format.FAT32, Format.EXFAT, Format.EXT4, Format.NTFS, Format.ISO9660)
    assert tuple(label_from_name(name, format) for format in formats) == labels
    for format in formats:
        assert check_label(label_from_name(name, format), format) == label_from_name(name, format)
