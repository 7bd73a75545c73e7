"""Fetch the throw-away guest's kernel, the distribution's own, and cache it.

The kernel and its modules come from the distribution's packages, fetched with ``apt-get download`` (no root, nothing is
installed) and kept in ``$XDG_CACHE_HOME/farplug/guest/<layout>``; delete that folder to fetch a newer kernel.

Tested with Debian's packages and Ubuntu's (split into linux-modules packages, modules compressed with zstd).
"""

from __future__ import annotations

import gzip
import logging
import lzma
import os
import platform
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from farplug.errors import Reason, Remedy, SetupError
from farplug.programs import child_environment, find_program, output_of
from farplug.shell import shell_word

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

LAYOUT = "4-x86_64"
"""Name of the cache folder: it changes when the set of files that are kept changes."""

KERNEL_PACKAGES = ("linux-image-amd64", "linux-image-generic")
"""Metapackages that depend on the newest kernel: Debian's, Ubuntu's."""

KEPT_TREES = (
    "arch/x86/crypto/",
    "crypto/",
    "drivers/cdrom/",
    "drivers/gpu/drm/tiny/",
    "drivers/gpu/drm/ttm/",
    "drivers/gpu/drm/virtio/",
    "drivers/hid/",
    "drivers/input/",
    "drivers/media/common/videobuf2/",
    "drivers/media/mc/",
    "drivers/media/usb/uvc/",
    "drivers/media/v4l2-core/",
    "drivers/net/usb/",
    "drivers/usb/",
    "drivers/virtio/",
    "fs/9p/",
    "fs/configfs/",
    "fs/exfat/",
    "fs/ext4/",
    "fs/fat/",
    "fs/fscache/",
    "fs/fuse/",
    "fs/isofs/",
    "fs/jbd2/",
    "fs/netfs/",
    "fs/nls/",
    "fs/overlayfs/",
    "fs/udf/",
    "lib/",
    "net/9p/",
    "sound/core/",
    "sound/usb/",
)
"""Folders of modules that are kept, with their subfolders."""

KEPT_FOLDERS = (
    *("block", "drivers/block", "drivers/char", "drivers/gpu/drm", "drivers/media/common", "drivers/net"),
    *("drivers/scsi", "fs", "net/core", "sound"),
)
"""Folders of modules that are kept, without their subfolders."""

_CONCRETE_KERNEL_PACKAGE = re.compile(r"linux-(image|binary|modules|modules-extra)-\d")
_MODULE_PATH = re.compile(
    r"^(?:\./)?(?:usr/)?lib/modules/(?P<release>[^/]+)/kernel/(?P<path>.+)\.ko(?P<packed>\.\w+)?$"
)
_KERNEL_PATH = re.compile(r"^(?:\./)?(?:boot/vmlinuz-(?P<boot>[^/]+)|(?:usr/)?lib/modules/(?P<modules>[^/]+)/vmlinuz)$")
_BUILTIN_PATH = re.compile(r"^(?:\./)?(?:usr/)?lib/modules/[^/]+/modules\.builtin$")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and its modules, unpacked.

    Attributes:
        folder: contains ``kernel``, ``release``, ``builtin`` (names, one per line) and ``modules/<name>.ko``.
    """

    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "kernel"

    @property
    def release(self) -> str:
        """Return the kernel release, as ``uname -r`` prints it in the guest."""
        return (self.folder / "release").read_text().strip()

    def module_closure(self, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, ModuleInfo]:
        """Return these modules and their dependencies, each module after its dependencies.

        Modules that are built into the kernel are left out, and so are optional modules that the kernel does not have.

        Raises:
            SetupError: a module is not in the kernel, or is not one of those that are kept.
        """
        builtin = frozenset((self.folder / "builtin").read_text().split())
        closure: dict[str, ModuleInfo] = {}

        def add(name: str, needed_by: str) -> None:
            if name in closure or name in builtin:
                return
            try:
                content = (self.folder / "modules" / f"{name}.ko").read_bytes()
            except FileNotFoundError:
                remove = f"rm -r {shell_word(self.folder)}"
                raise SetupError(
                    f"kernel {self.release} has no module {name}, which {needed_by} needs",
                    reason=Reason.NOT_FOUND,
                    remedy=Remedy("remove the cached kernel: the newest one is fetched then", command=remove),
                ) from None
            info = ModuleInfo.parse(content)
            for dependency in info.depends:
                add(dependency, needed_by=f"the module {name}")
            closure[name] = info

        for name in map(module_name, required):
            add(name, needed_by="the guest")
        for name in map(module_name, optional):
            if (self.folder / "modules" / f"{name}.ko").exists():
                add(name, needed_by="the guest")
        return closure


def module_name(name: str) -> str:
    """Return a module's name as the kernel spells it: ``xhci-pci`` becomes ``xhci_pci``."""
    return name.replace("-", "_")


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """The ``.modinfo`` section of a kernel module.

    Attributes:
        content: the whole module file.
        depends: names of the modules that the module needs.
        aliases: patterns by which the kernel requests the module, such as ``fs-ext4``.
    """

    content: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]

    @classmethod
    def parse(cls, content: bytes) -> ModuleInfo:
        """Parse a module file (ELF, 64 bits, little endian).

        Raises:
            SetupError: the file is not a kernel module.
        """
        try:
            section = elf_section(content, ".modinfo")
        except (struct.error, ValueError) as error:
            raise SetupError(f"not a kernel module: {error}", reason=Reason.NOT_A_FILE) from error
        pairs = [entry.partition("=") for entry in section.decode("latin-1").split("\0") if entry]
        return cls(
            content,
            depends=tuple(
                module_name(name) for key, _, value in pairs if key == "depends" for name in value.split(",") if name
            ),
            aliases=tuple(value for key, _, value in pairs if key == "alias"),
        )


