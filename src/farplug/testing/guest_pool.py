"""Booted guests that tests share, by configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import Boot, GuestConfig

MAX_GUESTS: Final = 3
"""Guests that a pool keeps running; the least recently used one that no test has is closed."""
BOOT_TIMEOUT: Final = 120.0
"""Seconds for a guest to boot: an emulated one on a busy machine needs more than the usual 4."""


@dataclass(eq=False)
class _Kept:
    """A guest, and who has it.

    Attributes:
        users: calls of :meth:`GuestPool.get` that returned the guest, and that :meth:`GuestPool.release` did not end.
        is_spent: the guest is returned no more, and closed after its last release.
    """

    guest: QemuGuest
    users: int = 0
    is_spent: bool = False


class GuestPool:
    """Booted guests by configuration. All calls come from one event loop.

    Args:
        make: makes a guest that is not started.
    """

    def __init__(self, make: Callable[[GuestConfig], QemuGuest] = QemuGuest) -> None:
        self._make = make
        self._kept: list[_Kept] = []  # the one that was returned last is the last one
        self._booting = asyncio.Lock()

    async def get(self, config: GuestConfig, *, fresh: bool = False) -> QemuGuest:
        """Return a running guest with this configuration, or start one; wait until it has booted.

        The caller has the guest until :meth:`release`. A guest that boots firmware, or that is paused, is always a new
        one, and is returned when it was started.

        Args:
            config: the configuration.
            fresh: start a new guest, which no other call returns.

        Raises:
            SetupError: a program, a package or a file is missing on this machine.
            GuestCrashed: QEMU does not accept the configuration, or ended while the guest booted.
            GuestTimeout: the guest did not boot in time.
        """
        if fresh or not is_shared(config):
            kept = _Kept(await self._start(config), is_spent=True)
        else:
            async with self._booting:
                kept = await self._shared(config)
        kept.users += 1
        self._kept.append(kept)
        return kept.guest

    async def _shared(self, config: GuestConfig) -> _Kept:
        """Take the guest with this configuration out of the list, or start it."""
        for kept in [one for one in self._kept if one.guest.config == config and not one.is_spent]:
            if kept.guest.alive:
                self._kept.remove(kept)
                return kept
            kept.is_spent = True
            await self._close_spent(kept)
        shared = [one for one in self._kept if not one.is_spent]
        idle = [one for one in shared if not one.users]
        for kept in idle[: max(0, len(shared) + 1 - MAX_GUESTS)]:
            kept.is_spent = True
            await self._close_spent(kept)
        return _Kept(await self._start(config))

    async def release(self, guest: QemuGuest, *, broken: bool = False) -> None:
        """Release a guest that :meth:`get` has returned. The guest is closed if no other call is to return it.

        Args:
            guest: the guest.
            broken: no later call of :meth:`get` may return this guest.
        """
        (kept,) = (one for one in self._kept if one.guest is guest)
        kept.users -= 1
        kept.is_spent |= broken or not guest.alive
        await self._close_spent(kept)

    async def close(self) -> None:
        """Close all guests."""
        while self._kept:
            await self._kept.pop().guest.close()

    async def _close_spent(self, kept: _Kept) -> None:
        if kept.is_spent and not kept.users:
            self._kept.remove(kept)
            await kept.guest.close()

    async def _start(self, config: GuestConfig) -> QemuGuest:
        guest = await self._make(config).__aenter__()
        try:
            if is_shared(config):
                await guest.booted(max(BOOT_TIMEOUT, guest.timeout))
        except BaseException:
            await guest.close()
            raise
        return guest


def is_shared(config: GuestConfig) -> bool:
    """Return whether guests with this configuration run commands when they have booted, and so can be shared."""
    return config.boot is Boot.KERNEL and not config.paused
