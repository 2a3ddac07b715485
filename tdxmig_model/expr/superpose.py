"""A larger model on top of a smaller one: the same steps, with more variables, needs and effects.

What is added may read the variables of the smaller model and never write them.  So each run of the
larger model, less what was added, is a run of the smaller one (new steps do nothing there), and
every invariant of the smaller model holds in the larger: it may be used there without proof.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tdxmig_model.errors import ModelError
from tdxmig_model.expr.nodes import Assign, MapVariable, Parameter, Variable
from tdxmig_model.expr.system import Goal, Need, Property, Step, System


@dataclass(frozen=True, slots=True)
class Addition:
    """What a step of the smaller model needs and does besides."""

    needs: tuple[Need, ...] = ()
    then: tuple[Assign, ...] = ()
    params: tuple[Parameter, ...] = ()


def addition(
    *then: Assign | tuple[Assign, ...],
    needs: Iterable[Need] = (),
    params: Iterable[Parameter] = (),
) -> Addition:
    """Declare what is added to a step."""
    updates: list[Assign] = []
    for item in then:
        updates.extend(item if isinstance(item, tuple) else (item,))
    return Addition(tuple(needs), tuple(updates), tuple(params))


def superpose(
    base: System,
    name: str,
    *,
    variables: tuple[Variable | MapVariable, ...],
    additions: Mapping[str, Addition],
    steps: tuple[Step, ...],
    properties: tuple[Property, ...],
    goals: tuple[Goal, ...] = (),
    assumptions: tuple[str, ...] = (),
) -> System:
    """The larger model.  ModelError if an addition or a new step writes what the base has."""
    unknown = sorted(set(additions) - {s.name for s in base.steps})
    if unknown:
        raise ModelError(f"the {base.name} model has no step {', '.join(unknown)} to add to")
    own = {v.name for v in variables}
    for writer, updates in (
        *((f"the addition to {step}", added.then) for step, added in additions.items()),
        *((f"step {row.name}", row.then) for row in steps),
    ):
        for assign in updates:
            if assign.target.name not in own:
                raise ModelError(f"{writer} writes {assign.target.name} of the {base.name} model")
    larger = tuple(
        replace(
            s,
            params=(*s.params, *additions[s.name].params),
            when=(*s.when, *additions[s.name].needs),
            then=(*s.then, *additions[s.name].then),
        )
        if s.name in additions
        else s
        for s in base.steps
    )
    return System(
        name=name,
        variables=(*base.variables, *variables),
        steps=(*larger, *steps),
        properties=properties,
        goals=goals,
        assumptions=(*base.assumptions, *assumptions),
        profiles=base.profiles,
        base=base,
    )
