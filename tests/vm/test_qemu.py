from __future__ import annotations

import socket
from pathlib import Path

import pytest

from farplug.errors import SetupError, StateError
from farplug.vm import qemu
from farplug.vm.qemu import QemuGuest, copy_firmware, describe_exit, port_was_taken, private_folder, setup_problem
from farplug.vm.qemu_config import Boot, GuestConfig, Spice


@pytest.mark.parametrize(
    ("stderr", "remedy"),
    [
        (
            "qemu: module ui-spice-core not found, do you want to install qemu-system-modules-spice package?\n"
            "qemu-system-x86_64: -spice port=1: There is no option group 'spice'\n",
            "sudo apt-get install qemu-system-modules-spice",
        ),
        (
            "qemu-system-x86_64: -device usb-redir: 'usb-redir' is not a valid device model name\n",
            "sudo apt-get install qemu-system-x86 qemu-system-modules-spice",
        ),
        (
            "qemu-system-x86_64: -chardev spicevmc,id=x: 'spicevmc' is not a valid char driver name\n",
            "sudo apt-get install qemu-system-x86 qemu-system-modules-spice",
        ),
    ],
)
def test_missing_part_of_qemu(stderr: str, remedy: str) -> None:
    problem = setup_problem(stderr)
    assert problem is not None
    assert problem.remedy.command == remedy
    assert "\n" not in problem.message


def test_other_failures_are_not_a_setup_problem() -> None:
    for stderr in ("", "Property 'usb-redir.x' not found", "'nonsense' is not a valid device model name"):
        assert setup_problem(stderr) is None


def test_taken_port() -> None:
    # As QEMU 7.2 prints it.
    assert port_was_taken(
        "(process:1): Spice-WARNING **: reds.cpp:2580:reds_init_socket: binding socket to 127.0.0.1:1 failed\n"
        "qemu-system-x86_64: failed to initialize spice server\n"
    )
    assert not port_was_taken("qemu-system-x86_64: -device x: 'x' is not a valid device model name")


def test_how_a_process_ended() -> None:
    assert describe_exit(-6) == "was killed by SIGABRT"
    assert describe_exit(1) == "ended with exit code 1"


def test_folder_is_private_and_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    folder = private_folder()
    assert folder.stat().st_mode == 0o040700
    assert len(str(folder)) < 60
    folder.rmdir()


def test_missing_firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "OVMF_FOLDER", tmp_path)
    with pytest.raises(SetupError, match=r"no OVMF_CODE_4M.fd or OVMF_CODE.fd in") as error:
        copy_firmware(tmp_path)
    assert error.value.remedy.command == "sudo apt-get install ovmf"


async def test_missing_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "QEMU", "qemu-none-such")
    with pytest.raises(SetupError, match="the program qemu-none-such is not installed"):
        await QemuGuest().__aenter__()


async def test_unsupported_operations() -> None:
    guest = QemuGuest(GuestConfig(boot=Boot.BIOS))
    with pytest.raises(StateError, match="a guest that boots with bios cannot run commands"):
        await guest.run("true")
    with pytest.raises(StateError, match="no SPICE server"):
        _ = guest.spice
    assert not guest.alive
    with pytest.raises(StateError, match="not started"):
        await guest.wait_for_console("x")
    assert guest.console == ""
    await guest.close()


async def test_another_spice_port_is_chosen_if_the_first_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = qemu.unused_port
        choices = iter([other.getsockname()[1], free()])
        monkeypatch.setattr(qemu, "unused_port", lambda: next(choices))
        config = GuestConfig(boot=Boot.BIOS, spice=Spice(), paused=True)
        async with QemuGuest(config) as guest:
            assert guest.spice.port != other.getsockname()[1]
            assert (await guest.qmp.execute("query-status"))["running"] is False


async def test_an_exception_that_leaves_the_block_shows_the_end_of_the_console_once() -> None:
    guest = QemuGuest()
    guest._kept["console"] = "".join(f"line {number:04}\n" for number in range(1000))
    error = AssertionError()
    await guest.__aexit__(AssertionError, error, None)
    await guest.__aexit__(AssertionError, error, None)
    (note,) = error.__notes__
    first, *lines = note.splitlines()
    assert first == "the guest's console ends:"
    assert lines == [f"line {number:04}" for number in range(1000 - len(lines), 1000)]
    assert 2000 - 10 <= len(note) <= 2000 + len(first)
    silent = ValueError()
    guest._kept["console"] = ""
    await guest.__aexit__(ValueError, silent, None)
    assert silent.__notes__ == ["the guest's console ends:\n(it is empty)"]
    cancelled = KeyboardInterrupt()
    await guest.__aexit__(KeyboardInterrupt, cancelled, None)
    assert not hasattr(cancelled, "__notes__")
