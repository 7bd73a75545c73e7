"""What a browser may ask for: the methods of the page and of sessions, by role, and the paths in their parameters.

A method that is not listed here is refused, so that a new method of sessions with a path in it is not passed on
unchecked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from farplug.errors import Reason, UsageError
from farplug.text import shown
from farplug.web.security import Role

BROWSER_FILE: Final = "client:"
"""Begins the path of a file that the browser offers with ``media-offer``."""
MAX_SOURCES: Final = 1000
"""Sources of one ``attach``."""

HELLO: Final = "hello"
OWN: Final = (
    *("hello", "sessions", "watch-sessions", "unwatch-sessions", "open", "close", "files", "remove-upload", "command"),
)
"""The methods of the web server itself."""
VIEW: Final = frozenset(
    {
        *("hello", "sessions", "watch-sessions", "unwatch-sessions", "open", "close"),
        *("subscribe", "unsubscribe", "status", "layouts"),
        *("watch-screen", "unwatch-screen", "screen-ack"),
    }
)
"""The methods of :attr:`Role.VIEW`. ``list`` is not among them: it shows the drives to everybody."""
RELAYED: Final = frozenset(
    {
        *("subscribe", "unsubscribe", "status", "list", "layouts", "check-text", "devices"),
        *("watch-screen", "unwatch-screen", "screen-ack", "screen-text"),
        *("attach", "detach", "insert", "eject", "capture", "stop-capture", "reconnect", "quit"),
        *("drive", "key", "keys-up", "pointer", "type", "stop-typing", "press", "click", "presence"),
        *("media-offer", "media-data", "media-withdraw"),
        *("serial-open", "serial-write", "serial-ack", "serial-close"),
    }
)
"""The methods that are passed on to the session."""
WITH_PATHS: Final = frozenset({"attach", "insert", "capture"})
"""The methods whose parameters have paths of this machine."""

OF_FILES: Final = ("disk", "read-only-disk", "cdrom", "folder", "fido", "camera")
"""Kinds of sources whose path is that of a file or a folder."""
OF_BROWSER: Final = ("read-only-disk", "cdrom")
"""Kinds that a file of the browser can become."""
WITHOUT_FILES: Final = ("usb-device", "keyboard", "tablet", "mouse", "touchscreen", "gamepad")
"""Kinds that need no file of this machine."""
NEW_FILES: Final = ("fido",)
"""Kinds whose file is made if it does not exist."""
OF_ENDS: Final = {"serial": ("client", "pty")}
"""Kinds with an end on this machine, and the ends that a browser may choose, character by character.

``client`` leads to the clients of the session, browsers with all rights among them. ``pty`` is a new terminal, which
only this user and root can open: the browser names no file and no socket, and until a program of this user opens the
terminal, it leads nowhere. All other ends are files, sockets and ports of this machine.
"""
NOT_FROM_BROWSERS: Final = ("network", "remote-device")
"""Kinds that no browser may choose.

The ends of a network adapter are sockets and interfaces of this machine; ``passt``, which names none, would bring the
VM into every network that this user reaches: a right that the link of a page does not give, and that a VM without a
network must not get from it. A remote device is a connection to a machine of the browser's choice.
"""
TEST_PICTURE: Final = ("camera", "pattern")
"""The kind and the path of a camera that shows no file."""
_FROM_THE_COMMAND_LINE: Final = "plug it in from the command line of this machine"
_KINDS: Final = (*OF_FILES, *WITHOUT_FILES, *OF_ENDS)


class Places(Protocol):
    """The files of this machine that a browser may name."""

    def existing(self, path: str) -> str:
        """Return the absolute path of a file or a folder that a browser named.

        Raises:
            UsageError: the browser may not use it, or it does not exist.
        """
        ...

    def new(self, path: str) -> str:
        """Return the absolute path of a file that may not exist yet.

        Raises:
            UsageError: the browser may not make it.
        """
        ...


def methods(role: Role) -> list[str]:
    """Return the names of the methods of a role, sorted."""
    return sorted(VIEW if role is Role.VIEW else {*OWN, *RELAYED})


def check(role: Role, method: str) -> None:
    """Check that a method exists, and that a role may use it.

    Raises:
        UsageError: ``unknown-command`` or ``view-only``.
    """
    if method not in OWN and method not in RELAYED:
        raise UsageError(
            f"{shown(method)} is not a method of the page",
            reason=Reason.UNKNOWN_COMMAND,
            remedy=f"methods: {', '.join(methods(role))}",
        )
    if role is Role.VIEW and method not in VIEW:
        raise UsageError(
            "this link only lets you watch",
            reason=Reason.VIEW_ONLY,
            remedy="to drive, you need a link with all rights from the person who gave you this one",
        )


def with_absolute_paths(method: str, params: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Return the parameters of a method with absolute paths, all of them checked. It reads the file system.

    Raises:
        UsageError: a path is not one that the browser may use, or a source is not valid.
    """
    changed = dict(params)
    match method:
        case "attach":
            sources = changed.get("sources", [])
            if not isinstance(sources, list) or len(sources) > MAX_SOURCES:
                raise _bad("sources", sources, f"an array of at most {MAX_SOURCES} items")
            changed["sources"] = [_source(source, places) for source in sources]
        case "insert":
            path = _text(changed, "path")
            if not path.startswith(BROWSER_FILE):
                changed["path"] = places.existing(path)
        case "capture":
            changed["path"] = places.new(_text(changed, "path"))
    return changed


def _source(source: object, places: Places) -> dict[str, Any]:
    if not isinstance(source, dict):
        raise _bad("sources", source, "an object")
    kind = source.get("kind")
    if kind in NOT_FROM_BROWSERS:
        raise UsageError(
            f"a page plugs in no {kind}: its other end would be a socket or a network of this machine",
            reason=Reason.BAD_SETTING,
            remedy=_FROM_THE_COMMAND_LINE,
        )
    if kind not in _KINDS:
        raise _bad("kind", kind, f"one of {', '.join(_KINDS)}")
    changed = dict(source)
    if kind in OF_ENDS and source.get("path") not in OF_ENDS[kind]:
        raise UsageError(
            f"a page plugs in a {kind} with the end {' or '.join(OF_ENDS[kind])} only:"
            " others are files, sockets and ports of this machine",
            reason=Reason.BAD_SETTING,
            remedy=_FROM_THE_COMMAND_LINE,
        )
    if kind in OF_FILES and (kind, source.get("path")) != TEST_PICTURE:
        path = _text(source, "path")
        if not path.startswith(BROWSER_FILE):
            changed["path"] = places.new(path) if kind in NEW_FILES else places.existing(path)
        elif kind not in OF_BROWSER:
            raise UsageError(
                f"a file of the browser can only be read, and a {kind} needs more",
                reason=Reason.BAD_SETTING,
                remedy="plug it in as a CD-ROM or as a read-only disk, or upload it first",
            )
    if source.get("snapshot") is not None:
        if kind != "disk":
            raise UsageError(f"snapshot: a {kind} has none", reason=Reason.BAD_SETTING)
        changed["snapshot"] = places.new(_text(source, "snapshot"))
    return changed


def _text(params: Mapping[str, Any], name: str) -> str:
    value = params.get(name)
    if isinstance(value, str) and value:
        return value
    raise _bad(name, value, "a path")


def _bad(name: str, value: object, expected: str) -> UsageError:
    return UsageError(f"{name}: {shown(value)} is not {expected}", reason=Reason.BAD_SETTING)
