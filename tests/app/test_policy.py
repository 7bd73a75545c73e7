from __future__ import annotations

from dataclasses import replace

import pytest

from farplug.app.policy import MAX_FORMER, Plug, Policy, Rules, Skip, Slot
from farplug.app.settings import Follow
from farplug.errors import DeviceError, Reason, Remedy, UsageError
from farplug.exit_codes import ExitCode, exit_code
from farplug.machine.choose import Choice
from farplug.machine.device_info import DeviceInfo, InterfaceInfo, Obstacle
from farplug.usbredir.rules import parse_rules

BUSY = Obstacle(Reason.BUSY, "another program uses it", Remedy("end that program first"))
MOUNTED = Obstacle(Reason.IN_USE, "this machine uses the disk", forceable=True)
TYPED_ON = Obstacle(Reason.INPUT_DEVICE, "it is a keyboard of this machine")

HUB = DeviceInfo(1, 1, "usb1", 0x1D6B, 2, codes=(9, 0, 1), obstacles=(Obstacle(Reason.HUB, "it is a USB hub"),))
STICK = DeviceInfo(1, 5, "1-2", 0x0781, 0x5581, serial_number="S", interfaces=(InterfaceInfo(0, (8, 6, 0x50)),))
SERIAL = DeviceInfo(1, 6, "1-3", 0x0403, 0x6001, interfaces=(InterfaceInfo(0, (255, 0, 0)),))
TWIN = DeviceInfo(1, 7, "1-4", 0x0403, 0x6001, interfaces=(InterfaceInfo(0, (255, 0, 0)),))
KEYBOARD = DeviceInfo(
    1, 8, "1-5", 0x046D, 0xC31C, interfaces=(InterfaceInfo(0, (3, 1, 1), "usbhid"),), in_use_as=TYPED_ON
)
PRESENT = (HUB, STICK, SERIAL, KEYBOARD)


def policy(*choices: str, **options: object) -> Policy:
    named = ("allowed", "on_connect", "later")
    rules = {name: parse_rules(str(options.pop(name))) for name in named if name in options}
    return Policy(Rules([Choice.parse(choice) for choice in choices], **rules, **options))  # type: ignore[arg-type]


def plugged(*decisions: Plug | Skip | None) -> list[DeviceInfo]:
    return [decision.found for decision in decisions if isinstance(decision, Plug)]


def again(found: DeviceInfo, **changes: object) -> DeviceInfo:
    """The device after it was pulled out and plugged in: another address."""
    return replace(found, **{"address": found.address + 20, **changes})  # type: ignore[arg-type]


def back(policy: Policy, found: DeviceInfo, **changes: object) -> Plug | Skip | None:
    policy.departed(found)
    return policy.arrived(again(found, **changes))


def test_what_was_named_is_plugged() -> None:
    it = policy("0781:5581", "1-3")
    assert plugged(*it.begin(PRESENT)) == [STICK, SERIAL]
    assert [str(slot) for slot in it.slots] == [str(STICK), str(SERIAL)]
    assert it.arrived(TWIN) is None


def test_a_keyboard_that_was_named_is_plugged() -> None:
    assert plugged(*policy("046d:c31c").begin(PRESENT)) == [KEYBOARD]


@pytest.mark.parametrize(
    ("choices", "kind", "reason", "said"),
    [
        (["dead:beef"], DeviceError, Reason.NOT_FOUND, "no USB device matches 'dead:beef'"),
        (["0403:6001"], UsageError, Reason.AMBIGUOUS, "2 USB devices match '0403:6001'"),
        (["usb1", "1d6b:2"], DeviceError, Reason.NOT_FOUND, "no USB device matches 'usb1'"),
        (["1d6b:2"], DeviceError, Reason.HUB, "it is a USB hub"),
        (["1-3", "1-6"], UsageError, Reason.BAD_OPTION, "'1-3' and '1-6' name the same device, 0403:6001 (port 1-3)"),
    ],
)
@pytest.mark.parametrize("wait", [True, False])
def test_choices_that_cannot_be(
    choices: list[str], kind: type[Exception], reason: Reason, said: str, wait: bool
) -> None:
    if wait and reason is Reason.NOT_FOUND:
        return
    with pytest.raises((UsageError, DeviceError)) as caught:
        policy(*choices, wait=wait).begin([*PRESENT, TWIN])
    assert isinstance(caught.value, kind)
    assert caught.value.reason is reason
    assert said in caught.value.message


