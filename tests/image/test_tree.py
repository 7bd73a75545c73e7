from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from tests.image.support import make_folder

from farplug.errors import ImageError, Reason
from farplug.image import tree as tree_module
from farplug.image.tree import (
    CLOCK_TICK,
    Entry,
    Tree,
    check_unchanged,
    describe_left_out,
    open_file,
    opened_root,
    scan,
    settle,
)


def test_everything_is_found_parents_first(tmp_path: Path) -> None:
    make_folder(tmp_path, {"b/c/d": b"12", "b/a": b"", "z": b"345"})
    tree = scan(tmp_path)
    assert [(entry.path, entry.is_folder, entry.size) for entry in tree.entries] == [
        ("b", True, 0), ("z", False, 3), ("b/a", False, 0), ("b/c", True, 0), ("b/c/d", False, 2),
    ]  # fmt: skip
    assert tree.size == 5
    assert {path: [entry.name for entry in entries] for path, entries in tree.folders.items()} == {
        "": ["b", "z"], "b": ["a", "c"], "b/c": ["d"],
    }  # fmt: skip


def test_names_that_are_short_ones_come_first(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a long name": b"", "LONGFI~1.TXT": b"", "longfilename1.txt": b"", "b": b""})
    assert [entry.name for entry in scan(tmp_path).entries] == ["LONGFI~1.TXT", "b", "a long name", "longfilename1.txt"]


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    folder = make_folder(tmp_path / "folder", {"file": b"12345", "sub/x": b""})
    outside = make_folder(tmp_path / "outside", {"secret": b""})
    for name, target in {
        "inside": "file",
        "up": "../folder/sub/x",
        "out": str(outside / "secret"),
        "loop": "loop",
        "nothing": "missing",
        "self": ".",
        "sub/folder": "../sub",
    }.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    return folder


def test_entries_that_are_left_out(odd_folder: Path) -> None:
    tree = scan(odd_folder)
    assert {entry.path: entry.size for entry in tree.entries} == {
        "file": 5, "inside": 5, "up": 0, "sub": 0, "sub/x": 0,
    }  # fmt: skip
    assert set(describe_left_out(tree)) == {
        "left out, a link out of the folder: out",
        "left out, a link to nothing: loop, nothing",
        "left out, a link to a folder: self, sub/folder",
        "left out, a pipe: pipe",
        "left out, a socket: socket",
    }


def test_linux_formats_hold_everything(odd_folder: Path) -> None:
    tree = scan(odd_folder, posix=True)
    assert not tree.left_out
    assert len(tree.entries) == 12
    assert tree.size == 5


def test_a_long_list_is_cut() -> None:
    tree = Tree(Path("/"), (), tuple((f"p{number}", "a pipe") for number in range(5)))
    assert list(describe_left_out(tree)) == ["left out, a pipe: p0, p1, p2 and 2 more"]


@pytest.mark.parametrize(
    ("name", "reason", "text"),
    [
        ("missing", Reason.NOT_FOUND, "no such file"),
        ("file", Reason.NOT_A_FOLDER, "is not a folder"),
        ("file/x", Reason.NOT_FOUND, "not a directory"),
        ("a\0b", Reason.NOT_FOUND, "is not a valid path"),
        ("loop", Reason.NOT_FOUND, "too many levels"),
        ("x" * 300, Reason.NOT_FOUND, "too long"),
    ],
)
def test_paths_that_are_not_a_folder(tmp_path: Path, name: str, reason: Reason, text: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ImageError, match=text) as caught:
        scan(tmp_path / name)
    assert caught.value.reason is reason


@pytest.mark.parametrize("name", ["secret", "sub"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make_folder(tmp_path, {"secret": b"", "sub/x": b""})
    access = os.access

    def refuse(path: str, mode: int, *, dir_fd: int | None = None) -> bool:  # for root too
        return path != name and access(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr("os.access", refuse)
    with pytest.raises(ImageError, match=f"{name} cannot be read: permission denied") as caught:
        scan(tmp_path)
    assert caught.value.reason is Reason.NO_PERMISSION


def test_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_module, "MAX_ENTRIES", 3)
    make_folder(tmp_path, {"a": b"", "b": b"", "c": b""})
    assert len(scan(tmp_path).entries) == 3
    (tmp_path / "d").touch()
    with pytest.raises(ImageError, match="more than 3 files") as caught:
        scan(tmp_path)
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_folder_that_is_removed_during_the_scan(tmp_path: Path) -> None:
    make_folder(tmp_path, {"sub/x": b""})
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            (tmp_path / "sub/x").unlink()
            (tmp_path / "sub").rmdir()

    with pytest.raises(ImageError, match="changed while it was copied: sub") as caught:
        scan(tmp_path, tick=tick)
    assert caught.value.reason is Reason.CHANGED


@pytest.mark.parametrize("change", ["grow", "touch", "add", "remove", "link"])
def test_a_change_is_noticed(tmp_path: Path, change: str) -> None:
    make_folder(tmp_path, {"sub/x": b"1", "y": b"2"})
    tree = scan(tmp_path)
    check_unchanged(tree)
    match change:
        case "grow":
            with (tmp_path / "sub/x").open("ab") as file:
                file.write(b"1")
            os.utime(tmp_path / "sub/x", ns=(tree.entries[-1].modified,) * 2)
        case "touch":
            os.utime(tmp_path / "sub/x")
        case "add":
            (tmp_path / "sub/new").touch()
        case "remove":
            (tmp_path / "sub/x").unlink()
        case "link":
            (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ImageError, match=r"changed while it was copied: \S") as caught:
        check_unchanged(tree)
    assert caught.value.reason is Reason.CHANGED


@pytest.mark.parametrize("what", ["sub/x", "sub", "link"])
def test_swapped_and_swapped_back(tmp_path: Path, what: str) -> None:
    """Nothing but the times of change shows it."""
    folder = make_folder(tmp_path / "folder", {"sub/x": b"1", "y": b"2"})
    (folder / "link").symlink_to("y")
    tree = scan(folder, posix=what == "link")
    settle(tree)
    times = (folder / what).lstat(), (folder / what).parent.lstat()
    (folder / what).rename(tmp_path / "kept")
    (folder / what).symlink_to("/etc/passwd")
    (folder / what).unlink()
    (tmp_path / "kept").rename(folder / what)
    for path, status in zip((folder / what, (folder / what).parent), times, strict=True):
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
    with pytest.raises(ImageError, match=r"changed while it was copied: \S"):
        check_unchanged(tree, posix=what == "link")


def test_settle_waits_for_a_later_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("time.time_ns", lambda: 1_000_000_000)
    for changed in (990_000_000, 980_000_000, 5, 1_000_000_001):
        settle(Tree(tmp_path, (Entry("a", False, 0, 0, stamp=(1, 2, changed)), Entry("b", False, 0, 0))))
    settle(Tree(tmp_path, ()))
    assert slept == [pytest.approx(CLOCK_TICK - 0.01)]


@pytest.mark.parametrize("what", ["y", "sub/x", "sub"])
@pytest.mark.parametrize("swap", ["a link out", "another file", "nothing"])
def test_what_was_swapped_is_not_opened(tmp_path: Path, what: str, swap: str) -> None:
    folder = make_folder(tmp_path / "folder", {"sub/x": b"1", "y": b"2"})
    outside = make_folder(tmp_path / "outside", {"x": b"secret"})
    tree = scan(folder)
    entry = next(entry for entry in tree.entries if entry.path in (what, f"{what}/x") and not entry.is_folder)
    with opened_root(tree) as root_fd:
        os.close(open_file(tree, root_fd, entry))
        (folder / what).rename(tmp_path / "kept")
        match swap:
            case "a link out":
                (folder / what).symlink_to(outside if what == "sub" else outside / "x")
            case "another file":
                (outside if what == "sub" else outside / "x").rename(folder / what)
        with pytest.raises(ImageError, match="changed while it was copied: ") as caught:
            open_file(tree, root_fd, entry)
    assert caught.value.reason is Reason.CHANGED


@pytest.mark.parametrize("swap", ["link", "folder", "nothing"])
def test_a_root_that_was_swapped(tmp_path: Path, swap: str) -> None:
    folder = make_folder(tmp_path / "folder", {"x": b"1"})
    tree = scan(folder)
    folder.rename(tmp_path / "kept")
    if swap == "link":
        folder.symlink_to("kept")
    elif swap == "folder":
        make_folder(folder, {"x": b"1"})
    with pytest.raises(ImageError, match="changed while it was copied"), opened_root(tree):
        pass


def test_a_folder_that_is_swapped_during_the_scan(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", {"sub/x": b""})
    make_folder(tmp_path / "outside", {"secret": b""})
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            (folder / "sub").rename(tmp_path / "kept")
            (folder / "sub").symlink_to(tmp_path / "outside")

    with pytest.raises(ImageError, match="changed while it was copied: sub"):
        scan(folder, tick=tick)


def test_names_that_are_not_utf8_can_be_shown(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff"))).touch()
    (entry,) = scan(tmp_path).entries
    assert tree_module.show(entry.path) == "bad\\udcff"


def test_a_scan_can_be_ended(tmp_path: Path) -> None:
    def tick() -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        scan(tmp_path, tick=tick)


def test_entry() -> None:
    entry = Entry("a/b/c", is_folder=False, size=1, modified=0)
    assert (entry.name, entry.parent) == ("c", "a/b")
    assert Entry("a", is_folder=True, size=0, modified=0).parent == ""
