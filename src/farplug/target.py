"""Targets: the text forms of a VM's address.

======================================  =============================================================================
``spice://[:password@]host:port``       a SPICE server, without TLS
``spice://host?port=P&tls-port=T``      the same with both ports, as remote-viewer writes it (``password=`` too): TLS
``spice+tls://[:password@]host:port``   a SPICE server's TLS port
``spice+unix:///path``                  a SPICE server on a UNIX socket; never with TLS
``path.vv``                             a file from virt-manager, oVirt, Proxmox or kerbside
``tcp://host:port``                     a usbredir chardev that listens (QEMU ``-chardev socket,server=on``, KubeVirt)
``tcp-listen://[host]:port``            we listen, QEMU connects (``-chardev socket,reconnect=1``)
``usbip-listen://[host]:port``          we serve devices to USB/IP clients, such as Linux's ``usbip attach``
``kubevirt://[CONTEXT/]NAMESPACE/VM``   a VM of KubeVirt, through the Kubernetes API; CONTEXT is one of the kubeconfig
``unix:/path``                          a usbredir chardev on a UNIX socket
======================================  =============================================================================

An IPv6 address has brackets: ``tcp://[::1]:4000``, with a zone ``tcp://[fe80::1%eth0]:4000``. Brackets are optional if
only one interpretation is possible.

A password before the ``@`` may contain any character but ``?``, which starts the query; a password in the query any
character but ``&``. Write ``%3F`` and ``%26`` for these; a plus sign is a plus sign.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import unquote

from farplug.errors import Reason, Remedy, TargetError, UsageError, from_oserror
from farplug.shell import shell_word
from farplug.spice.host import split_host_and_port
from farplug.spice.vv import VvFile
from farplug.transport import TARGET_FORMS
from farplug.transport.connection import CurrentWire, TcpAddress, Timeouts, UnixAddress, untapped
from farplug.transport.kubevirt_target import KubevirtTarget
from farplug.transport.session import Session
from farplug.transport.spice_target import Progress, SpiceTarget, Stage
from farplug.transport.stream import ListenPort, SocketSession, StreamPort
from farplug.transport.vv_file import delete_vv_file, read_vv_file

if TYPE_CHECKING:
    from farplug.transport.usbip_session import Note

LOOPBACK = "127.0.0.1"
SPICE_PORT = 5900
"""The port of a suggestion: the first port of QEMU and libvirt."""
MAX_CONTEXT = 1024
"""The most characters of a context of a kubeconfig."""
_LABEL = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""The name of a namespace (RFC 1123, a label)."""
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
"""The name of a VM (RFC 1123, a subdomain)."""
MAX_CA_FILE = 1 << 20
"""The largest file of certificates that we read, in bytes."""


@dataclass(frozen=True, slots=True)
class StreamTarget:
    """A usbredir chardev to which we connect."""

    address: TcpAddress | UnixAddress

    def __str__(self) -> str:
        return str(self.address)


@dataclass(frozen=True, slots=True)
class ListenTarget:
    """An address on which we wait for QEMU to connect."""

    address: TcpAddress

    def __str__(self) -> str:
        return f"tcp-listen://{self.address}"


@dataclass(frozen=True, slots=True)
class UsbipTarget:
    """An address on which we serve devices to USB/IP clients."""

    address: TcpAddress

    def __str__(self) -> str:
        return f"usbip-listen://{self.address}"


Target: TypeAlias = SpiceTarget | StreamTarget | ListenTarget | UsbipTarget | KubevirtTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """Settings of a SPICE target beside its text. Except for ``fallback_password``, they override the target's own.

    Attributes:
        password: the SPICE ticket.
        fallback_password: the ticket if neither ``password`` nor the target has one; ignored for a plain socket, and
            for a ``.vv`` file, which may name any server.
        ca_file: certificates to trust, PEM; only for a target with a TLS port.
        host_subject: the certificate's subject, which is checked instead of the host name; only for a target with a
            TLS port.
        proxy: URL of an HTTP proxy; only for a target with a host.
        allow_plain: use the plain port although the target demands TLS, see :class:`SpiceTarget`.
    """

    password: str | None = field(default=None, repr=False)
    fallback_password: str = field(default="", repr=False)
    ca_file: Path | None = None
    host_subject: str | None = None
    proxy: str | None = field(default=None, repr=False)
    allow_plain: bool = False


