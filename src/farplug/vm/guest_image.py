"""Build the throw-away guest's initramfs from programs of this machine and the kernel's modules."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from farplug.errors import Reason, Remedy, SetupError
from farplug.programs import find_program, output_of
from farplug.vm.guest_kernel import Kernel, ModuleInfo, module_name

BOOT_MODULES = (
    "virtio_pci",
    "virtio_console",
    "xhci_pci",
    "ehci_pci",
    "uhci_hcd",
    "usb_storage",
    "uas",
    "sd_mod",
    "sr_mod",
)
"""Modules that are loaded before the first command runs."""

ON_DEMAND_MODULES = (
    "ext4",
    "vfat",
    "exfat",
    "isofs",
    "udf",
    "nls_cp437",
    "nls_iso8859_1",
    "nls_ascii",
    "nls_utf8",
    "sg",
    "usbtest",
    # Gadgets and USB/IP, for a guest that redirects its own devices; Ubuntu's kernel has no dummy_hcd.
    "dummy_hcd",
    "usb_f_acm",
    "usb_f_hid",
    "usb_f_mass_storage",
    "usb_f_ncm",
    "usb_f_ss_lb",
    "usbip_host",
    "vhci_hcd",
    # Requested by sd_mod and ext4 through an alias, which "depends" does not list.
    "crc64_rocksoft_generic",
    "crct10dif_generic",
    "crc32c_generic",
)
"""Modules in the image, if the kernel has them; the kernel loads them on demand, or the caller with modprobe."""

PROGRAMS = ("dash", "mke2fs", "e2fsck", "mkfs.vfat", "fsck.vfat", "lsusb")

PYTHON = Path("/usr/bin/python3")
"""The distribution's Python: another one may need more than the folder of its standard library."""

PYTHON_LEFT_OUT = frozenset(
    {"dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo"}
)
"""Folders of the standard library that no script in a guest imports, or that are only used to build Python."""

_LIBRARY = re.compile(r"(?:=>\s+|^\s*)(/\S+)\s+\(0x")


