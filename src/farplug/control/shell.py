"""Commands in a guest that has no network, no agent and no SSH server: over a keyboard and serial lines.

::

    async with open_session("web1") as client, open_shell(client) as shell:
        code = await shell.run(["lsblk", "-f"], stdout=write)

The session plugs in one device with a keyboard and three serial lines (``plug-shell``), and types one line at a prompt
of a shell; the rest goes over the lines (:mod:`farplug.control.shell_script`).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeAlias

from farplug.control import shell_script
from farplug.control.client import Client
from farplug.control.login import Login, log_in
from farplug.control.shell_script import CHUNK, END_OF_INPUT, UntilMarker
from farplug.errors import (
    DeviceError,
    FarplugError,
    GuestGoneError,
    Reason,
    RemoteProtocolError,
    SetupError,
    TargetError,
    UsageError,
    from_oserror,
)
from farplug.text import printable

PROMPT_TIMEOUT: Final = 30.0
"""Seconds in which a shell answers to the typed line."""
LOGIN_DELAY: Final = 3.0
"""Seconds that a guest needs to ask for the password, and to start a shell, if its screen cannot be read."""
RETYPE_INTERVAL: Final = 10.0
"""Seconds after which the line is typed again after a login, which may have discarded it."""
CONNECT_TIMEOUT: Final = 30.0
"""Seconds in which the session connects the lines."""
KILL_DELAY: Final = 2.0
"""Seconds from SIGTERM to SIGKILL after a timeout, and from SIGKILL to the end."""
ECHOES: Final = 6
ECHO_TIMEOUT: Final = 0.02
"""Bytes that are typed on a terminal at once, and seconds for their echo. Linux's driver sends each echoed character as
a transfer of its own, and drops those after the 16th that waits: text that is pasted would not be shown."""
MAX_DIGITS: Final = 10
"""Of a number in a line of the guest on the control line."""
LINES: Final = 3
MAX_MESSAGE: Final = 4096
"""Bytes of an error message of the guest."""

Read: TypeAlias = Callable[[], Awaitable[bytes]]
"""Returns the next bytes of standard input; none at its end."""
Write: TypeAlias = Callable[[bytes], Awaitable[object]]
"""Takes bytes of an output; the guest waits meanwhile."""

_GONE_EVENTS: Final = ("lost", "closed", "detached", "removed", "line-changed")


async def nothing() -> bytes:
    """Return an empty standard input."""
    return b""


async def discard(data: bytes) -> None:
    """Drop an output."""


@dataclass(frozen=True, slots=True)
class Line:
    """The end of a serial line on this machine."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Shell:
    """A shell in a guest that executes commands. One at a time.

    Args:
        streams: the line of standard input and output.
        errors: the line of standard error.
        control: the line of scripts and signals.
    """

    def __init__(self, streams: Line, errors: Line, control: Line) -> None:
        self._streams = streams
        self._errors = errors
        self._control = control
        self._marker = secrets.token_hex(16)
        self._runs = False
        self.on_terminal = False
        """The line of the streams is a terminal now, which the guest hangs up at the end."""

    def fail(self, error: FarplugError) -> None:
        """End all calls with an error: the guest or the device is gone."""
        for line in (self._streams, self._errors, self._control):
            line.reader.set_exception(error)

    async def begin(self) -> None:
        """Wait until the shell reads scripts.

        Raises:
            RemoteProtocolError: the guest sent something else.
            GuestGoneError: the device or the session is gone.
        """
        if await self._message(shell_script.READY):
            raise RemoteProtocolError("the shell in the VM did not begin as expected")
        self._send_script(shell_script.prelude(self._marker))

    def end(self) -> None:
        """Let the shell in the guest end: the prompt comes back."""
        self._send_script("exit")

    async def run(
        self,
        command: Sequence[str],
        *,
        stdin: Read = nothing,
        stdout: Write = discard,
        stderr: Write = discard,
        timeout: float | None = None,
    ) -> int:
        """Run a command; return its exit code when it has ended, and what it wrote has arrived.

        Args:
            command: the program and its arguments, which no shell interprets.
            stdin: its standard input.
            stdout: takes its standard output.
            stderr: takes its standard error.
            timeout: seconds after which it is terminated; None: it may run forever.

        Returns:
            The exit code; 128 and the number of the signal that ended the command; 127 if there is no such program.

        Raises:
            TargetError: ``timed-out``: the command was terminated.
            GuestGoneError: the device, the VM or the session is gone.
            RemoteProtocolError: the guest violated the protocol.
        """
        if not command or not command[0]:
            raise UsageError("the command is empty", reason=Reason.BAD_SETTING)
        if any("\0" in argument for argument in command):
            raise UsageError("an argument has a NUL character", reason=Reason.BAD_SETTING)
        running = asyncio.ensure_future(self._run(command, stdin, stdout, stderr))
        try:
            if (await asyncio.wait([running], timeout=timeout))[0]:
                return running.result()
            for signal in ("TERM", "KILL"):
                self.signal(signal)
                if (await asyncio.wait([running], timeout=KILL_DELAY))[0]:
                    break
            raise TargetError(
                f"the command did not end within {timeout:g} s, and was terminated",
                reason=Reason.TIMED_OUT,
                remedy="give it more time",
            )
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _run(self, command: Sequence[str], stdin: Read, stdout: Write, stderr: Write) -> int:
        self._send_script(shell_script.run(command))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(self._streams, stdout))
                group.create_task(self._read(self._errors, stderr))
                await self._message(shell_script.BEGUN)
                self._runs = True
                feeding = group.create_task(self._feed(stdin))
                code = await self._message(shell_script.EXIT)
                self._runs = False
                self._control.writer.write(shell_script.record(shell_script.END))
                # A process that still has the output open is waited for, as over ssh, without further input.
                feeding.cancel()
                await asyncio.wait([feeding])
                if feeding.cancelled():
                    self._streams.writer.write(END_OF_INPUT)
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        finally:
            self._runs = False
        return code

    def signal(self, name: str) -> None:
        """Send a signal to the process group of the command, such as ``INT``. Nothing happens if it has ended."""
        if self._runs:
            self._control.writer.write(shell_script.record(name))

    async def terminal(
        self, stdin: Read, stdout: Write, *, rows: int = 24, columns: int = 80, kind: str = "vt100"
    ) -> int:
        """Run an interactive shell; return its exit code. Nothing can be run afterwards.

        Args:
            stdin: what a user types.
            stdout: takes what the user sees.
            rows: of the terminal.
            columns: of the terminal.
            kind: of the terminal: its ``TERM``.

        Raises as :meth:`run`.
        """
        self.on_terminal = True
        self._send_script(shell_script.terminal(rows, columns, kind))
        await self._message(shell_script.BEGUN)  # the line is a terminal now

        echoed = asyncio.Event()

        async def relay() -> None:
            while data := await stdin():
                for start in range(0, len(data), ECHOES):
                    echoed.clear()
                    self._streams.writer.write(data[start : start + ECHOES])
                    await self._streams.writer.drain()
                    if start + ECHOES < len(data):
                        with suppress(TimeoutError):
                            await asyncio.wait_for(echoed.wait(), ECHO_TIMEOUT)

        async def show(data: bytes) -> None:
            echoed.set()
            await stdout(data)

        typing = asyncio.ensure_future(relay())
        try:
            await self._read(self._streams, show)
            return await self._message(shell_script.EXIT)
        finally:
            typing.cancel()
            await asyncio.gather(typing, return_exceptions=True)

    # Files --------------------------------------------------------------------------------------------------------

    async def copy_in(self, path: Path, destination: str = ".") -> int:
        """Copy a file into the guest, in place of one that is there; return the number of bytes.

        The file has its name when all of it is there and its SHA-256 is right.

        Args:
            path: of the file.
            destination: its path in the guest, or the folder there, relative to that of the shell.

        Raises:
            UsageError: the file cannot be read.
            DeviceError: the guest cannot write it, or something else arrived.
            FarplugError: as :meth:`run`.
        """
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                checksum = (await asyncio.to_thread(hashlib.file_digest, file, "sha256")).hexdigest()
                size = await asyncio.to_thread(file.seek, 0, os.SEEK_END)
                file.seek(0)
                errors = _Start()
                suffix = f"farplug-{secrets.token_hex(4)}"
                code = await self.run(
                    shell_script.copy_in(destination, path.name, suffix, checksum, mode),
                    stdin=lambda: asyncio.to_thread(file.read, CHUNK),
                    stderr=errors.write,
                )
        except OSError as error:
            raise from_oserror(path, error, as_=UsageError, problem="cannot be read") from error
        if code:
            raise DeviceError(f"{path} was not copied: {errors.text or f'exit code {code}'}", reason=Reason.IO_ERROR)
        return size

    async def copy_out(self, path: str, destination: Path) -> int:
        """Copy a file out of the guest, in place of one that is there; return the number of bytes.

        The file has its name when all of it is there and its SHA-256 is right.

        Args:
            path: of the file in the guest, relative to the folder of the shell.
            destination: its path, or the folder in which it will be.

        Raises:
            UsageError: the file cannot be written.
            DeviceError: the guest cannot read it, or something else arrived.
            FarplugError: as :meth:`run`.
        """
        if await asyncio.to_thread(destination.is_dir):
            destination /= path.rstrip("/").rpartition("/")[2] or "file"
        partial = destination.with_name(f"{destination.name}.farplug-{secrets.token_hex(4)}")
        try:
            with partial.open("xb") as file:
                try:
                    size = await self._copy_out(path, file)
                    os.replace(partial, destination)
                except BaseException:
                    partial.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise from_oserror(destination, error, as_=UsageError, problem="cannot be written") from error
        return size

    async def _copy_out(self, path: str, file: BinaryIO) -> int:
        checksum = hashlib.sha256()
        errors = _Start()
        size = 0

        def write(data: bytes) -> None:
            nonlocal size
            file.write(data)
            checksum.update(data)
            size += len(data)

        code = await self.run(
            shell_script.copy_out(path), stdout=lambda data: asyncio.to_thread(write, data), stderr=errors.write
        )
        if code:
            raise DeviceError(
                f"{path} was not copied out: {errors.text or f'exit code {code}'}", reason=Reason.IO_ERROR
            )
        if shell_script.checksum_of(bytes(errors.data)) != checksum.hexdigest():
            raise DeviceError(
                f"{path} was not copied out: the checksum of what arrived differs",
                reason=Reason.CHANGED,
                remedy="copy it when no program writes to it",
            )
        file.flush()
        return size

    # The lines ----------------------------------------------------------------------------------------------------

    def _send_script(self, script: str) -> None:
        self._control.writer.write(shell_script.chunk(shell_script.encode(script)))

    async def _message(self, word: str) -> int:
        """Return the number in the guest's next line on the control line, which begins with a word; 0 without one.

        Raises:
            RemoteProtocolError: the line has another form.
            GuestGoneError: the line has ended.
        """
        try:
            line = await self._control.reader.readuntil()
        except asyncio.IncompleteReadError:
            raise _gone() from None
        except asyncio.LimitOverrunError:
            line = b""
        first, _, number = line.rstrip().partition(b" ")
        if first != word.encode() or len(number) > MAX_DIGITS or (number and not number.isdigit()):
            raise RemoteProtocolError(f"the shell in the VM sent {printable(repr(line[:80]))} in place of {word!r}")
        return int(number or b"0")

    async def _read(self, line: Line, write: Write) -> None:
        until = UntilMarker(self._marker)
        while not until.ended:
            data = await line.reader.read(CHUNK)
            if not data:
                raise _gone()
            if data := until.feed(data):
                await write(data)

    async def _feed(self, read: Read) -> None:
        writer = self._streams.writer
        while data := await read():
            for start in range(0, len(data), CHUNK):
                writer.write(shell_script.chunk(data[start : start + CHUNK]))
                await writer.drain()
        writer.write(END_OF_INPUT)


