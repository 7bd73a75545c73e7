"""The man page is current, and renders without a warning."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from scripts.man_page import PAGE, escape, page
from tests.test_docs import all_options


def test_it_is_current() -> None:
    assert PAGE.read_text() == page(), "run: make man"


def test_it_has_every_option() -> None:
    text = PAGE.read_text()
    for option in all_options() - {"--install-completion", "--show-completion"}:
        assert escape(option) in text


@pytest.mark.parametrize(
    ("text", "roff"),
    [
        (".vv files", "\\&.vv files"),
        ("C:\\x 'a' `b`", "C:\\ex \\(aqa\\(aq \\(gab\\(ga"),
        ("--a\n  b", "\\-\\-a b"),
    ],
)
def test_text_is_never_a_request(text: str, roff: str) -> None:
    assert escape(text) == roff


def test_it_renders_without_a_warning() -> None:
    if shutil.which("groff") is None:
        if os.environ.get("FARPLUG_REQUIRE_ALL") == "1":
            pytest.fail("groff is not installed")
        pytest.skip("groff is not installed")
    command = ["groff", "-man", "-Tascii", "-ww", "-b", "-P-cbou", str(PAGE)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stderr == ""
    assert "farplug connect [TARGET] [OPTION ...]" in run.stdout
