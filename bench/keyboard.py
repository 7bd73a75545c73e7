"""Measure how fast the USB keyboard types into a Linux guest, and check each character that the guest took.

Texts of random characters are typed over a TCP socket and over SPICE, while processes of this program keep processors
of the machine busy. The first text on each connection contains the keys that are confirmed one by one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import time

from tests.guest.test_devices_of_your_own import GUEST, KEY_ESC, reading, text_of
from tests.guest.test_typing import busy, connected, random_text

from farplug.app.commands import Via
from farplug.vm.qemu import QemuGuest
from rows import Row, add_rows_option, write_rows

TRANSPORTS = ("tcp", "spice")
TIMEOUT = 300


async def measure(texts: int, size: int, load: int) -> list[Row]:
    results = []
    async with QemuGuest(GUEST) as guest:
        await guest.booted(TIMEOUT)
        for port, transport in enumerate(TRANSPORTS):
            rates = []
            async with connected(guest.targets[port]) as farplug:
                await farplug.typing.type("x", via=Via.USB)
                for number in range(texts):
                    text = random_text(100 * port + number, size)
                    with busy(load):
                        async with reading(guest, 0, KEY_ESC) as events:
                            begin = time.perf_counter()
                            typed = await farplug.typing.type(text, via=Via.USB)
                            rates.append(size / (time.perf_counter() - begin))
                            await farplug.typing.press("Escape")
                    if not typed.confirmed or text_of(events) != text:
                        raise SystemExit(f"text {number} over {transport} did not arrive as it was typed")
            shown = ", ".join(f"{rate:.0f}" for rate in rates)
            results.append(
                Row("typing on the USB keyboard", f"over {transport}", f"{statistics.median(rates):.0f} characters/s")
            )
            print(f"{transport}: {shown} characters a second, median {statistics.median(rates):.0f}; all are equal")
    print(
        f"texts of {size} characters beside {load} busy processes; {os.cpu_count()} processors, "
        f"load {os.getloadavg()[0]:.1f}, Linux {platform.release()}"
    )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure typing on the USB keyboard.")
    parser.add_argument("--texts", type=int, default=5, help="texts over each transport")
    parser.add_argument("--size", type=int, default=2000, help="characters of a text")
    parser.add_argument("--busy", type=int, default=2, help="busy processes beside the guest")
    add_rows_option(parser)
    arguments = parser.parse_args()
    write_rows(arguments.rows, asyncio.run(measure(arguments.texts, arguments.size, arguments.busy)))


if __name__ == "__main__":
    main()
