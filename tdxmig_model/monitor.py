"""A system at run time: it accepts a step or refuses it and says why.

A refusal changes nothing, names every conjunct that does not hold with the values it read, and
lists what would be legal instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import nlargest
from itertools import product
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.compile import Compiled
from tdxmig_model.errors import ModelError, Refused, Unmet
from tdxmig_model.expr import (
    BoolType,
    EnumType,
    IndexType,
    Instance,
    Interpreter,
    MapVariable,
    Parameter,
    Step,
    System,
    Type,
    Value,
    initial_state,
    show,
    subterms,
)

TRIED: Final = 64
"""Values of one parameter that are tried one by one to find out whether a step is legal."""


class Monitor:
    """The state of one system in one instance, moved only by its steps.

    `headline` names the variables that every refusal shows.  Maps over a page index become NumPy
    arrays, so that a bundle's entries are one compiled step.  Ghosts are followed only where
    properties are to be evaluated on the state.
    """

    def __init__(
        self,
        system: System,
        instance: Instance,
        headline: Sequence[str] = (),
        actor: str | None = None,
        *,
        ghosts: bool = False,
    ) -> None:
        self.system = system
        self.instance = instance
        self.headline = tuple(headline)
        self.actor = actor
        self._compiled = Compiled(system, instance, ghosts=ghosts)
        self._interpreter = Interpreter(system, instance)
        self._slots = self._interpreter.slots
        self.state: list[Any] = initial_state(system, instance)
        self._undo: list[tuple[int, Any, Any]] | None = None
        for slot, variable in enumerate(system.variables):
            if isinstance(variable, MapVariable) and isinstance(self.state[slot], list):
                kind = np.int8 if isinstance(variable.kind, EnumType | BoolType) else np.int64
                self.state[slot] = np.array(self.state[slot], dtype=kind)

    # --- reading and the environment -------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        return self.state[self._slot(name)]

    def __setitem__(self, name: str, value: object) -> None:
        """Set a variable from outside: only what the network or the set-up decides."""
        self.state[self._slot(name)] = value

    def put(self, name: str, value: object, at: int | None = None) -> None:
        """Set a variable, or one entry of a map, from outside; `rollback` takes it back."""
        slot = self._slot(name)
        held = self.state[slot]
        if self._undo is not None:
            self._undo.append((slot, None, held.copy() if hasattr(held, "copy") else held))
        if at is None:
            self.state[slot] = value
        else:
            held[at] = value

    def text(self, name: str) -> str:
        """A scalar's value as text."""
        return show(self.system.variable(name).kind, self[name])

    def shown(self) -> dict[str, object]:
        """The headline variables, as text."""
        return {name: self.text(name) for name in self.headline}

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            raise ModelError(f"the {self.system.name} model has no variable {name}")
        return self._slots[name]

    # --- steps -----------------------------------------------------------------------------------

    def _arguments(self, step: Step, params: Mapping[str, Value]) -> list[Value]:
        names = [p.name for p in step.params]
        if sorted(names) != sorted(params):
            raise ModelError(f"step {step.name} takes {names}, got {sorted(params)}")
        return [params[n] for n in names]

    def find(self, name: str) -> Step:
        """The row of that name; a name without a row is refused like a step that is not legal."""
        if not self.system.has_step(name):
            unmet = Unmet("row", f"a row {name} in the {self.system.name} model", {})
            raise Refused(name, self.shown(), [unmet], self.legal())
        return self.system.step(name)

    def check(self, name: str, **params: Value) -> None:
        """Raise Refused unless every conjunct of the step's guard holds."""
        step = self.find(name)
        arguments = self._arguments(step, params)
        outside = self._compiled.outside(name, *arguments)
        if outside is not None:
            unmet = Unmet("domain", outside, {})
            raise Refused(name, self.shown(), [unmet], self.legal(), step.why)
        if not self._compiled.guard(name)(self.state, *arguments):
            raise self.refusal(step, params)

    def take(self, name: str, **params: Value) -> None:
        """Check and apply one step."""
        self.check(name, **params)
        step = self.system.step(name)
        self._remember(step, params)
        self._compiled.apply(name)(self.state, *self._arguments(step, params))

    def take_each(
        self, name: str, parameter: str, indices: NDArray[np.int64], **others: Value
    ) -> None:
        """Take the same step for several distinct indexes: all of them, or Refused and none."""
        step = self.find(name)
        if not len(indices):
            return
        bulk = self._compiled.bulk(name, parameter)
        try:
            held = bulk.guard_mask(self.state, indices, **others)
        except Refused as refused:  # an index twice: the rows know no state
            raise Refused(name, self.shown(), refused.unmet, self.legal(), refused.why) from refused
        if not held.all():
            first = int(indices[int(np.argmin(held))])
            raise self.refusal(step, {**others, parameter: first})
        self._remember(step, {**others, parameter: indices})
        bulk.apply_checked(self.state, indices, **others)

    # --- taking back -----------------------------------------------------------------------------

    def begin(self) -> None:
        """From here on, remember what steps overwrite, so that `rollback` can take them back."""
        self._undo = []

    def commit(self) -> None:
        """Keep what was done since `begin`."""
        self._undo = None

    def rollback(self) -> None:
        """Take back everything since `begin`."""
        for slot, where, old in reversed(self._undo or []):
            if where is None:
                self.state[slot] = old
            else:
                self.state[slot][where] = old
        self._undo = None

    def _remember(self, step: Step, params: Mapping[str, Any]) -> None:
        if self._undo is None:
            return
        for assign in step.then:
            slot = self._slots[assign.target.name]
            value = self.state[slot]
            match assign.keys:
                case (Parameter(name=name),) if isinstance(value, np.ndarray):
                    where = params[name]
                    self._undo.append((slot, where, np.copy(value[where])))
                case _:
                    self._undo.append(
                        (slot, None, value.copy() if hasattr(value, "copy") else value)
                    )

    # --- explaining ------------------------------------------------------------------------------

    def refusal(self, step: Step, params: Mapping[str, Value]) -> Refused:
        """The refusal of a step that does not hold, conjunct by conjunct."""
        unmet = self._compiled.unmet(step.name, self.state, *self._arguments(step, params))
        return Refused(step.name, {**self.shown(), **params}, unmet, self.legal(), step.why)

    def legal(self) -> list[str]:
        """Steps that can be taken now, with some parameters at least, in the order of the rows.

        Every step listed is legal.  Of a log that grows only the newest entries are tried, so one
        that is legal with an older entry alone is not listed.
        """
        return [s.name for s in self._rows() if self._open(s)]

    def _rows(self) -> Iterable[Step]:
        return self.system.of_actor(self.actor) if self.actor else self.system.steps

    def _open(self, step: Step) -> bool:
        for need in step.when:
            if any(isinstance(n, Parameter) for n in subterms(need.formula)):
                continue
            if not self._interpreter.value(need.formula, self.state, {}):
                return False
        many = self._bulk_parameter(step)
        others = [p for p in step.params if p.name != many]
        for values in product(*(self._candidates(p.kind) for p in others)):
            chosen = dict(zip((p.name for p in others), values, strict=True))
            if many is None:
                guard = self._compiled.guard(step.name)
                if guard(self.state, *self._arguments(step, chosen)):
                    return True
            else:
                kind = next(p.kind for p in step.params if p.name == many)
                indices = np.array(self._candidates(kind), dtype=np.int64)
                bulk = self._compiled.bulk(step.name, many)
                if bulk.guard_mask(self.state, indices, **chosen).any():
                    return True
        return False

    def _bulk_parameter(self, step: Step) -> str | None:
        """The parameter whose values, as many as there are pages, are tried at once."""
        for wanted in step.params:
            large = len(self._candidates(wanted.kind)) > TRIED
            if large and self._compiled.bulk_refusal(step.name, wanted.name) is None:
                return wanted.name
        return None

    def _candidates(self, kind: Type) -> Sequence[int]:
        """The values of a parameter that are tried: all of them, or the newest of a log."""
        if not isinstance(kind, IndexType) or self.instance.sizes.get(kind.name) is not None:
            return self.instance.domain(kind)
        written: set[int] = set()
        for slot, variable in enumerate(self.system.variables):
            if isinstance(variable, MapVariable) and variable.indexes == (kind,):
                written.update(self.state[slot])
        return nlargest(TRIED, written)
