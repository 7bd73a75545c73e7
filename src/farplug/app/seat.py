"""The seat of a guest: which client holds the keyboard and the mouse, and which keys it holds down."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING, Final, Protocol

from farplug.app.outlet import ClientEvent
from farplug.errors import FarplugError, Reason, StateError, UsageError

if TYPE_CHECKING:
    from farplug.app.guest import Guest
    from farplug.app.outlet import Outlet
    from farplug.spice.inputs import Button

MAX_HELD: Final = 16
"""Keys that a client holds down at a time."""
MAX_WHEEL: Final = 15
"""Steps of the wheel in one movement: each takes 20 ms."""


class Occupant(Protocol):
    """A client that watches, or wants to hold, the keyboard and the mouse: a :class:`~farplug.app.client.AppClient`."""

    name: str
    outlet: Outlet

    def watches(self, guest: Guest) -> bool:
        """Return whether the client watches a screen of a guest."""

    def unseated(self, guest: Guest) -> None:
        """Release what the client holds down: another one took the keyboard and the mouse, or it released them."""


class Seat:
    """Which client holds the keyboard and the mouse of a guest.

    Args:
        guest: the guest.

    Attributes:
        holder: the client; None: no client does.
    """

    def __init__(self, guest: Guest) -> None:
        self.holder: Occupant | None = None
        self._guest = guest
        self._members: dict[Occupant, None] = {}
        self._reporting = False

    def join(self, member: Occupant) -> None:
        """Report to this client from now on who holds the keyboard and the mouse."""
        self._members[member] = None
        self.changed()

    def leave(self, member: Occupant) -> None:
        """Report nothing more to this client, which releases what it holds."""
        if self._members.pop(member, member) is None:
            self.release(member)
            self.changed()

    def take(self, member: Occupant) -> None:
        """Let this client hold the keyboard and the mouse, in place of any other."""
        previous, self.holder = self.holder, member
        if previous is not None and previous is not member:
            previous.unseated(self._guest)
        self.join(member)

    def release(self, member: Occupant) -> None:
        """Release the keyboard and the mouse, if this client holds them."""
        if self.holder is member:
            self.holder = None
            member.unseated(self._guest)
            self.changed()

    def changed(self) -> None:
        """Report soon who holds the keyboard and the mouse, and how many others watch."""
        if not self._reporting:
            self._reporting = True
            asyncio.get_running_loop().call_soon(self._report)  # after the reply of the method that changed it

    def _report(self) -> None:
        self._reporting = False
        for member in self._members:
            member.outlet.post(("driving", self._guest), lambda member=member: self._event(member))  # type: ignore[misc]

    def _event(self, member: Occupant) -> ClientEvent:
        holder = self.holder
        return ClientEvent(
            "driving",
            {
                "guest": self._guest.id,
                "holder": None if holder is None else {"name": holder.name, "you": holder is member},
                "watchers": sum(one is not holder and one.watches(self._guest) for one in self._members),
            },
        )


class Hands:
    """The keys and the buttons that a client holds down. What it sends stays in its order.

    Args:
        guest: the guest.
    """

    def __init__(self, guest: Guest) -> None:
        self._inputs = guest.inputs
        self._turn = asyncio.Lock()
        self._keys: list[bytes] = []
        self._buttons: list[Button] = []

    async def key(self, code: bytes, *, down: bool) -> None:
        """Press a key, and hold it, or release it. A key that is held already repeats.

        Raises:
            UsageError: too many keys are held (``BAD_KEY``).
            TargetError: the VM has no inputs.
            GuestGoneError: the VM is gone.
        """
        async with self._turn:
            if not down:
                if code in self._keys:
                    self._keys.remove(code)
                    await self._inputs.release([code])
                return
            if code not in self._keys:
                held = self._inputs.held
                self._keys = [one for one in self._keys if one in held]  # the VM was lost meanwhile
                if len(self._keys) >= MAX_HELD:
                    raise UsageError(f"{MAX_HELD} keys are held down already", reason=Reason.BAD_KEY)
                self._keys.append(code)
            await self._inputs.hold_down(code)

    async def point(
        self,
        position: tuple[int, int] | None,
        distance: tuple[int, int] | None,
        buttons: Collection[Button] | None,
        wheel: int,
        display: int,
    ) -> None:
        """Move the pointer, hold the buttons and no others, and turn the wheel, in this order.

        If the pointer cannot be moved, buttons are released and none is pressed.

        Raises:
            UsageError: the pointer of the VM is moved to positions, or the wheel is turned too far (``BAD_SETTING``).
            RefusedError: the VM has no pointer that can be moved to a position (``NO_TABLET``).
            TargetError: the VM has no inputs, or no such display.
            GuestGoneError: the VM is gone.
        """
        if abs(wheel) > MAX_WHEEL:
            raise UsageError(f"{wheel} steps of the wheel: at most {MAX_WHEEL}", reason=Reason.BAD_SETTING)
        async with self._turn:
            try:
                if position is not None:
                    await self._inputs.move(*position, display=display)
                if distance is not None:
                    await self._inputs.move_by(*distance)
            except BaseException:
                if buttons is not None:
                    await self._hold([one for one in self._buttons if one in buttons])
                raise
            if buttons is not None:
                await self._hold(buttons)
            if wheel:
                await self._inputs.wheel(wheel)

    async def _hold(self, buttons: Collection[Button]) -> None:
        """Hold these buttons, and no others."""
        released = [one for one in self._buttons if one not in buttons]
        pressed = [one for one in buttons if one not in self._buttons]
        self._buttons = [*buttons]
        await self._inputs.change_buttons(pressed, released)

    async def release(self) -> None:
        """Release all keys and buttons. If the VM is gone, they are released already."""
        async with self._turn:
            keys, self._keys = self._keys, []
            buttons, self._buttons = self._buttons, []
            try:
                await self._inputs.release(keys)
                await self._inputs.change_buttons([], buttons)
            except FarplugError:
                pass


def not_driving() -> StateError:
    """Return the error for a client that does not hold the keyboard and the mouse."""
    return StateError(
        "this client does not hold the keyboard and the mouse",
        reason=Reason.NOT_DRIVING,
        remedy="take them first",
    )


def taken(holder: str) -> StateError:
    """Return the error for a client that takes the keyboard and the mouse only if no other client holds them."""
    return StateError(
        f"{holder or 'another client'} holds the keyboard and the mouse",
        reason=Reason.NOT_DRIVING,
        remedy="wait until they are released",
    )
