"""Recognize the format of a file by its first and last bytes. The only table of formats that are not RAW images.

A RAW image may begin with any bytes. So a signature alone is not enough to recognize a format: the version, and fields
that have few possible values, must be right, too.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Self, TypeAlias

from farplug.errors import Remedy
from farplug.shell import shell_word
from farplug.store.overlay_format import MAGIC

CD_BLOCK_SIZE = 2048
_FIRST_DESCRIPTOR, _DESCRIPTORS = 16, 16
"""The first block with a volume descriptor, and the number of blocks to check (ECMA-119, chapter 6.7.1; ECMA-167,
2/8.3).
"""

BEGIN_SIZE = (_FIRST_DESCRIPTOR + _DESCRIPTORS) * CD_BLOCK_SIZE
END_SIZE = 512

_IDENTIFIERS = (b"CD001", b"BEA01", b"NSR02", b"NSR03")
"""Identifiers of ISO 9660 and UDF, at byte 1 of a descriptor."""
_HIGH_SIERRA = b"CDROM"
"""Identifier of High Sierra, the predecessor of ISO 9660, at byte 9 of a descriptor."""

MAX_SHEET = 1 << 16
"""Maximum size in bytes of a text file that describes a CD."""


@dataclass(frozen=True, slots=True)
class Content:
    """The first and the last bytes of a file.

    Attributes:
        size: of the file, in bytes.
        begin: its first bytes, up to :data:`BEGIN_SIZE`.
        end: its last bytes, up to :data:`END_SIZE`.
    """

    size: int
    begin: bytes
    end: bytes

    @classmethod
    def read(cls, fd: int) -> Self:
        """Read the first and the last bytes of an open file or block device.

        Raises:
            OSError: a read failed.
        """
        size = os.lseek(fd, 0, os.SEEK_END)
        return cls(size, os.pread(fd, BEGIN_SIZE, 0), os.pread(fd, END_SIZE, max(size - END_SIZE, 0)))

    @property
    def is_cd(self) -> bool:
        """Return whether the file has a volume of ISO 9660, High Sierra or UDF."""
        descriptors = (self.begin[at:] for at in range(_FIRST_DESCRIPTOR * CD_BLOCK_SIZE, BEGIN_SIZE, CD_BLOCK_SIZE))
        return any(block[1:6] in _IDENTIFIERS or block[9:14] == _HIGH_SIERRA for block in descriptors)

    @property
    def has_mbr(self) -> bool:
        """Return whether block 0 has the signature of a master boot record (and of a FAT volume)."""
        return self.begin[510:512] == b"\x55\xaa"

    def has(self, signature: bytes, offset: int = 0) -> bool:
        """Return whether the bytes at an offset are ``signature``."""
        return self.begin.startswith(signature, offset)

    def little_endian(self, offset: int, length: int) -> int:
        """Return the little-endian number at an offset; bytes after the end of the file count as zero."""
        return int.from_bytes(self.begin[offset : offset + length].ljust(length, b"\0"), "little")

    def big_endian(self, offset: int, length: int) -> int:
        """Return the big-endian number at an offset; bytes after the end of the file count as zero."""
        return int.from_bytes(self.begin[offset : offset + length].ljust(length, b"\0"), "big")


@dataclass(frozen=True, slots=True)
class FileFormat:
    """A format of files that are not RAW images.

    In ``command`` and ``result``, ``{path}`` is the file, and ``{raw}``, ``{iso}`` and ``{folder}`` are unused names
    for the result of the command. ``{unpacked}`` is the name without the suffix of a compression, and ``{data}`` the
    file that a text file describes.

    Attributes:
        name: with its article.
        matches: whether a file has this format.
        action: what a user can do, for people.
        command: how, as a shell command; empty: no command is known.
        setting: how the result is plugged, as in :class:`~farplug.errors.Remedy`; empty: as the file itself.
        result: the value of ``setting``.
        data: the suffix of the file that a text file describes; None: the text has the name.
    """

    name: str
    matches: Callable[[Content], object]
    action: str
    command: str = ""
    setting: str = ""
    result: str = ""
    data: str | None = None

    def remedy(self, path: Path, content: Content, setting: str, alternative: Remedy) -> Remedy:
        """Return the remedy for a file of this format.

        Args:
            path: of the file.
            content: of the file.
            setting: how the file was to be plugged: ``usb_disk``, ``usb_cdrom``.
            alternative: what to do instead.
        """
        place = Path(path.name) if path.is_block_device() else path
        unpacked = place.with_suffix("") if place.suffix.lower() in _COMPRESSION_SUFFIXES else place.with_suffix(".raw")
        names = {
            "path": path,
            "raw": _unused(place.with_suffix(".raw")),
            "iso": _unused(place.with_suffix(".iso")),
            "folder": _unused(place.with_suffix("")),
            "unpacked": _unused(unpacked),
            "data": _data_path(path, content) if self.data is None else path.with_suffix(self.data),
        }
        command = self.command.format_map({key: shell_word(name) for key, name in names.items()})
        if self.setting in ("", setting):
            return Remedy(self.action, command=command, alternative=alternative)
        result = self.result.format_map(names)
        action = f"{self.action}, then plug that in"
        return Remedy(action, command=command, setting=self.setting, value=result, alternative=alternative)


def recognize(content: Content) -> FileFormat | None:
    """Return the format of a file that is not a RAW image; None: the file may be one."""
    return next((format for format in FORMATS if format.matches(content)), None)


def _unused(path: Path) -> Path:
    """Return the path, with a number if a file has it: the commands would overwrite that file."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
    return next(unused for unused in chain([path], numbered) if not os.path.lexists(unused))