class Initramfs:
    """A cpio archive in the "newc" form (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

    Entries are stored by absolute path: a later one replaces an earlier one. Parent folders are added automatically.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, int, bytes]] = {}

    @property
    def paths(self) -> frozenset[str]:
        """Return the paths of all entries."""
        return frozenset(self._entries)

    def add_folder(self, path: str, mode: int = 0o755) -> None:
        """Add an empty folder."""
        self._add(path, 0o040000 | mode, b"")

    def add_file(self, path: str, content: bytes, mode: int = 0o644, *, mtime: int = 0) -> None:
        """Add a regular file; ``mtime`` is its modification time, in seconds since 1970."""
        self._add(path, 0o100000 | mode, content, mtime)

    def add_link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, 0o120777, target.encode())

    def _add(self, path: str, mode: int, content: bytes, mtime: int = 0) -> None:
        parent = path.rpartition("/")[0]
        if parent and parent not in self._entries:
            self.add_folder(parent)
        self._entries[path] = (mode, mtime, content)

    def __bytes__(self) -> bytes:
        archive = bytearray()
        entries = [(path.lstrip("/"), *entry) for path, entry in self._entries.items()]
        for inode, (name, mode, mtime, content) in enumerate([*entries, ("TRAILER!!!", 0, 0, b"")], start=1):
            encoded = name.encode() + b"\0"
            links = 2 if mode & 0o040000 else 1
            fields = (inode, mode, 0, 0, links, mtime, len(content), 0, 0, 0, 0, len(encoded), 0)
            archive += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
            archive += bytes(-len(archive) % 4)
            archive += content
            archive += bytes(-len(archive) % 4)
        return bytes(archive)


def add_program(image: Initramfs, program: Path) -> None:
    """Add a program of this machine, under its own path, with the shared libraries that it needs."""
    image.add_file(str(program), program.read_bytes(), 0o755)
    add_libraries(image, program)


def add_libraries(image: Initramfs, *files: Path) -> None:
    """Add the shared libraries that programs, or other shared objects, need."""
    for library in shared_libraries(*files):
        if str(library) not in image.paths:
            image.add_file(str(library), library.read_bytes(), 0o755)


def add_python(image: Initramfs) -> None:
    """Add the distribution's Python and its standard library, as ``python3``.

    Raises:
        SetupError: it is not installed.
    """
    if not PYTHON.exists():
        raise SetupError(
            f"{PYTHON} is not installed",
            reason=Reason.MISSING_PROGRAM,
            remedy=Remedy(command="sudo apt-get install python3"),
        )
    folder = Path((output_of(str(PYTHON), "-I", "-c", "import os; print(os.__file__)") or "").strip()).parent
    program = PYTHON.resolve()
    add_program(image, program)
    image.add_link(str(PYTHON), str(program))
    extensions = []
    for file in folder.rglob("*"):
        name = file.relative_to(folder).parts[0]
        if name in PYTHON_LEFT_OUT or name.startswith("config-") or not file.is_file():
            continue
        # Python compares the modification time with the one in the compiled file, to see whether that is still valid.
        image.add_file(str(file), file.read_bytes(), mtime=int(file.stat().st_mtime))
        if file.suffix == ".so":
            extensions.append(file)
    add_libraries(image, *extensions)


def shared_libraries(*files: Path) -> list[Path]:
    """Return the shared libraries that programs load, including the dynamic loader; none for a static program."""
    return list(dict.fromkeys(parse_ldd(output_of("ldd", *map(str, files)) or "")))


def parse_ldd(output: str) -> list[Path]:
    """Return the paths in the output of ``ldd``."""
    return [Path(match[1]) for line in output.splitlines() if (match := _LIBRARY.search(line))]


def add_busybox(image: Initramfs) -> None:
    """Add busybox, and a link for each of its commands that the image does not have yet."""
    busybox = find_program("busybox")
    add_program(image, busybox)
    taken = {path.rpartition("/")[2] for path in image.paths}
    for command in (output_of(str(busybox), "--list-full") or "").split():
        if command.rpartition("/")[2] not in taken:
            image.add_link(f"/{command}", str(busybox))
    image.add_link("/init", str(busybox))


def add_modules(image: Initramfs, release: str, modules: Mapping[str, ModuleInfo]) -> None:
    """Add modules, and the files that modprobe reads: ``modules.dep`` and ``modules.alias``."""
    folder = f"/lib/modules/{release}"
    dependencies: dict[str, list[str]] = {}
    for name, info in modules.items():
        needed: list[str] = []
        for direct in info.depends:
            needed += [
                item for item in (*dependencies.get(direct, []), direct) if item in modules and item not in needed
            ]
        dependencies[name] = needed
        image.add_file(f"{folder}/{name}.ko", info.content)
    # modprobe loads the list from right to left.
    lines = [
        f"{name}.ko: {' '.join(f'{item}.ko' for item in reversed(needed))}".rstrip()
        for name, needed in dependencies.items()
    ]
    image.add_file(f"{folder}/modules.dep", "\n".join([*lines, ""]).encode())
    aliases = [f"alias {alias} {name}" for name, info in modules.items() for alias in info.aliases]
    image.add_file(f"{folder}/modules.alias", "\n".join([*aliases, ""]).encode())


def build_initramfs(
    kernel: Kernel,
    *,
    init_files: Mapping[str, bytes],
    modules: Sequence[str] = (),
    programs: Sequence[str] = (),
    python: bool = False,
    files: Sequence[tuple[str, Path]] = (),
) -> bytes:
    """Build the guest's initramfs.

    Blocks for about 0.1 s; longer with Python, or with programs that need many libraries.

    Args:
        kernel: the source of the modules.
        init_files: content of the files that boot the guest, by path; all are executable, and ``/etc/inittab`` is for
            busybox's init.
        modules: modules to load at boot in addition to :data:`BOOT_MODULES`.
        programs: programs of this machine to add to :data:`PROGRAMS`.
        python: add Python and its standard library.
        files: pairs of a path in the guest and a file on this machine.

    Raises:
        SetupError: a program, a file or a module is missing.
    """
    image = Initramfs()
    for folder in ("/dev", "/proc", "/sys", "/run", "/mnt", "/root", "/tmp"):
        image.add_folder(folder)
    for program in (*PROGRAMS, *programs):
        add_program(image, find_program(program))
    if python:
        add_python(image)
    mke2fs = str(find_program("mke2fs"))
    for name in ("mkfs.ext2", "mkfs.ext4"):
        image.add_link(f"/sbin/{name}", mke2fs)
    defaults = Path("/etc/mke2fs.conf")
    if defaults.exists():
        image.add_file(str(defaults), defaults.read_bytes())
    # The filesystems that mount tries if no type is given; the kernel loads their modules.
    image.add_file("/etc/filesystems", b"ext4\nvfat\nexfat\niso9660\nudf\n")
    # Not busybox's shell, which prefers its own commands to programs of the same name, such as mke2fs.
    image.add_link("/bin/sh", str(find_program("dash")))
    add_busybox(image)
    boot_modules = (*BOOT_MODULES, *modules)
    closure = kernel.module_closure(boot_modules, ON_DEMAND_MODULES)
    add_modules(image, kernel.release, closure)
    loaded = [name for name in map(module_name, boot_modules) if name in closure]
    image.add_file("/etc/modules", " ".join(loaded).encode())
    for path, content in init_files.items():
        image.add_file(path, content, 0o755)
    for path, source in files:
        try:
            image.add_file(path, source.read_bytes(), 0o755 if os.access(source, os.X_OK) else 0o644)
        except OSError as error:
            raise SetupError(
                f"cannot copy {source} into the guest: {error.strerror}", reason=Reason.NOT_FOUND
            ) from error
    return bytes(image)
