"""A security key in Linux, used by the tools of libfido2."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.guest.plugging import FUNCTIONS, GUEST_TIMEOUT, beside, plugged

from farplug.testing import QemuGuest
from farplug.virtual.fido import Answer, Presence, SecurityKey, security_key_device
from farplug.virtual.fido.events import KeyUsed, PresenceAnswered

if TYPE_CHECKING:
    from tests.guest.conftest import Guests


HASH = base64.b64encode(b"client data hash of 32 bytes ...").decode()
SITE = "example.com"
USER_ID = base64.b64encode(b"alice").decode()


async def key_node(guest: QemuGuest) -> str:
    """Return the device node of the key, once the guest's driver has it."""
    async with asyncio.timeout(GUEST_TIMEOUT):
        while not (found := (await guest.check("fido2-token -L")).splitlines()):
            await asyncio.sleep(0.1)
    (line,) = found
    assert "vendor=0x1d6b, product=0x0104 (farplug Security key for tests)" in line
    return line.partition(":")[0]


async def unplugged(guest: QemuGuest) -> None:
    async with asyncio.timeout(GUEST_TIMEOUT):
        while await guest.check("fido2-token -L"):
            await asyncio.sleep(0.1)


def write(name: str, *lines: str) -> str:
    """Return a command that writes a file of lines."""
    return f"cat >{name} <<'END'\n" + "\n".join(lines) + "\nEND\n"


def register(node: str, options: str = "", name: str = "cred", pin: str = "") -> str:
    """Return commands that make and verify a credential. The tools do not cut a file that is longer."""
    typed = f"printf '%s\\n' {pin} | " if pin else ""
    return (
        write("/tmp/new", HASH, SITE, "alice", USER_ID)
        + f"rm -f /tmp/made /tmp/{name}\n"
        + f"{typed}fido2-cred -M {options} -i /tmp/new -o /tmp/made {node}\n"
        + f"fido2-cred -V {' '.join(set(options.split()) & {'-v', '-h'})} -i /tmp/made -o /tmp/{name}\n"
        + f"head -n 1 /tmp/{name} >/tmp/{name}.id; tail -n +2 /tmp/{name} >/tmp/{name}.pem\n"
    )


def sign_in(node: str, options: str = "", name: str = "cred", *, listed: bool = True, pin: str = "") -> str:
    """Return commands that get and verify an assertion."""
    typed = f"printf '%s\\n' {pin} | " if pin else ""
    return (
        write("/tmp/ask", HASH, SITE)
        + (f"cat /tmp/{name}.id >>/tmp/ask\n" if listed else "")
        + "rm -f /tmp/proof\n"
        + f"{typed}fido2-assert -G {options} {'' if listed else '-r'} -i /tmp/ask -o /tmp/proof {node}\n"
        + f"fido2-assert -V -p {'-v ' if pin else ''}-i /tmp/proof /tmp/{name}.pem"
    )


def used(reports: list[object]) -> list[tuple[str, str, str]]:
    return [(event.use, event.site, event.status) for event in reports if isinstance(event, KeyUsed)]


@pytest.mark.parametrize("port", [0, 1], ids=["tcp", "spice"])
async def test_register_and_sign_in(guests: Guests, tmp_path: Path, port: int) -> None:
    guest = await guests.get(FUNCTIONS)
    device = security_key_device(tmp_path / "keys.json")
    try:
        async with plugged(guest.targets[port], device) as hub:
            node = await key_node(guest)
            information = await guest.check(f"fido2-token -I {node}")
            assert "version strings: U2F_V2, FIDO_2_0, FIDO_2_1" in information
            assert "extension strings: credProtect, hmac-secret" in information
            assert "noclientPin" in information
            await guest.check("set -e; cd /tmp\n" + register(node) + sign_in(node))
            await guest.check("set -e; cd /tmp\n" + register(node, "-u", "old") + sign_in(node, "-u", "old"))
            status = await guest.run("set -e; cd /tmp\n" + sign_in(node, listed=False))
            assert status.exit_code != 0
            assert "FIDO_ERR_NO_CREDENTIALS" in status.output
            seen = used(list(hub.reports()))
        assert ("register", SITE, "success") in seen
        assert ("sign-in", SITE, "success") in seen
        assert ("sign-in", SITE, "no-credentials") in seen
        await unplugged(guest)
    finally:
        await device.dispose()
    again = security_key_device(tmp_path / "keys.json")  # another farplug, the same key
    try:
        async with plugged(guest.targets[port], again):
            node = await key_node(guest)
            await guest.check("set -e; cd /tmp\n" + sign_in(node))
        await unplugged(guest)
    finally:
        await again.dispose()


