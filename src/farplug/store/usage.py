"""Find out how this machine uses a block device, or an image that is attached to a loop device.

A file system that is mounted in two places loses data: each side caches what the other side changes.

A file of sysfs or procfs that cannot be read is ignored, because devices appear and disappear. But too many open files
are an error: otherwise everything would seem unused.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from farplug.errors import TOO_MANY_OPEN_FILES
from farplug.shell import shell_word

BLOCK_DEVICES = Path("/sys/dev/block")
LOOP_DEVICES = Path("/sys/block")
MOUNTS = Path("/proc/self/mountinfo")
SWAPS = Path("/proc/swaps")


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a device.

    Attributes:
        what: text for a user: "/dev/sdb1 is mounted on /mnt".
        end: the command that ends the use; empty: none is known.
        changes: the use may change the content of the device.
    """

    what: str
    end: str
    changes: bool

    def __str__(self) -> str:
        return self.what


def host_uses(path: Path) -> list[Use]:
    """Return the uses of an image on this machine: mounts first, then swap, then devices that are built on it.

    The partitions of a disk count, too, and so does the disk of a partition. Mounts in other namespaces are not found.

    Raises:
        OSError: the file does not exist, or too many files are open.
    """
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        return device_uses(status.st_rdev)
    if stat.S_ISREG(status.st_mode):
        return [use for folder in _loop_devices(status) for use in _loop_uses(folder)]
    return []


def device_uses(number: int) -> list[Use]:
    """Return the uses of a block device as :func:`host_uses` does, by its number (``os.makedev``).

    Raises:
        OSError: too many files are open.
    """
    device = (BLOCK_DEVICES / _text(number)).resolve()
    devices = {number: device}
    if (device / "partition").exists():
        devices |= _numbered([device.parent])
    else:
        devices |= _numbered(_partitions(device))
    held = dict(devices)
    unvisited = list(devices.values())
    while unvisited:
        above = _numbered(_listed(unvisited.pop() / "holders"))
        above |= _numbered(part for folder in above.values() for part in _partitions(folder))
        unvisited += [folder for other, folder in above.items() if other not in held]
        held |= above
    holders = [folder for other, folder in held.items() if other not in devices]
    return [*_mounts(held), *_swaps(held), *(_holder(folder) for folder in holders)]


def _loop_devices(status: os.stat_result) -> Iterator[Path]:
    for folder in _listed(LOOP_DEVICES):
        if folder.name.startswith("loop"):
            try:
                backing = os.stat((folder / "loop/backing_file").read_text().rstrip("\n"))
            except (OSError, ValueError) as error:
                _raise_too_many_open(error)
                continue  # not attached, or the file was deleted
            if os.path.samestat(backing, status):
                yield folder


def _loop_uses(folder: Path) -> Iterator[Use]:
    for number in _numbered([folder]):
        yield from device_uses(number)
    name = f"/dev/{folder.name}"
    yield Use(f"it is attached to {name}", f"losetup --detach {shell_word(name)}", changes=False)


def _holder(folder: Path) -> Use:
    alias = _read(folder / "dm/name")
    what = f"it is a part of /dev/{folder.name}" + (f" ({alias})" if alias else "")
    return Use(what, "", _read(folder / "ro") != "1")


def _mounts(devices: dict[int, Path]) -> Iterator[Use]:
    """Yield the mounts of devices (proc_pid_mountinfo(5))."""
    for line in _lines(MOUNTS):
        before, _, after = line.partition(" - ")
        fields, last = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(last) < 3:
            continue
        source = _unescape(last[1])
        folder = next((folder for number, folder in devices.items() if _text(number) == fields[2]), None)
        if folder is None and fields[2].startswith("0:"):  # btrfs, which has a device number of its own
            folder = devices.get(_device_number(source))
        if folder is not None:
            where = _unescape(fields[4])
            changes = "ro" not in last[2].split(",")
            yield Use(f"/dev/{folder.name} is mounted on {where}", f"umount {shell_word(where)}", changes)


def _swaps(devices: dict[int, Path]) -> Iterator[Use]:
    for line in _lines(SWAPS):
        name = _unescape(re.split("[ \t]", line, maxsplit=1)[0])
        if _device_number(name) in devices:
            yield Use(f"{name} is swap space", f"swapoff {shell_word(name)}", True)


def _partitions(device: Path) -> list[Path]:
    return [folder for folder in _listed(device) if (folder / "partition").exists()]


def _numbered(folders: Iterable[Path]) -> dict[int, Path]:
    found = {}
    for folder in folders:
        if match := re.fullmatch(r"(\d+):(\d+)", _read(folder / "dev")):
            found[os.makedev(int(match[1]), int(match[2]))] = folder.resolve()
    return found


def _device_number(path: str) -> int:
    """Return the number of a block device; 0: the path is not one."""
    try:
        status = os.stat(path) if path.startswith("/") else None
    except (OSError, ValueError):
        return 0
    return status.st_rdev if status is not None and stat.S_ISBLK(status.st_mode) else 0


def _text(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def _unescape(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _raise_too_many_open(error)
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError) as error:
        _raise_too_many_open(error)
        return ""


def _lines(path: Path) -> list[str]:
    """Return the lines of a file of procfs, which escapes only blanks, line feeds and backslashes in paths."""
    try:
        return os.fsdecode(path.read_bytes()).split("\n")
    except OSError as error:
        _raise_too_many_open(error)
        return []


def _raise_too_many_open(error: OSError | ValueError) -> None:
    if isinstance(error, OSError) and error.errno in TOO_MANY_OPEN_FILES:
        raise error
