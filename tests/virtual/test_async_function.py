"""Functions made of a coroutine and of endpoints that it awaits, driven by a guest in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.usb import Recipient, RequestType, Setup, Speed, Status
from farplug.usb.descriptors import ConfigurationDescriptor
from farplug.usb.types import DescriptorType
from farplug.usbredir import packets
from farplug.virtual import (
    AsyncFunction,
    Detached,
    Numbers,
    Setting,
    Stall,
    VirtualDevice,
    async_function,
    bulk_in,
    bulk_out,
    control_in,
    control_out,
    endpoints,
    interrupt_in,
    interrupt_out,
    isochronous_in,
    isochronous_out,
)

VENDOR_OUT, VENDOR_IN = 0x40, 0xC0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in this event loop."""
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0)


async def plug_for_a_moment(function: AsyncFunction) -> None:
    """Raises the exceptions of the function."""
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()
        await asyncio.sleep(0.01)


class Loopback(AsyncFunction):
    """Sends back what it receives, and keeps a log of its life."""

    received = bulk_out()
    sent = bulk_in()

    def __init__(self) -> None:  # without super().__init__()
        self.log: list[str] = []

    async def run(self) -> None:
        self.log.append("begin")
        try:
            async for data in self.received:
                await self.sent.write(data)
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise

    @control_in(1)
    async def lives(self, setup: Setup) -> bytes:
        await asyncio.sleep(0)
        return bytes((self.log.count("begin"),))


async def test_loopback() -> None:
    async with MemoryGuest(VirtualDevice(Loopback())) as guest:
        await guest.enumerate()
        for data in (b"hello", b"", bytes(3000)):
            await guest.bulk_out(0x01, data)
            assert await guest.bulk_in(0x81, 4096) == data


async def test_two_functions_of_one_class_are_independent() -> None:
    first, second = Loopback(), Loopback()
    async with MemoryGuest(VirtualDevice(first, second)) as guest:
        await guest.enumerate()
        assert (second.received.address, second.received.address_in_device) == (0x01, 0x02)
        await guest.bulk_out(0x01, b"one")
        await guest.bulk_out(0x02, b"two")
        assert await guest.bulk_in(0x82, 10) == b"two"
        assert await guest.bulk_in(0x81, 10) == b"one"


async def test_a_write_answers_several_requests() -> None:
    class Source(AsyncFunction):
        data = bulk_in()

        async def run(self) -> None:
            await self.data.write(b"abcdef")
            await self.data.write(b"xy", end=True)
            await self.data.write(b"")

    async with MemoryGuest(VirtualDevice(Source())) as guest:
        await guest.enumerate()
        assert [await guest.bulk_in(0x81, length) for length in (2, 3, 9)] == [b"ab", b"cde", b"f"]
        assert [await guest.bulk_in(0x81, length) for length in (2, 9)] == [b"xy", b""]
        assert await guest.bulk_in(0x81, 9) == b""


async def test_run_lives_while_the_device_is_configured() -> None:
    function = Loopback()
    device = VirtualDevice(function)
    async with MemoryGuest(device) as guest:
        assert not function.is_configured
        await guest.enumerate()
        assert await guest.control_in(Setup(VENDOR_IN, 1, 0, 0, 1)) == b"\1"
        assert function.is_configured
        waiting = guest.submit_in(0x81, 10)
        guest.reset()
        assert (await waiting).status == Status.CANCELLED
        await until(lambda: function.log == ["begin", "cancelled"])
        await guest.set_configuration(1)
        await guest.set_configuration(1)
        await guest.set_configuration(0)
        await guest.set_configuration(1)
        await until(lambda: function.log[-1] == "begin")
        await guest.bulk_out(0x01, b"again")
        assert await guest.bulk_in(0x81, 10) == b"again"
    assert function.log[-1] == "cancelled"
    assert function.log.count("begin") == function.log.count("cancelled")
    async with MemoryGuest(device) as guest:  # plugged again
        await guest.enumerate()
        await guest.bulk_out(0x01, b"x")
        assert await guest.bulk_in(0x81, 10) == b"x"