def parse_target(text: str, options: TargetOptions = TargetOptions(), *, keep_file: bool = False) -> Target:
    """Parse a target. A ``.vv`` file is read, and deleted if it has ``delete-this-file=1`` and everything is valid.

    Args:
        text: the target.
        options: what the user gives beside it.
        keep_file: do not delete a ``.vv`` file.

    Raises:
        UsageError: the target, the file or an option is not valid (``BAD_TARGET``, ``BAD_VV_FILE``, ``BAD_OPTION``).
    """
    scheme, separator, rest = text.partition(":")
    if not separator or scheme not in _STREAMS:
        return _spice_target(text, scheme if separator else "", rest, options, keep_file)
    given = (options.password, options.ca_file, options.host_subject, options.proxy, options.allow_plain or None)
    if any(value is not None for value in given):
        kind = "a VM of KubeVirt" if scheme == "kubevirt" else "a plain socket"
        raise UsageError(
            f"{_shown(text)} is {kind}: passwords, proxies and settings of TLS are for SPICE targets",
            reason=Reason.BAD_OPTION,
        )
    match scheme:
        case "tcp":
            return StreamTarget(_tcp(text, scheme, rest))
        case "tcp-listen":
            return ListenTarget(_tcp(text, scheme, rest, listen=True))
        case "usbip-listen":
            return UsbipTarget(_tcp(text, scheme, rest, listen=True))
        case "kubevirt":
            return _kubevirt(text, rest)
    return StreamTarget(UnixAddress(_path(text, rest)))


def parse_vv(data: bytes, options: TargetOptions = TargetOptions()) -> SpiceTarget:
    """Parse the contents of a ``.vv`` file that a command printed.

    Raises:
        TargetError: ``target-command``: it is malformed; a later attempt may give a valid one.
        UsageError: an option is not valid.
    """
    try:
        vv = VvFile.parse(data, path="the output of the target command")
        return _of_vv_file(vv, options)
    except UsageError as error:
        if error.reason is not Reason.BAD_VV_FILE:
            raise
        raise TargetError(error.message, reason=Reason.TARGET_COMMAND, remedy=error.remedy) from error


async def open_session(
    target: Target,
    progress: Progress | None = None,
    *,
    wire: CurrentWire = untapped,
    note: Note = lambda text: None,
) -> Session:
    """Connect to the VM of a target. A plain socket is connected when its port is opened.

    Only what connects to this kind of target is imported: SPICE, USB/IP and KubeVirt are large imports.

    Args:
        target: see :func:`parse_target`.
        progress: called at the start of each stage, with its address.
        wire: taps the connections that are made, now or later.
        note: called with what users may want to know: USB/IP clients that come and go.

    Raises:
        TargetError: the VM cannot be reached; the reason says at which stage.
    """
    match target:
        case StreamTarget(address):
            if progress is not None:
                progress(Stage.REACH, str(address))
            return SocketSession(StreamPort(address, wire=wire))
        case ListenTarget(address):

            def listening(where: TcpAddress) -> None:
                if progress is not None:
                    progress(Stage.LISTEN, f"listening on {where}: waiting for QEMU to connect")

            return SocketSession(ListenPort(address, on_listening=listening, wire=wire))
        case UsbipTarget(address):
            from farplug.transport.usbip_session import UsbipSession

            return await UsbipSession.listen(address, note, wire=wire)
        case KubevirtTarget():
            from farplug.transport.kubevirt import KubevirtSession

            return await KubevirtSession.connect(target, progress, wire=wire)
        case _:
            from farplug.transport.spice_session import SpiceSession

            return await SpiceSession.connect(target, progress=progress, wire=wire)


_STREAMS = ("tcp", "tcp-listen", "unix", "usbip-listen", "kubevirt")


