"""For all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Whoever starts the tests in the background, or with nohup, has these ignored; what the tests start would, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
