"""Log to standard error: warnings; with ``--debug`` everything, including the traffic, one line per packet."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from farplug.errors import FarplugError, Remedy
from farplug.shell import shell_quote, shell_word
from farplug.text import printable

LOGGER = logging.getLogger("farplug")


def remedy_lines(remedy: str) -> list[str]:
    """Return the lines that show a remedy: its text, its command, the option for its setting, its alternative.

    Control characters are replaced.
    """
    lines = remedy.split("\n") if len(remedy) else []
    if isinstance(remedy, Remedy):
        option = setting_option(remedy.setting, remedy.value) if remedy.setting else ""
        steps = [*remedy.command.split("\n"), option] if remedy.command else [option]
        steps = [step for step in steps if step]
        if not lines:
            lines = steps
        elif remedy.command:
            lines = [*lines[:-1], f"{lines[-1].removesuffix(':')}:", *(f"  {step}" for step in steps)]
        elif option:
            lines[-1] = f"{lines[-1]}: {option}"
        if remedy.alternative is not None:
            lines += remedy_lines(remedy.alternative)
    return [printable(line) for line in lines]


_METAVARS = {
    "ca_file": "FILE",
    "host_subject": "SUBJECT",
    "proxy": "URL",
    "usb_cdrom": "PATH",
    "usb_device": "DEVICE",
    "usb_fido": "FILE",
    "tls_cert": "FILE",
    "tls_key": "FILE",
    "web_root": "DIR",
}
_PASSWORD_OPTIONS = "--password-file FILE, --ask-password, or FARPLUG_PASSWORD in the environment (for URLs)"
"""The ways to give a password: none of them shows it in the list of processes."""
_NOT_PATHS = ("host_subject", "usb_device")
"""Settings whose values may have a colon, which in a path would need ``./``."""


def setting_option(setting: str, value: str | int | bool | None = None) -> str:
    """Return the option for a setting of :mod:`farplug.app.settings`, such as ``--ca-file FILE``."""
    name = setting.rpartition(".")[2]
    if name == "password":
        return _PASSWORD_OPTIONS
    option = f"--{name.replace('_', '-')}"
    if value is None:
        metavar = _METAVARS.get(name)
        return f"{option} {metavar}" if metavar else option
    if value is True:
        return option
    quote = shell_quote if name in _NOT_PATHS else shell_word
    return f"{option} {quote(str(value))}"


def say(text: str) -> None:
    """Write lines to standard error. A failure to write is ignored: the exit code still counts."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Discard the buffered and all further output of a standard stream."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Handler(logging.Handler):
    """Writes to the current standard error: a live table on a terminal replaces it temporarily."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


class _Formatter(logging.Formatter):
    """Formats warnings like the other messages of farplug; with ``--debug``, adds time, source and tracebacks."""

    default_time_format = "%H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        message = printable(record.getMessage())
        debugging = LOGGER.isEnabledFor(logging.DEBUG)
        if not debugging:
            error = record.exc_info[1] if record.exc_info else None
            cause = f": {printable(_first_line(error))}" if error is not None else ""
            return f"farplug: {record.levelname.lower()}: {message}{cause}"
        name = record.name.removeprefix("farplug.")
        line = f"{self.formatTime(record)} {name} {message}"
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info).split("\n")
        return "\n".join([line, *map(printable, trace)])


def _first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, FarplugError) else f"{type(error).__name__}: {text}"


def start() -> None:
    """Log warnings to standard error. A second call replaces the handler of the first."""
    for handler in [handler for handler in LOGGER.handlers if isinstance(handler, _Handler)]:
        LOGGER.removeHandler(handler)
    handler = _Handler()
    handler.setFormatter(_Formatter())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.WARNING)


def debug(enabled: bool) -> None:
    """Log everything from now on, if ``enabled``."""
    if enabled:
        LOGGER.setLevel(logging.DEBUG)


def debugging() -> bool:
    """Return whether everything is logged."""
    return LOGGER.isEnabledFor(logging.DEBUG)


def traceback(error: BaseException | None) -> None:
    """Log the traceback of an internal error, with ``--debug``."""
    LOGGER.debug("internal error", exc_info=error)
