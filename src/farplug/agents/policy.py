"""What an agent may do: the folders whose files it may name, writing, USB devices, and the secrets that it may type."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from farplug.errors import Reason, Remedy, SetupError, UsageError, from_oserror
from farplug.shell import shell_word
from farplug.text import MAX_SHOWN, printable, shown

MAX_PATH: Final = 4096
"""Characters of a path."""
MAX_LISTED: Final = 200
"""Files that are listed of a folder."""
MAX_SECRETS: Final = 64 << 10
"""Bytes of a file with secrets."""

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Folders:
    """The folders below which an agent may name files.

    Symbolic links count as what they lead to. What is passed on to a session is a path without symbolic links.

    Attributes:
        paths: absolute, without symbolic links.
    """

    paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, paths: Sequence[str | os.PathLike[str]]) -> Folders:
        """Return the folders at these paths.

        Raises:
            UsageError: one is not a folder that can be read.
        """
        found = []
        for path in paths:
            try:
                real = os.path.realpath(path, strict=True)
                os.listdir(real)
            except (OSError, ValueError) as error:
                raise from_oserror(path, error, as_=UsageError) from error
            found.append(real)
        return cls(tuple(found))

    def existing(self, path: str) -> str:
        """Return the absolute path of a file or a folder.

        Args:
            path: absolute, or relative to one of the folders.

        Raises:
            UsageError: it does not exist (``NOT_FOUND``), or is not below a folder (``NOT_ALLOWED``). The error
                does not reveal which files exist elsewhere.
        """
        if not self.paths:
            raise UsageError(
                "this agent may not use files of this machine",
                reason=Reason.NOT_ALLOWED,
                remedy="the user can allow a folder when the server is started",
            )
        if not path or len(path) > MAX_PATH or "\0" in path or not _is_encodable(path):
            raise UsageError(f"{shown(path)} is not a valid path", reason=Reason.NOT_FOUND, remedy="check the path")
        missing = False
        for folder in self.paths:
            real = os.path.realpath(os.path.join(folder, path))
            if not _is_below(real, folder):
                continue
            try:
                mode = os.stat(real).st_mode
            except OSError:
                missing = True
                continue
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise UsageError(
                    f"{printable(path, MAX_SHOWN)} is neither a file nor a folder", reason=Reason.NOT_A_FILE
                )
            return real
        if missing:
            raise UsageError(
                f"{printable(path, MAX_SHOWN)} does not exist", reason=Reason.NOT_FOUND, remedy="check the path"
            )
        raise UsageError(
            f"{printable(path, MAX_SHOWN)} is not below an allowed folder",
            reason=Reason.NOT_ALLOWED,
            remedy=f"allowed folders: {', '.join(self.paths)}",
        )

    def listing(self) -> list[dict[str, Any]]:
        """Return the files and folders directly in the folders: each with ``path``, ``kind`` and ``size``.

        At most MAX_LISTED of each folder; hidden ones, and links that lead out, are left out.
        """
        entries = []
        for folder in self.paths:
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                continue  # it was removed
            for name in [name for name in names if not name.startswith(".") and _is_encodable(name)][:MAX_LISTED]:
                real = os.path.realpath(os.path.join(folder, name))
                try:
                    found = os.stat(real)
                except OSError:
                    continue
                if _is_below(real, folder) and (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                    kind = "folder" if stat.S_ISDIR(found.st_mode) else "file"
                    entries.append({"path": os.path.join(folder, name), "kind": kind, "size": found.st_size})
        return entries


def _is_below(real: str, folder: str) -> bool:
    return real == folder or real.startswith(folder.rstrip(os.sep) + os.sep)


def _is_encodable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


@dataclass(frozen=True, slots=True)
class Policy:
    """What an agent may do. The user decides when the server is started.

    Attributes:
        read_only: look only.
        folders: whose files the agent may name.
        allow_write: disks that the VM writes to; the person is asked each time, if the client can.
        allow_devices: USB devices of this machine; the person is asked each time, if the client can.
        secrets: texts by their names, which the agent may type and does not see.
    """

    read_only: bool = False
    folders: Folders = Folders()
    allow_write: bool = False
    allow_devices: bool = False
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def check_source(self, kind: str, *, writable: bool) -> None:
        """Check that a kind of source may be plugged in.

        Raises:
            UsageError: ``NOT_ALLOWED``.
        """
        if writable and kind != "disk":
            raise UsageError(f"a {kind} is never written to", reason=Reason.BAD_SETTING, remedy="leave writable out")
        if writable and not self.allow_write:
            raise UsageError(
                "this agent may not plug in disks that the VM writes to",
                reason=Reason.NOT_ALLOWED,
                remedy="plug the disk in without writable: what the VM writes is discarded then",
            )
        if kind == "usb-device" and not self.allow_devices:
            raise UsageError(
                "this agent may not use USB devices of this machine",
                reason=Reason.NOT_ALLOWED,
                remedy="the user can allow that when the server is started",
            )

    def secret(self, name: str) -> str:
        """Return a secret.

        Raises:
            UsageError: there is none with this name (``NOT_FOUND``).
        """
        try:
            return self.secrets[name]
        except KeyError:
            names = ", ".join(sorted(self.secrets)) or "none"
            raise UsageError(
                f"there is no secret {shown(name)}", reason=Reason.NOT_FOUND, remedy=f"secrets: {names}"
            ) from None


def read_secrets(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the secrets of a file with lines ``NAME=TEXT``; empty lines and lines that begin with ``#`` are ignored.

    Raises:
        UsageError: the file cannot be read, or has other lines.
        SetupError: other users may read it (``NO_PERMISSION``).
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_SECRETS + 1)
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{os.fspath(path)} is not UTF-8 text", reason=Reason.WRONG_FORMAT) from error
    except (OSError, ValueError) as error:
        raise from_oserror(path, error, as_=UsageError) from error
    if os.name == "posix" and mode & 0o077:
        raise SetupError(
            f"{os.fspath(path)} may be read by other users (mode {stat.S_IMODE(mode):04o})",
            reason=Reason.NO_PERMISSION,
            remedy=Remedy("make it private:", command=f"chmod 600 {shell_word(os.fspath(path))}"),
        )
    if len(data) > MAX_SECRETS:
        raise UsageError(f"{os.fspath(path)} has more than {MAX_SECRETS} bytes", reason=Reason.TOO_LARGE)
    secrets: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, mark, value = line.partition("=")
        if not mark or not value or not _NAME.fullmatch(name) or name in secrets:
            raise UsageError(  # without the line, which may be a secret
                f"{os.fspath(path)}: line {number} is not NAME=TEXT with a new name",
                reason=Reason.WRONG_FORMAT,
                remedy="write one secret a line; names have the characters A-Z a-z 0-9 _ . -",
            )
        secrets[name] = value
    return secrets