_COMPRESSION_SUFFIXES = (".bz2", ".gz", ".lz", ".lz4", ".lzma", ".lzo", ".xz", ".z", ".zst")


# Checks ---------------------------------------------------------------------------------------------------------------

_Check: TypeAlias = Callable[[Content], object]


def _begins(*signatures: bytes) -> _Check:
    return lambda content: content.begin.startswith(signatures)


def _qcow(*versions: int) -> _Check:
    return lambda content: content.has(b"QFI\xfb") and content.big_endian(4, 4) in versions


def _qed(content: Content) -> bool:
    """Check for a cluster size that is a power of two from 4 KiB to 64 MiB (QEMU's docs/interop/qed_spec.txt)."""
    return content.has(b"QED\0") and content.little_endian(4, 4) in [1 << bit for bit in range(12, 27)]


def _vmdk(content: Content) -> bool:
    """Check for a sparse extent, of ESX too, or a descriptor (VMware, Virtual Disk Format 1.1)."""
    sparse = content.has(b"KDMV") and content.little_endian(4, 4) in (1, 2, 3)
    esx = content.has(b"COWD\1\0\0\0") or content.has(b"\xbe\xba\xfe\xca\0\0\0\0\1\0\0\0\2\0\0\0")
    return sparse or esx or content.has(b"# Disk DescriptorFile")


def _vhd(content: Content) -> bool:
    """Check for the footer, of version 1.0; a dynamic disk also begins with it (VHD specification)."""
    return any(
        footer.startswith(b"conectix") and footer[12:16] == b"\0\1\0\0" for footer in (content.begin, content.end)
    )


def _dmg(content: Content) -> bool:
    """Check for the trailer, of version 4 and 512 bytes."""
    return content.end.startswith(b"koly\0\0\0\4\0\0\2\0")


def _parallels(content: Content) -> bool:
    return content.little_endian(16, 4) == 2 and content.begin[:16] in (b"WithoutFreeSpace", b"WithouFreSpacExt")


_SHORTEST_GZIP = 20
"""Bytes of the shortest file: a header of 10, an empty block of 2, a trailer of 8."""


def _gzip(content: Content) -> bool:
    """Check that a byte can be unpacked: magic and method (RFC 1952, section 2.3.1) have only 3 bytes."""
    if not content.has(b"\x1f\x8b\x08") or content.size < _SHORTEST_GZIP:
        return False
    try:
        zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(content.begin, 1)
    except zlib.error:
        return False
    return True


def _xz(content: Content) -> bool:
    """Check for the stream flags: a zero, and an integrity check of 0 to 15 (The .xz File Format, section 2.1.1)."""
    return content.has(b"\xfd7zXZ\0\0") and content.big_endian(7, 1) <= 15


