"""Real devices of every kind of transfer, redirected from one guest into another: they work there."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, TypeAlias

import pytest
import pytest_asyncio
from tests.guest.nested import FAR, SPEAKER, WAV_HEADER, Plugger, RealDevice, running
from tests.guest.plugging import GUEST_TIMEOUT, MIB, raw, until, usb_folder_by_name, usb_node

if TYPE_CHECKING:
    from tests.guest.conftest import Guests

    from farplug.testing import QemuGuest

EVENT = struct.Struct("<qqHHi")
"""input_event (Linux, include/uapi/linux/input.h): time, type, code, value."""
EV_KEY, EV_ABS = 1, 3
REPEATED = 2
"""Value of a key: Linux repeats it by itself when it is held for 250 ms."""
KEYS = {"f": 33, "a": 30, "r": 19, "p": 25, "l": 38, "u": 22, "g": 34}
"""Key codes (Linux, include/uapi/linux/input-event-codes.h)."""
USAGES = (0x09, 0x04, 0x15, 0x13, 0x0F, 0x18, 0x0A)
"""The same keys on the wire (HID Usage Tables, keyboard page)."""
PRESSES = [(code, value) for code in KEYS.values() for value in (1, 0)]

Unplug: TypeAlias = Callable[[], Awaitable[None]]

NAMES = {
    "keyboard": "0627:0001 *Keyboard",
    "pointer": "0627:0001 *Tablet",
    "serial": "0403:6001 *",
    "speaker": "46f4:0002 *",
    "network": "0525:a4a2 *",
    "reader": "08e6:4433 *",
    "player": "46f4:0004 *",
}
DRIVERS = {
    "keyboard": ("usbhid", ["1.0"]),
    "pointer": ("usbhid", ["1.0"]),
    "serial": ("ftdi_sio", ["1.0"]),
    "speaker": ("snd-usb-audio", ["1.0", "1.1"]),
    "network": ("cdc_ether", ["1.0", "1.1"]),
}
"""The drivers of Linux, and their interfaces."""
COMPOSITE = "1d6b:0104"
"""A composite gadget (Linux Foundation)."""


class Desk:
    """The near guest with its devices, and the far one that got them.

    Attributes:
        devices: by the names of :data:`NAMES`.
        numbers: of the devices, for the plugger.
        unplug: takes all devices out again.
    """

    def __init__(
        self, plugger: Plugger, far: QemuGuest, devices: dict[str, RealDevice], numbers: list[int], unplug: Unplug
    ) -> None:
        self.plugger = plugger
        self.machine = plugger.machine
        self.far = far
        self.devices = devices
        self.numbers = dict(zip(devices, numbers, strict=True))
        self.unplug = unplug

    async def figures(self, name: str, endpoint: int) -> dict[str, int]:
        """Return the figures of an endpoint of a device."""
        figures: dict[str, int] = (await self.plugger.ask("figures", self.numbers[name]))[f"{endpoint:02x}"]
        return figures

    async def folder(self, name: str) -> str:
        """The far guest's folder in /sys for a device."""
        return await usb_folder_by_name(self.far, NAMES[name])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def desk(
    plugger: Plugger, session_guests: Guests, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Desk]:
    """One of each, all plugged in."""
    machine = plugger.machine
    folder = tmp_path_factory.mktemp("desk")
    (folder / "songs").mkdir()
    (folder / "songs" / "note.txt").write_text("la")
    async with AsyncExitStack() as stack:
        far = await stack.enter_async_context(session_guests.lent(FAR))
        line = await stack.enter_async_context(machine.line(folder / "line"))
        await machine.qmp.execute("netdev_add", {"type": "user", "id": "lan", "net": "10.9.0.0/24"})
        properties: dict[str, tuple[str, dict[str, object]]] = {
            "keyboard": ("usb-kbd", {}),
            "pointer": ("usb-tablet", {}),
            "serial": ("usb-serial", {"chardev": line}),
            "speaker": ("usb-audio", {"audiodev": "speaker"}),
            "network": ("usb-net", {"netdev": "lan"}),
            "reader": ("usb-ccid", {}),
            "player": ("usb-mtp", {"rootdir": str(folder / "songs")}),
        }
        devices = {
            name: await stack.enter_async_context(machine.device(driver, NAMES[name], **extra))
            for name, (driver, extra) in properties.items()
        }
        plugged = await stack.enter_async_context(AsyncExitStack())
        numbers = await plugged.enter_async_context(plugger.plugged(far.targets[-1], *devices.values()))
        yield Desk(plugger, far, devices, numbers, plugged.aclose)


