"""``tdxmig explore``: every state of a model at one size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from tdxmig_model.cli import instance, output
from tdxmig_model.errors import UsageError
from tdxmig_model.expr import Property, System, show

if TYPE_CHECKING:
    from tdxmig_model.explore import Exploration, TraceStep

STATES = 2_000_000
CELL_BYTES, STATE_BYTES = 24, 400
"""What a state takes in memory, for each of its integers and besides, with its transitions and what
the digest needs in the end."""


@click.command(name="explore", epilog="Example: tdxmig explore lifecycle --vcpus 2 --messages 8")
@instance.model_argument
@instance.options
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help=f"End the search at so many states [default: {STATES}, or as many as the memory holds].",
)
@click.option("--depth", type=click.IntRange(min=0), help="End the search after so many steps.")
@output.json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    limit: int | None,
    depth: int | None,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Visit every reachable state of a model at the given sizes.

    Says how many states and transitions there are, which properties are violated, by a shortest
    trace, and which goals are reached.  Steps that would leave the sizes or the ceilings are not
    taken and counted as clipped: the answer is about these sizes only.  Exits 1 if a property is
    violated.

    What a search takes in memory and time is bounded by --limit; a search that it ends is called
    bounded, and one that could not fit into the memory of this host is not begun.

    \b
    MODEL is one of
      lifecycle, leaf, order, memory, control, keys, key-words, bindings,
      terms, forks, locks, import-locks, calls, guest-pages
    and lifecycle by default.
    """
    from tdxmig_model.explore import explore

    chosen = instance.choose(model, **sizes)
    limit = _fitting(chosen, limit)
    found = explore(
        chosen.system,
        chosen.instance,
        goals=chosen.goals(),
        invariants={p.identifier: p.formula for p in _claims(chosen.system)},
        limit=limit,
        depth=depth,
        ceiling=chosen.ceilings,
    )
    notices = _notices(chosen, found)
    if as_json:
        output.emit_json(_as_json(chosen, found, notices) | {"limit": limit})
    else:
        _print(chosen, found, notices)
        if found.truncated and found.states >= limit:
            click.echo(f"ended by --limit, at {limit} states")
    ctx.exit(1 if found.violations else 0)


def _claims(system: System) -> list[Property]:
    """The properties; a lemma claims nothing, and not every profile keeps each."""
    return [p for p in system.properties if p.level != "lemma"]


def _notices(chosen: instance.Chosen, found: Exploration) -> dict[str, str]:
    """What is to be done about each violation."""
    if not found.violations:
        return {}
    from tdxmig_model.cli.notice import classified, removing

    return {
        name: classified(name, removing(chosen, name, trace))
        for name, trace in found.violations.items()
    }


def _fitting(chosen: instance.Chosen, limit: int | None) -> int:
    """The limit in states; UsageError if so many cannot fit into the memory of this host."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = there // (STATE_BYTES + CELL_BYTES * chosen.cells())
    if limit is not None and limit > most:
        raise UsageError(
            f"{limit} states of {chosen.cells()} integers do not fit into the {there >> 20} MiB of "
            f"this host; choose smaller sizes, or --limit {most} at most"
        )
    return min(STATES, most) if limit is None else limit


def _warnings(chosen: instance.Chosen, found: Exploration) -> list[str]:
    """What the sizes leave no room for: said of them, or seen by a search of everything."""
    completion = chosen.completion
    warnings = list(chosen.warnings)
    if completion and not found.truncated and completion not in found.reached:
        warnings.append(
            f"no migration completes ({completion}) within these sizes and ceilings, so the "
            "answer says little; raise --messages or --ceiling"
        )
    return warnings


def _verdict(found: Exploration) -> str:
    if found.violations:
        return "violated"
    return "bounded" if found.truncated else "exhausted"


def _as_json(
    chosen: instance.Chosen, found: Exploration, notices: Mapping[str, str]
) -> dict[str, object]:
    def told(traces: Any, key: str) -> list[dict[str, object]]:
        return [
            {key: name, "trace": [_step(chosen.system, s) for s in traces[name]]}
            for name in sorted(traces)
        ]

    return {
        "ok": not found.violations,
        "verdict": _verdict(found),
        "model": chosen.system.name,
        "profile": chosen.profile,
        "sizes": chosen.sizes(),
        "ceilings": dict(sorted(chosen.ceilings.items())),
        "states": found.states,
        "transitions": found.transitions,
        "depth": found.depth,
        "digest": found.digest,
        "states_per_s": found.states_per_s,
        "violations": [
            {**one, "notice": notices[str(one["property"])]}
            for one in told(found.violations, "property")
        ],
        "reached": told(found.reached, "goal"),
        "not_reached": [g.identifier for g in chosen.goals() if g.identifier not in found.reached],
        "dead_steps": list(found.dead_steps),
        "deadlocks": found.deadlocks,
        "clipped": found.clipped,
        "truncated": found.truncated,
        "warnings": _warnings(chosen, found),
    }


def _step(system: System, taken: TraceStep) -> dict[str, object]:
    kinds = {p.name: p.kind for p in system.step(taken.step).params}
    return {
        "step": taken.step,
        "params": {name: show(kinds[name], value) for name, value in taken.params.items()},
    }


def _print(chosen: instance.Chosen, found: Exploration, notices: Mapping[str, str]) -> None:
    sizes = ", ".join(f"{name} {size}" for name, size in chosen.sizes().items())
    click.echo(f"{chosen.system.name} model, profile {chosen.profile}: {sizes}")
    click.echo(
        f"{_verdict(found)}: {found.states} states, {found.transitions} transitions, "
        f"depth {found.depth}, {found.states_per_s} states/s"
    )
    click.echo(f"digest {found.digest}")
    click.echo(f"clipped by sizes and ceilings: {found.clipped}; without a step: {found.deadlocks}")
    for name in sorted(found.violations):
        click.echo(f"\nviolated {name}: {chosen.system.property(name).sentence}")
        for number, taken in enumerate(found.violations[name], 1):
            click.echo(f"  {number:3} {_line(chosen.system, taken)}")
        click.echo(notices[name])
    reached = [g for g in chosen.goals() if g.identifier in found.reached]
    for goal in reached:
        steps = len(found.reached[goal.identifier])
        click.echo(f"reachable {goal.identifier} in {steps} steps: {goal.sentence}")
    for goal in chosen.goals():
        if goal not in reached:
            click.echo(f"not reached at these sizes: {goal.identifier}")
    if found.dead_steps:
        click.echo("steps never taken at these sizes: " + ", ".join(found.dead_steps))
    for warning in _warnings(chosen, found):
        click.echo(f"warning: {warning}")


def _line(system: System, taken: TraceStep) -> str:
    params = _step(system, taken)["params"]
    assert isinstance(params, dict)
    return f"{taken.step}({', '.join(f'{k}={v}' for k, v in params.items())})"
