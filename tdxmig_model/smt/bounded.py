"""Bounded search: a shortest run of a small instance that ends in a wanted state.

One query asks for a run of at most k steps; a run may idle at its end.  k grows until a run is
found, then shrinks until there is none.  The run is replayed on the interpreter, so a trace that
this module returns is a run of the model whatever the encoding says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdxmig_model.expr import Instance, Node, System, all_of
from tdxmig_model.expr.finite import defined
from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.finite import Cells, Finite, slice_for, width_for
from tdxmig_model.smt.runs import Move, Run, replay
from tdxmig_model.smt.z3api import Answer, Solver, Term

WORK = 30_000_000
"""z3 resource units for one query."""


@dataclass(frozen=True, slots=True)
class Search:
    """The result of a bounded search.

    `run` is a shortest run that ends as wanted.  Without one, no run of up to `depth` steps does;
    `complete` is false where the work bound was met before the depth that was asked for.
    """

    run: Run | None
    depth: int
    complete: bool


class _Relation:
    """One step between two states, built once and substituted for each time.

    The number of the step is a bit vector; the number after the last stands for idling.
    """

    def __init__(self, whole: System, instance: Instance, wanted: Node, depth: int) -> None:
        wanted = inside(wanted, instance)
        self.system = slice_for(whole, instance, [wanted])
        self._whole = whole
        width = width_for(whole, instance, [wanted], depth)
        self.encoder = Finite(self.system, instance, width)
        self.selector_width = (len(self.system.steps) + 1).bit_length() + 1
        self.idle = self.numbered(len(self.system.steps))
        self.before = self.encoder.unknown_state("before")
        self.after = self.encoder.unknown_state("after")
        self.choice = z.bits_const("step", self.selector_width)
        self.envs: list[dict[str, Term]] = []
        zero = self.numbered(0)
        numbers = [z.at_most(zero, self.choice), z.at_most(self.choice, self.idle)]
        self.formula = z.both([*numbers, *self._build()])
        self.wanted = self.encoder.term(wanted, self.encoder.view(self.before), {})

    def numbered(self, number: int) -> Term:
        """A step's number as a term."""
        return z.bits_value(number, self.selector_width)

    def _build(self) -> list[Term]:
        """The guard of the chosen step, and every cell after it."""
        facts: list[Term] = []
        view = self.encoder.view(self.before)
        news = {name: list(terms) for name, terms in self.before.items()}
        for number, step in enumerate(self.system.steps):
            chosen = z.equal(self.choice, self.numbered(number))
            env, ranges = self.encoder.parameters(step, "parameter")
            self.envs.append(env)
            # What the whole step reads and writes is inside the instance.
            whole = replace(step, then=self._whole.step(step.name).then)
            fires = self.encoder.fires(whole, view, env)
            facts.append(z.when(chosen, z.both([*ranges, fires])))
            for name, values in self.encoder.written(step, view, env).items():
                news[name] = [
                    z.choose(chosen, value, old)
                    for value, old in zip(values, news[name], strict=True)
                ]
        for name, terms in news.items():
            for now, term in zip(self.after[name], terms, strict=True):
                facts.append(z.equal(now, term))
        return facts


def inside(formula: Node, instance: Instance) -> Node:
    """The formula, and that it reads nothing outside the instance."""
    return all_of(defined(formula, instance), formula)


def _flat(cells: Cells) -> list[Term]:
    return [term for name in sorted(cells) for term in cells[name]]


class _Unrolling:
    """The runs of up to `length` steps, as assertions of one solver."""

    def __init__(self, relation: _Relation, length: int, seed: int) -> None:
        self.relation = relation
        self.solver = Solver(quantified=False, seed=seed)
        self.choices: list[Term] = []
        self.envs: list[list[dict[str, Term]]] = []
        cells = relation.encoder.initial_cells()
        for time in range(length):
            cells = self._tick(cells, time)
        olds = _flat(relation.before)
        self.solver.add(z.substitute(relation.wanted, olds, _flat(cells)))

    def _tick(self, cells: Cells, time: int) -> Cells:
        """One step (or idling) from a state to the next."""
        relation = self.relation
        after = relation.encoder.unknown_state(f"at {time + 1}")
        choice = z.bits_const(f"step at {time}", relation.selector_width)
        envs = [
            relation.encoder.parameters(step, f"at {time}")[0] for step in relation.system.steps
        ]
        olds = [*_flat(relation.before), *_flat(relation.after), relation.choice]
        news = [*_flat(cells), *_flat(after), choice]
        for old, new in zip(relation.envs, envs, strict=True):
            olds += old.values()
            news += new.values()
        self.solver.add(z.substitute(relation.formula, olds, news))
        if self.choices:
            was_idle = z.equal(self.choices[-1], relation.idle)
            self.solver.add(z.when(was_idle, z.equal(choice, relation.idle)))
        self.choices.append(choice)
        self.envs.append(envs)
        return after

    def moves(self) -> list[Move]:
        """The run of the last model, without the idling at its end."""
        model = self.solver.model()
        steps = self.relation.system.steps
        found: list[Move] = []
        for choice, envs in zip(self.choices, self.envs, strict=True):
            number = int(model.value(choice))
            if number == len(steps):
                break
            values = self.relation.encoder.values_of(model, steps[number], envs[number])
            found.append((steps[number].name, values))
        return found


def search(
    system: System,
    instance: Instance,
    wanted: Node,
    *,
    depth: int,
    refuted: int = -1,
    seed: int = 0,
    stride: int = 4,
    work: int = WORK,
    shortest: bool = True,
) -> Search:
    """A run of at most `depth` steps that ends in a state with `wanted`, if wanted a shortest one.

    `refuted` is a depth to which an earlier search found no such run.
    """
    relation = _Relation(system, instance, wanted, depth)

    def ask(length: int) -> tuple[Answer, list[Move]]:
        unrolling = _Unrolling(relation, length, seed)
        answer = unrolling.solver.check(rlimit=work)
        return answer, unrolling.moves() if answer is Answer.SAT else []

    length = min(depth, refuted + 1 if refuted < 0 else refuted + stride)
    while True:
        answer, found = ask(length)
        if answer is Answer.SAT:
            break
        if answer is Answer.UNKNOWN:
            return Search(None, refuted, complete=False)
        refuted = length
        if length >= depth:
            return Search(None, refuted, complete=True)
        length = min(depth, length + stride)
    while shortest and len(found) - 1 > refuted:
        answer, shorter = ask(len(found) - 1)
        if answer is not Answer.SAT:
            break
        found = shorter
    return Search(replay(system, instance, found, wanted), len(found), complete=True)
