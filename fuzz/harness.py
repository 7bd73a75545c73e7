"""The loop of all fuzzers: run random cases for some seconds, and print the seed of a case that fails."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable

from farplug.usb import Buffer, DeviceEvent, Status
from farplug.virtual.events import FunctionRaised


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


def run(name: str, one_case: Callable[[random.Random], None]) -> None:
    """Run cases until the time is over. If a case raises an exception, print how to repeat it, and raise the exception.

    Args:
        name: the name of the fuzzer, for messages.
        one_case: runs one case with its own random source; an exception that it raises is a bug.
    """
    parser = argparse.ArgumentParser(description=f"Fuzz {name}.")
    parser.add_argument("--seconds", type=float, default=20, help="how long to run")
    parser.add_argument("--seed", type=int, default=None, help="seed of the first case; each further case adds 1")
    parser.add_argument("--cases", type=int, default=None, help="stop after this number of cases")
    arguments = parser.parse_args()
    first = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    seed = first
    start = time.monotonic()
    try:
        while time.monotonic() - start < arguments.seconds and (not arguments.cases or seed - first < arguments.cases):
            one_case(random.Random(seed))
            seed += 1
    except Exception:
        print(f"{name}: failed; repeat with --cases 1 --seed {seed}", file=sys.stderr)  # noqa: T201
        raise
    elapsed = time.monotonic() - start
    cases = seed - first
    print(f"{name}: {cases} cases from seed {first} in {elapsed:.1f} s, {cases / elapsed:.0f} a second, no failure")  # noqa: T201
