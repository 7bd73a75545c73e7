from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from unittest.mock import ANY

import pytest
from tests.virtual.bulk_only import Listener, Pattern

from farplug.errors import DeviceError, Reason, StateError
from farplug.rate_limit import BURST, release_logs
from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.usb import Offer, Reception, Setup, Speed, Status, Transfer, TransferType
from farplug.usb.descriptors import (
    BosDescriptor,
    ContainerId,
    DeviceDescriptor,
    EndpointDescriptor,
    InterfaceDescriptor,
    OtherCapability,
    Usb2Extension,
)
from farplug.usb.endpoints import bulk_endpoint, periodic_endpoint
from farplug.usb.figures import Figures
from farplug.usb.platform import WindowsDriver
from farplug.usb.types import DescriptorType
from farplug.virtual import Disk, Function, FunctionHost, Numbers, VirtualDevice
from farplug.virtual.events import FunctionRaised

BULK, INTERRUPT, ISOCHRONOUS = TransferType.BULK, TransferType.INTERRUPT, TransferType.ISOCHRONOUS


class Echo(Function):
    """Completes or keeps its transfers, and logs all calls."""

    def __init__(self, name: str = "echo") -> None:
        self.name = name
        self.log: list[str] = []
        self.pending: list[Transfer] = []
        self.answer = True
        self.raises: Exception | None = None
        self.close_error: Exception | None = None
        self.open_error: Exception | None = None
        self.host: FunctionHost | None = None

    def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
        bulk = (EndpointDescriptor(0x81, BULK, 512), EndpointDescriptor(0x01, BULK, 512))
        return (
            InterfaceDescriptor(0, 0, 255, 1, 2, bulk),
            InterfaceDescriptor(0, 2, 255, 1, 3, (*bulk, EndpointDescriptor(0x82, INTERRUPT, 8, 4))),
            InterfaceDescriptor(1, 0, 255, 0, 0),
        )

    def bind(self, host: FunctionHost) -> None:
        self.host = host

    def configured(self, speed: Speed) -> None:
        self.log.append(f"configured {speed}")

    def set_alternate(self, interface: int, alternate: int) -> None:
        super().set_alternate(interface, alternate)
        self.log.append(f"alternate {interface} {alternate}")

    def control(self, transfer: Transfer) -> bool:
        self.log.append(f"control {transfer.setup}")
        return self._take(transfer) if self.answer else False

    def submit(self, transfer: Transfer) -> None:
        self.log.append(f"submit {transfer.endpoint:02x}")
        self._take(transfer)

    def _take(self, transfer: Transfer) -> bool:
        if self.raises is not None:
            raise self.raises
        if self.answer:
            transfer.complete(Status.SUCCESS, self.name.encode()[: transfer.length])
        else:
            self.pending.append(transfer)
        return True

    def cancel(self, transfer: Transfer) -> None:
        self.pending.remove(transfer)
        transfer.complete(Status.CANCELLED)

    def halt_cleared(self, endpoint: int) -> None:
        self.log.append(f"cleared {endpoint:02x}")

    def reset(self, *, port_reset: bool) -> None:
        self.log.append(f"reset {port_reset}")
        pending, self.pending = self.pending, []
        for transfer in pending:
            transfer.complete(Status.CANCELLED)
        if self.raises is not None:
            raise self.raises

    @property
    def figures(self) -> Figures:
        return Figures(commands=self.log.count("reset True"))

    async def open(self) -> None:
        self.log.append("open")
        if self.open_error:
            raise self.open_error

    async def close(self) -> None:
        self.log.append("close")
        if self.close_error:
            raise self.close_error

    async def dispose(self) -> None:
        self.log.append("dispose")


