"""The file of a security key: who may read it, what is damaged, and what survives."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.virtual.fido.client import client, plugged

from farplug.errors import ImageError, Reason
from farplug.virtual.fido import KeyFile, KeyState, SecurityKey, cbor, security_key_device
from farplug.virtual.fido.cbor import Value
from farplug.virtual.fido.credentials import (
    MAX_CREDENTIALS,
    Algorithm,
    Credential,
    Pin,
    PrivateKey,
    Protection,
    User,
)
from farplug.virtual.fido.key_file import MAX_FILE, parse, serialize


def state() -> KeyState:
    alice = User(b"\0\xff", "älice", "Alice")
    credentials = tuple(
        Credential(bytes((n,)) * 32, "example.com", alice, PrivateKey.generate(algorithm), Protection(n), rp_name="E")
        for n, algorithm in enumerate(Algorithm, 1)
    )
    return replace(KeyState.new(), counter=77, pin=Pin(bytes(16), 5), credentials=credentials)


def reason(path: Path) -> Reason:
    """Return the reason why a file cannot be opened; it is not changed."""
    before = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
    with pytest.raises(ImageError) as caught:
        KeyFile.open(path)
    assert caught.value.remedy
    assert before is None or path.read_bytes() == before
    return caught.value.reason


async def test_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    file = KeyFile.open(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_bytes())["warning"].startswith("For tests.")
    first = file.state
    await file.save(saved := replace(state(), master=first.master))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await file.close()
    await file.close()
    again = KeyFile.open(path)
    assert again.state == saved
    again.abandon()
    assert list(tmp_path.iterdir()) == [path]
    assert parse(serialize(saved), path) == saved


async def test_an_empty_file_and_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "keys.json", tmp_path / "link"
    path.touch(0o600)
    link.symlink_to(path)
    file = KeyFile.open(link)
    await file.save(replace(file.state, counter=5))
    await file.close()
    assert link.is_symlink()
    assert json.loads(path.read_bytes())["counter"] == 5


def test_files_that_others_can_open(tmp_path: Path) -> None:
    path = tmp_path / "my keys.json"
    KeyFile.open(path).abandon()
    for mode in (0o640, 0o604, 0o620, 0o601):
        path.chmod(mode)
        with pytest.raises(ImageError, match="other users can open") as caught:
            KeyFile.open(path)
        assert caught.value.reason is Reason.NO_PERMISSION
        assert caught.value.remedy.command == f"chmod 600 '{path}'"
    path.chmod(0o600)
    KeyFile.open(path).abandon()


def test_a_file_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    KeyFile.open(path).abandon()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ImageError, match="belongs to another user"):
        KeyFile.open(path)


def test_what_is_not_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.mkdir()
    assert reason(path) is Reason.NOT_A_FILE
    assert reason(tmp_path / "missing" / "keys.json") is Reason.NOT_FOUND
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert reason(tmp_path / "pipe") is Reason.NOT_A_FILE
    with pytest.raises(ImageError, match="not a valid path"):
        KeyFile.open("nul\0")
    good = json.loads(serialize(state()))
    for content, expected in (
        (b"\xff\xfe", Reason.WRONG_FORMAT),
        (b"[" * 100_000, Reason.WRONG_FORMAT),
        (b"[]", Reason.WRONG_FORMAT),
        (b'{"format": "other"}', Reason.WRONG_FORMAT),
        (json.dumps({**good, "version": 2}).encode(), Reason.WRONG_FORMAT),
        (json.dumps({**good, "version": True}).encode(), Reason.WRONG_FORMAT),
        (json.dumps({**good, "version": "x" * 1000}).encode(), Reason.WRONG_FORMAT),
        (serialize(state())[:-20], Reason.WRONG_FORMAT),
        (b" " * (MAX_FILE + 1), Reason.DAMAGED),
    ):
        path = tmp_path / "keys.json"
        path.write_bytes(content)
        path.chmod(0o600)
        assert reason(path) is expected


def damage() -> list[dict[str, Any]]:
    def changed(**fields: Any) -> dict[str, Any]:
        return {**json.loads(serialize(state())), **fields}

    def of_first(**fields: Any) -> dict[str, Any]:
        data = changed()
        data["credentials"][0] |= fields
        return data

    one = changed()["credentials"][0]
    without = changed()
    del without["master"]
    return [
        without,
        changed(master="00"),
        changed(master="x" * 64),
        changed(master=5),
        changed(attestation="00" * 32),
        changed(certificate=""),
        changed(counter=-1),
        changed(counter=1.5),
        changed(counter=True),
        changed(pin=5),
        changed(pin={}),
        changed(pin={"hash": "00" * 16, "retries": 9}),
        changed(credentials={}),
        changed(credentials=[5]),
        changed(credentials=[one] * 2),
        changed(credentials=[one] * (MAX_CREDENTIALS + 1)),
        of_first(id=""),
        of_first(secret="00" * 32),
        of_first(secret="ff" * 32),
        of_first(algorithm="RS256"),
        of_first(protection=0),
        of_first(rp_id="x" * 300),
        of_first(user_name="\ud800"),
        of_first(user_id="00" * 65),
    ]


@pytest.mark.parametrize("data", damage())
def test_a_damaged_file(data: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(data))
    path.chmod(0o600)
    assert reason(path) is Reason.DAMAGED


async def test_a_file_in_use(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    file = KeyFile.open(path)
    assert reason(path) is Reason.IN_USE
    await file.save(file.state)  # the new file is locked, too
    assert reason(path) is Reason.IN_USE
    await file.close()
    KeyFile.open(path).abandon()


async def test_a_file_that_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    file = KeyFile.open(path)
    path.unlink()
    with pytest.raises(ImageError) as caught:
        await file.save(replace(file.state, counter=5))
    assert caught.value.reason is Reason.NOT_FOUND
    path.write_text("the user's own")
    with pytest.raises(ImageError, match="was replaced") as caught:
        await file.save(replace(file.state, counter=5))
    assert caught.value.reason is Reason.CHANGED
    assert (path.read_text(), file.state.counter) == ("the user's own", 0)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
async def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Nothing is lost: the client gets an error, the file and the state stay as they were."""
    path = tmp_path / "keys.json"
    key = SecurityKey(KeyFile.open(path))
    before, old = path.read_bytes(), key.store.state

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    algorithms: list[Value] = [{"alg": -7, "type": "public-key"}]
    message = b"\1" + cbor.encode({1: bytes(32), 2: {"id": "a"}, 3: {"id": b"A"}, 4: algorithms})

    async def register_twice() -> None:
        async with plugged(key) as guest:
            with monkeypatch.context() as patched:
                patched.setattr(os, call, fail)
                assert await client(guest, lambda device: device.call(0x10, message)) == b"\x7f"
            assert (await client(guest, lambda device: device.call(0x10, message)))[:1] == b"\0"

    with pytest.raises(ImageError, match="no space left"):
        await register_twice()
    assert old.counter + 1 == key.store.state.counter == json.loads(path.read_bytes())["counter"]
    assert json.loads(before)["counter"] == old.counter
    await key.dispose()
    assert list(tmp_path.iterdir()) == [path]


