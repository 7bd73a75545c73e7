"""Serve a disk on an inherited socket: farplug's side of ``bench/socketpair.py``, in a process of its own.

``python bench/served_disk.py FD FRAMING STORAGE IMAGE``: the engine, the port and the disk are the real ones. Only the
link of the SPICE channel is left out: the socket carries the channel's messages from the start.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any, cast

from farplug.redirection import Redirection
from farplug.spice.link import LinkResult
from farplug.store import FileStore
from farplug.transport.connection import Connection, Timeouts, UnixAddress, start
from farplug.transport.dialer import ChannelDialer, LinkedChannel
from farplug.transport.port import Port
from farplug.transport.spice_port import SpicePort
from farplug.transport.stream import StreamPort
from farplug.usb import Speed
from farplug.virtual import disk_device
from farplug.virtual.storage_transport import StorageTransport


class _SocketPort(StreamPort):
    """A port on a socket that is connected already."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(UnixAddress("inherited"))
        self._inherited = sock

    async def _socket(self) -> socket.socket:
        return self._inherited


class _Dialer:
    """Returns the socket as a linked SPICE channel on a UNIX socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def wire(self) -> None:
        """Return None: nothing is tapped."""

    async def link(self, *_: Any, **__: Any) -> LinkedChannel:
        connection = Connection(cast("Any", None), lambda error: None)
        await start(self._sock, connection, tls=None, server_hostname="", timeout=5)
        connection.pause_reading()
        link = LinkResult(mini_header=True, common_caps=(), channel_caps=(), trailing=b"")
        return LinkedChannel(connection, link, local=True)


class _Session:
    """The session of the SPICE port."""

    session_id = 1

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def moved(self) -> None:
        """Do nothing: this virtual machine does not migrate."""


async def _serve(sock: socket.socket, framing: str, storage: str, image: str) -> None:
    port: Port = _SocketPort(sock)
    if framing == "spice":
        port = SpicePort(0, cast("Any", _Session()), cast("ChannelDialer", _Dialer(sock)), Timeouts())
    device = disk_device(FileStore.open(image), transport=StorageTransport(storage), speeds=(Speed.SUPER,))
    redirection = Redirection(port)
    await redirection.open()
    await redirection.attach(device)
    await redirection.closed()
    await device.dispose()


if __name__ == "__main__":
    inherited = socket.socket(fileno=int(sys.argv[1]))
    inherited.setblocking(False)
    asyncio.run(_serve(inherited, *sys.argv[2:]))
