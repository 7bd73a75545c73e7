"""What the documentation prints is true: its code runs, its commands have these options, its files exist."""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer.main
from tests.cli.support import FakeGuest
from tests.docs import PAGES, ROOT, snippets, write_project

from farplug.app import app as app_module
from farplug.app import events, guest
from farplug.cli import session
from farplug.cli.tree import app
from farplug.redirection.events import PortEvent
from farplug.testing.project import __main__ as project
from farplug.transport import TARGET_FORMS
from farplug.usb import DeviceEvent
from farplug.usbredir import packets
from farplug.virtual import events as _virtual_events  # noqa: F401  (their classes are counted)
from farplug.virtual.fido import events as _fido_events  # noqa: F401

TESTING = ROOT / "docs/testing.md"
KIT = ROOT / "docs/devices-of-your-own.md"


def test_the_project_of_the_testing_page_runs_as_printed(tmp_path: Path) -> None:
    names = write_project(TESTING, tmp_path)
    assert names == ["pyproject.toml", "my_device.py", "test_in_memory.py", "test_in_linux.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_in_memory.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "3 passed" in run.stdout


def test_the_project_of_the_page_about_devices_runs_as_printed(tmp_path: Path) -> None:
    names = write_project(KIT, tmp_path)
    assert names == [
        *("loopback.py", "test_loopback.py", "pyproject.toml", "plug_loopback.py", "thermometer.py", "log_in.py"),
        *("composite.py", "test_devices.py"),
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout
    assert "3 passed" in run.stdout
    devices = [name for name in names if name.endswith(".py") and not name.startswith("test_")]
    check = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path / 'cache'}", *devices]
    types = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    assert types.returncode == 0, types.stdout


def test_the_page_about_pytest_has_the_project_that_the_plugin_writes(tmp_path: Path) -> None:
    names = write_project(ROOT / "docs/pytest.md", tmp_path)
    assert sorted(names) == sorted(project.NAMES)
    for name in names:
        assert (tmp_path / name).read_text() == (ROOT / "src/farplug/testing/project" / name).read_text()


def test_every_option_and_fixture_of_the_pytest_plugin_is_documented() -> None:
    page = (ROOT / "docs/pytest.md").read_text()
    source = (ROOT / "src/farplug/testing/plugin.py").read_text()
    fixtures = re.findall(r"^@pytest.fixture.*\ndef (farplug_\w+)", source, re.MULTILINE)
    entries = [f"farplug_{name}" for name in re.findall(r'^    add\(\n +"(\w+)"', source, re.MULTILINE)]
    assert (len(fixtures), len(entries)) == (8, 4)
    for name in (*fixtures, *entries, "farplug_accel", "farplug_capture"):
        assert f"`{name}`" in page
        if name not in fixtures:
            assert f"`--{name.replace('_', '-')}" in page


async def test_the_scripts_of_the_page_about_devices_plug_their_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(KIT, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, products in (("plug_loopback", [0x0001]), ("log_in", [0x0104])):
        configured = asyncio.Event()
        guest = FakeGuest(configured.set)
        async with asyncio.timeout(100), guest.listening() as target:
            plugged = asyncio.create_task(importlib.import_module(name).main(target))
            await configured.wait()
            plugged.cancel()
            with pytest.raises(asyncio.CancelledError):
                await plugged
        seen = [packet.product_id for packet in guest.seen if isinstance(packet, packets.DeviceConnect)]
        assert seen == products
    for name in ("loopback", "plug_loopback", "log_in"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_compile_and_their_imports_exist(page: Path) -> None:
    for snippet in snippets(page):
        if snippet.language != "python":
            continue
        tree = compile(snippet.text, page.name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("farplug"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each line that is a farplug command, up to the first operator of the shell."""
    for line in page.read_text().replace("\\\n", " ").splitlines():
        match = re.fullmatch(r"\s*(?:\$ )?(?:sudo )?farplug ([a-z].*)", line)
        if match is not None and not line.startswith(
            "farplug "
        ):  # prose begins at the margin, commands in fences do too
            yield words_of(match[1])
    for snippet in snippets(page):
        for line in snippet.text.splitlines():
            if line.startswith("farplug "):
                yield words_of(line.removeprefix("farplug "))


def words_of(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(itertools.takewhile(lambda word: not set(word) <= set("();<>|&"), lexer))


def find_command(words: list[str]) -> Any:
    """Return the command that words begin with; None if there is none: the line is prose or a message."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if not (inner := getattr(command, "commands", None)):
            break
        command = inner.get(word)
    return command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    for words in commands(page):
        command = find_command(words)
        if command is None:
            continue
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[: words.index("--")] if "--" in words else words:  # a command for the VM follows
            if word.startswith("-") and word != "-":
                assert word.partition("=")[0] in known | {"--help"}, f"{page.name}: farplug {' '.join(words)}"


def all_options() -> set[str]:
    """Return every option of every command, by its long name."""
    found: set[str] = set()
    commands: list[Any] = [typer.main.get_command(app)]
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        found |= {option for one in command.params for option in one.opts if option.startswith("--") and not one.hidden}
    return found - {"--version"}


def test_every_option_is_documented() -> None:
    pages = "".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    assert {option for option in all_options() if not re.search(rf"{option}(?![\w-])", pages)} == set()


def _kinds(base: type[PortEvent] | type[DeviceEvent]) -> list[type[PortEvent] | type[DeviceEvent]]:
    below = base.__subclasses__()
    return [kind for one in below for kind in _kinds(one)] if below else [base]


def test_every_event_is_documented() -> None:
    table = (ROOT / "docs/exit-codes.md").read_text().partition("## Events")[2]
    kinds = [kind for base in (PortEvent, DeviceEvent) for kind in _kinds(base)]
    names = {name for kind in kinds if isinstance(name := getattr(kind, "name", None), str)}
    assert {"opened", "medium-ejected"} <= names
    for module in (guest, app_module, events, session):
        names |= set(re.findall(r'\bpublish\(\s*"([a-z-]+)"', inspect.getsource(module)))
    assert "figures" in names
    assert {name for name in names if f"| `{name}` |" not in table} == set()


def test_every_form_of_a_target_is_documented() -> None:
    page = (ROOT / "docs/targets.md").read_text()
    schemes = set(re.findall(r"([a-z+-]+:)/", TARGET_FORMS)) - {"unix:"} | {"unix:", ".vv"}
    assert {
        scheme for scheme in schemes if not re.search(rf"^\| `[\w]*{re.escape(scheme)}", page, re.MULTILINE)
    } == set()


def test_what_the_architecture_names_exists() -> None:
    names = re.findall(r"`([\w/.-]+(?:\.py|\.md|/))`", (ROOT / "ARCHITECTURE.md").read_text())
    assert len(names) > 40
    for name in names:
        anywhere = name.endswith(".py") and "/" not in name and any((ROOT / "src").rglob(name))
        assert anywhere or (ROOT / name).exists() or (ROOT / "src/farplug" / name).exists(), name


def test_the_picture_of_the_demo_needs_nothing_from_elsewhere() -> None:
    picture = (ROOT / "docs/demo.svg").read_text()
    root = ElementTree.fromstring(picture)
    assert "the same 56 bytes" in "".join(root.itertext()).replace("\xa0", " ")
    elsewhere = re.findall(r"(?:href|src)\s*=|url\((?!#)|@import", picture)
    assert not elsewhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if "://" not in target:
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not heading or heading in anchors(linked), f"{page.name} links to {target}#{heading}"


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
