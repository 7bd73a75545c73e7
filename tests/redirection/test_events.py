from __future__ import annotations

import json
from pathlib import Path

import pytest

from farplug.errors import DeviceError, Reason
from farplug.redirection import events
from farplug.redirection.events import OfferProblem
from farplug.usb.device import Identity, Offer
from farplug.usb.figures import EndpointFigures
from farplug.usb.types import Speed
from farplug.virtual.events import (
    EndChanged,
    FunctionRaised,
    LineBreak,
    LineChanged,
    MediumEjected,
    MediumInserted,
    MediumLocked,
)
from farplug.virtual.fido.events import KeyUsed, PresenceAnswered, PresenceAsked
from farplug.virtual.fido.presence import Answer

IDENTITY = Identity(speed=Speed.SUPER, vendor_id=0x1D6B, product_id=0x0104, manufacturer="farplug", product="Disk")
ERROR = DeviceError("it is gone", reason=Reason.DEVICE_LOST, remedy="wait")

EVENTS: dict[str, tuple[events.PortEvent, str]] = {
    "opened": (events.Opened("tcp", 0), "connected to port 0 of the guest (tcp)"),
    "waiting-for-guest": (
        events.WaitingForGuest("tcp"),
        "the guest has not answered yet: its VM may be paused, or the port may serve another client; waiting",
    ),
    "guest-ready": (events.GuestReady("tcp", "", ("filter",)), "the guest is ready (no version given)"),
    "attached": (
        events.Attached("tcp", IDENTITY, Speed.SUPER),
        "attached as 1d6b:0104 farplug Disk at SuperSpeed (5 Gb/s)",
    ),
    "unused": (
        events.Unused("tcp"),
        "the VM has not used the device yet: does an operating system run there, or is the VM paused?",
    ),
    "configured": (events.Configured("tcp", 0), "unconfigured by the guest (configuration 0)"),
    "port-reset": (events.PortReset("tcp"), "reset by the guest"),
    "offer-changed": (
        events.OfferChanged("tcp", OfferProblem.SPEED, Offer(Speed.SUPER), Offer(Speed.HIGH)),
        "the guest's port does not support SuperSpeed (5 Gb/s): trying High Speed (480 Mb/s)",
    ),
    "peer-violation": (events.PeerViolation("tcp", ERROR), "the guest violated the protocol: it is gone"),
    "device-fault": (events.DeviceFault("tcp", ValueError("x")), "device error: ValueError: x"),
    "refused": (events.Refused("tcp", ERROR), "it is gone"),
    "medium-inserted": (events.DeviceReport("tcp", MediumInserted("a.iso")), "a.iso inserted"),
    "medium-ejected": (events.DeviceReport("tcp", MediumEjected("a.iso", by_guest=True)), "a.iso ejected by the guest"),
    "medium-locked": (events.DeviceReport("tcp", MediumLocked(locked=True)), "locked by the guest"),
    "function-raised": (
        events.DeviceReport("tcp", FunctionRaised("Keyboard", ValueError("x"))),
        "Keyboard raised ValueError: x",
    ),
    "end-changed": (
        events.DeviceReport("tcp", EndChanged("serial line", "/dev/pts/5", True, "a program is connected")),
        "serial line: a program is connected",
    ),
    "line-changed": (
        events.DeviceReport("tcp", LineChanged("115200 8N1", dtr=False, rts=True)),
        "line set to 115200 8N1, RTS on",
    ),
    "line-break": (events.DeviceReport("tcp", LineBreak()), "break sent by the guest"),
    "presence-asked": (
        events.DeviceReport(
            "tcp",
            PresenceAsked(request=1, use="sign-in", site="example.com", user="alice", seconds=30, until=1800000000.5),
        ),
        "the VM waits for your answer: sign in at example.com as alice (30 s)",
    ),
    "presence-answered": (
        events.DeviceReport("tcp", PresenceAnswered(request=1, answer=Answer.TIMED_OUT)),
        "no answer in time: refused",
    ),
    "key-used": (
        events.DeviceReport("tcp", KeyUsed("register", "example.com", "", "operation-denied")),
        "register the key at example.com: operation denied",
    ),
    "repeated": (events.Repeated("tcp", events.Configured("tcp", 1), 7), "7 more like this"),
    "detached": (events.Detached("tcp", ERROR, (EndpointFigures(0x81, 2, 512),)), "detached: it is gone"),
}


