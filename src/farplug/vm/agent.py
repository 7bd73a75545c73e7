"""Run commands in the throw-away guest: the shell loop there, and its client here.

A channel is a virtio-serial port. Each channel has its own loop in the guest, so commands on different channels run in
parallel, and one that hangs does not block the others. A request is a line ``id lines input-size``, followed by the
lines of the script and its input; the reply is a line ``id exit-code size``, followed by the output of the command.

The loop starts few programs: an emulated guest needs 5 ms of processor time for each.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from dataclasses import dataclass

from farplug.errors import DeviceError, GuestGoneError, Reason, RemoteProtocolError, TargetError

CHANNELS = 8
"""Commands that can run in a guest at the same time."""

MAX_OUTPUT = 256 << 20
"""Maximum output of one command, in bytes: the guest keeps the output in memory until the command ends."""

_AGENT = """\
#!/bin/sh
# agent PORT: run the commands that arrive on a virtio-serial port, one after the other.
exec 3<>"$1"
work=/run/${1##*/}
mkdir -p "$work"
cd "$work"
number=0
enter=
[ ! -d /machine ] || enter="chroot /machine"
while :; do
    while read -r id lines input_size <&3; do
        while [ "$lines" -gt 0 ] && IFS= read -r line <&3; do
            printf '%s\\n' "$line"
            lines=$((lines - 1))
        done >script
        if [ "$input_size" -eq 0 ]; then
            : >input
        else
            head -c "$input_size" <&3 >input
        fi
        # A process that an earlier command left running may still write to that command's file.
        number=$((number + 1))
        output=output$number
        (cd / && exec setsid $enter /bin/sh "$work/script") <input >$output 2>&1 3>&-
        code=$?
        if [ -s $output ]; then
            size=$(stat -c %s $output)
            echo "$id $code $size" >&3
            head -c "$size" $output >&3
            : >$output
        else
            echo "$id $code 0" >&3
        fi
        [ $((number % 100)) -ne 0 ] || rm -f output*
    done
    # The host has not opened the port yet.
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
# The agents keep commands and their output here: a full root file system does them no harm.
mount -t tmpfs tmpfs /run
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
# An overlay: the host's files as the read-only lower layer, a tmpfs for what commands write. /proc, /sys, /dev, /run
# (where the agent keeps the commands) and the kernel modules are the guest's own.
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
"""Files of the guest, by path: they mount filesystems, load modules and start the agents."""

MACHINE_FILES = {"/etc/mount-machine": _MOUNT_MACHINE.encode()}
"""An additional file: commands run on the filesystem that QEMU shares under the mount tag ``machine``."""


class CommandFailed(DeviceError):
    """A command in the guest failed: its exit code is not 0."""

    def __init__(self, command: str, result: CommandResult) -> None:
        super().__init__(
            f"the guest's command {command!r} failed with exit code {result.exit_code}: "
            f"{result.output.strip()[-2000:]}",
            reason=Reason.DEVICE_FAULT,
        )
        self.result = result


class GuestTimeout(TargetError):
    """The guest did not boot, end a command or print a text in time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Reason.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of a command.

    Attributes:
        exit_code: of the shell; 0: success, 128 + n: killed by signal n.
        data: standard output and standard error, interleaved as they were written.
    """

    exit_code: int
    data: bytes

    @property
    def output(self) -> str:
        """Return the data as text."""
        return self.data.decode(errors="replace")


class Agent:
    """Runs shell commands in the guest, over its channels."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._channels: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._idle: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self._exchanges: set[asyncio.Task[CommandResult]] = set()

    async def connect(self, sockets: list[socket.socket]) -> None:
        """Use these connected sockets, the host's ends of the channels."""
        for sock in sockets:
            channel = await asyncio.open_connection(sock=sock)
            self._channels.append(channel)
            self._idle.put_nowait(channel)

    async def run(self, command: str, *, stdin: bytes = b"", timeout: float = 30) -> CommandResult:
        """Run a script with the guest's ``sh``, in ``/``.

        After a timeout, or when the caller is cancelled, the command keeps running in the guest and keeps its channel
        until it ends; the other channels are not affected.

        Raises:
            GuestTimeout: the command did not end within ``timeout`` seconds, including the wait for an idle channel.
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
        """Close all channels; running commands fail."""
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
            # Not writelines: since Python 3.12 an empty last part (no stdin) keeps the transport busy forever.
            lines = script.count(b"\n") + 1
            writer.write(f"{number} {lines} {len(stdin)}\n".encode() + script + b"\n" + stdin)
            await writer.drain()
            header = await reader.readuntil(b"\n")
            exit_code, size = parse_reply(header, number)
            return CommandResult(exit_code, await reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise GuestGoneError("the guest ended during a command") from error
        except asyncio.LimitOverrunError as error:
            raise RemoteProtocolError(f"the reply of the guest's agent is not a line: {error}") from error

    def _finished(
        self, channel: tuple[asyncio.StreamReader, asyncio.StreamWriter], exchange: asyncio.Task[CommandResult]
    ) -> None:
        self._exchanges.discard(exchange)
        # After a protocol error a channel is not used again. On a closed channel the next command fails at once.
        if not exchange.cancelled() and not isinstance(exchange.exception(), RemoteProtocolError):
            self._idle.put_nowait(channel)


def parse_reply(line: bytes, number: int) -> tuple[int, int]:
    """Return the exit code and the size of the output, in bytes, from the first line of a reply.

    Raises:
        RemoteProtocolError: the line is not the reply to request ``number``, or the size exceeds :data:`MAX_OUTPUT`.
    """
    try:
        reply_to, exit_code, size = map(int, line.split())
    except ValueError:
        raise RemoteProtocolError(f"invalid reply of the guest's agent: {line[:80]!r}") from None
    if reply_to != number:
        raise RemoteProtocolError(f"the guest's agent replied to request {reply_to}, not {number}")
    if not 0 <= size <= MAX_OUTPUT:
        raise RemoteProtocolError(f"a command's output of {size} bytes exceeds the limit of {MAX_OUTPUT}")
    return exit_code, size
