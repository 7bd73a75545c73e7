"""What a device does that overrides only what it must."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.virtual.bulk_only import Listener

from farplug.usb import Device, Identity, Interface, Reception, Speed, Status, Transfer, TransferType


class Plain(Device):
    @property
    def identity(self) -> Identity:
        return Identity(Speed.HIGH, 0x1234, 0xABCD)

    @property
    def configuration(self) -> int:
        return 0

    @property
    def interfaces(self) -> Sequence[Interface]:
        return ()

    def submit(self, transfer: Transfer) -> None:
        transfer.complete(Status.STALL)

    def cancel(self, transfer: Transfer) -> None:
        raise AssertionError

    async def reset(self) -> Status:
        return Status.SUCCESS

    async def set_configuration(self, value: int) -> Status:
        return Status.SUCCESS

    async def set_interface(self, number: int, alternate: int) -> Status:
        return Status.INVALID


async def test_defaults() -> None:
    device = Plain()
    await device.open(Listener())
    assert device.speeds == (Speed.HIGH,)
    assert device.figures is None
    assert device.start_receiving(Reception(0x81, TransferType.INTERRUPT)) is Status.STALL
    assert device.stop_receiving(0x81) is Status.SUCCESS
    assert await device.allocate_streams([0x81], 32) is Status.STALL
    assert await device.free_streams([0x81]) is Status.STALL
    await device.close()


def test_speeds() -> None:
    device = Plain()
    device.select_speed(Speed.HIGH)
    with pytest.raises(ValueError, match="1234:abcd cannot run at super speed"):
        device.select_speed(Speed.SUPER)


@pytest.mark.parametrize(
    ("manufacturer", "product", "text"),
    [
        ("", "", "1d6b:0104"),
        ("farplug", "", "1d6b:0104 farplug"),
        ("", "Disk", "1d6b:0104 Disk"),
        ("farplug", "Disk", "1d6b:0104 farplug Disk"),
    ],
)
def test_identity(manufacturer: str, product: str, text: str) -> None:
    identity = Identity(Speed.SUPER, 0x1D6B, 0x0104, manufacturer=manufacturer, product=product)
    assert str(identity) == text
