"""Which devices of this machine are to be plugged in, and when: decisions, without doing anything.

A device is plugged because a person named it, or because a rule takes it: of those that are there at the start
(redirect on connect), or of those that come later (auto-connect). What was plugged once is plugged again when it comes
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from farplug.app.settings import DeviceRules, Follow
from farplug.errors import DeviceError, FarplugError, Reason, Remedy, UsageError
from farplug.machine.choose import Choice
from farplug.machine.device_info import DeviceInfo
from farplug.usbredir.filter import Filter, Rule
from farplug.usbredir.rules import parse_rules

MAX_FORMER: Final = 64
"""Slots that a rule made and that are empty now; of more than these the oldest are forgotten."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Which devices to plug: :class:`~farplug.app.settings.DeviceRules` and the named devices, parsed.

    Attributes:
        choices: the devices that a user named.
        wait: wait for the named devices that are not there yet.
        follow: by what a device that comes back is recognised.
        allowed: what may be plugged at all; None: everything.
        on_connect: which devices that are there at the start are plugged; None: only the named ones.
        later: which devices that come later are plugged; None: none.
        force: also disks that this machine uses.
    """

    choices: Sequence[Choice] = ()
    wait: bool = False
    follow: Follow = Follow.DEVICE
    allowed: Filter | None = None
    on_connect: Filter | None = None
    later: Filter | None = None
    force: bool = False

    @classmethod
    def parse(cls, settings: DeviceRules, devices: Sequence[str]) -> Self:
        """Parse settings and the devices that a user named.

        Raises:
            UsageError: a rule or a device is not valid.
        """
        return cls(
            choices=[Choice.parse(device) for device in devices],
            wait=settings.wait,
            follow=settings.follow,
            allowed=None if settings.filter is None else parse_rules(settings.filter),
            on_connect=None if settings.redirect_on_connect is None else parse_rules(settings.redirect_on_connect),
            later=None if settings.auto_connect is None else parse_rules(settings.auto_connect),
            force=settings.force,
        )


@dataclass(slots=True, eq=False)
class Slot:
    """A place for one device: what it takes, and what sits in it.

    Attributes:
        choice: how the device was named; None: a rule took it.
        found: the device that is plugged, or is being plugged.
        last: the one before that left.
    """

    choice: Choice | None = None
    found: DeviceInfo | None = None
    last: DeviceInfo | None = None

    @property
    def named(self) -> bool:
        """Return whether the user named the device: then it is an error if it cannot be plugged in."""
        return self.choice is not None

    def __str__(self) -> str:
        return str(self.found or self.last or self.choice)


@dataclass(frozen=True, slots=True)
class Plug:
    """Plug ``found`` in, for ``slot``. ``again``: it came back."""

    slot: Slot
    found: DeviceInfo
    again: bool = False


@dataclass(frozen=True, slots=True)
class Skip:
    """Leave ``found`` alone although the user may expect it to be plugged in; ``error`` gives the reason."""

    found: DeviceInfo
    error: FarplugError


@dataclass(slots=True)
class Policy:
    """Decides which devices are plugged in. Call :meth:`begin` first, then the methods for arrivals and departures."""

    rules: Rules
    slots: list[Slot] = field(default_factory=list)

    def begin(self, present: Sequence[DeviceInfo]) -> list[Plug | Skip]:
        """Decide about those that are there.

        Raises:
            UsageError: a choice is ambiguous, or two name the same device.
            DeviceError: one that was named is not there, or cannot be plugged.
        """
        decisions: list[Plug | Skip] = []
        for choice in self.rules.choices:
            slot = Slot(choice)
            self.slots.append(slot)
            if self.rules.wait and not choice.candidates(present):
                continue
            found = choice.choose(present)
            other = self._slot_of(found)
            if other is not None:
                raise UsageError(
                    f"{str(other.choice)!r} and {choice.text!r} name the same device, {found}",
                    reason=Reason.BAD_OPTION,
                    remedy="name it once",
                )
            self._check(found)
            slot.found = found
            decisions.append(Plug(slot, found))
        if self.rules.on_connect is not None:
            for found in present:
                decisions += self._by_rules(found, self.rules.on_connect)
        return decisions

    def arrived(self, found: DeviceInfo) -> Plug | Skip | None:
        """Decide about one that came, or that can be used only now."""
        if self._slot_of(found) is not None:
            return None
        slot = self._returning(found) or next((slot for slot in self.slots if self._waits_for(slot, found)), None)
        if slot is not None:
            try:
                if not slot.named:
                    _check_caution(found, self.rules.on_connect, self.rules.later)
                self._check(found)
            except DeviceError as error:
                return Skip(found, error)
            slot.found, again = found, slot.last is not None
            return Plug(slot, found, again)
        if self.rules.later is not None:
            return next(iter(self._by_rules(found, self.rules.later)), None)
        return None

    def departed(self, found: DeviceInfo) -> Slot | None:
        """Take note that one is gone; the slot that waits for it now."""
        slot = self._slot_of(found)
        if slot is not None:
            self._vacate(slot)
        return slot

    def given_up(self, slot: Slot) -> None:
        """Take note that the device of a slot could not be plugged, or that the guest is done with it."""
        if slot.found is not None:
            self._vacate(slot)

    def forget(self, slot: Slot) -> None:
        """Take note that a user detached the device of a slot: it does not come back by itself."""
        if slot in self.slots:
            self.slots.remove(slot)

    def _vacate(self, slot: Slot) -> None:
        slot.found, slot.last = None, slot.found
        if not slot.named:  # the last one that became empty is the last one to be forgotten
            self.slots.remove(slot)
            self.slots.append(slot)
            former = [slot for slot in self.slots if not slot.named and slot.found is None]
            for oldest in former[:-MAX_FORMER]:
                self.slots.remove(oldest)

    def _slot_of(self, found: DeviceInfo) -> Slot | None:
        return next((slot for slot in self.slots if slot.found is not None and slot.found.key == found.key), None)

    def _returning(self, found: DeviceInfo) -> Slot | None:
        """The slot of a device that came back; rather one that sat in the same port."""
        waiting = [slot for slot in self.slots if slot.found is None and slot.last is not None]
        in_port = [slot for slot in waiting if slot.last is not None and _same_port(slot.last, found)]
        if self.rules.follow is Follow.PORT:
            return next(iter(in_port), None)
        same = [slot for slot in [*in_port, *waiting] if slot.last is not None and _same_device(slot.last, found)]
        return next(iter(same), None)

    def _waits_for(self, slot: Slot, found: DeviceInfo) -> bool:
        """Return whether the user named it: a device that was not there yet, or another one with the same ids."""
        if slot.found is not None or slot.choice is None or not slot.choice.candidates([found]):
            return False
        return slot.last is None or (self.rules.follow is Follow.DEVICE and not slot.choice.is_location)

    def _check(self, found: DeviceInfo) -> None:
        """Raise ``DeviceError`` if it must not, or cannot, be plugged."""
        if self.rules.allowed is not None:
            obstacle = found.filtered(self.rules.allowed)
            if obstacle is not None:
                raise obstacle.error(found)
        found.check(force=self.rules.force)

    def _by_rules(self, found: DeviceInfo, rules: Filter) -> list[Plug | Skip]:
        """At most one decision."""
        if self._slot_of(found) is not None or found.is_hub or not found.judge(rules).allowed:
            return []
        try:
            _check_caution(found, rules)
            self._check(found)
        except DeviceError as error:
            return [Skip(found, error)]
        slot = Slot(found=found)
        self.slots.append(slot)
        return [Plug(slot, found)]


def _check_caution(found: DeviceInfo, *filters: Filter | None) -> None:
    """Raise ``DeviceError`` if this machine uses the device, and no rule names it."""
    named = any(_names(rule, found) for filter in filters if filter is not None for rule in filter.rules)
    if found.in_use_as is not None and not named:
        raise DeviceError(
            f"{found} is left alone: {found.in_use_as}",
            reason=found.in_use_as.reason,
            remedy=Remedy(
                "to plug it in nevertheless, write a rule that names it "
                f"(allow vendor={found.vendor_id:04x} product={found.product_id:04x}), or name the device",
                setting="usb_device",
                value=f"port:{found.port}",
            ),
        )


def _same_port(one: DeviceInfo, other: DeviceInfo) -> bool:
    """A socket has one port for USB 2 and another one for SuperSpeed."""
    ports = {one.port, one.peer_port} & {other.port, other.peer_port}
    return bool(ports - {""})


def _same_device(one: DeviceInfo, other: DeviceInfo) -> bool:
    return (one.id, one.serial_number) == (other.id, other.serial_number)


def _names(rule: Rule, found: DeviceInfo) -> bool:
    """Return whether a rule allows exactly this kind of device: then its author knows what it is."""
    return rule.allow and (rule.vendor_id, rule.product_id) == (found.vendor_id, found.product_id)
