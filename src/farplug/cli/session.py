"""One run of ``farplug connect``: the application, its output, signals, and how it ends."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from farplug.app.app import App
from farplug.app.events import Event, Level
from farplug.app.link import AskPassword
from farplug.app.settings import GuestSettings
from farplug.cli import log, writer
from farplug.cli.memory import collect_garbage
from farplug.cli.options import has_terminal, prompt_for_password
from farplug.cli.output import Output, SilentOutput
from farplug.cli.service import UNNAMED, Service, ServiceOptions, SystemdReporter
from farplug.cli.writer import QueuedStream
from farplug.errors import FarplugError, InternalError, Reason, SetupError
from farplug.exit_codes import ExitCode
from farplug.text import printable

_HANGUP: tuple[signal.Signals, ...] = ()
if sys.platform != "win32":
    _HANGUP = (signal.SIGHUP,)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *_HANGUP)
"""What ends a session: Ctrl-C, kill, a terminal that is closed."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing to a file fails with that is full."""
_COMMAND_ANSWERS = "type touch to allow it, or refuse"
_LINE_ANSWERS = "type y and Enter to allow it, or n and Enter to refuse it"
"""How the user answers what a security key asks: with a command, and on the terminal without commands."""
_AT_ONCE = 0.5
"""Seconds that the readers of the output have when a user wants to leave at once."""


async def run(
    settings: GuestSettings,
    output: Output,
    *,
    commands: bool = False,
    service: ServiceOptions = UNNAMED,
    ask_password: AskPassword | None = None,
) -> ExitCode:
    """Run until a signal comes, or raise why the session ended.

    Args:
        settings: what to do.
        output: shows the events.
        commands: read commands from standard input.
        service: the name and the control socket of the session.
        ask_password: asks a user for a password; None: the user of the terminal is asked.

    Returns:
        OK; INTERRUPTED if the signal came before any device was plugged in.

    Raises:
        SetupError: asyncio handles no signals on this system (``UNSUPPORTED_SYSTEM``).
    """
    if sys.platform == "win32":
        raise SetupError("farplug connect does not run on Windows", reason=Reason.UNSUPPORTED_SYSTEM)
    return await _Session(settings, output, commands, service, ask_password).run()


