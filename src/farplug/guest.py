"""A guest: the virtual machine behind a target, while we are connected to it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence

from farplug.errors import FarplugError
from farplug.target import ListenTarget, StreamTarget, Target
from farplug.transport.connection import TcpAddress
from farplug.transport.dialer import Progress, Stage
from farplug.transport.port import Port
from farplug.transport.session import SpiceSession
from farplug.transport.stream import ListenPort, StreamPort


class Guest(ABC):
    """The virtual machine behind a target.

    Attributes:
        target: where it is.
        ports: where devices fit in, in the order in which they are used.
    """

    target: Target
    ports: Sequence[Port]
    is_spice = False

    @property
    def name(self) -> str:
        """The VM's name, if it tells one."""
        return ""

    @property
    def uuid(self) -> str:
        """The VM's UUID, if it tells one."""
        return ""

    @abstractmethod
    async def closed(self) -> FarplugError | None:
        """Wait until the guest is gone as a whole; why, if not by us. One on a plain socket is gone with its port."""

    @abstractmethod
    async def close(self) -> None:
        """Leave the guest. The devices should be unplugged before."""


class SpiceGuest(Guest):
    """A guest behind a SPICE server: each of its usbredir channels is a port."""

    is_spice = True

    def __init__(self, target: Target, session: SpiceSession) -> None:
        self.target = target
        self.ports = session.ports
        self._session = session

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def uuid(self) -> str:
        return self._session.uuid

    async def closed(self) -> FarplugError | None:
        return await asyncio.shield(self._session.closed)

    async def close(self) -> None:
        await self._session.close()


class SocketGuest(Guest):
    """A guest behind one usbredir byte stream."""

    def __init__(self, target: Target, port: Port) -> None:
        self.target = target
        self.ports = (port,)
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def closed(self) -> FarplugError | None:
        await asyncio.shield(self._closed)
        return None

    async def close(self) -> None:
        await self.ports[0].close()
        if not self._closed.done():
            self._closed.set_result(None)


async def connect(target: Target, progress: Progress | None = None) -> Guest:
    """Reach a guest. A plain socket is reached only when a device is plugged into its port.

    Args:
        target: where it is, see :func:`farplug.target.parse_target`.
        progress: called when each stage begins, with where it leads.

    Raises:
        TargetError: it cannot be reached; the reason says at which stage.
    """
    match target:
        case StreamTarget(address):
            if progress is not None:
                progress(Stage.REACH, str(address))
            return SocketGuest(target, StreamPort(address))
        case ListenTarget(address):

            def listening(where: TcpAddress) -> None:
                if progress is not None:
                    progress(Stage.REACH, f"listening on {where}: waiting for QEMU to connect")

            return SocketGuest(target, ListenPort(address, on_listening=listening))
        case _:
            return SpiceGuest(target, await SpiceSession.connect(target, progress=progress))
