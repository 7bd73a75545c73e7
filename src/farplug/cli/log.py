"""Log to standard error: warnings; with ``--debug`` everything, including the traffic, one line per packet."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from farplug.errors import FarplugError, Remedy
from farplug.shell import shell_word
from farplug.text import printable

LOGGER = logging.getLogger("farplug")


def remedy_lines(remedy: str) -> list[str]:
    """Return the lines that show a remedy: its text, the option for its setting, its command.

    Control characters are replaced.
    """
    lines = remedy.split("\n") if len(remedy) else []
    if isinstance(remedy, Remedy) and remedy.setting:
        option = setting_option(remedy.setting, remedy.value)
        lines[-1:] = [f"{lines[-1]}: {option}" if lines else option]
    if isinstance(remedy, Remedy) and remedy.command:
        lines += [f"  {line}" if lines else line for line in remedy.command.split("\n")]
    return [printable(line) for line in lines]


_METAVARS = {"ca_file": "FILE", "password_file": "FILE", "host_subject": "SUBJECT", "usb_device": "DEVICE"}


def setting_option(setting: str, value: str | int | bool | None = None) -> str:
    """Return the option for a setting of :mod:`farplug.app.settings`, such as ``--ca-file FILE``."""
    option = f"--{setting.rpartition('.')[2].replace('_', '-')}"
    if value is None:
        metavar = _METAVARS.get(setting.rpartition(".")[2])
        return f"{option} {metavar}" if metavar else option
    return option if value is True else f"{option} {shell_word(str(value))}"


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
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


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
