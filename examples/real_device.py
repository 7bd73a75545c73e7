"""Plug a USB device of this machine into a guest.

python examples/real_device.py 1-4 tcp://127.0.0.1:4000

``1-4`` is the device with address 4 on bus 1, as lsusb shows it.
"""

from __future__ import annotations

import asyncio
import sys

from farplug.guest import connect
from farplug.hub import Hub
from farplug.physical import find_device
from farplug.target import parse_target


async def main(place: str, target: str) -> None:
    """Plug it in, and stay until it is unplugged or the guest is gone."""
    bus, address = place.split("-")
    device = await asyncio.to_thread(find_device, int(bus), int(address))
    hub = Hub(await connect(parse_target(target)))
    hub.subscribe(lambda attachment, event: print(event))
    try:
        attachment = await hub.plug(device)
        await attachment.ended()
    finally:
        await hub.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