def _lzma(content: Content) -> bool:
    """Check for the default properties, a dictionary of 2^n or 2^n + 2^(n-1), and a size below 256 GiB or none.

    The data begin with a zero. (The .lzma File Format, sections 1.1 and 1.2: liblzma checks the same.)
    """
    dictionary, size = content.little_endian(1, 4), content.little_endian(5, 8)
    sizes = [size for bit in range(12, 31) for size in (1 << bit, 3 << bit - 1)]
    known = size == 2**64 - 1 or 0 < size < 1 << 38
    return len(content.begin) > 13 and content.has(b"\x5d") and dictionary in sizes and known and not content.begin[13]


def _bzip2(content: Content) -> bool:
    """Check for a block size of 1 to 9, then a block or the end of the stream."""
    return re.match(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)", content.begin) is not None


def _zstd(content: Content) -> bool:
    """Check for a frame, whose reserved bit is zero (RFC 8878, section 3.1.1)."""
    return content.has(b"\x28\xb5\x2f\xfd") and len(content.begin) > 4 and not content.begin[4] & 0x08


def _lz4(content: Content) -> bool:
    """Check for a frame of version 01, reserved bit zero, and a block size of 4 to 7; or a legacy frame."""
    flags, sizes = content.little_endian(4, 1), content.little_endian(5, 1)
    frame = content.has(b"\x04\x22\x4d\x18") and flags & 0xC2 == 0x40 and not sizes & 0x8F and sizes >> 4 >= 4
    return frame or (content.has(b"\x02\x21\x4c\x18") and 0 < content.little_endian(4, 4) <= 9 << 20)


def _zip(content: Content) -> bool:
    """Check for a file that needs version 1.0 to 6.3, or for an empty archive (APPNOTE.TXT, sections 4.3 and 4.4.3)."""
    file = content.has(b"PK\3\4") and 10 <= content.little_endian(4, 1) <= 63
    return (
        file
        or (content.has(b"PK\5\6") and content.size == 22 + content.little_endian(20, 2))
        or content.has(b"PK\7\x08PK\3\4")
    )


def _tar(content: Content) -> bool:
    """Check for the magic and the checksum of the first header (POSIX.1, pax)."""
    header = content.begin[:512]
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return header[257:262] == b"ustar" and checksum == sum(header[:148]) + 8 * 0x20 + sum(header[156:])


def _android_sparse(content: Content) -> bool:
    """Check for version 1, and headers of 28 and 12 bytes."""
    return content.has(b"\x3a\xff\x26\xed\1\0") and content.has(b"\x1c\0\x0c\0", 8)


def _nrg(content: Content) -> bool:
    """Check for the trailer, with the offset of the first chunk."""
    old, new = content.end[-8:], content.end[-12:]
    offset = -1
    if new.startswith(b"NER5"):
        offset = int.from_bytes(new[4:], "big")
    elif old.startswith(b"NERO"):
        offset = int.from_bytes(old[4:], "big")
    return 0 < offset < content.size


def _cso(content: Content) -> bool:
    """Check for the magic and the block size."""
    return content.has(b"CISO") and content.little_endian(16, 4) == CD_BLOCK_SIZE


_SYNC = b"\0" + b"\xff" * 10 + b"\0"


def _sectors(content: Content) -> bool:
    """Check for sectors of 2352 or 2448 bytes, by their sync pattern, or for a volume in sectors of 2336 (mode 2)."""
    whole = content.has(_SYNC) and content.big_endian(15, 1) in (0, 1, 2)
    return (whole and any(content.has(_SYNC, size) for size in (2352, 2448))) or content.has(
        b"CD001", _FIRST_DESCRIPTOR * 2336 + 8 + 1
    )


_CUE = re.compile(rb'^[ \t]*FILE[ \t]+(?:"([^"\r\n]+)"|(\S+))[ \t]+BINARY[ \t]*\r?$', re.MULTILINE | re.IGNORECASE)


def _cue(content: Content) -> re.Match[bytes] | None:
    return _CUE.search(content.begin) if content.size <= MAX_SHEET and b"\0" not in content.begin else None


def _data_path(path: Path, content: Content) -> Path:
    """Return the path of the data that a cue sheet names, always in the folder of the sheet."""
    match = _cue(content)
    name = os.fsdecode(match[1] or match[2]) if match is not None else ""
    return path.with_name(re.split(r"[/\\]", name)[-1] or path.name)


# The table ------------------------------------------------------------------------------------------------------------

