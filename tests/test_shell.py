from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

import farplug
from farplug.shell import shell_word


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("disk.raw", "disk.raw"),
        ("/a/b c.raw", "'/a/b c.raw'"),
        ("it's", "'it'\"'\"'s'"),
        ("Größe", "'Größe'"),
        ("-f", "./-f"),
        ("nbd:x", "./nbd:x"),
        ("/a:b", "/a:b"),
        ("a\nb", r"$'a\x0ab'"),
        ("a\u2028'\\b", r"$'a\xe2\x80\xa8\'\\b'"),
        ("\udcff\x1b[m", r"$'\xff\x1b[m'"),
    ],
)
def test_words(path: str, word: str) -> None:
    assert shell_word(path) == word
    assert shell_word(Path(path)) == shell_word(path)


@pytest.mark.parametrize(
    "name", ["plain", "a b", "$(date) `x` \"'\\", "\n\t\x01\x7f\x85\u2028\u202e", "Ü\udcff", "-n", "0\n0"]
)
def test_bash_reads_the_path_back(name: str) -> None:
    words = f"printf %s {shell_word(name)} {shell_word('/' + name)}"
    assert words.isprintable()
    output = subprocess.run(["bash", "-c", os.fsencode(words)], stdout=subprocess.PIPE, check=True).stdout
    start = b"./" if name.startswith("-") else b""
    assert output == start + os.fsencode(name) + b"/" + os.fsencode(name)


COMMAND = re.compile(r"(sudo|farplug (connect|image|devices|doctor)|rm|touch|umount|losetup|swapoff|truncate|openssl) ")
"""The beginning of the text of a command for users."""
SAFE = {
    *("use.end", "shlex.join(command)"),  # commands
    *("packages", "' '.join(known)", "' '.join(sorted(packages))", "GROUP"),  # names in this program
    *("seconds", "rest", "address.host", "address.port", "access"),  # numbers, the loopback address, "r", "rw"
}


def commands() -> list[tuple[str, ast.JoinedStr]]:
    """Return the f-strings of the source that are commands, each with its place."""
    found = []
    for path in sorted(Path(farplug.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.JoinedStr) or not isinstance(start := node.values[0], ast.Constant):
                continue
            if COMMAND.match(str(start.value)):
                found.append((f"{path}:{node.lineno}", node))
    return found


def test_every_value_in_a_command_is_quoted() -> None:
    found = commands()
    assert len(found) > 8
    values = [
        (place, ast.unparse(part.value))
        for place, node in found
        for part in node.values
        if isinstance(part, ast.FormattedValue)
    ]
    assert [
        (place, value)
        for place, value in values
        if not re.match(r"(shell_word|shell_quote|shlex\.quote)\(", value) and value not in SAFE
    ] == []
