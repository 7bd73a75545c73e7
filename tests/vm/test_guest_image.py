from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from tests.vm.elf import module

from farplug.errors import SetupError
from farplug.programs import find_program
from farplug.vm.guest_image import (
    BOOT_MODULES,
    PYTHON,
    Initramfs,
    add_modules,
    add_program,
    add_python,
    build_initramfs,
    parse_ldd,
)
from farplug.vm.guest_kernel import Kernel, ModuleInfo


def unpack(archive: bytes, folder: Path) -> None:
    """Unpack with another implementation of the format."""
    command = [str(find_program("busybox")), "cpio", "-i", "-d", "-m"]
    folder.mkdir()
    subprocess.run(command, cwd=folder, input=archive, capture_output=True, check=True)


def test_archive_is_what_cpio_unpacks(tmp_path: Path) -> None:
    image = Initramfs()
    for size in range(5):
        image.add_file(f"/deep/er/{'x' * size}file", b"a" * size, 0o750)
    image.add_link("/bin/sh", "busybox")
    image.add_folder("/empty", 0o700)
    image.add_file("/empty/../late", b"old")
    image.add_file("/empty/../late", b"new", mtime=1_700_000_000)
    unpack(bytes(image), tmp_path / "out")
    for size in range(5):
        file = tmp_path / "out/deep/er" / f"{'x' * size}file"
        assert file.read_bytes() == b"a" * size
        assert file.stat().st_mode == 0o100750
    assert os.readlink(tmp_path / "out/bin/sh") == "busybox"
    assert (tmp_path / "out/empty").stat().st_mode == 0o040700
    assert (tmp_path / "out/late").read_bytes() == b"new"
    assert (tmp_path / "out/late").stat().st_mtime == 1_700_000_000


def test_ldd_output() -> None:
    output = """\
\tlinux-vdso.so.1 (0x00007f63c90f3000)
\tlibext2fs.so.2 => /lib/x86_64-linux-gnu/libext2fs.so.2 (0x00007f63c9052000)
\tlibnone.so.1 => not found
\t/lib64/ld-linux-x86-64.so.2 (0x00007f63c90f5000)
"""
    assert parse_ldd(output) == [Path("/lib/x86_64-linux-gnu/libext2fs.so.2"), Path("/lib64/ld-linux-x86-64.so.2")]
    assert parse_ldd("\tnot a dynamic executable\n") == []


def test_python_runs_from_what_is_in_the_image(tmp_path: Path) -> None:
    image = Initramfs()
    add_python(image)
    unpack(bytes(image), tmp_path / "out")
    root = f"{tmp_path}/out"
    assert os.readlink(root + str(PYTHON)) == str(PYTHON.resolve())
    library = next(path.removesuffix("/os.py") for path in image.paths if path.endswith("/os.py"))
    assert not any(path.startswith((f"{library}/test/", f"{library}/idlelib/")) for path in image.paths)
    assert any(path.rpartition("/")[2].startswith("libffi") for path in image.paths)  # for ctypes
    script = f"import sys; sys.path[:] = ['{root}{library}', '{root}{library}/lib-dynload']\n"
    script += "import _ctypes, ctypes, json; print(json.__file__, _ctypes.__file__)"
    result = subprocess.run([PYTHON, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert all(path.startswith(root) for path in result.stdout.split()), result.stdout
    # Python compares it with the time in the compiled file.
    source = Path(f"{root}{library}/json/__init__.py")
    assert int(source.stat().st_mtime) == int(Path(f"{library}/json/__init__.py").stat().st_mtime)


def test_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farplug.vm.guest_image.PYTHON", Path("/nonexistent/python3"))
    with pytest.raises(SetupError, match="/nonexistent/python3 is not installed") as caught:
        add_python(Initramfs())
    assert caught.value.remedy.command == "sudo apt-get install python3"


def test_program_brings_its_libraries(tmp_path: Path) -> None:
    image = Initramfs()
    mke2fs = find_program("mke2fs")
    add_program(image, mke2fs)
    assert str(mke2fs) in image.paths
    assert any(path.rpartition("/")[2].startswith("ld-linux") for path in image.paths)
    assert any("libext2fs" in path for path in image.paths)


def test_module_tables(tmp_path: Path) -> None:
    image = Initramfs()
    modules = {
        "c": ModuleInfo.parse(module()),
        "b": ModuleInfo.parse(module("c")),
        "a": ModuleInfo.parse(module("b,c,builtin", "fs-a", "x*")),
    }
    add_modules(image, "6.1", modules)
    unpack(bytes(image), tmp_path / "out")
    folder = tmp_path / "out/lib/modules/6.1"
    assert (folder / "modules.dep").read_text() == "c.ko:\nb.ko: c.ko\na.ko: b.ko c.ko\n"
    assert (folder / "modules.alias").read_text() == "alias fs-a a\nalias x* a\n"
    assert (folder / "a.ko").read_bytes() == modules["a"].content


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    folder = tmp_path / "kernel"
    (folder / "modules").mkdir(parents=True)
    (folder / "release").write_text("6.1")
    (folder / "builtin").write_text("virtio_pci")
    for name in ("extra", *BOOT_MODULES[1:]):
        (folder / "modules" / f"{name}.ko").write_bytes(module())
    return Kernel(folder)


def test_image(tmp_path: Path, kernel: Kernel) -> None:
    (tmp_path / "data").write_text("mine")
    archive = build_initramfs(
        kernel,
        init_files={"/etc/start": b"#!/bin/sh\n"},
        modules=["extra"],
        programs=["true"],
        files=[("/root/data", tmp_path / "data")],
    )
    unpack(archive, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "etc/modules").read_text() == " ".join([*BOOT_MODULES[1:], "extra"])
    assert (out / "root/data").read_text() == "mine"
    assert os.access(out / "etc/start", os.X_OK)
    assert os.readlink(out / "init").endswith("/busybox")
    assert os.readlink(out / "bin/sh").endswith("/dash")
    assert (out / str(find_program("true")).lstrip("/")).is_file()
    links = [path for path in out.rglob("mke2fs") if path.is_symlink()]
    assert not links, "busybox's own mke2fs would hide the real one"


def test_missing_parts_are_refused(kernel: Kernel) -> None:
    for arguments, message in (
        ({"modules": ["none_such"]}, "has no module none_such, which the guest needs"),
        ({"programs": ["none-such"]}, "the program none-such is not installed"),
        ({"files": [("/x", Path("/none/such"))]}, "cannot copy /none/such into the guest: No such file"),
    ):
        with pytest.raises(SetupError, match=message):
            build_initramfs(kernel, init_files={}, **arguments)
