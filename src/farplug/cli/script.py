"""Where the command ``farplug`` begins: until it can report errors, Ctrl-C ends it as it ends a program in C."""

from __future__ import annotations

import os
import signal
import sys

from farplug.version import __version__

_CTRL_C = signal.getsignal(signal.SIGINT)
if _CTRL_C is signal.default_int_handler:  # not where the shell has it ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Run the command ``farplug``."""
    if sys.argv[1:] == ["--version"] and _print_version():
        return
    from farplug.cli.main import main

    signal.signal(signal.SIGINT, _CTRL_C)
    main()


def _print_version() -> bool:
    """Print the version without importing the command line, and return whether that succeeded.

    If it failed, the command line does it again, and reports the failure.
    """
    try:
        os.write(1, f"farplug {__version__}\n".encode())
    except OSError:
        return False
    return True
