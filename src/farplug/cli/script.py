"""Where the command ``farplug`` begins: until all is imported, Ctrl-C ends it as it ends a program in C."""

from __future__ import annotations

import signal

_CTRL_C = signal.getsignal(signal.SIGINT)
if _CTRL_C is signal.default_int_handler:  # not where the shell has it ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Run the command ``farplug``."""
    from farplug.cli.main import main

    signal.signal(signal.SIGINT, _CTRL_C)
    main()