def _spice_target(text: str, scheme: str, rest: str, options: TargetOptions, keep_file: bool) -> SpiceTarget:
    match scheme:
        case "spice" | "spice+tls":
            return _with_options(_spice(text, tls=scheme.endswith("tls")), options)
        case "spice+unix":
            if "?password=" in rest:
                remedy = Remedy("give it separately", setting="target.password")
                raise _bad(text, "the path of a socket has no password", remedy)
            return _with_options(SpiceTarget(unix_path=_path(text, rest)), options)
    if not text.lower().endswith(".vv") and not os.path.isfile(text):
        raise _no_scheme(text)
    vv = read_vv_file(Path(text))
    target = _of_vv_file(vv, options)
    if vv.delete_this_file and not keep_file:
        from farplug.transport.dialer import ChannelDialer

        ChannelDialer(target, Timeouts())  # raises UsageError for a malformed proxy, subject or CA
        delete_vv_file(Path(text))
    return target


def _of_vv_file(vv: VvFile, options: TargetOptions) -> SpiceTarget:
    """Return the target of a ``.vv`` file. The file may name any server, which gets no fallback password."""
    return _with_options(SpiceTarget.from_vv(vv), replace(options, fallback_password=""))


def _no_scheme(text: str) -> UsageError:
    """Return the error for a target without a scheme: most often a host with or without a port."""
    if re.fullmatch(r"[\w.:\[\]-]{1,255}", text, re.ASCII):
        try:
            host, port = split_host_and_port(text, port_required=False)
        except ValueError:
            host, port = "", None
        if host:
            guess = f"spice://{TcpAddress(host, port or SPICE_PORT)}"
            return _bad(text, f"write it as {guess}", remedy=f"other forms: {TARGET_FORMS}")
    return _bad(text, f"write it as {TARGET_FORMS}")


def _bad(text: str, what: str, remedy: str = "") -> UsageError:
    return UsageError(f"{_shown(text)!r} is not a valid target: {what}", reason=Reason.BAD_TARGET, remedy=remedy)


def _shown(text: str) -> str:
    """Return a target for a message: without a password, or text that may be meant as a password."""
    head = re.split("[?&;]", text, maxsplit=1)[0]
    if "@" in text[len(head) :]:
        return f"{head.partition(':')[0][:20]}:…"
    return head.rpartition("@")[2][:200]


def _spice(text: str, *, tls: bool) -> SpiceTarget:
    if "://" not in text:
        raise _bad(text, f"write it as {text.partition(':')[0]}://host:port")
    # The password may contain "@", "/" and "#", too: it is removed before the rest is parsed as a URL.
    authority, _, query = text.partition("://")[2].partition("?")
    user, at, address = authority.rpartition("@")
    name, colon, secret = user.partition(":")
    if at and (name or not colon):
        raise _bad(text, f"write a password as {text.partition(':')[0]}://:password@host:port")
    host, port = _host_and_port(text, address, port_required=not re.search("(?:^|&)(?:tls-)?port=", query))
    if not host:
        raise _bad(text, "it has no host")
    if port == 0:
        raise _bad(text, "a port is a number from 1 to 65535")
    plain, tls_port = (None, port) if tls else (port, None)
    password = _unquote(secret)
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        match key:
            case "port" if tls:
                raise _bad(
                    text, "spice+tls:// means TLS and has no port=: for both ports write spice://host?port=P&tls-port=T"
                )
            case "port":
                plain = _port_number(text, key, value)
            case "tls-port":
                tls_port = _port_number(text, key, value)
            case "password":
                password = _unquote(value)
            case _:
                named = f"{key}=" if equals and re.fullmatch("[A-Za-z_-]{1,20}", key) else "other text"
                keys = "tls-port= and password=" if tls else "port=, tls-port= and password="
                raise _bad(text, f"after the ? only {keys} are valid, not {named}")
    if not plain and not tls_port:
        scheme = text.partition(":")[0]
        raise _bad(text, "it has no port", remedy=f"write it as {scheme}://{TcpAddress(host, SPICE_PORT)}")
    return SpiceTarget(host=host, port=plain, tls_port=tls_port, password=password)


def _unquote(value: str) -> str:
    return unquote(value, errors="surrogateescape")  # as passwords from the command line: see check_password()


