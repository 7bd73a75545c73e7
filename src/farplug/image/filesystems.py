"""Make what needs no virtual machine: partition tables (fdisk), FAT32 (mtools), ext4 (mke2fs), ISO 9660 (xorriso)."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

from farplug.errors import ImageError, Reason
from farplug.image.names import fat_slots, utf16_units
from farplug.image.tools import ImageBuild
from farplug.image.tree import Entry, Tree, open_file, opened_root
from farplug.image.volume import ALIGNMENT, MIB, Format, Partition, Volume, fat_length

_BASIC_DATA, _LINUX = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7", "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
_TYPES = {
    Format.FAT32: {Partition.MBR: "c", Partition.GPT: _BASIC_DATA},
    Format.EXFAT: {Partition.MBR: "7", Partition.GPT: _BASIC_DATA},
    Format.NTFS: {Partition.MBR: "7", Partition.GPT: _BASIC_DATA},
    Format.EXT4: {Partition.MBR: "83", Partition.GPT: _LINUX},
}

_NO_PARTITION_NAME = re.compile(r'["\\]|[^\x20-\uffff]')
"""Characters that fdisk (2.38) does not accept in a name: its quoting, and above U+FFFF."""

ARGUMENT_BYTES = 64 * 1024
"""Maximum bytes of file names in one call of mtools."""

MAX_BATCH = 128
"""Maximum number of files in one call of mtools, each of which needs a descriptor."""

MTOOLS_SIMILAR = 200
"""Maximum number of files in a folder whose short names differ only in their number."""

_MTOOLS_PLAIN = re.compile(r"[\x20-\x7e]*")
_MTOOLS_RESERVED = re.compile(r"con|aux|prn|nul|clock\$|(com|lpt)[0-9]", re.IGNORECASE)
_MTOOLS_LONG = re.compile(
    r"[^.]*[A-Za-z0-9_-]{9}"  # too long before the first dot
    r"|.*\.[^.]*[A-Za-z0-9_-]{4}"  # or after a dot
    r"|.*\..*\.|.* "  # two dots, a space
    r"|[^.]*([A-Z][^.]*[a-z]|[a-z][^.]*[A-Z])"  # upper and lower case
)


def write_table(build: ImageBuild, volume: Volume) -> None:
    """Write the partition table, with a partition that fills the disk."""
    block = volume.block_size
    entry = f"start={ALIGNMENT // block}, size={volume.length // block}, type={_TYPES[volume.format][volume.partition]}"
    if volume.partition is Partition.GPT:
        entry += f', name="{_NO_PARTITION_NAME.sub("_", volume.label)}"'
    label = "gpt" if volume.partition is Partition.GPT else "dos"
    with tempfile.NamedTemporaryFile("w", prefix="farplug-", encoding="utf-8") as script:
        script.write(f"label: {label}\n{entry}\n")
        script.flush()
        # Not sfdisk: for a file it supports only 512-byte blocks.
        output = build.run(
            "fdisk",
            *("-b", str(block), "--wipe=never", "--wipe-partitions=never", "--color=never", build.path),
            stdin=f"I\n{script.name}\nw\n",
        )
    if "Script successfully applied" not in output:
        raise ImageError(f"fdisk made no partition: {output.strip()[-300:]}", reason=Reason.IO_ERROR)


# FAT32 ----------------------------------------------------------------------------------------------------------------


def fat32_needs(tree: Tree, cluster: int) -> int:
    """Return the bytes that a FAT32 partition needs for a tree."""
    clusters = sum(-(-entry.size // cluster) for entry in tree.entries)
    clusters += sum(-(-32 * fat_slots(entries) // cluster) for entries in tree.folders.values())
    return fat_length(clusters, cluster)


def format_fat32(build: ImageBuild, volume: Volume) -> None:
    """Make an empty FAT32 filesystem."""
    block = volume.block_size
    build.run(
        "mkfs.vfat",
        *("-F", "32", "-S", str(block), "-s", str(volume.cluster_size // block), "-n", volume.label),
        *("-h", str(ALIGNMENT // block), f"--offset={ALIGNMENT // block}", build.path, str(volume.length // 1024)),
    )


def mtools_can_write(tree: Tree, cluster: int) -> bool:
    """Return whether mtools (4.0.32) writes every name unchanged, and fast enough.

    It transliterates non-ASCII names that could be short names (ü.txt becomes u.txt), truncates characters above
    U+FFFF, refuses names of DOS devices, may fail for a name whose entries need more than a cluster, confuses a name
    like LONGNA~1.TXT with the short name of another file, and treats some names as equal that differ for Windows (names
    that are equal in lower case: U+01C4 and U+01C5). To find an unused short name it tries ~1, ~2 and so on, and reads
    the folder each time: 250 similar names took 0.7 s, 1000 took 75 s.
    """
    longest = 13 * (cluster // 32 - 1)
    return all(len(entry.name) <= longest and _mtools_preserves(entry.name) for entry in tree.entries) and all(
        max(Counter(_short_stem(entry.name) for entry in entries).values(), default=0) <= MTOOLS_SIMILAR
        and len({_lower(entry.name) for entry in entries}) == len(entries)
        for entries in tree.folders.values()
    )


def _lower(name: str) -> str:
    """Return a name in lower case, character by character, as towlower(3) of the C library maps it."""
    return "".join(character.lower()[0] for character in name)


def _short_stem(name: str) -> tuple[str, str]:
    """Return the beginning and the extension of the short names for a long name."""
    base, _, extension = re.sub(r"[^\x21-\x7e]", "_", name.upper().replace(" ", "")).lstrip(".").rpartition(".")
    if not base:
        base, extension = extension, ""
    return base.replace(".", "")[:6], extension[:3]


def _mtools_preserves(name: str) -> bool:
    if max(name) > "\uffff" or "~" in name or _MTOOLS_RESERVED.fullmatch(name):
        return False
    # A name that cannot be a short one is written as UTF-16.
    return _MTOOLS_PLAIN.fullmatch(name) is not None or _MTOOLS_LONG.match(name) is not None


def copy_with_mtools(build: ImageBuild, tree: Tree) -> None:
    """Copy a tree into an empty FAT32 filesystem. Times are written as UTC."""
    with opened_root(tree) as root_fd:
        for folder, entries in tree.folders.items():
            where = f"::/{_escaped(folder)}".rstrip("/")
            for group in _batches([entry for entry in entries if entry.is_folder]):
                _mtools(build, "mmd", *(f"{where}/{entry.name}" for entry in group))  # mtools does not expand new names
            for group in _batches([entry for entry in entries if not entry.is_folder]):
                _copy_files(build, tree, root_fd, group, where)


def _copy_files(build: ImageBuild, tree: Tree, root_fd: int, group: list[Entry], where: str) -> None:
    """Copy files into a folder. mcopy opens links, named like the files, to descriptors that it inherits."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="farplug-"))
        names, descriptors = [], []
        for entry in group:
            fd = open_file(tree, root_fd, entry)
            stack.callback(os.close, fd)
            descriptors.append(fd)
            names.append(os.path.join(folder, entry.name))
            os.symlink(f"/proc/self/fd/{fd}", names[-1])
        _mtools(build, "mcopy", "-Q", "-m", *names, f"{where}/", inherit=descriptors)


