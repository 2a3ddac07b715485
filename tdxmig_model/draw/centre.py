"""Centred text of an SVG that stays in the middle of its box in whatever font the reader has.

Graphviz places each line of a table label by its left end, computed with the widths of its own
font; another font then shifts the line.  Here such lines are anchored in the middle of their box.
"""

from __future__ import annotations

import re
from itertools import groupby

_NODE = re.compile(r'<g id="node\d+" class="node">.*?\n</g>\n</g>', re.DOTALL)
_TEXT = re.compile(r'<text text-anchor="start" x="[^"]*" y="([^"]*)"([^>]*)>([^<]*)</text>\n')
_LINES = re.compile(rf"(?:{_TEXT.pattern})+")
_OUTLINE = re.compile(r' d="([^"]*)"')
TITLE = 'font-size="15.00"'
"""What only the titles of states have."""


def centred(svg: str) -> str:
    """The document with the titles of states and the lines of moves anchored in the middle."""
    return _NODE.sub(lambda node: _node(node[0]), svg)


def _node(node: str) -> str:
    if "<title>legend</title>" in node:
        return node
    outline = _OUTLINE.search(node)
    if outline is None:
        return node
    across = [float(point.split(",")[0]) for point in re.findall(r"-?[\d.]+,-?[\d.]+", outline[1])]
    middle = f"{(min(across) + max(across)) / 2:.2f}".rstrip("0").rstrip(".")
    is_move = re.search(r"<title>\w+ move \d+</title>", node) is not None
    return _LINES.sub(lambda lines: _lines(lines[0], middle, is_move=is_move), node)


def _lines(lines: str, middle: str, *, is_move: bool) -> str:
    """Texts at one height are one line, whose parts keep their fonts."""
    drawn = []
    for height, found in groupby(_TEXT.finditer(lines), key=lambda text: text[1]):
        parts = list(found)
        if is_move or TITLE in parts[0][2]:
            spans = "".join(f"<tspan{part[2]}>{part[3]}</tspan>" for part in parts)
            drawn.append(f'<text text-anchor="middle" x="{middle}" y="{height}">{spans}</text>\n')
        else:
            drawn += [part[0] for part in parts]
    return "".join(drawn)
