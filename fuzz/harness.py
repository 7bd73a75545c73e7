"""The loop that all fuzzers share: random cases for some seconds, and the seed of the one that failed."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable

from farplug.usb import Buffer, DeviceEvent, Status
from farplug.virtual.events import FunctionRaised


class Listener:
    """Of a virtual device that receives nothing by itself."""

    def happened(self, event: DeviceEvent) -> None:
        """Ignored, but for functions that raise: what a guest sends must not make them."""
        if isinstance(event, FunctionRaised):
            raise event.error

    def received(self, endpoint: int, status: Status, data: Buffer) -> None:
        raise AssertionError

    def reception_ended(self, endpoint: int, status: Status) -> None:
        raise AssertionError

    def lost(self, error: Exception | None) -> None:
        raise AssertionError


def run(name: str, one_case: Callable[[random.Random], None]) -> None:
    """Run cases until the time is over. Exits with 1, after printing how to repeat it, if a case raises anything.

    Args:
        name: of the fuzzer, for people.
        one_case: does one case with its own source of randomness; what it does not catch is a bug.
    """
    parser = argparse.ArgumentParser(description=f"Fuzz {name}.")
    parser.add_argument("--seconds", type=float, default=20, help="how long to run")
    parser.add_argument("--seed", type=int, default=None, help="of the first case; the next ones count up from it")
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
