"""Which devices of this machine are to be plugged in, and when: decisions, without doing anything.

A device is plugged because a person named it, or because a rule takes it: of those that are there at the start
(redirect on connect), or of those that come later (auto-connect). What was plugged once is plugged again when it comes
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from farplug.errors import DeviceError, FarplugError, Reason, UsageError
from farplug.machine.choose import Choice
from farplug.machine.found import Found
from farplug.usbredir.filter import Filter, Rule

MAX_FORMER: Final = 64
"""Seats that a rule made and that are empty now; of more than these the oldest are forgotten."""


class Follow(StrEnum):
    """What a device that comes back is known by."""

    DEVICE = "device"
    """Its ids and its serial number, in whatever port; or that it is what a person named, unless they named a place."""
    PORT = "port"
    """The port, whatever is in it: a device may come back under another id (a firmware update)."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a person wants.

    Attributes:
        choices: devices that were named.
        wait: for those that are not there yet.
        follow: what a device that comes back is known by.
        allowed: what may be plugged at all; None: everything.
        on_connect: which of those that are there at the start are plugged; None: none but the named ones.
        later: which of those that come later are plugged; None likewise.
        force: also disks that this machine uses.
    """

    choices: Sequence[Choice] = ()
    wait: bool = False
    follow: Follow = Follow.DEVICE
    allowed: Filter | None = None
    on_connect: Filter | None = None
    later: Filter | None = None
    force: bool = False

    @property
    def stays(self) -> bool:
        """Whether a device may still come."""
        return self.wait or self.later is not None


@dataclass(slots=True, eq=False)
class Seat:
    """A place for one device: what it takes, and what sits in it.

    Attributes:
        choice: how the device was named; None: a rule took it.
        found: the device that is plugged, or is being plugged.
        last: the one before that left.
    """

    choice: Choice | None = None
    found: Found | None = None
    last: Found | None = None

    @property
    def named(self) -> bool:
        """Whether a person asked for it: then it is an error if it cannot be plugged."""
        return self.choice is not None

    def __str__(self) -> str:
        return str(self.found or self.last or self.choice)


@dataclass(frozen=True, slots=True)
class Plug:
    """Plug ``found`` in, for ``seat``. ``again``: it came back."""

    seat: Seat
    found: Found
    again: bool = False


@dataclass(frozen=True, slots=True)
class Skip:
    """Leave ``found`` alone although somebody may expect it to be plugged; ``error`` says why."""

    found: Found
    error: FarplugError


@dataclass(slots=True)
class Policy:
    """Decides. Tell it what is there (:meth:`begin`), then what comes and goes, in this order."""

    wishes: Wishes
    seats: list[Seat] = field(default_factory=list)

    def begin(self, present: Sequence[Found]) -> list[Plug | Skip]:
        """Decide about those that are there.

        Raises:
            UsageError: a choice is ambiguous, or two name the same device.
            DeviceError: one that was named is not there, or cannot be plugged.
        """
        decisions: list[Plug | Skip] = []
        for choice in self.wishes.choices:
            seat = Seat(choice)
            self.seats.append(seat)
            if self.wishes.wait and not choice.candidates(present):
                continue
            found = choice.choose(present)
            other = self._seat_of(found)
            if other is not None:
                raise UsageError(
                    f"{str(other.choice)!r} and {choice.text!r} name the same device, {found}",
                    reason=Reason.BAD_OPTION,
                    remedy="name it once",
                )
            self._check(found)
            seat.found = found
            decisions.append(Plug(seat, found))
        if self.wishes.on_connect is not None:
            for found in present:
                decisions += self._by_rules(found, self.wishes.on_connect)
        return decisions

    def arrived(self, found: Found) -> Plug | Skip | None:
        """Decide about one that came, or that can be used only now."""
        if self._seat_of(found) is not None:
            return None
        seat = self._returning(found) or next((seat for seat in self.seats if self._waits_for(seat, found)), None)
        if seat is not None:
            try:
                if not seat.named:
                    _check_caution(found, self.wishes.on_connect, self.wishes.later)
                self._check(found)
            except DeviceError as error:
                return Skip(found, error)
            seat.found, again = found, seat.last is not None
            return Plug(seat, found, again)
        if self.wishes.later is not None:
            return next(iter(self._by_rules(found, self.wishes.later)), None)
        return None

    def departed(self, found: Found) -> Seat | None:
        """Take note that one is gone; the seat that waits for it now."""
        seat = self._seat_of(found)
        if seat is not None:
            self._vacate(seat)
        return seat

    def given_up(self, seat: Seat) -> None:
        """Take note that the device of a seat could not be plugged, or that the guest is done with it."""
        if seat.found is not None:
            self._vacate(seat)

    def _vacate(self, seat: Seat) -> None:
        seat.found, seat.last = None, seat.found
        if not seat.named:  # the last one that became empty is the last one to be forgotten
            self.seats.remove(seat)
            self.seats.append(seat)
            former = [seat for seat in self.seats if not seat.named and seat.found is None]
            for oldest in former[:-MAX_FORMER]:
                self.seats.remove(oldest)

    def _seat_of(self, found: Found) -> Seat | None:
        return next((seat for seat in self.seats if seat.found is not None and seat.found.key == found.key), None)

    def _returning(self, found: Found) -> Seat | None:
        """The seat of a device that came back; rather one that sat in the same port."""
        waiting = [seat for seat in self.seats if seat.found is None and seat.last is not None]
        in_port = [seat for seat in waiting if seat.last is not None and _same_port(seat.last, found)]
        if self.wishes.follow is Follow.PORT:
            return next(iter(in_port), None)
        same = [seat for seat in [*in_port, *waiting] if seat.last is not None and _same_device(seat.last, found)]
        return next(iter(same), None)

    def _waits_for(self, seat: Seat, found: Found) -> bool:
        """Whether it is what a person named: one that was not there yet, or another one of its kind."""
        if seat.found is not None or seat.choice is None or not seat.choice.candidates([found]):
            return False
        return seat.last is None or (self.wishes.follow is Follow.DEVICE and not seat.choice.is_place)

    def _check(self, found: Found) -> None:
        """Raise ``DeviceError`` if it must not, or cannot, be plugged."""
        if self.wishes.allowed is not None:
            obstacle = found.filtered(self.wishes.allowed)
            if obstacle is not None:
                raise obstacle.error(found)
        found.check(force=self.wishes.force)

    def _by_rules(self, found: Found, rules: Filter) -> list[Plug | Skip]:
        """At most one decision."""
        if self._seat_of(found) is not None or found.is_hub or not found.judge(rules).allowed:
            return []
        try:
            _check_caution(found, rules)
            self._check(found)
        except DeviceError as error:
            return [Skip(found, error)]
        seat = Seat(found=found)
        self.seats.append(seat)
        return [Plug(seat, found)]


def _check_caution(found: Found, *filters: Filter | None) -> None:
    """Raise ``DeviceError`` if somebody may want to keep it, and no rule names it."""
    named = any(_names(rule, found) for filter in filters if filter is not None for rule in filter.rules)
    if found.caution is not None and not named:
        raise DeviceError(
            f"{found} is left alone: {found.caution}",
            reason=found.caution.reason,
            remedy=f"to plug it in nevertheless: --usb-device port:{found.port}, or a rule that names it: "
            f"allow vendor={found.vendor_id:04x} product={found.product_id:04x}",
        )


def _same_port(one: Found, other: Found) -> bool:
    """A socket has one port for USB 2 and another one for SuperSpeed."""
    ports = {one.port, one.peer_port} & {other.port, other.peer_port}
    return bool(ports - {""})


def _same_device(one: Found, other: Found) -> bool:
    return (one.id, one.serial_number) == (other.id, other.serial_number)


def _names(rule: Rule, found: Found) -> bool:
    """Whether a rule allows just this kind of device: then the person who wrote it knows what it is."""
    return rule.allow and (rule.vendor_id, rule.product_id) == (found.vendor_id, found.product_id)
