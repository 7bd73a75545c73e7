"""The defaults of a function."""

from __future__ import annotations

from tests.virtual.bulk_only import Listener
from tests.virtual.test_layout import Wide

from farplug.usb import Setup, Speed, Transfer, TransferType
from farplug.virtual import VirtualDevice


class Plain(Wide):
    def reset(self, *, port_reset: bool) -> None:
        """Nothing is pending."""


async def test_defaults() -> None:
    device = VirtualDevice(Plain())
    await device.open(Listener())
    assert device.figures is None
    await device.reset()
    await device.set_configuration(1)
    await device.set_interface(1, 1)
    assert [len(one.endpoints) for one in device.interfaces] == [1, 2]
    ended: list[Transfer] = []
    for setup in (Setup(0xA1, 0xFE, 0, 0, 1), Setup(0x02, 1, 0, 0x81)):
        endpoint = setup.request_type & 0x80
        device.submit(Transfer(TransferType.CONTROL, endpoint, ended.append, length=setup.length, setup=setup))
    assert [str(one.status) for one in ended] == ["stall", "success"]
    assert device.identity.speed is Speed.SUPER
    await device.close()
    await device.dispose()