def _mtools(build: ImageBuild, program: str, *arguments: str, inherit: Sequence[int] = ()) -> None:
    # Besides ~/.mtoolsrc, mtools reads the file that the user's MTOOLSRC names.
    build.run(program, "-i", f"{build.path}@@{ALIGNMENT}", *arguments, inherit=inherit, MTOOLSRC="/dev/null", TZ="UTC0")


def _escaped(path: str) -> str:
    """Return a path in which mtools finds no pattern."""
    return path.replace("[", "[[]")


def _batches(entries: list[Entry]) -> list[list[Entry]]:
    """Split entries into batches, one for each call."""
    groups: list[list[Entry]] = []
    room = 0
    for entry in entries:
        length = len(os.fsencode(entry.path)) + 256
        if length > room or len(groups[-1]) == MAX_BATCH:
            groups.append([])
            room = ARGUMENT_BYTES
        groups[-1].append(entry)
        room -= length
    return groups


# ext4 -----------------------------------------------------------------------------------------------------------------

EXT4_BLOCK = 4096
_EXT4_BYTES_PER_INODE = 16384
_EXT4_RESERVED_INODES = 16


def ext4_needs(tree: Tree) -> int:
    """Bytes that an ext4 partition must have to hold a tree: files, and about 5 % for inodes and the journal."""
    blocks = sum(1 + -(-entry.size // EXT4_BLOCK) for entry in tree.entries)
    return blocks * EXT4_BLOCK * 21 // 20 + 24 * MIB


def make_ext4(build: ImageBuild, volume: Volume) -> None:
    """Make an ext4 filesystem with a tree in it: owners, links and special files as they are."""
    arguments = ["-q", "-F", "-t", "ext4", "-b", str(EXT4_BLOCK), "-m", "0", "-L", volume.label]
    arguments += ["-E", f"offset={ALIGNMENT},root_owner=0:0"]
    with ExitStack() as stack:
        descriptors = []
        if build.tree is not None:
            descriptors.append(stack.enter_context(opened_root(build.tree)))
            arguments += ["-d", f"/proc/self/fd/{descriptors[0]}/."]
            inodes = len(build.tree.entries) + _EXT4_RESERVED_INODES
            if inodes > volume.length // _EXT4_BYTES_PER_INODE:
                arguments += ["-N", str(inodes)]
        build.run("mke2fs", *arguments, build.path, str(volume.length // EXT4_BLOCK), inherit=descriptors)


# Formats that the throw-away guest makes------------------------------------------------------------------------------


def exfat_needs(tree: Tree, cluster: int) -> int:
    """Return the bytes that an exFAT partition needs for a tree (Microsoft's exFAT specification, sections 3, 4, 7)."""
    clusters = sum(-(-entry.size // cluster) for entry in tree.entries)
    for entries in tree.folders.values():
        slots = 3 + sum(2 + -(-utf16_units(entry.name) // 15) for entry in entries)
        clusters += -(-32 * slots // cluster)
    return clusters * (cluster + 5) + 4 * MIB


def ntfs_needs(tree: Tree, cluster: int) -> int:
    """Return the bytes that an NTFS partition needs for a tree: 2 KiB for each entry, about 5 % for the log etc."""
    clusters = sum(-(-entry.size // cluster) for entry in tree.entries)
    return (clusters * cluster + 2048 * len(tree.entries)) * 21 // 20 + 24 * MIB


# ISO 9660 -------------------------------------------------------------------------------------------------------------


def make_iso(build: ImageBuild, label: str) -> None:
    """Make an ISO 9660 image of a tree, with Rock Ridge and Joliet names, and read permission for all users."""
    assert build.tree is not None
    with opened_root(build.tree) as folder:
        build.run_into(
            "xorrisofs",
            "--no_rc",  # first: startup files could add files, or make xorriso fail
            *("-quiet", "-r", "-J", "-joliet-long", "-iso-level", "3", "-V", label, "."),
            folder=folder,
        )
