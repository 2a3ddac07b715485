"""A finite instance as Promela, for SPIN.

State counts: one process in one loop takes one row in one `d_step`, so that a state of SPIN is a
state of the system.  With variables that are only written kept in the state (`spin -o2`) and no
partial-order reduction (`-DNOREDUCE`), the number of stored states is the number of states that
`explore` counts, and SPIN's transitions are one more (the initial state).  The head of the loop is
a valid end state: a state without a step is not an error.  The variables that hold values between
reading and writing are `hidden`, and so no part of the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tdxmig_model.errors import ModelError
from tdxmig_model.export.words import Names, comment
from tdxmig_model.expr import (
    Add,
    And,
    BoolType,
    Choice,
    Count,
    CountBelow,
    EnumType,
    Equal,
    ForAll,
    Instance,
    Interpreter,
    Less,
    Literal,
    Lookup,
    MapVariable,
    Member,
    Node,
    Not,
    Or,
    Parameter,
    Read,
    System,
    Type,
    Value,
    Variable,
    initial_state,
    subterms,
)
from tdxmig_model.expr.finite import (
    FALSE,
    FiniteStep,
    ceilings,
    defined,
    finite_step,
    simplify,
    unrolled,
)

RESERVED = frozenset(
    """
    active assert atomic bit bool break byte chan cond_expr d_step d_proctype do else empty
    enabled end eval false fi full get_priority goto hidden if inline init int len local ltl
    mtype nempty never nfull notrace np_ od of pc_value pid printf printm priority proctype
    provided select short show skip timeout trace true typedef unless unsigned xr xs for in
    run D_proctype steps
    """.split()  # noqa: SIM905 - one word per line would be sixty lines
)


def promela(
    system: System, instance: Instance, ceiling: int | Mapping[str, int] | None = None
) -> str:
    """The Promela text of one finite instance; sizes and ceilings as in `explore`."""
    return "\n".join(_Promela(system, instance, ceiling).lines()) + "\n"


class _Promela:
    def __init__(
        self, system: System, instance: Instance, ceiling: int | Mapping[str, int] | None
    ) -> None:
        self.system = system
        self.instance = instance
        self.limits = ceilings(system, instance, ceiling)
        self.interpreter = Interpreter(system, instance)
        self.names = Names(RESERVED)
        for variable in system.variables:
            self.names.give("variable", variable.name)
        self.temporaries = 0

    # --- the text ---------------------------------------------------------------------------------

    def lines(self) -> Iterator[str]:
        """The whole text."""
        inlines = [line for row in self.system.steps for line in self._inline(row.name)]
        yield from self._head()
        yield ""
        yield from self._members()
        yield ""
        yield from self._variables()
        if self.temporaries:
            yield ""
            yield from (f"hidden int before_{k};" for k in range(self.temporaries))
        yield from inlines
        yield ""
        claims = list(self._claims())
        yield from (line for _, line in claims)
        yield ""
        yield "active proctype steps()"
        yield "{"
        yield "end:"
        yield "  do"
        for row in self.system.steps:
            for params in self.interpreter.choices(row):
                values = ", ".join(self._literal(p.kind, params[p.name]) for p in row.params)
                yield f"  :: d_step {{ {self.names.give('step', row.name)}({values}) }}"
        for name, _ in claims:
            yield f"#ifdef CHECK_{name}"
            yield f"  :: d_step {{ {name} -> assert(false) }}"
            yield "#endif"
        yield "  od"
        yield "}"

    def _head(self) -> Iterator[str]:
        sizes = ", ".join(f"{k.name} = {self.instance.bounded(k)}" for k in self.system.indexes())
        limits = ", ".join(f"{n} = {self.limits[n]}" for n in sorted(self.limits))
        yield f"/* The {self.system.name} model, generated: tdxmig export promela."
        yield f" * Sizes: {sizes or 'none'}."
        yield f" * Largest magnitudes: {limits or 'none'}."
        yield " * A step that would read or write a map outside its size, or give a variable a"
        yield " * larger magnitude, is not taken."
        yield " *"
        yield " * Count the states: spin -o2 -a MODEL.pml"
        yield " *   cc -O2 -DSAFETY -DNOREDUCE -o pan pan.c && ./pan -m1000000"
        yield " * Check a property, or find a goal: spin -DCHECK_not_NAME or -DCHECK_goal_NAME;"
        yield " * an assertion that is violated is the answer."
        yield " */"

    def _members(self) -> Iterator[str]:
        """Each member of each enum as a number."""
        kinds = {v.kind.name: v.kind for v in self.system.variables if isinstance(v.kind, EnumType)}
        for row in self.system.steps:
            kinds.update({p.kind.name: p.kind for p in row.params if isinstance(p.kind, EnumType)})
        for name in sorted(kinds):
            for position in range(len(kinds[name].members)):
                yield f"#define {self._literal(kinds[name], position)} {position}"

    def _variables(self) -> Iterator[str]:
        values = initial_state(self.system, self.instance)
        for variable, value in zip(self.system.variables, values, strict=True):
            name = self.names.give("variable", variable.name)
            size = f"[{len(value)}]" if isinstance(variable, MapVariable) else ""
            initial = self._literal(variable.kind, variable.init.value)
            note = f"  /* {comment(variable.doc)} */" if variable.doc else ""
            yield f"{_kind(variable.kind)} {name}{size} = {initial};{note}"

    def _inline(self, name: str) -> Iterator[str]:
        row = self.system.step(name)
        step = finite_step(row, self.instance, self.limits)
        parameters = ", ".join(self._parameter(p) for p in row.params)
        yield ""
        yield f"/* {comment(row.why)}"
        yield f" * {comment(row.cite)} */"
        yield f"inline {self.names.give('step', name)}({parameters}) {{"
        # What cannot be taken has no updates: they may name an element that is not there.
        impossible = any(c.formula == FALSE for c in step.conditions)
        yield "  ("
        for position, wanted in enumerate(step.conditions):
            word = "&& " if position else "   "
            yield f"  {word}{self.at(wanted.formula)}  /* {comment(wanted.label)} */"
            if wanted.formula == FALSE:
                break
        if not step.conditions:
            yield "  true"
        yield "  ) ->"
        yield from ("  " + line for line in ([] if impossible else self._updates(step)))
        yield "  skip"
        yield "}"

    def _updates(self, step: FiniteStep) -> list[str]:
        """All reads into hidden variables, then all writes; what nothing disturbs goes directly."""
        written = {a.target.name for a in step.updates}
        single = len(step.updates) == 1 and not step.updates[0].bound
        early: dict[str, str] = {}
        late = []

        def settled(term: Node) -> str:
            text = self.text(term)
            if single or not _reads(term) & written:
                return text
            return early.setdefault(text, f"before_{len(early)}")

        for assign in step.updates:
            name = self.names.give("variable", assign.target.name)
            if isinstance(assign.target, Variable):
                late.append(f"{name} = {settled(assign.value)};")
                continue
            if assign.bound:
                values = unrolled(assign.bound, assign.value, self.instance)
                late += [f"{name}[{k}] = {settled(value)};" for k, value in enumerate(values)]
                continue
            settle = [k for k in assign.keys if _reads(k) & written]
            place = self._place(assign.target, assign.keys)
            if settle and not single:
                place = early.setdefault(place, f"before_{len(early)}")
            late.append(f"{name}[{place}] = {settled(assign.value)};")
        self.temporaries = max(self.temporaries, len(early))
        return [f"{name} = {text};" for text, name in early.items()] + late

    def _claims(self) -> Iterator[tuple[str, str]]:
        """Name and definition of what CHECK_ looks for: broken properties and goals."""
        for claimed in self.system.properties:
            name = self.names.give("claim", f"not_{claimed.identifier}")
            broken = simplify(Not(claimed.formula), self.instance)
            yield name, f"#define {name} {self.at(broken)}  /* {comment(claimed.sentence)} */"
        for goal in self.system.goals:
            name = self.names.give("claim", f"goal_{goal.identifier}")
            met = simplify(And((defined(goal.formula, self.instance), goal.formula)), self.instance)
            yield name, f"#define {name} {self.at(met)}  /* {comment(goal.sentence)} */"

    # --- terms ------------------------------------------------------------------------------------

    def _parameter(self, node: Parameter) -> str:
        return self.names.give("parameter", f"{node.name}")

    def _literal(self, kind: Type, value: Value) -> str:
        if isinstance(kind, BoolType):
            return "true" if value else "false"
        if isinstance(kind, EnumType):
            return self.names.give("member", f"{kind.name}_{kind.members[int(value)]}")
        return str(int(value))

    def _place(self, variable: MapVariable, keys: Sequence[Node]) -> str:
        flat = self.text(keys[0])
        for key, kind in zip(keys[1:], variable.indexes[1:], strict=True):
            flat = f"({flat}) * {self.instance.bounded(kind)} + {self.at(key)}"
        return flat

    def at(self, node: Node) -> str:
        """A term that can stand beside any operator."""
        text = self.text(node)
        whole = isinstance(node, Literal | Parameter | Variable | Read | Choice | Lookup)
        return text if whole and not text.startswith("-") else f"({text})"

    def text(self, node: Node) -> str:
        """A term as a Promela expression."""
        match node:
            case Literal():
                return self._literal(node.kind, node.value)
            case Parameter():
                return self._parameter(node)
            case Variable():
                return self.names.give("variable", node.name)
            case Read():
                name = self.names.give("variable", node.map.name)
                return f"{name}[{self._place(node.map, node.keys)}]"
            case Add():
                return f"{self.at(node.term)} + {self.at(node.amount)}"
            case Equal():
                return f"{self.at(node.left)} == {self.at(node.right)}"
            case Less():
                return f"{self.at(node.left)} < {self.at(node.right)}"
            case Not(body=Equal() as equal):
                return f"{self.at(equal.left)} != {self.at(equal.right)}"
            case Not(body=Less(left=Literal() as bound, right=right)):
                return f"{self.at(right)} <= {self.at(bound)}"
            case Not(body=Less() as less):
                return f"{self.at(less.left)} >= {self.at(less.right)}"
            case Not():
                return f"!{self.at(node.body)}"
            case And():
                return " && ".join(map(self.at, node.parts)) or "true"
            case Or():
                return " || ".join(map(self.at, node.parts)) or "false"
            case Member():
                term = self.at(node.term)
                members = (self._literal(m.kind, m.value) for m in node.members)
                return " || ".join(f"{term} == {m}" for m in members) or "false"
            case Choice():
                then, otherwise = self.at(node.then), self.at(node.otherwise)
                return f"({self.at(node.condition)} -> {then} : {otherwise})"
            case Lookup():
                term = result = self.at(node.term)
                for old, new in reversed(node.table):
                    was, becomes = (self._literal(m.kind, m.value) for m in (old, new))
                    result = f"(({term} == {was}) -> {becomes} : {result})"
                return result
            case ForAll():
                parts = tuple(unrolled(node.bound, node.body, self.instance))
                return self.text(simplify(And(parts), self.instance))
            case Count():
                terms = unrolled((node.bound,), node.predicate, self.instance)
                return " + ".join(map(self.at, terms)) or "0"
            case CountBelow():
                return self.text(node.as_count())
            case _:
                raise ModelError(f"no Promela is known for {type(node).__name__}")


def _kind(kind: Type) -> str:
    if isinstance(kind, BoolType):
        return "bool"
    return "byte" if isinstance(kind, EnumType) else "int"


def _reads(node: Node) -> set[str]:
    names = {n.name for n in subterms(node) if isinstance(n, Variable)}
    return names | {n.map.name for n in subterms(node) if isinstance(n, Read)}
