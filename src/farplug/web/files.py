"""The files of this machine that a browser may see and use: those below one folder, the web root.

A path of a browser is relative to it, with ``/`` between its parts. Symbolic links count as what they lead to, and are
refused if that is not below the folder. What is passed on to a session is a path without symbolic links.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from farplug.errors import Reason, Remedy, SetupError, UsageError, from_oserror
from farplug.text import MAX_SHOWN, printable, shown

MAX_PATH: Final = 4096
"""Characters of a path."""
MAX_ENTRIES: Final = 5000
"""Entries of a folder that are listed."""
MAX_LISTING: Final = 900_000
"""Bytes of a listing as JSON: it must fit into a text frame."""

_ISO_IDENTIFIER: Final = 16 * 2048 + 1
"""Where ``CD001`` is in an image of a CD: ECMA-119, section 8.1.2."""
_DISKS: Final = (".raw", ".img", ".bin", ".dd", ".usb", ".ima", ".vfd", ".iso")
_FORMATS: Final = (
    (b"QFI\xfb", "QCOW2"),
    (b"KDMV", "VMDK"),
    (b"conectix", "VHD"),
    (b"vhdxfile", "VHDX"),
    (b"<<< ", "VDI"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "ZIP"),
)
_JPEG: Final = b"\xff\xd8\xff"
_COMPRESSED: Final = ("gzip", "xz", "bzip2", "zstd", "ZIP")


@dataclass(frozen=True, slots=True)
class WebRoot:
    """A folder below which a browser may name files.

    Attributes:
        path: of the folder, absolute and without symbolic links.
    """

    path: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> WebRoot:
        """Return the web root of a folder.

        Raises:
            UsageError: it is not a folder that can be read.
        """
        try:
            real = os.path.realpath(path, strict=True)
            os.listdir(real)
        except (OSError, ValueError) as error:
            raise from_oserror(path, error, as_=UsageError) from error
        return cls(real)

    def existing(self, path: str) -> str:
        """Return the absolute path of a file or a folder.

        Args:
            path: relative to the web root; empty: the web root.

        Raises:
            UsageError: it is not below the web root, or does not exist.
        """
        parts = _parts(path)
        try:
            real = os.path.realpath(os.path.join(self.path, *parts), strict=True)
        except (OSError, ValueError) as error:
            raise from_oserror(printable(path, MAX_SHOWN), error, as_=UsageError) from error
        self._check_below(path, real)
        return real

    def new(self, path: str) -> str:
        """Return the absolute path of a file that may not exist yet, in a folder that exists.

        Raises:
            UsageError: it is not below the web root, or its folder does not exist.
        """
        *folders, name = _parts(path) or [""]
        if not name:
            raise _outside(path)
        whole = os.path.join(self.existing("/".join(folders)), name)
        if not os.path.lexists(whole):
            return whole
        return self.existing(path)

    def list(self, path: str) -> dict[str, Any]:
        """Return a folder's entries: the result of the method ``files``. Hidden files are left out.

        Raises:
            UsageError: it is not a folder below the web root, or cannot be read.
        """
        folder = self.existing(path)
        entries: list[dict[str, Any]] = []
        more = False
        try:
            with os.scandir(folder) as found:
                for entry in found:
                    if entry.name.startswith("."):
                        continue
                    if len(entries) == MAX_ENTRIES:
                        more = True
                        break
                    entries.append(self._entry(entry))
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise from_oserror(
                printable(path, MAX_SHOWN) or "the folder", error, as_=UsageError, problem="cannot be read"
            ) from error
        entries.sort(key=lambda one: (one["kind"] != "folder", one["name"].casefold(), one["name"]))
        size = 0
        for index, one in enumerate(entries):
            size += len(json.dumps(one)) + 2
            if size > MAX_LISTING:
                del entries[index:]
                more = True
                break
        return {"path": "/".join(_parts(path)), "entries": entries, "more": more, "free": free}

    def _entry(self, entry: os.DirEntry[str]) -> dict[str, Any]:
        shape: dict[str, Any] = {"name": entry.name, "kind": "file", "size": 0, "modified": 0, "as": None}
        try:
            if "\\" in entry.name or not entry.name.isprintable():
                return {**shape, "problem": _problem("its name has characters that the page does not use", "rename it")}
            real = os.path.realpath(entry.path, strict=True)
            if not self._is_below(real):
                return {**shape, "problem": _problem("it is a link to a place outside the folder of this page")}
            found = os.stat(real)
            shape |= {"size": found.st_size, "modified": int(found.st_mtime)}
            if stat.S_ISDIR(found.st_mode):
                return {**shape, "kind": "folder", "size": 0}
            if not stat.S_ISREG(found.st_mode):
                return {**shape, "problem": _problem("it is not a file")}
            return {**shape, **_judged(real, entry.name, found.st_size)}
        except OSError as error:
            return {**shape, "problem": _problem(f"it cannot be read: {(error.strerror or str(error)).lower()}")}

    def _check_below(self, path: str, real: str) -> None:
        if not self._is_below(real):
            raise _outside(path)

    def _is_below(self, real: str) -> bool:
        return real == self.path or real.startswith(self.path.rstrip(os.sep) + os.sep)


class NoFiles:
    """The files of a page without a web root: none."""

    def existing(self, path: str) -> str:
        """Raise the error of every path."""
        raise self._error()

    def _error(self) -> UsageError:
        return UsageError(
            "this page does not use files of the machine",
            reason=Reason.OUTSIDE_WEB_ROOT,
            remedy=Remedy(
                "drop a file of the browser on the page, upload it, or start the page with a folder",
                setting="web_root",
            ),
        )

    new = existing

    def list(self, path: str) -> dict[str, Any]:
        """Raise the error of every path."""
        raise self._error()


def _judged(path: str, name: str, size: int) -> dict[str, Any]:
    """Return how a file can be plugged in, by its first bytes and its name: fields of its entry."""
    if not size:
        return {"problem": _problem("it is empty")}
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb", buffering=0) as file:
        first = file.read(16)
        if first.startswith(_JPEG):
            return {"as": "clip"}
        file.seek(_ISO_IDENTIFIER)
        if file.read(5) in (b"CD001", b"BEA01"):
            return {"as": "cdrom"}
    if kind := next((kind for magic, kind in _FORMATS if first.startswith(magic)), None):
        if kind in _COMPRESSED:
            return {"problem": _problem(f"it is compressed ({kind})", "uncompress it")}
        return {"problem": _problem(f"it is a {kind} image, not a RAW one", "convert it with qemu-img")}
    if not name.lower().endswith(_DISKS):
        return {"problem": _problem("it is not an image of a disk or a CD, by its name and its first bytes")}
    if size % 512:
        return {"problem": _problem("its size is not a multiple of 512 bytes")}
    return {"as": "disk"}


def _problem(message: str, remedy: str = "") -> dict[str, str]:
    return {"message": message, "remedy": remedy} if remedy else {"message": message}


def _parts(path: str) -> list[str]:
    """Return the parts of a path of a browser.

    Raises:
        UsageError: it is absolute, leaves the folder, or cannot be a path.
    """
    parts = [part for part in path.split("/") if part]
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair
        raise _outside(path) from None
    if (
        path.startswith("/")
        or len(path) > MAX_PATH
        or any(part in (".", "..") or "\\" in part or "\0" in part for part in parts)
    ):
        raise _outside(path)
    return parts


def _outside(path: str) -> UsageError:
    return UsageError(
        f"{shown(path)} is not a path below the folder of this page",
        reason=Reason.OUTSIDE_WEB_ROOT,
        remedy="choose a file of the list",
    )


def private_folder(environment: dict[str, str] | None = None) -> Path:
    """Return the folder of this user's caches, which is made if it is missing: ``$XDG_CACHE_HOME/farplug``.

    Raises:
        SetupError: it cannot be made.
    """
    variables = os.environ if environment is None else environment
    cache = variables.get("XDG_CACHE_HOME", "")
    try:
        path = (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "farplug"
    except RuntimeError as error:
        raise SetupError(
            "this user has no home folder",
            reason=Reason.NOT_FOUND,
            remedy="set XDG_CACHE_HOME to a folder for uploads, or name a web root",
        ) from error
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise from_oserror(path, error, as_=SetupError, problem="cannot be made") from error
    return path
