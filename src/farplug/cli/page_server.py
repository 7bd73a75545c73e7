"""Run ``farplug page``: the web server, and the session of its target."""

from __future__ import annotations

import asyncio
import html
import webbrowser
from contextlib import AsyncExitStack, suppress
from json import dumps
from pathlib import Path

import typer

from farplug.cli import log
from farplug.cli.agent_options import AgentOptions
from farplug.cli.joining import own_session
from farplug.cli.memory import collect_garbage
from farplug.cli.page import PageOptions
from farplug.cli.session import SIGNALS
from farplug.cli.session_client import run as run_client
from farplug.control.client import Client
from farplug.control.names import open_session
from farplug.errors import FarplugError
from farplug.web.server import MCP, Agents, Page, PageSettings


def run(options: PageOptions, *, debug: bool) -> None:
    """Serve the page until a signal comes, or the session that was started for it ends.

    Raises:
        FarplugError: the page or the session cannot be started.
    """
    if options.target is None:
        run_client(_serve(options, options.session, own=False))
        return
    with own_session(options.target, "the page", debug=debug) as name:
        run_client(_serve(options, name, own=True))


async def _serve(options: PageOptions, name: str | None, *, own: bool) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        with suppress(NotImplementedError):  # on Windows
            loop.add_signal_handler(number, ended.set)
    settings = PageSettings(
        name,
        options.address,
        options.port,
        options.web_root,
        options.upload_quota,
        options.view_only,
        options.certificate,
        options.key,
    )
    if name is not None:
        async with open_session(name):
            pass  # it runs
    beside: list[asyncio.Future[None]] = [asyncio.ensure_future(collect_garbage())]
    if own and name is not None:
        beside.append(asyncio.ensure_future(_follow(name, ended)))
    try:
        async with AsyncExitStack() as stack:
            agents = None
            if options.agents is not None:
                assert name is not None
                agents = _agents(options.agents, name, stack)
            page = await stack.enter_async_context(Page.serve(settings, agents=agents))
            _show(page, options, name)
            if options.open:
                await asyncio.to_thread(_open, page)
            await ended.wait()
    finally:
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)


def _agents(options: AgentOptions, name: str, stack: AsyncExitStack) -> Agents:
    """Return the MCP server of a session, which records until the stack ends."""
    from farplug.agents.audit import Audit
    from farplug.agents.machine import Machine
    from farplug.cli.mcp_server import CLIENT_NAME, check_sdk, policy_of
    from farplug.control.names import socket_path

    check_sdk("farplug page --mcp")
    from farplug.agents.http import http_app
    from farplug.agents.server import AgentServer

    audit = stack.enter_context(Audit(options.audit))
    return http_app(AgentServer(Machine(socket_path(name), CLIENT_NAME), policy_of(options), audit), MCP)


async def _follow(name: str, ended: asyncio.Event) -> None:
    """Wait until a session ends."""
    try:
        async with open_session(name) as client:
            await _until_end(client)
    except FarplugError:
        pass  # it has ended
    ended.set()


async def _until_end(client: Client) -> None:
    async for _ in client.subscribe([]):
        pass


def _show(page: Page, options: PageOptions, name: str | None) -> None:
    if options.json:
        links = {"url": page.url, "view_url": page.view_url, "port": page.port, "session": name}
        typer.echo(dumps({**links, "mcp_url": page.mcp_url, "mcp_token": page.tokens.agent}))
        return
    typer.echo(page.url)
    if page.view_url is not None:
        typer.echo(f"to watch only: {page.view_url}")
    if page.mcp_url is not None:
        typer.echo(f"for agents: {page.mcp_url}\n  with the header Authorization: Bearer {page.tokens.agent}")


def _open(page: Page) -> None:
    """Show the page in the browser.

    Other users can read the arguments of the browser's process, so these name a file with the link, not the link.
    """
    path = Path(page.private) / "open.html"
    link = html.escape(page.url)
    path.write_text(f'<!doctype html><meta http-equiv="refresh" content="0; url={link}"><a href="{link}">farplug</a>')
    path.chmod(0o600)
    try:
        started = webbrowser.open(path.as_uri())
    except webbrowser.Error:
        started = False
    if not started:
        log.say("farplug: warning: no browser could be started: copy the link into one")
