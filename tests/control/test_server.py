"""The server, byte by byte, with clients of every kind."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.control.support import BlockingApp, RawClient, session
from tests.docs import ROOT
from tests.leaks import comes, descriptors

from farplug.app.commands import CLIENT_COMMANDS, COMMANDS
from farplug.control import server as server_module
from farplug.control.messages import MAX_LINE
from farplug.control.server import EVENTS, MAX_CLIENTS, MAX_EVENTS, MAX_PENDING


def request(id: Any, method: str, **params: Any) -> dict[str, Any]:
    return {"id": id, "method": method, "params": params}


async def test_hello_comes_first(environment: dict[str, str], folder: Path) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path, hello=False) as client:
        refused = await client.ask(request(1, "status"))
        assert refused["error"] == {
            "code": "wrong-state",
            "message": "the first request must be hello",
            "remedy": "",
            "exit_code": 1,
        }
        other = await client.ask(request(2, "hello", protocol_version="2.0", client_name="x"))
        assert (other["id"], other["error"]["code"], other["error"]["exit_code"]) == (2, "protocol", 10)
        assert "has version 1.1 of the control protocol, the client has '2.0'" in other["error"]["message"]
        assert (await client.ask(request(3, "subscribe")))["error"]["code"] == "wrong-state"
        missing = await client.ask(request(4, "hello"))
        assert missing["error"]["message"] == "protocol_version is missing"
        hello = await client.ask(request("five", "hello", protocol_version="1.9", client_name="x", later=1))
        assert hello["id"] == "five"
        result = hello["result"]
        assert (result["server_name"], result["session"], result["target"]) == ("farplug", "web", "spice://vmhost:5900")
        assert (result["pid"], result["log"], result["protocol_version"]) == (os.getpid(), None, "1.1")
        assert result["supported_methods"] == ["hello", "subscribe", "unsubscribe", *COMMANDS, *CLIENT_COMMANDS]
        assert {"attached", "dropped", "session-ended"} <= set(result["supported_events"])
        assert (await client.ask(request(6, "status")))["result"] == {"last_event": 0, "guests": {}}


def test_every_event_is_listed() -> None:
    table = (ROOT / "docs/exit-codes.md").read_text().partition("## Events")[2]
    documented = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert set(EVENTS) == documented - {"check", "failed", "events-dropped"}  # of the lines of a command


async def test_what_a_client_sent_is_not_in_the_log(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with session(BlockingApp(), environment) as server, RawClient.connect(server.path) as client:
        client.send({"id": 1, "method": "type", "params": "hunter2"})
        assert "hunter2" in await client.refused()
    assert "is refused: protocol" in caplog.text
    assert "hunter2" not in caplog.text


async def test_errors_of_a_request(environment: dict[str, str]) -> None:
    async with session(BlockingApp(), environment) as server, RawClient.connect(server.path) as client:
        for method, params, code, number in [
            ("frobnicate", {}, "unknown-command", 2),
            ("HELLO", {}, "unknown-command", 2),
            ("detach", {}, "bad-setting", 2),
            ("detach", {"device": 5}, "bad-setting", 2),
            ("attach", {"sources": [{"kind": "disk", "path": "x", "snapsot": "y"}]}, "bad-setting", 2),
            ("attach", {"sources": [{"kind": "disk", "path": "x"}]}, "not-found", 2),
            ("subscribe", {"events": "all"}, "bad-setting", 2),
            ("subscribe", {"events": [5]}, "bad-setting", 2),
            ("insert", {"path": "x" * 5000}, "protocol", 10),
        ]:
            reply = await client.ask({"id": 1, "method": method, "params": params})
            assert (reply["id"], reply["ok"]) == (1, False)
            assert (reply["error"]["code"], reply["error"]["exit_code"]) == (code, number), reply
            assert reply["error"]["message"]
        assert (
            "methods: hello, subscribe, unsubscribe, attach"
            in (await client.ask(request(1, "frobnicate")))["error"]["remedy"]
        )


async def test_unknown_fields_are_ignored(environment: dict[str, str]) -> None:
    async with session(BlockingApp(), environment) as server, RawClient.connect(server.path) as client:
        reply = await client.ask({**request(1, "status", later=[1]), "priority": 5})
        assert reply["ok"] is True


async def test_a_bug_is_an_internal_error_of_that_request(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with session(BlockingApp(), environment) as server, RawClient.connect(server.path) as client:
        reply = await client.ask(request(1, "eject"))
        assert reply["error"]["code"] == "internal-error"
        assert reply["error"]["message"] == "internal error: ZeroDivisionError: a bug"
        assert reply["error"]["exit_code"] == 1
        long = await client.ask(request(2, "eject", drive="x" * 8000))
        assert len(long["error"]["message"]) < 1100
        assert (await client.ask(request(2, "status")))["ok"] is True
    assert "the request eject failed" in caplog.text


async def test_requests_run_side_by_side(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path) as client:
        client.send(request("a", "detach", device="x"), request("b", "detach", device="y"), request("c", "status"))
        assert (await client.next())["id"] == "c"
        assert app.begun == ["x", "y"]
        app.go.set()
        assert [await client.next(), await client.next()] == [
            {"id": "a", "ok": True, "result": "x"},
            {"id": "b", "ok": True, "result": "y"},
        ]


async def test_requests_of_clients_that_have_left_are_bounded(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_REQUESTS", 3)
    app = BlockingApp()
    async with session(app, environment) as server:
        async with RawClient.connect(server.path) as client:
            client.send(*(request(id, "detach", device="x") for id in range(3)))
            await app.until(begun=3)
        async with RawClient.connect(server.path) as client:
            refused = await client.ask(request(1, "detach", device="y"))
            assert refused["error"]["code"] == "busy"
            assert "3 requests" in refused["error"]["message"]
            app.go.set()
            await app.until(done=3)
            assert (await client.ask(request(2, "detach", device="z")))["result"] == "z"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "is not JSON"),
        (b"\x16\x03\x01\x02\x00\x01\n", "is not JSON"),
        (b"[" * 200_000 + b"\n", "nested too deeply"),
        (b'{"id": 7, "method": "status", "params": {"a": NaN}}\n', "NaN is not a number"),
        (b"{}\n", "id: None"),
        (b"x" * (2 << 20), "longer than 1048576 bytes"),
        (b'{"id": "' + b"x" * (2 << 20) + b'"}\n', "longer than 1048576 bytes"),
    ],
    ids=lambda value: value[:8],
)
async def test_garbage_ends_that_client_only(environment: dict[str, str], data: bytes, problem: str) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path) as other:
        for hello in (True, False):
            async with RawClient.connect(server.path, hello=hello) as client:
                client.send(data)
                assert problem in await client.refused()
        assert (await other.ask(request(1, "status")))["ok"] is True


async def test_half_a_line_ends_that_client_only(environment: dict[str, str]) -> None:
    async with session(BlockingApp(), environment) as server, RawClient.connect(server.path) as other:
        async with RawClient.connect(server.path) as client:
            client.send(b'{"id": 1, "met')
            client.writer.write_eof()
            assert await client.refused() == "the stream ends within a line, after 14 bytes"
        async with RawClient.connect(server.path) as client:
            client.send(b'{"id": 1, "met')
        assert (await other.ask(request(1, "status")))["ok"] is True


async def test_the_id_of_a_pending_request(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path) as client:
        client.send(request(1, "detach", device="x"))
        await app.until(begun=1)
        client.send(request(1, "status"))
        assert await client.refused() == "id: 1 is that of a pending request"


async def test_a_client_that_ends_its_input_gets_its_replies(environment: dict[str, str]) -> None:
    """As with ``printf ... | nc -U``."""
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path) as client:
        client.send(*(request(number, "detach", device="x") for number in range(40)))
        client.writer.write_eof()
        app.go.set()
        assert [(await client.next())["id"] for _ in range(40)] == list(range(40))
        assert await client.line() == b""


async def test_a_request_is_carried_out_without_its_client(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with session(app, environment) as server:
        async with RawClient.connect(server.path) as client:
            client.send(request(1, "detach", device="x"))
            await app.until(begun=1)
        async with RawClient.connect(server.path) as client:
            assert (await client.ask(request(1, "status")))["ok"] is True
        app.go.set()
        await app.until(done=1)


async def test_a_client_with_many_pending_requests_waits_and_the_others_do_not(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with (
        session(app, environment) as server,
        RawClient.connect(server.path) as greedy,
        RawClient.connect(server.path) as other,
    ):
        greedy.send(*(request(number, "detach", device=str(number)) for number in range(100)))
        await app.until(begun=MAX_PENDING)
        for number in range(50):
            assert (await other.ask(request(number, "status")))["ok"] is True
        assert len(app.begun) == MAX_PENDING
        app.go.set()
        assert {(await greedy.next())["result"] for _ in range(100)} == {str(number) for number in range(100)}


# Events -----------------------------------------------------------------------------------------------------------


async def test_a_subscription_has_no_gap_and_no_duplicate(environment: dict[str, str]) -> None:
    app = BlockingApp()
    app.note("before")
    async with session(app, environment) as server, RawClient.connect(server.path) as client:
        app.note("also before")

        async def publish() -> None:
            for number in range(300):
                app.note(str(number))
                await asyncio.sleep(0)

        publishing = asyncio.ensure_future(publish())
        await asyncio.sleep(0)
        reply = await client.ask(request(1, "subscribe"))
        assert reply["result"]["subscribed"] == sorted(EVENTS)
        first = reply["result"]["snapshot"]["last_event"] + 1
        assert 3 <= first < 302
        for id in range(first, 303):
            event = await client.next()
            assert event["event"] == "note"
            assert event["data"]["id"] == id
            assert set(event["data"]) == {"id", "time", "level", "message"}
        await publishing


async def test_events_by_name(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path) as client:
        app.note("nothing is sent without a subscription")
        reply = await client.ask(request(1, "subscribe", events=["note", "no-such-event"]))
        assert reply["result"]["subscribed"] == ["note"]
        app.events.publish("drive", "x")
        app.note("a")
        assert (await client.next())["data"]["message"] == "a"
        assert (await client.ask(request(2, "subscribe", events=["drive"])))["result"]["subscribed"] == [
            "drive",
            "note",
        ]
        app.events.publish("drive", "x")
        assert (await client.next())["event"] == "drive"
        removed = await client.ask(request(3, "unsubscribe", events=["note", "figures"]))
        assert removed["result"] == {"unsubscribed": ["note"]}
        app.note("b")
        app.events.publish("drive", "y")
        assert (await client.next())["data"]["message"] == "y"
        assert (await client.ask(request(4, "unsubscribe")))["result"] == {"unsubscribed": ["drive"]}
        app.events.publish("drive", "z")
        assert (await client.ask(request(5, "status")))["id"] == 5


async def test_a_slow_client_loses_events_and_no_other_client_waits(environment: dict[str, str]) -> None:
    app = BlockingApp()
    count = 20_000
    async with (
        session(app, environment) as server,
        RawClient.connect(server.path) as slow,
        RawClient.connect(server.path) as other,
    ):
        slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
        slow.send(request(1, "subscribe"))
        await other.ask(request(1, "subscribe", events=["note"]))
        for number in range(count):
            app.note(f"{number:0100}")
            if number % 200 == 199:
                assert [(await other.next())["data"]["id"] for _ in range(200)] == list(range(number - 198, number + 2))
                assert (await other.ask(request(number, "status")))["ok"] is True
        (client,) = (one for one in server._clients if one._output)
        assert client._event_count == len(client._output) <= MAX_EVENTS
        assert client._event_bytes == sum(len(line.data) for line in client._output) <= server_module.MAX_EVENT_BYTES
        slow.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert (await slow.next())["id"] == 1
        ids: list[int] = []
        dropped: list[tuple[int, int]] = []
        while not ids or ids[-1] != count:
            message = await slow.next()
            if message["event"] == "dropped":
                dropped.append((len(ids), message["data"]["count"]))
                last_dropped = message["data"]["id"]
            else:
                ids.append(message["data"]["id"])
        ((at, lost),) = dropped
        assert ids == [*range(1, at + 1), *range(at + lost + 1, count + 1)]
        assert last_dropped == at + lost
        assert (client._event_count, client._event_bytes) == (0, 0)


async def test_events_that_wait_are_bounded_in_bytes(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path) as slow:
        slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
        slow.send(request(1, "subscribe"))
        while not any(client.events for client in server._clients):
            await asyncio.sleep(0)
        (client,) = server._clients
        for _ in range(60):
            app.note("x" * 100_000)
        app.note("y" * MAX_LINE)  # too long for a line: it counts as dropped
        assert 0 < client._event_bytes <= server_module.MAX_EVENT_BYTES
        slow.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert (await slow.next())["id"] == 1
        got = lost = 0
        while got + lost < 61:
            message = await slow.next()
            if message["event"] == "dropped":
                lost += message["data"]["count"]
            else:
                got += 1
        assert got < 30
        app.note("z" * MAX_LINE)
        assert await slow.next() == {"event": "dropped", "data": {"id": 62, "count": 1}}


async def test_replies_are_not_lost_and_a_client_that_reads_none_gets_no_further(environment: dict[str, str]) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path) as other:
        async with RawClient.connect(server.path) as client:
            client.send(*(request(number, "insert", path="x" * 900) for number in range(60)))
            replies = [await client.next() for _ in range(60)]
            assert [reply["id"] for reply in replies] == list(range(60))
            assert {len(reply["result"]) for reply in replies} == {900_000}
        async with RawClient.connect(server.path) as client:
            client.reader._transport.pause_reading()  # type: ignore[attr-defined]
            client.send(*(request(number, "insert", path="x" * 900) for number in range(600)))
            while not (found := [one for one in server._clients if one._pending]):
                await asyncio.sleep(0)
            slow = found[0]
            while len(slow._pending) < MAX_PENDING or len(slow._output) < MAX_PENDING:
                await asyncio.sleep(0)
            for number in range(50):
                assert (await other.ask(request(number, "status")))["ok"] is True
            assert len(slow._pending) == len(slow._output) == MAX_PENDING
            client.reader._transport.resume_reading()  # type: ignore[attr-defined]
            assert [(await client.next())["id"] for _ in range(600)] == list(range(600))


async def test_a_client_that_is_killed_while_events_come(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path) as other:
        async with RawClient.connect(server.path) as client:
            await client.ask(request(1, "subscribe"))
        await asyncio.sleep(0)  # the client closes its end; the session has not noticed
        assert len(server._clients) == 2
        for _ in range(100):
            app.note("x")
        while len(server._clients) > 1:
            await asyncio.sleep(0)
        assert (await other.ask(request(1, "status")))["ok"] is True
    assert caplog.records == []


async def test_too_many_clients(environment: dict[str, str]) -> None:
    async with session(BlockingApp(), environment) as server:
        clients = [RawClient.connect(server.path) for _ in range(MAX_CLIENTS)]
        connected = [await client.__aenter__() for client in clients]
        async with RawClient.connect(server.path, hello=False) as one_more:
            refused = await one_more.next()
            assert (refused["id"], refused["error"]["code"]) == (None, "busy")
            assert await one_more.line() == b""
        assert (await connected[0].ask(request(1, "status")))["ok"] is True
        await clients.pop().__aexit__(None, None, None)
        while len(server._clients) == MAX_CLIENTS:
            await asyncio.sleep(0)
        async with RawClient.connect(server.path):
            pass
        for client in clients:
            await client.__aexit__(None, None, None)


# The end ----------------------------------------------------------------------------------------------------------


async def test_the_end_of_a_session(environment: dict[str, str], folder: Path) -> None:
    app = BlockingApp()
    async with session(app, environment) as server:
        async with RawClient.connect(server.path) as watching, RawClient.connect(server.path) as calling:
            await watching.ask(request(1, "subscribe"))
            calling.send(request(1, "detach", device="x"))
            await app.until(begun=1)
            assert (await watching.ask(request(2, "quit"))) == {"id": 2, "ok": True, "result": None}
            assert app.done == ["quit"]
            app.note("the last one")
            await server.close()
            assert (await watching.next())["data"]["message"] == "the last one"
            assert await watching.next() == {"event": "session-ended", "data": {}}
            assert await watching.line() == b""
            reply = await calling.next()
            assert (reply["id"], reply["error"]["code"], reply["error"]["exit_code"]) == (1, "session-gone", 9)
            assert await calling.line() == b""
        assert os.listdir(folder) == []


async def test_a_client_that_reads_nothing_does_not_stop_the_end(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CLOSE_TIMEOUT", 0.05)
    app = BlockingApp()
    async with session(app, environment) as server, RawClient.connect(server.path) as slow:
        slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
        slow.send(request(1, "subscribe"))
        while not any(client.events for client in server._clients):
            await asyncio.sleep(0)
        for _ in range(5000):
            app.note("x" * 1000)
        await server.close()
        assert not server._clients


async def test_no_descriptor_is_left_after_500_connects(environment: dict[str, str]) -> None:
    app = BlockingApp()
    app.go.set()
    async with session(app, environment) as server:
        before = len(descriptors())
        for number in range(500):
            async with RawClient.connect(server.path, hello=number % 2 == 0) as client:
                match number % 5:
                    case 0:
                        await client.ask(request(1, "subscribe"))
                    case 1:
                        client.send(b"garbage\n")
                    case 2:
                        client.send(request(1, "detach", device="x"))
                    case 3:
                        client.send(b'{"id": 1')
            app.note("x")
        while server._clients or server._requests:
            await asyncio.sleep(0)
        gc.collect()
        await comes(lambda: len(descriptors()) <= before)


# Who may connect --------------------------------------------------------------------------------------------------


async def test_only_the_user_may_open_the_socket(environment: dict[str, str], folder: Path) -> None:
    async with session(BlockingApp(), environment) as server:
        found = server.path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, os.geteuid())
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


FOREIGN = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
client = socket.socket(socket.AF_UNIX)
client.settimeout(100)
client.connect(sys.argv[1])
try:
    client.sendall(b'{"id": 1, "method": "hello", "params": {"protocol_version": "1.0"}}\\n')
    data = client.recv(1000)
except OSError as error:
    data = b""
print(len(data))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a process of another user")
async def test_a_foreign_user_gets_nothing() -> None:
    """The modes of the folder and the socket keep other users out; here they do not, and the server still does."""
    app = BlockingApp()
    directory = Path(f"/tmp/farplug-test-{os.getpid()}")  # tmp_path is below folders that other users cannot enter
    directory.mkdir(mode=0o700)
    try:
        async with session(app, {"XDG_RUNTIME_DIR": str(directory)}) as server:
            path = server.path
            for reachable, mode in ((directory, 0o755), (path.parent, 0o755), (path, 0o666)):
                reachable.chmod(mode)
            foreign = await asyncio.create_subprocess_exec(sys.executable, "-c", FOREIGN, path, stdout=subprocess.PIPE)
            output, _ = await foreign.communicate()
            assert (foreign.returncode, output) == (0, b"0\n")
            async with RawClient.connect(path) as client:
                assert (await client.ask(request(1, "status")))["ok"] is True
            path.parent.chmod(0o700)
    finally:
        subprocess.run(["rm", "-rf", directory], check=True)


async def test_the_user_of_a_peer() -> None:
    here, there = socket.socketpair(socket.AF_UNIX)
    with here, there:
        assert server_module._peer_uid(here) == os.geteuid()
