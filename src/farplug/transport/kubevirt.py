"""VMs of KubeVirt: the subresource ``usbredir`` of a VirtualMachineInstance, a websocket for each port.

KubeVirt gives a VM with ``clientPassthrough: {}`` four usb-redir devices on UNIX sockets in its pod. A request to the
API server goes to virt-api, which connects to virt-handler on the VM's node, which takes the first socket that has no
client. Both then copy bytes: what arrives on the websocket is the usbredir stream.

Source: KubeVirt's ``pkg/virt-api/rest`` (usbredir.go, dialers.go, streamer.go) and ``pkg/virt-handler/rest``
(console.go).
"""

from __future__ import annotations

import asyncio
import json
import ssl
from typing import Any, Final
from urllib.parse import quote

from websockets.uri import WebSocketURI

from farplug.errors import (
    FarplugError,
    GuestGoneError,
    PortError,
    Reason,
    Remedy,
    RemoteProtocolError,
    StateError,
    TargetError,
)
from farplug.shell import shell_word
from farplug.text import printable
from farplug.transport.connection import CurrentWire, Timeouts, dial, untapped
from farplug.transport.kubeconfig import Access, load_access
from farplug.transport.kubevirt_target import KubevirtTarget
from farplug.transport.port import Port, PortListener
from farplug.transport.proxy import open_tunnel
from farplug.transport.session import Session
from farplug.transport.spice_target import Progress, Stage
from farplug.transport.websocket import NotWebSocket, Refused, WebSocket
from farplug.usb.types import Buffer
from farplug.version import __version__

PORTS: Final = 4
"""USB devices of a VM with ``clientPassthrough`` (KubeVirt's ``UsbClientPassthroughMaxNumberOf``)."""
SUBPROTOCOL: Final = "plain.kubevirt.io"
API: Final = "/apis/subresources.kubevirt.io/v1"
MAX_MESSAGE: Final = 300
"""Characters of a message of the API that an error quotes."""