def test_every_event_has_a_stable_name_a_line_and_a_json_form() -> None:
    kinds = {kind.__name__ for kind in events.PortEvent.__subclasses__()}
    assert {type(event).__name__ for event, _ in EVENTS.values()} == kinds
    for name, (event, line) in EVENTS.items():
        assert event.name == name
        assert str(event) == line
        values = json.loads(json.dumps(events.as_dict(event)))
        assert (values["event"], values["port"], values["message"]) == (name, "tcp", line)


def test_every_event_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "exit-codes.md").read_text()
    assert all(f"\n| `{name}` |" in text for name in EVENTS)


def test_values() -> None:
    values = events.as_dict(EVENTS["detached"][0])
    assert values["error"] == {"reason": "device-lost", "message": "it is gone", "remedy": "wait"}
    assert values["figures"][0]["bytes"] == 512
    assert events.as_dict(EVENTS["device-fault"][0])["error"] == {"message": "ValueError: x"}
    repeated = events.as_dict(EVENTS["repeated"][0])
    assert (repeated["port"], repeated["of"], repeated["count"]) == ("tcp", "configured", 7)
    attached = events.as_dict(EVENTS["attached"][0])
    assert (attached["speed"], attached["identity"]["product_id"]) == ("super", 0x0104)
    assert events.as_dict(events.Detached("tcp", None))["error"] is None
    ejected = events.as_dict(EVENTS["medium-ejected"][0])
    assert (ejected["port"], ejected["medium"], ejected["by_guest"]) == ("tcp", "a.iso", True)


BEST, LESSER, LEAST = (
    Offer(Speed.SUPER),
    Offer(Speed.SUPER, "USB Attached SCSI"),
    Offer(Speed.HIGH, "USB Attached SCSI"),
)


@pytest.mark.parametrize(
    ("why", "before", "offer", "line"),
    [
        (
            OfferProblem.STREAMS, BEST, Offer(Speed.HIGH),
            "the guest's port has no bulk streams for SuperSpeed (5 Gb/s): trying High Speed (480 Mb/s)",
        ),
        (
            OfferProblem.NOT_CONFIGURED, BEST, Offer(Speed.HIGH),
            "the guest read the descriptors of the device, but did not configure it: trying High Speed (480 Mb/s)",
        ),
        (
            OfferProblem.NOT_USED, BEST, LESSER,
            "the guest configured the device, but does not use it: trying without USB Attached SCSI",
        ),
        (
            OfferProblem.NOT_USED, LESSER, LEAST,
            "the guest configured the device, but does not use it: trying High Speed (480 Mb/s)",
        ),
        (
            OfferProblem.ALL, LEAST, BEST,
            "the guest used none of the device's offers: back to SuperSpeed (5 Gb/s) with USB Attached SCSI",
        ),
    ],
)  # fmt: skip
def test_offer_changed(why: OfferProblem, before: Offer, offer: Offer, line: str) -> None:
    event = events.OfferChanged("tcp", why, before, offer)
    assert str(event) == line
    values = json.loads(json.dumps(events.as_dict(event)))
    assert values["why"] == why.value
    assert values["before"] == {"speed": before.speed.name.lower(), "without": before.without}
    assert values["offer"] == {"speed": offer.speed.name.lower(), "without": offer.without}


def test_configured() -> None:
    assert str(events.Configured("tcp", 1)) == "configured by the guest (configuration 1)"
    assert str(events.GuestReady("tcp", "qemu 9", ("filter",))) == "the guest is ready (qemu 9)"
    assert str(events.Detached("tcp", None)) == "detached"
    assert str(MediumEjected("a.iso", by_guest=False)) == "a.iso ejected"
    assert str(MediumLocked(locked=False)) == "unlocked by the guest"


def test_every_speed_has_a_name() -> None:
    assert all(events.speed_name(speed) for speed in Speed)