def test_the_filter_here_with_the_rule_that_decided() -> None:
    with pytest.raises(DeviceError) as caught:
        policy("1-3", allowed="allow class=hid; deny vendor=0403; allow").begin(PRESENT)
    assert caught.value.message == (
        "0403:6001 (port 1-3) cannot be plugged in: the filter of this machine does not allow it: "
        "rule 2 (deny vendor=0403) denies its class vendor-specific (ff)"
    )
    assert (caught.value.reason, exit_code(caught.value)) == (Reason.FILTERED, ExitCode.DEVICE)
    with pytest.raises(DeviceError, match=r"no rule matches its class storage \(08\)"):
        policy("1-2", allowed="allow class=hid").begin(PRESENT)
    assert plugged(*policy("1-2", allowed="deny class=hid; allow").begin(PRESENT)) == [STICK]


def test_a_device_whose_interfaces_are_unknown_passes_no_filter_by_accident() -> None:
    unknown = replace(STICK, interfaces=())
    with pytest.raises(DeviceError, match="no rule matches its class per-interface"):
        policy("1-2", allowed="allow class=hid").begin([unknown])
    assert plugged(*policy("1-2", allowed="allow").begin([unknown])) == [unknown]


def test_force_is_for_dangers_only() -> None:
    mounted, busy = replace(STICK, obstacles=(MOUNTED,)), replace(STICK, obstacles=(MOUNTED, BUSY))
    with pytest.raises(DeviceError) as caught:
        policy("1-2").begin([mounted])
    assert caught.value.reason is Reason.IN_USE
    assert plugged(*policy("1-2", force=True).begin([mounted])) == [mounted]
    with pytest.raises(DeviceError) as caught:
        policy("1-2", force=True).begin([busy])
    assert caught.value.reason is Reason.BUSY


def test_waiting_for_one_that_is_not_there() -> None:
    it = policy("0781:5581", "0403:6001", wait=True)
    assert plugged(*it.begin([SERIAL])) == [SERIAL]
    assert it.arrived(TWIN) is None
    assert plugged(it.arrived(STICK)) == [STICK]
    assert it.arrived(again(STICK)) is None


def test_waiting_for_one_that_comes_and_cannot_be_plugged() -> None:
    it = policy("0781:5581", wait=True)
    assert it.begin([]) == []
    busy = replace(STICK, obstacles=(BUSY,))
    decision = it.arrived(busy)
    assert isinstance(decision, Skip)
    assert decision.error.reason is Reason.BUSY
    assert plugged(it.arrived(again(STICK))) == [again(STICK)]


def test_pulled_out_and_plugged_in_again() -> None:
    it = policy("1-2", "1-3")
    it.begin(PRESENT)
    decision = back(it, STICK, port="2-7", bus=2)
    assert isinstance(decision, Plug)
    assert (decision.again, decision.slot.choice) == (True, Choice.parse("1-2"))
    assert it.departed(TWIN) is None
    it.departed(SERIAL)
    assert it.arrived(again(SERIAL, product_id=0x6015)) is None, "another device in the same port"
    assert it.arrived(again(SERIAL, serial_number="new")) is None
    assert plugged(it.arrived(TWIN)) == [TWIN], "without serial numbers they cannot be distinguished"


@pytest.mark.parametrize(
    ("choice", "follow", "taken"),
    [
        ("0781:5581", Follow.DEVICE, True),
        ("serial:S", Follow.DEVICE, False),
        ("1-2", Follow.DEVICE, False),
        ("port:1-2", Follow.DEVICE, False),
        ("0781:5581", Follow.PORT, False),
    ],
)
def test_another_one_of_the_kind_that_was_named(choice: str, follow: Follow, taken: bool) -> None:
    it = policy(choice, follow=follow)
    it.begin(PRESENT)
    it.departed(STICK)
    assert bool(plugged(it.arrived(again(STICK, port="1-9", serial_number="another")))) is taken


def test_two_alike_come_back_to_their_ports() -> None:
    it = policy("1-3", "1-4")
    it.begin([SERIAL, TWIN])
    first, second = it.slots
    it.departed(SERIAL)
    it.departed(TWIN)
    for found, slot in ((TWIN, second), (SERIAL, first)):
        decision = it.arrived(again(found))
        assert isinstance(decision, Plug)
        assert decision.slot is slot


