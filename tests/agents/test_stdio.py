"""``farplug mcp`` as an agent's program starts it: a process with a pipe on each side."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.shared.message import SessionMessage
from mcp_types import INVALID_REQUEST, ImageContent, JSONRPCRequest, TextContent
from tests.agents.support import console
from tests.cli.sessions import vm
from tests.cli.support import Cli
from tests.control.test_screens import HEIGHT, WIDTH
from tests.docs import ROOT

from farplug.agents.stdio import MAX_REQUESTS, _Requests
from farplug.cli.mcp_server import MAX_MESSAGE

COMMAND = (sys.executable, "-c", "from farplug.cli.script import main; main()", "mcp")
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
}


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_over_stdio(environment: dict[str, str], tmp_path: Path, mode: str) -> None:
    audit = tmp_path / "audit"
    async with console(environment) as one:
        parameters = StdioServerParameters(
            command=COMMAND[0],
            args=[*COMMAND[1:], one.server.path.stem, "--audit", str(audit)],
            env={**os.environ, **environment},
        )
        async with Client(stdio_client(parameters), mode=mode) as client:
            result = await client.call_tool("screenshot", {})
            text, image = result.content
            assert isinstance(text, TextContent)
            assert isinstance(image, ImageContent)
            assert text.text == f"look 1: {WIDTH}x{HEIGHT} pixels"
            assert not (await client.call_tool("key", {"text": "Return"})).is_error
            assert one.inputs.received == [(104, "1c9c")]
            refused = await client.call_tool("key", {"text": "Return", "times": 3})
            assert refused.is_error
    records = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [record.get("tool") for record in records] == ["screenshot", None, "key", None, "key", None]
    assert (records[4]["arguments"]["times"], records[5]["outcome"]) == (3, "refused")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_server_in_order(environment: dict[str, str], number: signal.Signals) -> None:
    async with console(environment) as one:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            one.server.path.stem,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **environment},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(INITIALIZE).encode() + b"\n")
        reply = json.loads(await process.stdout.readline())
        assert reply["result"]["serverInfo"]["name"] == "farplug"
        process.send_signal(number)
        out, err = await process.communicate()
        assert (process.returncode, out, err) == (0, b"", b"")


async def test_requests_at_a_time_have_a_bound(environment: dict[str, str]) -> None:
    async with console(environment) as one:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            one.server.path.stem,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **environment},
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def send(method: str, params: Mapping[str, object], **id: object) -> None:
            assert process.stdin is not None
            process.stdin.write(
                json.dumps({"jsonrpc": "2.0", "method": method, "params": params, **id}).encode() + b"\n"
            )

        async def answer(id: object) -> dict[str, Any]:
            assert process.stdout is not None
            reply: dict[str, Any] = json.loads(await process.stdout.readline())
            assert reply["id"] == id
            return reply

        wait = {"name": "wait", "arguments": {"duration": 100}}
        process.stdin.write(json.dumps(INITIALIZE).encode() + b"\n")
        await answer(1)
        for number in range(MAX_REQUESTS):
            send("tools/call", wait, id=number)
        send("ping", {}, id="more")
        error = (await answer("more"))["error"]
        assert error["code"] == INVALID_REQUEST
        assert error["message"] == f"{MAX_REQUESTS} requests are pending: wait for their answers, or cancel some"
        send("tools/call", wait, id=7)
        assert (await answer(7))["error"]["message"] == "a request with this id is pending"
        send("notifications/cancelled", {"requestId": 8})
        send("ping", {}, id="more")
        assert (await answer("more"))["result"] == {}
        send("ping", {}, id="more")
        assert (await answer("more"))["result"] == {}
        process.stdin.close()
        await process.communicate()
        assert process.returncode == 0


async def test_nothing_is_read_while_the_client_reads_no_answers() -> None:
    class Full:
        sending = asyncio.Event()

        async def send(self, item: SessionMessage) -> None:
            self.sending.set()
            await asyncio.Event().wait()

    read = 0

    async def messages() -> AsyncIterator[SessionMessage]:
        nonlocal read
        while True:
            read += 1
            yield SessionMessage(JSONRPCRequest(jsonrpc="2.0", id=read, method="ping"))

    async def follow() -> None:
        async for _ in _Requests(messages(), full, set()):
            pass

    full = Full()
    following = asyncio.ensure_future(follow())
    await full.sending.wait()
    assert read == MAX_REQUESTS + 1
    following.cancel()


def test_a_message_that_is_too_long_ends_the_server(environment: dict[str, str]) -> None:
    with vm() as target:
        lines = [json.dumps(INITIALIZE), '{"jsonrpc": "2.0", "method": "' + "x" * (MAX_MESSAGE + (1 << 20))]
        run = subprocess.run(
            [*COMMAND, target],
            input="\n".join(lines),
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
    assert run.returncode == 10
    assert "farplug: the agent's program sent a message of more than 4 MiB\n" in run.stderr


def test_the_session_of_a_target_ends_with_the_server(environment: dict[str, str]) -> None:
    with vm() as target:
        run = subprocess.run(
            [*COMMAND, target],
            input=json.dumps(INITIALIZE) + "\n",
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
        )
    assert run.returncode == 0
    (reply,) = map(json.loads, run.stdout.splitlines())
    assert reply["result"]["instructions"]
    assert f"note: connected to {target} as the session testvm, which ends with the server\n" in run.stderr
    assert "the session testvm has ended" in run.stderr


def refused(environment: dict[str, str], *arguments: object, code: str = COMMAND[2]) -> tuple[int, str]:
    """Return the exit code and standard error of a server that does not start."""
    run = subprocess.run(
        [sys.executable, "-c", code, "mcp", *map(str, arguments)],
        input="",
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )
    assert run.stdout == ""
    return run.returncode, run.stderr


def test_options_that_contradict_each_other(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cli = Cli(capfd)
    for options, message in (
        (["web", "--read-only", "--allow", tmp_path], "--read-only and --allow contradict each other"),
        (["web", "--allow-write"], "--allow-write has no effect without --allow"),
        (["web", "--proxy", "http://x"], "--proxy has no effect without a TARGET"),
        (["web", "--allow", tmp_path / "none"], "no such file or directory"),
        ([], "no session is running"),
    ):
        result = cli("mcp", *options)
        assert (result.code, result.out) == (2, "")
        assert message in result.err


def test_a_session_that_is_not_running(environment: dict[str, str]) -> None:
    number, error = refused(environment, "web")
    assert number == 2
    assert "the session web is not running" in error


def test_the_extra_is_missing(environment: dict[str, str]) -> None:
    code = "import sys; sys.modules['mcp'] = None; " + COMMAND[2]
    number, error = refused(environment, "web", code=code)
    assert number == 11
    assert "farplug mcp needs the Python package mcp, version 2.3 or later" in error
    assert "pip install 'farplug[mcp]'" in error
