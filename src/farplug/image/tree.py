"""Scan a folder: the only place that decides what is copied into an image, and what is left out."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from farplug.errors import ImageError, Reason, from_oserror

MAX_ENTRIES = 1_000_000
"""Maximum number of files and folders, all levels together: more is a mistake, such as ``/``."""

_SHORT_NAME = re.compile(r"[^.]{1,8}(\.[^.]{1,3})?")
"""A name that may be a short name (8.3) on FAT."""

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
        is_folder: otherwise it is a regular file, or a link to one, which is followed.
        size: bytes; 0 for a folder.
        modified: modification time, in nanoseconds since 1970.
    """

    path: str
    is_folder: bool
    size: int
    modified: int

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> str:
        """Return the path of its folder; empty at the top."""
        return self.path.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Tree:
    """The content of a folder at one moment: two scans are equal if nothing changed in between.

    Attributes:
        root: absolute path without symbolic links.
        entries: parents before children. Within a folder, names that may be short names on FAT come first: so a short
            name that is generated later for another entry avoids them.
        left_out: paths, each with what it is.
    """

    root: Path
    entries: tuple[Entry, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def size(self) -> int:
        """Return the number of bytes in all files."""
        return sum(entry.size for entry in self.entries)

    @property
    def folders(self) -> dict[str, list[Entry]]:
        """Return the entries of each folder, by its path; the path of the top is empty."""
        result: dict[str, list[Entry]] = {"": []}
        for entry in self.entries:
            result[entry.parent].append(entry)
            if entry.is_folder:
                result[entry.path] = []
        return result


def scan(folder: str | os.PathLike[str], *, posix: bool = False, tick: Callable[[], None] = lambda: None) -> Tree:
    """Return the content of a folder.

    A symbolic link to a file inside the folder counts as that file. Links out of the folder, to folders or to
    nothing, sockets, pipes and devices are left out. If ``posix``, the image can hold all of them, and they count as
    empty.

    Args:
        folder: its path.
        posix: whether the image holds links and special files.
        tick: called for each folder; an exception that it raises ends the scan.

    Raises:
        ImageError: NOT_FOUND, NOT_A_FOLDER, NO_PERMISSION, TOO_LARGE (too many entries), CHANGED (an entry was removed
            meanwhile) or IO_ERROR.
    """
    try:
        root = Path(folder).resolve(strict=True)
        is_folder = root.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links
        raise _read_error(Path(folder), error) from error
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
                entry, what = _entry(root, f"{path}/{item.name}".lstrip("/"), posix)
                if entry is None:
                    left_out.append((f"{path}/{item.name}".lstrip("/"), what))
                    continue
                entries.append(entry)
                if entry.is_folder:
                    folders.append(entry.path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise changed_error(root, [path or "."]) from error
            raise _read_error(Path(error.filename or root / path), error) from error
        if len(entries) + len(left_out) > MAX_ENTRIES:
            raise ImageError(
                f"{root} has more than {MAX_ENTRIES} files and folders",
                reason=Reason.TOO_LARGE,
                remedy="name a smaller folder, or put the files into an archive",
            )
        waiting += reversed(folders)
    return Tree(root, tuple(entries), tuple(left_out))


def _entry(root: Path, path: str, posix: bool) -> tuple[Entry | None, str]:
    """Return an entry; or None, and what is left out."""
    place = root / path
    status = os.lstat(place)
    if stat.S_ISLNK(status.st_mode) and not posix:
        try:
            target = place.resolve(strict=True)
            status = os.stat(target)
        except (OSError, RuntimeError):
            return None, "a link to nothing"
        if not target.is_relative_to(root):
            return None, "a link out of the folder"
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
    """Check that a folder has not changed since the scan.

    Raises:
        ImageError: CHANGED, or as :func:`scan`.
    """
    now = scan(tree.root, posix=posix, tick=tick)
    if now != tree:
        different = {*now.entries} ^ {*tree.entries}
        raise changed_error(tree.root, sorted({entry.path for entry in different} or {"."}))


def changed_error(root: Path, paths: list[str]) -> ImageError:
    """Return the error for a folder that changed while it was copied."""
    return ImageError(
        f"{root} changed while it was copied: {summarize(paths)}",
        reason=Reason.CHANGED,
        remedy="retry when no program writes to it",
    )


def summarize(items: list[str], most: int = 3) -> str:
    """Return the first items, and the number of the others."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(show(item) for item in items[:most]) + more


def show(path: str) -> str:
    """Return a path with escapes for bytes that are not UTF-8."""
    return path.encode(errors="backslashreplace").decode()


def describe_left_out(tree: Tree) -> Iterator[str]:
    """Yield a line for each kind of entry that is left out."""
    kinds: dict[str, list[str]] = {}
    for path, what in tree.left_out:
        kinds.setdefault(what, []).append(path)
    for what, paths in kinds.items():
        yield f"left out, {what}: {summarize(paths)}"


def _read_error(path: Path, error: OSError | ValueError | RuntimeError) -> ImageError:
    if isinstance(error, RuntimeError):  # pathlib's error for a loop of links, before Python 3.13
        error = OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    denied = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)
    remedy = "get permission to read the whole folder, or move that entry away" if denied else ""
    return from_oserror(show(str(path)), error, as_=ImageError, problem="cannot be read", remedy=remedy)
