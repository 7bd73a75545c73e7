"""Ends that are TCP or UNIX sockets: to connect to, or to listen on."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import stat
import sys
from abc import abstractmethod
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import ClassVar, Final, TypeAlias

from farplug.ends.base import CHUNK, MAX_UNSENT, RETRY_INTERVAL, End, Peer
from farplug.errors import DeviceError, Reason
from farplug.rate_limit import limited_logger
from farplug.usb.types import Buffer

log = limited_logger(__name__)

CONNECT_TIMEOUT: Final = 10.0
"""Seconds to connect."""

_KEEPALIVE: Final = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
"""A peer whose machine has vanished does not keep others out for more than 30 s."""

_REASONS: Final = {
    errno.ENOENT: Reason.NOT_FOUND,
    errno.ECONNREFUSED: Reason.CONNECTION_REFUSED,
    errno.EACCES: Reason.NO_PERMISSION,
    errno.EPERM: Reason.NO_PERMISSION,
    errno.EADDRINUSE: Reason.IN_USE,
    errno.ENOTSOCK: Reason.NOT_A_FILE,
}


class SocketPeer(Peer):
    """A connected stream socket that carries bytes.

    Attributes:
        read_ahead: bytes that are received before the guest takes them; with twice that the peer waits.
    """

    read_ahead: ClassVar[int] = CHUNK

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        self.name = name
        self._reader = reader
        self._writer = writer
        writer.transport.set_write_buffer_limits(high=MAX_UNSENT)
        sock = writer.get_extra_info("socket")
        if sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                if hasattr(socket, option):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    async def read(self) -> Sequence[bytes]:
        data = await self._reader.read(CHUNK)
        return (data,) if data else ()

    async def write(self, items: Sequence[Buffer]) -> None:
        self._writer.writelines(items)
        await self._writer.drain()

    def has_left(self) -> bool:
        if sys.platform == "win32":
            return False
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket"), getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    def close(self) -> None:
        self._writer.transport.abort()


PeerType: TypeAlias = type[SocketPeer]
"""What travels over a connection: :class:`SocketPeer`, or one with frames."""


class _ConnectEnd(End):
    """A socket that another program listens on. It is connected again when it was lost.

    Args:
        address: as users write it.
        peer_type: what travels over the connection.
    """

    def __init__(self, address: str, peer_type: PeerType = SocketPeer) -> None:
        super().__init__(address)
        self._peer_type = peer_type
        self._connecting: asyncio.Task[None] | None = None

    @abstractmethod
    def _connect(self) -> Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect once. Raises OSError, or UnicodeError for a host name that is not valid."""

    async def _open(self) -> None:
        try:
            await self._reach()
        except (OSError, UnicodeError) as error:
            raise _fault(self.address, "cannot be reached", error, "start the program that listens there") from error

    async def _close(self) -> None:
        await _cancelled(self._connecting)

    async def _reach(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                reader, writer = await self._connect()
        except TimeoutError as error:
            raise OSError(errno.ETIMEDOUT, f"no answer for {CONNECT_TIMEOUT:g} s") from error
        self.came(self._peer_type(reader, writer, self.address))

    def left(self, peer: Peer, reason: str = "") -> None:
        was_here = peer is self.peer
        super().left(peer, reason)
        if was_here and self.is_open:
            self._connecting = asyncio.get_running_loop().create_task(self._reach_again())

    async def _reach_again(self) -> None:
        while self.peer is None:
            await asyncio.sleep(RETRY_INTERVAL)
            with suppress(OSError):
                await self._reach()


class TcpEnd(_ConnectEnd):
    """A TCP port that another program listens on."""

    def __init__(self, host: str, port: int, address: str, peer_type: PeerType = SocketPeer) -> None:
        super().__init__(address, peer_type)
        self._host, self._port = host, port

    def _connect(self) -> Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        return asyncio.open_connection(self._host, self._port, limit=self._peer_type.read_ahead)


class UnixEnd(_ConnectEnd):
    """A UNIX socket that another program listens on."""

    def __init__(self, path: str, address: str, peer_type: PeerType = SocketPeer) -> None:
        super().__init__(address, peer_type)
        self._path = path

    def _connect(self) -> Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        return asyncio.open_unix_connection(self._path, limit=self._peer_type.read_ahead)


class _ListenEnd(End):
    """A socket that other programs connect to, one at a time: a second one is disconnected at once."""

    def __init__(self, address: str, peer_type: PeerType = SocketPeer) -> None:
        super().__init__(address)
        self._peer_type = peer_type
        self._server: asyncio.Server | None = None

    @abstractmethod
    async def _listen(self) -> asyncio.Server:
        """Listen. Raises OSError, or UnicodeError for a host name that is not valid."""

    @abstractmethod
    def _name(self, writer: asyncio.StreamWriter) -> str:
        """Return the name of a peer."""

    async def _open(self) -> None:
        try:
            self._server = await self._listen()
        except (OSError, UnicodeError) as error:
            raise _fault(self.address, "cannot be listened on", error, "choose another address") from error

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a connection."""
        name = self._name(writer)
        if self.peer is not None and self.peer.has_left():  # the guest has not read yet that it has
            self.left(self.peer)
        if self.peer is not None or not self.is_open:
            log.warning("%s: %s is refused: %s", self.address, name, "another peer is connected")
            writer.transport.abort()
            return
        self.came(self._peer_type(reader, writer, name))


class TcpListenEnd(_ListenEnd):
    """A TCP port that other programs connect to. Port 0 is any free one, which :attr:`address` has then."""

    def __init__(self, host: str, port: int, address: str, peer_type: PeerType = SocketPeer) -> None:
        super().__init__(address, peer_type)
        self._host, self._port = host, port

    async def _listen(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        host = found[0][4][0]  # a name may have several addresses, and port 0 would be another one on each
        server = await asyncio.start_server(
            self.accept, str(host), self._port, limit=self._peer_type.read_ahead, backlog=1
        )
        if not self._port:
            self._port = server.sockets[0].getsockname()[1]
            self.address = f"{self.address.rpartition(':')[0]}:{self._port}"
        return server

    def _name(self, writer: asyncio.StreamWriter) -> str:
        host, port, *_ = writer.get_extra_info("peername") or ("?", 0)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class UnixListenEnd(_ListenEnd):
    """A UNIX socket, for this user only, that other programs connect to.

    A socket without a listener is replaced; any other file is not.
    """

    def __init__(self, path: str, address: str, peer_type: PeerType = SocketPeer) -> None:
        super().__init__(address, peer_type)
        self._path = path
        self._created: tuple[int, int] | None = None

    async def _listen(self) -> asyncio.Server:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_unused(self._path)
            mask = os.umask(0o177)
            try:
                sock.bind(self._path)
            finally:
                os.umask(mask)
            self._created = _inode(self._path)
            return await asyncio.start_unix_server(self.accept, sock=sock, limit=self._peer_type.read_ahead, backlog=1)
        except BaseException:
            sock.close()
            self._remove()
            raise

    async def _close(self) -> None:
        await super()._close()
        self._remove()

    def _remove(self) -> None:
        """Remove the socket, if it is the one that was made here."""
        if self._created is not None and _inode(self._path) == self._created:
            with suppress(OSError):
                os.unlink(self._path)

    def _name(self, writer: asyncio.StreamWriter) -> str:
        return f"the client of {self._path}"


def _remove_unused(path: str) -> None:
    """Remove a socket without a listener. Raises OSError if the path is something else."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _fault(address: str, problem: str, error: OSError | UnicodeError, remedy: str) -> DeviceError:
    if isinstance(error, socket.gaierror | UnicodeError):
        return DeviceError(
            f"{address} {problem}: the name cannot be resolved", reason=Reason.UNRESOLVABLE, remedy="check the name"
        )
    reason = Reason.TIMED_OUT if error.errno == errno.ETIMEDOUT else _REASONS.get(error.errno or 0, Reason.UNREACHABLE)
    if error.errno == errno.EEXIST:
        reason = Reason.EXISTS
    text = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return DeviceError(f"{address} {problem}: {text.lower()}", reason=reason, remedy=remedy)


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    """Cancel a task, and wait for its end."""
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
