"""VMs without QEMU, for load tests: guests in memory, each behind the link of a SPICE server on a TCP port.

``python -m tests.load.vms`` serves any number of them on one port, each at an address of its own of 127.0.0.0/8, until
standard input ends. It prints the port. Each guest configures the disk that is plugged into it, then reads and writes
it, again and again: bursts of 1 MiB in commands of 128 KiB, one at a time, over Bulk-Only Transport.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import struct
import sys
from collections.abc import AsyncIterator, Iterator

from tests.transport.fake_spice import Channel, FakeSpice, message, running

from farplug.testing.memory import MemoryGuest, TransferFailed
from farplug.usbredir import packets

DATA = 101
COMMAND, BURST = 128 << 10, 1 << 20
BULK_IN, BULK_OUT = 0x81, 0x02
READ_10, WRITE_10, SYNCHRONIZE_CACHE = 0x28, 0x2A, 0x35


class LoadedGuest(MemoryGuest):
    """A guest behind a channel. The engine of its base class is not used."""

    def __init__(self, channel: Channel, pause: float, works: bool) -> None:
        super().__init__(timeout=60)
        self._channel = channel
        self._pause = pause
        self._works = works
        self._work: asyncio.Task[None] | None = None

    def _flush(self) -> None:
        data = b"".join(self._connection.data_to_send())
        if data:
            self._channel.send(message(DATA, data))

    def _packet_received(self, packet: packets.Packet) -> None:
        super()._packet_received(packet)
        self.received.clear()  # it would hold all data
        if isinstance(packet, packets.DeviceConnect):
            self._work = asyncio.ensure_future(self._use_the_disk())
        elif isinstance(packet, packets.DeviceDisconnect):
            self.stop()

    def stop(self) -> None:
        if self._work is not None:
            self._work.cancel()

    async def serve(self) -> None:
        self.resume()
        try:
            while True:
                kind, body = await self._channel.receive()
                if kind == DATA:
                    self.data_received(memoryview(body))
        finally:
            self.stop()

    async def _use_the_disk(self) -> None:
        with contextlib.suppress(TransferFailed):  # the disk leaves within a transfer
            if not self._works:
                return
            await self.enumerate()
            data = bytes(COMMAND)
            for offset in self._offsets():
                for begin in range(offset, offset + BURST, COMMAND):
                    await self._command(READ_10, begin, COMMAND)
                for begin in range(offset, offset + BURST, COMMAND):
                    await self._command(WRITE_10, begin, COMMAND, data)
                await self._command(SYNCHRONIZE_CACHE, 0, 0)
                await asyncio.sleep(self._pause)

    @staticmethod
    def _offsets() -> Iterator[int]:
        while True:
            yield from range(0, 16 * BURST, BURST)

    async def _command(self, opcode: int, offset: int, size: int, data: bytes = b"") -> None:
        """Execute a command over Bulk-Only Transport."""
        block = struct.pack(">BBIBHB", opcode, 0, offset // 512, 0, size // 512, 0)
        flags = 0 if data or not size else 0x80
        await self.bulk_out(BULK_OUT, struct.pack("<4sIIBBB16s", b"USBC", 1, size, flags, 0, 10, block))
        if data:
            assert await self.bulk_out(BULK_OUT, data) == size
        elif size:
            assert len(await self.bulk_in(BULK_IN, size)) == size
        assert (await self.bulk_in(BULK_IN, 13))[12] == 0


@contextlib.asynccontextmanager
async def serving(pause: float = 60.0, *, ports: int = 1, password: str = "", works: bool = True) -> AsyncIterator[int]:
    """Serve VMs at all addresses of 127.0.0.0/8; each session is one VM. Yield the port.

    Args:
        pause: seconds between two bursts of a guest.
        ports: usbredir channels of a VM.
        password: the ticket.
        works: the guests read and write; otherwise they send their hello only.
    """

    async def usbredir(channel: Channel) -> None:
        fake.linked.clear()  # it would hold all channels
        await LoadedGuest(channel, pause, works).serve()

    channels = tuple((9, number) for number in range(ports))
    fake = FakeSpice(vmc_caps=0, usbredir=usbredir, channels=channels, password=password)
    async with running(fake, host="0.0.0.0", backlog=4096) as port:
        yield port


async def serve(pause: float, ports: int) -> None:
    """Serve until standard input ends."""
    async with serving(pause, ports=ports) as port:
        print(port, flush=True)  # noqa: T201
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def target(number: int, port: int) -> str:
    """Return the target of a VM."""
    return f"spice://127.1.{number // 250}.{number % 250 + 1}:{port}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two bursts of a guest")
    parser.add_argument("--ports", type=int, default=1, help="usbredir channels of each VM")
    options = parser.parse_args()
    asyncio.run(serve(options.pause, options.ports))


if __name__ == "__main__":
    main()
