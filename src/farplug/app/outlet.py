"""The connection of a client, as far as events for this client alone need it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from farplug.usb.types import Buffer


@dataclass(frozen=True, slots=True)
class ClientEvent:
    """An event for one client.

    Attributes:
        name: of the event.
        data: its fields, of JSON's types.
        payload: raw bytes beside the fields; None: there are none.
    """

    name: str
    data: Mapping[str, Any]
    payload: Buffer | None = field(default=None, repr=False)


class Outlet(Protocol):
    """The connection of a client, as far as events for this client alone need it."""

    def post(self, key: Hashable, make: Callable[[], ClientEvent | None]) -> None:
        """Call ``make`` when the connection accepts output, and send what it returns.

        Does nothing but replace ``make`` if an event with the same key waits already.
        """
