"""``.vv`` files: what virt-manager, oVirt, Proxmox and kerbside hand out to reach a VM's SPICE server. No I/O.

Source: virt-viewer's ``virt-viewer-file.c``: a GKeyFile with a group ``[virt-viewer]``. Keys that do not concern the
connection (window titles aside) are ignored, as is ``versions``, which names versions of virt-viewer itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Self

from farplug.errors import Reason, UsageError
from farplug.spice.types import CHANNEL_NAMES

MAX_VV_FILE = 1 << 20
"""The largest ``.vv`` file that we read, in bytes."""

_GROUP = "virt-viewer"
_ESCAPES = {"s": " ", "n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_KEYS = frozenset(
    {
        "type",
        "host",
        "port",
        "tls-port",
        "password",
        "ca",
        "host-subject",
        "proxy",
        "title",
        "delete-this-file",
        "secure-channels",
    }
)


@dataclass(frozen=True, slots=True)
class VvFile:
    """What a ``.vv`` file says about the connection.

    Attributes:
        host: name or address; behind a proxy, whatever the proxy understands.
        port: the plain port; None if there is none. At least one of the two ports is there.
        tls_port: the TLS port; None if there is none.
        password: the ticket; empty if there is none.
        ca: certificates to trust, PEM; empty: the system's.
        host_subject: the certificate's subject, to be checked instead of the host name; empty: the host name is.
        proxy: URL of an HTTP proxy; empty if there is none. May hold a password.
        title: how the sender calls the VM.
        secure_channels: channels that must use TLS, by name in lower case, or ``all``.
        delete_this_file: the file is to be deleted once it is read.
    """

    host: str
    port: int | None = None
    tls_port: int | None = None
    password: str = field(default="", repr=False)
    ca: str = field(default="", repr=False)
    host_subject: str = ""
    proxy: str = field(default="", repr=False)
    title: str = ""
    secure_channels: frozenset[str] = frozenset()
    delete_this_file: bool = False

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Self:
        """Parse a file's bytes.

        Args:
            data: the whole file.
            path: the file's, for messages.

        Raises:
            UsageError: it is no ``.vv`` file for SPICE, or a value in it is wrong.
        """
        values = _Values(path, data)
        kind = values.word("type")
        if kind != "spice":
            raise values.error(
                f"type={kind} is not supported, only type=spice" if kind else "it has no type=spice",
                remedy="give the VM a SPICE display: VNC carries no USB devices",
            )
        host = values.word("host")
        port, tls_port = values.port("port"), values.port("tls-port")
        if not host:
            raise values.error("it has no host", remedy="is the VM running? Fetch a new .vv file while it runs")
        if port is None and tls_port is None:
            raise values.error("it has neither port nor tls-port", remedy="is the VM running? Fetch a new .vv file")
        return cls(
            host=host,
            port=port,
            tls_port=tls_port,
            password=values.text("password"),
            ca=values.text("ca"),
            host_subject=values.text("host-subject"),
            proxy=values.text("proxy"),
            title=values.text("title"),
            secure_channels=values.channels("secure-channels"),
            delete_this_file=values.flag("delete-this-file"),
        )


class _Values:
    """The group's keys, with the line of each."""

    def __init__(self, path: str, data: bytes) -> None:
        self._path = path
        self._values: dict[str, tuple[int, str]] = {}
        if len(data) > MAX_VV_FILE:
            raise self.error(f"it is larger than {MAX_VV_FILE} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.error(f"it is not text: byte {error.start} is not UTF-8") from None
        if "\0" in text:
            raise self.error("it is not text: it holds NUL characters")
        self._read(text)

    def text(self, key: str) -> str:
        """A value, its escapes resolved; empty if it is not there."""
        return self._values.get(key, (0, ""))[1]

    def word(self, key: str) -> str:
        """A value that messages show: without control characters."""
        line, text = self._values.get(key, (0, ""))
        if not text.isprintable():
            raise self.error(f"{key} holds control characters", line)
        return text

    def port(self, key: str) -> int | None:
        """A port; None if it is not there, or 0 or -1, by which libvirt means "none"."""
        line, text = self._values.get(key, (0, ""))
        if text in ("", "0", "-1"):
            return None
        if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
            raise self.error(f"{key}={text[:40]} is no port from 1 to 65535", line)
        return int(text)

    def flag(self, key: str) -> bool:
        """0 or 1."""
        line, text = self._values.get(key, (0, ""))
        if text not in ("", "0", "1"):
            raise self.error(f"{key}={text[:40]} is neither 0 nor 1", line)
        return text == "1"

    def channels(self, key: str) -> frozenset[str]:
        """Names of channels, in lower case. An unknown one is refused: what it secures would go without TLS."""
        line, text = self._values.get(key, (0, ""))
        names = [name.lower() for name in re.split(r"[;,\s]+", text) if name]
        for name in names:
            if name not in CHANNEL_NAMES:
                known = ", ".join(sorted(CHANNEL_NAMES))
                raise self.error(f"{key} has a channel {name[:40]!r}", line, f"the channels are {known}")
        return frozenset(names)

    def error(self, what: str, line: int = 0, remedy: str = "") -> UsageError:
        where = f"{self._path}, line {line}" if line else self._path
        return UsageError(f"{where}: {what}", reason=Reason.BAD_VV_FILE, remedy=remedy)

    def _read(self, text: str) -> None:
        group = None
        found = False
        for number, raw in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
            line = raw.strip(" \t")
            if not line or line.startswith("#"):
                continue
            if line.startswith("["):
                if not line.endswith("]"):
                    raise self.error("a group without its closing bracket", number)
                group = line[1:-1]
                found = found or group == _GROUP
                continue
            if group is None:
                raise self.error("a line before the first group: this is no .vv file", number)
            if group != _GROUP:
                continue
            key, equals, value = line.partition("=")
            key = key.rstrip(" \t")
            if not equals:
                raise self.error("a line without '='", number)
            if key in _KEYS:
                self._set(key, value.lstrip(" \t"), number)
        if not found:
            raise self.error(f"it has no group [{_GROUP}]: this is no .vv file")

    def _set(self, key: str, raw: str, number: int) -> None:
        # GKeyFile's escapes. An unknown one is kept as it is: `\,` in host-subject, for example.
        value = re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), raw)
        before = self._values.get(key)
        if before is not None and before[1] != value:
            raise self.error(f"{key} again, with another value than in line {before[0]}", number)
        self._values[key] = (number, value)
