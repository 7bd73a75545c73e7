"""Run ``farplug mcp``: the MCP server, and the session of its target."""

from __future__ import annotations

import asyncio
import logging
import os
import select
from contextlib import suppress
from threading import Thread
from typing import Final

from farplug.agents.audit import Audit
from farplug.agents.machine import Machine
from farplug.agents.policy import Folders, Policy, read_secrets
from farplug.cli.agent_options import AgentOptions
from farplug.cli.joining import own_session
from farplug.cli.mcp import ServerOptions
from farplug.cli.session import SIGNALS
from farplug.cli.session_client import run as run_client
from farplug.control.names import open_session, socket_path
from farplug.descriptors import write_all
from farplug.errors import Reason, Remedy, RemoteProtocolError, SetupError

CLIENT_NAME = "an agent (MCP)"
"""The name of this client, for people who watch."""
MAX_MESSAGE: Final = 4 << 20
"""Bytes of a line, which is a message. The longest text of a tool has 65,536 characters."""
_PIECE = 1 << 16


def run(options: ServerOptions, *, debug: bool) -> None:
    """Serve on standard input and output until the input ends, or a signal comes.

    Raises:
        FarplugError: the server or the session cannot be started.
    """
    check_sdk("farplug mcp")
    with Audit(options.agents.audit) as audit:
        policy = policy_of(options.agents)
        if options.target is None:
            run_client(_serve(options, options.session, policy, audit))
            return
        with own_session(options.target, "the server", debug=debug) as name:
            run_client(_serve(options, name, policy, audit))


def check_sdk(user: str) -> None:
    """Raise ``SetupError`` if the SDK, which is an extra, is missing.

    Args:
        user: what needs it.
    """
    try:
        import farplug.agents.server  # noqa: F401
    except ImportError as error:
        raise SetupError(
            f"{user} needs the Python package mcp, version 2.3 or later: {error}",
            reason=Reason.MISSING_PROGRAM,
            remedy=Remedy("install it:", command="pip install 'farplug[mcp]'"),
        ) from error
    logging.getLogger().addHandler(logging.NullHandler())  # else the SDK adds its own to all loggers


def policy_of(options: AgentOptions) -> Policy:
    """Return what an agent may do.

    Raises:
        UsageError: a folder or a file cannot be used.
    """
    return Policy(
        options.read_only,
        Folders.of(options.allow or ()),
        options.allow_write,
        options.allow_devices,
        {} if options.secrets is None else read_secrets(options.secrets),
    )


async def _serve(options: ServerOptions, name: str | None, policy: Policy, audit: Audit) -> None:
    from farplug.agents.server import AgentServer

    async with open_session(name) as client:
        name = client.hello.session  # it runs, and is the only one if it was not named
    source = _Input()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        with suppress(NotImplementedError):  # on Windows
            loop.add_signal_handler(number, source.end)
    server = AgentServer(Machine(socket_path(name), CLIENT_NAME, options.display), policy, audit)
    await server.run_stdio_async()
    if source.too_long:
        raise RemoteProtocolError(
            f"the agent's program sent a message of more than {MAX_MESSAGE >> 20} MiB",
            remedy="start the server again; send large files with usb_attach, as a folder or a disk",
        )


class _Input:
    """A pipe in the place of standard input, which can be ended: a read cannot be interrupted.

    It ends also with a message that is too long, since the SDK keeps a message until its end has come.

    Attributes:
        too_long: whether it ended so.
    """

    def __init__(self) -> None:
        self.too_long = False
        self._source = os.dup(0)
        reader, self._writer = os.pipe()
        os.dup2(reader, 0)
        os.close(reader)
        self._wake_reader, self._wake_writer = os.pipe()
        Thread(target=self._copy, name="standard input", daemon=True).start()

    def end(self) -> None:
        """End the input."""
        os.write(self._wake_writer, b"\0")

    def _copy(self) -> None:
        size = 0
        with suppress(OSError):  # the server has ended
            while self._wake_reader not in select.select([self._source, self._wake_reader], [], [])[0]:
                data = os.read(self._source, _PIECE)
                if not data:
                    break
                line_end = data.rfind(b"\n")
                size = size + len(data) if line_end < 0 else len(data) - line_end - 1
                if size > MAX_MESSAGE:
                    self.too_long = True
                    break
                write_all(self._writer, data)
        os.close(self._writer)
