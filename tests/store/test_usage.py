from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from farplug.errors import ImageError, Reason
from farplug.shell import shell_word
from farplug.store import FileStore, usage
from farplug.store.usage import Use, host_uses

# 8:0 sda with sda1 and sda2; 8:16 sdb; sda2 is a part of dm-0 (8:2 -> 253:0), which has dm-1 on it
TREE = {
    "sda": "8:0",
    "sda/sda1": "8:1",
    "sda/sda2": "8:2",
    "sdb": "8:16",
    "dm-0": "253:0",
    "dm-1": "253:1",
    "md0": "9:0",
    "md0/md0p1": "259:0",
}
HOLDERS = {"sda/sda2": "dm-0", "dm-0": "dm-1", "sdb": "md0"}
SWAP_HEAD = "Filename\tType\tSize\tUsed\tPriority\n"


class Machine:
    """Files as the kernel shows them in /proc and /sys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.numbers = {f"/dev/{Path(name).name}": number for name, number in TREE.items()}
        for name, number in TREE.items():
            device = folder / "devices" / name
            (device / "holders").mkdir(parents=True)
            (device / "dev").write_text(number + "\n")
            (device / "ro").write_text("0\n")
            if "/" in name:
                (device / "partition").write_text("1\n")
            (folder / "block").mkdir(exist_ok=True)
            (folder / "block" / number).symlink_to(device)
        for name, above in HOLDERS.items():
            (folder / "devices" / name / "holders" / above).symlink_to(folder / "devices" / above)
        (folder / "devices/dm-1/dm").mkdir()
        (folder / "devices/dm-1/dm/name").write_text("vg-home\n")
        self.mounts("")
        self.swaps("")

    def mounts(self, *lines: str) -> None:
        (self.folder / "mountinfo").write_bytes(os.fsencode("\n".join(lines) + "\n"))

    def swaps(self, text: str) -> None:
        (self.folder / "swaps").write_bytes(os.fsencode(SWAP_HEAD + text))

    def stat(self, path: str | Path) -> SimpleNamespace:
        number = self.numbers.get(str(path))
        if number is None:
            raise FileNotFoundError(str(path))
        major, minor = number.split(":")
        return SimpleNamespace(st_mode=stat.S_IFBLK, st_rdev=os.makedev(int(major), int(minor)))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine(tmp_path / "machine")
    monkeypatch.setattr(usage, "BLOCK_DEVICES", fake.folder / "block")
    monkeypatch.setattr(usage, "LOOP_DEVICES", fake.folder / "loops")
    monkeypatch.setattr(usage, "MOUNTS", fake.folder / "mountinfo")
    monkeypatch.setattr(usage, "SWAPS", fake.folder / "swaps")
    monkeypatch.setattr(usage, "os", SimpleNamespace(**(vars(os) | {"stat": fake.stat})))
    return fake


def mount(number: str, where: str, *, source: str = "none", options: str = "rw,errors=remount-ro") -> str:
    return f"36 35 {number} / {where} ro,noatime shared:1 - ext4 {source} {options}"


@pytest.mark.parametrize(
    ("device", "line", "expected"),
    [
        ("/dev/sda", mount("8:0", "/mnt"), ["/dev/sda is mounted on /mnt"]),
        ("/dev/sdb", mount("8:0", "/mnt"), []),
        ("/dev/sda1", mount("8:0", "/mnt"), ["/dev/sda is mounted on /mnt"]),
        ("/dev/sda", mount("8:1", "/mnt"), ["/dev/sda1 is mounted on /mnt"]),
        ("/dev/sda1", mount("8:2", "/mnt"), []),
        ("/dev/sda2", mount("253:1", "/home"), ["/dev/dm-1 is mounted on /home"]),
        ("/dev/dm-0", mount("253:1", "/home"), ["/dev/dm-1 is mounted on /home"]),
        ("/dev/dm-1", mount("253:1", "/home"), ["/dev/dm-1 is mounted on /home"]),
        ("/dev/sdb", mount("259:0", "/home"), ["/dev/md0p1 is mounted on /home"]),
        ("/dev/sda1", mount("8:1", r"/a\040b\134"), ["/dev/sda1 is mounted on /a b\\"]),
        ("/dev/sda1", mount("0:40", "/data", source="/dev/sda1"), ["/dev/sda1 is mounted on /data"]),
        ("/dev/sda1", mount("0:40", "/data", source="/dev/gone"), []),
        ("/dev/sda1", mount("0:40", "/data", source="sda1"), []),
        ("/dev/sda1", "36 35 8:1 / /mnt", []),
        ("/dev/sda1", "8:1 - -", []),
    ],
)
def test_mounts(machine: Machine, device: str, line: str, expected: list[str]) -> None:
    machine.mounts("25 1 0:22 / /sys rw - sysfs sysfs rw", line)
    uses = [use for use in host_uses(Path(device)) if "mounted" in use.what]
    assert [str(use) for use in uses] == expected
    assert all(use.changes and use.end.startswith("umount ") for use in uses)


def test_a_read_only_mount_changes_nothing(machine: Machine) -> None:
    machine.mounts(mount("8:1", "/mnt", options="ro,errors=remount-ro"))
    assert [use.changes for use in host_uses(Path("/dev/sda1"))] == [False]


def test_swap_and_holders(machine: Machine) -> None:
    machine.swaps("/dev/sda1 partition 1 0 -2\n/swapfile file 1 0 -3\n")
    (machine.folder / "devices/dm-0/ro").write_text("1\n")
    uses = {str(use): use for use in host_uses(Path("/dev/sda"))}
    assert list(uses) == ["/dev/sda1 is swap space", "it is a part of /dev/dm-0", "it is a part of /dev/dm-1 (vg-home)"]
    assert [use.changes for use in uses.values()] == [True, False, True]
    assert [use.end for use in uses.values()] == ["swapoff /dev/sda1", "", ""]


NAMES = ["st\u2028ick", "st\x0bick", "st\x85ick", "st\x1cick", "st\rick", "st\u3000ick", "st\xa0ick", "st\udcffick"]
"""Names with characters that end a line, or separate words, for Python but not for the kernel."""


@pytest.mark.parametrize("name", NAMES)
def test_mounts_and_swap_in_paths_with_any_character(machine: Machine, name: str) -> None:
    where = f"/media/u/{name}"
    machine.mounts(f"36 35 8:1 /{name} {where} ro,noatime shared:1 - fuse.{name} {name} ro")
    use = Use(f"/dev/sda1 is mounted on {where}", f"umount {shell_word(where)}", changes=False)
    assert use in host_uses(Path("/dev/sda"))
    machine.mounts()
    machine.numbers[where] = machine.numbers["/dev/sda1"]
    machine.swaps(f"{where} partition\t\t2097148\t\t0\t\t-2\n")
    assert Use(f"{where} is swap space", f"swapoff {shell_word(where)}", changes=True) in host_uses(Path("/dev/sda"))


def test_a_machine_without_these_files(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK_DEVICES", "MOUNTS", "SWAPS"):
        monkeypatch.setattr(usage, name, tmp_path / "missing")
    assert host_uses(Path("/dev/sda")) == []


@contextmanager
def no_file_can_be_opened() -> Iterator[None]:
    free = os.open("/", os.O_RDONLY)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("read", ["_listed", "_read", "_lines"])
def test_too_many_open_files_are_an_error(machine: Machine, monkeypatch: pytest.MonkeyPatch, read: str) -> None:
    machine.mounts(mount("8:1", "/mnt"))
    real = getattr(usage, read)

    def without_files(path: Path) -> object:
        with no_file_can_be_opened():
            return real(path)

    monkeypatch.setattr(usage, read, without_files)
    with pytest.raises(OSError, match="Too many open files") as caught:
        host_uses(Path("/dev/sda"))
    assert caught.value.errno == errno.EMFILE


def test_devices_in_a_circle(machine: Machine) -> None:
    (machine.folder / "devices/dm-1/holders/dm-0").symlink_to(machine.folder / "devices/dm-0")
    assert len(host_uses(Path("/dev/sda"))) == 2


@pytest.fixture
def loops(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The image is attached to loop1, whose number is 7:1."""
    folder = tmp_path / "block"
    for name, backing in (("loop0", "/elsewhere (deleted)"), ("loop1", str(image)), ("loop2", None), ("sda", None)):
        (folder / name).mkdir(parents=True)
        (folder / name / "dev").write_text(f"7:{name[-1]}\n")
        if backing is not None:
            (folder / name / "loop").mkdir()
            (folder / name / "loop/backing_file").write_text(backing + "\n")
    monkeypatch.setattr(usage, "LOOP_DEVICES", folder)
    monkeypatch.setattr(usage, "BLOCK_DEVICES", tmp_path / "numbers")
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers/7:1").symlink_to(folder / "loop1")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(mount("7:1", "/mnt") + "\n" + mount("7:0", "/other") + "\n")
    monkeypatch.setattr(usage, "MOUNTS", mounts)
    return folder