class Driver:
    def __init__(self, device: VirtualDevice) -> None:
        self.device = device
        self.listener = Listener()
        self.completed: list[Transfer] = []

    def send(self, endpoint: int, data: bytes = b"x", type: TransferType = BULK) -> Transfer:
        return self._submit(Transfer(type, endpoint, self.completed.append, data=data))

    def receive(self, endpoint: int, length: int = 64, type: TransferType = BULK) -> Transfer:
        return self._submit(Transfer(type, endpoint, self.completed.append, length=length))

    def control(self, setup: str, data: bytes = b"") -> Transfer:
        """Hex digits of the five fields, big-endian for the eye: type, request, value, index, length."""
        fields = [int(field, 16) for field in setup.split()]
        parsed = Setup(*fields)
        endpoint = parsed.request_type & 0x80
        transfer = Transfer(
            TransferType.CONTROL, endpoint, self.completed.append, length=parsed.length, data=data, setup=parsed
        )
        return self._submit(transfer)

    def _submit(self, transfer: Transfer) -> Transfer:
        self.device.submit(transfer)
        return transfer


async def plugged(*functions: Function, speed: Speed = Speed.SUPER, remote_wakeup: bool = False) -> Driver:
    device = VirtualDevice(*(functions or (Echo(),)), speeds=(speed,), product="Echo", remote_wakeup=remote_wakeup)
    driver = Driver(device)
    await device.open(driver.listener)
    await device.reset()
    await device.set_configuration(1)
    return driver


REQUESTS: list[tuple[str, bytes, bytes | None, bytes | None]] = [
    # setup, data, reply at SuperSpeed, reply at High Speed; None stalls
    ("80 00 0 0 2", b"", b"\1\0", b"\1\0"),
    ("80 00 0 0 1", b"", b"\1", b"\1"),
    ("80 00 1 0 2", b"", None, None),
    ("80 00 0 1 2", b"", None, None),
    ("81 00 0 0 2", b"", b"\0\0", b"\0\0"),
    ("81 00 0 1 2", b"", b"\0\0", b"\0\0"),
    ("81 00 0 2 2", b"", None, None),
    ("82 00 0 81 2", b"", b"\0\0", b"\0\0"),
    ("82 00 0 0 2", b"", b"\0\0", b"\0\0"),
    ("82 00 0 80 2", b"", b"\0\0", b"\0\0"),
    ("82 00 0 82 2", b"", None, None),
    ("82 00 1 81 2", b"", None, None),
    ("80 08 0 0 1", b"", b"\1", b"\1"),
    ("80 08 1 0 1", b"", None, None),
    ("81 0a 0 0 1", b"", b"\0", b"\0"),
    ("81 0a 0 2 1", b"", None, None),
    ("00 09 1 0 0", b"", b"", b""),
    ("00 09 2 0 0", b"", None, None),
    ("00 09 1 1 0", b"", None, None),
    ("01 0b 0 0 0", b"", b"", b""),
    ("01 0b 2 0 0", b"", b"", b""),
    ("01 0b 1 0 0", b"", None, None),
    ("01 0b 0 2 0", b"", None, None),
    ("00 01 1 0 0", b"", None, None),
    ("00 03 1 0 0", b"", None, None),
    ("00 03 2 100 0", b"", None, None),
    ("00 03 30 0 0", b"", b"", None),
    ("00 03 31 0 0", b"", b"", None),
    ("00 01 30 0 0", b"", b"", None),
    ("00 03 32 0 0", b"", None, None),
    ("01 03 0 0 0", b"", b"", None),
    ("01 03 0 100 0", b"", b"", None),
    ("01 03 0 2 0", b"", None, None),
    ("02 03 0 81 0", b"", b"", b""),
    ("02 03 0 82 0", b"", None, None),
    ("02 03 0 0 0", b"", None, None),
    ("02 01 0 0 0", b"", b"", b""),
    ("02 01 0 81 0", b"", b"", b""),
    ("02 01 1 81 0", b"", None, None),
    ("00 30 0 0 6", bytes(6), b"", None),
    ("00 30 0 0 5", bytes(5), None, None),
    ("00 31 28 0 0", b"", b"", None),
    ("82 0c 0 81 2", b"", None, None),
    ("00 05 7 0 0", b"", None, None),
    ("00 07 100 0 12", bytes(18), None, None),
    ("80 06 300 0 ff", b"", b"\4\3\x09\4", b"\4\3\x09\4"),
    ("80 06 302 409 6", b"", b"\x0a\3E\0c\0", b"\x0a\3E\0c\0"),
    ("80 06 305 409 ff", b"", None, None),
    ("80 06 600 0 a", b"", None, b"\x0a\x06\0\2\xef\2\1\x40\1\0"),
    ("80 06 100 0 2", b"", b"\x12\1", b"\x12\1"),
    ("80 06 101 0 12", b"", None, None),
    ("80 06 2200 0 12", b"", None, None),
]