async def test_pin_and_credential_management(guests: Guests) -> None:
    guest = await guests.get(FUNCTIONS)
    device = security_key_device()
    async with plugged(guest.targets[0], device):
        node = await key_node(guest)
        await guest.check(f"printf '1234\\n1234\\n' | fido2-token -S {node}")
        assert "pin retries: 8" in await guest.check(f"fido2-token -I {node}")
        await guest.check(f"printf '1234\\n56789\\n56789\\n' | fido2-token -C {node}")
        wrong = await guest.run(f"printf '1234\\n' | fido2-token -L -r {node}")
        assert "FIDO_ERR_PIN_INVALID" in wrong.output
        assert "pin retries: 7" in await guest.check(f"fido2-token -I {node}")
        await guest.check("set -e; cd /tmp\n" + register(node, "-r -v -h", pin="56789"))
        await guest.check("set -e; cd /tmp\n" + sign_in(node, "-v", listed=False, pin="56789"))
        assert "existing rk(s): 1" in await guest.check(f"printf '56789\\n' | fido2-token -I -c {node}")
        assert SITE in await guest.check(f"printf '56789\\n' | fido2-token -L -r {node}")
        listed = await guest.check(f"printf '56789\\n' | fido2-token -L -k {SITE} {node} 2>/dev/null")
        (line,) = [line for line in listed.splitlines() if line.startswith("00: ")]
        id = line.split()[1]
        assert (await guest.check("cat /tmp/cred.id")).strip() == id
        rename = f"fido2-token -S -c -i {id} -k {USER_ID} -n alicia -p Alicia {node}"
        await guest.check(f"printf '56789\\n' | {rename}")
        assert "Alicia" in await guest.check(f"printf '56789\\n' | fido2-token -L -k {SITE} {node}")
        await guest.check(f"printf '56789\\n' | fido2-token -D -i {id} {node}")
        assert "existing rk(s): 0" in await guest.check(f"printf '56789\\n' | fido2-token -I -c {node}")
        await guest.check(f"fido2-token -R {node}")
        assert "noclientPin" in await guest.check(f"fido2-token -I {node}")
    await unplugged(guest)


async def test_a_user_who_is_asked(guests: Guests) -> None:
    guest = await guests.get(FUNCTIONS)
    device = security_key_device(presence=Presence.ASK)
    (key,) = device.functions
    assert isinstance(key, SecurityKey)

    async def asked() -> str:
        async with asyncio.timeout(GUEST_TIMEOUT):
            while key.question is None:
                await asyncio.sleep(0.01)
        return str(key.question.question)

    async with plugged(guest.targets[0], device) as hub:
        node = await key_node(guest)
        registering = asyncio.ensure_future(guest.check("set -e; cd /tmp\n" + register(node)))
        assert await beside(registering, asked()) == "register the key at example.com as alice"
        key.answer(True)
        await registering
        refused = asyncio.ensure_future(guest.run("set -e; cd /tmp\n" + sign_in(node)))
        assert await beside(refused, asked()) == "sign in at example.com"
        key.answer(False)
        assert "FIDO_ERR_OPERATION_DENIED" in (await refused).output
        # U2F: the tool repeats the request until the user has answered
        old = asyncio.ensure_future(guest.check("set -e; cd /tmp\n" + register(node, "-u", "old")))
        assert "register the key at the site with the hash" in await beside(old, asked())
        key.answer(True)
        await old
        # A program that is killed: the question is withdrawn when the next one begins.
        await guest.check(write("/tmp/ask", HASH, SITE) + "cat /tmp/cred.id >>/tmp/ask")
        await guest.check(f"fido2-assert -G -i /tmp/ask {node} >/dev/null 2>&1 & echo $! >/tmp/pid")
        await asked()
        await guest.check("kill $(cat /tmp/pid)")
        assert key.question is not None
        key.answer(False)
        again = asyncio.ensure_future(guest.check("set -e; cd /tmp\n" + sign_in(node)))
        await beside(again, asked())
        key.answer(True)
        await again
        # The key is unplugged while its user is asked.
        leaving = asyncio.ensure_future(guest.run("set -e; cd /tmp\n" + sign_in(node)))
        await beside(leaving, asked())
        answers = [event.answer for event in hub.reports() if isinstance(event, PresenceAnswered)]
    assert (await leaving).exit_code != 0
    assert key.question is None
    assert answers == [Answer.ALLOW, Answer.REFUSE, Answer.ALLOW, Answer.REFUSE, Answer.ALLOW]
    await unplugged(guest)
    assert "Oops" not in await guest.check("dmesg")
