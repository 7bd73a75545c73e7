"""Commands that use a running session, or start one for a target, which ends with them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from farplug.app.settings import GuestSettings, ReconnectSettings, TargetSettings
from farplug.cli import background, log, session_verbs
from farplug.cli.output import PlainOutput
from farplug.errors import FarplugError, Reason


@contextmanager
def own_session(target: TargetSettings, purpose: str, *, debug: bool) -> Iterator[str]:
    """Return a context manager that starts a session of a target, and stops it; it returns the name.

    Args:
        target: where the VM is.
        purpose: with what the session ends, for people.
        debug: log everything.

    Raises:
        FarplugError: the session cannot be started.
    """
    settings = GuestSettings(target, stay=True, reconnect=ReconnectSettings())
    name = background.start(background.Request(settings, debug=debug)).name
    log.say(f"note: connected to {target.public_target} as the session {name}, which ends with {purpose}")
    try:
        yield name
    finally:
        try:
            session_verbs.stop(name, PlainOutput(sys.stderr))
        except FarplugError as error:
            if error.reason is not Reason.NO_SESSION:  # it has ended already
                raise
