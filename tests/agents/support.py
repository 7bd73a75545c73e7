"""A VM with a screen in this process, and a client of an MCP server of it."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mcp import Client
from mcp_types import ImageContent, TextContent
from tests.control.test_screens import Console, console

from farplug.agents.audit import Audit
from farplug.agents.machine import Machine
from farplug.agents.policy import Policy
from farplug.agents.server import AgentServer

__all__ = ["Agent", "agent", "console"]


class Agent:
    """An agent: it calls tools."""

    def __init__(self, client: Client, server: AgentServer) -> None:
        self.client = client
        self.server = server

    async def call(self, tool: str, /, **arguments: Any) -> tuple[str, bytes | None]:
        """Return the text and the image of a result, of a call that succeeds."""
        result = await self.client.call_tool(tool, arguments)
        assert not result.is_error, result.content
        text = "\n".join(one.text for one in result.content if isinstance(one, TextContent))
        images = [one.data for one in result.content if isinstance(one, ImageContent)]
        assert len(images) <= 1
        return text, base64.b64decode(images[0]) if images else None

    async def text(self, tool: str, /, **arguments: Any) -> str:
        return (await self.call(tool, **arguments))[0]

    async def json(self, tool: str, /, **arguments: Any) -> Any:
        return json.loads(await self.text(tool, **arguments))

    async def refused(self, tool: str, /, **arguments: Any) -> str:
        """Return the text of an error."""
        result = await self.client.call_tool(tool, arguments)
        assert result.is_error, (tool, arguments, result.content)
        (one,) = result.content
        assert isinstance(one, TextContent)
        return one.text


@asynccontextmanager
async def agent(
    one: Console | Path,
    policy: Policy | None = None,
    *,
    audit: Path | None = None,
    mode: str = "auto",
    answer: Callable[..., Any] | None = None,
) -> AsyncIterator[Agent]:
    """Run an MCP server of a VM, and a client of it."""
    path = one if isinstance(one, Path) else one.server.path
    with Audit(audit) as records:
        server = AgentServer(Machine(path, "the agent"), policy or Policy(), records)
        async with Client(server, mode=mode, elicitation_callback=answer) as client:
            yield Agent(client, server)
