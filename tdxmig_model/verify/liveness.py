"""What can still happen, and what must: path properties, by explicit search of small instances.

An invariant speaks of one state; these speak of what follows it.  *Can*: from every reachable state
in which the premise holds, some continuation leads to the goal.  *Must*: besides, no run that is
weakly fair avoids the goal for ever; a run is weakly fair if no row that is enabled from some point
on is left out for ever.  All reachable states of the stated sizes are looked at; a larger instance
is not covered by the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tdxmig_model.errors import UsageError
from tdxmig_model.explore import Graph, graph, moves_of
from tdxmig_model.expr import Need, Node, System, any_of
from tdxmig_model.model.paths import PATHS, Path
from tdxmig_model.model.words import REPAIRS, TDX_1_5_01, with_only
from tdxmig_model.smt.runs import replay
from tdxmig_model.story import tell
from tdxmig_model.verify.judge import Report, Row, Verdict, ceiling, small_instance

STATES = 200_000
"""How many states of an instance are looked at."""


@dataclass(frozen=True, slots=True)
class Stuck:
    """Where a path property fails: the state, and why."""

    state: int
    reason: str


def liveness(
    profile: str,
    identifiers: Iterable[str] | None = None,
    *,
    paths: Sequence[Path] = PATHS,
    states: int = STATES,
) -> Report:
    """Judge the path properties of a profile (all of them by default)."""
    begun = time.perf_counter()
    wanted = None if identifiers is None else set(identifiers)
    unknown = (wanted or set()) - {p.identifier for p in paths}
    if unknown:
        raise UsageError(f"no path property {', '.join(sorted(unknown))}")
    rows = tuple(
        _classified(judge_path(path, profile, states=states), path, profile)
        for path in paths
        if wanted is None or path.identifier in wanted
    )
    assumptions = tuple(dict.fromkeys(a for path in paths for a in path.assumptions))
    ms = (time.perf_counter() - begun) * 1000
    return Report("liveness", profile, rows, (), (), assumptions, 0, 0, ms)


def _classified(row: Row, path: Path, profile: str) -> Row:
    """With the repairs that, each alone, restore a path which the published module lacks."""
    if row.verdict != "violated" or profile != TDX_1_5_01:
        return row
    kept = (r for r in REPAIRS if judge_path(path, with_only(r)).verdict == "exhausted")
    return replace(row, removed_by=tuple(kept))


def judge_path(
    path: Path, profile: str, *, states: int = STATES, system: System | None = None
) -> Row:
    """The verdict on one path property; `system` stands for the path's own, for mutants."""
    begun = time.perf_counter()
    part = honest((system or path.system).under(profile), path)
    instance = small_instance(part, path.sizes)
    told = any_of(*(formula for _, formula in path.dead_ends))
    formulas: dict[str, Node] = {"goal": path.goal, "told": told, "premise": path.premise}
    seen = graph(part, instance, formulas, limit=states, ceiling=ceiling(instance))
    stuck = find_stuck(seen, path)
    sizes = ", ".join(f"{n} {name}" for name, n in instance.sizes.items())
    method = f"all {seen.states} states of {sizes}"
    if path.must:
        method += ", weak fairness of every row"
    ms = (time.perf_counter() - begun) * 1000

    def row(verdict: Verdict, how: str, depth: int | None = None) -> Row:
        return Row(path.identifier, path.sentence, path.level, verdict, how, depth, ms)

    if seen.truncated:
        return row("bounded", f"the first {seen.states} states of {sizes}")
    if not seen.holds["premise"] or not seen.holds["goal"]:
        return row("vacuous", f"premise or goal in none of {method}")
    if stuck is None:
        return row("exhausted", method)
    trace = seen.trace(stuck.state)
    run = replay(part, instance, moves_of(trace))
    found = row("violated", f"{stuck.reason}, of {method}", len(trace))
    return replace(found, story=tell(part, run), detail=stuck.reason)


def honest(part: System, path: Path) -> System:
    """The system without the rows that the premise excludes, and with what hosts keep to."""
    gone = [name for name in path.without if part.has_step(name)]
    for name in gone:
        part = part.without_step(name)
    kept: Mapping[str, Need] = dict(path.policies)
    steps = tuple(
        replace(s, when=(*s.when, kept[s.name])) if s.name in kept else s for s in part.steps
    )
    return replace(part, steps=steps, properties=(), goals=(), _by_name={})


def find_stuck(seen: Graph, path: Path) -> Stuck | None:
    """The first state from which the goal cannot be reached, or a fair cycle that avoids it.

    A state that is a dead end with a reason is none of them; one that only leads there is.
    """
    if seen.truncated:
        return None
    able = _backwards(seen, seen.holds["goal"])
    bad = sorted(seen.holds["premise"] - able - seen.holds["told"])
    if bad:
        return Stuck(bad[0], "no continuation leads to the goal")
    if path.must:
        cycle = fair_cycle(seen, seen.holds["goal"] | seen.holds["told"])
        if cycle is not None:
            return Stuck(cycle, "a fair run stays here for ever")
    return None


def _backwards(seen: Graph, goal: frozenset[int]) -> set[int]:
    """The states from which the goal can be reached."""
    before: list[list[int]] = [[] for _ in range(seen.states)]
    for state, edges in enumerate(seen.edges):
        for _, target in edges:
            before[target].append(state)
    found = set(goal)
    queue = list(goal)
    while queue:
        for state in before[queue.pop()]:
            if state not in found:
                found.add(state)
                queue.append(state)
    return found


def fair_cycle(seen: Graph, goal: frozenset[int]) -> int | None:
    """The first state of a weakly fair run that never meets the goal, None if there is none.

    A component is fair unless some row is enabled in all of its states and never leads within it;
    then no part of it is fair either, so that maximal components suffice.  Where nothing is
    enabled the run has ended.
    """
    fair = []
    for component in _components(seen, goal):
        inside = set(component)
        edges = [(name, t in inside) for state in component for name, t in seen.edges[state]]
        taken = {name for name, within in edges if within}
        enabled = [{name for name, _ in seen.edges[state]} for state in component]
        always = set.intersection(*enabled)
        ended = not any(enabled)
        if ended or (taken and always <= taken):
            fair.append(min(component))
    return min(fair, default=None)


def _components(seen: Graph, goal: frozenset[int]) -> list[list[int]]:
    """The strongly connected components of the states outside the goal (Tarjan, without calls)."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in range(seen.states):
        if root in goal or root in number:
            continue
        work = [(root, 0)]
        while work:
            state, position = work.pop()
            if position == 0:
                number[state] = low[state] = len(number)
                stack.append(state)
                on_stack.add(state)
            edges = seen.edges[state]
            while position < len(edges):
                target = edges[position][1]
                position += 1
                if target in goal:
                    continue
                if target not in number:
                    work += [(state, position), (target, 0)]
                    break
                if target in on_stack:
                    low[state] = min(low[state], number[target])
            else:
                if low[state] == number[state]:
                    found.append(_popped(stack, on_stack, state))
                if work:
                    parent = work[-1][0]
                    low[parent] = min(low[parent], low[state])
    return found


def _popped(stack: list[int], on_stack: set[int], last: int) -> list[int]:
    component = []
    while True:
        state = stack.pop()
        on_stack.discard(state)
        component.append(state)
        if state == last:
            return component


def identifiers() -> list[str]:
    """The ids of all path properties."""
    return [path.identifier for path in PATHS]


__all__ = ["Stuck", "fair_cycle", "find_stuck", "honest", "identifiers", "judge_path", "liveness"]
