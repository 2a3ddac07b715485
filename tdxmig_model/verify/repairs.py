"""Which repairs, each alone, remove a counterexample of the unrepaired module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from tdxmig_model.expr import (
    IndexType,
    Interpreter,
    Node,
    Property,
    State,
    Step,
    System,
    Value,
    initial_state,
    not_,
)
from tdxmig_model.model.words import REPAIRS, with_only
from tdxmig_model.smt.bounded import inside
from tdxmig_model.smt.runs import Run

STATES = 2_000
"""After so many states of one step the parameters that were not tried yet are left alone."""


def removed_by(system: System, run: Run, broken: Property) -> tuple[str, ...]:
    """The repairs that remove a run of tdx-1.5.01 which ends in a state that breaks a property.

    A repair removes the run if with that repair alone its steps cannot be taken, or end where the
    property is kept, with whatever keys, pages and other elements: that one key is refused and
    another is not repairs nothing.  Other steps may still break the property.  `system` is the
    whole model.
    """
    wanted = inside(not_(broken.formula), run.instance)
    return tuple(r for r in REPAIRS if not _ends_there(system.under(with_only(r)), run, wanted))


def _ends_there(part: System, run: Run, wanted: Node) -> bool:
    """Whether the steps of a run can end in a state with a formula."""
    interpreter = Interpreter(part, run.instance)
    states = [initial_state(part, run.instance)]
    for name, values in run.moves:
        if not part.has_step(name):
            return False
        step = part.step(name)
        # Enum members and truth values say what a step does, and stay as they are in the run.
        kept = {p.name: values[p.name] for p in step.params if not isinstance(p.kind, IndexType)}
        others = (c for c in interpreter.choices(step) if kept.items() <= c.items())
        choices = [values, *others]  # the run's own come first: they are tried in any case
        states = list(_after(interpreter, step, states, choices))
    return any(interpreter.value(wanted, state, {}) for state in states)


def _after(
    interpreter: Interpreter,
    step: Step,
    states: Sequence[State],
    choices: Sequence[Mapping[str, Value]],
) -> Iterator[State]:
    """The states that a step leads to from some states, each once."""
    known: set[str] = set()
    for state, values in product(states, choices):
        try:
            if not interpreter.enabled(step, state, values):
                continue
            after = interpreter.apply(step, state, values)
        except IndexError:  # it leaves the instance
            continue
        if repr(after) not in known:
            known.add(repr(after))
            yield after
        if len(known) == STATES:
            return