async def first(guest: QemuGuest, pattern: str) -> str:
    """The name of the first file that matches a pattern; waits until there is one."""
    found = await until(guest, f"busybox ls -d {pattern} 2>/dev/null")
    return found.split()[0].rpartition("/")[2]


def decoded(data: bytes, kind: int) -> list[tuple[int, int]]:
    """Code and value of the events of a kind that an input device gave; without the keys that Linux repeated."""
    whole = data[: len(data) // EVENT.size * EVENT.size]
    happened = [(what, code, value) for *_, what, code, value in EVENT.iter_unpack(whole)]
    return [(code, value) for what, code, value in happened if what == kind and (what, value) != (EV_KEY, REPEATED)]


async def events(
    guest: QemuGuest, folder: str, kind: int, act: Callable[[], Awaitable[None]], count: int
) -> list[tuple[int, int]]:
    """The first ``count`` events of a kind that an input device has because of what ``act`` does."""
    node = "/dev/input/" + await first(guest, f"{folder}/*/*/input/*/event*")
    async with running(guest, f"cat {node}") as job, asyncio.timeout(GUEST_TIMEOUT):
        await job.opened(node)
        await act()
        while len(found := decoded(await job.data(), kind)) < count:
            await asyncio.sleep(0.1)
        return found


async def test_keys_arrive_in_order(desk: Desk) -> None:
    folder = await desk.folder("keyboard")
    assert await events(desk.far, folder, EV_KEY, lambda: desk.machine.type(KEYS), len(PRESSES)) == PRESSES


async def test_pointer_moves(desk: Desk) -> None:
    moved = await events(desk.far, await desk.folder("pointer"), EV_ABS, lambda: desk.machine.point(1000, 2000), 2)
    assert set(moved) == {(0, 1000), (1, 2000)}


ECHOED = "stty -F {node} raw -echo; exec 3<>{node} 4<&0; cat <&4 >&3 & exec timeout 110 head -c {size} <&3"
"""Standard input goes out of a serial line; what comes back is the output."""


async def test_serial_line_both_ways(desk: Desk) -> None:
    node = "/dev/" + await first(desk.far, f"{await desk.folder('serial')}/*/ttyUSB*")
    sent = os.urandom(3000)
    result = await desk.far.run(ECHOED.format(node=node, size=len(sent)), stdin=sent)
    assert result.data == sent


PING = """
ip link set {name} up
ip address replace {address}/24 dev {name}
for i in 1 2 3; do until ping -c 1 -s 1400 -W 10 {peer}; do sleep 1; done; done"""


async def test_packets_cross_the_network_device(desk: Desk) -> None:
    name = await first(desk.far, f"{await desk.folder('network')}/*/net/*")
    output = await desk.far.check(PING.format(name=name, address="10.9.0.77", peer="10.9.0.2"))
    assert output.count("1408 bytes from") == 3


SECONDS = 5
FRAMES = 48_000 * SECONDS


def numbered_frames() -> bytes:
    """Sound whose frames are numbered: a digit to the base of 512 in each channel, so far from the next one that it can
    be read at a lower volume, and no silence among them."""
    return b"".join(struct.pack("<2h", *(digit * 128 - 32704 for digit in divmod(n, 512))) for n in range(FRAMES))


def numbers_of(sound: bytes) -> list[int]:
    """The numbers of the frames that a usb-audio played, at the volume that it begins with: 240 of 255."""
    frames = struct.iter_unpack("<2h", sound[: len(sound) // 4 * 4])
    digits = ([round((sample * 255 / 240 + 32704) / 128) for sample in frame] for frame in frames if any(frame))
    return [high * 512 + low for high, low in digits]


async def test_speaker_plays_without_underrun(desk: Desk) -> None:
    card = await first(desk.far, f"{await desk.folder('speaker')}/*/sound/card*")
    await desk.far.check(f"echo 'pcm.out {{ type hw card {card.removeprefix('card')} device 0 }}' >/tmp/alsa.conf")
    play = "env ALSA_CONFIG_PATH=/tmp/alsa.conf aplay -D out -t raw -f S16_LE -r 48000 -c 2 /tmp/sound"
    await desk.far.run("cat >/tmp/sound", stdin=numbered_frames())
    output = await desk.far.check(f"dmesg -c >/dev/null; {play}; dmesg")
    assert "underrun" not in output
    assert "usb" not in output
    async with asyncio.timeout(GUEST_TIMEOUT):  # what is still on its way counts when it arrives
        figures, before = await desk.figures("speaker", 0x01), None
        while figures != before:
            await asyncio.sleep(1)
            figures, before = await desk.figures("speaker", 0x01), figures
    # QEMU drops packets of a guest that is too far ahead, which happens on a machine with little time.
    assert 0 < figures["transfers"] / 5000 < 1.1, figures
    assert figures["errors"] == 0, figures
    # Packets that come too late for the device's clock are dropped, as cancelled: on a quiet machine some 2 %, on one
    # that has little time for two emulated ones most of them. Those in flight when the sound ends are cancelled too,
    # though the device may have played them.
    taken = figures["transfers"] - figures["cancelled"]
    assert taken > 0, figures
    assert figures["bytes"] == 192 * taken, figures
    # What came out of the device is what was played, in order, and no frame twice.
    played = numbers_of(SPEAKER.read_bytes()[WAV_HEADER:])
    assert played == sorted(set(played))
    assert 0 < len(played) <= 48 * figures["transfers"]
    assert played[-1] < FRAMES


async def test_smart_card_reader_is_listed(desk: Desk) -> None:
    output = await desk.far.check("lsusb -v -d 08e6:4433")
    assert "ChipCard Interface Descriptor" in output


async def test_player_names_itself(desk: Desk) -> None:
    node = await usb_node(desk.far, await desk.folder("player"))
    get_device_info = struct.pack("<IHHI", 12, 1, 0x1001, 0)
    claimed, sent, answer = await raw(
        desk.far, node, ("claim", 0), ("send", 2, get_device_info), ("receive", 0x81, 4096)
    )
    assert (claimed, sent) == (b"", b"")
    assert isinstance(answer, bytes)
    assert "filesharing".encode("utf-16-le") in answer


async def test_guest_has_everything_at_once_and_the_machine_gets_it_back(desk: Desk) -> None:
    taken = [await desk.machine.drivers(real) for real in desk.devices.values()]
    assert {driver for drivers in taken for driver in drivers.values()} == {"usbfs"}
    assert [words for _, kind, words in desk.plugger.events if kind in ("Refused", "Detached")] == []
    await desk.unplug()
    for name, (driver, interfaces) in DRIVERS.items():
        assert await desk.machine.drivers(desk.devices[name]) == dict.fromkeys(interfaces, driver), name


GADGET = """
echo 1 >hid.0/protocol
echo 1 >hid.0/subclass
echo 8 >hid.0/report_length
printf '%b' '{descriptor}' >hid.0/report_desc
head -c {size} /dev/urandom >/run/medium
echo /run/medium >mass_storage.0/lun.0/file
echo 'near%d' >ncm.0/ifname
"""
KEYBOARD_REPORT = (
    "05010906a101050719e029e71500250175019508810295017508810195057501050819012905910295017503910195067508150025650507"
    "190029658100c0"
)
"""The report descriptor of a boot keyboard (USB HID 1.11, appendix E.6)."""


async def test_gadget_of_many_interfaces(plugger: Plugger, guests: Guests) -> None:
    machine, far = plugger.machine, await guests.get(FAR)
    descriptor = "".join(f"\\0{byte:o}" for byte in bytes.fromhex(KEYBOARD_REPORT))
    functions = "acm.0 hid.0 mass_storage.0 ncm.0"
    setup = GADGET.format(descriptor=descriptor, size=4 * MIB)
    async with machine.gadget(COMPOSITE, functions, setup=setup) as real, plugger.plugged(far.targets[0], real):
        folder = await usb_folder_by_name(far, f"{COMPOSITE} *")

        async def type_them() -> None:
            for usage in USAGES:
                press, release = rf"\0\0\{usage:o}\0\0\0\0\0", r"\0" * 8
                await machine.check(f"printf '{press}' >/dev/hidg0; printf '{release}' >/dev/hidg0")

        assert await events(far, folder, EV_KEY, type_them, len(PRESSES)) == PRESSES

        disk = "/dev/" + await first(far, f"{folder}/*/host*/target*/*/block/*")
        read = f"until head -c 1 {disk} >/dev/null 2>&1; do sleep 0.1; done; head -c {4 * MIB} {disk} | sha256sum"
        there = await far.check(read)
        assert there == await machine.check("sha256sum </run/medium")

        await machine.check("stty -F /dev/ttyGS0 raw -echo")
        async with running(machine.guest, "sh -c 'exec cat </dev/ttyGS0 >/dev/ttyGS0'") as job:
            await job.opened("/dev/ttyGS0")
            node = "/dev/" + await first(far, f"{folder}/*/tty/ttyACM*")
            sent = os.urandom(20_000)
            result = await far.run(ECHOED.format(node=node, size=len(sent)), stdin=sent)
            assert result.data == sent

        name = await first(far, f"{folder}/*/net/*")
        await machine.check("busybox ip link set near0 up; busybox ip address replace 10.8.0.1/24 dev near0")
        output = await far.check(PING.format(name=name, address="10.8.0.2", peer="10.8.0.1"))
        assert output.count("1408 bytes from") == 3
