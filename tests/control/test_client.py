from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.control.support import BlockingApp, session, silent_socket
from tests.leaks import comes, descriptors

from farplug.app.app import App
from farplug.app.state import apply
from farplug.control import client as client_module
from farplug.control import names
from farplug.control.client import Client
from farplug.control.messages import Hello
from farplug.errors import (
    FarplugError,
    GuestGoneError,
    LocalProtocolError,
    Reason,
    RemoteProtocolError,
    SessionError,
    SetupError,
    StateError,
    TargetError,
    UsageError,
)
from farplug.exit_codes import ExitCode, exit_code

HELLO = Hello("web", "spice://h", 5, 1.5, None, "0.1", "1.0", ("hello",), ()).to_json()


@asynccontextmanager
async def peer(path: Path, answers: Callable[[bytes], bytes | None]) -> AsyncIterator[None]:
    """Answer each line on a socket; None: close the connection."""
    tasks: set[Any] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            while line := await reader.readline():
                answer = answers(line)
                if answer is None:
                    break
                writer.write(answer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield
    finally:
        server.close()
        await asyncio.gather(*tasks)


def reply(result: bytes, id: int = 1) -> bytes:
    return b'{"id": %d, "ok": true, "result": %s}\n' % (id, result)


async def failure(path: Path, *, timeout: float = 10) -> FarplugError:
    with pytest.raises(FarplugError) as caught:
        async with Client.connect(path, timeout=timeout) as client:
            await client.call("status")
    return caught.value


async def test_calls(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, Client.connect(server.path) as client:
        assert client.hello == server.hello
        assert await client.call("status") == {"last_event": 0, "guests": {}}
        waiting = [asyncio.ensure_future(client.call("detach", {"device": str(number)})) for number in range(50)]
        await app.until(begun=16)
        app.go.set()
        assert await asyncio.gather(*waiting) == [str(number) for number in range(50)]
        with pytest.raises(SessionError) as caught:
            await client.call("detach")
        assert caught.value.message == "device is missing"
        assert (caught.value.reason, exit_code(caught.value)) == (Reason.BAD_SETTING, ExitCode.USAGE)
        with pytest.raises(LocalProtocolError, match="the request detach cannot be sent: a message of"):
            await client.call("detach", {"device": "x" * (1 << 20)})
        assert await client.call("status")


async def test_a_call_that_is_cancelled_is_carried_out(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, Client.connect(server.path) as client:
        call = asyncio.ensure_future(client.call("detach", {"device": "x"}))
        await app.until(begun=1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        app.go.set()
        await app.until(done=1)
        assert await client.call("status")  # the late reply is ignored


async def test_a_session_that_is_not_there(environment: dict[str, str], folder: Path) -> None:
    names.folder(environment, create=True)
    missing = await failure(folder / "web.sock")
    assert (type(missing), missing.reason) == (UsageError, Reason.NO_SESSION)
    with silent_socket(folder / "web.sock"):
        pass
    stale = await failure(folder / "web.sock")
    assert (type(stale), stale.reason) == (UsageError, Reason.NO_SESSION)
    assert (await failure(folder)).reason is Reason.NO_SESSION
    long = await failure(folder / ("x" * 200))
    assert (type(long), long.reason) == (SetupError, Reason.IO_ERROR)
    assert "path too long" in long.message
    assert (await failure(Path("a\0b"))).reason is Reason.NO_SESSION


async def test_a_session_that_does_not_answer(environment: dict[str, str], folder: Path) -> None:
    names.folder(environment, create=True)
    with silent_socket(folder / "web.sock"):
        for _ in range(20):  # more than its backlog
            silent = await failure(folder / "web.sock", timeout=0.05)
            assert (type(silent), silent.reason) == (TargetError, Reason.TIMED_OUT)
            assert exit_code(silent) is ExitCode.UNREACHABLE


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not a session: b'HTTP/1.1 400 Bad Request\\r' is not JSON"),
        (b"x" * (2 << 20), "is not a session: a line is longer than 1048576 bytes"),
        (b"[" * 500_000 + b"\n", "is not a session: "),
        (b'{"QMP": {"version": {}}}\n', "is neither a reply nor an event"),
        (reply(b'{"server_name": "ryll", "protocol_version": "1.2"}'), "the peer is not a farplug session"),
        (reply(b"null"), "the peer is not a farplug session"),
        (reply(b'{"server_name": "farplug", "protocol_version": "2.0"}'), "has version '2.0' of the control protocol"),
        (reply(b'{"server_name": "farplug", "protocol_version": "1.0"}'), "is not a valid hello"),
        (reply(b"null", 7), "a reply to 7, which is not a pending request"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_not_a_session(environment: dict[str, str], folder: Path, answer: bytes, message: str) -> None:
    path = names.folder(environment, create=True) / "web.sock"
    async with peer(path, lambda line: answer):
        error = await failure(path)
    assert (type(error), exit_code(error)) == (RemoteProtocolError, ExitCode.PROTOCOL)
    assert message in error.message
    assert error.message.isprintable()
    assert len(error.message) < 600


async def test_a_peer_that_closes_the_connection(environment: dict[str, str]) -> None:
    path = names.folder(environment, create=True) / "web.sock"
    async with peer(path, lambda line: None):
        error = await failure(path)
    assert (type(error), error.reason) == (GuestGoneError, Reason.SESSION_GONE)
    assert exit_code(error) is ExitCode.GUEST_GONE


async def test_an_error_of_the_connection(environment: dict[str, str]) -> None:
    path = names.folder(environment, create=True) / "web.sock"
    busy = b'{"id": null, "ok": false, "error": {"code": "busy", "message": "full", "exit_code": 11}}\n'
    async with peer(path, lambda line: busy):
        error = await failure(path)
    assert (type(error), error.reason, error.message, exit_code(error)) == (
        SessionError,
        Reason.BUSY,
        "full",
        ExitCode.SETUP,
    )


async def test_a_session_that_is_killed_during_a_call(environment: dict[str, str]) -> None:
    script = """if True:
        import asyncio, sys
        from tests.control.support import BlockingApp, session
        async def main():
            async with session(BlockingApp(), {"XDG_RUNTIME_DIR": sys.argv[1]}) as server:
                print(server.path, flush=True)
                await asyncio.Event().wait()
        asyncio.run(main())
    """
    command = [sys.executable, "-c", script, environment["XDG_RUNTIME_DIR"]]
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, cwd=root)
    try:
        assert process.stdout is not None
        path = (await process.stdout.readline()).decode().strip()
        async with Client.connect(path) as client:
            events = client.subscribe()
            await anext(events)
            calls = [
                asyncio.ensure_future(client.call("detach", {"device": "x"})),
                asyncio.ensure_future(anext(events)),
            ]
            await client.call("status")
            process.send_signal(signal.SIGKILL)
            for result in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(result, GuestGoneError)
                assert result.reason is Reason.SESSION_GONE
            with pytest.raises(GuestGoneError):
                await client.call("status")
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


# Subscriptions ----------------------------------------------------------------------------------------------------


async def test_a_subscription_follows_the_state(environment: dict[str, str]) -> None:
    app = BlockingApp()
    app.note("before")
    async with session(app, environment) as server, Client.connect(server.path) as client:
        events = client.subscribe()
        with pytest.raises(StateError):
            client.subscribe()
        app.note("also before")
        snapshot = await anext(events)
        assert snapshot == {"event": "snapshot", "last_event": 2, "guests": {}}
        app.note("after")
        event = await anext(events)
        assert (event["event"], event["id"], event["message"]) == ("note", 3, "after")
        assert apply(snapshot, event) == app.snapshot()
        await events.close()
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        app.note("not for a closed one")
        again = client.subscribe(["drive"])
        assert (await anext(again))["last_event"] == 4
        app.note("not this kind")
        app.events.publish("drive", "this kind")
        assert (await anext(again))["message"] == "this kind"
        waiting = asyncio.ensure_future(anext(again, None))
        await client.call("status")
        await server.close()
        assert await waiting is None  # the session ended in order
        assert await anext(again, None) is None


async def test_a_reader_that_is_too_slow_gets_a_new_snapshot(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_EVENTS", 10)
    app = BlockingApp()
    async with session(app, environment) as server, Client.connect(server.path) as client:
        events = client.subscribe()
        await anext(events)
        for number in range(15):
            app.note(str(number))
        await client.call("status")
        assert await anext(events) == {"event": "dropped", "id": 5, "count": 5}
        state = await anext(events)
        assert state == {"event": "snapshot", **app.snapshot()}
        app.note("next")
        assert (await anext(events))["message"] == "next"


async def test_a_connection_that_is_too_slow_gets_a_new_snapshot(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, Client.connect(server.path) as client:
        events = client.subscribe()
        await anext(events)
        for _ in range(20_000):
            app.note("x" * 100)
        app.note("the last one")
        seen = [await anext(events)]
        while seen[-1]["event"] != "snapshot":
            seen.append(await anext(events))
        assert seen[-2]["event"] == "dropped"
        assert seen[-1]["last_event"] == app.events.last_id
        app.note("next")
        assert (await anext(events))["message"] == "next"


async def test_a_reply_to_subscribe_without_a_snapshot(environment: dict[str, str]) -> None:
    path = names.folder(environment, create=True) / "web.sock"
    ids = iter(range(1, 100))

    def answer(line: bytes) -> bytes:
        id = next(ids)
        return reply(json.dumps(HELLO).encode() if id == 1 else b'{"snapshot": {"last_event": "x"}}', id)

    async with peer(path, answer), Client.connect(path) as client:
        with pytest.raises(RemoteProtocolError, match="the reply to subscribe has no snapshot"):
            await anext(client.subscribe())


async def test_no_descriptor_is_left(environment: dict[str, str]) -> None:
    async with session(App(), environment) as server:
        async with Client.connect(server.path):
            pass
        await asyncio.sleep(0.01)
        before = len(descriptors())
        for _ in range(100):
            async with Client.connect(server.path) as client:
                await anext(client.subscribe())
        while server._clients:
            await asyncio.sleep(0)
        await comes(lambda: len(descriptors()) <= before)
    for _ in range(10):
        assert (await failure(server.path)).reason is Reason.NO_SESSION
    assert len(descriptors()) < before
