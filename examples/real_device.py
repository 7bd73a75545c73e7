"""Plug a USB device of this machine into a VM until Ctrl-C, and print what happens.

python examples/real_device.py 1-4 tcp://127.0.0.1:4000

``1-4`` is the device with address 4 on bus 1, as lsusb shows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from farplug.app.guest import Hub
from farplug.physical import find_device
from farplug.target import open_session, parse_target


async def main(place: str, target: str) -> None:
    """Plug the device in, and stay until it is pulled out, the VM ends or this task is cancelled."""
    bus, address = place.split("-")
    device = await asyncio.to_thread(find_device, int(bus), int(address))
    async with Hub(await open_session(parse_target(target))) as hub:
        hub.subscribe(lambda attachment, event: print(event, flush=True))
        attachment = await hub.plug(device)
        await attachment.ended()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
