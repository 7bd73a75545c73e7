"""Operations on the whole device: reset, configurations, alternate settings, bulk streams."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.redirection.scripted import BULK_IN, BULK_OUT, INTERRUPT_IN, STREAM_IN, ScriptedDevice, kinds, settle

from farplug.redirection import State, events, operations
from farplug.testing.memory import MemoryGuest
from farplug.usb import Interface, Status
from farplug.usbredir import packets


async def test_reset_cancels_what_is_pending_and_ends_receptions() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        status = guest.stream(packets.InterruptReceivingStatus, INTERRUPT_IN)
        guest.send(packets.StartInterruptReceiving(endpoint=INTERRUPT_IN))
        assert (await status()).status is Status.SUCCESS
        pending = guest.submit_in(BULK_IN, 10)
        guest.reset()
        assert (await pending).status is Status.CANCELLED
        assert (await status()).status is Status.STALL
        guest.reset()  # not used since the first reset: skipped
        await settle()
        assert device.calls.count("reset") == 1
        assert kinds(guest).count(events.PortReset) == 1


async def test_configurations() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        answer = await guest.request(packets.GetConfiguration(id=101))
        assert (answer.status, answer.configuration) == (Status.SUCCESS, 0)
        pending = guest.submit_in(BULK_IN, 10)
        before = len(guest.received)
        answer = await guest.request(packets.SetConfiguration(id=102, configuration=1))
        assert (answer.status, answer.configuration) == (Status.SUCCESS, 1)
        assert (await pending).status is Status.CANCELLED
        assert [type(packet) for packet in guest.received[before:]] == [
            packets.BulkPacket,
            packets.InterfaceInfo,
            packets.EndpointInfo,
            packets.ConfigurationStatus,
        ]
        device.operation_status = Status.STALL
        answer = await guest.request(packets.SetConfiguration(id=103, configuration=2))
        assert (answer.status, answer.configuration) == (Status.IO_ERROR, 1)
        assert [event for event in guest.events if isinstance(event, events.Configured)] == [
            events.Configured("memory", 1)
        ]


async def test_alternate_settings() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 10)
        before = len(guest.received)
        answer = await guest.request(packets.SetAltSetting(id=101, interface=0, alt=1))
        assert (answer.status, answer.alt) == (Status.SUCCESS, 1)
        assert (await pending).status is Status.CANCELLED
        assert [type(packet) for packet in guest.received[before:]] == [
            packets.BulkPacket,
            packets.InterfaceInfo,
            packets.EndpointInfo,
            packets.AltSettingStatus,
        ]
        assert guest.endpoints is not None
        assert guest.endpoints.endpoints[packets.endpoint_index(STREAM_IN)].max_streams == 16
        assert guest.endpoints.endpoints[packets.endpoint_index(BULK_IN)].type == 255
        answer = await guest.request(packets.GetAltSetting(id=102, interface=0))
        assert (answer.status, answer.alt) == (Status.SUCCESS, 1)
        for packet in (packets.SetAltSetting(id=103, interface=9, alt=0), packets.GetAltSetting(id=105, interface=9)):
            answer = await guest.request(packet)
            assert (answer.status, answer.alt) == (Status.INVALID, 255)
        before = len(guest.received)
        device.operation_status = Status.STALL
        answer = await guest.request(packets.SetAltSetting(id=104, interface=0, alt=7))
        assert (answer.status, answer.alt) == (Status.IO_ERROR, 1)
        assert len(guest.received) == before + 1  # no infos


async def test_streams() -> None:
    device = ScriptedDevice()
    device.alternate = 1
    mask = 1 << packets.endpoint_index(STREAM_IN) | 1 << packets.endpoint_index(BULK_OUT)
    async with MemoryGuest(device) as guest:
        status = guest.stream(packets.BulkStreamsStatus, 0)
        table = [
            (packets.AllocBulkStreams(endpoints=mask, streams=16), Status.SUCCESS, 16),
            (packets.AllocBulkStreams(endpoints=mask, streams=17), Status.INVALID, 17),
            (packets.AllocBulkStreams(endpoints=mask | 1 << 9, streams=16), Status.INVALID, 16),
            (packets.FreeBulkStreams(endpoints=mask), Status.SUCCESS, 0),
        ]
        for packet, expected, count in table:
            guest.send(packet)
            answer = await status()
            assert answer == packets.BulkStreamsStatus(endpoints=mask_of(packet), streams=count, status=expected)
        assert ("allocate_streams", (BULK_OUT, STREAM_IN), 16) in device.calls
        assert ("free_streams", (BULK_OUT, STREAM_IN)) in device.calls


def mask_of(packet: packets.Packet) -> int:
    assert isinstance(packet, (packets.AllocBulkStreams, packets.FreeBulkStreams))
    return packet.endpoints


async def test_a_device_that_raises_on_cancel_and_on_reset() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        pending = guest.submit_in(BULK_IN, 10)
        await settle()
        device.raises = ZeroDivisionError("again")
        pending.cancel()
        assert (await pending).status is Status.CANCELLED
        guest.reset()
        await guest.wait(lambda: events.PortReset in kinds(guest))
        assert kinds(guest).count(events.DeviceFault) == 2
        device.raises = None
        guest.faults.clear()


class Unreadable(ScriptedDevice):
    """A device whose interfaces cannot be read: it is being unplugged."""

    broken = False

    @property
    def interfaces(self) -> Sequence[Interface]:
        if self.broken:
            raise OSError("no such device")
        return super().interfaces

    @property
    def configuration(self) -> int:
        if self.broken:
            raise OSError("no such device")
        return super().configuration


async def test_a_device_that_cannot_be_described_any_more() -> None:
    device = Unreadable()
    async with MemoryGuest(device) as guest:
        device.broken = True
        for packet in (
            packets.SetConfiguration(id=100, configuration=1),
            packets.GetConfiguration(id=101),
            packets.SetAltSetting(id=102, interface=0, alt=1),
            packets.GetAltSetting(id=103, interface=0),
        ):
            assert (await guest.request(packet)).status is Status.IO_ERROR
        assert kinds(guest).count(events.DeviceFault) == 4
        device.broken = False
        guest.faults.clear()


async def test_a_setting_that_cannot_be_described() -> None:
    class Device(Unreadable):
        async def set_interface(self, number: int, alternate: int) -> Status:
            self.broken = True
            return Status.SUCCESS

    device = Device()
    async with MemoryGuest(device) as guest:
        answer = await guest.request(packets.SetAltSetting(id=100, interface=0, alt=1))
        assert (answer.status, answer.alt) == (Status.IO_ERROR, operations.NO_SETTING)
        device.broken = False
        guest.faults.clear()


async def test_a_device_that_cannot_be_described_at_all_is_not_offered() -> None:
    device = Unreadable()
    device.broken = True
    async with MemoryGuest() as guest:
        await settle()
        with pytest.raises(OSError, match="no such device"):
            await guest.redirection.attach(device)
        assert guest.redirection.state is State.EMPTY
        assert device.calls == ["open", "close"]
        await guest.redirection.attach(ScriptedDevice())