def elf_section(content: bytes, name: str) -> bytes:
    """Return a section of a 64-bit little-endian ELF file (System V ABI, "Sections").

    Raises:
        ValueError, struct.error: not such a file, or the section does not exist.
    """
    if content[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF header")
    (table,) = struct.unpack_from("<Q", content, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", content, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", content, table + size * index) for index in range(count)]
    if names_index >= count:
        raise ValueError(f"section {names_index} of {count}")
    names = headers[names_index][4]
    wanted = name.encode() + b"\0"
    for name_offset, _, _, _, offset, length in headers:
        if content.startswith(wanted, names + name_offset):
            return content[offset : offset + length]
    raise ValueError(f"no section {name}")


def cache_folder() -> Path:
    """Return the cache folder for the guests' kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "farplug" / "guest"


def fetch_kernel() -> Kernel:
    """Return the cached kernel; fetch it first if there is none.

    Blocks: up to a minute the first time, else milliseconds. Processes that call this at the same time share one
    download.

    Raises:
        SetupError: the kernel cannot be fetched on this machine.
    """
    folder = cache_folder() / LAYOUT
    kernel = Kernel(folder)
    if kernel.image.exists():
        return kernel
    if platform.machine() not in ("x86_64", "AMD64"):
        raise SetupError(
            f"the throw-away VM needs an x86_64 machine; this machine is {platform.machine()}",
            reason=Reason.MISSING_PROGRAM,
        )
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        find_program(program)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / "lock"):
            if kernel.image.exists():
                return kernel
            with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder.parent) as work:
                unpacked = Path(work) / "kernel"
                _download_kernel(Path(work), unpacked)
                unpacked.rename(folder)
    except OSError as error:
        raise SetupError(f"cannot store the kernel in {folder}: {error}", reason=Reason.IO_ERROR) from error
    return kernel


def download_size() -> int:
    """Return the size that :func:`fetch_kernel` downloads, in bytes: 0 if the kernel is cached, or its size is unknown.

    Raises:
        SetupError: the package lists contain no kernel.
    """
    if Kernel(cache_folder() / LAYOUT).image.exists():
        return 0
    packages = resolve_kernel_packages(_package_dependencies)
    return parse_sizes(output_of("apt-cache", "show", "--no-all-versions", *packages) or "")


def parse_sizes(records: str) -> int:
    """Return the total download size of packages, in bytes, from their records (deb-control(5), field Size)."""
    return sum(map(int, re.findall(r"^Size: (\d+)$", records, re.MULTILINE)))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download_kernel(work: Path, folder: Path) -> None:
    packages = resolve_kernel_packages(_package_dependencies)
    log.info("fetching the guest's kernel: %s", " ".join(packages))
    result = subprocess.run(
        ["apt-get", "download", "-q", *packages],
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=child_environment(),
    )
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        raise SetupError(
            f"apt-get cannot download {' '.join(packages)}: {' '.join(errors) or result.stderr.strip()[-300:]}",
            reason=Reason.UNREACHABLE,
            remedy=Remedy(command="sudo apt-get update"),
        )
    (folder / "modules").mkdir(parents=True)
    for package in sorted(work.glob("*.deb")):
        _unpack_kernel(package, folder)
    if not all((folder / name).exists() for name in ("kernel", "release", "builtin")):
        raise SetupError(f"the packages {' '.join(packages)} do not contain a complete kernel", reason=Reason.NOT_FOUND)


def resolve_kernel_packages(dependencies_of: Callable[[str], list[str] | None]) -> list[str]:
    """Return the names of the packages with the distribution's newest kernel and its modules.

    Args:
        dependencies_of: returns the dependencies of a package; None if there is no such package.

    Raises:
        SetupError: the package lists contain no kernel.
    """
    for name in KERNEL_PACKAGES:
        dependencies = dependencies_of(name)
        if dependencies is None:
            continue
        concrete: list[str] = []
        queue = list(dependencies)
        while queue:
            package = queue.pop(0)
            if package not in concrete and _CONCRETE_KERNEL_PACKAGE.match(package):
                concrete.append(package)
                queue += dependencies_of(package) or []
        if concrete:
            return concrete
    raise SetupError(
        f"the package lists of this machine contain no kernel ({', '.join(KERNEL_PACKAGES)})",
        reason=Reason.NOT_FOUND,
        remedy=Remedy(command="sudo apt-get update"),
    )


def _package_dependencies(package: str) -> list[str] | None:
    output = output_of("apt-cache", "depends", package)
    return None if output is None else re.findall(r"^[ |]*Depends: ([^<\s]+)", output, re.MULTILINE)


def _unpack_kernel(package: Path, folder: Path) -> None:
    """Extract the kernel and the modules to keep from a package. No path inside the package is used as a file name.

    Raises:
        SetupError: the package is damaged, or the disk is full.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment()
        ) as process:
            assert process.stdout is not None
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isreg() else None
                    if content is not None:
                        _keep(member.name, content, folder)
            # Read what follows the archive's end mark, or dpkg-deb dies of SIGPIPE.
            while process.stdout.read(1 << 16):
                pass
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, command)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, subprocess.CalledProcessError) as error:
        raise SetupError(f"cannot unpack the package {package.name}: {error}", reason=Reason.IO_ERROR) from error


