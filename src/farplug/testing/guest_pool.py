"""Booted guests that tests share, by configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from farplug.vm.qemu import QemuGuest
from farplug.vm.qemu_config import Boot, GuestConfig

MAX_GUESTS: Final = 3
"""Guests that a pool keeps running; the least recently used one is closed."""
BOOT_TIMEOUT: Final = 120.0
"""Seconds for a guest to boot: an emulated one on a busy machine needs more than the usual 4."""


class GuestPool:
    """Booted guests by configuration. All calls come from one event loop.

    Args:
        make: makes a guest that is not started.
    """

    def __init__(self, make: Callable[[GuestConfig], QemuGuest] = QemuGuest) -> None:
        self._make = make
        self._guests: dict[GuestConfig, QemuGuest] = {}

    async def get(self, config: GuestConfig, *, fresh: bool = False) -> QemuGuest:
        """Return a running guest with this configuration, or start one; wait until it has booted.

        A guest that boots firmware, or that is paused, is always a new one, and is returned when it was started.

        Args:
            config: the configuration.
            fresh: start a new guest, which no other call returns. The caller closes it with :meth:`discard`.

        Raises:
            SetupError: a program, a package or a file is missing on this machine.
            GuestCrashed: QEMU does not accept the configuration, or ended while the guest booted.
            GuestTimeout: the guest did not boot in time.
        """
        if fresh or not is_shared(config):
            return await self._start(config)
        guest = self._guests.pop(config, None)
        if guest is not None and not guest.alive:
            await guest.close()
            guest = None
        if guest is None:
            while len(self._guests) >= MAX_GUESTS:
                await self._guests.pop(next(iter(self._guests))).close()
            guest = await self._start(config)
        self._guests[config] = guest  # the last one: it was used most recently
        return guest

    def keeps(self, guest: QemuGuest) -> bool:
        """Return whether the guest is one that later calls of :meth:`get` return."""
        return guest in self._guests.values()

    async def discard(self, guest: QemuGuest) -> None:
        """Close a guest, which no later call returns."""
        self._guests = {config: one for config, one in self._guests.items() if one is not guest}
        await guest.close()

    async def close(self) -> None:
        """Close all guests that are kept."""
        while self._guests:
            await self._guests.popitem()[1].close()

    async def _start(self, config: GuestConfig) -> QemuGuest:
        guest = await self._make(config).__aenter__()
        try:
            if is_shared(config):
                await guest.booted(BOOT_TIMEOUT)
        except BaseException:
            await guest.close()
            raise
        return guest


def is_shared(config: GuestConfig) -> bool:
    """Return whether guests with this configuration run commands when they have booted, and so can be shared."""
    return config.boot is Boot.KERNEL and not config.paused
