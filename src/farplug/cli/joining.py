"""Commands that use a running session, or start one for a target, which ends with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from farplug.app.settings import GuestSettings, ReconnectSettings, TargetSettings
from farplug.cli import background, log, session_verbs
from farplug.cli.options import TargetOptions
from farplug.cli.output import PlainOutput
from farplug.errors import FarplugError, Reason
from farplug.transport import TARGET_FORMS


def is_target(text: str) -> bool:
    """Return whether a text is a target, not the name of a session. A running session with this name comes first."""
    from farplug.control.names import socket_path

    try:
        if socket_path(text).exists():
            return False
    except FarplugError:
        pass  # it is not a name
    return "://" in text or text.startswith("unix:") or text.endswith(".vv") or os.path.isfile(text)


def target_of(session: str | None, access: TargetOptions, needed: str) -> TargetSettings | None:
    """Return the target that ``--session``, or the argument in its place, names; None: it names a session, or nothing.

    Raises:
        UsageError: the password cannot be read, or an option for a target is given without one; ``needed`` names it.
    """
    if session is not None and is_target(session):
        return access.settings(session)
    access.check_unused(needed, f"write a target as one of {TARGET_FORMS}")
    return None


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
    log.say(f"farplug: connected to {target.public_target} as the session {name}, which ends with {purpose}")
    try:
        yield name
    finally:
        try:
            session_verbs.stop(name, PlainOutput(sys.stderr))
        except FarplugError as error:
            if error.reason is not Reason.NO_SESSION:  # it has ended already
                raise
