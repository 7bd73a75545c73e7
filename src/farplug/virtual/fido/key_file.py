"""The file of a security key: JSON, readable by its owner only, replaced as a whole at each change."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from farplug.descriptors import write_all
from farplug.errors import ImageError, Reason, Remedy, from_oserror
from farplug.shell import shell_word
from farplug.text import shown
from farplug.virtual.fido.credentials import (
    MASTER_SIZE,
    MAX_CREDENTIALS,
    MAX_NAME,
    MAX_RETRIES,
    MAX_RP_ID,
    MAX_USER_ID,
    Algorithm,
    Credential,
    KeyState,
    KeyStore,
    Pin,
    PrivateKey,
    Protection,
    User,
)

if sys.platform != "win32":
    import fcntl

FORMAT: Final = "farplug security key"
VERSION: Final = 1
MAX_FILE: Final = 1 << 20
"""Bytes of a file that is read. A key with all its credentials has 100 kB."""
_WARNING: Final = "For tests. A program or a person that reads this file can sign in with it."
_PIN_HASH_SIZE = 16
_SUFFIX_SIZE: Final = 4
"""Random bytes in the name of a file that is to replace another."""
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


class KeyFile(KeyStore):
    """A key in a file, which is locked until :meth:`close`. Made by :meth:`open`.

    Attributes:
        path: of the file; the target, if the path that was opened is a symbolic link.
    """

    def __init__(self, path: Path, descriptor: int, state: KeyState) -> None:
        self.path = path
        self._descriptor = descriptor
        self._state = state
        self._saving: asyncio.Future[None] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> KeyFile:
        """Open and lock the file of a key. If there is none, or an empty one, it becomes a new key.

        Raises:
            ImageError: the file cannot be used. It is not changed.
        """
        if sys.platform == "win32":
            raise ImageError(
                f"{os.fspath(path)}: farplug cannot keep security keys in files on this system",
                reason=Reason.UNSUPPORTED_SYSTEM,
            )
        try:
            target = Path(os.path.realpath(path))
            descriptor = _open_locked(target)
        except (OSError, ValueError) as error:
            raise from_oserror(path, error, as_=ImageError, remedy="name a file of your own, or a new one") from error
        try:
            _check_owner(target, os.fstat(descriptor))
            raw = _read(target, descriptor)
            state = parse(raw, target) if raw else KeyState.new()
        except BaseException:
            os.close(descriptor)
            raise
        _remove_left_overs(target)
        file = cls(target, descriptor, state)
        if not raw:
            try:
                file._write(state)
            except BaseException:
                file.abandon()
                raise
        return file

    @property
    def state(self) -> KeyState:
        return self._state

    async def save(self, state: KeyState) -> None:
        """Replace the file, in a thread. A call that is cancelled completes in the background."""
        while self._saving is not None:  # of a call that was cancelled
            await asyncio.wait([self._saving])
        saving = self._saving = asyncio.ensure_future(asyncio.to_thread(self._write, state))
        saving.add_done_callback(self._saved)
        await asyncio.shield(saving)

    def _saved(self, saving: asyncio.Future[None]) -> None:
        self._saving = None
        if not saving.cancelled():
            saving.exception()  # the caller has it, unless it was cancelled

    async def close(self) -> None:
        while self._saving is not None:
            await asyncio.wait([self._saving])
        self.abandon()

    def abandon(self) -> None:
        """Release the file without waiting."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _write(self, state: KeyState) -> None:
        """Write another file, lock it, and give it the name of the old one: a reader finds the one or the other."""
        if sys.platform == "win32":
            raise AssertionError
        name = self.path.with_name(f"{_prefix(self.path)}{secrets.token_hex(_SUFFIX_SIZE)}")
        new = -1
        try:
            new = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            _lock(new)
            write_all(new, serialize(state))
            os.fsync(new)
            if not os.path.samestat(os.fstat(self._descriptor), os.stat(self.path)):
                raise ImageError(
                    f"{self.path} was replaced by another file while it was in use",
                    reason=Reason.CHANGED,
                    remedy="plug the key in again",
                )
            os.replace(name, self.path)
        except BaseException as error:
            if new >= 0:
                os.close(new)
            with suppress(OSError):
                os.unlink(name)
            if isinstance(error, OSError):
                raise from_oserror(self.path, error, as_=ImageError, problem="cannot be written") from error
            raise
        old, self._descriptor = self._descriptor, new
        os.close(old)
        self._state = state
        _sync_folder(self.path.parent)


def _lock(descriptor: int) -> None:
    """Lock a file; a file system without locks has none."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass


def _open_locked(path: Path) -> int:
    """Open a file, or make an empty one, and lock it.

    Raises:
        ImageError: another program uses it.
        OSError: it cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            _lock(descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise ImageError(
                f"{path} is in use",
                reason=Reason.IN_USE,
                remedy="unplug the key where it is plugged in; each VM needs a key file of its own",
            ) from None
        except OSError:
            pass  # its name is gone
        os.close(descriptor)  # its owner has replaced it


def _check_owner(path: Path, found: os.stat_result) -> None:
    """Raise ``ImageError`` unless only this user can read the file."""
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"{path} is not a file", reason=Reason.NOT_A_FILE, remedy="name a file")
    if sys.platform != "win32" and found.st_uid != os.geteuid():
        raise ImageError(
            f"{path} belongs to another user", reason=Reason.NO_PERMISSION, remedy="use a key file of your own"
        )
    if found.st_mode & _OTHERS:
        raise ImageError(
            f"other users can open {path}, which has the private keys of a security key",
            reason=Reason.NO_PERMISSION,
            remedy=Remedy("make it private:", command=f"chmod 600 {shell_word(str(path))}"),
        )


