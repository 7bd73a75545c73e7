"""An ordinary user gets permission from the real udev, by the rule that farplug prints and installs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest_asyncio
from tests.guest.nested import FAR, FARPLUG, Machine, Plugger, RealDevice, from_inside, running
from tests.guest.plugging import usb_folder_by_name, usb_node

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

KEYBOARD = "0627:0001 *Keyboard"
USER = "tester"
RULES = "/etc/udev/rules.d/70-farplug.rules"
NOT_A_CHROOT = "SYSTEMD_IGNORE_CHROOT=1"
"""Commands run in a chroot of the near guest, where udevadm would say that it does nothing."""
AS_USER = (
    f"setpriv --reuid={USER} --regid={USER} --init-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
)
"""A log-in: with the groups that the user has by now. The capability lets the user read this checkout, wherever it is:
not write, as opening a device does."""


@dataclass(frozen=True, slots=True)
class Desk:
    """The near guest with udev and an ordinary user.

    Attributes:
        machine: the near guest.
        plugger: runs farplug in it.
        user: the number of the user.
    """

    machine: Machine
    plugger: Plugger
    user: int

    async def farplug(self, arguments: str) -> tuple[int, str]:
        """Run farplug for the user: exit code and output."""
        async with self.plugger.farplug(arguments, USER) as job:
            return await job.end()

    async def obstacles(self, real: RealDevice) -> list[dict[str, Any]]:
        """Return the obstacles to plugging in a device, for the user."""
        code, output = await self.farplug("devices --json")
        assert code == 0, output
        (found,) = (one for one in json.loads(output)["usb"]["devices"] if f"{one['bus']}-{one['address']}" == real.bus)
        obstacles: list[dict[str, Any]] = found["obstacles"]
        return obstacles

    async def may_use(self, real: RealDevice) -> bool:
        """Return whether the user may open a device."""
        node = await usb_node(self.machine.guest, real.folder)
        return (await self.machine.guest.run(f"{AS_USER} test -w {node}")).exit_code == 0

    async def node(self, real: RealDevice) -> str:
        """Mode, owner and group of a device's node."""
        node = await usb_node(self.machine.guest, real.folder)
        return (await self.machine.check(f"stat -c '%a %U %G' {node}")).strip()

    async def root(self, commands: str) -> str:
        """Run the commands with sudo that farplug prints for the user."""
        return await self.machine.check(f"set -e\nexport PATH=/run/bin:$PATH USER={USER}\n{commands}")


@pytest_asyncio.fixture(loop_scope="session")
async def desk(plugger: Plugger) -> AsyncIterator[Desk]:
    """Start udev, and add a user; nothing of both is left when the test ends, nor of its rules."""
    machine = plugger.machine
    # Without the files that only this machine's root may read: the guest has them with the rights of the tests.
    await machine.check(f"""
        rm -f /etc/*shadow* /etc/.pwd.lock
        useradd --no-create-home {USER}
        mkdir -p /run/bin
        printf '#!/bin/sh\\nexec env {NOT_A_CHROOT} "$@"\\n' >/run/bin/sudo
        chmod +x /run/bin/sudo""")
    try:
        async with running(machine.guest, f"{NOT_A_CHROOT} /lib/systemd/systemd-udevd") as udevd:
            await machine.check("until [ -S /run/udev/control ]; do sleep 0.05; done")
            yield Desk(machine, plugger, int(await machine.check(f"id -u {USER}")))
            # It says here which lines of a rule it does not understand, and which groups it does not know.
            assert "70-farplug.rules" not in await udevd.output()
    finally:
        await machine.check(f"userdel {USER}; rm -rf {RULES} /run/bin /run/udev /run/systemd")


async def test_the_commands_that_are_printed(desk: Desk, guests: Guests) -> None:
    machine, far = desk.machine, await guests.get(FAR)
    connect = f"connect {from_inside(far.targets[0])} --usb-device 0627:0001"
    real = await machine.plug("usb-kbd", KEYBOARD)
    (obstacle,) = await desk.obstacles(real)
    assert (obstacle["reason"], obstacle["message"]) == ("no-permission", "no permission to use it")
    code, output = await desk.farplug(connect)
    assert (code, "cannot be plugged in: no permission to use it" in output) == (12, True), output
    commands = obstacle["command"].splitlines()
    assert all(command in output for command in commands), output

    await desk.root("\n".join(commands))
    assert await desk.node(real) == "660 root plugdev"
    async with desk.plugger.farplug(f"{connect} --wait", USER) as job:
        await job.until("configured by the guest")
        await usb_folder_by_name(far, KEYBOARD)
        assert await machine.drivers(real) == {"1.0": "usbfs"}
        # When it comes back its node is a new one, which is root's until udev has seen to it.
        await machine.unplug(real)
        await job.until("pulled out")
        async with machine.device("usb-kbd", KEYBOARD) as real:
            await job.until("is back")
            await job.until("configured by the guest", 2)
            await job.kill()
            code, output = await job.end()
            assert code == 0, output
            assert "no permission" not in output
            assert await machine.drivers(real) == {"1.0": "usbhid"}


SEAT = """
mkdir -p /run/systemd/seats
echo ACTIVE=1 >/run/systemd/seats/seat0
echo ACTIVE_UID={user} >>/run/systemd/seats/seat0
"""
"""What logind writes down of who sits at the screen: the place where udev looks it up."""


async def test_doctor_for_the_user_at_the_screen(desk: Desk) -> None:
    machine = desk.machine
    await machine.check(SEAT.format(user=desk.user))
    async with machine.device("usb-kbd", KEYBOARD) as real:
        assert not await desk.may_use(real)
        output = await desk.root(f"sudo env {FARPLUG} doctor --install-udev-rule")
        assert "70-farplug.rules" in output
        assert "plugdev" not in await machine.check(f"id {USER}")
        assert await desk.may_use(real)
