"""Runs in the guest: uses a serial line.

``serial_line.py echo TTY SIZE`` sends SIZE bytes back, and writes their SHA-256. ``serial_line.py hold TTY`` keeps the
line open, and writes a line for each change of its signals, and for each break. At SIGUSR1 it sends a break, at SIGUSR2
it switches RTS off.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import struct
import sys
import termios
import time
import tty

TIOCM_CAR, TIOCM_DSR, TIOCM_RTS = 0x040, 0x100, 0x004
TIOCGICOUNT = 0x545D
BREAKS = 9
"""The place of the number of breaks in struct serial_icounter_struct (include/uapi/linux/serial.h)."""


def write(line: str) -> None:
    """Write a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def echo(line: int, size: int) -> None:
    """Send bytes back."""
    write("ready")
    digest = hashlib.sha256()
    while size:
        data = os.read(line, 65536)
        digest.update(data)
        size -= len(data)
        while data:
            data = data[os.write(line, data) :]
    termios.tcdrain(line)
    write(digest.hexdigest())


def hold(line: int) -> None:
    """Write what changes."""
    signal.signal(signal.SIGUSR1, lambda *_: termios.tcsendbreak(line, 0))
    off = struct.pack("i", TIOCM_RTS)
    signal.signal(signal.SIGUSR2, lambda *_: fcntl.ioctl(line, termios.TIOCMBIC, off) and None)
    write("held")
    before, breaks = 0, 0
    while True:
        (state,) = struct.unpack("i", fcntl.ioctl(line, termios.TIOCMGET, bytes(4)))
        state &= TIOCM_CAR | TIOCM_DSR
        if state != before:
            names = [name for name, bit in (("DCD", TIOCM_CAR), ("DSR", TIOCM_DSR)) if state & bit]
            write(" ".join(["state", *names]))
            before = state
        count = struct.unpack("20i", fcntl.ioctl(line, TIOCGICOUNT, bytes(80)))[BREAKS]
        if count != breaks:
            write("break")
            breaks = count
        time.sleep(0.05)


def main() -> None:
    """Open the line, and do what the arguments ask for."""
    line = os.open(sys.argv[2], os.O_RDWR | os.O_NOCTTY)
    tty.setraw(line)
    attributes = termios.tcgetattr(line)
    attributes[2] |= termios.CLOCAL
    termios.tcsetattr(line, termios.TCSANOW, attributes)
    if sys.argv[1] == "echo":
        echo(line, int(sys.argv[3]))
    else:
        hold(line)


if __name__ == "__main__":
    main()
