"""Files that a client offers: media of CD-ROM drives and read-only disks, which go with the client."""

from __future__ import annotations

import asyncio
import base64
import gc
import random
import weakref
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.app.test_run import ISO, vm
from tests.control.support import RawClient, session
from tests.control.test_driving import code, done
from tests.control.test_screens import request

from farplug.app import media
from farplug.app.app import App
from farplug.app.client import MAX_OFFERS
from farplug.app.commands import Attach, Insert
from farplug.app.events import EventStream
from farplug.app.outlet import ClientEvent
from farplug.app.settings import GuestSettings, Source, TargetSettings
from farplug.control.server import Server
from farplug.errors import Reason, UsageError
from farplug.store import remote
from farplug.store.base import Store
from farplug.usb.types import Buffer

CONTENT = ISO + random.Random(3).randbytes(3 << 20)


@asynccontextmanager
async def offering(environment: dict[str, str], ports: int = 2) -> AsyncIterator[tuple[App, Server]]:
    app = App()
    async with vm(ports) as one:
        await app.connect(GuestSettings(TargetSettings(one.target)))
        async with session(app, environment) as server:
            yield app, server
            await app.close()


async def answering(client: RawClient, method: str, content: bytes = CONTENT, /, **params: Any) -> dict[str, Any]:
    """Send a request, and answer what the session asks for, until the reply is there."""
    client.send(request("answering", method, **params))
    while True:
        message = await client.next()
        if message.get("id") == "answering":
            return message
        if message.get("event") == "media-read":
            answer(client, message["data"], content)


def answer(client: RawClient, data: dict[str, Any], content: bytes = CONTENT) -> None:
    """Answer an event media-read."""
    part = content[data["offset"] : data["offset"] + data["length"]]
    params = {"media": data["media"], "read": data["read"]}
    client.send({"id": f"data {data['read']}", "method": "media-data", "params": params, "bytes": len(part)})
    client.writer.write(part)


def read(store: Store | None, offset: int, length: int) -> asyncio.Future[bytes]:
    """Begin a read as a guest does."""
    assert store is not None
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def finished(data: Buffer, error: OSError | None) -> None:
        if error is None:
            future.set_result(bytes(data))
        else:
            future.set_exception(error)

    store.read(offset, length, finished)
    return future


async def test_a_cd_of_a_client(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "PROGRESS_INTERVAL", 0.0)
    async with (
        offering(environment) as (app, server),
        RawClient.connect(server.path) as client,
        RawClient.connect(server.path) as other,
    ):
        await done(other, "subscribe", events=["medium-inserted", "medium-ejected", "medium-failed"])
        offered = await done(client, "media-offer", file="C:\\isos\\a\n.iso", size=len(CONTENT), modified="1")
        assert offered == {"media": "m1"}
        sources = [{"kind": "cdrom", "path": "client:m1"}]
        assert await code(other, "attach", sources=sources) == "not-found", "the file of another client"
        reply = await answering(client, "attach", sources=sources)
        assert reply["ok"], reply
        (drive,) = await done(client, "list")
        assert drive == {"label": "cdrom0", "medium": "client:m1/a\N{REPLACEMENT CHARACTER}.iso", "locked": False}
        unit = app.guests["g1"].drives()["cdrom0"]
        reading = read(unit.store, 2 << 20, 1 << 20)
        asked = (await client.event("media-read"))["data"]
        assert (asked["offset"], asked["length"]) == (2 << 20, 1 << 20)
        answer(client, asked)
        assert await reading == CONTENT[2 << 20 : 3 << 20]
        progress = (await client.event("media-progress"))["data"]
        assert (progress["media"], progress["read"], progress["last"]) == ("m1", 1 << 20, 2 << 20)
        touched = base64.b64decode(progress["touched"])
        assert len(touched) * 8 == remote.SLICES
        assert 0 < touched.count(255) < len(touched)
        # A file that has changed: the read fails, the session goes on.
        app.media._cache.drop(app.media._offers["m1"].file)
        reading = read(unit.store, 0, 2048)
        asked = (await client.event("media-read"))["data"]
        client.send(request(1, "media-data", media="m1", read=asked["read"], error="the file has\nchanged"))
        assert (await client.reply(1))["ok"] is True
        with pytest.raises(OSError, match="changed"):
            await reading
        failed = (await other.event("medium-failed"))["data"]
        assert failed["message"].endswith(": reading failed: the file has\N{REPLACEMENT CHARACTER}changed")
        assert (failed["media"], failed["level"]) == ("m1", "bad")
        # The client goes in the middle of a read.
        reading = read(unit.store, 3 << 20, 2048)
        await client.event("media-read")
        client.writer.transport.abort()
        with pytest.raises(OSError, match="not offered any more"):
            await reading
        ejected = (await other.event("medium-ejected"))["data"]
        assert ejected["medium"] == drive["medium"]
        assert ejected["why"] == media.GONE
        assert ejected["message"] == f"{drive['medium']} ejected: {media.GONE}"
        assert await done(other, "list") == [{"label": "cdrom0", "medium": None, "locked": False}]
        assert not app.media._offers
        assert not app.media._cache._chunks


