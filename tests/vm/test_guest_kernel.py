from __future__ import annotations

import gzip
import lzma
import multiprocessing
import struct
import subprocess
import time
from pathlib import Path

import pytest
from tests.vm.elf import elf, module

from farplug.errors import Reason, SetupError
from farplug.vm import guest_kernel
from farplug.vm.guest_kernel import (
    Kernel,
    ModuleInfo,
    bootable_kernel,
    decompress,
    elf_section,
    fetch_kernel,
    is_kept,
    module_name,
    resolve_kernel_packages,
)

PVH_NOTE = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 0x1000050)


def kernel_with(folder: Path, builtin: str = "", **modules: bytes) -> Kernel:
    (folder / "modules").mkdir()
    for name, content in modules.items():
        (folder / "modules" / f"{name}.ko").write_bytes(content)
    (folder / "builtin").write_text(builtin)
    (folder / "release").write_text("6.1.0-56-amd64\n")
    return Kernel(folder)


def test_modules_come_after_those_they_need(tmp_path: Path) -> None:
    kernel = kernel_with(
        tmp_path,
        builtin="scsi_common\nusb_common",
        sd_mod=module("scsi_mod,t10-pi"),
        t10_pi=module("crc64"),
        crc64=module(),
        scsi_mod=module("scsi_common"),
        other=module(),
    )
    closure = kernel.module_closure(["sd-mod", "usb-common"], optional=["crc64", "none_such"])
    assert list(closure) == ["scsi_mod", "crc64", "t10_pi", "sd_mod"]
    assert closure["sd_mod"].depends == ("scsi_mod", "t10_pi")


def test_error_of_a_missing_module_names_what_needs_it(tmp_path: Path) -> None:
    kernel = kernel_with(tmp_path, sd_mod=module("t10-pi"))
    with pytest.raises(SetupError, match=r"kernel 6.1.0-56-amd64 has no module t10_pi, which the module sd_mod needs"):
        kernel.module_closure(["sd_mod"])


def test_modinfo() -> None:
    content = module("a-b,c", "fs-ext4", "usb:v*p*")
    assert ModuleInfo.parse(content) == ModuleInfo(content, depends=("a_b", "c"), aliases=("fs-ext4", "usb:v*p*"))
    assert ModuleInfo.parse(module()).depends == ()
    assert module_name("xhci-pci") == "xhci_pci"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x7fELF",
        b"\x7fELF\x01\x01" + bytes(100),
        b"\x7fELF\x02\x01" + bytes(100),
        elf(text=b"code"),
        module()[:-70],
        module()[:200],
    ],
)
def test_files_that_are_not_modules_are_refused(content: bytes) -> None:
    with pytest.raises(SetupError, match="not a kernel module: "):
        ModuleInfo.parse(content)


def test_elf_section() -> None:
    assert elf_section(elf(notes=b"abc", modinfo=b"xyz"), ".modinfo") == b"xyz"
    with pytest.raises(ValueError, match=r"no section .mod"):
        elf_section(elf(modinfo=b"xyz"), ".mod")


def bz_image(payload: bytes) -> bytes:
    image = bytearray(512 * 3)
    image[0x1F1] = 2
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + bytes(16) + payload + b"rest"


def test_kernel_is_decompressed_if_it_has_a_pvh_entry() -> None:
    kernel = elf(notes=PVH_NOTE)
    size = struct.pack("<I", len(kernel))
    zstd = subprocess.run(["zstd", "-q"], input=kernel, capture_output=True, check=True).stdout
    for packed in (lzma.compress(kernel), gzip.compress(kernel), zstd):
        assert bootable_kernel(bz_image(packed + size)) == kernel


@pytest.mark.parametrize(
    "image",
    [
        b"no kernel",
        bz_image(b"\x02\x21\x4c\x18 lz4, old form"),
        bz_image(lzma.compress(elf(notes=b"none")) + bytes(4)),
        bz_image(lzma.compress(b"no ELF file") + bytes(4)),
    ],
)
def test_other_kernels_are_left_unchanged(image: bytes) -> None:
    assert bootable_kernel(image) == image


def test_unknown_compression_is_refused() -> None:
    with pytest.raises(SetupError, match=r"unknown compression .br"):
        decompress(b"", ".br")


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("drivers/usb/host/xhci-pci", True),
        ("fs/nls/nls_cp437", True),
        ("drivers/scsi/sd_mod", True),
        ("drivers/scsi/lpfc/lpfc", False),
        ("fs/overlayfs/overlay", True),
        ("fs/xfs/xfs", False),
        ("net/core/failover", True),
        ("sound/usb/snd-usb-audio", True),
        ("sound/pci/hda/snd-hda-intel", False),
        ("drivers/gpu/drm/drm", True),
        ("drivers/gpu/drm/amd/amdgpu/amdgpu", False),
        ("drivers/usbx/x", False),
    ],
)
def test_kept_modules(path: str, kept: bool) -> None:
    assert is_kept(path) is kept


