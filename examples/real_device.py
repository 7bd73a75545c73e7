"""Plug a USB device of this machine into a VM until Ctrl-C, and print what happens.

python examples/real_device.py 1050:0407 tcp://127.0.0.1:4000
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import farplug


async def main(device: str, target: str) -> None:
    """Plug the device in, and stay until it is pulled out, the VM ends or this task is cancelled."""
    async with farplug.connect(target) as guest:
        guest.stream.subscribe(lambda event: print(event, flush=True))
        attachment = await guest.plug(farplug.usb_device(device))
        await attachment.ended()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(*sys.argv[1:]))
