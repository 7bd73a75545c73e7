from __future__ import annotations

import time
from dataclasses import replace
from threading import Thread

import pytest
import usb1
from tests.libusb.fake_libusb import FakeDevice, FakeLibrary
from tests.physical.support import EVERYTHING

from farplug.errors import DeviceError, Reason
from farplug.libusb.identity import read_configurations, read_identity
from farplug.physical import open_device
from farplug.physical.open_device import BusAddress, OpenDevice
from farplug.usb.descriptors import ConfigurationDescriptor, InterfaceDescriptor

SOUND_CARD = ConfigurationDescriptor(1, tuple(InterfaceDescriptor(number, 0, 1, 1, 0) for number in range(4)))
DRIVERS = {0: "audio", 1: "audio", 2: "hid"}


def open_device_of(device: FakeDevice) -> OpenDevice:
    return OpenDevice(
        FakeLibrary(device),
        BusAddress.of(device),
        read_identity(device),
        {c.value: c for c in read_configurations(device)},
    )


def sound_card() -> FakeDevice:
    return FakeDevice(SOUND_CARD, drivers=DRIVERS)


def test_drivers_are_unbound_first_and_bound_again_last() -> None:
    device = sound_card()
    opened = open_device_of(device)
    assert device.drivers == {}
    assert device.calls == [
        *["open", "get_configuration"],
        *["detach 0", "detach 1", "detach 2", "detach 3"],
        *["claim 0", "claim 1", "claim 2", "claim 3"],
        "reset",
    ]
    device.calls.clear()
    opened.release()
    assert device.calls == [
        *["release 3", "release 2", "release 1", "release 0"],
        "reset",
        *["attach 0", "attach 2"],
        "close",
    ]
    assert device.drivers == DRIVERS
    opened.release()
    assert device.calls[-1] == "close"
    assert device.calls.count("close") == 1


def test_no_driver_is_bound_where_there_was_none() -> None:
    device = sound_card()
    device.drivers = {}
    open_device_of(device).release()
    assert device.drivers == {}


@pytest.mark.parametrize("ids", sorted(open_device.NEVER_RESET))
def test_devices_that_do_not_survive_a_reset_are_not_reset(ids: tuple[int, int]) -> None:
    device = FakeDevice(EVERYTHING, ids=ids)
    opened = open_device_of(device)
    opened.reset()
    opened.release()
    assert "reset" not in device.calls


@pytest.mark.parametrize(
    ("failures", "reason", "words"),
    [
        (
            {"open": usb1.USBErrorAccess()},
            Reason.NO_PERMISSION,
            "1234:5678 (1-2) cannot be plugged in: no permission to use it",
        ),
        ({"open": usb1.USBErrorNoDevice()}, Reason.DEVICE_LOST, "1234:5678 (1-2) is no longer plugged in"),
        ({"open": usb1.USBErrorNoMem()}, Reason.DEVICE_FAULT, "1234:5678 (1-2) cannot be used: LIBUSB_ERROR_NO_MEM"),
        ({"get_configuration": usb1.USBErrorOther()}, Reason.DEVICE_FAULT, "cannot be used: LIBUSB_ERROR_OTHER"),
        (
            {"claim 2": usb1.USBErrorBusy()},
            Reason.BUSY,
            "1234:5678 (1-2) cannot be plugged in: another program uses it",
        ),
        ({"claim 2": usb1.USBErrorNoDevice()}, Reason.DEVICE_LOST, "is no longer plugged in"),
        ({"detach 1": usb1.USBErrorNoDevice()}, Reason.DEVICE_LOST, "is no longer plugged in"),
        (
            {"detach 2": usb1.USBErrorAccess()},
            Reason.KERNEL_DRIVER,
            "cannot unbind the kernel driver of interface 2: LIBUSB_ERROR_ACCESS",
        ),
        ({"reset": usb1.USBErrorNotFound()}, Reason.DEVICE_LOST, "is no longer plugged in"),
        ({"reset": usb1.USBErrorOther()}, Reason.DEVICE_FAULT, "cannot be used: LIBUSB_ERROR_OTHER"),
    ],
)
def test_a_device_that_cannot_be_opened_is_left_as_it_was(
    failures: dict[str, Exception], reason: Reason, words: str
) -> None:
    device = sound_card()
    library = FakeLibrary(device)
    device.failures = failures
    with pytest.raises(DeviceError) as caught:
        OpenDevice(library, BusAddress.of(device), read_identity(device), {1: read_configurations(device)[0]})
    assert caught.value.reason is reason
    assert words in caught.value.message
    assert library.contexts[0].closed
    assert all(handle.closed for handle in device.handles)
    if reason is not Reason.DEVICE_LOST and "reset" not in failures:
        assert device.drivers == DRIVERS
        assert "reset" not in device.calls, "another program's device is not reset"


def test_a_device_that_another_program_holds() -> None:
    device = sound_card()
    device.drivers = dict.fromkeys(range(4), "program")
    with pytest.raises(DeviceError, match="another program uses it"):
        open_device_of(device)
    assert device.drivers == dict.fromkeys(range(4), "program")


