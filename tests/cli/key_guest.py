"""A guest in which a program uses a security key."""

from __future__ import annotations

from collections.abc import Callable

from tests.cli.support import FakeGuest

from farplug.usb import Status
from farplug.usbredir import packets

INIT = bytes.fromhex("ffffffff860008") + bytes(8)
SELECT = bytes.fromhex("0000000190 0001 0b")
"""authenticatorSelection on the first channel: a touch, and nothing else."""


def nothing() -> None:
    """Do nothing when the device is configured."""


class KeyGuest(FakeGuest):
    """Asks for a touch of each key that is plugged in.

    Attributes:
        replies: the replies of keys: a status each.
    """

    def __init__(self, when_answered: Callable[[], None] = nothing) -> None:
        super().__init__(nothing)
        self.replies: list[int] = []
        self._when_answered = when_answered

    def _answer(self, packet: packets.Packet) -> None:
        super()._answer(packet)
        match packet:
            case packets.ConfigurationStatus() if packet.status is Status.SUCCESS:
                self._connection.send(packets.StartInterruptReceiving(id=2, endpoint=0x81))
                for number, report in enumerate((INIT, SELECT), 3):
                    self._connection.send(
                        packets.InterruptPacket(
                            id=number, endpoint=1, status=Status.SUCCESS, length=64, data=report.ljust(64, b"\0")
                        )
                    )
            case packets.InterruptPacket(endpoint=0x81, data=data) if data[4] == 0x90:
                self.replies.append(data[7])
                self._when_answered()
