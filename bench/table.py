"""Run the programs of the bench, print one table of their results, and draw the chart of README.md.

Programs run one after the other with the distribution's Python, which most users have, if farplug runs with it. Their
output goes to ``build/bench/``. A program that fails or takes too long has a row that says so; the others are measured.

``--from`` reads the results of an earlier run instead, to print and draw them again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from chart import draw
from disk import machine
from rows import Row, read_rows
from socketpair import TREE, default_python

OUTPUT = TREE / "build" / "bench"
CHART = TREE / "docs" / "bench.svg"
TIMEOUT, LONG_TIMEOUT = 600, 1800
"""Seconds that a program may take: one that always runs, one of ``--long``."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program of the bench.

    Attributes:
        name: of its file.
        arguments: its options.
        chooses: it measures other processes, and chooses their Python itself.
        long: it runs with ``--long`` only.
    """

    name: str
    arguments: tuple[str, ...] = ()
    chooses: bool = False
    long: bool = False


PROGRAMS = (
    Program("disk", ("--transport", "spice", "--transport", "unix")),
    Program("native", chooses=True),
    Program("micro"),
    Program("socketpair", ("--case", "uas 4 KiB"), chooses=True),
    Program("start", chooses=True),
    Program("network", ("--pairs", "3")),
    Program("proxy", ("--rounds", "2")),
    Program("page", ("--seconds", "10", "--keys", "20", "--rounds", "2")),
    Program("pongs", ("--rounds", "2")),
    Program("keyboard", ("--texts", "3")),
    Program("nested", long=True),
)
"""To add one: a line here; ``rows.py`` is how it writes its rows."""


def run(program: Program, python: str) -> list[Row]:
    """Run a program, and return its rows."""
    result, log = OUTPUT / f"{program.name}.json", OUTPUT / f"{program.name}.log"
    result.unlink(missing_ok=True)
    command = [
        sys.executable if program.chooses else python,
        str(TREE / "bench" / f"{program.name}.py"),
        *program.arguments,
        *("--rows", str(result)),
    ]
    path = os.pathsep.join((str(TREE / "src"), str(TREE), sysconfig.get_path("purelib")))
    timeout = LONG_TIMEOUT if program.long else TIMEOUT
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
            failure = f"exit code {code}"
        except BaseException as error:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(10)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    pass
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            failure = f"no end within {timeout} s"
    if result.exists():
        return read_rows(result)
    last = (log.read_text().strip().splitlines() or [""])[-1]
    return [Row(f"{program.name}: NOT MEASURED", f"{failure}: {last}"[:110], "")]


def table(rows: list[Row]) -> str:
    """Return all rows as text."""
    lines = [f"{'':46}{'farplug':>20}{'peer':>18}{'ratio':>8}{'goal':>7}"]
    for part, members in groupby(rows, key=lambda row: row.part):
        lines += ["", part]
        for row in members:
            ratio = "" if row.ratio is None else f"{row.ratio:8.2f}"
            if row.goal is not None and row.ratio is not None:
                ratio += f"{row.goal:7.2f}  {'met' if row.ratio >= row.goal else 'MISSED'}"
            lines.append(f"  {row.what:<44}{row.ours:>20}{row.theirs:>18}{ratio}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="run this program (may be repeated)")
    parser.add_argument("--long", action="store_true", help="also run what takes many minutes")
    parser.add_argument("--python", default=default_python(), help="the interpreter to measure (default: %(default)s)")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="the results of an earlier run")
    parser.add_argument("--chart", type=Path, default=CHART, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if options.source:
        saved = json.loads(options.source.read_text())
        description, rows = saved["machine"], [Row(**row) for row in saved["rows"]]
    else:
        version = subprocess.run([options.python, "--version"], capture_output=True, text=True, check=True).stdout
        description = f"{machine(version.split()[-1])}; {options.python}"
        print(description, flush=True)
        rows, started = [], time.monotonic()
        for program in PROGRAMS:
            if program.name in options.only if options.only else options.long or not program.long:
                began = time.monotonic()
                rows += run(program, options.python)
                print(f"  {program.name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        description += f"; load {os.getloadavg()[0]:.1f}; {time.monotonic() - started:.0f} s"
        saved = {"machine": description, "rows": [asdict(row) for row in rows]}
        (OUTPUT / "results.json").write_text(json.dumps(saved, indent=1) + "\n")
    print(table(rows))
    print(f"\n{description}")
    if options.source or not options.only:
        options.chart.write_text(draw(rows, description))
        print(f"chart: {options.chart}")


if __name__ == "__main__":
    main()
