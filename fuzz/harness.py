"""The loop of all fuzzers: run random cases for some seconds, and print the seed of a case that fails."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from farplug.usb import Buffer, DeviceEvent, Setup, Status, Transfer, TransferType
from farplug.virtual import VirtualDevice
from farplug.virtual.events import FunctionRaised

CASE_LIMIT = 60
"""Seconds after which a case has failed: a part of farplug waits forever, or loops."""

counts: Counter[str] = Counter()
"""What the cases did, by name; printed at the end."""


class Listener:
    """The listener of a virtual device without receptions."""

    def happened(self, event: DeviceEvent) -> None:
        """Raise the exception of a function: no packet of a guest may cause one. Ignore other events."""
        if isinstance(event, FunctionRaised):
            raise event.error

    def received(self, endpoint: int, status: Status, data: Buffer) -> bool:
        raise AssertionError

    def reception_ended(self, endpoint: int, status: Status) -> None:
        raise AssertionError

    def lost(self, error: Exception | None) -> None:
        raise AssertionError


class Transfers:
    """Submits transfers to a device, each of which must be completed once.

    Args:
        device: the device.
    """

    def __init__(self, device: VirtualDevice) -> None:
        self._device = device
        self._submitted: list[Transfer] = []
        self._completed: list[Transfer] = []

    def submit(
        self,
        type: TransferType,
        endpoint: int,
        *,
        length: int = 0,
        data: bytes = b"",
        setup: Setup | None = None,
        stream_id: int = 0,
    ) -> None:
        transfer = Transfer(
            type, endpoint, self._completed.append, length=length, data=data, setup=setup, stream_id=stream_id
        )
        self._submitted.append(transfer)
        self._device.submit(transfer)

    def cancel_one(self, source: random.Random) -> None:
        """Cancel a transfer, which may have ended."""
        if self._submitted:
            self._device.cancel(source.choice(self._submitted))

    def check(self) -> None:
        """Check that each has been completed once, and count them."""
        assert len(self._completed) == len(self._submitted) == len(set(self._completed))
        assert all(transfer.status is not None for transfer in self._submitted)
        counts["transfers"] += len(self._submitted)


class _RaiseLogged(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None and record.exc_info[1] is not None:
            raise record.exc_info[1]


def raise_logged() -> None:
    """Raise the exceptions that farplug logs: a device catches and logs those of its functions."""
    logging.getLogger("farplug").addHandler(_RaiseLogged(logging.ERROR))


def check(holds: bool, what: str = "") -> None:
    """Raise AssertionError, in an ``except`` clause for example."""
    assert holds, what


def run(name: str, one_case: Callable[[random.Random], None]) -> None:
    """Run cases until the time is over. If a case raises an exception, print how to repeat it, and raise the exception.

    Args:
        name: the name of the fuzzer, that of its file without ``fuzz_``.
        one_case: runs one case with its own random source; an exception that it raises is a bug.
    """
    parser = argparse.ArgumentParser(description=f"Fuzz {name}.")
    parser.add_argument("--seconds", type=float, default=20, help="how long to run")
    parser.add_argument("--seed", type=int, default=None, help="seed of the first case; each further case adds 1")
    parser.add_argument("--cases", type=int, default=None, help="stop after this number of cases")
    arguments = parser.parse_args()
    first = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    seed = first
    logging.getLogger("farplug").addHandler(logging.NullHandler())
    logging.getLogger("farplug").propagate = False
    signal.signal(signal.SIGALRM, _too_long)
    start = time.monotonic()
    try:
        while time.monotonic() - start < arguments.seconds and (not arguments.cases or seed - first < arguments.cases):
            signal.alarm(CASE_LIMIT)
            one_case(random.Random(seed))
            seed += 1
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            command = f"PYTHONPATH=. {Path(sys.executable).name} {sys.argv[0]} --cases 1 --seed {seed}"
            print(f"{name}: failed; repeat with: {command}", file=sys.stderr)  # noqa: T201
        raise
    finally:
        signal.alarm(0)
    elapsed = time.monotonic() - start
    cases = seed - first
    print(f"{name}: {cases} cases from seed {first} in {elapsed:.1f} s, {cases / elapsed:.0f} a second, no failure")  # noqa: T201
    if counts:
        print(f"    {', '.join(f'{number} {what}' for what, number in sorted(counts.items()))}")  # noqa: T201


def _too_long(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(RuntimeError):  # no event loop runs
        for task in asyncio.all_tasks():
            _print_waiting(task)
    raise TimeoutError(f"the case takes more than {CASE_LIMIT} s")


def _print_waiting(task: asyncio.Task[Any]) -> None:
    """Print where each coroutine of a task waits: the stack that asyncio prints has only the outermost one."""
    print(f"{task.get_name()} waits:", file=sys.stderr)  # noqa: T201
    coroutine: Any = task.get_coro()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        print(f"    {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}", file=sys.stderr)  # noqa: T201
        coroutine = coroutine.cr_await