async def test_the_next_run_begins_when_the_cleanup_of_the_last_has_ended() -> None:
    class Careful(AsyncFunction):
        data = bulk_in()
        other = bulk_out()

        def __init__(self) -> None:
            self.log: list[str] = []
            self.release = asyncio.Event()

        async def run(self) -> None:
            self.log.append("begin")
            try:
                await asyncio.Event().wait()
            finally:
                await self.release.wait()
                try:
                    await self.data.write(b"from the last life")
                except Detached:
                    self.log.append("detached")

    function = Careful()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()
        await until(lambda: function.log == ["begin"])
        for _ in range(5):  # a guest cannot interrupt the cleanup, nor start it more than once
            await guest.set_configuration(1)
        reading = guest.submit_in(0x81, 100)
        assert function.log == ["begin"]
        function.release.set()
        await until(lambda: function.log == ["begin", "detached", "begin"])
        assert not reading.done
        reading.cancel()
        await reading


async def test_a_run_that_returns_leaves_the_endpoints() -> None:
    class Short(AsyncFunction):
        data = bulk_in()

        async def run(self) -> None:
            return

    function = Short()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        with pytest.raises(Detached):
            await function.data.write(b"too early")
        await guest.enumerate()
        writing = asyncio.ensure_future(function.data.write(b"from outside"))
        assert await guest.bulk_in(0x81, 100) == b"from outside"
        await writing
        waiting = asyncio.ensure_future(function.data.write(b"never"))
        await asyncio.sleep(0)
        guest.reset()
        with pytest.raises(Detached):
            await waiting


async def test_a_waiting_method_does_not_outlive_a_configuration() -> None:
    function = Loopback()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()
        writers = [asyncio.ensure_future(function.sent.write(b"old")) for _ in range(3)]
        await asyncio.sleep(0)
        await guest.set_configuration(1)
        for writer in writers:
            with pytest.raises(Detached):
                await writer
        await guest.bulk_out(0x01, b"new")
        assert await guest.bulk_in(0x81, 10) == b"new"


async def test_a_reset_ends_the_tasks_of_a_task_group_silently() -> None:
    class Grouped(AsyncFunction):
        received = bulk_out()
        sent = bulk_in()
        fails = False

        async def run(self) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.received.read())
                group.create_task(self.sent.write(b"x"))
                if self.fails:
                    group.create_task(self.fail())

        async def fail(self) -> None:
            try:
                await self.received.read()
            finally:
                raise ValueError("also at the end")

    async with MemoryGuest(VirtualDevice(function := Grouped())) as guest:
        for _ in range(3):
            await guest.set_configuration(1)
        function.fails = True
        await guest.set_configuration(1)
        assert not guest.faults
        await guest.set_configuration(1)
        await guest.wait(lambda: bool(guest.faults))
        (group,) = guest.faults
        assert isinstance(group, ExceptionGroup)
        assert group.subgroup(ValueError) is not None
        function.fails = False
        await guest.set_configuration(1)
        await guest.wait(lambda: len(guest.faults) == 2)
        guest.faults.clear()


async def test_a_run_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Loopback):
        async def run(self) -> None:
            self.log.append("begin")
            raise RuntimeError("a defect")

    function = Broken()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()
        await guest.wait(lambda: bool(guest.faults))
        assert [str(fault) for fault in guest.faults] == ["a defect"]
        assert "Broken raised" in caplog.text
        assert "raise RuntimeError" in caplog.text
        guest.faults.clear()
        await guest.set_configuration(1)
        await guest.wait(lambda: bool(guest.faults))
        assert function.log == ["begin", "begin"]
        guest.faults.clear()
    with pytest.raises(RuntimeError, match="a defect"):
        await plug_for_a_moment(Broken())


