"""For all tests."""

from __future__ import annotations

import os
import signal


def pytest_configure() -> None:
    """The same tests, whoever starts them."""
    # In the background, or with nohup, these are ignored; what the tests start would ignore them, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # With one of these pytest writes out the whole difference of two byte strings: minutes, if they are images.
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)
