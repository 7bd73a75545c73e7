"""Messages and remedies of the library do not name options of the command line: a remedy has a setting instead."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import farplug

ROOT = Path(farplug.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+|\bfarplug (connect|demo|devices|doctor|image)\b")
OTHERS = {"--device", "--device-cgroup-rule", "--volume"}
"""Options of programs that run containers."""


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _texts(node: ast.AST) -> Iterator[str]:
    """Yield the strings in an expression, except commands to copy."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.keyword) and child.arg == "command"):
            yield from _texts(child)


def _messages(tree: ast.Module) -> Iterator[str]:
    """Yield the strings that a user may read: in what is raised, in errors and remedies, and in variables for them."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Raise)
            or (isinstance(node, ast.Call) and re.search(r"(Error|Failure|Failed|Remedy|Obstacle)$", _name(node.func)))
            or (isinstance(node, ast.keyword) and node.arg in ("remedy", "message", "detail"))
            or (isinstance(node, ast.Assign) and re.search(r"remedy|message", _name(node.targets[0]), re.IGNORECASE))
        ):
            yield from _texts(node)


def options_named(source: str) -> list[str]:
    """Return the options and commands that messages in a module name."""
    found = {match[0] for text in _messages(ast.parse(source)) for match in OPTION.finditer(text)}
    return sorted(found - OTHERS)


FACES = ("cli/", "testing/lending.py")
"""The command line, and the pytest plugin: their messages name their own options."""
MODULES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.rglob("*.py"))
    if not path.relative_to(ROOT).as_posix().startswith(FACES)
]


@pytest.mark.parametrize("module", MODULES)
def test_no_message_below_the_command_line_names_an_option(module: str) -> None:
    assert options_named((ROOT / module).read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise ImageError(f'{path}: use --force')", ["--force"]),
        ("raise ImageError('x', remedy='see farplug devices')", ["farplug devices"]),
        ("errors.append(UsageError('x', remedy=Remedy('y, or --usb-disk')))", ["--usb-disk"]),
        ("_REMEDY = 'use --force'", ["--force"]),
        ("raise ImageError('x', remedy=Remedy('run it', command='farplug image commit --x'))", []),
        ("run('qemu', '--version')", []),
        ("raise ImageError('a -- b')", []),
    ],
)
def test_what_is_found(source: str, found: list[str]) -> None:
    assert options_named(source) == found
