"""Steps, properties and whole systems: what a model is made of.

A step is one row with everything about it in one place: who takes it, its parameters, the labelled
conjuncts
of its guard, its simultaneous updates, one sentence of reason and a citation.  What a step does not
list
stays as it is.  A refusal names one conjunct; a mutant deletes one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tdxmig_model.errors import ModelError
from tdxmig_model.expr.build import subterms
from tdxmig_model.expr.counts import Count
from tdxmig_model.expr.nodes import (
    Assign,
    Bound,
    Constant,
    ForAll,
    Literal,
    MapVariable,
    Node,
    Parameter,
    Read,
    Size,
    Variable,
)
from tdxmig_model.expr.types import BOOL, INT, BoolType, EnumType, IndexType, Type, compatible


@dataclass(frozen=True, slots=True)
class Need:
    """One labelled conjunct of a guard; `profiles` limits it to some profiles (None: all)."""

    label: str
    formula: Node
    profiles: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the model."""

    name: str
    actor: str
    params: tuple[Parameter, ...]
    when: tuple[Need, ...]
    then: tuple[Assign, ...]
    why: str
    cite: str
    profiles: frozenset[str] | None = None
    part_of: str = ""
    """The call that this row and others are parts of; empty where the row is the whole call."""

    def needs(self, label: str) -> Need:
        """The conjunct with that label."""
        for need in self.when:
            if need.label == label:
                return need
        raise ModelError(
            f"step {self.name} has no conjunct {label}; it has {[n.label for n in self.when]}"
        )

    def writes(self) -> frozenset[str]:
        """Names of the variables that the step updates."""
        return frozenset(a.target.name for a in self.then)


@dataclass(frozen=True, slots=True)
class Property:
    """One thing that is claimed: always true (an invariant), or reachable (a goal).

    `level` is "lifecycle" (an honest host), "leaf" (what the module enforces) or "lemma" (a
    conjunct of the
    inductive invariant that carries the others).  `guards` are the (step, label) pairs that enforce
    it.
    """

    identifier: str
    formula: Node
    sentence: str
    level: str
    cite: str = ""
    guards: tuple[tuple[str, str], ...] = ()
    witness: Node | None = None
    profiles: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """A state that must be reachable: the antidote to a model in which nothing happens."""

    identifier: str
    formula: Node
    sentence: str


@dataclass(frozen=True)
class System:
    """A whole transition system: variables, steps, what is claimed of it, and what it assumes."""

    name: str
    variables: tuple[Variable | MapVariable, ...]
    steps: tuple[Step, ...]
    properties: tuple[Property, ...] = ()
    goals: tuple[Goal, ...] = ()
    assumptions: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    base: System | None = None
    """The smaller model that this one is superposed on; its invariants hold here as well."""
    _by_name: dict[str, Step] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_system(self)
        self._by_name.update({s.name: s for s in self.steps})

    def step(self, name: str) -> Step:
        """The step of that name."""
        if name not in self._by_name:
            raise ModelError(
                f"the {self.name} model has no step {name}; it has {sorted(self._by_name)}"
            )
        return self._by_name[name]

    def has_step(self, name: str) -> bool:
        """Whether there is a step of that name."""
        return name in self._by_name

    def variable(self, name: str) -> Variable | MapVariable:
        """The variable of that name."""
        for variable in self.variables:
            if variable.name == name:
                return variable
        raise ModelError(f"the {self.name} model has no variable {name}")

    def property(self, identifier: str) -> Property:
        """The property of that id."""
        for claimed in self.properties:
            if claimed.identifier == identifier:
                return claimed
        raise ModelError(f"the {self.name} model has no property {identifier}")

    def constants(self) -> tuple[Constant, ...]:
        """Every named constant that some row or property mentions, by name."""
        found = {n.name: n for n in self._nodes() if isinstance(n, Constant)}
        return tuple(found[name] for name in sorted(found))

    def counts(self) -> tuple[Count, ...]:
        """Every declared count that some row or property mentions, by name."""
        found: dict[str, Count] = {}
        for node in self._nodes():
            if isinstance(node, Count) and found.setdefault(node.name, node) != node:
                raise ModelError(f"two different counts are named {node.name}")
        return tuple(found[name] for name in sorted(found))

    def indexes(self) -> tuple[IndexType, ...]:
        """Every index that a map, parameter or size mentions, by name."""
        found: dict[str, IndexType] = {}
        for variable in self.variables:
            if isinstance(variable, MapVariable):
                found.update({k.name: k for k in variable.indexes})
        for step in self.steps:
            found.update(
                {p.kind.name: p.kind for p in step.params if isinstance(p.kind, IndexType)}
            )
        for node in self._nodes():
            if isinstance(node, Size):
                found[node.of.name] = node.of
        return tuple(found[name] for name in sorted(found))

    def under(self, profile: str) -> System:
        """The system of one profile: rows, conjuncts and updates that the profile does not have are
        gone.
        """
        if self.profiles and profile not in self.profiles:
            raise ModelError(f"unknown profile {profile}; known: {', '.join(self.profiles)}")

        def has(profiles: frozenset[str] | None) -> bool:
            return profiles is None or profile in profiles

        steps = tuple(
            replace(
                s,
                when=tuple(n for n in s.when if has(n.profiles)),
                then=tuple(a for a in s.then if has(a.profiles)),
                profiles=None,
            )
            for s in self.steps
            if has(s.profiles)
        )
        properties = tuple(p for p in self.properties if has(p.profiles))
        base = self.base and self.base.under(profile)
        return replace(self, steps=steps, properties=properties, base=base, _by_name={})

    def without(self, step: str, label: str) -> System:
        """The mutant in which one conjunct of one guard is deleted.

        Rows that are parts of one call share the call's checks: an equal conjunct of such a row
        is the same check and goes with it.
        """
        row = self.step(step)
        gone = row.needs(label)

        def loses(other: Step) -> bool:
            return other.name == step or (row.part_of != "" and other.part_of == row.part_of)

        steps = tuple(
            replace(s, when=tuple(n for n in s.when if n != gone)) if loses(s) else s
            for s in self.steps
        )
        base = self.base
        if base and base.has_step(step) and gone in base.step(step).when:
            base = base.without(step, label)
        return replace(self, steps=steps, base=base, _by_name={})

    def without_step(self, name: str) -> System:
        """The system without one row.  What a smaller model proves holds of fewer rows too."""
        self.step(name)
        return replace(self, steps=tuple(s for s in self.steps if s.name != name), _by_name={})

    def claims(self) -> tuple[Property, ...]:
        """Its properties and those of the model that it is superposed on."""
        return (*self.properties, *(self.base.claims() if self.base else ()))

    def of_actor(self, actor: str) -> tuple[Step, ...]:
        """The rows that one side takes."""
        return tuple(s for s in self.steps if s.actor == actor)

    def _nodes(self) -> Iterator[Node]:
        for step in self.steps:
            for need in step.when:
                yield from subterms(need.formula)
            for assign in step.then:
                for term in (*assign.keys, assign.value):
                    yield from subterms(term)
        for claimed in self.claims():
            yield from subterms(claimed.formula)
            if claimed.witness is not None:
                yield from subterms(claimed.witness)
        for goal in self.goals:
            yield from subterms(goal.formula)


