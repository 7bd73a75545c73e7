"""The defaults of a device."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.virtual.bulk_only import Listener

from farplug.usb import Device, Identity, Interface, Offer, Reception, Speed, Status, Transfer, TransferType


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
    assert device.offers == (Offer(Speed.HIGH),)
    assert not device.used_at_once
    assert device.figures is None
    assert device.start_receiving(Reception(0x81, TransferType.INTERRUPT)) is Status.STALL
    assert device.stop_receiving(0x81) is Status.SUCCESS
    assert await device.allocate_streams([0x81], 32) is Status.STALL
    assert await device.free_streams([0x81]) is Status.STALL
    await device.close()


def test_offers() -> None:
    device = Plain()
    device.select(Offer(Speed.HIGH))
    with pytest.raises(ValueError, match="1234:abcd cannot be offered at super speed"):
        device.select(Offer(Speed.SUPER))
    with pytest.raises(ValueError, match="1234:abcd cannot be offered at high speed without legs"):
        device.select(Offer(Speed.HIGH, "legs"))


def test_lesser_offers() -> None:
    fast, slow = Offer(Speed.SUPER), Offer(Speed.HIGH)
    fast_less, slow_less, other = Offer(Speed.SUPER, "legs"), Offer(Speed.HIGH, "legs"), Offer(Speed.HIGH, "arms")
    less = {(a, b) for a in (fast, slow, fast_less, slow_less, other) for b in (fast, fast_less) if a.is_less_than(b)}
    assert less == {
        (slow, fast), (fast_less, fast), (slow_less, fast), (other, fast), (slow_less, fast_less),
    }  # fmt: skip


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
