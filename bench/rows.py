"""Rows of the table of ``make bench``: the programs of the bench write their own, ``bench/table.py`` reads them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        part: the heading of the rows that belong together; with a ratio it names the peer.
        what: what was measured.
        ours: farplug's result with its unit.
        theirs: the peer's; empty: there is no peer.
        ratio: above 1 farplug is better; None: there is no peer.
        goal: the goal for the ratio.
        chart: the row is in the chart of README.md, too.
    """

    part: str
    what: str
    ours: str
    theirs: str = ""
    ratio: float | None = None
    goal: float | None = None
    chart: bool = False


def add_rows_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the file of the rows."""
    parser.add_argument("--rows", type=Path, metavar="FILE", help="also write the rows of make bench's table")


def write_rows(path: Path | None, rows: Iterable[Row]) -> None:
    """Write rows to a file, if there is one."""
    if path is not None:
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file."""
    return [Row(**row) for row in json.loads(path.read_text())]