class _Start:
    """Keeps the first bytes of an output, for a message."""

    def __init__(self) -> None:
        self.data = bytearray()

    async def write(self, data: bytes) -> None:
        self.data += data[: MAX_MESSAGE - len(self.data)]

    @property
    def text(self) -> str:
        return printable(self.data.decode("utf-8", "replace").strip())


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group of tasks."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _gone() -> GuestGoneError:
    return GuestGoneError("the shell in the VM, or the device, ended before the command")


# A shell of a session -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_shell(
    client: Client,
    *,
    typist: Client | None = None,
    login: Login | None = None,
    via: str = "auto",
    layout: str = "us",
    prompt_timeout: float = PROMPT_TIMEOUT,
    login_delay: float = LOGIN_DELAY,
) -> AsyncIterator[Shell]:
    """Return a context manager that opens a shell in the guest of a session, at the prompt that waits for input there.

    Args:
        client: the connection to the session, without a subscription.
        typist: the connection that types, as it holds the keyboard; None: ``client``.
        login: who logs in first (:func:`~farplug.control.login.log_in`); None: a shell runs.
        via: as for the method ``type``.
        layout: the guest's keyboard layout.
        prompt_timeout: seconds in which a shell answers to the typed line, and in which the guest asks for the name and
            for the password.
        login_delay: seconds that the guest needs to ask for the password, and to start a shell, if its screen cannot be
            read.

    Raises:
        TargetError: ``no-prompt``: no shell answered, or the guest refused the login.
        GuestGoneError: the guest or the session is gone.
        FarplugError: the device cannot be plugged in, or the line cannot be typed.
    """
    if sys.platform == "win32":
        raise SetupError(
            "the lines of a shell need UNIX sockets, which Python does not have on Windows",
            reason=Reason.UNSUPPORTED_SYSTEM,
        )
    serial_number = secrets.token_hex(5)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".shell-", dir=client.path.parent))
        prefix = f"{folder}/line"
        listeners = [_Listener() for _ in range(LINES)]
        for number, listener in enumerate(listeners):
            server = await asyncio.start_unix_server(listener.connected, f"{prefix}{number}", limit=CHUNK)
            stack.callback(server.close)
            stack.callback(listener.close)
        plugged = await client.call("plug-shell", {"lines": prefix, "serial_number": serial_number})
        stack.push_async_callback(_unplug, client, plugged["attachment"])
        async with asyncio.timeout(CONNECT_TIMEOUT):
            streams, errors, control = [await listener.line for listener in listeners]
        shell = Shell(streams, errors, control)
        watching = asyncio.ensure_future(_watch(client, plugged["attachment"], shell))
        stack.push_async_callback(_cancelled, watching)
        typing = _Typist(typist or client, via, layout)
        if login is not None:
            await log_in(client, typing.type, login, delay=login_delay, timeout=prompt_timeout)
        await typing.begin(
            shell, shell_script.bootstrap(serial_number), prompt_timeout, None if login is None else RETYPE_INTERVAL
        )
        stack.callback(shell.end)
        yield shell