def _port_number(text: str, key: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 5 or not 0 < int(value) < 65536:
        raise _bad(text, f"{key}= is not a number from 1 to 65535")
    return int(value)


def _host_and_port(text: str, address: str, *, port_required: bool) -> tuple[str, int | None]:
    """Return host and port of the text after ``//``; the host may be missing."""
    if re.search(r"[\x00-\x20\x7f]", address):
        raise _bad(text, "it contains a space or a control character")
    authority, _, path = address.partition("/")
    if path and not authority:
        raise _bad(text, "it has no host")
    if path or re.search(r"[?#]", authority):
        raise _bad(text, "nothing may follow the port")
    try:
        return split_host_and_port(authority, port_required=port_required)
    except ValueError as error:
        raise _bad(text, str(error)) from None


def _tcp(text: str, scheme: str, rest: str, *, listen: bool = False) -> TcpAddress:
    if "@" in text:
        raise _bad(text, f"a plain socket has no password: write it as {scheme}://host:port")
    if not rest.startswith("//"):
        raise _bad(text, f"write it as {scheme}://host:port")
    host, port = _host_and_port(text, rest[2:], port_required=True)
    if not host and not listen:
        raise _bad(text, "it has no host")
    if port is None:
        raise _bad(text, "it has no port", remedy=f"write it as {scheme}://{TcpAddress(host, 4000)}")
    if port == 0 and not listen:
        raise _bad(text, "a port is a number from 1 to 65535")
    return TcpAddress(host or LOOPBACK, port)


def _kubevirt(text: str, rest: str) -> KubevirtTarget:
    """Return the target of ``//[CONTEXT/]NAMESPACE/VM``. A context may contain slashes, as those of OpenShift do."""
    context, _, address = rest.removeprefix("//").rpartition("/")
    context, _, namespace = context.rpartition("/")
    if not rest.startswith("//") or not _LABEL.fullmatch(namespace) or not _SUBDOMAIN.fullmatch(address):
        raise _bad(text, "write it as kubevirt://NAMESPACE/VM or kubevirt://CONTEXT/NAMESPACE/VM")
    context = unquote(context)
    if not context.isprintable() or len(context) > MAX_CONTEXT:
        raise _bad(text, f"a context has at most {MAX_CONTEXT} characters, all of them printable")
    return KubevirtTarget(namespace, address, context)


def _path(text: str, rest: str) -> str:
    path = "/" + rest.lstrip("/") if rest.startswith("//") else rest
    if not path or path == "/":
        raise _bad(text, "it has no path: write it as unix:/path or spice+unix:///path")
    if len(os.fsencode(path)) > 107:
        raise _bad(text, "the path of a UNIX socket has at most 107 bytes")
    return path


def _read_ca(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CA_FILE + 1)
        if len(data) > MAX_CA_FILE:
            raise UsageError(f"the CA file {path} is larger than {MAX_CA_FILE} bytes", reason=Reason.BAD_OPTION)
        return data.decode("ascii")
    except OSError as error:
        raise from_oserror(path, error, as_=UsageError, problem="cannot be read") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the CA file {path} is not PEM: byte {error.start} is not ASCII",
            reason=Reason.BAD_OPTION,
            remedy=Remedy("convert it", command=f"openssl x509 -inform DER -in {shell_word(path)} -out ca.pem"),
        ) from error


def _with_options(target: SpiceTarget, options: TargetOptions) -> SpiceTarget:
    if target.tls_port is None and (options.ca_file is not None or options.host_subject is not None):
        raise UsageError(
            f"{target}: a CA file and a host subject are for TLS, and the target has no TLS port",
            reason=Reason.BAD_OPTION,
            remedy="use spice+tls://HOST:PORT, or remove these settings",
        )
    if target.unix_path is not None and options.proxy is not None:
        raise UsageError(
            f"{target}: a proxy cannot reach a UNIX socket", reason=Reason.BAD_OPTION, remedy="remove the proxy"
        )
    ca = None if options.ca_file is None else _read_ca(options.ca_file)
    password = target.password or options.fallback_password if options.password is None else options.password
    return replace(
        target,
        password=password,
        ca=target.ca if ca is None else ca,
        host_subject=target.host_subject if options.host_subject is None else options.host_subject,
        proxy=target.proxy if options.proxy is None else options.proxy,
        allow_plain=options.allow_plain,
    )
