"""The packets that describe a device to the guest."""

from __future__ import annotations

from tests.redirection.scripted import BULK_IN, INTERRUPT_IN, ScriptedDevice, kinds

from farplug.redirection import events
from farplug.testing.memory import MemoryGuest
from farplug.usb import Speed, TransferType
from farplug.usbredir import packets


async def test_attach_describes_the_device_before_it_connects_it() -> None:
    device = ScriptedDevice()
    async with MemoryGuest(device) as guest:
        sent = [type(packet) for packet in guest.received]
        assert sent == [packets.Hello, packets.InterfaceInfo, packets.EndpointInfo, packets.DeviceConnect]
        assert guest.connected == packets.DeviceConnect(
            speed=Speed.HIGH,
            device_class=0,
            device_subclass=0,
            device_protocol=0,
            vendor_id=0x1209,
            product_id=1,
            device_version=0x0100,
        )
        assert guest.interfaces == packets.InterfaceInfo(interfaces=(packets.InterfaceEntry(0, 255, 1, 2),))
        assert guest.endpoints is not None
        table = guest.endpoints.endpoints
        assert table[0].type == table[16].type == TransferType.CONTROL
        assert table[1].type == 255
        assert table[packets.endpoint_index(BULK_IN)] == packets.EndpointEntry(2, 0, 0, 512, 0)
        assert table[packets.endpoint_index(INTERRUPT_IN)] == packets.EndpointEntry(3, 4, 0, 8, 0)
    assert device.calls == ["open", "close"]
    assert kinds(guest) == [events.GuestReady, events.Attached, events.Detached]
    assert not guest.violations


async def test_an_interval_of_zero_becomes_one_because_qemu_rejects_it() -> None:
    device = ScriptedDevice()
    device.interval = 0
    async with MemoryGuest(device) as guest:
        assert guest.endpoints is not None
        assert guest.endpoints.endpoints[packets.endpoint_index(INTERRUPT_IN)].interval == 1


async def test_super_speed_plus_is_sent_as_super() -> None:
    async with MemoryGuest(ScriptedDevice((Speed.SUPER_PLUS,))) as guest:
        assert guest.connected is not None
        assert guest.connected.speed == Speed.SUPER
