"""The words in a picture: as tables of Graphviz, and as plain lines where it reads no tables.

Graphviz compiled to WebAssembly has no parser for table labels; it would draw the names of the
nodes instead.  The plain labels say the same without fonts and colours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Protocol

from tdxmig_model.draw.view import Loop, Move, Side

INK, QUIET = "#1b1f24", "#57606a"
RECORD_INK, RETURN_INK = "#0969da", "#bc4c00"
# Meaning of a state -> fill, border, the fill in words, what the legend says.
MEANINGS = {
    "runs": ("#aceebb", "#1a7f37", "green", "the guest may run here"),
    "sometimes": ("#aceebb:#e6eaef", "#1a7f37", "green to grey", "only if this side owns the TD"),
    "stopped": ("#fff3c4", "#9a6700", "yellow", "owned by this side, guest stopped"),
    "still": ("#e6eaef", "#57606a", "grey", "the guest may not run here"),
}

LONGEST_LINE = 50
# A list of at least so many lines is not repeated in a later state.
LINES_WORTH_SAVING = 3
# The ends of a line of plain text: what is before it is centred, or flush left.
_CENTRE, _LEFT = "\\n", "\\l"
# The side of a box, by the end of its rows, as Graphviz calls it.
_COMPASS = {"left": "w", "right": "e"}


class Labels(Protocol):
    """What a picture asks for: the labels of its boxes, and where messages dock."""

    def state(self, view: Side, state: str) -> str:
        """The state's name, and a row for each step that stays in it."""

    def move(self, move: Move) -> str:
        """The step that leaves a state, with its messages and its guard."""

    def legend(self, meanings: Iterable[str], remarks: Iterable[str]) -> str:
        """What the colours and the borders mean."""

    def dock(self, node: str, row: str, end: str) -> str:
        """Where a message of a row meets the box: at the left or the right end of the row."""


class PlainLabels:
    """One font, one colour, lines of text."""

    def state(self, view: Side, state: str) -> str:
        lines = []
        for name, variant, loop, same in _rows(view, state):
            what = [f"as in {same}"] if same else [_arrow(m) for m in loop.messages]
            what += [] if same else loop.guard
            title = f"{name} {variant}".strip() if name else f"    {variant}"
            lines.append(title + (": " if what else "") + " · ".join(what))
        return f"{state}{_CENTRE if lines else ''}" + "".join(f"{line}{_LEFT}" for line in lines)

    def move(self, move: Move) -> str:
        title = f"{move.leaf} {move.variant}".strip()
        return _CENTRE.join([title, *(_arrow(m) for m in move.messages), *move.guard])

    def legend(self, meanings: Iterable[str], remarks: Iterable[str]) -> str:
        lines = [f"{word}: {text}" for _, _, word, text in map(MEANINGS.__getitem__, meanings)]
        return "".join(f"{line}{_LEFT}" for line in (*lines, *remarks))

    def dock(self, node: str, _row: str, end: str) -> str:
        return f"{node}:{_COMPASS[end]}"


class TableLabels:
    """Bold names, columns, and small print in the colours of what it is about."""

    def state(self, view: Side, state: str) -> str:
        title = f'<FONT POINT-SIZE="15">{_bold(state)}</FONT>'
        rows = "".join(
            _row(loop.step.name, name, variant, [_small(f"as in {same}")] if same else _what(loop))
            for name, variant, loop, same in _rows(view, state)
        )
        if not rows:
            return f"<{title}>"
        head = f'<TR><TD COLSPAN="3">{title}</TD></TR>'
        table = 'BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1"'
        return f'<<FONT POINT-SIZE="12"><TABLE {table}>{head}{rows}</TABLE></FONT>>'

    def move(self, move: Move) -> str:
        # A no-break space: each font is a text of its own in an SVG, and loses a space before it.
        variant = f"&#160;{escape(move.variant)}" if move.variant else ""
        title = f"{_bold(move.leaf)}{variant}" if move.leaf else _bold(move.variant)
        lines = [f'<FONT POINT-SIZE="12">{title}</FONT>', *_messages(move.messages)]
        lines += [_small(text) for text in move.guard]
        return f"<{'<BR/>'.join(lines)}>"

    def legend(self, meanings: Iterable[str], remarks: Iterable[str]) -> str:
        swatch = '<TD BGCOLOR="{}" COLOR="{}" BORDER="1" WIDTH="22" STYLE="ROUNDED"> </TD>'
        rows = [(swatch.format(*MEANINGS[key][:2]), MEANINGS[key][3]) for key in meanings]
        rows += [("<TD> </TD>", remark) for remark in remarks]
        cells = "".join(
            f'<TR>{first}<TD ALIGN="LEFT">{_small(text)}</TD></TR>' for first, text in rows
        )
        table = 'BORDER="0" CELLBORDER="0" CELLSPACING="3" CELLPADDING="2"'
        return f"<<TABLE {table}>{cells}</TABLE>>"

    def dock(self, node: str, row: str, end: str) -> str:
        port = f":{row} {end}" if row else ""
        return f"{node}{port}:{_COMPASS[end]}"


