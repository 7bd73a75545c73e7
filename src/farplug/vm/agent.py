"""Commands in the throw-away guest: the shell loop that runs there, and its peer here.

A channel is a virtio-serial port; each has its own loop in the guest, so that as many commands as there are channels
run side by side and one that hangs holds up no other. A request is a line ``id script-size input-size`` and the bytes
of both; the answer is a line ``id exit-code size`` and the bytes of what the command wrote.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from dataclasses import dataclass

from farplug.errors import DeviceError, GuestGoneError, Reason, RemoteProtocolError, TargetError

CHANNELS = 8
"""Commands that can run in a guest at once."""

MAX_OUTPUT = 256 << 20
"""Most bytes of output of one command: the guest keeps it in its memory until the command ends."""

_AGENT = """\
#!/bin/sh
# agent PORT: runs the commands that come in through a virtio-serial port, one after the other.
exec 3<>"$1"
work=/run/${1##*/}
mkdir -p "$work"
cd "$work"
enter=
[ ! -d /machine ] || enter="chroot /machine"
while :; do
    while read -r id script_size input_size <&3; do
        # What an earlier command left running may still write into the old file.
        rm -f output
        if [ "$input_size" -eq 0 ]; then
            head -c "$script_size" <&3 >script
            : >input
        else
            head -c $((script_size + input_size)) <&3 >request
            head -c "$script_size" request >script
            tail -c +$((script_size + 1)) request >input
        fi
        (cd / && exec setsid $enter /bin/sh "$work/script") <input >output 2>&1 3>&-
        code=$?
        size=$(stat -c %s output)
        echo "$id $code $size" >&3
        head -c "$size" output >&3
    done
    # No peer yet.
    sleep 0.1
done
"""

_START = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
modprobe -a $(cat /etc/modules)
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    ip address add 10.0.2.15/24 dev eth0
    ip link set eth0 up
fi
if [ -e /etc/mount-machine ]; then
    . /etc/mount-machine
fi
"""

_MOUNT_MACHINE = """\
# This machine's files below, read-only; what commands write above, in memory. The guest's own /proc, /sys, /dev and
# kernel modules in their places; /run too, where the agent keeps the commands.
mkdir /shared /written /machine
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=524288,cache=loose machine /shared
mount -t tmpfs tmpfs /written
mkdir /written/upper /written/work
mount -t overlay -o lowerdir=/shared,upperdir=/written/upper,workdir=/written/work overlay /machine
for folder in /proc /sys /dev /run; do
    mount --rbind $folder /machine$folder
done
mkdir -p /machine/usr/lib/modules
mount --bind /lib/modules /machine/usr/lib/modules
"""

_INITTAB = "::sysinit:/etc/start\n" + "".join(
    f"::respawn:/etc/agent /dev/vport0p{number}\n" for number in range(1, CHANNELS + 1)
)

INIT_FILES = {
    "/etc/agent": _AGENT.encode(),
    "/etc/start": _START.encode(),
    "/etc/inittab": _INITTAB.encode(),
}
"""Files of the guest that make it mount, load its modules and run agents."""

MACHINE_FILES = {"/etc/mount-machine": _MOUNT_MACHINE.encode()}
"""A file more, which makes commands run on the file system that QEMU shares under the tag ``machine``."""


class CommandFailed(DeviceError):
    """A command in the guest ended with an exit code other than 0."""

    def __init__(self, command: str, result: CommandResult) -> None:
        super().__init__(
            f"exit code {result.exit_code} of the guest's command {command!r}: {result.output.strip()[-2000:]}",
            reason=Reason.DEVICE_FAULT,
        )
        self.result = result


class GuestTimeout(TargetError):
    """The guest did not do something within its time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Reason.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class CommandResult:
    """How a command ended.

    Attributes:
        exit_code: of the shell: 0 is success, 128 + n death by signal n.
        data: what it wrote to standard output and standard error, in order.
    """

    exit_code: int
    data: bytes

    @property
    def output(self) -> str:
        """The data as text."""
        return self.data.decode(errors="replace")


class Agent:
    """Runs shell commands in the guest, over the host's ends of its channels."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._channels: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._idle: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._exchanges: set[asyncio.Task[CommandResult]] = set()

    async def connect(self, sockets: list[socket.socket]) -> None:
        """Take the host's ends, connected sockets."""
        for sock in sockets:
            channel = await asyncio.open_connection(sock=sock)
            self._channels.append(channel)
            self._idle.put_nowait(channel)

    async def run(self, command: str, *, stdin: bytes = b"", timeout: float = 30) -> CommandResult:
        """Run a script with the guest's ``sh``, in ``/``.

        A command whose time is over, or whose caller is cancelled, goes on in the guest and keeps its channel until it
        ends; the other channels are not affected.

        Raises:
            GuestTimeout: it did not end within ``timeout`` seconds, the wait for an idle channel included.
            GuestGoneError: the guest ended.
        """
        try:
            async with asyncio.timeout(timeout):
                channel = await self._idle.get()
                exchange = asyncio.create_task(self._exchange(channel, command.encode(), stdin))
                self._exchanges.add(exchange)
                exchange.add_done_callback(lambda task: self._finished(channel, task))
                return await asyncio.shield(exchange)
        except TimeoutError:
            busy = len(self._exchanges)
            raise GuestTimeout(
                f"the guest's command {command!r} did not end within {timeout:g} s ({busy} of {CHANNELS} channels busy)"
            ) from None

    async def close(self) -> None:
        """Close all channels; commands under way fail."""
        for exchange in self._exchanges:
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        for _, writer in self._channels:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in self._channels), return_exceptions=True)

    async def _exchange(
        self, channel: tuple[asyncio.StreamReader, asyncio.StreamWriter], script: bytes, stdin: bytes
    ) -> CommandResult:
        reader, writer = channel
        number = next(self._ids)
        try:
            # Not writelines: since Python 3.12 an empty last part (no stdin) keeps the transport busy for ever.
            writer.write(f"{number} {len(script)} {len(stdin)}\n".encode() + script + stdin)
            await writer.drain()
            header = await reader.readuntil(b"\n")
            exit_code, size = parse_answer(header, number)
            return CommandResult(exit_code, await reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise GuestGoneError("the guest ended during a command") from error
        except asyncio.LimitOverrunError as error:
            raise RemoteProtocolError(f"the guest's agent sent no line: {error}") from error

    def _finished(
        self, channel: tuple[asyncio.StreamReader, asyncio.StreamWriter], exchange: asyncio.Task[CommandResult]
    ) -> None:
        self._exchanges.discard(exchange)
        # A channel out of step stays out of use; a closed one fails the next command at once.
        if not exchange.cancelled() and not isinstance(exchange.exception(), RemoteProtocolError):
            self._idle.put_nowait(channel)


def parse_answer(line: bytes, number: int) -> tuple[int, int]:
    """Exit code and size of the output in an answer's first line.

    Raises:
        RemoteProtocolError: it is not the answer to request ``number``, or announces too much.
    """
    try:
        answered, exit_code, size = map(int, line.split())
    except ValueError:
        raise RemoteProtocolError(f"the guest's agent sent no answer: {line[:80]!r}") from None
    if answered != number:
        raise RemoteProtocolError(f"the guest's agent answered request {answered}, not {number}")
    if not 0 <= size <= MAX_OUTPUT:
        raise RemoteProtocolError(f"a command's output of {size} bytes is over the bound of {MAX_OUTPUT}")
    return exit_code, size