@pytest.mark.parametrize(
    ("before", "after", "follows"),
    [
        ({}, {"product_id": 0xDF11, "vendor_id": 0x0483, "serial_number": ""}, True),
        ({}, {"port": "1-9"}, False),
        ({"peer_port": "2-2"}, {"port": "2-2", "bus": 2, "peer_port": "1-2"}, True),
        ({"peer_port": "2-2"}, {"port": "2-2", "bus": 2}, True),
        ({}, {"port": "2-2", "bus": 2, "peer_port": "1-2"}, True),
        ({"port": "1-8"}, {"port": "1-9"}, False),  # both without a peer
    ],
)
def test_follow_the_port(before: dict[str, object], after: dict[str, object], follows: bool) -> None:
    it = policy("0781:5581", follow=Follow.PORT)
    stick = replace(STICK, **before)  # type: ignore[arg-type]
    it.begin([stick])
    assert bool(plugged(back(it, stick, **after))) is follows


def test_what_comes_back_is_checked_again() -> None:
    it = policy("1-2", follow=Follow.PORT, allowed="allow class=storage")
    it.begin(PRESENT)
    decision = back(it, STICK, interfaces=KEYBOARD.interfaces)
    assert isinstance(decision, Skip)
    assert decision.error.reason is Reason.FILTERED
    assert plugged(it.arrived(again(STICK))) == [again(STICK)]


def test_a_keyboard_in_the_port_of_what_a_rule_took_is_left_alone() -> None:
    it = policy(on_connect="allow class=storage", follow=Follow.PORT)
    it.begin(PRESENT)
    decision = back(it, STICK, vendor_id=0x046D, in_use_as=TYPED_ON, interfaces=KEYBOARD.interfaces)
    assert isinstance(decision, Skip)
    assert decision.error.reason is Reason.INPUT_DEVICE
    assert plugged(it.arrived(again(STICK))) == [again(STICK)]


def test_given_up() -> None:
    it = policy("1-2")
    it.begin(PRESENT)
    it.given_up(it.slots[0])
    it.given_up(it.slots[0])
    assert it.departed(STICK) is None
    assert plugged(it.arrived(again(STICK))) == [again(STICK)]


def test_redirect_on_connect() -> None:
    it = policy("1-3", on_connect="allow")
    decisions = it.begin(PRESENT)
    assert plugged(*decisions) == [SERIAL, STICK]
    (skip,) = [decision for decision in decisions if isinstance(decision, Skip)]
    assert (skip.found, skip.error.reason) == (KEYBOARD, Reason.INPUT_DEVICE)
    assert "046d:c31c (port 1-5) is left alone: it is a keyboard of this machine" in skip.error.message
    assert (skip.error.remedy.setting, skip.error.remedy.value) == ("usb_device", "port:1-5")
    assert "allow vendor=046d product=c31c" in skip.error.remedy
    assert it.arrived(TWIN) is None
    assert plugged(back(it, STICK)) == [again(STICK)]


@pytest.mark.parametrize(
    ("rules", "taken"),
    [
        ("allow", False),
        ("allow class=hid", False),
        ("allow vendor=046d", False),
        ("allow vendor=046d product=c31c", True),
        ("deny class=hid; allow vendor=046d product=c31c", False),
        ("allow class=hid; deny vendor=046d product=c31c", False),
    ],
)
def test_the_keyboard_is_taken_by_a_rule_that_names_it_only(rules: str, taken: bool) -> None:
    it = policy(later=rules)
    assert it.begin(PRESENT) == []
    assert bool(plugged(it.arrived(again(KEYBOARD)))) is taken


def test_auto_connect() -> None:
    it = policy(later="allow class=storage", allowed="deny vendor=dead; allow")
    assert it.begin(PRESENT) == []
    assert it.arrived(HUB) is None
    assert it.arrived(again(SERIAL)) is None
    new = again(STICK)
    assert plugged(it.arrived(new)) == [new]
    assert it.arrived(new) is None
    for obstacle, reason in ((MOUNTED, Reason.IN_USE), (BUSY, Reason.BUSY)):
        decision = it.arrived(again(STICK, address=99, obstacles=(obstacle,)))
        assert isinstance(decision, Skip)
        assert decision.error.reason is reason
    decision = it.arrived(again(STICK, address=98, vendor_id=0xDEAD))
    assert isinstance(decision, Skip)
    assert decision.error.reason is Reason.FILTERED


def test_devices_that_never_come_back_are_forgotten() -> None:
    it = policy("1-3", later="allow")
    it.begin(PRESENT)
    for number in range(MAX_FORMER + 100):
        found = replace(STICK, address=100 + number, serial_number=str(number))
        assert plugged(it.arrived(found)) == [found]
        it.departed(found)
    assert len(it.slots) == MAX_FORMER + 1
    assert it.slots[0].named


def test_a_seat_by_name() -> None:
    assert str(Slot(Choice.parse("1050:0407"))) == "1050:0407"