class _Session:
    def __init__(
        self,
        settings: GuestSettings,
        output: Output,
        commands: bool,
        service: ServiceOptions = UNNAMED,
        ask_password: AskPassword | None = None,
    ) -> None:
        self._output = output
        self._force = settings.storage.force
        self._uses_stdio = any(source.uses_stdio for source in settings.sources)
        self._commands = commands
        self._work: asyncio.Task[None] | None = None
        self._interrupted = False
        self._signalled = False
        self._leaving = False
        self._failed: FarplugError | None = None
        """Why the session ends, if that is not an error of the application: a bug, or its control socket."""
        self._warned: dict[str, int] = {}
        """The disks of the last warning about unfinished writes, and the run of writes that it was about."""
        # The ticket of a .vv file is for one use: a user has no other one.
        ask = (ask_password or self._ask_password) if settings.target.target.startswith("spice") else None
        self._app = App(ask, self._quit)
        self._service_options = service
        self._service = Service(service, settings, self._app)
        self._systemd = SystemdReporter(self._app)
        self._serving = False
        """The control socket was made, or is being made, or could not be made."""
        self._found = False
        """Other commands find the session, or it cannot have a control socket and needs none."""
        self._ready = False
        self._app.subscribe(self._show)
        self._guest = self._app.add(settings)
        self._beside: list[asyncio.Task[None]] = []
        """Tasks that end with the session."""
        self._may_answer = not commands and not self._uses_stdio and _on_terminal()
        """The user of the terminal can answer what a security key asks."""
        self._answering = False
        if commands:
            output.answers = _COMMAND_ANSWERS
        elif self._may_answer:
            output.answers = _LINE_ANSWERS

    async def run(self) -> ExitCode:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._callback_failed)
        if isinstance(sys.stdout, QueuedStream):
            sys.stdout.on_failure(partial(self._failed_in_thread, loop))
        if self._service_options.name is not None:  # a name that is taken costs no ticket
            self._serving = True
            await self._service.start()
            self._found = True
        self._work = loop.create_task(self._app.run(self._guest))
        for number in SIGNALS:
            if number not in _HANGUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, self._interrupt, number)
        self._beside.append(loop.create_task(self._refresh()))
        self._beside.append(loop.create_task(collect_garbage()))
        if self._commands:
            from farplug.cli.commands import serve  # a large import

            self._beside.append(loop.create_task(serve(self._app, self._guest, lambda: self._interrupt(signal.SIGINT))))
        try:
            self._write(self._output.start)
            await self._work
            self._raise_failure()
        except asyncio.CancelledError:
            self._raise_failure()
            if not self._interrupted:
                raise
        finally:
            self._systemd.stopping()
            for task in self._beside:
                task.cancel()
            await asyncio.gather(*self._beside, return_exceptions=True)
            await self._service.close()
            self._write(self._output.stop)
        return ExitCode.INTERRUPTED if self._signalled and not self._guest.served else ExitCode.OK

    # Output -------------------------------------------------------------------------------------------------------

    def _show(self, event: Event) -> None:
        if event.name == "capture-started":
            log.say(f"farplug: warning: {printable(event.message)}")
        if event.name == "presence-asked" and self._may_answer and not self._answering:
            from farplug.cli.commands import answer

            self._answering = True  # not before: the lines that the user types may be for the next program
            self._beside.append(asyncio.get_running_loop().create_task(answer(self._app, self._guest)))
        self._write(lambda: self._output.show(event))
        self._systemd.show(event)
        if event.name == "connected" and not self._serving and not self._leaving:  # comes again when the VM is back
            self._serving = True
            self._beside.append(asyncio.get_running_loop().create_task(self._serve(event.fields["name"])))
        if event.name == "ready":
            self._check_ready()

    def _check_ready(self) -> None:
        """Report that the session is ready, once its devices are plugged in, or wait for the VM, and it is found."""
        if self._guest.is_ready and self._found and not self._ready and not self._leaving:
            self._ready = True
            self._systemd.ready()
            self._service_options.ready(self._service.name)

    # The control socket -------------------------------------------------------------------------------------------

    async def _serve(self, vm: str) -> None:
        """Begin to listen on the control socket. A failure ends the session only if the user asked for the socket."""
        try:
            await self._service.start(vm)
        except FarplugError as error:
            if self._service_options.required:
                self._failed = error
                self._leave()
                return
            log.say(f"farplug: warning: other commands cannot use this session: {printable(error.message)}")
            for line in log.remedy_lines(error.remedy):
                log.say(f"  {line}")
        self._found = True
        self._check_ready()

    def _quit(self) -> None:
        """Leave, as another command asks for; a second time changes nothing."""
        if not self._interrupted:
            unwarned = self._unfinished()
            self._interrupted = self._signalled = True
            self._leave()
            if unwarned:
                self._warn(list(unwarned), leaving=True)
            self._guest.note(f"{self._farewell()}: another command ends the session")

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(self._output.interval)
            self._write(self._output.refresh)

    def _write(self, what: Callable[[], None]) -> None:
        try:
            what()
        except OSError as error:
            self._output_failed(error)

    def _failed_in_thread(self, loop: asyncio.AbstractEventLoop, error: OSError) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._output_failed, error)

    def _output_failed(self, error: OSError) -> None:
        """When the reader of standard output is gone (a closed pipe or terminal), end the session.

        A log on a full file system does not end it: the VM uses the disks.
        """
        self._output = SilentOutput()
        log.discard(sys.stdout)
        if error.errno in _NO_SPACE:
            log.say(f"farplug: warning: output stopped: {os.strerror(error.errno)}")
            return
        if not self._leaving and (unwarned := self._unfinished()):
            log.say(f"farplug: warning: {unfinished_writes(list(unwarned), leaving=True)}")
        self._interrupted = True
        self._leave()

    # Leaving ------------------------------------------------------------------------------------------------------

    def _interrupt(self, number: signal.Signals) -> None:
        if self._interrupted:
            self._leave_at_once()
        unwarned = self._unfinished()
        asks = number is signal.SIGINT and not self._force and _on_terminal()
        if unwarned and asks and not self._leaving:
            self._warned |= unwarned
            self._warn(list(unwarned), leaving=False)
            return
        self._interrupted = self._signalled = True
        self._leave()
        if unwarned:
            self._warn(list(unwarned), leaving=True)
        self._guest.note(f"{self._farewell()}; press Ctrl-C again to quit immediately")

    def _farewell(self) -> str:
        """Return what is done before the end: nothing is detached if the VM has no device yet."""
        return "detaching" if any(one.offered for one in self._guest.attachments) else "leaving"

    def _warn(self, disks: list[str], *, leaving: bool) -> None:
        level = Level.BAD if leaving else Level.PROGRESS
        text = unfinished_writes(disks, leaving=leaving)
        self._guest.publish("unfinished-writes", text, level=level, disks=disks, leaving=leaving)

    def _unfinished(self) -> dict[str, int]:
        """Return the disks that the VM may not have finished writing to; none if all of them were warned about."""
        unfinished = self._guest.unfinished()
        return unfinished if unfinished.items() - self._warned.items() else {}

    def _leave(self) -> None:
        if self._work is not None and not self._leaving:
            self._leaving = True
            self._work.cancel()

    def _leave_at_once(self) -> NoReturn:
        self._write(self._output.stop)
        log.say("farplug: quit immediately, without waiting for the VM")
        writer.finish(_AT_ONCE)
        if self._guest.uses_usb:
            from farplug.physical.device_thread import finish

            finish()  # this machine's devices get their drivers again
        if self._uses_stdio:
            from farplug.ends.stdio import restore

            restore()
        os._exit(ExitCode.INTERRUPTED)

    # Passwords and bugs -------------------------------------------------------------------------------------------

    async def _ask_password(self, error: FarplugError) -> str | None:
        """Ask on the terminal, if there is one. Ctrl-C at the prompt ends the command."""
        if not has_terminal() or (self._uses_stdio and self._guest.served):  # the guest gets what the user types
            return None
        self._write(self._output.stop)
        log.say(f"farplug: {error.message}")
        writer.drain()  # the prompt follows
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(signal.SIGINT)
        try:
            return prompt_for_password()
        finally:
            loop.add_signal_handler(signal.SIGINT, self._interrupt, signal.SIGINT)
            self._write(self._output.start)

    def _callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Leave after an exception in a callback of the event loop, which is a bug: asyncio would only log it."""
        error = context.get("exception")
        if not isinstance(error, Exception) or isinstance(error, (FarplugError, OSError)):
            loop.default_exception_handler(context)
        elif self._failed is None:
            self._failed = InternalError(error)
            self._leave()

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise self._failed


def unfinished_writes(disks: list[str], *, leaving: bool) -> str:
    """Return the warning that the VM may not have finished writing to disks.

    Args:
        disks: their labels.
        leaving: farplug exits nevertheless; otherwise it continues until it is interrupted again.
    """
    them = "it" if len(disks) == 1 else "them"
    then = "before farplug leaves" if leaving else "first; interrupt again to leave"
    return f"the VM may not have finished writing to {', '.join(disks)}: unmount {them} there {then}"


def _on_terminal() -> bool:
    """Return whether a person sees what is printed and can interrupt again: no script, no pipe."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