async def _unplug(client: Client, attachment: str) -> None:
    with suppress(FarplugError):  # the session has ended, or has lost the guest
        await client.call("detach", {"device": attachment})


async def _cancelled(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class _Listener:
    """Takes the first connection to a socket."""

    def __init__(self) -> None:
        self.line: asyncio.Future[Line] = asyncio.get_running_loop().create_future()

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.line.done():
            writer.transport.abort()
        else:
            self.line.set_result(Line(reader, writer))

    def close(self) -> None:
        if self.line.done() and not self.line.cancelled():
            self.line.result().writer.transport.abort()
        self.line.cancel()


@dataclass(frozen=True, slots=True)
class _Typist:
    """Types in the guest."""

    client: Client
    via: str
    layout: str

    async def begin(self, shell: Shell, line: str, timeout: float, again: float | None) -> None:
        """Type the line, and wait until the shell answers.

        Args:
            shell: what answers.
            line: what is typed.
            timeout: seconds from the first Return key.
            again: seconds after which the line is typed once more; None: it is typed once.

        Raises:
            TargetError: ``no-prompt``: no shell answered.
        """
        loop = asyncio.get_running_loop()
        answer = asyncio.ensure_future(shell.begin())
        deadline: float | None = None
        try:
            while deadline is None or loop.time() < deadline:
                await self.client.call("press", {"keys": "ctrl+u", "via": self.via})  # clear what is on the line
                await self.type(f"{line}\n")
                deadline = deadline or loop.time() + timeout
                left = deadline - loop.time()
                if (await asyncio.wait([answer], timeout=left if again is None else min(left, again)))[0]:
                    await answer
                    return
            raise _no_prompt()
        finally:
            await _cancelled(answer)

    async def type(self, text: str, hidden: bool = False) -> None:
        """Type a text, which is a secret or not."""
        await self.client.call("type", {"text": text, "layout": self.layout, "via": self.via, "hidden": hidden})


async def _watch(client: Client, attachment: str, shell: Shell) -> None:
    """Let the shell fail when the device, the guest or the session is gone, or the shell in the guest has ended."""
    shell.fail(await _why_gone(client, attachment, shell))


async def _why_gone(client: Client, attachment: str, shell: Shell) -> FarplugError:
    opened = False
    events = client.subscribe(_GONE_EVENTS)
    try:
        async for event in events:
            match event["event"]:
                case "lost" | "closed":
                    return GuestGoneError("the connection to the VM ended")
                case "detached" | "removed" if event["attachment"] == attachment:
                    return GuestGoneError("the keyboard and the serial lines were taken out of the VM")
                case "line-changed" if event["attachment"] == attachment:
                    if opened and not event["dtr"] and not shell.on_terminal:
                        return GuestGoneError("the shell in the VM ended: it was interrupted, or the VM restarted")
                    opened = opened or event["dtr"]
    except FarplugError as error:
        return error
    finally:
        with suppress(FarplugError):  # the session has ended
            await events.close()
    return GuestGoneError("the session has ended", reason=Reason.SESSION_GONE)


def _no_prompt() -> TargetError:
    return TargetError(
        "no shell in the VM answered to what was typed",
        reason=Reason.NO_PROMPT,
        remedy="look at the screen of the VM: a prompt of a shell must wait for input there. The keyboard layout must "
        "be that of the VM, a login needs the right password, the user access to /dev/ttyACM*, and Linux the driver "
        "cdc_acm",
    )
