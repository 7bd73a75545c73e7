"""What is in a folder: the one place that decides what goes into an image, and what is left out."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from farplug.errors import ImageError, Reason

MAX_ENTRIES = 1_000_000
"""Files and folders in a folder, all levels together: more is a mistake, such as ``/``."""

_SHORT_NAME = re.compile(r"[^.]{1,8}(\.[^.]{1,3})?")
"""A name that FAT may take for a short one, 8.3."""

_SPECIAL = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a folder.

    Attributes:
        path: below the tree's root, with slashes. Bytes that are not UTF-8 are surrogates (PEP 383).
        is_folder: else a regular file, or a link that is followed to one.
        size: bytes; 0 for a folder.
        modified: nanoseconds since 1970.
    """

    path: str
    is_folder: bool
    size: int
    modified: int

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> str:
        """Path of its folder; empty at the top."""
        return self.path.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder as it was at one moment: two scans are equal if nothing changed in between.

    Attributes:
        root: absolute, no symbolic links in it.
        entries: parents before children. In one folder those come first that FAT may take for short names: so a short
            name that is made for another one later finds them there, and avoids them.
        left_out: path, and what it is.
    """

    root: Path
    entries: tuple[Entry, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(entry.size for entry in self.entries)

    @property
    def folders(self) -> dict[str, list[Entry]]:
        """What is in each folder, by its path; the top is the empty one."""
        result: dict[str, list[Entry]] = {"": []}
        for entry in self.entries:
            result[entry.parent].append(entry)
            if entry.is_folder:
                result[entry.path] = []
        return result


def scan(folder: str | os.PathLike[str], *, posix: bool = False, tick: Callable[[], None] = lambda: None) -> Tree:
    """Look at everything in a folder.

    A symbolic link to a file inside the folder counts as that file. Links that lead out of it, to folders or nowhere,
    and sockets, pipes and devices are left out. Where ``posix``, the image can hold all these, and they count as empty.

    Args:
        folder: its path.
        posix: whether the image will hold links and special files as they are.
        tick: called for each folder; what it raises ends the scan.

    Raises:
        ImageError: NOT_FOUND, NOT_A_FOLDER, NO_PERMISSION, TOO_LARGE (too many entries), CHANGED (something vanishes
            meanwhile) or IO_ERROR.
    """
    try:
        root = Path(folder).resolve(strict=True)
        is_folder = root.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links
        raise _problem(Path(folder), error) from error
    if not is_folder:
        raise ImageError(f"{folder} is not a folder", reason=Reason.NOT_A_FOLDER, remedy="name a folder")
    entries: list[Entry] = []
    left_out: list[tuple[str, str]] = []
    waiting = [""]
    while waiting:
        tick()
        path = waiting.pop()
        try:
            with os.scandir(root / path) as found:
                items = sorted(found, key=lambda item: (_SHORT_NAME.fullmatch(item.name) is None, item.name))
            folders = []
            for item in items:
                entry, what = _look(root, f"{path}/{item.name}".lstrip("/"), posix)
                if entry is None:
                    left_out.append((f"{path}/{item.name}".lstrip("/"), what))
                    continue
                entries.append(entry)
                if entry.is_folder:
                    folders.append(entry.path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise changed_error(root, [path or "."]) from error
            raise _problem(Path(error.filename or root / path), error) from error
        if len(entries) + len(left_out) > MAX_ENTRIES:
            raise ImageError(
                f"{root} has more than {MAX_ENTRIES} files and folders",
                reason=Reason.TOO_LARGE,
                remedy="name a smaller folder, or put the files into an archive",
            )
        waiting += reversed(folders)
    return Tree(root, tuple(entries), tuple(left_out))


def _look(root: Path, path: str, posix: bool) -> tuple[Entry | None, str]:
    """An entry, or what it is that is left out."""
    place = root / path
    status = os.lstat(place)
    if stat.S_ISLNK(status.st_mode) and not posix:
        try:
            target = place.resolve(strict=True)
            status = os.stat(target)
        except (OSError, RuntimeError):
            return None, "a link to nothing"
        if not target.is_relative_to(root):
            return None, "a link that leads out"
        if stat.S_ISDIR(status.st_mode):
            return None, "a link to a folder"
    kind = stat.S_IFMT(status.st_mode)
    if kind in _SPECIAL and not posix:
        return None, _SPECIAL[kind]
    is_folder, is_file = kind == stat.S_IFDIR, kind == stat.S_IFREG
    if (is_folder and not os.access(place, os.R_OK | os.X_OK)) or (is_file and not os.access(place, os.R_OK)):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    return Entry(path, is_folder, status.st_size if is_file else 0, status.st_mtime_ns), ""


def check_unchanged(tree: Tree, *, posix: bool = False, tick: Callable[[], None] = lambda: None) -> None:
    """Check that a folder still is what it was.

    Raises:
        ImageError: CHANGED, or what :func:`scan` raises.
    """
    now = scan(tree.root, posix=posix, tick=tick)
    if now != tree:
        different = {*now.entries} ^ {*tree.entries}
        raise changed_error(tree.root, sorted({entry.path for entry in different} or {"."}))


def changed_error(root: Path, paths: list[str]) -> ImageError:
    """The error for a folder that changes while it is copied."""
    return ImageError(
        f"{root} changed while it was copied: {summarize(paths)}",
        reason=Reason.CHANGED,
        remedy="try again when nothing writes to it",
    )


def summarize(items: list[str], most: int = 3) -> str:
    """The first few items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(show(item) for item in items[:most]) + more


def show(path: str) -> str:
    """A path for people: what is not UTF-8 becomes an escape."""
    return path.encode(errors="backslashreplace").decode()


def describe_left_out(tree: Tree) -> Iterator[str]:
    """A line for each kind of thing that is left out."""
    kinds: dict[str, list[str]] = {}
    for path, what in tree.left_out:
        kinds.setdefault(what, []).append(path)
    for what, paths in kinds.items():
        yield f"left out, {what}: {summarize(paths)}"


def _problem(path: Path, error: OSError | ValueError | RuntimeError) -> ImageError:
    place = show(str(path))
    if isinstance(error, (ValueError, RuntimeError)):
        return ImageError(f"{place!r} is not a path", reason=Reason.NOT_FOUND)
    what = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return ImageError(f"{place} cannot be read: {what}", reason=Reason.NOT_FOUND, remedy="check the path")
    if error.errno in (errno.EACCES, errno.EPERM):
        return ImageError(
            f"{place} cannot be read: {what}",
            reason=Reason.NO_PERMISSION,
            remedy="get the permission to read all of the folder, or move that away",
        )
    return ImageError(f"{place} cannot be read: {what}", reason=Reason.IO_ERROR)
