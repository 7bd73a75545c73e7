"""A session: a connection to one VM, with its usbredir ports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from farplug.errors import FarplugError
from farplug.transport.port import Port

if TYPE_CHECKING:
    from farplug.transport.spice_side import SpiceCursor, SpiceDisplay, SpiceInputs


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
        carries_screen: the session has the VM's screen, keyboard and mouse, not only USB.
        displays: the displays, by their numbers.
        cursors: the pointers of the displays, by their numbers.
        inputs: the keyboard and the mouse; None: the VM has none, or the session does not carry them.
        no_port_remedy: how to give the VM more ports.
        no_screen_remedy: how to see the screen and to use the keyboard and the mouse, if the session does not carry
            them.
    """

    ports: Sequence[Port]
    name: str = ""
    uuid: str = ""
    exclusive: ClassVar[bool]
    reached: ClassVar[bool]
    ends_with_port: ClassVar[bool] = False
    shares_ports: ClassVar[bool] = False
    carries_screen: ClassVar[bool] = False
    displays: Mapping[int, SpiceDisplay] = MappingProxyType({})
    cursors: Mapping[int, SpiceCursor] = MappingProxyType({})
    inputs: SpiceInputs | None = None
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

        Takes 5 s at most.
        """
        return error

    @abstractmethod
    async def close(self) -> None:
        """Close the ports, then the session. Detach the devices before."""