_CONVERT, _UNPACK = "convert it", "unpack it"
_CONVERT_DATA = "convert the data that it describes"
_CONVERT_WITH_ITS_PROGRAM = "convert it to an ISO image with the program that made it"


def _disk(name: str, matches: _Check, command: str = "qemu-img convert -O raw") -> FileFormat:
    return FileFormat(name, matches, _CONVERT, f"{command} {{path}} {{raw}}", "usb_disk", "{raw}")


def _cd(
    name: str, matches: _Check, command: str = "iat {data} {iso}", action: str = _CONVERT_DATA, data: str | None = None
) -> FileFormat:
    return FileFormat(name, matches, action, command, "usb_cdrom", "{iso}", data)


def _compressed(name: str, matches: _Check, command: str) -> FileFormat:
    return FileFormat(name, matches, _UNPACK, f"{command} -dc {{path}} > {{unpacked}}")


def _archive(name: str, matches: _Check, command: str) -> FileFormat:
    return FileFormat(name, matches, "unpack it, and plug its content in", f"{command} {{path}}")


FORMATS = (
    _disk("a qcow image", _qcow(1)),
    _disk("a qcow2 image", _qcow(2, 3)),
    _disk("a QED image", _qed),
    _disk("a VMDK image", _vmdk),
    _disk("a VHD image", _vhd, "qemu-img convert -f vpc -O raw"),
    _disk("a VHDX image", _begins(b"vhdxfile")),
    _disk("a VDI image", lambda content: content.has(b"\x7f\x10\xda\xbe\1\0\1\0", 0x40)),
    _disk("a Parallels image", _parallels),
    _disk("a Bochs image", _begins(b"Bochs Virtual HD Image\0")),
    _disk("a DMG image", _dmg, "qemu-img convert -f dmg -O raw"),
    _disk("an Android sparse image", _android_sparse, "simg2img"),
    FileFormat(
        "a snapshot of farplug",
        _begins(MAGIC),
        "find its image",
        "farplug image info {path}",
        "snapshot_file",
        "{path}",
    ),
    _compressed("xz data", _xz, "xz"),
    _compressed("gzip data", _gzip, "gzip"),
    _compressed("zstd data", _zstd, "zstd"),
    _compressed("bzip2 data", _bzip2, "bzip2"),
    _compressed("lz4 data", _lz4, "lz4"),
    _compressed("lzma data", _lzma, "xz --format=lzma"),
    _compressed("lzip data", _begins(b"LZIP\1"), "lzip"),
    _compressed("lzop data", _begins(b"\x89LZO\0\r\n\x1a\n"), "lzop"),
    _archive("a zip archive", _zip, "unzip"),
    _archive("a 7z archive", _begins(b"7z\xbc\xaf\x27\x1c\0"), "7z x"),
    _archive("a RAR archive", _begins(b"Rar!\x1a\7\0", b"Rar!\x1a\7\1\0"), "unrar x"),
    _archive("a tar archive", _tar, "tar -xf"),
    _archive("a cabinet", _begins(b"MSCF\0\0\0\0"), "7z x"),
    FileFormat(
        "a WIM archive",
        _begins(b"MSWIM\0\0\0\xd0\0\0\0", b"WLPWM\0\0\0\xd0\0\0\0"),
        _UNPACK,
        "wimapply {path} 1 {folder}",
        "usb_folder",
        "{folder}",
    ),
    _cd("a copy of the raw sectors of a CD", _sectors, "iat {path} {iso}", _CONVERT),
    _cd("a Nero image", _nrg, "nrg2iso {path} {iso}", _CONVERT),
    _cd("a cue sheet", _cue),
    _cd("a CloneCD sheet", _begins(b"[CloneCD]"), data=".img"),
    _cd("a media descriptor", _begins(b"MEDIA DESCRIPTOR\1", b"MEDIA DESCRIPTOR\2"), data=".mdf"),
    FileFormat("a DAA image", _begins(b"DAA".ljust(16, b"\0")), _CONVERT_WITH_ITS_PROGRAM),
    FileFormat("an ISZ image", _begins(b"IsZ!\x30", b"IsZ!\x40"), _CONVERT_WITH_ITS_PROGRAM),
    FileFormat("a CHD image", _begins(b"MComprHD\0\0\0"), _CONVERT_WITH_ITS_PROGRAM),
    FileFormat("a CSO image", _cso, _CONVERT_WITH_ITS_PROGRAM),
)