def scalar(
    name: str,
    kind: Type,
    init: Literal | int | bool,
    owner: str,
    *,
    ghost: bool = False,
    doc: str = "",
) -> Variable:
    """Declare a scalar variable with its initial value."""
    return Variable(name, kind, _initial(name, kind, init), owner, ghost, doc)


def mapping(
    name: str,
    over: tuple[IndexType, ...],
    kind: Type,
    init: Literal | int | bool,
    owner: str,
    *,
    ghost: bool = False,
    doc: str = "",
) -> MapVariable:
    """Declare a map over one or two indexes; every element starts at `init`."""
    if not 1 <= len(over) <= 2:
        raise ModelError(f"map {name} needs one or two indexes, got {len(over)}")
    return MapVariable(name, over, kind, _initial(name, kind, init), owner, ghost, doc)


def _initial(name: str, kind: Type, init: Literal | int | bool) -> Literal:
    if isinstance(init, Literal):
        value = init
    elif isinstance(init, bool):
        value = Literal(init, BOOL)
    else:
        value = Literal(init, INT)
    if not compatible(value.type, kind):
        raise ModelError(
            f"{name} is a {kind.name}; its initial value {value} is a {value.type.name}"
        )
    return value


def member(kind: EnumType, name: str) -> Literal:
    """The literal for one member of an enum."""
    return Literal(kind.position(name), kind)


def members(kind: EnumType) -> tuple[Literal, ...]:
    """The literals of all members, in order."""
    return tuple(Literal(i, kind) for i in range(len(kind.members)))


def need(label: str, formula: Node, *profiles: str) -> Need:
    """A labelled conjunct; with profile names, it stands in those profiles only."""
    if not isinstance(formula, Node) or formula.type != BOOL:
        raise ModelError(
            f"conjunct {label} is {formula!s} ({type(formula).__name__}), not a formula: "
            "==, in, and, or on terms give Python values; write .eq(), .in_(), all_of(), any_of()"
        )
    return Need(label, formula, frozenset(profiles) or None)


def only(profiles: str | Iterable[str], *assigns: Assign) -> tuple[Assign, ...]:
    """Updates that one profile (or several) has and the others do not."""
    having = frozenset({profiles} if isinstance(profiles, str) else profiles)
    return tuple(replace(a, profiles=having) for a in assigns)


def param(name: str, kind: Type) -> Parameter:
    """Declare a parameter of a step: an index element, an enum member or a truth value."""
    if not isinstance(kind, IndexType | EnumType | BoolType):
        raise ModelError(f"parameter {name}: a {kind.name} has no finite instance to choose from")
    return Parameter(name, kind)


