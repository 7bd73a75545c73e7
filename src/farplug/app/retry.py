"""Decides when to connect to a VM again, without I/O and without a clock of its own.

A VM that moved to another host is followed in any case: its server names the new host. After any other loss the VM is
contacted again if a user asked for that, with growing delays.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from farplug.app.settings import ReconnectSettings
from farplug.errors import FarplugError, GuestGoneError, PortError, Reason, Remedy, TargetError
from farplug.transport.moved import GuestMoved

DELAYS: Final[Sequence[float]] = (0.5, 1, 2, 4, 8, 15)
"""Seconds before each attempt after a loss; the last one is that before all further attempts."""
JITTER: Final = 0.2
"""The part of a delay by which it is made longer or shorter, so that many clients do not come at the same time."""
STABLE_AFTER: Final = 60.0
"""Seconds of a connection after which the delays begin anew."""
MOVED_DELAY: Final = 1.0
"""Seconds between two attempts to find a VM that moved, if the new host cannot be reached."""
MOVED_LIMIT: Final = 30.0
"""Seconds for which a VM that moved is looked for."""
FLAP_TIME: Final = 10.0
"""Seconds: a connection that is lost sooner was taken away."""
FLAPS: Final = 3
"""Connections in a row that were taken away before farplug leaves the VM to the other client."""

_NEVER: Final = (
    Reason.WRONG_PASSWORD,
    Reason.NO_PASSWORD,
    Reason.CHANNEL_DENIED,
    Reason.NEEDS_TLS,
    Reason.TLS_UNTRUSTED,
    Reason.TLS_WRONG_HOST,
    Reason.TLS_FAILED,
    Reason.NOT_SPICE,
    Reason.FORBIDDEN,
)
"""Reasons that a further attempt does not change."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Connect again after a delay.

    Attributes:
        attempt: counts from 1 since the loss.
        delay: seconds.
        moved: where the VM moved, if the attempt is to go there; None: to the target that the user named.
    """

    attempt: int
    delay: float
    moved: GuestMoved | None = None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not connect again.

    Attributes:
        error: why the guest is gone.
    """

    error: FarplugError


class Retry:
    """The state of the policy for one VM.

    Args:
        settings: what a user asked for; None: only a VM that moved is followed.
        clock: returns seconds, monotonic.
        exclusive: the server serves one client at a time, so that two clients can take the VM from each other.
        used_up: the ticket was for one connection, and there is no way to a new one.
        noise: returns a number from -1 to 1, for the jitter.
    """

    def __init__(
        self,
        settings: ReconnectSettings | None,
        clock: Callable[[], float],
        *,
        exclusive: bool = True,
        used_up: bool = False,
        noise: Callable[[], float] = lambda: random.uniform(-1, 1),
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._exclusive = exclusive
        self._used_up = used_up
        self._noise = noise
        self._connected_at = clock()
        self._lost_at = 0.0
        self._loss: FarplugError | None = None
        self._attempt = self._delays = self._flaps = 0

    def follows(self, error: FarplugError) -> bool:
        """Return whether the VM is contacted again after a loss with this error. Changes nothing."""
        if isinstance(error, GuestMoved):
            return True
        return self._settings is not None and isinstance(error, (GuestGoneError, TargetError))

    def connected(self) -> None:
        """Take note that the VM is connected."""
        self._connected_at = self._clock()

    def lost(self, error: FarplugError) -> Wait | GiveUp:
        """Decide what to do after the VM was lost.

        Args:
            error: why it was lost.
        """
        now = self._clock()
        up = now - self._connected_at
        self._lost_at, self._loss, self._attempt = now, error, 0
        if up >= STABLE_AFTER:
            self._delays = 0
        if not self.follows(error):
            return GiveUp(error)
        if isinstance(error, GuestMoved):
            self._flaps, self._attempt = 0, 1
            return Wait(1, 0, None if error.where is None else error)
        if self._used_up:
            return GiveUp(
                GuestGoneError(
                    f"{error.message}; the .vv file of the VM was for one connection",
                    reason=_reason(error),
                    remedy=Remedy(
                        "fetch a new file; a command that prints one is run for each attempt", setting="target.command"
                    ),
                )
            )
        self._flaps = self._flaps + 1 if up < FLAP_TIME else 0
        if self._exclusive and self._flaps >= FLAPS:
            return GiveUp(
                GuestGoneError(
                    f"the connection was lost {FLAPS} times within {FLAP_TIME:g} s of being made: another client takes "
                    "the VM each time, or the VM restarts again and again",
                    reason=_reason(error),
                    remedy="close the other client (a console, another farplug), then connect again",
                )
            )
        return self._next()

    def failed(self, error: FarplugError) -> Wait | GiveUp:
        """Decide what to do after an attempt failed.

        Args:
            error: why it failed.
        """
        if error.reason in _NEVER or not isinstance(error, (TargetError, GuestGoneError, PortError)):
            return GiveUp(error)
        if self._settings is not None:
            return self._next()
        assert isinstance(self._loss, GuestMoved)
        if self._clock() + MOVED_DELAY - self._lost_at > MOVED_LIMIT:
            return GiveUp(error)
        self._attempt += 1
        return Wait(self._attempt, MOVED_DELAY)

    def _next(self) -> Wait | GiveUp:
        assert self._settings is not None
        assert self._loss is not None
        delay = DELAYS[min(self._delays, len(DELAYS) - 1)] * (1 + JITTER * self._noise())
        limit = self._settings.limit
        if limit is not None:
            left = self._lost_at + limit - self._clock()
            if left <= 0:
                return GiveUp(
                    GuestGoneError(
                        f"{self._loss.message}; no attempt to connect again succeeded within {limit:g} s",
                        reason=_reason(self._loss),
                        remedy=self._loss.remedy,
                    )
                )
            delay = min(delay, left)
        self._delays += 1
        self._attempt += 1
        return Wait(self._attempt, delay)


def _reason(loss: FarplugError) -> Reason:
    """Return the reason of giving up after a loss."""
    return Reason.TAKEN_OVER if loss.reason is Reason.TAKEN_OVER else Reason.GUEST_GONE