async def test_insert_withdraw_and_a_disk(environment: dict[str, str]) -> None:
    async with offering(environment, 3) as (app, server), RawClient.connect(server.path) as client:
        await done(client, "subscribe", events=["medium-ejected", "medium-failed"])
        for name in ("a.iso", "b.iso", "disk.raw"):
            await done(client, "media-offer", file=name, size=len(CONTENT))
        reply = await answering(client, "attach", sources=[{"kind": "cdrom", "path": "client:m1"}])
        assert reply["ok"], reply
        assert (await answering(client, "insert", path="client:m2/b.iso"))["ok"] is True
        (drive,) = app.guests["g1"].drives().values()
        assert drive.medium == "client:m2/b.iso"
        await done(client, "media-withdraw", media="m1")  # it is not in the drive any more
        assert drive.medium == "client:m2/b.iso"
        client.send(request(1, "media-withdraw", media="m2"))
        assert (await client.event("medium-ejected", medium="client:m2/b.iso"))["data"]["why"]
        assert drive.medium is None
        not_an_iso = await answering(client, "insert", bytes(len(CONTENT)), path="client:m3")
        assert not_an_iso["error"]["code"] == "not-an-iso"
        assert not_an_iso["error"]["message"].startswith("disk.raw is not an ISO image")
        for kind in ("disk", "folder", "fido", "camera"):
            writable = await answering(client, "attach", sources=[{"kind": kind, "path": "client:m3"}])
            assert writable["error"]["code"] == "bad-setting"
            assert writable["error"]["message"].startswith("disk.raw is a file of a client: only CD-ROM drives and")
            assert writable["error"]["setting"] == "usb_disk_ro"
        reply = await answering(client, "attach", sources=[{"kind": "read-only-disk", "path": "client:m3"}])
        assert reply["result"]["attachments"][0]["label"] == "disk.raw"
        client.send(request(2, "media-withdraw", media="m3"))
        failed = (await client.event("medium-failed"))["data"]
        assert failed["message"] == f"disk.raw: {media.GONE}"
        assert await code(client, "insert", path="client:m3") == "not-found"


async def test_a_medium_that_is_inserted_often_is_kept_once(environment: dict[str, str]) -> None:
    async with offering(environment) as (app, server), RawClient.connect(server.path) as client:
        await done(client, "media-offer", file="a.iso", size=len(CONTENT))
        assert (await answering(client, "attach", sources=[{"kind": "cdrom", "path": "client:m1"}]))["ok"] is True
        drives: list[weakref.ref[Store]] = []
        file = app.media._offers["m1"].file
        for _ in range(5):
            drives += map(weakref.ref, file.users)
            assert (await answering(client, "insert", path="client:m1"))["ok"] is True
        assert len(file.users) == 1
        gc.collect()
        assert [ref() for ref in drives[1:]] == [None] * 4, "the first one belongs to the source"


