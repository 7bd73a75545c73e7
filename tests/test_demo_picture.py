"""The picture of the demo (``scripts/demo_picture.py``)."""

from __future__ import annotations

from xml.etree import ElementTree

from rich.text import Text
from scripts.demo_picture import COLUMNS, draw, excerpt

OUTPUT = Text.from_ansi(
    "\n".join(
        [
            "Hello",
            "\x1b[1m1. An image\x1b[0m",
            "\x1b[1m3. farplug plugs it in\x1b[0m",
            "\x1b[36m  $ " + "word " * 30 + "\x1b[0m",
            "  " + "x" * 150,
            "",
            "  \x1b[32m✓\x1b[0m It works.",
            "Now with a VM of your own",
        ]
    )
)


def test_the_excerpt_begins_with_step_3_and_is_wrapped_with_its_indentation() -> None:
    lines = [line.plain for line in excerpt(OUTPUT)]
    assert (lines[0], lines[-2], lines[-1]) == ("3. farplug plugs it in", "", "  ✓ It works.")
    assert all(len(line) <= COLUMNS for line in lines)
    assert all(line.startswith("  ") for line in lines[1:-2])
    assert "".join(line[2:] for line in lines[1:3]).rstrip() == ("$ " + "word " * 30).rstrip()
    assert "".join(line[2:] for line in lines[3:5]) == "x" * 150


def test_the_picture_shows_the_excerpt_with_its_colours() -> None:
    picture = draw(OUTPUT)
    text = "".join(ElementTree.fromstring(picture).itertext()).replace("\xa0", " ")
    assert "$ farplug demo" in text
    assert "3. farplug plugs it in" in text
    assert "Hello" not in text
    assert "Now with" not in text
    assert "#56d364" in picture, "the green of the check mark"
    assert "Fira Code" not in picture