async def test_an_image_on_a_loop_device(loops: Path, image: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [str(use) for use in host_uses(image)] == ["/dev/loop1 is mounted on /mnt", "it is attached to /dev/loop1"]
    for read_only in (False, True):
        with pytest.raises(ImageError, match=r"is used by this machine: /dev/loop1 is mounted on /mnt") as caught:
            FileStore.open(image, read_only=read_only)
        assert caught.value.reason is Reason.IN_USE
        assert "umount /mnt" in caught.value.remedy.command.split("\n")
        assert caught.value.remedy.alternative is not None
        assert caught.value.remedy.alternative.setting == "storage.force"
        await FileStore.open(image, read_only=read_only, force=True).close()
        assert "is used by this machine: /dev/loop1 is mounted on /mnt" in caplog.text
    assert host_uses(loops) == []
    usage.MOUNTS.write_text(mount("7:1", "/mnt", options="ro"))
    await FileStore.open(image, read_only=True).close()
    with pytest.raises(ImageError, match="/dev/loop1 is mounted on /mnt; it is attached to /dev/loop1"):
        FileStore.open(image)


def test_too_many_open_files_with_loop_devices(loops: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = usage._listed(loops)
    monkeypatch.setattr(usage, "_listed", lambda folder: listed)
    with no_file_can_be_opened(), pytest.raises(ImageError, match="cannot be opened: too many open files"):
        FileStore.open(image)
    with no_file_can_be_opened(), pytest.raises(OSError, match="Too many open files"):
        host_uses(image)
