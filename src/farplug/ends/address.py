"""The text of an end -> an end."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Final

from farplug.ends.base import End
from farplug.errors import Reason, SetupError, UsageError
from farplug.spice.host import split_host_and_port

SERIAL_ENDS: Final = (
    "pty, pty:LINK, -, client, tcp-listen://host:port, tcp://host:port, unix-listen:/path, unix:/path or file:/path"
)
"""The forms of the end of a serial line, for messages and help."""

NETWORK_ENDS: Final = "passt, unix:/path, unix-listen:/path, tcp://host:port, tcp-listen://host:port or tap:NAME"
"""The forms of the end of a network adapter, for messages and help."""

MAX_UNIX_PATH: Final = 103
"""Bytes in the path of a UNIX socket, at most, on every system."""

_LOOPBACK: Final = "127.0.0.1"


def parse_serial_end(text: str) -> End:
    """Return the end of a serial line that a text describes. Nothing is opened.

    Args:
        text: one of :data:`SERIAL_ENDS`.

    Raises:
        UsageError: ``bad-option``: the text has none of these forms.
        SetupError: ``unsupported-system``: this system has no such ends.
    """
    from farplug.ends import client, file, pty, stdio

    scheme, _, rest = text.partition(":")
    _check_system(text, scheme)
    match scheme:
        case "-" if text == "-":
            return stdio.StdioEnd()
        case "client" if text == "client":
            return client.ClientEnd()
        case "pty":
            if text == "pty:":
                raise _bad(text, "the path of the link is missing")
            return pty.PtyEnd(Path(rest) if rest else None)
        case "file":
            if not rest:
                raise _bad(text, "the path is missing")
            return file.FileEnd(Path(rest), text)
    end = _socket_end(text, scheme, rest, frames=False)
    if end is None:
        raise _bad(text, f"write it as {SERIAL_ENDS}")
    return end


def parse_network_end(text: str) -> End:
    """Return the end of a network adapter that a text describes. Nothing is opened.

    Args:
        text: one of :data:`NETWORK_ENDS`.

    Raises:
        UsageError: ``bad-option``: the text has none of these forms.
        SetupError: ``unsupported-system``: this system has no such ends.
    """
    from farplug.ends import passt, tap

    scheme, colon, rest = text.partition(":")
    _check_system(text, scheme)
    match scheme:
        case "passt":
            try:
                arguments = tuple(shlex.split(rest)) if colon else passt.DEFAULT_ARGUMENTS
            except ValueError as error:
                raise _bad(text, str(error).lower()) from None
            return passt.PasstEnd(arguments)
        case "tap":
            if not rest or len(os.fsencode(rest)) > tap.MAX_NAME or re.search(r"[\x00-\x20/%:]", rest):
                raise _bad(text, f"the name of an interface has 1 to {tap.MAX_NAME} letters and digits")
            return tap.TapEnd(rest, text)
    end = _socket_end(text, scheme, rest, frames=True)
    if end is None:
        raise _bad(text, f"write it as {NETWORK_ENDS}")
    return end


def _socket_end(text: str, scheme: str, rest: str, *, frames: bool) -> End | None:
    from farplug.ends import sockets
    from farplug.ends.frames import FramePeer

    peer: sockets.PeerType = FramePeer if frames else sockets.SocketPeer
    match scheme:
        case "tcp":
            return sockets.TcpEnd(*_host_and_port(text, rest), text, peer)
        case "tcp-listen":
            return sockets.TcpListenEnd(*_host_and_port(text, rest, listen=True), text, peer)
        case "unix":
            return sockets.UnixEnd(_unix_path(text, rest), text, peer)
        case "unix-listen":
            return sockets.UnixListenEnd(_unix_path(text, rest), text, peer)
    return None


def _check_system(text: str, scheme: str) -> None:
    if sys.platform == "win32" and scheme in ("pty", "unix", "unix-listen", "passt", "tap"):
        raise SetupError(f"{text}: Windows, or Python there, has no such ends", reason=Reason.UNSUPPORTED_SYSTEM)


def absolute(text: str) -> str:
    """Return the text of an end with an absolute path, if it has one, for a process with another working directory."""
    scheme, _, rest = text.partition(":")
    if scheme in ("pty", "unix", "unix-listen", "file") and rest and not rest.startswith("//"):
        return f"{scheme}:{os.path.abspath(rest)}"
    return text


def _bad(text: str, what: str) -> UsageError:
    return UsageError(f"{text[:200]!r} is not a valid end: {what}", reason=Reason.BAD_OPTION)


def _host_and_port(text: str, rest: str, *, listen: bool = False) -> tuple[str, int]:
    if not rest.startswith("//") or re.search(r"[\x00-\x20\x7f/?#@]", rest[2:]):
        raise _bad(text, f"write it as {text.partition(':')[0]}://host:port")
    try:
        host, port = split_host_and_port(rest[2:], port_required=True)
    except ValueError as error:
        raise _bad(text, str(error)) from None
    if port is None:
        raise _bad(text, "it has no port")
    if not listen and (not host or not port):
        raise _bad(text, "it has no host" if not host else "a port is a number from 1 to 65535")
    return host or _LOOPBACK, port


def _unix_path(text: str, rest: str) -> str:
    path = "/" + rest.lstrip("/") if rest.startswith("//") else rest
    if not path or path == "/":
        raise _bad(text, f"it has no path: write it as {text.partition(':')[0]}:/path")
    if len(os.fsencode(path)) > MAX_UNIX_PATH or "\0" in path:
        raise _bad(text, f"the path of a UNIX socket has at most {MAX_UNIX_PATH} bytes, and no NUL character")
    return path
