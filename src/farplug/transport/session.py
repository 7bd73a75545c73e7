"""A session: a connection to one VM, with its usbredir ports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from farplug.errors import FarplugError
from farplug.transport.port import Port


class Session(ABC):
    """A connection to a VM.

    Attributes:
        ports: the ports for devices, in the order in which they are used.
        name: the VM's name; empty if unknown.
        uuid: the VM's UUID; empty if unknown.
        exclusive: the server serves one client at a time: this session has ended the session of another client.
        reached: the server has answered. Otherwise the first contact is when a port is opened.
        ends_with_port: the VM is gone when its port is closed, and :meth:`closed` does not report that.
        shares_ports: other clients use the same ports: only the first one is opened at the start.
        no_port_remedy: how to give the VM more ports.
        no_screen_remedy: how to see the screen and to use the keyboard and the mouse, if the session is not SPICE.
    """

    ports: Sequence[Port]
    name: str = ""
    uuid: str = ""
    exclusive: ClassVar[bool]
    reached: ClassVar[bool]
    ends_with_port: ClassVar[bool] = False
    shares_ports: ClassVar[bool] = False
    no_port_remedy: ClassVar[str]
    no_screen_remedy: ClassVar[str] = "connect to the VM's SPICE server: spice://HOST:PORT, or a .vv file"

    @property
    @abstractmethod
    def over(self) -> bool:
        """Return whether the session has ended."""

    @abstractmethod
    async def closed(self) -> FarplugError | None:
        """Wait until the session has ended. Returns the error, or None if :meth:`close` ended the session."""

    async def explain(self, error: FarplugError) -> FarplugError:
        """Return a more exact error for the end of the session, if the server can be asked for it; else the same one.

        Takes 2 s at most.
        """
        return error

    @abstractmethod
    async def close(self) -> None:
        """Close the ports, then the session. Detach the devices before."""
