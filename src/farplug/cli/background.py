"""``farplug connect --detach``: a session in a process of its own.

The command starts the process, ``python -m farplug.cli.background``, and passes it the settings over a socket pair,
never as arguments, which everybody can read. The process inherits standard error until the session is ready, asks for a
password through the command, and reports over the same sockets that it is ready, or why it failed::

    command -> process  {"settings": {...}, "name": "web1", "json": false, "debug": false}
    process -> command  {"ask": "the password is wrong"}
    command -> process  {"password": "secret"}
    process -> command  {"ready": {"name": "web1", "pid": 4711, "log": "/home/..."}}
    process -> command  {"failed": {"code": "unreachable", "message": "...", "exit_code": 4}}

A process whose command ends before the session is ready leaves.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TextIO, cast

import typer

from farplug.app.settings import GuestSettings
from farplug.cli import log, notify
from farplug.cli.failure import Failure
from farplug.cli.log_file import LogFile, log_path
from farplug.cli.options import ask_on_terminal
from farplug.cli.service import ServiceOptions
from farplug.control.messages import ErrorData
from farplug.errors import FarplugError, InternalError, Reason, SessionError
from farplug.exit_codes import ExitCode, exit_code
from farplug.programs import child_environment
from farplug.rate_limit import release_logs


@dataclass(frozen=True, slots=True)
class Request:
    """What the process is asked to do.

    Attributes:
        settings: of the guest.
        name: of the session; None: that of the VM.
        json: write events as JSON to the log.
        debug: log everything.
    """

    settings: GuestSettings
    name: str | None = None
    json: bool = False
    debug: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the request as JSON's types, with the secrets."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Request:
        """Return the request that :meth:`to_json` described."""
        return cls(GuestSettings.from_json(data["settings"]), data["name"], data["json"], data["debug"])


@dataclass(frozen=True, slots=True)
class Ready:
    """A session that is ready.

    Attributes:
        name: of the session.
        pid: of its process.
        log: the path of its log.
    """

    name: str
    pid: int
    log: str


class _Channel:
    """Messages between the two processes: a JSON object a line."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; do nothing if the other process has ended."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None: the other process has ended. A signal handler may raise; nothing is lost."""
        while b"\n" not in self._received:
            try:
                data = self._socket.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                return None
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


# The command ------------------------------------------------------------------------------------------------------


def start(request: Request) -> Ready:
    """Start a session in a process of its own, and return when it is ready.

    Ctrl-C ends the process.

    Raises:
        SessionError: the session failed, as it would have in the foreground.
        KeyboardInterrupt: the session was interrupted before it was ready.
        typer.Exit: the session ended before it was ready, without an error.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                # Without -P the working directory would come first in the path of modules.
                [sys.executable, "-P", "-m", __name__, request.settings.target.public_target],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=2,  # not None: it is inherited also if it was closed, and is /dev/null now
                start_new_session=True,
                env=child_environment(**{notify.VARIABLE: ""}),  # systemd gets no message of this process
            )
        channel = _Channel(ours)
        channel.send(request.to_json())
        while True:
            try:
                ready = _follow(channel)
                break
            except KeyboardInterrupt:
                process.terminate()
            except SessionError:
                process.wait()  # it has nothing more to do
                raise
    if ready is None:
        _ended(process)
    process.returncode = 0  # it stays: no warning about a child that still runs
    return ready


def _follow(channel: _Channel) -> Ready | None:
    """Answer the process until the session is ready; return None if the process ended."""
    while (message := channel.receive()) is not None:
        match message:
            case {"ready": ready}:
                return Ready(**ready)
            case {"failed": error}:
                raise ErrorData.parse(error).error()
            case {"ask": question}:
                channel.send({"password": ask_on_terminal(question)})
    return None


def _ended(process: subprocess.Popen[bytes]) -> NoReturn:
    """Raise why the process ended before the session was ready."""
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            process.terminate()
    if code == ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code < 0:
        raise SessionError(
            f"the session's process was ended by signal {-code} ({signal.strsignal(-code)})",
            reason=Reason.SESSION_ERROR,
            exit_code=ExitCode.INTERNAL_ERROR,
        )
    raise typer.Exit(code)


# The process ------------------------------------------------------------------------------------------------------


class _Command:
    """The command that started this process, until the session is ready."""

    def __init__(self, channel: _Channel, end: socket.socket) -> None:
        self._channel = channel
        self._end = end
        self._answers: asyncio.Queue[str | None] = asyncio.Queue()
        self._watching: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Receive answers; leave if the command ends."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        reader, _ = await asyncio.open_connection(sock=self._end.dup())
        while line := await reader.readline():
            self._answers.put_nowait(json.loads(line)["password"])
        os.kill(os.getpid(), signal.SIGTERM)

    async def ask(self, error: FarplugError) -> str | None:
        """Return the password that the user of the command gave; None: there is no user, or the command has ended."""
        if self._watching is None or self._watching.done():
            return None
        self._channel.send({"ask": error.message})
        return await self._answers.get()

    def leave(self) -> None:
        """Take note that the command is done: it may end."""
        if self._watching is not None:
            self._watching.cancel()
        self._end.close()


def main() -> NoReturn:
    """Run the session of this process, and exit."""
    end = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.start()
    channel = _Channel(end)
    message = channel.receive()
    if message is None:
        sys.exit(ExitCode.INTERRUPTED)
    request = Request.from_json(message)
    log.debug(request.debug)
    sys.exit(_run(request, channel, _Command(channel, end)))


def _run(request: Request, channel: _Channel, command: _Command) -> int:
    stream = LogFile()
    text = cast("TextIO", stream)
    sys.stdout = text
    ready = False

    def named(name: str) -> str:
        path = log_path(name)
        stream.open(path)
        return str(path)

    def is_ready(name: str) -> None:
        nonlocal ready
        ready = True
        stream.take_over(1, 2)
        sys.stderr = text
        channel.send({"ready": asdict(Ready(name, os.getpid(), str(log_path(name))))})
        command.leave()

    async def session_of() -> ExitCode:
        from farplug.cli import output, session

        command.watch()
        return await session.run(
            request.settings,
            output.JsonOutput(text) if request.json else output.PlainOutput(text),
            service=ServiceOptions(request.name, required=True, named=named, ready=is_ready),
            ask_password=command.ask,
        )

    try:
        return asyncio.run(session_of())
    except FarplugError as error:
        failure = error
    except Exception as error:
        failure = InternalError(error)
    finally:
        release_logs()
    if isinstance(failure, InternalError):
        log.traceback(failure.__cause__)
    if not ready:
        channel.send({"failed": ErrorData.of(failure).to_json()})
    else:
        Failure.of(failure).report(as_json=request.json)
    return exit_code(failure)


if __name__ == "__main__":
    main()