def _keep(name: str, content: IO[bytes], folder: Path) -> None:
    """Store a file of a package, if a guest needs it."""
    if match := _MODULE_PATH.match(name):
        if is_kept(match["path"]):
            module = module_name(match["path"].rpartition("/")[2])
            (folder / "modules" / f"{module}.ko").write_bytes(decompress(content.read(), match["packed"] or ""))
    elif match := _KERNEL_PATH.match(name):
        (folder / "kernel").write_bytes(bootable_kernel(content.read()))
        (folder / "release").write_text(match["boot"] or match["modules"])
    elif _BUILTIN_PATH.match(name):
        paths = content.read().decode().split()
        names = (module_name(path.rpartition("/")[2].removesuffix(".ko")) for path in paths)
        (folder / "builtin").write_text("\n".join(sorted(names)))


def is_kept(path: str) -> bool:
    """Return whether a module is kept, by its path below ``kernel/``."""
    return path.startswith(KEPT_TREES) or path.rpartition("/")[0] in KEPT_FOLDERS


def bootable_kernel(image: bytes) -> bytes:
    """Return the kernel in the form that boots fastest: a bzImage takes 3 s more under emulation, to decompress itself.

    QEMU boots an uncompressed kernel through its PVH entry, which an ELF note announces (Xen,
    include/public/elfnote.h). An image that does not contain such a kernel (Linux, Documentation/arch/x86/boot.rst) is
    returned unchanged.
    """
    if image[0x202:0x206] != b"HdrS":
        return image
    start = 512 * ((image[0x1F1] or 4) + 1) + int.from_bytes(image[0x248:0x24C], "little")
    payload = image[start : start + int.from_bytes(image[0x24C:0x250], "little")]
    for magic, suffix in _PAYLOADS.items():
        if payload.startswith(magic):
            # The uncompressed size follows the compressed data.
            kernel = decompress(payload[:-4], suffix)
            return kernel if _has_pvh_entry(kernel) else image
    return image


_PAYLOADS = {b"\xfd7zXZ\0": ".xz", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_PVH_NOTE = struct.pack("<III4s", 4, 8, 18, b"Xen\0")


def _has_pvh_entry(kernel: bytes) -> bool:
    try:
        return _PVH_NOTE in elf_section(kernel, ".notes")
    except (struct.error, ValueError):
        return False


def decompress(content: bytes, suffix: str) -> bytes:
    """Decompress a module or a kernel. Debian 13 compresses modules with xz, Ubuntu with zstd.

    Raises:
        SetupError: the suffix is unknown, or the program ``zstd`` is not installed.
    """
    match suffix:
        case "":
            return content
        case ".xz":
            return lzma.decompress(content)
        case ".gz":
            return gzip.decompress(content)
        case ".zst":
            command = [str(find_program("zstd")), "-dcq"]
            result = subprocess.run(command, input=content, capture_output=True, check=True, env=child_environment())
            return result.stdout
        case _:
            raise SetupError(f"unknown compression {suffix}", reason=Reason.NOT_FOUND)