@pytest.mark.parametrize(("setup", "data", "at_super", "at_high"), REQUESTS, ids=[row[0] for row in REQUESTS])
async def test_standard_requests(setup: str, data: bytes, at_super: bytes | None, at_high: bytes | None) -> None:
    for speed, reply in ((Speed.SUPER, at_super), (Speed.HIGH, at_high)):
        driver = await plugged(speed=speed)
        transfer = driver.control(setup, data)
        if reply is None:
            assert transfer.status is Status.STALL
        else:
            assert (transfer.status, bytes(transfer.reply)) == (Status.SUCCESS, reply)
        assert driver.control("80 00 0 0 2").status is Status.SUCCESS  # endpoint zero still works


@pytest.mark.parametrize("setup", ["81 00 0 0 2", "82 00 0 81 2", "81 0a 0 0 1", "00 03 30 0 0", "01 0b 0 0 0"])
async def test_requests_that_need_a_configuration(setup: str) -> None:
    driver = await plugged()
    assert driver.control("00 09 0 0 0").status is Status.SUCCESS
    assert driver.control("80 08 0 0 1").reply == b"\0"
    assert driver.control(setup).status is Status.STALL
    assert driver.receive(0x81).status is Status.INVALID
    assert await driver.device.set_interface(0, 0) is Status.INVALID
    assert [one.number for one in driver.device.interfaces] == [0, 1]


async def test_features() -> None:
    driver = await plugged()
    driver.control("00 03 30 0 0")
    driver.control("00 03 31 0 0")
    assert driver.control("80 00 0 0 2").reply == b"\x0d\0"
    driver.control("00 01 30 0 0")
    assert driver.control("80 00 0 0 2").reply == b"\x09\0"
    await driver.device.reset()
    assert driver.control("80 00 0 0 2").reply == b"\x01\0"


async def test_remote_wakeup() -> None:
    driver = await plugged(speed=Speed.HIGH, remote_wakeup=True)
    assert driver.control("80 06 200 0 9").reply[7] == 0xE0
    assert driver.control("00 03 1 0 0").status is Status.SUCCESS
    assert driver.control("00 09 1 0 0").status is Status.SUCCESS
    assert driver.control("80 00 0 0 2").reply == b"\x03\0"
    assert driver.control("00 01 1 0 0").status is Status.SUCCESS
    assert driver.control("80 00 0 0 2").reply == b"\x01\0"


async def test_halt() -> None:
    function = Echo()
    driver = await plugged(function)
    function.log.clear()
    driver.control("02 03 0 81 0")
    assert function.host is not None
    assert function.host.is_halted(0x81)
    assert not function.host.is_halted(0x01)
    assert driver.receive(0x81).status is Status.STALL
    assert driver.control("82 00 0 81 2").reply == b"\1\0"
    assert driver.control("02 01 0 81 0").status is Status.SUCCESS
    assert driver.receive(0x81).status is Status.SUCCESS
    assert function.log == ["cleared 81", "submit 81"]
    for undo in ("00 09 1 0 0", "01 0b 0 0 0"):
        function.host.halt(0x01)
        assert driver.send(0x01).status is Status.STALL
        driver.control(undo)
        assert driver.send(0x01).status is Status.SUCCESS


@pytest.mark.parametrize(
    ("endpoint", "type"), [(0x82, INTERRUPT), (0x81, INTERRUPT), (0x83, BULK), (0x02, BULK), (0x80, BULK)]
)
async def test_an_unknown_endpoint(endpoint: int, type: TransferType) -> None:
    driver = await plugged()
    assert driver.receive(endpoint, type=type).status is Status.INVALID