def step(
    name: str,
    actor: str,
    params: Sequence[Parameter] = (),
    *,
    when: Sequence[Need],
    then: Iterable[Assign | tuple[Assign, ...]],
    why: str,
    cite: str,
    profiles: Iterable[str] = (),
    part_of: str = "",
) -> Step:
    """Declare one row; an ill-formed one is refused here, by name."""
    updates: list[Assign] = []
    for item in then:
        updates.extend(item if isinstance(item, tuple) else (item,))
    row = Step(
        name,
        actor,
        tuple(params),
        tuple(when),
        tuple(updates),
        why,
        cite,
        frozenset(profiles) or None,
        part_of,
    )
    _check_step(row)
    return row


def _check_step(row: Step) -> None:
    where = f"step {row.name}"
    if not row.why or not row.cite:
        raise ModelError(f"{where} needs a reason (why=) and a citation (cite=)")
    names = [p.name for p in row.params]
    if len(set(names)) != len(names):
        raise ModelError(f"{where} has two parameters with one name: {names}")
    for wanted in row.when:
        if not isinstance(wanted, Need):
            raise ModelError(
                f"{where}: {wanted!s} is not a labelled conjunct; write need(label, formula)"
            )
        _check_scope(where, wanted.formula, row.params, guard=True)
    labels = [n.label for n in row.when]
    if len(set(labels)) != len(labels):
        raise ModelError(f"{where} has two conjuncts with one label: {labels}")
    seen: dict[str, frozenset[str] | None] = {}
    for assign in row.then:
        before = seen.get(assign.target.name, frozenset())
        if assign.target.name in seen and (
            before is None or assign.profiles is None or before & assign.profiles
        ):
            raise ModelError(f"{where} assigns {assign.target.name} twice")
        more = assign.profiles
        seen[assign.target.name] = None if before is None or more is None else before | more
        ghost = assign.target.ghost
        for term in (*assign.keys, assign.value):
            _check_scope(where, term, row.params, guard=not ghost, bound=assign.bound)
        if assign.target.owner not in (row.actor, "network"):
            raise ModelError(
                f"{where} is taken by {row.actor} and may not write "
                f"{assign.target.name} of {assign.target.owner}"
            )


def _check_scope(
    where: str,
    term: Node,
    params: tuple[Parameter, ...],
    *,
    guard: bool,
    bound: tuple[Bound, ...] = (),
) -> None:
    known = {p.name: p for p in params}
    inside_counts = {n.bound for n in subterms(term) if isinstance(n, Count)}
    for node in subterms(term):
        if isinstance(node, Parameter) and known.get(node.name) != node:
            raise ModelError(f"{where} uses the parameter {node.name}, which it does not declare")
        if isinstance(node, Bound) and node.name in known:
            raise ModelError(
                f"{where} binds {node.name}, which is also the name of a parameter: "
                "give the parameter another name"
            )
        if isinstance(node, ForAll):
            raise ModelError(f"{where} quantifies; only properties may (declare a count instead)")
        if isinstance(node, Bound) and node not in bound and node not in inside_counts:
            raise ModelError(f"{where} uses the bound element {node.name} outside its quantifier")
        if guard and isinstance(node, Variable) and node.ghost:
            raise ModelError(f"{where} reads the ghost {node.name}; only properties and ghosts may")
        if guard and isinstance(node, Read) and node.map.ghost:
            raise ModelError(
                f"{where} reads the ghost {node.map.name}; only properties and ghosts may"
            )


def _check_system(system: System) -> None:
    names = [v.name for v in system.variables]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ModelError(f"the {system.name} model declares {', '.join(twice)} twice")
    steps = [s.name for s in system.steps]
    if len(set(steps)) != len(steps):
        twice = sorted({n for n in steps if steps.count(n) > 1})
        raise ModelError(f"the {system.name} model has two steps named {', '.join(twice)}")
    claims: list[tuple[str, object]] = []
    for claimed in system.properties:
        claims.append((f"property {claimed.identifier}", claimed.formula))
        if claimed.witness is not None:
            claims.append((f"the witness of property {claimed.identifier}", claimed.witness))
    claims += [(f"goal {goal.identifier}", goal.formula) for goal in system.goals]
    for what, formula in claims:
        if not isinstance(formula, Node) or formula.type != BOOL:
            raise ModelError(f"{what} is not a formula")
    declared: Mapping[str, Variable | MapVariable] = {v.name: v for v in system.variables}
    for node in system._nodes():
        used = node.map if isinstance(node, Read) else node
        if isinstance(used, Variable | MapVariable) and declared.get(used.name) != used:
            raise ModelError(f"the {system.name} model uses {used.name}, which it does not declare")
    for row in system.steps:
        for assign in row.then:
            if declared.get(assign.target.name) != assign.target:
                raise ModelError(
                    f"step {row.name} assigns {assign.target.name}, which is not declared"
                )
