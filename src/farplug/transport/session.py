"""A session: a connection to one VM, with the usbredir ports that it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from farplug.errors import FarplugError
from farplug.transport.port import Port


class Session(ABC):
    """A connection to a VM.

    Attributes:
        ports: where devices fit in, in the order in which they are used.
        name: the VM's name; empty if the VM does not give one.
        uuid: the VM's UUID; empty if the VM does not give one.
        exclusive: the server serves one client at a time: this session has ended any other.
        reached: the VM's side has answered. Otherwise only opening a port reaches it.
        no_port_remedy: how the VM gets more ports.
    """

    ports: Sequence[Port]
    name: str = ""
    uuid: str = ""
    exclusive: ClassVar[bool]
    reached: ClassVar[bool]
    no_port_remedy: ClassVar[str]

    @abstractmethod
    async def closed(self) -> FarplugError | None:
        """Wait until the session has ended as a whole; return why, or None if :meth:`close` ended it."""

    @abstractmethod
    async def close(self) -> None:
        """Close the ports, then the session. The devices should be detached before."""
