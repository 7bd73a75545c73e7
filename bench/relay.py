"""Relay TCP connections with a delay, to simulate a line with a long round trip on one machine.

``python bench/relay.py 5930 127.0.0.1:5900 --delay 10`` listens on port 5930 of the loopback address and delays data by
10 ms each way: a round trip of 20 ms. The order is kept, and the bandwidth is not limited.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from types import TracebackType
from typing import Self, cast

LOOPBACK = "127.0.0.1"


class _End(asyncio.Protocol):
    """One end of a relayed connection: received data is sent at the other end, after the delay."""

    def __init__(self, delay: float) -> None:
        self.other: _End | None = None
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received: deque[tuple[float, bytes]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Queue the data for the delay. Empty data is the end of the stream."""
        self._received.append((self._loop.time() + self._delay, data))
        if len(self._received) == 1:
            self._loop.call_later(self._delay, self._forward)

    def connection_lost(self, exc: Exception | None) -> None:
        self.data_received(b"")

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _forward(self) -> None:
        while self._received and self._received[0][0] <= self._loop.time():
            data = self._received.popleft()[1]
            if self.other is None or self.other._transport is None:
                continue
            if data:
                self.other._transport.write(data)
            else:
                self.other.close()
        if self._received:
            self._loop.call_at(self._received[0][0], self._forward)


class Relay:
    """Listens on the loopback address, and relays each connection to one address. Use it with ``async with``.

    Args:
        host: the host to connect to.
        port: the port to connect to.
        delay: the delay in seconds, each way.
        listen: the port to listen on; 0: any free port.

    Attributes:
        listen: the port that the relay listens on.
    """

    def __init__(self, host: str, port: int, delay: float, listen: int = 0) -> None:
        self.listen = listen
        self._to = (host, port)
        self._delay = delay
        self._server: asyncio.Server | None = None
        self._ends: set[_End] = set()
        self._dials: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accepted, LOOPBACK, self.listen)
        self.listen = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for dial in self._dials:
            dial.cancel()
        for end in self._ends:
            end.close()

    async def serve_forever(self) -> None:
        """Relay until cancelled."""
        assert self._server is not None
        await self._server.serve_forever()

    def _accepted(self) -> _End:
        near, far = _End(self._delay), _End(self._delay)
        far.other = near
        self._ends |= {near, far}
        dial = asyncio.get_running_loop().create_task(self._dial(near, far))
        self._dials.add(dial)
        dial.add_done_callback(self._dials.discard)
        return near

    async def _dial(self, near: _End, far: _End) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, *self._to)
        except OSError:
            near.close()
        else:
            near.other = far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("listen", type=int, help="port to listen on")
    parser.add_argument("to", metavar="HOST:PORT")
    parser.add_argument("--delay", type=float, default=10.0, help="milliseconds, each way (default: 10)")
    options = parser.parse_args()
    host, _, port = options.to.rpartition(":")

    async def run() -> None:
        async with Relay(host, int(port), options.delay / 1000, options.listen) as relay:
            print(f"{LOOPBACK}:{relay.listen} -> {options.to}, {options.delay:g} ms each way", flush=True)
            await relay.serve_forever()

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
