"""A table of times as an SVG: microseconds over tokens a rank, both axes logarithmic, dispatch beside combine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

Line = Sequence[tuple[int, float]]  # tokens, microseconds

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 420, 320, 60, 40, 70
_COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8a4fff", "#e08e0b", "#4a4e69", "#00a6a6", "#7f5539")


def chart(title: str, panels: Mapping[str, Mapping[str, Line]]) -> str:
    """One panel beside the other, with the same axes; lines by name, which have the same colour in all panels."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    points = [point for lines in panels.values() for line in lines.values() for point in line]
    across, down = _span(tokens for tokens, _ in points), _span(us for _, us in points)
    width = _LEFT + len(panels) * (_WIDTH + _GAP)
    height = _TOP + _HEIGHT + 60 + 18 * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">',
        '<g font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for number, (name, lines) in enumerate(panels.items()):
        parts += _panel(_LEFT + number * (_WIDTH + _GAP), name, lines, names, across, down)
    for number, name in enumerate(names):
        y = _TOP + _HEIGHT + 54 + 18 * number
        parts.append(f'<rect x="{_LEFT}" y="{y - 9}" width="18" height="4" fill="{_colour(number)}"/>')
        parts.append(f'<text x="{_LEFT + 26}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</g></svg>", ""])


def _panel(
    left: int,
    name: str,
    lines: Mapping[str, Line],
    names: Sequence[str],
    across: tuple[float, float],
    down: tuple[float, float],
) -> list[str]:
    bottom = _TOP + _HEIGHT
    parts = [
        f'<rect x="{left}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{left + 8}" y="{_TOP + 16}">{escape(name)}, microseconds over tokens a rank</text>',
    ]
    for tokens in _powers(2, across):
        x = left + _WIDTH * _share(tokens, across)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tokens}</text>')
    for us in _powers(10, down):
        y = bottom - _HEIGHT * _share(us, down)
        parts.append(f'<line x1="{left}" x2="{left + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{us}</text>')
    for line_name, line in lines.items():
        places = [
            f"{left + _WIDTH * _share(tokens, across):.1f},{bottom - _HEIGHT * _share(us, down):.1f}"
            for tokens, us in sorted(line)
        ]
        colour = _colour(names.index(line_name))
        parts.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return parts


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _span(values: Iterable[float]) -> tuple[float, float]:
    """From a power of two to one, so that no value is at the edge by accident."""
    found = [value for value in values if value > 0] or [1.0]
    return 2.0 ** math.floor(math.log2(min(found))), 2.0 ** max(math.ceil(math.log2(max(found))), 1)


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = math.log2(span[0]), math.log2(span[1])
    return (math.log2(value) - low) / ((high - low) or 1.0)


def _powers(base: int, span: tuple[float, float]) -> list[int]:
    return [base**power for power in range(20) if span[0] <= base**power <= span[1]]