_NAME_MISMATCH: Final = (62, 64)
"""OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""


class KubevirtPort(Port):
    """A USB port of a VM of KubeVirt: a websocket.

    Args:
        session: the VM.
        number: from 0.
    """

    def __init__(self, session: KubevirtSession, number: int) -> None:
        self.name = f"usbredir {number}"
        self._session = session
        self._socket: WebSocket | None = None
        self._listener: PortListener | None = None
        self._closing = False

    async def open(self, listener: PortListener) -> None:
        if self._listener is not None:
            raise StateError(f"port {self.name} is open already")
        self._listener, self._closing = listener, False
        try:
            websocket = await self._session.websocket()
        except BaseException:
            self._listener = None
            raise
        self._socket = websocket
        websocket.start(self)

    def write(self, buffers: list[Buffer]) -> None:
        if self._socket is not None:
            self._socket.write(buffers)

    def pause_reading(self) -> None:
        if self._socket is not None:
            self._socket.pause_reading()

    def resume_reading(self) -> None:
        if self._socket is not None:
            self._socket.resume_reading()

    async def close(self) -> None:
        self._closing = True
        if self._socket is not None:
            await self._socket.close(self._session.timeouts.flush)

    def abort(self) -> None:
        self._closing = True
        self.drop()

    def drop(self) -> None:
        """Close the websocket at once: the session has ended."""
        if self._socket is not None:
            self._socket.abort()

    # The websocket ----------------------------------------------------------------------------------------------------

    def data_received(self, data: memoryview) -> None:
        """Pass bytes on."""
        assert self._listener is not None
        self._listener.data_received(data)

    def pause_writing(self) -> None:
        """Pass this on."""
        assert self._listener is not None
        self._listener.pause_writing()

    def resume_writing(self) -> None:
        """Pass this on."""
        assert self._listener is not None
        self._listener.resume_writing()

    def stream_lost(self, what: FarplugError | str) -> None:
        """End the session, unless this side closed the port."""
        listener = self._listener
        self._socket = self._listener = None
        assert listener is not None
        listener.port_closed(None if self._closing else self._session.lost(what))


class KubevirtSession(Session):
    """A VM of KubeVirt. Made by :meth:`connect`.

    The websockets end together when the VM stops or is migrated to another node. So the session ends with the first one
    that is lost.
    """

    ports: tuple[KubevirtPort, ...]
    exclusive = False
    reached = True
    shares_ports = True
    no_screen_remedy = "KubeVirt shows the screen of a VM over VNC: run virtctl vnc"
    no_port_remedy = f"use another VM: KubeVirt gives each {PORTS} USB ports, which all its clients share"

    def __init__(self, target: KubevirtTarget, access: Access, timeouts: Timeouts, wire: CurrentWire) -> None:
        self.target = target
        self.timeouts = timeouts
        self.name = target.name
        self.ports = tuple(KubevirtPort(self, number) for number in range(PORTS))
        self._access = access
        self._wire = wire
        self._spare: WebSocket | None = None
        """The websocket that :meth:`connect` has opened, for the first port that is opened."""
        self._turn = asyncio.Lock()
        self._ended: asyncio.Future[FarplugError | None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def connect(
        cls,
        target: KubevirtTarget,
        progress: Progress | None = None,
        *,
        wire: CurrentWire = untapped,
        timeouts: Timeouts | None = None,
    ) -> KubevirtSession:
        """Connect to a VM: read the kubeconfig, and open one websocket.

        Args:
            target: the VM.
            progress: called at the start of each stage.
            wire: taps the streams of the ports.
            timeouts: for connecting and closing.

        Raises:
            SetupError: ``missing-program``: kubectl or the credential plugin is not installed.
            UsageError: ``kubeconfig``: it is not valid, or has no such context.
            TargetError: the API, or the VM, cannot be reached; the reason says why.
            PortError: the VM has no USB ports for clients, or other clients use all of them.
        """

        def begin(stage: Stage, text: str) -> None:
            if progress is not None:
                progress(stage, text)

        begin(Stage.ACCESS, f"the kubeconfig{f', context {target.context}' if target.context else ''}")
        access = await load_access(target.context)
        session = cls(target, access, timeouts or Timeouts(), wire)
        await access.credentials()
        begin(Stage.REACH, f"{target.namespace}/{target.name} at {access.cluster}")
        session._spare = await session.websocket()
        return session

    @property
    def over(self) -> bool:
        return self._ended.done()

    async def closed(self) -> FarplugError | None:
        return await asyncio.shield(self._ended)

    async def close(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.abort()
        await asyncio.gather(*(port.close() for port in self.ports))
        if not self._ended.done():
            self._ended.set_result(None)

    def lost(self, what: FarplugError | str) -> FarplugError:
        """Take note that a websocket is lost; return the error with which the session has ended."""
        if not self._ended.done():
            error = what if isinstance(what, FarplugError) else _gone(self.target, what)
            self._ended.set_result(error)
            for port in self.ports:
                port.drop()
        return self._ended.result() or _gone(self.target, "closed the connection")

    async def websocket(self) -> WebSocket:
        """Return a websocket to a free port of the VM.

        They are opened one after the other: the server takes the first free port each time, so that the order of the
        ports here is that of the VM's, if all are free.

        Raises:
            TargetError: the API, or the VM, cannot be reached.
            PortError: other clients use all ports of the VM.
            GuestGoneError: the session has ended.
        """
        async with self._turn:
            if self._ended.done():
                raise self._ended.result() or GuestGoneError(f"the session with {self.target} was closed")
            spare, self._spare = self._spare, None
            if spare is not None:
                return spare
            try:
                return await self._open()
            except Refused as refused:
                error = refusal(self.target, self._access, refused)
                if error.reason is not Reason.CREDENTIALS or not self._access.forget():
                    raise error from None
            try:
                return await self._open()  # with new credentials
            except Refused as refused:
                raise refusal(self.target, self._access, refused) from None

    async def _open(self) -> WebSocket:
        """Return a new websocket. Raises TargetError, or Refused."""
        cluster, target, timeouts = self._access.cluster, self.target, self.timeouts
        credentials = await self._access.credentials()
        context = cluster.context(credentials)
        path = f"{cluster.path}{API}/namespaces/{quote(target.namespace)}/virtualmachineinstances/{quote(target.name)}"
        host, port = cluster.address.host, cluster.address.port
        uri = WebSocketURI(cluster.secure, host, port, f"{path}/usbredir", "", None, None)
        headers = [("User-Agent", f"farplug/{__version__}"), *credentials.headers]
        wire = self._wire()
        websocket = WebSocket(uri, SUBPROTOCOL, headers, None if wire is None else wire.tap(f"usbredir of {target}"))
        proxy = cluster.proxy
        sock = await dial(cluster.address if proxy is None else proxy.address, timeouts.connect)
        try:
            if proxy is not None:
                await open_tunnel(sock, proxy, cluster.address, timeouts.handshake)
            await websocket.connect(sock, tls=context, server_hostname=cluster.tls_name, timeout=timeouts.handshake)
        except BaseException as error:
            sock.close()
            if isinstance(error, (OSError, NotWebSocket)):
                raise _connect_error(self._access, error, timeouts.handshake) from error
            raise
        return websocket


def refusal(target: KubevirtTarget, access: Access, refused: Refused) -> FarplugError:
    """Return the error for a status with which the API answers the request for a port.

    Args:
        target: the VM.
        access: how the API is reached.
        refused: the answer.
    """
    status, said = refused.status, _Status(refused.body)
    vmi = f"{target.namespace}/{target.name}"
    quoted = f": {said.message}" if said.message else ""
    namespace = shell_word(target.namespace)
    kubectl = f"kubectl{f' --context={shell_word(target.context)}' if target.context else ''}"
    look = Remedy("look at the VM", command=f"{kubectl} get vmi --namespace={namespace}")
    match status:
        case 401:
            return TargetError(
                f"the Kubernetes API at {access.cluster} does not accept the credentials of {access.where}{quoted}",
                reason=Reason.CREDENTIALS,
                remedy=Remedy("log in to the cluster again, and try", command=f"{kubectl} auth whoami"),
            )
        case 403:
            can = f"{kubectl} auth can-i get virtualmachineinstances.subresources.kubevirt.io --subresource=usbredir"
            return TargetError(
                f"the Kubernetes API does not allow {access.where} to use the USB ports of {vmi}{quoted}",
                reason=Reason.FORBIDDEN,
                remedy=Remedy(
                    "ask for the role edit in the namespace, or for the verb get on the resource "
                    "virtualmachineinstances/usbredir of the group subresources.kubevirt.io",
                    command=f"{can} --namespace={namespace}",
                ),
            )
        case 404 if said.about == target.name:
            return TargetError(
                f"no VM {target.name} runs in the namespace {target.namespace}{quoted}",
                reason=Reason.NOT_FOUND,
                remedy=Remedy("start the VM, or check its name", command=look.command),
            )
        case 404:
            return TargetError(
                f"the Kubernetes API at {access.cluster} has no USB ports of VMs{quoted}",
                reason=Reason.NOT_FOUND,
                remedy=Remedy(
                    "check that this is the right cluster, and that KubeVirt is installed in it",
                    command=f"{kubectl} get apiservices v1.subresources.kubevirt.io",
                ),
            )
        case 409:
            return PortError(
                f"the VM {vmi} has no USB ports for clients{quoted}",
                reason=Reason.NO_USBREDIR_CHANNEL,
                remedy="add clientPassthrough: {} to the devices of the VM (spec.template.spec.domain.devices), "
                "and restart the VM",
            )
        case 500 if "bad handshake" in said.message:
            return PortError(
                f"KubeVirt gives no USB port of {vmi}: most likely other clients use all {PORTS}{quoted}",
                reason=Reason.CHANNEL_IN_USE,
                remedy="end another client of the VM's USB ports; otherwise read the log of virt-handler on its node",
            )
        case 400:
            return TargetError(
                f"KubeVirt cannot connect to {vmi}{quoted or ': the request is not valid'}",
                reason=Reason.API_ERROR,
                remedy=Remedy("check that the VM runs", command=look.command),
            )
        case 429 | 500 | 502 | 503 | 504:
            return TargetError(
                f"the Kubernetes API, or KubeVirt, failed with the status {status}{quoted}",
                reason=Reason.API_ERROR,
                remedy=Remedy("try again later; look at KubeVirt", command=f"{kubectl} get pods -A -l kubevirt.io"),
            )
    return TargetError(
        f"{access.cluster} answered with the HTTP status {status} instead of a websocket{quoted}",
        reason=Reason.API_ERROR,
        remedy="check the server in the kubeconfig, and what is between this machine and the server",
    )


class _Status:
    """The ``Status`` object with which the API refuses a request (k8s.io/apimachinery ``metav1.Status``).

    Attributes:
        message: for people; empty: none.
        about: the name of the object that it is about; empty: none.
    """

    def __init__(self, body: bytes) -> None:
        self.message = self.about = ""
        try:
            status: Any = json.loads(body)
        except (ValueError, RecursionError):
            return
        if isinstance(status, dict) and status.get("kind") == "Status":
            details = status.get("details")
            about = details.get("name") if isinstance(details, dict) else None
            self.message = _line(status.get("message"))
            self.about = about if isinstance(about, str) else ""


def _line(text: object) -> str:
    return printable(" ".join(text.split()), MAX_MESSAGE) if isinstance(text, str) else ""


def _gone(target: KubevirtTarget, what: str) -> GuestGoneError:
    return GuestGoneError(
        f"KubeVirt {what}: the VM {target.namespace}/{target.name} was stopped or migrated, or the way to it broke",
        remedy="connect again, to the same target",
    )


def _connect_error(access: Access, error: OSError | NotWebSocket, timeout: float) -> FarplugError:
    """Return the error for a connection or a handshake that failed."""
    where = str(access.cluster)
    match error:
        case NotWebSocket():
            return RemoteProtocolError(
                f"{where} is not a Kubernetes API server: {error}", remedy="check the server in the kubeconfig"
            )
        case ssl.SSLCertVerificationError(verify_code=code) if code in _NAME_MISMATCH:
            return TargetError(
                f"TLS to {where}: the server's certificate is not for {access.cluster.tls_name}",
                reason=Reason.TLS_WRONG_HOST,
                remedy="use a name of the certificate as the server in the kubeconfig, or set its tls-server-name",
            )
        case ssl.SSLCertVerificationError():
            return TargetError(
                f"TLS to {where}: the server's certificate is not trusted ({error.verify_message})",
                reason=Reason.TLS_UNTRUSTED,
                remedy="give the cluster's authority in the kubeconfig: certificate-authority-data",
            )
        case ssl.SSLError():
            return TargetError(
                f"TLS to {where}: {(error.reason or str(error)).replace('_', ' ').lower()}",
                reason=Reason.TLS_FAILED,
                remedy="check the server and the client certificate in the kubeconfig",
            )
        case TimeoutError():
            return TargetError(
                f"{where} did not answer within {timeout:g} s",
                reason=Reason.TIMED_OUT,
                remedy="check the network, and that the cluster works",
            )
    why = (error.strerror or str(error) or "the server closed the connection").lower()
    return TargetError(
        f"the connection to {where} broke: {why}",
        reason=Reason.UNREACHABLE,
        remedy="check the server in the kubeconfig, and the network",
    )