async def test_a_cleanup_that_raises_at_the_end() -> None:
    class Broken(AsyncFunction):
        async def run(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                raise OSError("the cleanup failed")

    with pytest.raises(OSError, match="the cleanup failed"):
        await plug_for_a_moment(Broken())


async def test_a_run_that_ignores_its_cancellation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(async_function, "END_TIMEOUT", 0.05)

    class Stubborn(Loopback):
        def __init__(self) -> None:
            super().__init__()
            self.release = asyncio.Event()

        async def run(self) -> None:
            self.log.append("begin")
            while not self.release.is_set():
                try:
                    await self.release.wait()
                except asyncio.CancelledError:
                    self.log.append("ignored")

    function = Stubborn()
    device = VirtualDevice(function)
    async with MemoryGuest(device) as guest:
        await guest.enumerate()
        await until(lambda: function.log == ["begin"])
    assert function.log == ["begin", "ignored"]
    assert "Stubborn did not end 0.05 s after it was cancelled" in caplog.text
    async with MemoryGuest(device) as guest:
        await guest.enumerate()
        await until(lambda: function.log == ["begin", "ignored", "begin"])
        function.release.set()


class Requests(AsyncFunction):
    def __init__(self) -> None:
        self.value = b""
        self.gate = asyncio.Event()
        self.begun = self.cancelled = 0

    @control_out(1)
    def set_value(self, setup: Setup, data: bytes) -> None:
        if setup.value == 9:
            raise Stall
        self.value = data

    @control_in(1)
    def get_value(self, setup: Setup) -> bytes:
        return self.value

    @control_in(2)
    async def wait(self, setup: Setup) -> bytes:
        self.begun += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if setup.value == 9:
            raise Stall
        if setup.value == 8:
            raise RuntimeError("a defect of a handler")
        return b"done"

    @control_in(3, RequestType.CLASS, Recipient.INTERFACE)
    @control_in(4, RequestType.CLASS, Recipient.INTERFACE)
    def of_class(self, setup: Setup) -> bytes:
        return bytes((setup.request, setup.index))


class MoreRequests(Requests):
    def get_value(self, setup: Setup) -> bytes:
        return b"more " + super().get_value(setup)


async def test_requests() -> None:
    function = Requests()
    async with MemoryGuest(VirtualDevice(Loopback(), function)) as guest:
        await guest.enumerate()
        await guest.control_out(Setup(VENDOR_OUT, 1, 0, 0, 5), b"value")
        with pytest.raises(TransferFailed, match="stall"):
            await guest.control_out(Setup(VENDOR_OUT, 1, 9, 0, 1), b"x")
        assert function.value == b"value"
        assert await guest.control_in(Setup(0xA1, 3, 0, 1, 2)) == b"\3\0"
        assert await guest.control_in(Setup(0xA1, 4, 0, 1, 1)) == b"\4"
        with pytest.raises(TransferFailed, match="stall"):
            await guest.control_in(Setup(0xA1, 5, 0, 1, 2))
        function.requests[0xA1, 5] = lambda setup, data: b"table"
        assert await guest.control_in(Setup(0xA1, 5, 0, 1, 255)) == b"table"
        assert guest.faults == []


async def test_an_override_of_a_handler() -> None:
    async with MemoryGuest(VirtualDevice(MoreRequests())) as guest:
        await guest.control_out(Setup(VENDOR_OUT, 1, 0, 0, 1), b"x")
        assert await guest.control_in(Setup(VENDOR_IN, 1, 0, 0, 255)) == b"more x"


async def test_handlers_that_wait() -> None:
    function = Requests()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()

        def request(value: int) -> packets.ControlPacket:
            return packets.ControlPacket.of(guest.new_id(), Setup(VENDOR_IN, 2, value, 0, 64), b"")

        at_once = guest.request(request(0))
        at_once.cancel()
        assert (await at_once).status == Status.CANCELLED
        assert function.begun == 0
        cancelled = guest.request(request(0))
        await until(lambda: function.begun == 1)
        cancelled.cancel()
        assert (await cancelled).status == Status.CANCELLED
        await until(lambda: function.cancelled == 1)
        unplugged = guest.request(request(0))
        await until(lambda: function.begun == 2)
        await guest.set_configuration(1)
        assert (await unplugged).status == Status.CANCELLED
        await until(lambda: function.cancelled == 2)
        function.gate.set()
        assert bytes((await guest.request(request(0))).data) == b"done"
        assert (await guest.request(request(9))).status == Status.STALL
        assert guest.faults == []
        assert (await guest.request(request(8))).status == Status.STALL
        await guest.wait(lambda: bool(guest.faults))
        assert str(guest.faults.pop()) == "a defect of a handler"
        function.gate.clear()
        begun = function.begun
        guest.request(request(0))
        await until(lambda: function.begun > begun)
    assert function.cancelled == 3  # unplugging waits for the end of handlers


class Sensor(AsyncFunction):
    readings = interrupt_in(8, microseconds=1000)
    state = interrupt_in(8, microseconds=4000, keep=True)
    commands = interrupt_out(8)
    commanded: list[bytes]

    async def run(self) -> None:
        self.commanded = []
        async for command in self.commands:
            self.commanded.append(command)


async def test_interrupt_endpoints() -> None:
    function = Sensor()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()
        assert not function.readings.is_read
        writing = asyncio.ensure_future(function.readings.write(b"first"))
        assert await guest.interrupt_in(0x81) == b"first"
        await writing
        assert function.readings.is_read
        await function.readings.write_together(b"down", b"up")
        assert [await guest.interrupt_in(0x81) for _ in range(2)] == [b"down", b"up"]
        with pytest.raises(ValueError, match="9 bytes does not fit endpoint 81, which has 8"):
            await function.readings.write(bytes(9))
        await guest.interrupt_out(0x01, b"command")
        await until(lambda: function.commanded == [b"command"])


async def test_packets_are_sent_at_the_pace_of_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    function = Sensor()
    async with MemoryGuest(VirtualDevice(function, speeds=(Speed.HIGH,))) as guest:
        await guest.enumerate()
        await guest.start_receiving(0x82)
        begun = asyncio.get_running_loop().time()
        for _ in range(30):
            await function.state.write(b"x")
        assert asyncio.get_running_loop().time() - begun >= 29 * 0.004 - endpoints.MAX_LATE
        assert function.state.seconds == 0.004


async def test_a_state_is_sent_again_when_the_guest_reads_again() -> None:
    function = Sensor()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()
        await guest.start_receiving(0x82)
        await function.state.write(b"on")
        assert await guest.interrupt_in(0x82) == b"on"
        assert function.state.restarts == 0
        await guest.stop_receiving(0x82)
        assert not function.state.is_read
        assert await guest.interrupt_in(0x82) == b"on"
        assert function.state.restarts == 1
        await guest.set_configuration(1)
        await guest.start_receiving(0x82)
        writing = asyncio.ensure_future(function.state.write(b"new"))
        assert await guest.interrupt_in(0x82) == b"new"  # not the state of the last configuration
        assert function.state.restarts == 0
        await writing


async def test_a_packet_that_the_guest_does_not_take_is_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.redirection.port_protocol.MAX_UNREQUESTED", 2)
    function = Sensor()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()
        await guest.start_receiving(0x81)
        guest.redirection._protocol.pause_writing()
        writing = asyncio.ensure_future(function.readings.write_together(*(b"%d" % number for number in range(5))))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not writing.done()
        guest.redirection._protocol.resume_writing()
        await writing
        assert [await guest.interrupt_in(0x81) for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("end", ["sent", "detached"])
async def test_a_cancelled_call_does_not_leave_a_key_pressed(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.redirection.port_protocol.MAX_UNREQUESTED", 1)
    function = Sensor()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()
        await guest.start_receiving(0x81)
        guest.redirection._protocol.pause_writing()
        writing = asyncio.ensure_future(function.readings.write_together(b"down", b"up"))
        await until(lambda: function.readings._last == b"down")
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        later = asyncio.ensure_future(function.readings.write(b"later"))
        never = asyncio.ensure_future(function.readings.write_together(b"never", b"never"))
        await asyncio.sleep(0)
        never.cancel()
        if end == "sent":
            guest.redirection._protocol.resume_writing()
            await later
            assert [await guest.interrupt_in(0x81) for _ in range(3)] == [b"down", b"up", b"later"]
        else:
            function.readings.detach()  # as a reset does
            with pytest.raises(Detached):
                await later
            guest.redirection._protocol.resume_writing()
        await asyncio.gather(never, return_exceptions=True)
        assert not function.readings._lock.locked()


class Sound(AsyncFunction):
    settings = (Setting(0, 0), Setting(0, 1), Setting(1, 0, 10, name="control"))
    microphone = isochronous_in(64, alternate=1)
    speaker = isochronous_out(64, alternate=1)
    answers = bulk_in(interface=1)

    def __init__(self) -> None:
        self.begun = 0
        self.played: list[bytes] = []

    async def run(self) -> None:
        self.begun += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(self.talk())
            async for data in self.speaker:
                self.played.append(data)

    async def talk(self) -> None:
        for number in range(1000):
            await self.microphone.write(number.to_bytes(2, "little"))

    def class_descriptors(self, setting: Setting, numbers: Numbers) -> bytes:
        return bytes((4, 0x24, setting.alternate, numbers.interface(1))) if not setting.interface else b""


async def test_isochronous_endpoints_and_alternate_settings() -> None:
    function = Sound()
    async with MemoryGuest(VirtualDevice(Loopback(), function)) as guest:
        await guest.enumerate()
        raw = await guest.get_descriptor(DescriptorType.CONFIGURATION, length=999)
        first = ConfigurationDescriptor.parse(raw).interfaces[1]
        assert first.extra == bytes((4, 0x24, 0, 2))
        with pytest.raises(TransferFailed, match="no such endpoint"):
            await guest.iso_in(0x82)
        waiting = guest.submit_in(0x83, 10)  # another interface: a new setting does not concern it
        await guest.set_interface(1, 1)
        assert function.alternate(0) == 1
        numbers = [int.from_bytes(await guest.iso_in(0x82), "little") for _ in range(50)]
        assert numbers == list(range(50))
        for packet in (b"one", b"two"):
            await guest.iso_out(0x02, packet)
        await until(lambda: function.played == [b"one", b"two"])
        await guest.set_interface(1, 0)
        await guest.set_interface(1, 1)
        assert int.from_bytes(await guest.iso_in(0x82), "little") >= 50
        assert not waiting.done
        await function.answers.write(b"yes")
        assert bytes((await waiting).data) == b"yes"
        assert function.begun == 1
        with pytest.raises(ValueError, match="does not fit"):
            await function.microphone.write(bytes(65))


async def test_sound_that_is_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(Sound):
        async def run(self) -> None:
            return

    function = Deaf()
    async with MemoryGuest(VirtualDevice(function)) as guest:
        await guest.enumerate()
        await guest.set_interface(0, 1)
        for number in range(endpoints.MAX_SAMPLES + 2):
            await guest.iso_out(0x01, b"%d" % number)
        await until(lambda: function.speaker.dropped == 2)
        assert await function.speaker.read() == b"2"


async def test_a_halt() -> None:
    async with MemoryGuest(VirtualDevice(function := Loopback())) as guest:
        await guest.enumerate()
        pending = [guest.submit_in(0x81, 10) for _ in range(2)]
        await until(lambda: function.log == ["begin"])
        function.sent.halt()
        assert [(await one).status for one in pending] == [Status.STALL] * 2
        with pytest.raises(TransferFailed, match="stall"):
            await guest.bulk_in(0x81, 10)
        await guest.clear_halt(0x81)
        await guest.bulk_out(0x01, b"x")
        assert await guest.bulk_in(0x81, 10) == b"x"


async def test_a_cancelled_transfer() -> None:
    async with MemoryGuest(VirtualDevice(Loopback())) as guest:
        await guest.enumerate()
        first, second = guest.submit_in(0x81, 10), guest.submit_in(0x81, 10)
        first.cancel()
        assert (await first).status == Status.CANCELLED
        await guest.bulk_out(0x01, b"x")
        assert bytes((await second).data) == b"x"


async def test_thousands_of_cancelled_transfers() -> None:
    async with MemoryGuest(VirtualDevice(function := Loopback())) as guest:
        await guest.enumerate()
        pending = [guest.submit_in(0x81, 10) for _ in range(4000)]
        for one in pending:
            one.cancel()
        assert {(await one).status for one in pending} == {Status.CANCELLED}
        assert not function.sent._transfers


def test_an_endpoint_of_no_setting() -> None:
    class Wrong(AsyncFunction):
        data = bulk_in(interface=2)

    with pytest.raises(ValueError, match="Wrong has no setting 0 of interface 2"):
        VirtualDevice(Wrong())


async def test_full_speed_has_smaller_packets() -> None:
    class Wide(AsyncFunction):
        data = interrupt_in(512)

    function = Wide()
    async with MemoryGuest(VirtualDevice(function, speeds=(Speed.FULL,))) as guest:
        await guest.enumerate()
        assert function.data.packet_size == 64
        with pytest.raises(ValueError, match="which has 64"):
            await function.data.write(bytes(65))
