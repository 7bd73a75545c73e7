"""The targets of a load test: which session uses which. A SPICE server serves one client at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from farplug.errors import Reason, UsageError, from_oserror
from farplug.text import shown

MAX_LIST = 16 << 20
"""Bytes of a list of targets."""
MAX_VV = 64 << 10
"""Bytes of a ``.vv`` file."""


def read_targets(path: Path) -> list[str]:
    """Return the targets of a list: one a line; empty lines, and those that begin with ``#``, do not count.

    Raises:
        UsageError: the list cannot be read, is too large or empty, or has a target twice.
    """
    text = _read(path, MAX_LIST, "list of targets")
    lines = [line for line in map(str.strip, text.split("\n")) if line and not line.startswith("#")]
    if not lines:
        raise UsageError(
            f"{shown(str(path))}: the list of targets is empty",
            reason=Reason.EMPTY,
            remedy="write one target a line: spice://HOST:PORT, or the path of a .vv file",
        )
    if len(set(lines)) < len(lines):
        seen: set[str] = set()
        twice = next(line for line in lines if line in seen or seen.add(line))  # type: ignore[func-returns-value]
        raise UsageError(
            f"{shown(str(path))}: {shown(twice)} is listed twice: a SPICE server serves one client at a time",
            reason=Reason.BAD_TARGET,
            remedy="list each VM once",
        )
    return lines


def read_vv(path: Path) -> str:
    """Return the contents of a ``.vv`` file, which is not deleted.

    Raises:
        UsageError: it cannot be read, or is too large.
    """
    return _read(path, MAX_VV, ".vv file")


def _read(path: Path, limit: int, what: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise from_oserror(path, error, as_=UsageError, problem="cannot be read") from error
    if len(data) > limit:
        raise UsageError(f"{shown(str(path))}: the {what} is longer than {limit} bytes", reason=Reason.TOO_LARGE)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{shown(str(path))}: the {what} is not UTF-8", reason=Reason.WRONG_FORMAT) from None


@dataclass(frozen=True, slots=True)
class Lease:
    """The use of a target by one session.

    Attributes:
        number: unique in the pool.
        target: as it is listed.
        holder: the Locust worker of the session.
    """

    number: int
    target: str
    holder: str


class Pool:
    """The targets of a load test, in the process of the Locust master.

    Args:
        targets: all of them.
        limit: sessions in all; None: no limit.
    """

    def __init__(self, targets: Iterable[str], limit: int | None = None) -> None:
        self._targets = tuple(targets)
        self._limit = limit
        self.reset()

    def reset(self) -> None:
        """Begin a test: all targets are free, no session was begun."""
        self._free = deque(self._targets)
        self._leases: dict[int, Lease] = {}
        self._begun = 0

    @property
    def used_up(self) -> bool:
        """Return whether no session may begin: the limit is reached."""
        return self._limit is not None and self._begun >= self._limit

    @property
    def over(self) -> bool:
        """Return whether the limit is reached, and all sessions have ended."""
        return self.used_up and not self._leases

    @property
    def holders(self) -> set[str]:
        """Return the workers that use targets."""
        return {lease.holder for lease in self._leases.values()}

    def acquire(self, holder: str) -> Lease:
        """Return the target that was free for the longest time.

        Raises:
            UsageError: no target is free (``busy``).
        """
        if not self._free:
            raise UsageError(
                f"no target is free: all {len(self._targets)} are in use",
                reason=Reason.BUSY,
                remedy="list at least as many targets as there are users",
            )
        self._begun += 1
        lease = Lease(self._begun, self._free.popleft(), holder)
        self._leases[lease.number] = lease
        return lease

    def release(self, number: int) -> None:
        """Release a target. A lease that is not known, as of a test before, does not count."""
        if (lease := self._leases.pop(number, None)) is not None:
            self._free.append(lease.target)

    def drop(self, holder: str) -> None:
        """Release all targets of a worker that has died."""
        for lease in [lease for lease in self._leases.values() if lease.holder == holder]:
            self.release(lease.number)