PACKAGES = {
    "debian": (
        {
            "linux-image-amd64": ["linux-image-6.1.0-56-amd64"],
            "linux-image-6.1.0-56-amd64": ["kmod", "linux-base", "initramfs-tools"],
        },
        ["linux-image-6.1.0-56-amd64"],
    ),
    "ubuntu": (
        {
            "linux-image-generic": [
                "linux-image-6.8.0-31-generic",
                "linux-modules-extra-6.8.0-31-generic",
                "linux-firmware",
            ],
            "linux-image-6.8.0-31-generic": ["kmod", "linux-modules-6.8.0-31-generic"],
            "linux-modules-extra-6.8.0-31-generic": ["linux-modules-6.8.0-31-generic"],
            "linux-modules-6.8.0-31-generic": [],
        },
        ["linux-image-6.8.0-31-generic", "linux-modules-extra-6.8.0-31-generic", "linux-modules-6.8.0-31-generic"],
    ),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_kernel_packages(name: str) -> None:
    lists, expected = PACKAGES[name]
    assert resolve_kernel_packages(lists.get) == expected


@pytest.mark.parametrize("lists", [{}, {"linux-image-amd64": []}])
def test_no_kernel_package(lists: dict[str, list[str]]) -> None:
    with pytest.raises(SetupError) as error:
        resolve_kernel_packages(lists.get)
    assert error.value.remedy.command == "sudo apt-get update"


def make_package(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        target = folder / "tree" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    control = folder / "tree/DEBIAN/control"
    control.parent.mkdir()
    control.write_text("Package: k\nVersion: 1\nArchitecture: amd64\nMaintainer: n <n@example.org>\nDescription: k\n")
    package = folder / "k.deb"
    subprocess.run(["dpkg-deb", "--build", folder / "tree", package], check=True, capture_output=True)
    return package


@pytest.mark.parametrize("prefix", ["lib/modules", "usr/lib/modules"])
def test_unpacking_a_package(tmp_path: Path, prefix: str) -> None:
    usb = f"{prefix}/6.12-amd64/kernel/drivers/usb"
    zstd = subprocess.run(["zstd", "-q"], input=b"zst", capture_output=True, check=True).stdout
    package = make_package(
        tmp_path,
        {
            "boot/vmlinuz-6.12-amd64": b"kernel",
            f"{prefix}/6.12-amd64/modules.builtin": b"kernel/drivers/usb/common/usb-common.ko\nkernel/lib/crc16.ko\n",
            f"{usb}/host/xhci-pci.ko": b"plain",
            f"{usb}/core/usbcore.ko.xz": lzma.compress(b"xz"),
            f"{usb}/storage/uas.ko.zst": zstd,
            f"{usb}/misc/usbtest.ko.gz": gzip.compress(b"gz"),
            f"{prefix}/6.12-amd64/kernel/drivers/gpu/big.ko": b"not kept",
        },
    )
    folder = tmp_path / "kernel"
    (folder / "modules").mkdir(parents=True)
    guest_kernel._unpack_kernel(package, folder)
    assert (folder / "kernel").read_bytes() == b"kernel"
    assert Kernel(folder).release == "6.12-amd64"
    assert (folder / "builtin").read_text() == "crc16\nusb_common"
    modules = {file.name: file.read_bytes() for file in (folder / "modules").iterdir()}
    assert modules == {"xhci_pci.ko": b"plain", "usbcore.ko": b"xz", "uas.ko": b"zst", "usbtest.ko": b"gz"}


def test_damaged_packages_are_refused(tmp_path: Path) -> None:
    package = make_package(
        tmp_path,
        {
            "boot/vmlinuz-6.12-amd64": b"kernel",
            "lib/modules/6.12-amd64/kernel/lib/a.ko.xz": b"not xz",
            "z": bytes(5000),
        },
    )
    good = package.read_bytes()
    (tmp_path / "modules").mkdir()
    for content in (good, good[: len(good) // 2], b"no package", b""):
        package.write_bytes(content)
        with pytest.raises(SetupError, match=r"cannot unpack the package k.deb: "):
            guest_kernel._unpack_kernel(package, tmp_path)


def _fake_download(work: Path, folder: Path) -> None:
    with (work.parent / "downloads").open("a") as log:
        log.write("x")
    time.sleep(0.3)
    folder.mkdir()
    (folder / "kernel").write_text("kernel")


def _fetch() -> None:
    guest_kernel._download_kernel = _fake_download
    assert fetch_kernel().image.read_text() == "kernel"


def test_processes_at_the_same_time_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    workers = [multiprocessing.get_context("spawn").Process(target=_fetch) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    folder = tmp_path / "farplug/guest"
    assert (folder / "downloads").read_text() == "x"
    assert sorted(path.name for path in folder.iterdir()) == [guest_kernel.LAYOUT, "downloads", "lock"]


def test_failed_fetch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(guest_kernel, "resolve_kernel_packages", lambda _: ["no-such-package-anywhere"])
    with pytest.raises(SetupError, match="apt-get cannot download no-such-package-anywhere: E: ") as error:
        fetch_kernel()
    assert error.value.reason is Reason.UNREACHABLE
    assert [path.name for path in (tmp_path / "farplug/guest").iterdir()] == ["lock"]


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SetupError, match=r"cannot store the kernel in .*Not a directory") as error:
        fetch_kernel()
    assert error.value.reason is Reason.IO_ERROR


def test_other_architectures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(SetupError, match="this machine is aarch64"):
        fetch_kernel()


def test_the_size_of_a_download() -> None:
    records = "Package: a\nInstalled-Size: 400000\nSize: 70000000\n\nPackage: b\nSize: 550672\nDescription: Size: 5\n"
    assert guest_kernel.parse_sizes(records) == 70550672
    assert guest_kernel.parse_sizes("") == 0


def test_a_kernel_that_is_there_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = guest_kernel.Kernel(guest_kernel.cache_folder() / guest_kernel.LAYOUT)
    monkeypatch.setattr(guest_kernel, "_package_dependencies", lambda package: None)
    with pytest.raises(SetupError):
        guest_kernel.download_size()
    kernel.image.parent.mkdir(parents=True)
    kernel.image.touch()
    assert guest_kernel.download_size() == 0
