"""``.vv`` files: virt-manager, oVirt, Proxmox and kerbside make them to connect to a VM's SPICE server. No I/O.

Source: virt-viewer's ``virt-viewer-file.c``: a GKeyFile (GLib's ``gkeyfile.c``) with a group ``[virt-viewer]``. Keys
that do not concern the connection (except the title) are ignored, as is ``versions``, which lists versions of
virt-viewer itself. Every file that GKeyFile accepts is accepted; a value that GKeyFile cannot parse, and that
virt-viewer therefore ignores, is a warning.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Self

from farplug.errors import Reason, Remedy, UsageError
from farplug.spice.host import plain_host
from farplug.spice.types import CHANNEL_NAMES
from farplug.text import printable

MAX_VV_FILE = 1 << 20
"""The largest ``.vv`` file that we read, in bytes."""

_GROUP = "virt-viewer"
_BLANKS = " \t\f"
_INTEGER = re.compile(r"[ \t\f]*([+-]?[0-9]{1,9})(?![^ \t\f])")
_NEW_FILE = "get a new .vv file where you got this one"
_NEW_FILE_OF_RUNNING_VM = f"check that the VM runs, then {_NEW_FILE}"
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
    """The connection that a ``.vv`` file describes.

    Attributes:
        host: name or address; with a proxy, a name for the proxy.
        port: the plain port; None if there is none. At least one of the two ports is not None.
        tls_port: the TLS port; None if there is none.
        password: the ticket; empty if there is none.
        ca: certificates to trust, PEM; empty: the system's.
        host_subject: the certificate's subject, which is checked instead of the host name; empty: check the host name.
        proxy: URL of an HTTP proxy, which may contain a password; empty if there is none.
        title: the VM's name, for a window title.
        secure_channels: channels that must use TLS, by name in lower case, or ``all``.
        delete_this_file: delete the file after it was read.
        warnings: what was ignored in the file: one line of text each, with path and line number.
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
    warnings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> Self:
        """Parse a file's bytes.

        Args:
            data: the whole file.
            path: the file's, for messages.

        Raises:
            UsageError: the file is not a ``.vv`` file for SPICE, or a value in it is not valid.
        """
        values = _Values(path, data)
        kind = values.word("type")
        if not kind:
            raise values.error("it has no type=spice")
        if kind.lower() != "spice":
            raise values.error(
                f"type={kind[:40]} is not supported, only type=spice",
                values.line("type"),
                remedy="give the VM a SPICE display: VNC has no USB redirection",
            )
        host = plain_host(values.word("host"))
        if not host:
            raise values.error("it has no host", remedy=_NEW_FILE_OF_RUNNING_VM)
        port, tls_port = values.ports()
        return cls(
            host=host,
            port=port,
            tls_port=tls_port,
            password=values.text("password"),
            ca=values.text("ca"),
            host_subject=values.text("host-subject").rstrip(_BLANKS),
            proxy=values.text("proxy").rstrip(_BLANKS),
            title=values.title(),
            secure_channels=values.secure_channels(tls_port is not None),
            delete_this_file=values.flag("delete-this-file"),
            warnings=tuple(values.warnings),
        )


