"""Check names of files and labels of volumes against a format: they are kept unchanged, or refused."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_lowercase

from farplug.errors import ImageError, Reason, UsageError
from farplug.image import upcase
from farplug.image.tree import Entry, Tree, show, summarize
from farplug.image.volume import Format

MAX_NAME = 255
"""Maximum UTF-16 code units of a name on FAT32, exFAT and NTFS."""

MAX_FAT_FILE = 2**32 - 1
"""Maximum bytes of a file on FAT32."""

MAX_FAT_FOLDER = 65536
"""Maximum directory entries of 32 bytes in a folder of FAT32 (Microsoft's FAT specification, section 6)."""

MAX_ROCK_RIDGE = 253
"""Maximum bytes of a name on ISO 9660 that Linux does not truncate (fs/isofs/rock.c)."""

MAX_JOLIET = 103
"""Maximum characters of a name that xorriso keeps for Windows. The specification allows 64, Windows reads more."""

_NOT_JOLIET = re.compile(r"[\x00-\x1f*/:;?\\\U00010000-\U0010ffff]")
"""Joliet specification, section "Allowed character set"; it is UCS-2."""

_FORBIDDEN = re.compile(r'[\x00-\x1f"*/:<>?\\|]')
"""Characters not allowed in long names of FAT and exFAT, and of NTFS on Windows."""

_UPCASE = {Format.FAT32: upcase.NTFS, Format.EXFAT: upcase.EXFAT, Format.NTFS: upcase.NTFS}

_ASCII_UPCASE = {ord(letter): ord(letter.upper()) for letter in ascii_lowercase}

_LABEL_FALLBACK = "FARPLUG"


def utf16_units(text: str) -> int:
    """Return the length of a text in UTF-16 code units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def check_names(tree: Tree, format: Format) -> None:
    """Check that a format can hold the names of all entries of a folder unchanged.

    Raises:
        ImageError: BAD_NAME or TOO_LARGE.
    """
    if format is Format.EXT4:
        return  # it allows all names that Linux allows
    problems = dict(_problems(tree, format))
    if problems:
        reasons = [f"{show(path)} ({what})" for path, what in problems.items()]
        raise ImageError(
            f"{format.full_name} cannot hold {summarize(reasons)}",
            reason=Reason.BAD_NAME,
            remedy="rename that"
            if format is Format.ISO9660
            else "rename that, or use another format: ext4 holds any name",
        )
    if format is Format.FAT32:
        _check_fat_sizes(tree)


def _problems(tree: Tree, format: Format) -> Iterator[tuple[str, str]]:
    for entries in tree.folders.values():
        seen: dict[str, str] = {}
        for entry in entries:
            what = _name_problem(entry.name, format)
            twin = seen.setdefault(fold(entry.name, format), entry.name)
            if what:
                yield entry.path, what
            elif twin != entry.name:
                yield entry.path, f"equal to {twin} except for case"


def _name_problem(name: str, format: Format) -> str:
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "not UTF-8"
    if format is Format.ISO9660:
        return f"name of {length} bytes, {MAX_ROCK_RIDGE} at most" if length > MAX_ROCK_RIDGE else ""
    if match := _FORBIDDEN.search(name):
        return f"{match[0]!r} in the name"
    if name[-1] in ". ":
        return f"{name[-1]!r} at the end of the name"
    if (units := utf16_units(name)) > MAX_NAME:
        return f"name of {units} characters, {MAX_NAME} at most"
    return ""


def joliet_changes(tree: Tree) -> list[str]:
    """Return the paths whose names Windows shows changed on an ISO 9660 image; Linux shows them unchanged."""
    return [
        entry.path
        for entry in tree.entries
        if len(entry.name) > MAX_JOLIET or _NOT_JOLIET.search(entry.name) is not None
    ]


def fold(name: str, format: Format) -> str:
    """Return the text that a file system compares instead of a name: names with the same result exclude each other.

    exFAT and NTFS map each UTF-16 code unit by a table in the volume. FAT has no table: Windows uses its
    own for long names (RtlUpcaseUnicodeString in fastfat), which equals that of NTFS; for Linux only A-Z equal a-z.
    """
    return name.translate(_UPCASE[format]) if format in _UPCASE else name


def _check_fat_sizes(tree: Tree) -> None:
    large = [entry for entry in tree.entries if entry.size > MAX_FAT_FILE]
    if large:
        raise ImageError(
            f"{show(large[0].path)} has {large[0].size} bytes, a file on FAT32 at most {MAX_FAT_FILE}",
            reason=Reason.TOO_LARGE,
            remedy="use exFAT",
        )
    for path, entries in tree.folders.items():
        count = fat_slots(entries)
        if count > MAX_FAT_FOLDER:
            raise ImageError(
                f"the names in the folder {show(path) or '.'} need {count} entries, FAT32 has {MAX_FAT_FOLDER}",
                reason=Reason.TOO_LARGE,
                remedy="distribute the files over more folders, or use exFAT",
            )


def fat_slots(entries: list[Entry]) -> int:
    """Return the maximum directory entries of 32 bytes of a folder on FAT32: one for 13 characters of a long name."""
    return 2 + sum(1 + -(-utf16_units(entry.name) // 13) for entry in entries)


# Labels ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LabelRule:
    """The rule for labels of volumes of a format.

    Attributes:
        length: maximum length.
        allowed: allowed characters, as a class of a regular expression.
        upper: the label is in upper case.
        in_bytes: the length is in bytes of UTF-8, otherwise in UTF-16 code units.
    """

    length: int
    allowed: str
    upper: bool = False
    in_bytes: bool = False

    def measure(self, label: str) -> int:
        """Return the length of a label, in the unit of the rule."""
        return len(label.encode()) if self.in_bytes else utf16_units(label)

    def fits(self, label: str) -> bool:
        """Return whether a label is allowed."""
        return (
            re.fullmatch(f"{self.allowed}+", label) is not None
            and label == label.strip()
            and self.measure(label) <= self.length
        )


_TEXT = r"[^\x00-\x1f\x7f\ud800-\udfff]"
LABELS = {
    Format.FAT32: LabelRule(11, r"[A-Z0-9 !#$%&'()@^_`{}~-]", upper=True),
    Format.EXFAT: LabelRule(11, _TEXT),
    Format.NTFS: LabelRule(32, _TEXT),
    Format.EXT4: LabelRule(16, _TEXT, in_bytes=True),
    Format.ISO9660: LabelRule(16, r"[A-Z0-9_]", upper=True),
}


def check_label(label: str, format: Format) -> str:
    """Return a label as the volume will have it: in upper case on FAT32 and ISO 9660.

    Raises:
        UsageError: the label is not valid.
    """
    rule = LABELS[format]
    result = label.translate(_ASCII_UPCASE) if rule.upper else label
    if not rule.fits(result):
        unit = "bytes" if rule.in_bytes else "characters"
        which = f" of {rule.allowed[1:-1]}" if rule.upper else ""
        raise UsageError(
            f"{show(label)!r} is not a valid label for {format.full_name}: "
            f"1 to {rule.length} {unit}{which}, no spaces around them",
            reason=Reason.BAD_OPTION,
        )
    return result


def label_from_name(name: str, format: Format) -> str:
    """Return a label derived from a folder's name: invalid characters are replaced, a long name is truncated."""
    rule = LABELS[format]
    if rule.upper:
        name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().upper()
    label = "".join(c if re.fullmatch(rule.allowed, c) else "_" for c in name.strip())
    while rule.measure(label) > rule.length:
        label = label[:-1]
    label = label.strip()
    return label if label.strip("_") else _LABEL_FALLBACK