@pytest.mark.parametrize("endpoint", [0x00, 0x81])
async def test_contradictory_control_transfers(endpoint: int) -> None:
    driver = await plugged()
    for setup in (Setup(0x80, 0, 0, 0, 2), None):
        transfer = Transfer(TransferType.CONTROL, endpoint, driver.completed.append, length=2, setup=setup)
        assert driver._submit(transfer).status is Status.INVALID


async def test_alternate_settings() -> None:
    function = Echo()
    driver = await plugged(function)
    function.log.clear()
    function.answer = False
    pending = driver.receive(0x81)
    assert await driver.device.set_interface(0, 2) is Status.SUCCESS
    assert pending.status is Status.CANCELLED
    assert function.log == ["submit 81", "reset False", "alternate 0 2"]
    assert driver.control("81 0a 0 0 1").reply == b"\2"
    assert driver.device.interfaces[0].interface_protocol == 3
    waiting = driver.receive(0x82, type=INTERRUPT)
    assert waiting.status is None
    assert await driver.device.set_interface(0, 1) is Status.STALL
    assert await driver.device.set_interface(7, 0) is Status.INVALID
    assert waiting.status is None
    assert await driver.device.set_configuration(1) is Status.SUCCESS
    assert waiting.status is Status.CANCELLED
    assert driver.control("81 0a 0 0 1").reply == b"\0"


async def test_two_functions() -> None:
    first, second = Echo("first"), Echo("second")
    driver = await plugged(first, second)
    assert bytes(driver.receive(0x81).reply) == b"first"
    assert bytes(driver.receive(0x83).reply) == b"second"
    assert bytes(driver.receive(0x83, 3).reply) == b"sec"
    assert second.log[-1] == "submit 81"
    assert driver.send(0x02, b"abc").actual == 3
    assert second.log[-1] == "submit 01"
    assert bytes(driver.control("a1 5 0 2 10").reply) == b"second"
    assert second.log[-1] == f"control {Setup(0xA1, 5, 0, 0, 16)}"
    assert bytes(driver.control("a2 5 0 83 10").reply) == b"second"
    assert second.log[-1] == f"control {Setup(0xA2, 5, 0, 0x81, 16)}"
    assert bytes(driver.control("c0 5 0 83 10").reply) == b"first"
    assert bytes(driver.control("81 6 2200 2 10").reply) == b"second"  # a HID report descriptor
    assert driver.control("a1 5 0 4 10").status is Status.STALL
    assert driver.control("a2 5 0 8f 10").status is Status.STALL
    assert driver.device.figures == Figures(commands=2)
    assert await driver.device.set_interface(2, 2) is Status.SUCCESS
    assert second.log[-1] == "alternate 0 2"
    assert "alternate 0 2" not in first.log
    assert second.host is not None
    second.host.halt(0x81)
    assert driver.receive(0x83).status is Status.STALL
    assert driver.receive(0x81).status is Status.SUCCESS


async def test_a_request_to_the_device_goes_to_the_function_that_supports_it() -> None:
    first, second = Echo("first"), Echo("second")
    driver = await plugged(first, second)
    first.answer = False
    assert bytes(driver.control("c0 5 0 0 10").reply) == b"second"
    second.answer = False
    assert driver.control("c0 5 0 0 10").status is Status.STALL
    assert not driver.device._renumbered


async def test_cancel() -> None:
    first, second = Echo("first"), Echo("second")
    driver = await plugged(first, second)
    first.answer = second.answer = False
    pending = [driver.receive(0x81), driver.receive(0x83), driver.send(0x02)]
    for transfer in reversed(pending):
        driver.device.cancel(transfer)
        driver.device.cancel(transfer)
    assert [one.status for one in pending] == [Status.CANCELLED] * 3
    assert not driver.device._renumbered
    driver.device.cancel(Transfer(BULK, 0x8F, driver.completed.append, length=1))


@pytest.mark.parametrize("functions", [1, 2])
async def test_reset(functions: int) -> None:
    echoes = [Echo(str(index)) for index in range(functions)]
    driver = await plugged(*echoes)
    for echo in echoes:
        echo.answer = False
    pending = [driver.receive(0x81), driver.send(0x01)]
    if functions == 2:
        pending += [driver.receive(0x83), driver.send(0x02)]
    assert await driver.device.reset() is Status.SUCCESS
    assert {one.status for one in pending} == {Status.CANCELLED}
    assert driver.device.configuration == 0
    assert echoes[0].log[-1] == "reset True"


