"""Save a guest that has booted, and start other guests from its memory.

Under emulation a boot takes 3 s of processor time, a start from a snapshot 0.3 s. A snapshot is four files: the memory
of the guest, QEMU's migration stream without that memory (QEMU, qapi/migration.json, capability ``x-ignore-shared``),
the console, and the initramfs. Guests map the memory privately: a page is copied when a guest writes to it.

A snapshot has no port: QEMU accepts a stream that lacks devices of the guest, and these begin as after a reset. That is
right for a port, which nothing is plugged into yet.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from farplug.shell import shell_word
from farplug.vm.qemu_config import Boot, GuestConfig, UnixPort
from farplug.vm.qmp import Qmp, QmpError

if sys.platform != "win32":
    import fcntl

_CAPABILITIES = {"capabilities": [{"capability": name, "state": True} for name in ("events", "x-ignore-shared")]}
_TIMEOUT = 120.0
"""Seconds for QEMU to save or load the state of the devices."""


def can_be_restored(config: GuestConfig) -> bool:
    """Return whether a guest with this configuration can start from a snapshot.

    Not one that is paused before its first instruction, or that the caller migrates; one with disks, because the
    snapshot has none; one on this machine's filesystem, which QEMU does not migrate; or one with KVM, which boots fast.
    """
    return (
        config.boot is Boot.KERNEL
        and config.accelerator.startswith("tcg")
        and not (config.paused or config.disks or config.machine or "-incoming" in config.extra_arguments)
    )


def saved_config(config: GuestConfig) -> GuestConfig:
    """Return the configuration of the guest to save: the same for guests that differ in their ports only.

    USB devices in ``extra_arguments`` get the numbers after the ports: then the snapshot needs as many ports.
    """
    has_devices = any("usb" in argument for argument in config.extra_arguments)
    return replace(config, ports=(UnixPort(),) * len(config.ports) if has_devices else (), spice=None)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The snapshot of a guest: files that exist after :meth:`save`.

    Attributes:
        memory: the file of the guest's memory.
        state: the state of its devices.
        console: the output of its first serial port until it was saved.
        initramfs: with it a guest boots again after a reset.
    """

    memory: Path
    state: Path
    console: Path
    initramfs: Path

    @classmethod
    def of(cls, config: GuestConfig, folder: Path) -> Self:
        """Return the snapshot of this configuration in a folder."""
        stats = [source.stat() for _, source in config.files if source.exists()]
        files = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        name = hashlib.sha256(repr((config, files)).encode()).hexdigest()[:16]
        return cls(*(folder / f"{name}.{kind}" for kind in ("memory", "state", "console", "initramfs")))

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Keep other tasks and processes from saving this snapshot."""
        with self.memory.with_suffix(".lock").open("a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0.05)
            yield

    def exists(self) -> bool:
        """Return whether the snapshot was saved."""
        return self.console.exists()

    async def save(self, qmp: Qmp, console: str) -> None:
        """Save a guest whose memory is :attr:`memory`; the guest is not used afterwards.

        Raises:
            QmpError: QEMU cannot migrate this guest.
            GuestGoneError: QEMU ended.
        """
        await qmp.execute("migrate-set-capabilities", _CAPABILITIES)
        await qmp.execute("migrate", {"uri": f"exec:cat >{shell_word(self.state)}"})
        while (status := (await qmp.event("MIGRATION", _TIMEOUT))["data"]["status"]) != "completed":
            if status == "failed":
                raise QmpError("migrate", "GenericError", "the migration failed")
        self.console.write_text(console)

    async def restore(self, qmp: Qmp) -> None:
        """Load the snapshot into a guest that waits for it; return when the guest runs.

        Raises:
            QmpError: QEMU refused a command.
            GuestGoneError: QEMU ended: the snapshot is of another configuration.
        """
        await qmp.execute("migrate-set-capabilities", _CAPABILITIES)
        await qmp.execute("migrate-incoming", {"uri": f"exec:cat {shell_word(self.state)}"})
        await qmp.event("RESUME", _TIMEOUT)
