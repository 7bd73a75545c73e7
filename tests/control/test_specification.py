"""``docs/control.md`` is true: its transcript, its tables, its client."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.app.test_run import ISO, vm
from tests.cli.support import blank
from tests.control.support import RawClient
from tests.docs import ROOT, snippets

from farplug.app import client, codec, seat, watch
from farplug.app.app import App
from farplug.app.commands import CLIENT_COMMANDS, COMMANDS
from farplug.app.settings import DeviceRules, GuestSettings, Source, SourceKind, StorageSettings, TargetSettings
from farplug.control import messages, names, server
from farplug.control.messages import Hello
from farplug.control.methods import METHODS
from farplug.control.server import Server
from farplug.store import remote

PAGE = ROOT / "docs/control.md"


def _section(title: str) -> str:
    return PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _transcript() -> list[str]:
    (block,) = re.findall(r"^```text\n(C: .*?)^```", _section("A transcript"), re.MULTILINE | re.DOTALL)
    return list(block.splitlines())


VOLATILE = ("time", "pid", "started", "farplug_version", "last_event", "serial_number", "state")


def _comparable(data: Any, *, event: bool = False) -> Any:
    """Return a message without what differs from run to run; the ids of events, but not those of guests, do."""
    if isinstance(data, dict):
        skipped = (*VOLATILE, "id") if event else VOLATILE
        return {key: _comparable(value, event=key == "data") for key, value in data.items() if key not in skipped}
    return [_comparable(item) for item in data] if isinstance(data, list) else data


def _parsed(line: str) -> Any:
    return _comparable(json.loads(line.removeprefix("S: "))) if line.startswith("S: {") else line


async def test_the_transcript(environment: dict[str, str], tmp_path: Path) -> None:
    """The client's lines of the page get the session's lines of the page. Events and replies are independent."""
    blank(tmp_path / "a.raw")
    for name in ("a.iso", "b.iso"):
        (tmp_path / name).write_bytes(ISO)
    turns: list[tuple[str, list[str]]] = []
    for line in _transcript():
        if line.startswith("C: "):
            turns.append((line.removeprefix("C: "), []))
        else:
            turns[-1][1].append(line)
    ending: list[asyncio.Task[None]] = []
    app = App(quit=lambda: ending.append(asyncio.ensure_future(serving.close())))
    actual: list[str] = []
    wrong: list[tuple[Any, Any]] = []
    async with asyncio.timeout(60), vm(2) as one:
        await app.connect(GuestSettings(TargetSettings(one.target)))
        serving = Server(app, names.reserve("web1", environment=environment), target=one.target)
        await serving.start()
        async with RawClient.connect(serving.path, hello=False) as raw:
            for sent, expected in turns:
                raw.send(sent.replace("/home/me", str(tmp_path)).encode() + b"\n")
                received = []
                for _ in expected:
                    line = (await raw.line()).decode().strip().replace(str(tmp_path), "/home/me")
                    line = line.replace(one.target, "spice://vmhost:5900")
                    received.append(f"S: {line}" if line else "S: (end of the connection)")
                documented = [_parsed(line) for line in expected]
                received.sort(key=lambda line: documented.index(_parsed(line)) if _parsed(line) in documented else -1)
                actual += ["C: " + sent, *received]
                wrong += [pair for pair in zip(map(_parsed, received), documented, strict=True) if pair[0] != pair[1]]
        await asyncio.gather(*ending)
        await app.close()
    assert wrong == [], "the session sent:\n" + "\n".join(actual)


def test_every_method_and_parameter_is_documented() -> None:
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert list(sections) == list(METHODS)
    kinds: dict[str, Any] = {
        **COMMANDS,
        **CLIENT_COMMANDS,
        "hello": server._HelloParams,
        "subscribe": server._SubscribeParams,
        "unsubscribe": server._SubscribeParams,
    }
    for method, kind in kinds.items():
        parameters = re.findall(r"^\| `(\w+)` \|", sections[method], re.MULTILINE)
        assert set(parameters) == {field.name for field in dataclasses.fields(kind)}, method
    for field in dataclasses.fields(Hello):
        assert f"`{field.name}`" in sections["hello"]
    for field in (kind for one in (Source, StorageSettings, DeviceRules) for kind in dataclasses.fields(one)):
        assert f"`{field.name}`" in sections["attach"], field.name
    assert all(f"`{kind}`" in sections["attach"] for kind in SourceKind)


def test_the_limits_are_documented() -> None:
    limits = _section("Limits")
    for limit in (
        messages.MAX_LINE,
        server.MAX_PENDING,
        server.MAX_EVENTS,
        server.MAX_EVENT_BYTES,
        server.MAX_CLIENTS,
        messages.MAX_PAYLOAD,
        messages.MAX_CLIENT_PAYLOAD,
        client.MAX_WATCHES,
        seat.MAX_HELD,
        client.MAX_OFFERS,
        remote.MAX_ASKED,
        remote.CHUNK * remote.CACHE_CHUNKS,
        seat.MAX_WHEEL,
        codec.MAX_STRING,
        codec.MAX_ITEMS,
    ):
        assert re.search(rf"\b{limit}\b", limits), limit
    assert f"{server.CLOSE_TIMEOUT:.0f} seconds" in limits.replace("\n", " ")
    assert f"at most {messages.MAX_ID} characters" in _section("Messages")
    assert f"1 to {names.MAX_NAME} of the characters" in _section("Names and files")
    assert f"{names.MAX_PATH} bytes" in _section("Names and files").replace("\n", " ")
    assert f"version {messages.PROTOCOL_VERSION}." in PAGE.read_text()
    of_connections = {"dropped", "session-ended", *messages.CLIENT_EVENTS}
    assert of_connections == set(re.findall(r"^\| `([\w-]+)` \|", _section("Events"), re.MULTILINE))
    assert f"at most {watch.MAX_UNACKNOWLEDGED} events `screen`" in PAGE.read_text()
    page = PAGE.read_text()
    assert f"at most {client.MAX_OFFERS} files" in page
    assert f"not\nwithin {remote.TIMEOUT:.0f} seconds" in page
    assert f"in the {remote.FAILURE_TIME:.0f} seconds after" in page
    assert f"{remote.SLICES} equal parts" in page
    assert f"asks for {remote.CHUNK} bytes at a time, with at most {remote.MAX_ASKED} questions" in page
    assert f"in {watch.FRAME_INTERVAL * 1000:.0f} ms" in _section("Events")


async def test_the_client_of_the_page(environment: dict[str, str], tmp_path: Path) -> None:
    """It needs nothing but Python."""
    blank(tmp_path / "a.raw")
    (program,) = (snippet.text for snippet in snippets(PAGE) if snippet.language == "python")
    assert "farplug" not in re.findall(r"import (\S+)", program)
    app = App()
    async with asyncio.timeout(60), vm(1) as one:
        await app.connect(GuestSettings(TargetSettings(one.target)))
        serving = Server(app, names.reserve("web1", environment=environment), target=one.target)
        await serving.start()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-c", program, "a.raw", env=environment, cwd=tmp_path, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        printed = b""
        while b"'label': 'a.raw'" not in printed:  # the reply
            line = await process.stdout.readline()
            assert line, printed
            printed += line
        await app.close()
        await serving.close()
        printed += await process.stdout.read()
        assert await process.wait() == 0
    for text in (
        b"'server_name': 'farplug'",
        b"'snapshot'",
        b"'label': 'a.raw'",
        b"'guest-removed'",
        b"'session-ended'",
    ):
        assert text in printed
