"""A Kubernetes API server with KubeVirt behind it: TLS, tokens, four slots, and statuses as virt-api has them."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shlex
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.cli.support import FakeGuest
from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from farplug.vm.certificates import write_certificates

TOKEN = "tok-5ecret-0123456789"
VMI = "/apis/subresources.kubevirt.io/v1/namespaces/lab/virtualmachineinstances/vm1/usbredir"

Slot = Callable[[ServerConnection], Awaitable[None]]
"""What is behind a slot: serves one websocket."""


def status(code: int, message: str, name: str = "") -> tuple[int, bytes]:
    """An answer of the API: metav1.Status."""
    body: dict[str, Any] = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
    if name:
        body["details"] = {"name": name, "kind": "virtualmachineinstance"}
    return code, json.dumps(body).encode()


def in_memory(**options: Any) -> tuple[FakeGuest, Slot]:
    """A guest in memory behind a slot."""
    guest = FakeGuest(lambda: None, **options)

    async def behave(websocket: ServerConnection) -> None:
        await websocket.send(b"".join(guest.start()))
        async for data in websocket:
            assert isinstance(data, bytes)
            if answer := b"".join(guest.receive(data)):
                await websocket.send(answer)

    return guest, behave


def socket_of(target: str) -> Slot:
    """A chardev of QEMU behind a slot, with the copying of virt-handler: 32 KiB at a time.

    Args:
        target: of the chardev: ``unix:`` or ``tcp://``.
    """
    scheme, _, address = target.partition(":")

    async def relay(websocket: ServerConnection) -> None:
        if scheme == "unix":
            reader, writer = await asyncio.open_unix_connection(address)
        else:
            reader, writer = await asyncio.open_connection(*address.removeprefix("//").split(":"))

        async def up() -> None:
            async for data in websocket:
                assert isinstance(data, bytes)
                writer.write(data)
                await writer.drain()

        async def down() -> None:
            while data := await reader.read(32 << 10):
                await websocket.send(data)

        copies = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
        try:
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for copy in copies:
                copy.cancel()
            await asyncio.gather(*copies, return_exceptions=True)
            writer.close()

    return relay


class _Connection(ServerConnection):
    """Counts pings."""

    fake: FakeKubevirt
    slot: int

    def process_event(self, event: Any) -> None:
        if isinstance(event, Frame) and event.opcode is Opcode.PING:
            self.fake.pings += 1
        super().process_event(event)


class FakeKubevirt:
    """The server.

    Args:
        slots: what is behind the USB ports of the VM ``lab/vm1``.
        token: the one that it accepts; empty: any, and none.
        answers: with which it refuses the next requests, one each.

    Attributes:
        requests: the headers of all requests.
        used: the slots that were used, in this order.
        open: the websockets that are open, by their slot.
        pings: the number of pings that came.
        address: host and port.
    """

    def __init__(self, *slots: Slot, token: str = TOKEN, answers: list[tuple[int, bytes]] | None = None) -> None:
        self.slots = slots or tuple(in_memory()[1] for _ in range(4))
        self.token = token
        self.answers = answers or []
        self.requests: list[Headers] = []
        self.used: list[int] = []
        self.open: dict[int, ServerConnection] = {}
        self.closed: list[int | None] = []
        self.pings = 0
        self.address = ""
        self.subprotocols: list[Subprotocol] | None = [Subprotocol("plain.kubevirt.io")]
        self._taken: set[int] = set()

    async def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request.headers)
        refused = self._refusal(connection, request)
        if refused is None:
            return None
        code, body = refused
        headers = Headers([("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return Response(code, "Because", headers, body)

    def _refusal(self, connection: ServerConnection, request: Request) -> tuple[int, bytes] | None:
        if self.answers:
            return self.answers.pop(0)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return status(401, "Unauthorized")
        if request.path.removeprefix("/prefix") != VMI:
            return status(404, 'virtualmachineinstance.kubevirt.io "other" not found', "other")
        free = [slot for slot in range(len(self.slots)) if slot not in self._taken]
        if not free:
            return status(500, "Internal error occurred: dialing virt-handler: websocket: bad handshake")
        self._taken.add(free[0])
        assert isinstance(connection, _Connection)
        connection.slot = free[0]
        return None

    async def _serve(self, websocket: ServerConnection) -> None:
        assert isinstance(websocket, _Connection)
        slot = websocket.slot
        self.used.append(slot)
        self.open[slot] = websocket
        try:
            with suppress(ConnectionClosed):
                await self.slots[slot](websocket)
        finally:
            self._taken.discard(slot)
            await websocket.close()
            self.closed.append(websocket.close_code)
            if self.open.get(slot) is websocket:  # not the next one in this slot
                del self.open[slot]

    async def stop(self, code: int = 1006) -> None:
        """End all websockets, as a migration does."""
        for websocket in list(self.open.values()):
            if code == 1006:
                websocket.transport.abort()
            else:
                await websocket.close(code, "bye")

    @asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[None]:
        """Serve on a port of this machine."""

        class Connection(_Connection):
            fake = self

        async with serve(
            self._serve,
            "127.0.0.1",
            port,
            ssl=tls,
            subprotocols=self.subprotocols,
            process_request=self._request,
            create_connection=Connection,
            compression=None,
            max_size=None,
            ping_interval=None,
        ) as server:
            self.address = f"127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            yield


class Kubeconfig:
    """The user's side: a home folder with a kubeconfig, and a kubectl that prints it.

    Args:
        folder: an empty folder: the home, with certificates of the server for 127.0.0.1.
        monkeypatch: changes the environment.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        write_certificates(folder, ["127.0.0.1"])
        self.ca = folder / "ca-cert.pem"
        (folder / "bin").mkdir()
        self.kubectl(f"""
            case "$*" in
                *--context=lab*|*--context=default/api:6443/me*|*json) exec cat {shlex.quote(str(folder / "config"))};;
                *) echo 'error: cannot locate context nope' >&2; exit 1;;
            esac
        """)
        for name in list(os.environ):
            if name.lower().endswith("_proxy") or name.startswith(("KUBE", "FARPLUG_PASSWORD")):
                monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(folder))
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")

    def kubectl(self, script: str) -> None:
        self.program("kubectl", script)

    def program(self, name: str, script: str) -> Path:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def server_context(self, *, client_certificates: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server-cert.pem", self.folder / "server-key.pem")
        if client_certificates:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def write(self, address: str, user: dict[str, Any] | None = None, **cluster: Any) -> None:
        """Write the kubeconfig as ``kubectl config view --raw --minify --flatten`` prints it."""
        server: dict[str, Any] = {"server": f"https://{address}/prefix"}
        if address and "insecure-skip-tls-verify" not in cluster:
            server["certificate-authority-data"] = encoded(self.ca.read_bytes())
        server |= cluster
        config = {
            "kind": "Config",
            "apiVersion": "v1",
            "clusters": [{"name": "c", "cluster": {k: v for k, v in server.items() if v is not None}}],
            "users": [{"name": "u", "user": {"token": TOKEN} if user is None else user}],
            "contexts": [{"name": "lab", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "lab",
        }
        (self.folder / "config").write_text(json.dumps(config))


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@asynccontextmanager
async def kubevirt(
    kubeconfig: Kubeconfig, fake: FakeKubevirt | None = None, user: dict[str, Any] | None = None, **cluster: Any
) -> AsyncIterator[FakeKubevirt]:
    """Serve over TLS; the kubeconfig leads there."""
    fake = fake or FakeKubevirt()
    async with asyncio.timeout(60), fake.running(kubeconfig.server_context()):
        kubeconfig.write(fake.address, user, **cluster)
        yield fake