def _read(path: Path, descriptor: int) -> bytes:
    data = bytearray()
    while len(data) <= MAX_FILE:
        part = os.read(descriptor, MAX_FILE)
        if not part:
            return bytes(data)
        data += part
    raise _damaged(path, f"it has more than {MAX_FILE >> 20} MiB")


def _prefix(path: Path) -> str:
    """Return the beginning of the names of the files that are to replace a file."""
    return f".{path.name}."


def _remove_left_overs(path: Path) -> None:
    """Remove the files that were to replace a file when farplug was killed: they have its keys, and perhaps older ones.

    The caller has locked the file, so no other program is about to replace it.
    """
    prefix = _prefix(path)
    with suppress(OSError):
        for name in os.listdir(path.parent):
            suffix = name.removeprefix(prefix)
            if name.startswith(prefix) and re.fullmatch(f"[0-9a-f]{{{2 * _SUFFIX_SIZE}}}", suffix):
                with suppress(OSError):
                    os.unlink(path.with_name(name))


def _sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk, if this user may read the folder and its file system has such a call."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # the file system has no such call
    finally:
        os.close(descriptor)


# The format ---------------------------------------------------------------------------------------------------------


def serialize(state: KeyState) -> bytes:
    """Return the content of the file."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "warning": _WARNING,
        "master": state.master.hex(),
        "attestation": state.attestation.hex(),
        "certificate": state.certificate.hex(),
        "counter": state.counter,
        "pin": None if state.pin is None else {"hash": state.pin.hash.hex(), "retries": state.pin.retries},
        "credentials": [
            {
                "id": one.id.hex(),
                "rp_id": one.rp_id,
                "rp_name": one.rp_name,
                "user_id": one.user.id.hex(),
                "user_name": one.user.name,
                "user_display_name": one.user.display_name,
                "algorithm": one.key.algorithm.name,
                "secret": one.key.secret.hex(),
                "protection": int(one.protection),
            }
            for one in state.credentials
        ],
    }
    return json.dumps(data, indent=1).encode() + b"\n"


def parse(raw: bytes, path: Path) -> KeyState:
    """Return the state in the content of a file.

    Raises:
        ImageError: ``wrong-format``: it is another file, or one of a later version; ``damaged``: it is damaged.
    """
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ImageError(
            f"{path} is not the file of a security key",
            reason=Reason.WRONG_FORMAT,
            remedy="name a file that does not exist, to make a new key",
        )
    version = data.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ImageError(
            f"{path} has the version {shown(version)} of the format; this farplug reads {VERSION}",
            reason=Reason.WRONG_FORMAT,
            remedy="use a newer farplug",
        )
    try:
        return _state(data)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {shown(str(error))}") from error


def _damaged(path: Path, what: str) -> ImageError:
    return ImageError(
        f"{path} is damaged: {what}",
        reason=Reason.DAMAGED,
        remedy="restore it from a copy, or name a file that does not exist, to make a new key",
    )


def _state(data: dict[str, Any]) -> KeyState:
    attestation = PrivateKey(Algorithm.ES256, _bytes(data["attestation"], 32, 32))
    attestation.check()
    credentials = tuple(map(_credential, _list(data["credentials"])))
    if len({one.id for one in credentials}) < len(credentials):
        raise ValueError("two credentials have the same id")
    pin = data["pin"]
    return KeyState(
        _bytes(data["master"], MASTER_SIZE, MASTER_SIZE),
        attestation.secret,
        _bytes(data["certificate"], 1, 2048),
        _number(data["counter"], 1 << 63),
        None
        if pin is None
        else Pin(_bytes(pin["hash"], _PIN_HASH_SIZE, _PIN_HASH_SIZE), _number(pin["retries"], MAX_RETRIES)),
        credentials,
    )


def _credential(data: dict[str, Any]) -> Credential:
    key = PrivateKey(Algorithm[_text(data["algorithm"], 16)], _bytes(data["secret"], 32, 32))
    key.check()
    user = User(
        _bytes(data["user_id"], 0, MAX_USER_ID),
        _text(data["user_name"], MAX_NAME),
        _text(data["user_display_name"], MAX_NAME),
    )
    return Credential(
        _bytes(data["id"], 16, 128),
        _text(data["rp_id"], MAX_RP_ID),
        user,
        key,
        Protection(_number(data["protection"], 3)),
        rp_name=_text(data["rp_name"], MAX_NAME),
    )


def _bytes(value: object, least: int, most: int) -> bytes:
    data = bytes.fromhex(_text(value, 2 * most))
    if not least <= len(data) <= most:
        raise ValueError(f"a value has {len(data)} bytes")
    return data


def _text(value: object, most: int) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"{shown(value)} is not a text of at most {most} characters")
    value.encode()  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
    return value


def _number(value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{shown(value)} is not a number from 0 to {most}")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_CREDENTIALS:
        raise ValueError(f"{shown(value)} is not a list of at most {MAX_CREDENTIALS} credentials")
    return value
