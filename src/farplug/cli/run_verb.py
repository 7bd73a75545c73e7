"""Carry out ``farplug run``."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from farplug.app.settings import TargetSettings
from farplug.cli import session_client
from farplug.cli.joining import own_session
from farplug.cli.run_command import RunOptions
from farplug.cli.screen import text_of, without_newline
from farplug.control.login import Login
from farplug.control.names import open_session
from farplug.control.shell import Shell, nothing, open_shell
from farplug.descriptors import write_all
from farplug.ends.stdio import StdioEnd
from farplug.errors import FarplugError, Reason, SessionError, UsageError, from_oserror
from farplug.exit_codes import ExitCode
from farplug.threads import run_in_daemon_thread

CHUNK: Final = 64 << 10
MAX_SECRET: Final = 4096
"""Characters of a password."""


def run(session: str | None, target: TargetSettings | None, options: RunOptions, *, debug: bool) -> int:
    """Run a command in the guest; return its exit code.

    Args:
        session: the name of the session; None: the only one.
        target: where the VM is; None: a session serves it.
        options: what to run.
        debug: log everything.

    Raises:
        SessionError: the command was not run, or not to its end, with the exit code of the failure.
    """
    try:
        login = None if options.user is None else Login(options.user, _secret(options.secret_file))
        if options.shell and not os.isatty(0):
            raise UsageError("--shell needs a terminal as standard input", reason=Reason.BAD_OPTION)
        _check_files(options)
        if target is None:
            return _run(session, login, options)
        with own_session(target, "the command", debug=debug) as name:
            return _run(name, login, options)
    except FarplugError as error:
        raise SessionError(
            error.message, reason=error.reason, exit_code=_exit_code(error), remedy=error.remedy
        ) from error


def _exit_code(error: FarplugError) -> ExitCode:
    match error.reason:
        case Reason.NO_PROMPT:
            return ExitCode.NO_PROMPT
        case Reason.INTERRUPTED:
            return ExitCode.INTERRUPTED
        case _ if isinstance(error, SessionError) and error.exit_code == ExitCode.COMMAND_TIMED_OUT:
            return ExitCode.COMMAND_TIMED_OUT
    return ExitCode.COMMAND_FAILED


def _check_files(options: RunOptions) -> None:
    """Check the files of this machine, before a client of the VM loses it and a command has run in vain.

    Raises:
        UsageError: a file cannot be read, or cannot be written into its folder.
    """
    for copy in options.copy_in:
        path = Path(copy.source)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                what = "a folder" if path.is_dir() else "a device or a pipe"
                raise UsageError(f"{path} is {what}, not a file", reason=Reason.NOT_A_FILE, remedy="name a file")
            path.open("rb").close()
        except (OSError, ValueError) as error:
            raise from_oserror(path, error, as_=UsageError, problem="cannot be read") from error
    for copy in options.copy_out:
        path = Path(copy.destination or ".")
        folder = path if path.is_dir() else path.parent
        number = 0 if os.access(folder, os.W_OK | os.X_OK) else errno.EACCES
        if number and not folder.is_dir():
            number = errno.ENOTDIR if folder.exists() else errno.ENOENT
        if number:
            failure = OSError(number, os.strerror(number))
            raise from_oserror(path, failure, as_=UsageError, problem="cannot be written")


def _secret(path: Path | None) -> str | None:
    if path is None:
        return None
    text = without_newline(text_of(path))
    if not text.isprintable() or len(text) > MAX_SECRET:
        raise UsageError(f"{path} is not one line with a password", reason=Reason.BAD_OPTION)
    return text


def _run(session: str | None, login: Login | None, options: RunOptions) -> int:
    try:
        return session_client.run(_connected(session, login, options))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _connected(session: str | None, login: Login | None, options: RunOptions) -> int:
    signals = _Signals()
    signals.install()
    async with (
        open_session(session) as client,
        open_shell(
            client,
            login=login,
            via=options.via,
            layout=options.layout,
            prompt_timeout=options.prompt_timeout,
            login_delay=options.login_delay,
        ) as shell,
    ):
        return await _carry_out(shell, options, signals)


async def _carry_out(shell: Shell, options: RunOptions, signals: _Signals) -> int:
    for copy in options.copy_in:
        await shell.copy_in(Path(copy.source), copy.destination or ".")
    code = 0
    if options.shell:
        return await _terminal(shell)
    if options.command:
        signals.shell = shell
        try:
            code = await shell.run(
                options.command,
                stdin=nothing if options.no_input else _read,
                stdout=partial(_write, 1),
                stderr=partial(_write, 2),
                timeout=options.timeout,
            )
        except FarplugError as error:
            if error.reason is not Reason.TIMED_OUT:
                raise
            raise SessionError(
                error.message, reason=error.reason, exit_code=ExitCode.COMMAND_TIMED_OUT, remedy=error.remedy
            ) from error
        signals.shell = None
    for copy in options.copy_out:
        await shell.copy_out(copy.source, Path(copy.destination or "."))
    return code


async def _terminal(shell: Shell) -> int:
    stdio = StdioEnd()
    await stdio.open()
    size = os.get_terminal_size(0)

    async def read() -> bytes:
        return b"".join(await stdio.read())

    try:
        return await shell.terminal(
            read,
            lambda data: stdio.write((data,)),
            rows=size.lines or 24,
            columns=size.columns or 80,
            kind=os.environ.get("TERM", "vt100"),
        )
    finally:
        await stdio.close()


class _Signals:
    """The first Ctrl-C interrupts the command in the guest; the next one, or another signal, this command.

    Attributes:
        shell: where a command runs; None: nowhere.
    """

    def __init__(self) -> None:
        self.shell: Shell | None = None

    def install(self) -> None:
        """Take the signals of this process."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError):  # on Windows
            loop.add_signal_handler(signal.SIGINT, self._interrupted, task)
            for name in ("SIGTERM", "SIGHUP"):
                if hasattr(signal, name):
                    loop.add_signal_handler(getattr(signal, name), task.cancel)

    def _interrupted(self, task: asyncio.Task[object]) -> None:
        shell, self.shell = self.shell, None
        if shell is None:
            task.cancel()
        else:
            shell.signal("INT")


async def _read() -> bytes:
    return await run_in_daemon_thread(partial(os.read, 0, CHUNK))


async def _write(descriptor: int, data: bytes) -> None:
    await run_in_daemon_thread(partial(write_all, descriptor, data))
