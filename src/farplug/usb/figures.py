"""Counters of a device and of its endpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figures:
    """Counters of a device since it was made.

    Attributes:
        read: bytes that the guest read.
        written: bytes that the guest wrote.
        commands: the commands of a disk; the transfers of a device that does not count commands.
        errors: those of the commands that failed because of the medium or the device (sense keys MEDIUM ERROR and
            HARDWARE ERROR, or no space is left), not because of the guest; the transfers that ended with an error.
    """

    read: int = 0
    written: int = 0
    commands: int = 0
    errors: int = 0

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.read + other.read,
            self.written + other.written,
            self.commands + other.commands,
            self.errors + other.errors,
        )


@dataclass(frozen=True, slots=True)
class EndpointFigures:
    """Counters of an endpoint since the device was attached.

    Attributes:
        endpoint: bEndpointAddress; both directions of endpoint 0 count under 0.
        transfers: completed transfers.
        bytes: bytes that moved in the endpoint's direction.
        errors: transfers that ended with an error other than a stall or a cancellation.
        stalls: transfers that ended with a stall.
        cancelled: transfers that the guest cancelled.
        dropped: packets of a reception that were dropped because the guest was too slow.
    """

    endpoint: int
    transfers: int = 0
    bytes: int = 0
    errors: int = 0
    stalls: int = 0
    cancelled: int = 0
    dropped: int = 0
