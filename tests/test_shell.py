from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

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
