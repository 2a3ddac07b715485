"""A counterexample as a story: source, channel and destination as lanes, one line for each step.

A line says who did what and only what changed by it, in the lane of whoever owns the variable.  The
end says which claim is broken, for which elements, and which guard conjunct was deleted.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tdxmig_model.expr import EnumType, Interpreter, Property, System, show
from tdxmig_model.expr.types import Type
from tdxmig_model.smt.encode import reads, split
from tdxmig_model.smt.runs import Run, cells_of, failing_element

LANES = ("source", "network", "destination")
TITLES = {"source": "source", "network": "channel", "destination": "destination"}


@dataclass(frozen=True, slots=True)
class Change:
    """One element that a step changed; values as text."""

    name: str
    owner: str
    before: str
    after: str

    @property
    def short(self) -> str:
        """The name as it stands in its owner's lane."""
        return self.name.removeprefix(f"{self.owner}_")

    def __str__(self) -> str:
        if self.before == "no":
            return self.short
        if self.after == "no":
            return f"not {self.short}"
        return f"{self.short} {self.before} → {self.after}"


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a run: who took it, its parameters as text, what it changed."""

    number: int
    step: str
    who: str
    parameters: Mapping[str, str]
    changes: tuple[Change, ...]

    def as_json(self) -> dict[str, object]:
        """The event as plain data."""
        return {
            "step": self.step,
            "who": self.who,
            "parameters": dict(self.parameters),
            "changed": {c.name: [c.before, c.after] for c in self.changes},
        }


@dataclass(frozen=True, slots=True)
class Story:
    """A run, told: its events, and what its end says."""

    events: tuple[Event, ...]
    ending: tuple[str, ...]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For each event its number and the text of each lane."""
        return [(str(e.number), *_lanes(e)) for e in self.events]

    def text(self, width: int = 120) -> str:
        """The story in three columns; a long cell goes on in the next line."""
        column = max(20, (width - 6 - 6) // 3)
        titles = ("", *(TITLES[lane] for lane in LANES))
        lines = [_line(titles, column), "-" * (6 + 3 * (column + 2))]
        for number, *lanes in self.rows():
            wrapped = [textwrap.wrap(text, column) or [""] for text in lanes]
            for i in range(max(len(w) for w in wrapped)):
                cells = (w[i] if i < len(w) else "" for w in wrapped)
                lines.append(_line((number if i == 0 else "", *cells), column))
        return "\n".join((*lines, "", *self.ending))


def _line(cells: Sequence[str], column: int) -> str:
    number, *lanes = cells
    return (f"{number:>3}   " + "  ".join(f"{text:<{column}}" for text in lanes)).rstrip()


def _lanes(event: Event) -> tuple[str, str, str]:
    """The text of each lane: the step in its actor's, every change in its owner's."""
    texts: dict[str, list[str]] = {lane: [] for lane in LANES}
    values = ", ".join(f"{name} {value}" for name, value in event.parameters.items())
    name = event.step.removeprefix(f"{event.who}_") + (f" ({values})" if values else "")
    texts[_lane(event.who)].append(f"{name}:")
    for lane in LANES:
        mine = [c for c in event.changes if _lane(c.owner) == lane]
        texts[lane] += [f"{text};" for text in _grouped(mine)]
    source, channel, destination = (" ".join(texts[lane]).rstrip(":;") for lane in LANES)
    return source, channel, destination


def _lane(owner: str) -> str:
    return owner if owner in LANES else "network"


def _grouped(changes: Sequence[Change]) -> list[str]:
    """Changes as text; those of one element of several maps with one first word are one text."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        name, _, key = change.short.partition("[")
        first, _, rest = name.partition("_")
        together = (first, key) if key and rest else (change.short, "")
        groups.setdefault(together, []).append(change)
    texts = []
    for (first, key), members in groups.items():
        if len(members) == 1:
            texts.append(str(members[0]))
            continue
        words = (c.short.partition("[")[0].removeprefix(f"{first}_") for c in members)
        pairs = (f"{word} {c.after}" for word, c in zip(words, members, strict=True))
        texts.append(f"{first}[{key}: {', '.join(pairs)}")
    return texts


def events(system: System, run: Run, *, ghosts: frozenset[str] = frozenset()) -> tuple[Event, ...]:
    """The steps of a run with what each changed; ghosts only those that are named."""
    told = []
    states = zip(run.states, run.states[1:], strict=False)
    for number, ((name, values), (before, after)) in enumerate(
        zip(run.moves, states, strict=True), 1
    ):
        step = system.step(name)
        changes = []
        for variable, old, new in zip(system.variables, before, after, strict=True):
            if variable.ghost and variable.name not in ghosts:
                continue
            olds = cells_of(run.instance, variable, old)
            news = cells_of(run.instance, variable, new)
            for (cell, kind, was), (_, _, now) in zip(olds, news, strict=True):
                if was != now:
                    changes.append(Change(cell, variable.owner, show(kind, was), show(kind, now)))
        parameters = {p.name: _parameter(p.kind, values[p.name]) for p in step.params}
        told.append(Event(number, name, step.actor, parameters, tuple(changes)))
    return tuple(told)


def _parameter(kind: Type, value: int | bool) -> str:
    return show(kind, value) if isinstance(kind, EnumType) else str(value)


def tell(
    system: System,
    run: Run,
    *,
    broken: Property | None = None,
    deleted: tuple[str, str] | None = None,
    original: System | None = None,
) -> Story:
    """The story of a run that ends where `broken` fails, perhaps because a guard was deleted.

    `deleted` is the step and the label of the conjunct, which `original` still has.
    """
    ghosts = frozenset[str]() if broken is None else reads(broken.formula)
    ending: list[str] = []
    if broken is not None:
        ending.append(f"Broken: {broken.identifier}, {broken.sentence}")
        ending += (f"  {line}" for line in failures(system, run, broken))
    if deleted is not None:
        step, label = deleted
        row = (original or system).step(step)
        text = f": {row.needs(label).formula}" if original is not None else ""
        ending.append(f"Deleted from {step}: the conjunct {label}{text}")
    return Story(events(system, run, ghosts=ghosts), tuple(ending))


def failures(system: System, run: Run, broken: Property) -> list[str]:
    """The conjuncts of a property that are false at the end of a run, with their elements."""
    interpreter = Interpreter(system, run.instance)
    last = run.states[-1]
    lines = []
    for piece in split(broken.formula):
        try:
            holds = interpreter.value(piece, last, {})
        except IndexError:
            continue
        if not holds:
            element = failing_element(system, run.instance, piece, last)
            found = ", ".join(f"{n} = {v}" for n, v in element.items())
            lines.append(f"not so{f' for {found}' if found else ''}: {piece}")
    return lines