class _Values:
    """The keys of the group, with their line numbers. The last one of equal keys is used."""

    def __init__(self, path: str, data: bytes) -> None:
        self.warnings: list[str] = []
        self._path = path
        self._values: dict[str, tuple[int, str]] = {}
        if len(data) > MAX_VV_FILE:
            raise self._not_a_vv_file(f"it is larger than {MAX_VV_FILE} bytes")
        if b"\0" in data:
            raise self._not_a_vv_file("it is not text in UTF-8: it contains NUL characters")
        if not data.strip():
            raise self.error("it is empty")
        self._read(data.decode("utf-8-sig", "surrogateescape"))

    def line(self, key: str) -> int:
        """Return the number of a value's line; 0 if there is no value."""
        return self._values.get(key, (0, ""))[0]

    def text(self, key: str) -> str:
        """Return a value without escapes; empty if the key is missing."""
        line, text = self._values.get(key, (0, ""))
        if re.search("[\udc80-\udcff]", text):
            raise self.error(f"{key} is not text in UTF-8", line)
        return text

    def word(self, key: str) -> str:
        """Return a value for messages: without control characters, and without blanks at the end."""
        text = self.text(key).rstrip(_BLANKS)
        if not text.isprintable():
            raise self.error(f"{key} contains control characters", self.line(key))
        return text

    def title(self) -> str:
        """Return the title; bytes that are not UTF-8 are replaced."""
        text = self._values.get("title", (0, ""))[1]
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def ports(self) -> tuple[int | None, int | None]:
        """Return ``port`` and ``tls-port``; None for a port that is missing, or is 0 or -1 (libvirt's "none").

        If one port is valid, an invalid value of the other one is ignored: portals write ``port=None``.
        """
        ports: dict[str, int | None] = {}
        wrong: list[str] = []
        for key in ("port", "tls-port"):
            number = self._integer(key)
            if number is None and self.text(key).strip(_BLANKS):
                wrong.append(key)
            ports[key] = number if number is not None and number > 0 else None
        usable = any(port is not None for port in ports.values())
        for key in wrong:
            what = f"{key}={printable(self.text(key), 40)} is not a port number from 1 to 65535"
            if not usable:
                raise self.error(what, self.line(key), _NEW_FILE_OF_RUNNING_VM)
            self._warn(f"{what}: ignored", self.line(key))
        if not usable:
            raise self.error("it has neither port nor tls-port", remedy=_NEW_FILE_OF_RUNNING_VM)
        return ports["port"], ports["tls-port"]

    def flag(self, key: str) -> bool:
        """Return whether a number is not 0; a value that is not a number is ignored."""
        number = self._integer(key)
        if number is None and self.text(key):
            self._warn(f"{key}={printable(self.text(key), 40)} is neither 0 nor 1: ignored", self.line(key))
        return bool(number)

    def secure_channels(self, has_tls: bool) -> frozenset[str]:
        """Return names of channels, in lower case.

        An unknown name may be a misspelt ``main`` or ``usbredir``: all channels use TLS then, if there is a TLS port.
        """
        key = "secure-channels"
        names = {name.lower() for name in re.split(r"[;,\s]+", self.text(key)) if name}
        unknown = names - CHANNEL_NAMES
        if unknown:
            shown = ", ".join(repr(name[:40]) for name in sorted(unknown)[:8])
            instead = ": all channels use TLS" if has_tls else ": ignored"
            self._warn(f"{key} has unknown channels ({shown}){instead}", self.line(key))
        return frozenset(names - unknown | ({"all"} if unknown and has_tls else set()))

    def error(self, what: str, line: int = 0, remedy: str = "") -> UsageError:
        """Return an error about the file, or about a line of it."""
        return UsageError(f"{self._where(line)}: {what}", reason=Reason.BAD_VV_FILE, remedy=remedy or _NEW_FILE)

    def _not_a_vv_file(self, what: str, line: int = 0) -> UsageError:
        """Return an error about a file that is something else. Without the name of a .vv file it may be an image."""
        remedy = _NEW_FILE
        name = self._path.lower()
        if not name.endswith(".vv"):
            option = "usb_cdrom" if name.endswith(".iso") else "usb_disk"
            remedy = Remedy("name the VM as the target; to plug this file in", setting=option, value=self._path)
        return self.error(f"{what}: this is not a .vv file", line, remedy)

    def _warn(self, what: str, line: int) -> None:
        self.warnings.append(f"{self._where(line)}: {what}")

    def _where(self, line: int) -> str:
        return f"{self._path}, line {line}" if line else self._path

    def _integer(self, key: str) -> int | None:
        """Parse a number like GKeyFile, which ignores text after a blank; None for anything else.

        Numbers above 65535 are not valid in any key: None.
        """
        match = _INTEGER.match(self.text(key))
        if match is None or int(match[1]) > 65535:
            return None
        return int(match[1])

    def _read(self, text: str) -> None:
        group = None
        found = False
        for number, raw in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
            line = raw.lstrip(_BLANKS)
            if not line or line.startswith("#"):
                continue
            if line.startswith("["):
                name = line.rstrip(_BLANKS)
                if not name.endswith("]"):
                    raise self.error("the group's name has no closing bracket", number)
                group = name[1:-1]
                found = found or group == _GROUP
                continue
            if group is None:
                raise self._not_a_vv_file("text before the first group", number)
            if group != _GROUP:
                continue
            key, equals, value = line.partition("=")
            if not equals:
                raise self.error("the line has no '='", number)
            if (key := key.rstrip(_BLANKS)) in _KEYS:
                # GKeyFile's escapes. An unknown one is not changed: `\\,` in host-subject, for example.
                value = re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), value.lstrip(_BLANKS))
                self._values[key] = (number, value)
        if not found:
            raise self._not_a_vv_file(f"it has no group [{_GROUP}]")
