"""The throw-away guest's kernel: the distribution's, fetched once and cached.

The kernel and its modules come from the distribution's packages, fetched with ``apt-get download`` (no root, nothing is
installed) and kept in ``$XDG_CACHE_HOME/farplug/guest/<layout>``; delete that folder to fetch a newer kernel.

Tested with Debian's packages and Ubuntu's (split into linux-modules packages, modules packed with zstd).
"""

from __future__ import annotations

import fcntl
import gzip
import logging
import lzma
import os
import platform
import re
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from farplug.errors import Reason, SetupError
from farplug.programs import find_program, output_of
from farplug.shell import shell_word

log = logging.getLogger(__name__)

LAYOUT = "3-x86_64"
"""Name of the cache folder: changes when what is kept of the packages changes."""

KERNEL_PACKAGES = ("linux-image-amd64", "linux-image-generic")
"""Names that lead to the newest kernel: Debian's, Ubuntu's."""

KEPT_TREES = (
    "arch/x86/crypto/",
    "crypto/",
    "drivers/cdrom/",
    "drivers/hid/",
    "drivers/input/",
    "drivers/media/mc/",
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
"""Folders of modules kept with all that is below them."""

KEPT_FOLDERS = ("block", "drivers/block", "drivers/char", "drivers/net", "drivers/scsi", "fs", "net/core", "sound")
"""Folders of which only the modules directly inside are kept."""

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
        folder: holds ``kernel``, ``release``, ``builtin`` (names, one a line) and ``modules/<name>.ko``.
    """

    folder: Path

    @property
    def image(self) -> Path:
        return self.folder / "kernel"

    @property
    def release(self) -> str:
        """What ``uname -r`` says in the guest."""
        return (self.folder / "release").read_text().strip()

    def module_closure(self, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, ModuleInfo]:
        """The named modules and all that they depend on, every one after those that it needs.

        What is built into the kernel is left out; so are optional modules that the kernel does not have.

        Raises:
            SetupError: the kernel has no such module, or it is not among the kept ones.
        """
        builtin = frozenset((self.folder / "builtin").read_text().split())
        closure: dict[str, ModuleInfo] = {}

        def add(name: str, wanted_by: str) -> None:
            if name in closure or name in builtin:
                return
            try:
                content = (self.folder / "modules" / f"{name}.ko").read_bytes()
            except FileNotFoundError:
                raise SetupError(
                    f"kernel {self.release} has no module {name}, which {wanted_by} needs",
                    reason=Reason.NOT_FOUND,
                    remedy=f"rm -r {shell_word(self.folder)}    # then the newest kernel is fetched",
                ) from None
            info = ModuleInfo.parse(content)
            for dependency in info.depends:
                add(dependency, wanted_by=f"the module {name}")
            closure[name] = info

        for name in map(module_name, required):
            add(name, wanted_by="the guest")
        for name in map(module_name, optional):
            if (self.folder / "modules" / f"{name}.ko").exists():
                add(name, wanted_by="the guest")
        return closure


def module_name(name: str) -> str:
    """The kernel's spelling of a module's name: ``xhci-pci`` is ``xhci_pci``."""
    return name.replace("-", "_")


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """What a module's ``.modinfo`` section says.

    Attributes:
        content: the whole module file.
        depends: names of the modules that it needs.
        aliases: patterns under which the kernel asks for it, such as ``fs-ext4``.
    """

    content: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]

    @classmethod
    def parse(cls, content: bytes) -> ModuleInfo:
        """Parse a module file (ELF, 64 bits, little endian).

        Raises:
            SetupError: it is not one.
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
    """A section of an ELF file of 64 bits, little endian (System V ABI, "Sections").

    Raises:
        ValueError, struct.error: no such file, or no such section.
    """
    if content[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no 64-bit little-endian ELF header")
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
    """Where guests' kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "farplug" / "guest"


def fetch_kernel() -> Kernel:
    """The cached kernel, fetched first if there is none. Blocks: up to a minute the first time, else milliseconds.

    Processes that ask at the same time wait for the first one's download.

    Raises:
        SetupError: it cannot be fetched here.
    """
    folder = cache_folder() / LAYOUT
    kernel = Kernel(folder)
    if kernel.image.exists():
        return kernel
    if platform.machine() not in ("x86_64", "AMD64"):
        raise SetupError(
            f"the guest is made of this machine's programs and an x86_64 kernel; this machine is {platform.machine()}",
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
        raise SetupError(f"no kernel can be kept in {folder}: {error}", reason=Reason.IO_ERROR) from error
    return kernel


def download_size() -> int:
    """How many bytes :func:`fetch_kernel` is going to download: 0 if the kernel is there, or nobody knows its size.

    Raises:
        SetupError: the package lists name no kernel.
    """
    if Kernel(cache_folder() / LAYOUT).image.exists():
        return 0
    packages = resolve_kernel_packages(_package_dependencies)
    return parse_sizes(output_of("apt-cache", "show", "--no-all-versions", *packages) or "")


def parse_sizes(records: str) -> int:
    """Bytes to download for packages, by their records (deb-control(5), field Size)."""
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
        ["apt-get", "download", "-q", *packages], cwd=work, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        raise SetupError(
            f"apt-get cannot download {' '.join(packages)}: {' '.join(errors) or result.stderr.strip()[-300:]}",
            reason=Reason.UNREACHABLE,
            remedy="sudo apt-get update",
        )
    (folder / "modules").mkdir(parents=True)
    for package in sorted(work.glob("*.deb")):
        _unpack_kernel(package, folder)
    if not all((folder / name).exists() for name in ("kernel", "release", "builtin")):
        raise SetupError(f"no complete kernel in {' '.join(packages)}", reason=Reason.NOT_FOUND)


def resolve_kernel_packages(dependencies_of: Callable[[str], list[str] | None]) -> list[str]:
    """Packages that hold the distribution's newest kernel and its modules.

    Args:
        dependencies_of: the dependencies of a package; None if there is no such package.

    Raises:
        SetupError: the package lists name no kernel.
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
        f"the package lists of this machine name no kernel ({', '.join(KERNEL_PACKAGES)})",
        reason=Reason.NOT_FOUND,
        remedy="sudo apt-get update",
    )


def _package_dependencies(package: str) -> list[str] | None:
    output = output_of("apt-cache", "depends", package)
    return None if output is None else re.findall(r"^[ |]*Depends: ([^<\s]+)", output, re.MULTILINE)


def _unpack_kernel(package: Path, folder: Path) -> None:
    """Take the kernel and the kept modules out of a package. Of the names inside only plain ones become file names.

    Raises:
        SetupError: it is damaged, or there is no room.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isreg() else None
                    if content is not None:
                        _keep(member.name, content, folder)
            # What follows the archive's end mark: unread, it would kill dpkg-deb by SIGPIPE.
            while process.stdout.read(1 << 16):
                pass
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, command)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, subprocess.CalledProcessError) as error:
        raise SetupError(f"the package {package.name} cannot be unpacked: {error}", reason=Reason.IO_ERROR) from error


def _keep(name: str, content: IO[bytes], folder: Path) -> None:
    """Keep a file of a package, if it is one of those that a guest needs."""
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
    """Whether a module is kept, by its path below ``kernel/``."""
    return path.startswith(KEPT_TREES) or path.rpartition("/")[0] in KEPT_FOLDERS


def bootable_kernel(image: bytes) -> bytes:
    """The kernel that starts fastest: a bzImage that unpacks itself takes 3 s more under emulation.

    QEMU starts an unpacked kernel by its PVH entry, which an ELF note announces (Xen, include/public/elfnote.h). An
    image that does not unpack (Linux, Documentation/arch/x86/boot.rst) to such a kernel is returned as it is.
    """
    if image[0x202:0x206] != b"HdrS":
        return image
    start = 512 * ((image[0x1F1] or 4) + 1) + int.from_bytes(image[0x248:0x24C], "little")
    payload = image[start : start + int.from_bytes(image[0x24C:0x250], "little")]
    for magic, suffix in _PAYLOADS.items():
        if payload.startswith(magic):
            # The unpacked size follows the packed data.
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
    """Unpack a module or a kernel. Debian 13 packs modules with xz, Ubuntu with zstd.

    Raises:
        SetupError: unknown suffix, or no ``zstd`` program.
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
            return subprocess.run(command, input=content, capture_output=True, check=True).stdout
        case _:
            raise SetupError(f"a file packed as {suffix} cannot be unpacked", reason=Reason.NOT_FOUND)