# --- the rows of a state -------------------------------------------------------------------------


def _rows(view: Side, state: str) -> Iterator[tuple[str, str, Loop, str | None]]:
    """Name (once for all its variants), variant, the loop, and where it was listed before."""
    for name, loops in _by_name(view, state).items():
        same = _shown_before(view, state, name)
        if same is not None:
            yield name, "", loops[0], same
            continue
        for number, loop in enumerate(loops):
            yield "" if number else name, loop.variant if loop.leaf else "", loop, None


def _by_name(view: Side, state: str) -> Mapping[str, list[Loop]]:
    """The loops of a state by the name that they are listed under."""
    found: dict[str, list[Loop]] = {}
    for loop in view.loops.get(state, ()):
        found.setdefault(loop.leaf or loop.variant, []).append(loop)
    return found


def _shown_before(view: Side, state: str, name: str) -> str | None:
    """An earlier state that lists the same rows under this name, where that saves lines."""
    loops = _by_name(view, state)[name]
    if sum(len(list(_lines(loop.guard))) for loop in loops) < LINES_WORTH_SAVING:
        return None
    for earlier in view.states[: view.states.index(state)]:
        if _by_name(view, earlier).get(name) == loops:
            return earlier
    return None


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """Several parts to a line where they fit."""
    line = ""
    for part in parts:
        if line and len(line) + len(part) > LONGEST_LINE:
            yield line
            line = ""
        line += f" · {part}" if line else part
    if line:
        yield line


def _arrow(message: str) -> str:
    return f"{'→' if message.startswith('+') else '←'} {message[1:]}"


# --- tables --------------------------------------------------------------------------------------


def _bold(text: str) -> str:
    return f"<B>{escape(text)}</B>" if text else ""


def _small(text: str, colour: str = QUIET) -> str:
    return f'<FONT POINT-SIZE="11" COLOR="{colour}">{escape(text)}</FONT>'


def _messages(messages: Iterable[str]) -> Iterator[str]:
    for message in messages:
        yield _small(_arrow(message), RECORD_INK if message[1:].isupper() else RETURN_INK)


def _what(loop: Loop) -> list[str]:
    return [*_messages(loop.messages), *map(_small, _lines(loop.guard))]


def _row(port: str, name: str, variant: str, what: list[str]) -> str:
    """Three cells; what has no third one needs no third column."""
    left = '<BR ALIGN="LEFT"/>'
    cells = [(f' PORT="{port} left"', f"{_bold(name)}&#160;" if name else " ")]
    if variant and not what:
        cells.append((f' PORT="{port} right" COLSPAN="2"', _small(variant, INK)))
    else:
        cells.append(("", f"{_small(variant, INK)}&#160;" if variant else " "))
        cells.append((f' PORT="{port} right"', left.join([*what, ""]) if what else " "))
    drawn = (f'<TD ALIGN="LEFT" VALIGN="TOP"{extra}>{cell}</TD>' for extra, cell in cells)
    return f"<TR>{''.join(drawn)}</TR>"