async def test_a_client_that_goes_while_its_image_is_checked(environment: dict[str, str]) -> None:
    async with offering(environment) as (app, server), RawClient.connect(server.path) as other:
        await done(other, "subscribe", events=["medium-ejected", "attached"])
        for answers in range(4):
            async with RawClient.connect(server.path) as client:
                offered = await done(client, "media-offer", file="a.iso", size=len(CONTENT))
                path = f"client:{offered['media']}"
                client.send(request(1, "attach", sources=[{"kind": "cdrom", "path": path}], wait=False))
                for _ in range(answers):
                    answer(client, (await client.event("media-read"))["data"])
                await done(client, "status")
            while server._requests:
                await asyncio.sleep(0.001)
            for drive in app.guests["g1"].drives().values():
                while drive.medium is not None:
                    await asyncio.sleep(0.001)
            await done(other, "detach", device="all")
        assert not app.media._offers


async def test_a_withdrawn_file_is_not_opened_as_a_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client:m1").mkdir()
    (tmp_path / "client:m1/x.iso").write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    async with vm(2) as one, App() as app:
        await app.connect(GuestSettings(TargetSettings(one.target)))
        await app.do(Attach((Source.cdrom("./client:m1/x.iso"),)))
        for command in (
            Attach((Source.cdrom("client:m1/x.iso"),)),
            Attach((Source.disk("client:m1/x.iso"),)),
            Insert("client:m1/x.iso"),
        ):
            with pytest.raises(UsageError, match=media.GONE) as caught:
                await app.do(command)
            assert caught.value.reason is Reason.NOT_FOUND


async def test_questions_to_a_client_that_reads_nothing_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.001)
    posted: dict[Hashable, Callable[[], ClientEvent | None]] = {}

    class Full:
        """A connection that accepts no output."""

        def post(self, key: Hashable, make: Callable[[], ClientEvent | None]) -> None:
            posted[key] = make

    file = media.Media(EventStream()).offer("a.iso", 200 * remote.CHUNK, "", Full()).file
    for number in range(0, 100, 2):
        failed = asyncio.Event()
        file.read(number * remote.CHUNK, 1, lambda data, error, failed=failed: failed.set())  # type: ignore[misc]
        await failed.wait()
    monkeypatch.setattr(remote, "TIMEOUT", 60.0)
    for number in range(101, 200, 2):
        file.read(number * remote.CHUNK, 1, lambda data, error: None)
    events = []
    while posted:
        ((key, make),) = posted.items()
        del posted[key]
        events.append(make())
    assert [event.data["offset"] // remote.CHUNK for event in events if event] == [101, 103, 105, 107]
    file.close()


async def test_offers_and_answers_that_are_not_valid(environment: dict[str, str]) -> None:
    async with offering(environment) as (_, server), RawClient.connect(server.path) as client:
        for size in (0, -1, (1 << 53) + 1):
            assert await code(client, "media-offer", file="a", size=size) == "bad-setting"
        for number in range(MAX_OFFERS):
            await done(client, "media-offer", file="/" * number, size=1)
        assert await code(client, "media-offer", file="a", size=1) == "bad-setting"
        assert await code(client, "media-data", media="m1", read=1) == "bad-setting"
        assert await code(client, "media-data", media="m1", read=1, error="x") == "bad-setting"
        assert await code(client, "media-data", media="m99", read=1, error="x") == "not-found"
        assert await code(client, "media-withdraw", media="m99") == "not-found"
        empty = await answering(client, "attach", b"a", sources=[{"kind": "cdrom", "path": "client:m1"}])
        assert empty["error"]["code"] == "empty"


async def test_a_client_that_does_not_answer(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUT", 0.05)
    async with offering(environment) as (_, server), RawClient.connect(server.path) as client:
        await done(client, "media-offer", file="a.iso", size=len(CONTENT))
        assert await code(client, "attach", sources=[{"kind": "cdrom", "path": "client:m1"}]) == "io-error"
