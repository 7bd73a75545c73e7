"""Scan a folder: the only place that decides what is copied into an image, and what is left out.

A user who may write to the folder may also swap a file or a folder for a link that leads out, while an image is made,
and swap it back. So folders and files are opened below the descriptor of the folder, without following links, and
:func:`check_unchanged` compares the time of change (ctime), which no user can set: a rename changes it. :func:`settle`
waits until no change can have the same time as the scan. The tools that open files by name (mke2fs, xorriso) depend on
this check alone.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from farplug.errors import ImageError, Reason, from_oserror

MAX_ENTRIES = 1_000_000
"""Maximum number of files and folders, all levels together: more is a mistake, such as ``/``."""

CLOCK_TICK = 0.02
"""Seconds. Two changes of a file within a tick of the kernel's clock (10 ms at most) have the same time."""

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
        source: the path below the root that has the content: that of a link's target; empty: ``path``.
        stamp: device, inode and time of change (ctime, in nanoseconds), of the target of a link.
    """

    path: str
    is_folder: bool
    size: int
    modified: int
    source: str = ""
    stamp: tuple[int, int, int] = (0, 0, 0)

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
        identity: device and inode of the root.
        entries: parents before children. Within a folder, names that may be short names on FAT come first: so a short
            name that is generated later for another entry avoids them.
        left_out: paths, each with what it is.
    """

    root: Path
    entries: tuple[Entry, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    identity: tuple[int, int] = (0, 0)

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
        if not root.is_dir():
            raise ImageError(f"{folder} is not a folder", reason=Reason.NOT_A_FOLDER, remedy="name a folder")
        root_fd = os.open(root, _FOLDER)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a loop of links
        raise _read_error(Path(folder), error) from error
    try:
        return _scan(root, root_fd, posix, tick)
    finally:
        os.close(root_fd)


def _scan(root: Path, root_fd: int, posix: bool, tick: Callable[[], None]) -> Tree:
    entries: list[Entry] = []
    left_out: list[tuple[str, str]] = []
    waiting = [""]
    while waiting:
        tick()
        path = waiting.pop()
        try:
            with _opened(root_fd, path, _FOLDER) as fd:
                folders = []
                for name in sorted(os.listdir(fd), key=lambda name: (_SHORT_NAME.fullmatch(name) is None, name)):
                    where = f"{path}/{name}".lstrip("/")
                    entry, what = _entry(root, root_fd, fd, where, posix)
                    if entry is None:
                        left_out.append((where, what))
                        continue
                    entries.append(entry)
                    if entry.is_folder:
                        folders.append(entry.path)
        except OSError as error:
            if error.errno in _CHANGED:
                raise changed_error(root, [path or "."]) from error
            raise _read_error(Path(error.filename2 or root / path), error) from error
        if len(entries) + len(left_out) > MAX_ENTRIES:
            raise ImageError(
                f"{root} has more than {MAX_ENTRIES} files and folders",
                reason=Reason.TOO_LARGE,
                remedy="name a smaller folder, or put the files into an archive",
            )
        waiting += reversed(folders)
    status = os.fstat(root_fd)
    return Tree(root, tuple(entries), tuple(left_out), (status.st_dev, status.st_ino))


if sys.platform == "win32":  # where no image of a folder can be made
    _FOLDER = _FILE = os.O_RDONLY
else:
    _FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    _FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_CHANGED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Errors for a path whose parts were removed, or swapped for others, after they were seen."""


@contextmanager
def _opened(root_fd: int, path: str, flags: int) -> Iterator[int]:
    """Yield the descriptor of a path below an open folder; no part of the path may be a link."""
    fd = _open_below(root_fd, path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_below(root_fd: int, path: str, flags: int) -> int:
    *folders, name = path.split("/")
    fd = os.dup(root_fd)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = inner
        return os.open(name or ".", flags, dir_fd=fd)
    finally:
        os.close(fd)


def _entry(root: Path, root_fd: int, folder_fd: int, path: str, posix: bool) -> tuple[Entry | None, str]:
    """Return an entry; or None, and what is left out."""
    name, source = path.rpartition("/")[2], ""
    status = os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode) and not posix:
        try:
            target = (root / path).resolve(strict=True)
            if not target.is_relative_to(root):
                return None, "a link out of the folder"
            source = str(target.relative_to(root))
            parent, _, last = source.rpartition("/")
            with _opened(root_fd, parent, _FOLDER) as fd:
                status = os.stat(last, dir_fd=fd, follow_symlinks=False)
        except (OSError, RuntimeError):
            return None, "a link to nothing"
        if stat.S_ISDIR(status.st_mode):
            return None, "a link to a folder"
    kind = stat.S_IFMT(status.st_mode)
    if kind in _SPECIAL and not posix:
        return None, _SPECIAL[kind]
    is_folder, is_file = kind == stat.S_IFDIR, kind == stat.S_IFREG
    needed = os.R_OK | os.X_OK if is_folder else os.R_OK
    if (is_folder or is_file) and not os.access(name, needed, dir_fd=folder_fd):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name, None, str(root / path))
    size = status.st_size if is_file else 0
    return Entry(path, is_folder, size, status.st_mtime_ns, source, _stamp(status)), ""


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_ctime_ns


@contextmanager
def opened_root(tree: Tree) -> Iterator[int]:
    """Yield the descriptor of a tree's root.

    Raises:
        ImageError: CHANGED: it is another folder now.
    """
    try:
        fd = os.open(tree.root, _FOLDER)
    except OSError as error:
        raise changed_error(tree.root, ["."]) from error
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != tree.identity:
            raise changed_error(tree.root, ["."])
        yield fd
    finally:
        os.close(fd)


def open_file(tree: Tree, root_fd: int, entry: Entry) -> int:
    """Open a file of a tree for reading, and return its descriptor, which the caller closes.

    Args:
        tree: what was scanned.
        root_fd: from :func:`opened_root`.
        entry: of the file.

    Raises:
        ImageError: CHANGED: the file is gone or was changed, or something else is in its place; or IO_ERROR.
    """
    try:
        fd = _open_below(root_fd, entry.source or entry.path, _FILE)
    except OSError as error:
        if error.errno in _CHANGED:
            raise changed_error(tree.root, [entry.path]) from error
        raise _read_error(tree.root / entry.path, error) from error
    status = os.fstat(fd)
    if _stamp(status) != entry.stamp or not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise changed_error(tree.root, [entry.path])
    return fd


def settle(tree: Tree) -> None:
    """Wait, at most :data:`CLOCK_TICK`, until a change of an entry has a later time than the entry had in the scan."""
    age = time.time_ns() - max((entry.stamp[2] for entry in tree.entries), default=0)
    if 0 <= age < CLOCK_TICK * 1e9:
        time.sleep(CLOCK_TICK - age / 1e9)


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