@pytest.mark.parametrize(("left", "bound"), [(1, {}), (0, DRIVERS)])
def test_a_configuration_that_cannot_be_chosen(left: int, bound: dict[int, str]) -> None:
    """The drivers are bound again in the end, whether the kernel kept the old configuration or chose none."""
    device = FakeDevice(SOUND_CARD, replace(SOUND_CARD, value=2), drivers=DRIVERS)
    opened = open_device_of(device)
    device.failures = {"set_configuration 2": usb1.USBErrorPipe()}
    device.configuration = left
    with pytest.raises(usb1.USBErrorPipe):
        opened.set_configuration(2)
    assert opened.configuration == left
    opened.release()
    assert (device.configuration, device.drivers) == (1, DRIVERS)


def test_an_interface_that_the_kernel_does_not_know() -> None:
    device = sound_card()
    device.failures = {"claim 3": usb1.USBErrorNotFound()}
    opened = open_device_of(device)
    assert device.handle.claimed == {0, 1, 2}
    opened.release()


def test_systems_that_cannot_unbind_drivers() -> None:
    device = FakeDevice(SOUND_CARD)
    device.failures = {"detach": usb1.USBErrorNotSupported()}
    open_device_of(device).release()
    assert not [call for call in device.calls if call.startswith("attach")]


def test_the_original_configuration_is_restored_with_its_drivers() -> None:
    device = FakeDevice(SOUND_CARD, replace(SOUND_CARD, value=2, interfaces=SOUND_CARD.interfaces[:1]), drivers=DRIVERS)
    device.bound_by_kernel[2] = {0: "other"}
    opened = open_device_of(device)
    opened.set_configuration(2)
    assert device.handle.claimed == {0}
    assert device.drivers == {}, "the driver that the kernel bound is unbound"
    opened.release()
    assert (device.configuration, device.drivers) == (1, DRIVERS)


def test_an_unconfigured_device_is_left_unconfigured() -> None:
    device = sound_card()
    device.configuration, device.drivers = 0, {}
    opened = open_device_of(device)
    assert device.handle.claimed == set()
    assert not opened.endpoints
    opened.set_configuration(1)
    opened.release()
    assert device.configuration == 0


@pytest.mark.parametrize("call", ["release", "reset", "attach", "set_configuration"])
@pytest.mark.parametrize(
    "error", [usb1.USBErrorNoDevice(), usb1.USBErrorNotFound(), usb1.USBErrorOther(), RuntimeError("a bug")]
)
def test_whatever_fails_at_the_end_the_device_is_closed(call: str, error: Exception) -> None:
    device = FakeDevice(SOUND_CARD, EVERYTHING, drivers=DRIVERS)
    library = FakeLibrary(device)
    opened = OpenDevice(
        library, BusAddress.of(device), read_identity(device), {1: SOUND_CARD, 3: replace(SOUND_CARD, value=3)}
    )
    if call == "set_configuration":
        opened.set_configuration(3)
    device.failures = {call: error}
    opened.release()
    assert device.handle.closed
    assert library.contexts[0].closed


def test_drivers_are_bound_again_although_the_last_reset_fails() -> None:
    device = sound_card()
    opened = open_device_of(device)
    device.failures = {"reset": usb1.USBErrorOther()}
    opened.release()
    assert device.drivers == DRIVERS


def test_the_configuration_is_restored_although_the_last_reset_fails() -> None:
    device = FakeDevice(SOUND_CARD, replace(SOUND_CARD, value=2), drivers=DRIVERS)
    opened = open_device_of(device)
    opened.set_configuration(2)
    device.failures = {"reset": usb1.USBErrorOther()}
    opened.release()
    assert (device.configuration, device.drivers) == (1, DRIVERS)


def test_transfers_are_complete_before_the_device_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(EVERYTHING)
    opened = open_device_of(device)
    transfer = device.handle.getTransfer()
    completed: list[object] = []
    transfer.setBulk(0x81, bytearray(8), completed.append, None)
    transfer.submit()
    context = device.handle.context
    context.library.event_errors += [usb1.USBErrorInterrupted(), usb1.USBErrorIO()]
    opened.release([transfer])
    assert completed == [transfer]
    assert device.handle.closed


def test_a_device_stays_open_until_its_transfers_are_complete(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(open_device, "DRAIN_TIMEOUT", 0.05)
    device = FakeDevice(EVERYTHING, drivers={0: "storage"})
    opened = open_device_of(device)
    device.handle.keeps_cancelled = True
    transfer = device.handle.getTransfer()
    transfer.setBulk(0x81, bytearray(8), lambda usb: None, None)
    transfer.submit()
    releasing = Thread(target=opened.release, args=([transfer],))
    releasing.start()
    while "transfers still pending 0.05 s after cancellation" not in caplog.text:
        time.sleep(0.01)
    releasing.join(0.2)
    assert releasing.is_alive()
    transfer.finish(status=usb1.TRANSFER_CANCELLED)
    releasing.join(100)
    assert device.handle.closed
    assert device.drivers == {0: "storage"}
