"""The MCP server below the page: the SDK's client over HTTP, who may use it, and a person who takes over."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextContent
from playwright.async_api import async_playwright, expect
from tests.control.test_screens import HEIGHT, WIDTH, Console, console
from tests.guest.firmware import lacking
from tests.page.conftest import CHROMIUM, SHELL
from tests.web.support import Answer, Served

from farplug.agents.audit import Audit
from farplug.agents.http import http_app
from farplug.agents.machine import Machine
from farplug.agents.policy import Policy
from farplug.agents.server import AgentServer
from farplug.web.server import MCP, Page, PageSettings

INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
}
FIELDS = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}


@asynccontextmanager
async def page(environment: dict[str, str], one: Console) -> AsyncIterator[Served]:
    server = AgentServer(Machine(one.server.path, "an agent"), Policy(), Audit(None))
    settings = PageSettings(one.server.path.stem, view_only=True)
    async with asyncio.timeout(60), Page.serve(settings, environment, http_app(server, MCP)) as served:
        yield Served(served, served.port, Path(environment["XDG_RUNTIME_DIR"]) / "farplug")


@asynccontextmanager
async def agent(served: Served, mode: str = "auto") -> AsyncIterator[Client]:
    assert served.page.mcp_url is not None
    headers = {"Authorization": f"Bearer {served.page.tokens.agent}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60, trust_env=False) as http,
        Client(streamable_http_client(served.page.mcp_url, http_client=http), mode=mode) as client,
    ):
        yield client


async def text(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    return "\n".join(one.text for one in result.content if isinstance(one, TextContent))


async def initialize(served: Served, token: str | None, fields: Mapping[str, str] | None = None) -> Answer:
    return await served.http("POST", "/mcp", {**FIELDS, **(fields or {})}, json.dumps(INITIALIZE).encode(), token=token)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_over_http(environment: dict[str, str], mode: str) -> None:
    async with console(environment) as one, page(environment, one) as served, agent(served, mode) as client:
        assert await text(client, "screenshot") == f"look 1: {WIDTH}x{HEIGHT} pixels"
        assert await text(client, "key", text="Return") == "pressed Return"
        async with agent(served, mode) as other:
            assert await text(other, "key", text="a") == "pressed a"
        assert await text(client, "key", text="a") == "pressed a", "the other one left"


async def test_a_person_sees_each_act_and_takes_over(environment: dict[str, str]) -> None:
    async with console(environment) as one, page(environment, one) as served, served.browser() as browser:
        await browser.call("open", {"session": served.page._site.session})
        await browser.call("subscribe", {"events": ["input"]})
        await browser.call("watch-screen")
        async with agent(served) as client:
            assert await text(client, "type", text="ls") != ""
            holder = None
            while holder is None:
                holder = (await browser.event("driving"))[0]["holder"]
            assert holder == {"name": "an agent", "you": False}
            act = (await browser.event("input"))[0]
            assert (act["action"], act["text"]) == ("type", "ls")
            typing = asyncio.ensure_future(text(client, "type", text="x" * 500))
            await one.inputs.until(len(one.inputs.received) + 3)
            await browser.call("drive", {"take": True, "client": "Mia"})
            assert (await typing).startswith("Mia holds the keyboard and the mouse of the VM: nothing more was done")
            assert "[not-driving]" in await text(client, "key", text="a")
            assert (await text(client, "screenshot")).startswith("look 1"), "it can look"


async def test_a_person_takes_over_with_one_click(environment: dict[str, str]) -> None:
    """See in Chromium what an agent does, who drives, and take the keyboard from it in the middle of a text."""
    program = shutil.which(SHELL) or shutil.which(CHROMIUM)
    if program is None:
        lacking("chromium is not installed")
    async with (
        console(environment, mice=2) as one,
        page(environment, one) as served,
        agent(served) as client,
        async_playwright() as playwright,
    ):
        await text(client, "screenshot")
        assert await text(client, "key", text="ctrl+alt+Delete") == "pressed ctrl+alt+Delete"
        browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        shown = await browser.new_page()
        await shown.goto(served.page.url)
        await expect(shown.locator(".driver")).to_contain_text("an agent drives")
        await shown.get_by_role("tab", name="Messages").click()
        log = shown.get_by_role("log")
        assert await text(client, "type", text="ls /root") != ""
        await expect(log).to_contain_text("an agent typed 8 characters: ls /root")
        await text(client, "key", text="Return")
        await expect(log).to_contain_text("an agent pressed Return")
        await text(client, "left_click", coordinate=[10, 20])
        await expect(log).to_contain_text("an agent clicked with the left button")
        typing = asyncio.ensure_future(text(client, "type", text="x" * 2000))
        await one.inputs.until(len(one.inputs.received) + 3)
        await shown.get_by_role("button", name="Take over").click()
        await expect(shown.locator(".driver")).to_contain_text("You drive")
        for refused in (await typing, await text(client, "key", text="a"), await text(client, "left_click")):
            assert "holds the keyboard and the mouse of the VM: nothing more was done" in refused
            assert "a person took over" in refused
        await browser.close()


async def test_who_may_use_it(environment: dict[str, str]) -> None:
    async with console(environment) as one, page(environment, one) as served:
        tokens = served.page.tokens
        assert tokens.agent is not None
        assert (await initialize(served, tokens.agent)).status == 200
        assert (await initialize(served, tokens.agent, {"Origin": served.origin})).status == 200
        for token in (tokens.full, tokens.view):
            assert (await initialize(served, token)).status == 403, "the tokens of people"
        for token in (None, "x", tokens.agent[:-1]):
            answer = await initialize(served, token)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "bearer")
        for fields in ({"Host": f"evil.example:{served.port}"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
            assert (await initialize(served, tokens.agent, fields)).status == 403
        answer = await served.http("POST", "/mcp", {**FIELDS, "Content-Length": str(2 << 20)}, token=tokens.agent)
        assert answer.status == 413
        for method in ("GET", "DELETE", "PUT"):
            assert (await served.http(method, "/mcp", FIELDS, token=tokens.agent)).status in (400, 405, 406)
        # The token for agents opens nothing else.
        assert (await served.http("GET", "/screenshot.png?session=web1", token=tokens.agent)).status == 403
        assert (await served.http("PUT", "/media/a.iso", body=b"x", token=tokens.agent)).status == 403
        async with served.websocket() as browser:
            await browser.send("hello", {"protocol_version": "1.1", "token": tokens.agent})
            assert await browser.closed() == 4401


async def test_a_page_without_agents(environment: dict[str, str]) -> None:
    async with Served.serve(environment) as served:
        assert served.page.mcp_url is None
        assert (await initialize(served, served.page.tokens.full)).status == 404