async def test_a_function_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Echo("first"), Echo("second")
    driver = await plugged(first, second)
    second.raises = RuntimeError("a defect of the function")
    assert driver.receive(0x83).status is Status.STALL
    assert driver.control("a1 5 0 2 10").status is Status.STALL
    assert driver.control("00 09 1 0 0").status is Status.SUCCESS
    assert caplog.text.count("Echo raised") == 3
    assert "a defect of the function" in caplog.text
    assert driver.listener.events == [FunctionRaised("Echo", second.raises)] * 3
    second.raises = None
    assert bytes(driver.receive(0x83).reply) == b"second"
    assert not driver.device._renumbered


async def test_the_log_of_a_function_that_always_raises_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    driver = await plugged(echo := Echo())
    echo.raises = RuntimeError("a defect of the function")
    for _ in range(BURST + 10):
        assert driver.receive(0x81).status is Status.STALL
    assert caplog.messages == ["Echo raised"] * BURST
    release_logs()
    assert caplog.messages[BURST:] == ["Echo raised (9 more like this)"]
    assert "a defect of the function" in (caplog.records[-1].exc_text or caplog.text)


class Meter(Function):
    """Sends a reading on an interrupt endpoint, samples on an isochronous one, and takes samples."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.status = Status.SUCCESS
        self.taken: list[bytes] = []

    def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
        endpoints = (
            periodic_endpoint(0x81, INTERRUPT, speed, packet_size=8, microseconds=1000),
            periodic_endpoint(0x82, ISOCHRONOUS, speed, packet_size=64, microseconds=1000),
            periodic_endpoint(0x01, ISOCHRONOUS, speed, packet_size=64, microseconds=1000),
            bulk_endpoint(0x83, speed),
        )
        return (InterfaceDescriptor(0, 0, 255, 0, 0, endpoints), InterfaceDescriptor(0, 1, 255, 0, 0, endpoints[:1]))

    def bind(self, host: FunctionHost) -> None:
        self.host = host

    def receiving(self, endpoint: int, reception: Reception) -> Status:
        self.log.append(f"receiving {endpoint:02x}")
        if self.status is Status.IO_ERROR:
            raise RuntimeError("a defect of the function")
        return self.status

    def stopped(self, endpoint: int) -> None:
        self.log.append(f"stopped {endpoint:02x}")

    def submit(self, transfer: Transfer) -> None:
        self.taken.append(bytes(transfer.data))
        transfer.complete()

    def cancel(self, transfer: Transfer) -> None:
        raise AssertionError

    def reset(self, *, port_reset: bool) -> None:
        self.log.append("reset")


async def test_receptions() -> None:
    first, second = Meter(), Meter()
    async with MemoryGuest(VirtualDevice(first, second)) as guest:
        await guest.enumerate()
        assert not second.host.send(0x81, b"before the start")
        reading = asyncio.ensure_future(guest.interrupt_in(0x84))
        await guest.wait(lambda: bool(second.log[1:]))
        assert second.log[1:] == ["receiving 81"]
        assert second.host.send(0x81, b"21.5 C")
        assert second.host.send(0x81, b"21.6 C")
        assert not first.host.send(0x81, b"another endpoint")
        assert await reading == b"21.5 C"
        assert await guest.interrupt_in(0x84) == b"21.6 C"
        assert second.host.send(0x81, b"22", Status.IO_ERROR)
        with pytest.raises(TransferFailed, match="io-error"):
            await guest.interrupt_in(0x84)
        await guest.stop_receiving(0x84)
        assert second.log[-1] == "stopped 81"
        assert not second.host.send(0x81, b"after the stop")
        samples = asyncio.ensure_future(guest.iso_in(0x85))
        await guest.wait(lambda: second.log[-1] == "receiving 82")
        assert second.host.send(0x82, bytes(48))
        assert await samples == bytes(48)
        await guest.iso_out(0x02, b"sound")
        await guest.iso_out(0x02, b"more")
        assert second.log[-1] == "receiving 01"
        while len(second.taken) < 2:
            await asyncio.sleep(0)
        assert second.taken == [b"sound", b"more"]
        await guest.set_interface(1, 1)
        assert not second.host.send(0x82, bytes(48))
        assert not second.host.send(0x81, bytes(8))
        with pytest.raises(TransferFailed, match="no such endpoint"):
            await guest.iso_in(0x85)


async def test_a_reception_of_a_halted_endpoint_ends() -> None:
    async with MemoryGuest(VirtualDevice(meter := Meter())) as guest:
        await guest.enumerate()
        reading = asyncio.ensure_future(guest.interrupt_in(0x81))
        await guest.wait(lambda: meter.log[-1] == "receiving 81")
        meter.host.halt(0x81)
        assert not meter.host.send(0x81, b"lost")
        with pytest.raises(TransferFailed, match="stall"):
            await reading
        with pytest.raises(TransferFailed, match="stall"):
            await guest.interrupt_in(0x81)
        assert meter.log[-1] == "stopped 81"
        await guest.clear_halt(0x81)
        reading = asyncio.ensure_future(guest.interrupt_in(0x81))
        await guest.wait(lambda: meter.log[-1] == "receiving 81")
        assert meter.host.send(0x81, b"sent")
        assert await reading == b"sent"


async def test_receptions_that_cannot_start() -> None:
    driver = await plugged(meter := Meter())
    device = driver.device
    for endpoint, type in ((0x83, BULK), (0x81, ISOCHRONOUS), (0x8F, INTERRUPT)):
        assert device.start_receiving(Reception(endpoint, type)) is Status.STALL
    assert meter.log == ["reset", "reset"]
    for status in (Status.STALL, Status.IO_ERROR):
        meter.status = status
        assert device.start_receiving(Reception(0x81, INTERRUPT)) is Status.STALL
    assert driver.listener.events == [FunctionRaised("Meter", ANY)]
    meter.status = Status.SUCCESS
    assert device.start_receiving(Reception(0x81, INTERRUPT)) is Status.SUCCESS
    assert device.start_receiving(Reception(0x81, INTERRUPT)) is Status.INVALID
    await device.reset()
    assert device.stop_receiving(0x81) is Status.SUCCESS
    assert "stopped 81" not in meter.log
    echo = await plugged(Echo())
    assert await echo.device.set_interface(0, 2) is Status.SUCCESS
    assert echo.device.start_receiving(Reception(0x82, INTERRUPT)) is Status.STALL


async def test_a_task_of_a_function_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    driver = await plugged(meter := Meter())
    error = RuntimeError("a defect of the task")
    meter.host.raised(error)
    assert driver.listener.events == [FunctionRaised("Meter", error)]
    assert "a defect of the task" in (caplog.records[-1].exc_text or caplog.text)


async def test_open_and_close() -> None:
    function = Echo()
    device = VirtualDevice(function)
    assert device.offers == (Offer(Speed.SUPER), Offer(Speed.HIGH))
    assert str(device.identity.speed) == "super"
    device.select(Offer(Speed.HIGH))
    assert str(device.identity.speed) == "high"
    with pytest.raises(ValueError, match="cannot be offered at full speed"):
        device.select(Offer(Speed.FULL))
    await device.open(Listener())
    with pytest.raises(StateError, match="already plugged"):
        await device.open(Listener())
    with pytest.raises(StateError, match="offer cannot be changed"):
        device.select(Offer(Speed.SUPER))
    await device.set_configuration(1)
    assert function.log[-1] == "configured high"
    await device.close()
    assert device.configuration == 0
    device.select(Offer(Speed.SUPER))
    await device.open(Listener())
    await device.close()
    await device.dispose()
    assert function.log[-4:] == ["open", "reset False", "close", "dispose"]


async def test_opening_fails() -> None:
    first, second = Echo("first"), Echo("second")
    device = VirtualDevice(first, second)
    second.open_error = DeviceError("it is gone", reason=Reason.DEVICE_LOST)
    with pytest.raises(DeviceError, match="it is gone"):
        await device.open(Listener())
    assert first.log == ["open", "close"]
    second.open_error = None
    await device.open(Listener())
    await device.close()


async def test_closing_fails() -> None:
    first, second = Echo("first"), Echo("second")
    device = VirtualDevice(first, second)
    await device.open(Listener())
    first.close_error = DeviceError("lost", reason=Reason.IO_ERROR)
    with pytest.raises(DeviceError, match="lost"):
        await device.close()
    assert second.log[-1] == "close"
    await device.open(Listener())


@pytest.mark.parametrize("speeds", [(), (Speed.LOW,), (Speed.SUPER, Speed.SUPER_PLUS)])
def test_unsupported_speeds(speeds: Sequence[Speed]) -> None:
    with pytest.raises(ValueError, match="cannot run at"):
        VirtualDevice(Echo(), speeds=speeds)


def test_a_device_has_a_function() -> None:
    with pytest.raises(ValueError, match="one function"):
        VirtualDevice()


async def test_every_setup_packet_is_answered() -> None:
    for speed in (Speed.SUPER, Speed.HIGH):
        driver = await plugged(Echo("a"), Echo("b"), speed=speed)
        count = 0
        for request_type in range(256):
            for request in (*range(14), 48, 49, 255):
                for value, index in ((0, 0), (1, 1), (0x100, 2), (0x300, 0x81), (0xFFFF, 0xFFFF)):
                    setup = struct.pack("<BBHHH", request_type, request, value, index, 4)
                    endpoint = request_type & 0x80
                    transfer = Transfer(
                        TransferType.CONTROL,
                        endpoint,
                        driver.completed.append,
                        length=4,
                        data=b"" if endpoint else bytes(4),
                        setup=Setup.parse(setup),
                    )
                    driver._submit(transfer)
                    count += 1
        assert len(driver.completed) == count


class Tool(Echo):
    """A function for which Windows has no driver of its own."""

    windows_driver = WindowsDriver(interface_guids=("{01234567-89ab-cdef-0123-456789abcdef}",))


async def test_drivers_for_windows_and_pages_for_browsers() -> None:
    device = VirtualDevice(Disk(Pattern()), Tool(), speeds=(Speed.HIGH,), landing_page="https://example.org/")
    async with MemoryGuest(device) as guest:
        await guest.enumerate()
        raw = await guest.get_descriptor(DescriptorType.DEVICE, length=18)
        assert DeviceDescriptor.parse(raw).usb_version == 0x0210
        bos = BosDescriptor.parse(await guest.get_descriptor(DescriptorType.BOS, length=255))
        assert not bos.warnings
        extension, windows, browser = bos.capabilities
        assert extension == Usb2Extension()
        assert isinstance(windows, OtherCapability)
        assert isinstance(browser, OtherCapability)
        size, request = int.from_bytes(windows.raw[24:26], "little"), windows.raw[26]
        found = await guest.control_in(Setup(0xC0, request, 0, 7, 0xFFF))
        assert len(found) == size
        assert found[18:26] == bytes.fromhex("0800 0200 01 00 a000")  # the function begins at interface 1
        assert await guest.control_in(Setup(0xC0, request, 0, 7, 10)) == found[:10]
        url = await guest.control_in(Setup(0xC0, browser.raw[22], browser.raw[23], 2, 255))
        assert url[3:] == b"example.org/"
        assert await guest.control_in(Setup(0xC0, request, 0, 6, 255)) == b"echo"  # another index: the function's


async def test_a_device_without_platform_capabilities_has_no_bos() -> None:
    driver = await plugged(speed=Speed.HIGH)
    assert driver.control("80 06 f00 0 ff").status is Status.STALL


async def test_further_capabilities() -> None:
    device = VirtualDevice(Echo(), speeds=(Speed.HIGH,), capabilities=(ContainerId(bytes(range(16))),))
    async with MemoryGuest(device) as guest:
        bos = BosDescriptor.parse(await guest.get_descriptor(DescriptorType.BOS, length=255))
        assert bos.capabilities == (Usb2Extension(), ContainerId(bytes(range(16))))
