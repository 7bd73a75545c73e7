from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from tests.image.support import MIB, PLAIN, make_folder, run
from tests.leaks import descriptors

from farplug.errors import ImageError, Reason, UsageError
from farplug.image import build
from farplug.image import folder as folder_module
from farplug.image.folder import folder_store
from farplug.image.tools import ImageBuild
from farplug.image.volume import BLOCK_SIZES, Format, Partition, Volume
from farplug.store import Store


async def first_bytes(store: Store, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bytes] = loop.create_future()

    def finish(data: object, error: OSError | None) -> None:
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(bytes(data))  # type: ignore[call-overload]

    store.read(0, length, finish)
    return await done


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
async def test_a_folder_is_a_read_only_disk(tmp_path: Path, temporary: Path, block_size: int) -> None:
    folder = make_folder(tmp_path / "my folder", PLAIN)
    store = await asyncio.to_thread(folder_store, folder, block_size=block_size)
    assert not os.listdir(temporary)
    assert (store.name, store.path, store.read_only, store.block_size) == (str(folder), folder, True, block_size)
    image = tmp_path / "image"
    image.write_bytes(await first_bytes(store, 16 * MIB))  # more than the tables and the files of a small folder
    os.truncate(image, store.block_count * block_size)
    assert run("mtype", "-i", f"{image}@@1M", "::/Größe der Dateien.txt") == "umlaut"
    assert "MY FOLDER" in run("mdir", "-i", f"{image}@@1M", "::")
    errors: list[OSError | None] = []
    store.write(0, bytes(block_size), errors.append)
    assert "read-only" in str(errors[0])
    await store.close()


async def test_the_serial_number_is_the_folders(tmp_path: Path, temporary: Path) -> None:
    folder = make_folder(tmp_path / "a", {"x": b"1"})
    other = make_folder(tmp_path / "b", {"x": b"1"})
    (tmp_path / "link").symlink_to("a")
    stores = [folder_store(path) for path in (folder, tmp_path / "link", other)]
    make_folder(folder, {"y": b"2"})
    stores.append(folder_store(folder, partition=Partition.GPT, label="other"))
    assert [store.serial_number == stores[0].serial_number for store in stores] == [True, True, False, True]
    assert len(stores[0].serial_number) == 16
    for store in stores:
        await store.close()


async def test_free_space(tmp_path: Path, temporary: Path) -> None:
    folder = make_folder(tmp_path / "a", {"x": b"1"})
    store = folder_store(folder, free=100 * MIB, format=Format.EXT4)
    assert store.block_count * 512 > 120 * MIB
    await store.close()


async def test_a_file_too_large_for_fat32_makes_it_exfat(
    tmp_path: Path, temporary: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "MAX_FAT_FILE", 3)
    filled: list[Volume] = []

    def fill(build: ImageBuild, volume: Volume) -> None:
        filled.append(volume)

    folder = make_folder(tmp_path / "a", {"x": b"1234"})
    monkeypatch.setattr(build, "fill_in_guest", fill)
    store = folder_store(folder)
    assert [volume.format for volume in filled] == [Format.EXFAT]
    assert caplog.messages == [f"{folder}: the disk is exFAT: x has 4 bytes, a file on FAT32 at most 3"]
    await store.close()


def test_a_failure_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    before = descriptors()
    folder = make_folder(tmp_path / "a", {"x": b"1"})

    def stop(done: int, total: int) -> None:
        if total:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        folder_store(folder, progress=stop)
    with pytest.raises(ImageError, match="no such file"):
        folder_store(tmp_path / "missing")
    with pytest.raises(UsageError, match="ISO 9660 has no partitions"):
        folder_store(folder, format=Format.ISO9660)
    with pytest.raises(UsageError, match="is not a valid label"):
        folder_store(folder, label="much too long for it")
    make_folder(folder, {"A": b"", "a": b""})
    with pytest.raises(ImageError, match=r"a \(equal to A except for case\)"):
        folder_store(folder)
    assert not os.listdir(temporary)
    assert descriptors() <= before


def test_no_place_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "a", {"x": b"1"})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(ImageError, match=r"no image can be created in .*missing: no such file") as caught:
        folder_store(folder)
    assert caught.value.reason is Reason.IO_ERROR
    assert "TMPDIR" in caught.value.remedy
