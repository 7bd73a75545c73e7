"""Run ``farplug demo`` and draw what it writes to a terminal as docs/demo.svg, the picture in README.md.

The picture begins at step 3: the image and the VM are there, and farplug plugs one into the other.

python scripts/demo_picture.py [FILE]

The requirements are those of ``farplug demo`` (``make demo`` installs them). The picture does not refer to other hosts,
because browsers do not fetch fonts for an image.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 100
FIRST, LAST = "3. ", "It works."
"""Beginning of the first line of the picture, and end of the last one."""
THEME = TerminalTheme(
    (13, 17, 23),
    (201, 209, 217),
    [
        (72, 79, 88),
        (255, 123, 114),
        (86, 211, 100),
        (227, 179, 65),
        (121, 192, 255),
        (210, 168, 255),
        (86, 212, 221),
        (177, 186, 196),
    ],
)
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"


def demo() -> Text:
    """Run the demo and return what it writes to a terminal."""
    farplug = Path(sys.executable).with_name("farplug")
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run([farplug, "demo"], env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    if run.returncode != 0:
        sys.exit(f"farplug demo failed with exit code {run.returncode}:\n{run.stderr.decode(errors='replace')}")
    return Text.from_ansi(run.stdout.decode().strip())


def excerpt(output: Text) -> list[Text]:
    """Return the lines of the picture, wrapped to the width of the terminal."""
    lines = list(output.split(allow_blank=True))
    begin = next(index for index, line in enumerate(lines) if line.plain.startswith(FIRST))
    end = next(index for index, line in enumerate(lines) if line.plain.endswith(LAST))
    return [part for line in lines[begin : end + 1] for part in wrap(line)]


def wrap(line: Text) -> list[Text]:
    """Wrap a line between words, and indent its parts like the first."""
    indentation = len(line.plain) - len(line.plain.lstrip())
    width = COLUMNS - indentation
    rest, parts = line[indentation:] if line.plain else line, []
    while len(rest) > width:
        cut = rest.plain.rfind(" ", 0, width) + 1 or width
        parts.append(rest[:cut])
        rest = rest[cut:]
    return [Text(" " * indentation) + part for part in [*parts, rest]]


def draw(output: Text) -> str:
    """Return the picture, an SVG of a terminal with the command and its output."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "green"), ("farplug demo", "bold")))
    console.print("…\n")
    for line in excerpt(output):
        console.print(line, highlight=False, no_wrap=True)
    svg = console.export_svg(title="farplug demo", theme=THEME, unique_id="demo")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"font-family: Fira Code, monospace;", f"font-family: {FONTS};", svg)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/demo.svg"
    target.write_text(draw(demo()) + "\n")
