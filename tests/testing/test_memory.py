"""What the guest in memory reports about a device with faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence

import pytest

from farplug.errors import DeviceError, RemoteProtocolError
from farplug.testing.memory import GuestTimeoutError, MemoryGuest, TransferFailed
from farplug.usb import Setup, Speed, Status, Transfer, TransferType
from farplug.usb.descriptors import EndpointDescriptor, InterfaceDescriptor, SuperSpeedCompanion
from farplug.usbredir import packets
from farplug.virtual import Function, Numbers, VirtualDevice

BULK = TransferType.BULK
IN, OUT = 0x81, 0x01


class Scripted(Function):
    """A function with two bulk endpoints that handles transfers with a given callback."""

    def __init__(self, submit: Callable[[Transfer], None], size: int = 1024, *, companion: bool = True) -> None:
        self._submit = submit
        self._size = size
        self._companion = SuperSpeedCompanion() if companion else None

    def interfaces(self, speed: Speed, numbers: Numbers) -> Sequence[InterfaceDescriptor]:
        endpoints = tuple(EndpointDescriptor(one, BULK, self._size, companion=self._companion) for one in (IN, OUT))
        return (InterfaceDescriptor(0, 0, 0xFF, 0, 0, endpoints),)

    def submit(self, transfer: Transfer) -> None:
        self._submit(transfer)

    def cancel(self, transfer: Transfer) -> None:
        transfer.complete(Status.CANCELLED)

    def reset(self, *, port_reset: bool) -> None:
        pass


def device(submit: Callable[[Transfer], None], size: int = 1024, *, companion: bool = True) -> VirtualDevice:
    return VirtualDevice(Scripted(submit, size, companion=companion), speeds=(Speed.SUPER,))


def complete(transfer: Transfer) -> None:
    transfer.complete()


def keep(transfer: Transfer) -> None:
    """Never complete the transfer."""


def fail(transfer: Transfer) -> None:
    raise ValueError("a defect of the device")


async def use(
    device: VirtualDevice, driver: Callable[[MemoryGuest], Coroutine[None, None, object]], *, timeout: float = 5
) -> None:
    """Run ``driver`` with a configured device."""
    async with MemoryGuest(device, timeout=timeout) as guest:
        await guest.enumerate()
        await driver(guest)


async def write(guest: MemoryGuest) -> None:
    assert await guest.bulk_out(OUT, b"x") == 1
    await asyncio.sleep(0)


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


async def test_a_device_without_faults() -> None:
    async with MemoryGuest(device(complete)) as guest:
        await guest.enumerate()
        assert await guest.bulk_out(OUT, b"x") == 1
        assert not guest.faults
        assert not guest.violations


async def test_a_transfer_that_is_never_completed() -> None:
    async with MemoryGuest(device(keep), timeout=0.05) as guest:
        await guest.enumerate()
        other = guest.submit_out(OUT, b"four")
        with pytest.raises(GuestTimeoutError) as caught:
            await guest.bulk_in(IN, 512)
        assert str(caught.value) == (
            "the bulk transfer on endpoint 81, 512 bytes was not completed within 0.05 s; pending: "
            "bulk transfer on endpoint 01, 4 bytes, bulk transfer on endpoint 81, 512 bytes"
        )
        other.cancel()
        assert (await other).status is Status.CANCELLED


async def test_every_wait_has_a_timeout() -> None:
    async with MemoryGuest(device(complete), timeout=0.05) as guest:
        with pytest.raises(GuestTimeoutError, match=r"did not become true within 0\.05 s; pending: no"):
            await guest.wait(lambda: False)
        with pytest.raises(GuestTimeoutError, match="no IsoPacket arrived for endpoint 85 within"):
            await guest.stream(packets.IsoPacket, 0x85)()


async def test_no_timeout() -> None:
    held: list[Transfer] = []
    async with MemoryGuest(device(held.append), timeout=None) as guest:
        await guest.enumerate()
        pending = guest.submit_out(OUT, b"x")
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_soon(held[0].complete)
        assert (await pending).status is Status.SUCCESS


class Hanging(VirtualDevice):
    """A device of which one coroutine never returns."""

    def __init__(self, where: str) -> None:
        super().__init__(Scripted(complete), speeds=(Speed.SUPER,))
        setattr(self, where, self._hang)

    async def _hang(self, *arguments: object) -> Status:
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_device_that_never_opens() -> None:
    with pytest.raises(GuestTimeoutError, match=r"the device was not opened within 0\.05 s"):
        await MemoryGuest(Hanging("open"), timeout=0.05).__aenter__()


async def test_a_device_that_never_closes() -> None:
    with pytest.raises(GuestTimeoutError, match=r"the device was not closed within 0\.05 s"):
        async with MemoryGuest(Hanging("close"), timeout=0.05):
            pass


async def test_a_device_that_never_takes_its_configuration() -> None:
    with pytest.raises(GuestTimeoutError, match="the device was not closed") as caught:
        await use(Hanging("set_configuration"), write, timeout=0.05)
    assert "the request for configuration 1 was not completed" in str(caught.value.__context__)


async def test_a_device_that_raises() -> None:
    async def read(guest: MemoryGuest) -> None:
        with pytest.raises(TransferFailed, match="the bulk transfer on endpoint 81, 8 bytes ended with") as failed:
            await guest.bulk_in(IN, 8)
        assert failed.value.status is Status.STALL
        assert isinstance(failed.value.__cause__, ValueError)

    with pytest.raises(ValueError, match="a defect of the device"):
        await use(device(fail), read)


async def test_the_cause_of_a_failed_transfer_is_named_once() -> None:
    with pytest.raises(TransferFailed) as caught:
        await use(device(fail), lambda guest: guest.bulk_in(IN, 8))
    assert isinstance(caught.value.__cause__, ValueError)
    assert notes(caught.value) == ""


async def test_a_failed_assertion_names_the_faults_of_the_device() -> None:
    async def read(guest: MemoryGuest) -> None:
        guest.submit_in(IN, 8)
        await guest.wait(lambda: bool(guest.faults))
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        await use(device(fail), read)
    assert notes(caught.value) == "another fault of the device: ValueError: a defect of the device"


async def test_a_device_that_raises_later() -> None:
    async def read(guest: MemoryGuest) -> None:
        guest.submit_in(IN, 8)
        await guest.wait(lambda: bool(guest.faults))

    def later(transfer: Transfer) -> None:
        asyncio.get_running_loop().call_soon(fail, transfer)

    with pytest.raises(ValueError, match="a defect of the device"):
        await use(device(later), read)
    assert asyncio.get_running_loop().get_exception_handler() is None


async def test_the_loops_own_exception_handler_is_called_too() -> None:
    handled: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: handled.append(context["exception"]))
    try:
        async with MemoryGuest() as guest:
            loop.call_exception_handler({"message": "", "exception": (error := ValueError())})
            loop.call_exception_handler({"message": "", "exception": None})
            assert guest.faults == [error]
            guest.faults.clear()
    finally:
        loop.set_exception_handler(None)
    assert handled == [error, None]


@pytest.mark.parametrize("later", [False, True])
async def test_a_transfer_that_is_completed_twice(later: bool) -> None:
    def twice(transfer: Transfer) -> None:
        transfer.complete()
        if later:
            asyncio.get_running_loop().call_soon(transfer.complete)
        else:
            transfer.complete()

    with pytest.raises(DeviceError, match="endpoint 01, 1 bytes: success, 1 bytes was completed twice"):
        await use(device(twice), write)


@pytest.mark.parametrize(
    ("size", "companion", "fault"),
    [
        (64, True, "the bulk endpoint 81 has wMaxPacketSize 64, not 1024 .super speed."),
        (1024, False, "the bulk endpoint 81 has no SuperSpeed companion"),
    ],
)
async def test_descriptors_that_the_specification_does_not_allow(size: int, companion: bool, fault: str) -> None:
    with pytest.raises(DeviceError, match=f"interface 0, alternate setting 0: {fault}") as caught:
        await use(device(complete, size, companion=companion), write)
    assert "the bulk endpoint 01 has" in notes(caught.value)


async def test_a_transfer_before_the_device_is_configured() -> None:
    async with MemoryGuest(device(complete)) as guest:
        with pytest.raises(
            TransferFailed, match=r"invalid after 0 bytes: the device is not configured: call enumerate\("
        ):
            await guest.bulk_in(IN, 8)
        await guest.enumerate()
        guest.reset()
        with pytest.raises(TransferFailed, match="not configured"):
            await guest.bulk_in(IN, 8)
        await guest.enumerate()
        await guest.set_configuration(0)
        with pytest.raises(TransferFailed, match="not configured"):
            await guest.bulk_out(OUT, b"x")


async def test_an_endpoint_that_does_not_exist() -> None:
    async with MemoryGuest(device(complete)) as guest:
        await guest.enumerate()
        with pytest.raises(TransferFailed, match="the current setting has no such endpoint, only 01, 81"):
            await guest.bulk_in(0x85, 8)
        with pytest.raises(TransferFailed, match=r"interrupt transfer on endpoint 01, 1 bytes ended .* 0 bytes$"):
            await guest.interrupt_out(OUT, b"x")
        with pytest.raises(TransferFailed, match=r"control transfer c0 05 value=0000 .* stall after 0 bytes$"):
            await guest.control_in(Setup(0xC0, 5, 0, 0, 1))
        with pytest.raises(TransferFailed, match="alternate setting 3 of interface 0 ended with status io-error"):
            await guest.set_interface(0, 3)
        with pytest.raises(TransferFailed, match="allocation of bulk streams ended with status invalid"):
            await guest.allocate_streams((IN,), 4)
        with pytest.raises(TransferFailed, match="request for configuration 7 ended"):
            await guest.set_configuration(7)


async def test_a_violation_ends_the_block() -> None:
    async def answer(guest: MemoryGuest) -> None:
        guest._reply_received(packets.ConfigurationStatus(id=77, status=Status.SUCCESS, configuration=1))
        assert len(guest.violations) == 1

    with pytest.raises(RemoteProtocolError, match="a second reply, or a reply without a request"):
        await use(device(complete), answer)


async def test_a_paused_guest_cannot_have_a_device() -> None:
    with pytest.raises(ValueError, match="a paused guest cannot have a device"):
        await MemoryGuest(device(complete), paused=True).__aenter__()
