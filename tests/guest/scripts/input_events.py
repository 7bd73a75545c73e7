"""Runs in the guest: reads the events of an input device (Linux, include/uapi/linux/input.h).

``input_events.py PATTERN CODE`` reads the device whose path in /sys has the pattern, and writes a JSON list of (type,
code, value) when the key with the code was released. It writes ``ready`` when the device is open.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path

EVENT = struct.Struct("<qqHHi")
EV_SYN, EV_KEY, EV_MSC, EV_LED, EV_REP = 0, 1, 4, 0x11, 0x14


def find(pattern: str) -> Path:
    """Return the device file, once it exists."""
    while True:
        for event in Path("/sys/class/input").glob("event*"):
            node = Path("/dev/input") / event.name
            if pattern in str(event.resolve()) and node.exists():
                return node
        time.sleep(0.05)


def write(line: str) -> None:
    """Write a line."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(pattern: str, code: int) -> None:
    """Write the events of a device until a key is released."""
    # Before other programs: the kernel keeps a few dozen events only for a reader that does not get the processor.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    seen = []
    with find(pattern).open("rb", buffering=0) as device:
        write("ready")
        while True:
            data = device.read(64 * EVENT.size)
            for _, _, kind, number, value in EVENT.iter_unpack(data):
                if kind not in (EV_SYN, EV_MSC, EV_LED, EV_REP):
                    seen.append((kind, number, value))
                elif kind == EV_SYN and number == 3:
                    raise OSError("the kernel dropped events")
                if (kind, number, value) == (EV_KEY, code, 0):
                    write(json.dumps(seen))
                    return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
