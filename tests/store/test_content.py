"""Files of real tools, and headers of others: recognized, refused, and converted by the commands of the remedies."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from farplug.errors import ImageError, Reason
from farplug.exit_codes import exit_code
from farplug.programs import find_program
from farplug.store import FileStore, OverlayStore, open_iso, overlay
from farplug.store.content import Content, recognize
from farplug.store.image import Image

MIB = 1 << 20
DISK = bytes(510) + b"\x55\xaa" + random.Random(1).randbytes(MIB // 2) + bytes(2 * MIB - MIB // 2 - 512)
AWKWARD = "it's a: d\x1bi\ns.k"
"""Part of a file name that commands have to quote."""


def run(*command: str | Path, stdin: bytes = b"") -> bytes:
    return subprocess.run(
        [find_program(str(command[0])), *command[1:]], input=stdin, stdout=subprocess.PIPE, check=True
    ).stdout


def refused(path: Path, open: Callable[[Path], object] = Image.open) -> ImageError:
    """Return the error of opening a file, which must leave the file unchanged."""
    before = path.stat().st_mtime_ns, path.stat().st_size
    with pytest.raises(ImageError) as caught:
        open(path)
    assert before == (path.stat().st_mtime_ns, path.stat().st_size)
    return caught.value


def follow(error: ImageError) -> None:
    """Run the command of a remedy, as a user would."""
    alternative = error.remedy.alternative
    assert alternative is not None
    assert (alternative.setting, alternative.value) == ("storage.force", True)
    subprocess.run(["bash", "-c", error.remedy.command], capture_output=True, check=True)


# Disks ----------------------------------------------------------------------------------------------------------------

FORMATS = {
    "qcow": "a qcow image",
    "qcow2": "a qcow2 image",
    "qcow2 -o compat=0.10": "a qcow2 image",
    "qed": "a QED image",
    "vmdk": "a VMDK image",
    "vmdk -o subformat=monolithicFlat": "a VMDK image",
    "vmdk -o subformat=streamOptimized": "a VMDK image",
    "vpc -o force_size": "a VHD image",
    "vpc -o force_size,subformat=fixed": "a VHD image",
    "vhdx": "a VHDX image",
    "vdi": "a VDI image",
    "parallels": "a Parallels image",
}


@pytest.mark.parametrize("format", FORMATS)
def test_images_of_qemu_img(tmp_path: Path, format: str) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(DISK)
    stem = "a" if "monolithicFlat" in format else AWKWARD  # the descriptor contains the name of the data
    path = tmp_path / f"{stem}.image"
    run("qemu-img", "convert", "-f", "raw", "-O", *format.split(), raw, path)
    error = refused(path)
    assert (error.reason, error.message) == (Reason.NOT_RAW, f"{path} is {FORMATS[format]}, not a RAW disk image")
    follow(error)
    converted = tmp_path / f"{stem}.raw"
    assert converted.read_bytes() == DISK
    Image.open(converted).close()
    assert "-1.raw" in refused(path).remedy.command  # the first name is in use now
    assert refused(path).remedy.setting == ""
    remedy = refused(path, open_iso).remedy
    assert (remedy.setting, remedy.value) == ("usb_disk", str(tmp_path / f"{stem}-1.raw"))


COMPRESSIONS = {
    "xz": ("xz data", ["xz", "-T1"]),
    "xz none": ("xz data", ["xz", "--check=none"]),
    "gz": ("gzip data", ["gzip"]),
    "gz best": ("gzip data", ["gzip", "-9"]),
    "zst": ("zstd data", ["zstd", "-q"]),
    "zst long": ("zstd data", ["zstd", "-q", "-1", "--long=27"]),  # the window of --ultra -22
    "bz2": ("bzip2 data", ["bzip2"]),
    "lz4": ("lz4 data", ["lz4", "-q"]),
    "lz4 best": ("lz4 data", ["lz4", "-q", "-9", "-B4", "-BD"]),
    "lz4 legacy": ("lz4 data", ["lz4", "-q", "-l"]),
    "lzma": ("lzma data", ["xz", "--format=lzma"]),
    "lzma best": ("lzma data", ["xz", "--format=lzma", "-9e"]),
}


@pytest.mark.parametrize("kind", COMPRESSIONS)
@pytest.mark.parametrize("content", [DISK, bytes(MIB), b""], ids=["disk", "zeros", "empty"])
def test_compressed(tmp_path: Path, kind: str, content: bytes) -> None:
    name, command = COMPRESSIONS[kind]
    path = tmp_path / f"{AWKWARD}.img.{kind.split()[0]}"
    path.write_bytes(run(*command, "-c", stdin=content))
    if kind == "lz4 legacy" and not content:
        return  # no more than the magic
    error = refused(path)
    assert (error.reason, error.message) == (Reason.NOT_RAW, f"{path} is {name}, not a RAW disk image")
    follow(error)
    assert (tmp_path / f"{AWKWARD}.img").read_bytes() == content


def test_compressed_by_libraries(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for content, name in (
        (gzip.compress(DISK), "gzip data"),
        (zlib.compress(DISK, wbits=31), "gzip data"),
        (bz2.compress(b""), "bzip2 data"),
        (lzma.compress(DISK), "xz data"),
        (lzma.compress(DISK, lzma.FORMAT_ALONE), "lzma data"),
    ):
        path.write_bytes(content)
        assert f"image is {name}, not" in refused(path).message
        assert f"> {path}.raw" in refused(path).remedy.command


def test_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zipped, tar = Path("disk.zip"), Path("-disk.ova")
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zipped.raw", DISK)
    with tarfile.open(tar, "w") as other:
        info = tarfile.TarInfo("tarred.raw")
        info.size = len(DISK)
        other.addfile(info, io.BytesIO(DISK))
    for path, name, inside in ((zipped, "a zip archive", "zipped.raw"), (tar, "a tar archive", "tarred.raw")):
        error = refused(path)
        assert name in error.message
        follow(error)
        assert Path(inside).read_bytes() == DISK
    empty = Path("empty.zip")
    zipfile.ZipFile(empty, "w").close()
    assert "a zip archive" in refused(empty).message


# CDs ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def iso(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The ISO image of a folder."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "file").write_bytes(b"content")
    return run("xorrisofs", "-quiet", "-r", "-J", "-V", "CD", folder)


def sectors(iso: bytes, header: bytes, tail: int) -> bytes:
    """An image in raw sectors."""
    return b"".join(header + iso[at : at + 2048] + bytes(tail) for at in range(0, len(iso), 2048))


SYNC = b"\0" + b"\xff" * 10 + b"\0"
XA = bytes([0, 0, 8, 0] * 2)
SECTORS = {
    "mode 1": (SYNC + b"\0\2\0\1", 288),
    "mode 1 with sub-channels": (SYNC + b"\0\2\0\1", 288 + 96),
    "mode 2": (SYNC + b"\0\2\0\2" + XA, 280),
    "mode 2 without headers": (XA, 280),
}


@pytest.mark.parametrize("kind", SECTORS)
@pytest.mark.parametrize("open", [open_iso, Image.open], ids=["CD", "disk"])
async def test_raw_sectors(tmp_path: Path, iso: bytes, kind: str, open: Callable[[Path], object]) -> None:
    path, converted = tmp_path / f"{AWKWARD}.bin", tmp_path / f"{AWKWARD}.iso"
    path.write_bytes(sectors(iso, *SECTORS[kind]))
    error = refused(path, open)
    assert "is a copy of the raw sectors of a CD, not a" in error.message
    assert error.remedy.setting == ("" if open is open_iso else "usb_cdrom")
    follow(error)
    assert converted.read_bytes() == iso
    await open_iso(converted).close()


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("x.cue", "the data's.bin", b'REM made\r\nFILE "the data\'s.bin" BINARY\r\n  TRACK 01 MODE1/2352\r\n'),
        ("x.cue", "d.bin", b"file ../../C:\\d.bin binary\n  TRACK 01 MODE1/2352\n"),
        ("x.ccd", "x.img", b"[CloneCD]\r\nVersion=3\r\n"),
        ("x.mds", "x.mdf", b"MEDIA DESCRIPTOR\1\3" + bytes(200)),
    ],
)
async def test_what_describes_a_cd(tmp_path: Path, iso: bytes, name: str, data: str, text: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    (tmp_path / data).write_bytes(sectors(iso, *SECTORS["mode 1"]))
    follow(refused(path, open_iso))
    assert (tmp_path / "x.iso").read_bytes() == iso
    assert refused(path).reason is Reason.NOT_RAW


def test_a_nero_image(tmp_path: Path) -> None:
    path = tmp_path / "x.nrg"
    for trailer in (b"NER5" + (MIB).to_bytes(8, "big"), bytes(4) + b"NERO" + (MIB).to_bytes(4, "big")):
        path.write_bytes(bytes(MIB + 500) + trailer)
        error = refused(path, open_iso)
        assert "is a Nero image, not an ISO" in error.message
        assert error.remedy.command == f"nrg2iso {path} {path.with_suffix('.iso')}"
        path.write_bytes(bytes(MIB - 100) + trailer)  # behind the end
        Image.open(path).close()


# Headers, and disks that resemble one --------------------------------------------------------------------------------

HEADERS = {
    "a VMDK image": [b"COWD\1\0\0\0", b"\xbe\xba\xfe\xca\0\0\0\0\1\0\0\0\2\0\0\0"],
    "a Bochs image": [b"Bochs Virtual HD Image\0"],
    "a Parallels image": [b"WithouFreSpacExt\2\0\0\0"],
    "an Android sparse image": [struct.pack("<I4H4I", 0xED26FF3A, 1, 0, 28, 12, 4096, 256, 1, 0)],
    "a snapshot of farplug": [b"farplug\xf5\1"],
    "lzip data": [bytes.fromhex("4c5a495001 14")],
    "lzop data": [bytes.fromhex("894c5a4f000d0a1a0a 1040")],
    "a 7z archive": [bytes.fromhex("377abcaf271c 0004")],
    "a RAR archive": [b"Rar!\x1a\7\0\xcf", b"Rar!\x1a\7\1\0\x33"],
    "a cabinet": [b"MSCF\0\0\0\0\x33"],
    "a WIM archive": [b"MSWIM\0\0\0\xd0\0\0\0\0\x0d\1\0", b"WLPWM\0\0\0\xd0\0\0\0\0\x0d\1\0"],
    "a DAA image": [b"DAA" + bytes(13) + b"\x4c"],
    "an ISZ image": [b"IsZ!\x30\1", b"IsZ!\x40\1"],
    "a CHD image": [b"MComprHD\0\0\0\x7c\0\0\0\5"],
    "a CSO image": [struct.pack("<4sIQIBB", b"CISO", 24, MIB, 2048, 1, 0)],
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.image"
    for header in HEADERS[name]:
        path.write_bytes(header + bytes(MIB))
        for open in (Image.open, open_iso):
            error = refused(path, open)
            assert f"x.image is {name}, not a" in error.message
            assert "{" not in f"{error.remedy} {error.remedy.command} {error.remedy.value}"


def test_a_dmg_image(tmp_path: Path) -> None:
    path = tmp_path / "x.dmg"
    path.write_bytes(bytes(MIB) + struct.pack(">4sII", b"koly", 4, 512).ljust(512, b"\0"))
    assert "qemu-img convert -f dmg -O raw" in refused(path).remedy.command


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"QFI\xfb" + bytes(508),  # version 0
        b"QED\0\1\1\1\1",
        b"KDMV\x40",
        b"conectix" + bytes(504),
        b"<<< Oracle VM VirtualBox Disk Image >>>\n",
        b"WithoutFreeSpace",
        b"\x1f\x8b\x08\xe0" + bytes(6),  # pop ds; mov cx, [bx+si]
        b"\x1f\x8b\x08",
        b"\xfd7zXZ\0\1\4",
        b"\x5d\0\0\x80\0" + b"\xff" * 8 + b"\1",
        b"\x5d\0\0\x80\0" + bytes(8),
        b"\x5d\1\2\3\4" + b"\xff" * 8 + b"\0",
        b"BZh9" + bytes(20),
        b"BZh0" + b"1AY&SY",
        b"\x28\xb5\x2f\xfd\x08",
        b"\x04\x22\x4d\x18\x80\x40",
        b"\x02\x21\x4c\x18\xff\xff\xff\xff",
        b"PK\3\4\xff",
        b"PK\5\6" + bytes(1000),
        bytes(257) + b"ustar\0" + b"00",
        bytes(148) + b"0000000\0" + bytes(101) + b"ustar\0" + b"00",
        b"\x3a\xff\x26\xed\2\0",
        SYNC + b"\0\2\0\1",
        b"CISO" + bytes(20),
        b"LUKS\xba\xbe\0\2",
        b"\xeb\x58\x90mkfs.fat",
        b"\xeb\x52\x90NTFS    ",
        b"\xeb\x76\x90EXFAT   ",
        b"\xeb\x63\x90" + bytes(507) + b"\x55\xaa" + b"EFI PART",
        b"FILE \"x.bin\" BINARY\n" + bytes(100),
        b"REM a text\n",
    ],
)  # fmt: skip
def test_disks_that_resemble_another_format(tmp_path: Path, begin: bytes) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(begin.ljust(MIB, b"\0"))
    Image.open(path).close()


def test_random_disks_are_taken() -> None:
    generator = random.Random(7)
    for _ in range(2000):
        data = generator.randbytes(600)
        assert recognize(Content(len(data), data, data[-512:])) is None


@pytest.mark.parametrize("name", ["qcow2", "gzip"])
def test_every_truncated_header(name: str) -> None:
    """A file of any length can be checked."""
    whole = {"qcow2": b"QFI\xfb\0\0\0\3" + bytes(100), "gzip": gzip.compress(DISK)}[name]
    found = [recognize(Content(length, whole[:length], whole[:length][-512:])) is not None for length in range(120)]
    assert found == sorted(found)
    assert (found[3], found[-1]) == (False, True)


# Which functions refuse a file ----------------------------------------------------------------------------------------


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    return path


async def test_disks_and_snapshots(qcow2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = tmp_path / "snapshot"
    for open in (
        FileStore.open,
        lambda path: FileStore.open(path, read_only=True),
        OverlayStore.open,
        lambda path: OverlayStore.open(path, snapshot),
    ):
        error = refused(qcow2, open)
        assert (error.reason, exit_code(error)) == (Reason.NOT_RAW, 3)
    assert not snapshot.exists()
    openers: list[Callable[[], FileStore | OverlayStore]] = [
        partial(FileStore.open, qcow2, force=True),
        partial(FileStore.open, qcow2, read_only=True, force=True),
        partial(OverlayStore.open, qcow2, snapshot, force=True),
    ]
    for open_by_force in openers:
        caplog.clear()
        store = open_by_force()
        assert "a.qcow2 is a qcow2 image, not a RAW disk image: plugged as it is" in caplog.text
        assert store.block_count == qcow2.stat().st_size // 512
        await store.close()
    error = refused(qcow2, lambda path: overlay.commit(snapshot, path))
    assert error.reason is Reason.NOT_RAW
    assert snapshot.exists()
    assert overlay.commit(snapshot, qcow2, force=True) == 0
    assert not snapshot.exists()


async def test_a_commit_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first blocks may have any content, and half of the content is in the image."""
    base, snapshot = tmp_path / "disk.raw", tmp_path / "snapshot"
    base.write_bytes(bytes(MIB))
    store = OverlayStore.open(base, snapshot)
    done: list[OSError | None] = []
    store.write(0, gzip.compress(DISK)[:4096], done.append)
    await store.close()
    assert done == [None]
    with monkeypatch.context() as patch:

        def power_cut(self: Image) -> None:
            raise OSError(5, "power cut")

        patch.setattr("farplug.store.overlay_file.OverlayFile.remove", power_cut)
        with pytest.raises(ImageError, match="was interrupted"):
            overlay.commit(snapshot, base)
    assert refused(base).reason is Reason.NOT_RAW
    assert overlay.commit(snapshot, base) == 4096


async def test_an_iso_as_a_disk(tmp_path: Path, iso: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cd.iso"
    path.write_bytes(iso)
    await FileStore.open(path, read_only=True).close()
    assert "cd.iso is an ISO image: plug it in as a CD-ROM" in caplog.text
    caplog.clear()
    path.write_bytes(iso[:510] + b"\x55\xaa" + iso[512:])  # a hybrid
    await FileStore.open(path, read_only=True).close()
    assert not caplog.text


def test_a_small_file_is_not_made_longer(tmp_path: Path) -> None:
    path = tmp_path / "d.img.xz"
    path.write_bytes(lzma.compress(bytes(MIB)))
    assert path.stat().st_size < 512
    assert "xz -dc" in refused(path).remedy.command
    path.write_bytes(b"something")
    assert not refused(path).remedy.command
    path.write_bytes(b"")
    assert refused(path).remedy.command == f"truncate -s 1G {path}"


def test_an_unreadable_image_is_plugged_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(DISK)

    def fail(fd: int, length: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    assert refused(path).reason is Reason.IO_ERROR
    Image.open(path, force=True).close()
