"""Uploads: whole, in pieces, interrupted, too large, hostile."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.web.support import Answer, Served, fake_session

from farplug.errors import Reason, SetupError, UsageError
from farplug.web import uploads
from farplug.web.uploads import ABANDONED, MAX_UPLOADS, Piece, Uploads, WrongOffset, check_name, temporary_folder

DATA = os.urandom(3_000_000)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def body(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
        await asyncio.sleep(0)


def here(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


async def put(served: Served, name: str, data: bytes, content_range: str | None = None) -> Answer:
    headers = {} if content_range is None else {"Content-Range": content_range}
    return await served.http("PUT", f"/media/{name}", headers, data, token=served.page.tokens.full)


def folder_of(served: Served, environment: dict[str, str]) -> Path:
    (path,) = Path(environment["XDG_CACHE_HOME"], "farplug").glob("page-*")
    return path


async def test_a_whole_file(served: Served, environment: dict[str, str]) -> None:
    answer = await put(served, "a%20b.iso", DATA)
    digest = hashlib.sha256(DATA).hexdigest()
    expected = {"received": len(DATA), "complete": True, "sha256": digest, "path": "upload:a b.iso"}
    assert (answer.status, answer.json) == (200, expected)
    folder = folder_of(served, environment)
    assert here(folder) == ["a b.iso"]
    assert (folder / "a b.iso").read_bytes() == DATA
    assert (folder.stat().st_mode & 0o777, (folder / "a b.iso").stat().st_mode & 0o777) == (0o700, 0o600)
    async with fake_session(served.folder) as session, served.browser() as browser:
        await browser.call("open", {"session": "web1"})
        await browser.call("insert", {"path": "upload:a b.iso"})
        assert session.requests[0][0]["params"] == {"path": str(folder / "a b.iso")}
        assert await browser.refused("insert", {"path": "upload:.lock"}) == "bad-name"
        line = (await browser.call("command", {"method": "insert", "params": {"path": "upload:a b.iso"}}))["command"]
        assert line == f"farplug insert -s web1 '{folder}/a b.iso'"
        assert await browser.call("remove-upload", {"path": "upload:a b.iso"}) == {"quota": 16 << 30, "used": 0}
        assert await browser.refused("remove-upload", {"path": "upload:a b.iso"}) == "not-found"
        assert await browser.refused("remove-upload", {"path": "../x"}) == "bad-name"
    assert here(folder) == []


async def test_pieces(served: Served, environment: dict[str, str]) -> None:
    total = len(DATA)
    assert (await put(served, "a", b"", f"bytes */{total}")).json["received"] == 0
    received = 0
    for last in (99, 1_000_000, total - 1):
        answer = await put(served, "a", DATA[received : last + 1], f"bytes {received}-{last}/{total}")
        received = last + 1
        assert (answer.status, answer.json["received"], answer.json["complete"]) == (200, received, received == total)
        assert [name for name in here(folder_of(served, environment)) if name[0] != "."] == (
            ["a"] if received == total else []
        )
        assert (await put(served, "a", b"", f"bytes */{total}")).json == answer.json
    assert answer.json["sha256"] == hashlib.sha256(DATA).hexdigest()
    wrong = await put(served, "b", DATA[5:10], f"bytes 5-9/{total}")
    assert (wrong.status, wrong.json["received"]) == (409, 0)


async def test_an_interrupted_piece_continues_where_it_stopped(served: Served, environment: dict[str, str]) -> None:
    total = len(DATA)
    headers = {"Content-Range": f"bytes 0-{total - 1}/{total}", "Content-Length": str(total)}
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(served.request("PUT", "/media/a", headers, DATA[:1_500_000], token=served.page.tokens.full))
    await writer.drain()
    while (await put(served, "a", b"", f"bytes */{total}")).json["received"] < 1 << 20:
        await asyncio.sleep(0.01)
    assert (await put(served, "a", DATA[:9], f"bytes 0-8/{total}")).json["error"]["code"] == "in-use"
    writer.close()
    while True:
        received = (await put(served, "a", b"", f"bytes */{total}")).json["received"]
        try:
            answer = await put(served, "a", DATA[received:], f"bytes {received}-{total - 1}/{total}")
        except ConnectionError:  # refused before its body was read: the page has not noticed the interruption
            continue
        if answer.status == 200:
            break
    assert answer.json["sha256"] == hashlib.sha256(DATA).hexdigest()
    assert (folder_of(served, environment) / "a").read_bytes() == DATA


async def test_a_file_that_begins_again(served: Served) -> None:
    assert (await put(served, "a", b"abc", "bytes 0-2/9")).json["received"] == 3
    answer = await put(served, "a", b"xy", "bytes 0-1/4")
    assert answer.json["received"] == 2
    assert (await put(served, "a", b"zz", "bytes 2-3/4")).json["sha256"] == hashlib.sha256(b"xyzz").hexdigest()


async def test_a_file_that_is_there_is_not_replaced(served: Served, environment: dict[str, str]) -> None:
    await put(served, "a", b"abc")
    answer = await put(served, "a", b"xyz")
    assert (answer.status, answer.json["error"]["code"]) == (409, "exists")
    await put(served, "b", b"ab", "bytes 0-1/3")
    (folder_of(served, environment) / "b").write_bytes(b"own")
    answer = await put(served, "b", b"c", "bytes 2-2/3")
    assert (answer.status, answer.json["error"]["code"]) == (409, "exists")
    assert (folder_of(served, environment) / "b").read_bytes() == b"own"
    assert here(folder_of(served, environment)) == ["a", "b"]


async def test_the_quota(environment: dict[str, str]) -> None:
    async with Served.serve(environment, upload_quota=1000) as served:
        assert (await put(served, "a", bytes(600))).status == 200
        answer = await put(served, "b", bytes(401))
        assert (answer.status, answer.json["error"]["code"]) == (413, "too-large")
        assert (await put(served, "b", b"x", "bytes 0-0/400")).status == 200
        answer = await put(served, "c", b"x")  # what is not there yet counts
        assert (answer.status, answer.json["error"]["code"]) == (413, "too-large")
        answer = await put(served, "c", b"x", "bytes 0-0/999999999999999999")
        assert answer.status == 413
        async with served.browser() as browser:
            assert (await browser.call("remove-upload", {"path": "upload:a"})) == {"quota": 1000, "used": 400}
        assert (await put(served, "c", bytes(600))).status == 200
    assert list(Path(environment["XDG_CACHE_HOME"], "farplug").iterdir()) == []


async def test_a_disk_without_space(
    served: Served, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    answer = await put(served, "a", bytes(11))
    assert (answer.status, answer.json["error"]["code"]) == (507, "no-space")

    def full(upload: Any, data: bytes) -> None:
        raise UsageError("the upload cannot be written", reason=Reason.NO_SPACE)

    monkeypatch.setattr(uploads, "_write", full)
    answer = await put(served, "a", bytes(9))
    assert (answer.status, answer.json["error"]["code"]) == (507, "no-space")
    assert here(folder_of(served, environment)) == []


@pytest.mark.parametrize(
    "name",
    [
        *("%2e%2e", ".hidden", "a%5cb", "a%00", "a%0ab", "%20" * 201, "x" * 201, "%ff", ".", "%e2%80%a8"),
        *("..", "..%2fa", "a%2fb", "%2fetc%2fpasswd"),
    ],
)
async def test_names_that_are_not_valid(served: Served, environment: dict[str, str], name: str) -> None:
    answer = await put(served, name, b"abc")
    assert answer.status in (400, 404, 200)
    if answer.status == 200:  # %ff is decoded as U+FFFD
        assert answer.json["path"] == "upload:\ufffd"
    assert set(here(folder_of(served, environment))) <= {"\ufffd"}
    assert not list(Path(environment["XDG_CACHE_HOME"], "farplug").glob("[!p]*"))


def test_a_name_with_markup_is_a_name() -> None:
    assert check_name("<img src=x>'\"&.iso") == "<img src=x>'\"&.iso"
    with pytest.raises(UsageError):
        check_name("\ud800")


@pytest.mark.parametrize(
    ("content_range", "content_length"),
    [
        (None, None),
        (None, "x"),
        (None, "-1"),
        (None, "٣"),
        ("bytes 0-1/2", None),
        ("bytes 0-1/2", "1"),
        ("bytes 0-2/2", "3"),
        ("bytes 1-0/2", "0"),
        ("bytes 0-1/*", "2"),
        ("bytes */2", "1"),
        ("bytes -1-0/2", "2"),
        ("items 0-1/2", "2"),
        ("bytes 0-0/99999999999999999999", "1"),
        ("bytes 0-0/1, bytes 0-0/1", "1"),
        ("", "1"),
    ],
)
def test_headers_that_are_not_valid(content_range: str | None, content_length: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        Piece.parse(content_range, content_length)
    assert caught.value.reason is Reason.BAD_OPTION


async def test_an_upload_without_a_length(served: Served) -> None:
    request = served.request("PUT", "/media/a", {"Transfer-Encoding": "chunked"}, token=served.page.tokens.full)
    request = request.replace(b"Content-Length: 0\r\n", b"")
    answer = await served.raw(request + b"3\r\nabc\r\n0\r\n\r\n")
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad-option")


async def test_an_empty_file(served: Served) -> None:
    assert (await put(served, "a", b"")).json["error"]["code"] == "empty"


async def test_a_body_that_is_longer_than_its_piece(tmp_path: Path) -> None:
    one = Uploads(tmp_path)
    result = await one.put("a", Piece(6, 0, 3), body(b"ab", b"cdef"))
    assert result["received"] == 3
    with pytest.raises(WrongOffset):
        await one.put("a", Piece(6, 4, 1), body(b"x"))
    assert (await one.put("a", Piece(6, 3, 3), body(b"def")))["sha256"] == hashlib.sha256(b"abcdef").hexdigest()


async def test_an_abandoned_upload(tmp_path: Path) -> None:
    clock = Clock()
    one = Uploads(tmp_path, clock=clock)
    await one.put("a", Piece(6, 0, 3), body(b"abc"))
    clock.now = ABANDONED
    await one.put("b", Piece(6, 0, 3), body(b"abc"))
    clock.now += 1
    one.sweep()
    assert len(here(tmp_path)) == 1
    assert (await one.put("a", Piece(6), body()))["received"] == 0
    assert (await one.put("b", Piece(6), body()))["received"] == 3
    assert one.used == 6
    one.close()
    assert here(tmp_path) == []


async def test_incomplete_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """A folder below the web root is kept: the locked file of another page, and what has another name, stay."""
    names = [".0123456789abcdef.part", ".notes.part", "whole.part"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    other = Uploads(tmp_path)
    assert here(tmp_path) == names[1:]
    await other.put("a.iso", Piece(10, 0, 5), body(b"12345"))
    Uploads(tmp_path)
    assert len(here(tmp_path)) == 3
    other.close()
    assert here(tmp_path) == names[1:]


async def test_too_many_uploads(tmp_path: Path) -> None:
    one = Uploads(tmp_path)
    for number in range(MAX_UPLOADS):
        await one.put(str(number), Piece(2, 0, 1), body(b"x"))
    with pytest.raises(SetupError) as caught:
        await one.put("more", Piece(2, 0, 1), body(b"x"))
    assert caught.value.reason is Reason.BUSY
    await one.put("0", Piece(2, 1, 1), body(b"y"))
    await one.put("more", Piece(2, 0, 1), body(b"x"))
    one.close()


async def test_a_body_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "IDLE_TIMEOUT", 0.05)
    one = Uploads(tmp_path)

    async def stops() -> AsyncIterator[bytes]:
        yield b"abc"
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await one.put("a", Piece(9, 0, 9), stops())
    assert (await one.put("a", Piece(9), body()))["received"] == 3
    one.close()


async def test_uploads_below_a_web_root_stay(environment: dict[str, str], root: Path) -> None:
    async with Served.serve(environment, web_root=str(root)) as served:
        await put(served, "a.iso", b"abc")
        await put(served, "b.iso", b"abc", "bytes 0-2/4")
        async with served.browser() as browser:
            found = await browser.call("files", {"path": "uploads"})
            assert [entry["name"] for entry in found["entries"]] == ["a.iso"]
    assert here(root / "uploads") == ["a.iso"]


async def test_a_link_in_the_folder_of_uploads(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError) as caught:
        Uploads(folder).existing("upload:a")
    assert caught.value.reason is Reason.NOT_FOUND
    with pytest.raises(UsageError) as caught:
        await Uploads(folder).put("a", Piece(1, 0, 1), body(b"x"))
    assert caught.value.reason is Reason.EXISTS


def test_folders_of_processes_that_were_killed_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / "page-stale"
    stale.mkdir()
    (stale / ".lock").touch()
    (stale / "a.iso").write_text("x")
    with temporary_folder(tmp_path) as one, temporary_folder(tmp_path) as two:
        assert not stale.exists()
        assert one.is_dir()
        assert two.is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["file", "link"])
async def test_a_web_root_whose_uploads_cannot_be_used(environment: dict[str, str], tmp_path: Path, what: str) -> None:
    """It is an error at the start, not in each browser."""
    (tmp_path / "root").mkdir()
    uploads = tmp_path / "root" / "uploads"
    if what == "file":
        uploads.write_bytes(b"")
    else:
        uploads.symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises((SetupError, UsageError), match=f"^{uploads} "):
        async with Served.serve(environment, web_root=str(tmp_path / "root")):
            pass