async def test_a_folder_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder may permit to make files, but not to be read."""
    file, real = KeyFile.open(tmp_path / "keys.json"), os.open

    def refuse(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if path == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    await file.save(replace(file.state, counter=5))
    await file.close()
    assert file.state.counter == 5


async def test_what_a_killed_program_left_is_removed(tmp_path: Path) -> None:
    """It has the private keys. The files of other keys, and other files, stay."""
    path = tmp_path / "keys.json"
    kept = [
        tmp_path / name for name in (".keys.json.0123456", ".keys.json.0123456g", ".other.01234567", "keys.json.bak")
    ]
    left = [tmp_path / ".keys.json.01234567", tmp_path / ".keys.json.89abcdef"]
    file = KeyFile.open(path)
    for one in (*kept, *left):
        one.write_text("keys")
    with pytest.raises(ImageError, match="is in use"):
        KeyFile.open(path)
    assert left[0].exists()  # another program has the lock
    await file.close()
    KeyFile.open(path).abandon()
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])


async def test_a_save_that_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = KeyFile.open(tmp_path / "keys.json")
    go, fsync = threading.Event(), os.fsync

    def late(descriptor: int) -> None:
        go.wait()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", late)
    saving = asyncio.ensure_future(file.save(replace(file.state, counter=5)))
    await asyncio.sleep(0)
    saving.cancel()
    await asyncio.wait([saving])
    next_one = asyncio.ensure_future(file.save(replace(file.state, counter=6)))
    go.set()
    await next_one
    assert file.state.counter == 6
    await file.close()
    assert json.loads((tmp_path / "keys.json").read_bytes())["counter"] == 6


async def test_the_device_keeps_its_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    device = security_key_device(path)
    assert reason(path) is Reason.IN_USE
    await device.dispose()
    KeyFile.open(path).abandon()
    with pytest.raises(ImageError):
        security_key_device(tmp_path)
