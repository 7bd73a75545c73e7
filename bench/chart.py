"""Draw ratios as an SVG file: a bar to the right of 1.0 is faster than the peer, one to the left slower.

The scale is logarithmic, so that twice and half as fast have bars of the same length. The picture has its own
background, is readable on light and dark pages, and does not use colour alone: each bar has its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby
from textwrap import wrap

from rows import Row

WIDTH, LEFT, RIGHT = 760, 250, 92
"""Of the picture, of the names, of the values: pixels."""
ROW, BAR, HEADING, LINE = 22, 14, 34, 16
LOWEST, HIGHEST = 0.25, 8.0
"""The ends of the scale. A bar that is cut there has an arrow."""
TICKS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

STYLE = """
.ground { fill: #ffffff; stroke: #d0d7de }
text { fill: #1f2328; font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
.title { font-size: 16px; font-weight: 600 }
.part { font-weight: 600 }
.small { font-size: 11px; fill: #59636e }
.value { font-variant-numeric: tabular-nums }
.line { stroke: #d0d7de }
.one { stroke: #59636e }
.faster { fill: #1a7f64 }
.slower { fill: #c4701b }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; stroke: #3d444d }
  text { fill: #f0f6fc }
  .small { fill: #9198a1 }
  .line { stroke: #3d444d }
  .one { stroke: #9198a1 }
  .faster { fill: #3fb68b }
  .slower { fill: #e0984a }
}
"""


def _x(ratio: float) -> float:
    """Return the place of a ratio on the scale."""
    part = math.log(min(max(ratio, LOWEST), HIGHEST) / LOWEST) / math.log(HIGHEST / LOWEST)
    return LEFT + part * (WIDTH - LEFT - RIGHT)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind} text-anchor="{anchor}">{escape(text)}</text>'


def _bar(row: Row, y: float) -> list[str]:
    assert row.ratio is not None
    one, end = _x(1.0), _x(row.ratio)
    left, width = min(one, end), max(abs(end - one), 1.0)
    arrow = "" if LOWEST <= row.ratio <= HIGHEST else " →" if row.ratio > 1 else " ←"
    number = f"{row.ratio:.2f}" if row.ratio < 10 else f"{row.ratio:.0f}"
    return [
        _text(LEFT - 12, y + BAR - 2, row.what, anchor="end"),
        f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="2" '
        f'class="{"faster" if row.ratio >= 1 else "slower"}"/>',
        _text(WIDTH - RIGHT + 16, y + BAR - 2, number + arrow, "value"),
    ]


def draw(rows: Sequence[Row], machine: str) -> str:
    """Return the chart of the rows for it.

    Args:
        rows: those of one part follow each other.
        machine: where they were measured.
    """
    shown = [row for row in rows if row.chart and row.ratio is not None]
    title = "How fast farplug is beside its peers"
    scale = "Ratios: 1 is as fast as the peer; bars to the right are faster, those to the left slower"
    body, y = [_text(20, 32, title, "title"), _text(20, 52, scale, "small")], 66.0
    ends: list[tuple[float, float]] = []
    for part, members in groupby(shown, key=lambda row: row.part):
        body.append(_text(20, y + 20, part[:1].upper() + part[1:], "part"))
        y += HEADING
        ends.append((y - 4, 0.0))
        for row in members:
            body += _bar(row, y)
            y += ROW
        ends[-1] = ends[-1][0], y
    lines = [
        f'<line x1="{_x(tick):.1f}" x2="{_x(tick):.1f}" y1="{top:.1f}" y2="{bottom:.1f}" '
        f'class="{"one" if tick == 1 else "line"}"/>'
        for top, bottom in ends
        for tick in TICKS
    ]
    ticks = [_text(_x(tick), y + 14, f"{tick:g}", "small", "middle") for tick in TICKS]
    footer = wrap(machine, 105)
    height = y + 36 + LINE * len(footer)
    described = "; ".join(f"{row.part}, {row.what}: {row.ratio:.2f}" for row in shown)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
            f'height="{height:.0f}" role="img" aria-labelledby="title description">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="description">{escape(described)}</desc>',
            f"<style>{STYLE}</style>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="8" class="ground"/>',
            *lines,
            *body,
            *ticks,
            *(_text(20, y + 38 + LINE * number, line, "small") for number, line in enumerate(footer)),
            "</svg>\n",
        ]
    )
