"""The block graph as a picture: Graphviz source, and an SVG laid out here (users above what they use)."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

import attrs

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 170, 44, 24, 52, 16


@attrs.frozen
class Box:
    """A node or a user of nodes: ``key`` is its identity, ``lines`` are what the picture says of it."""

    key: str
    lines: tuple[str, ...]
    is_user: bool = False


@attrs.frozen
class Arrow:
    """An edge from the user to the used, with its name."""

    parent: str
    child: str
    name: str


def to_dot(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> str:
    """Graphviz source of the graph."""
    lines = ["digraph qsd {", '  node [shape=box, fontname="sans-serif"];']
    for box in boxes:
        label = "\\n".join(_quoted(line) for line in box.lines)
        shape = ", shape=ellipse" if box.is_user else ""
        lines.append(f'  "{_quoted(box.key)}" [label="{label}"{shape}];')
    lines += [
        f'  "{_quoted(arrow.parent)}" -> "{_quoted(arrow.child)}" [label="{_quoted(arrow.name)}"];'
        for arrow in arrows
    ]
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def to_svg(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> str:
    """The graph as an SVG picture: one row for each distance from the top."""
    places = _places(boxes, arrows)
    columns = max((x for x, _ in places.values()), default=0) + 1
    rows = max((y for _, y in places.values()), default=0) + 1
    width = 2 * _MARGIN + columns * (_WIDTH + _GAP_X) - _GAP_X
    height = 2 * _MARGIN + rows * (_HEIGHT + _GAP_Y) - _GAP_Y
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
    ]
    for arrow in arrows:
        parts.extend(_line(places[arrow.parent], places[arrow.child], arrow.name))
    for box in boxes:
        parts.extend(_box(box, *places[box.key]))
    return "\n".join([*parts, "</svg>", ""])


def _places(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> dict[str, tuple[int, int]]:
    """Column and row of every box: its row is the longest way down to it."""
    row = dict.fromkeys((box.key for box in boxes), 0)
    # The graph has no cycles, so as many rounds as boxes settle it.
    for _ in boxes:
        lower = {arrow.child: row[arrow.parent] + 1 for arrow in arrows if row[arrow.child] <= row[arrow.parent]}
        if not lower:
            break
        row.update(lower)
    used: dict[int, int] = {}
    places = {}
    for box in boxes:
        y = row[box.key]
        places[box.key] = used.setdefault(y, 0), y
        used[y] += 1
    return places


def _corner(x: int, y: int) -> tuple[int, int]:
    return _MARGIN + x * (_WIDTH + _GAP_X), _MARGIN + y * (_HEIGHT + _GAP_Y)


def _line(start: tuple[int, int], end: tuple[int, int], name: str) -> list[str]:
    x1, y1 = _corner(*start)
    x2, y2 = _corner(*end)
    x1, y1, x2 = x1 + _WIDTH // 2, y1 + _HEIGHT, x2 + _WIDTH // 2
    return [
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="black" marker-end="url(#tip)"/>',
        f'<text x="{(x1 + x2) // 2 + 6}" y="{(y1 + y2) // 2}" fill="#555">{escape(name)}</text>',
    ]


def _box(box: Box, x: int, y: int) -> list[str]:
    left, top = _corner(x, y)
    corner = _HEIGHT // 2 if box.is_user else 4
    parts = [
        f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" rx="{corner}" '
        'fill="white" stroke="black"/>'
    ]
    step = _HEIGHT // (len(box.lines) + 1)
    middle = left + _WIDTH // 2
    for number, line in enumerate(box.lines, 1):
        y_text = top + step * number + 4
        parts.append(f'<text x="{middle}" y="{y_text}" text-anchor="middle">{escape(line)}</text>')
    return parts
