"""A finite instance as TLA+, for TLC: a module and its configuration.

TLC counts the distinct states that `explore` counts, and its depth is one more.  The states that it
generates are one more than our transitions (the initial state), and more than that where a guard
has a disjunction: TLC takes the step once for each side that holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from tdxmig_model.errors import ModelError
from tdxmig_model.export.words import Names, comment
from tdxmig_model.expr import (
    Add,
    And,
    Assign,
    BoolType,
    Bound,
    Choice,
    Constant,
    Count,
    CountBelow,
    EnumType,
    Equal,
    ForAll,
    IndexType,
    Instance,
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
    Size,
    Step,
    System,
    Type,
    Value,
    Variable,
    subterms,
)
from tdxmig_model.expr.finite import TRUE, ceilings, defined, finite_conditions

RESERVED = frozenset(
    """
    ASSUME ASSUMPTION AXIOM BOOLEAN CASE CHOOSE CONSTANT CONSTANTS DOMAIN ELSE ENABLED
    EXCEPT EXTENDS FALSE IF IN INSTANCE LAMBDA LET LOCAL MODULE OTHER SF_ STRING SUBSET THEN
    THEOREM TRUE UNCHANGED UNION VARIABLE VARIABLES WF_ WITH Int Nat Cardinality IsFiniteSet
    Init Next Spec TypeOK vars
    """.split()  # noqa: SIM905 - one word per line would be sixty lines
)


def module_name(system: System) -> str:
    """The name of the TLA+ module, and of its file."""
    return "".join(part.capitalize() for part in re.split("[^A-Za-z0-9]+", system.name))


def tla(system: System, instance: Instance, ceiling: int | Mapping[str, int] | None = None) -> str:
    """The TLA+ module; sizes and named constants are set in the configuration."""
    return "\n".join(_Tla(system, instance, ceiling).lines()) + "\n"


def tla_config(
    system: System, instance: Instance, ceiling: int | Mapping[str, int] | None = None
) -> str:
    """The configuration for TLC: sizes, constants, and every property as an invariant."""
    return "\n".join(_Tla(system, instance, ceiling).config()) + "\n"


class _Tla:
    def __init__(
        self, system: System, instance: Instance, ceiling: int | Mapping[str, int] | None
    ) -> None:
        self.system = system
        self.instance = instance
        self.limits = ceilings(system, instance, ceiling)
        self.module = module_name(system)
        self.names = Names([*RESERVED, self.module])
        for kind in system.indexes():
            self.names.give("index", kind.name)
            self._size(kind)
        for constant in system.constants():
            self.names.give("constant", constant.name)
        for variable in system.variables:
            self.names.give("variable", variable.name)
        self.bound: dict[Bound, str] = {}

    # --- the module -------------------------------------------------------------------------------

    def lines(self) -> Iterator[str]:
        """The whole module."""
        yield f"---------------------------- MODULE {self.module} ----------------------------"
        yield from self._head()
        yield "EXTENDS Integers, FiniteSets"
        yield ""
        constants = [self._size(k) for k in self.system.indexes()]
        constants += [self.names.give("constant", c.name) for c in self.system.constants()]
        if constants:
            yield f"CONSTANTS {', '.join(constants)}"
            yield ""
        for kind in self.system.indexes():
            yield f"{self.names.give('index', kind.name)} == 0 .. ({self._size(kind)} - 1)"
        for enum in self._enums():
            members = ", ".join(f'"{m}"' for m in enum.members)
            yield f"{self.names.give('enum', enum.name)} == {{{members}}}"
        yield ""
        yield "VARIABLES"
        yield from self._variables()
        yield ""
        everything = ", ".join(self._name(v) for v in self.system.variables)
        yield f"vars == <<{everything}>>"
        yield ""
        yield "TypeOK =="
        yield from (f"  /\\ {self._name(v)} \\in {self._type(v)}" for v in self.system.variables)
        yield ""
        yield "Init =="
        yield from (f"  /\\ {self._name(v)} = {self._initial(v)}" for v in self.system.variables)
        for count in self.system.counts():
            if self._closed(count):
                yield ""
                yield f"{self.names.give('count', count.name)} == {self._count(count)}"
        for row in self.system.steps:
            yield from self._action(row)
        yield ""
        yield "Next =="
        yield from (f"  \\/ {self._taken(row)}" for row in self.system.steps)
        yield ""
        yield "Spec == Init /\\ [][Next]_vars"
        for claimed in self.system.properties:
            yield ""
            yield f"\\* {comment(claimed.sentence)}"
            name = self.names.give("property", claimed.identifier)
            yield f"{name} == {self.text(claimed.formula)}"
        for goal in self.system.goals:
            yield ""
            yield f"\\* Check as an invariant to see how it is reached: {comment(goal.sentence)}"
            inside = defined(goal.formula, self.instance)
            met = goal.formula if inside == TRUE else And((inside, goal.formula))
            yield f"{self._goal(goal.identifier)} == ~({self.text(met)})"
        yield ""
        yield "============================================================================="

    def config(self) -> Iterator[str]:
        """The lines of the configuration."""
        yield f"\\* The {self.system.name} model at one size, generated: tdxmig export tla."
        if self.system.indexes() or self.system.constants():
            yield "CONSTANTS"
        for kind in self.system.indexes():
            yield f"  {self._size(kind)} = {self.instance.bounded(kind)}"
        for constant in self.system.constants():
            value = self.instance.constant(constant)
            yield f"  {self.names.give('constant', constant.name)} = {value}"
        yield "SPECIFICATION Spec"
        yield "CHECK_DEADLOCK FALSE"
        yield "INVARIANTS"
        yield "  TypeOK"
        # The names are those of the module: given in the same order.
        list(self.lines())
        for claimed in self.system.properties:
            yield f"  {self.names.give('property', claimed.identifier)}"

    def _head(self) -> Iterator[str]:
        limits = ", ".join(f"{n} = {self.limits[n]}" for n in sorted(self.limits))
        yield f"\\* The {self.system.name} model, generated: tdxmig export tla."
        yield "\\* A step that would read or write a map outside its size, or give a variable a"
        yield "\\* larger magnitude than here, is not taken; for other sizes generate it again."
        yield f"\\* Largest magnitudes: {limits or 'none'}."

    def _enums(self) -> list[EnumType]:
        kinds = {v.kind.name: v.kind for v in self.system.variables if isinstance(v.kind, EnumType)}
        for row in self.system.steps:
            kinds.update({p.kind.name: p.kind for p in row.params if isinstance(p.kind, EnumType)})
        return [kinds[name] for name in sorted(kinds)]

    def _variables(self) -> Iterator[str]:
        last = len(self.system.variables) - 1
        for position, variable in enumerate(self.system.variables):
            comma = "," if position < last else ""
            ghost = "ghost" if variable.ghost else ""
            note = "; ".join(filter(None, [ghost, comment(variable.doc)]))
            yield f"  {self._name(variable)}{comma}" + (f"  \\* {note}" if note else "")

    def _action(self, row: Step) -> Iterator[str]:
        parameters = ", ".join(self._parameter(p) for p in row.params)
        yield ""
        yield f"\\* {comment(row.why)}"
        yield f"\\* {comment(row.cite)}"
        yield f"{self.names.give('step', row.name)}{f'({parameters})' if parameters else ''} =="
        for wanted in finite_conditions(row, self.instance, self.limits):
            yield f"  /\\ {self.text(wanted.formula)}  \\* {comment(wanted.label)}"
        for assign in row.then:
            yield f"  /\\ {self._update(assign)}"
        kept = [self._name(v) for v in self.system.variables if v.name not in row.writes()]
        if kept:
            yield f"  /\\ UNCHANGED <<{', '.join(kept)}>>"

    def _update(self, assign: Assign) -> str:
        name = self._name(assign.target)
        if isinstance(assign.target, Variable):
            return f"{name}' = {self.at(assign.value)}"
        if assign.bound:
            with_names = self._enter(assign.bound)
            value = self.at(assign.value)
            self._leave(assign.bound)
            return f"{name}' = [{with_names} |-> {value}]"
        keys = ", ".join(self.text(k) for k in assign.keys)
        return f"{name}' = [{name} EXCEPT ![{keys}] = {self.at(assign.value)}]"

    def _taken(self, row: Step) -> str:
        name = self.names.give("step", row.name)
        if not row.params:
            return name
        ranges = ", ".join(f"{self._parameter(p)} \\in {self._domain(p.kind)}" for p in row.params)
        values = ", ".join(self._parameter(p) for p in row.params)
        return f"\\E {ranges} : {name}({values})"

    # --- names and types --------------------------------------------------------------------------

    def _name(self, variable: Variable | MapVariable) -> str:
        return self.names.give("variable", variable.name)

    def _size(self, kind: IndexType) -> str:
        return self.names.give("size", f"{kind.name}Count")

    def _goal(self, identifier: str) -> str:
        return self.names.give("goal", f"Never_{identifier}")

    def _parameter(self, node: Parameter) -> str:
        return self.names.give("parameter", node.name)

    def _domain(self, kind: Type) -> str:
        match kind:
            case BoolType():
                return "BOOLEAN"
            case EnumType():
                return self.names.give("enum", kind.name)
            case IndexType():
                return self.names.give("index", kind.name)
            case _:
                return "Int"

    def _type(self, variable: Variable | MapVariable) -> str:
        # A scalar of an ordered index may stand one past its end.
        ordered = isinstance(variable.kind, IndexType) and variable.kind.ordered
        kind = "Int" if ordered else self._domain(variable.kind)
        if isinstance(variable, MapVariable):
            domain = " \\X ".join(self._domain(k) for k in variable.indexes)
            return f"[{domain} -> {kind}]"
        return kind

    def _initial(self, variable: Variable | MapVariable) -> str:
        value = self._literal(variable.kind, variable.init.value)
        if isinstance(variable, MapVariable):
            bound = tuple(Bound(n, k) for n, k in zip("ij", variable.indexes, strict=False))
            ranges = self._enter(bound)
            self._leave(bound)
            return f"[{ranges} |-> {value}]"
        return value

    def _literal(self, kind: Type, value: Value) -> str:
        if isinstance(kind, BoolType):
            return "TRUE" if value else "FALSE"
        return f'"{kind.members[int(value)]}"' if isinstance(kind, EnumType) else str(int(value))

    # --- bound elements: TLA+ does not allow one name to be bound inside its own scope ------------

    def _enter(self, bound: Sequence[Bound]) -> str:
        ranges = []
        for element in bound:
            depth = len(self.bound)
            name = self.names.give("bound", f"{element.name}_{depth}" if depth else element.name)
            if element in self.bound:
                raise ModelError(f"{element.name} is bound inside its own quantifier")
            self.bound[element] = name
            ranges.append(f"{name} \\in {self._domain(element.kind)}")
        return ", ".join(ranges)

    def _leave(self, bound: Sequence[Bound]) -> None:
        for element in bound:
            del self.bound[element]

    def _closed(self, node: Count) -> bool:
        """Whether a count depends on nothing but the state."""
        free = [n for n in subterms(node) if isinstance(n, Parameter | Bound)]
        return all(n == node.bound for n in free)

    def _count(self, node: Count) -> str:
        ranges = self._enter((node.bound,))
        predicate = self.text(node.predicate)
        self._leave((node.bound,))
        return f"Cardinality({{{ranges} : {predicate}}})"

    # --- terms ------------------------------------------------------------------------------------

    def at(self, node: Node) -> str:
        """A term that can stand beside any operator."""
        text = self.text(node)
        simple = isinstance(
            node,
            Literal | Constant | Size | Parameter | Bound | Variable | Read | Count | CountBelow,
        )
        return text if simple and not text.startswith("-") else f"({text})"

    def text(self, node: Node) -> str:
        """A term as TLA+."""
        match node:
            case Literal():
                return self._literal(node.kind, node.value)
            case Constant():
                return self.names.give("constant", node.name)
            case Size():
                return self._size(node.of)
            case Parameter():
                return self._parameter(node)
            case Bound():
                return self.bound[node]
            case Variable():
                return self._name(node)
            case Read():
                return f"{self._name(node.map)}[{', '.join(map(self.text, node.keys))}]"
            case Add(amount=Literal(value=value)) if int(value) < 0:
                return f"{self.at(node.term)} - {-int(value)}"
            case Add():
                return f"{self.at(node.term)} + {self.at(node.amount)}"
            case Choice():
                parts = self.text(node.condition), self.text(node.then), self.text(node.otherwise)
                return "IF {} THEN {} ELSE {}".format(*parts)
            case Lookup():
                return self._lookup(node)
            case CountBelow():
                return self._count(node.as_count())
            case Count():
                closed = self._closed(node)
                return self.names.give("count", node.name) if closed else self._count(node)
            case _:
                return self._formula(node)

    def _lookup(self, node: Lookup) -> str:
        term = self.at(node.term)
        cases = [
            f"{term} = {self._literal(a.kind, a.value)} -> {self._literal(b.kind, b.value)}"
            for a, b in node.table
        ]
        return " [] ".join(["CASE " + cases[0], *cases[1:], f"OTHER -> {term}"]) if cases else term

    def _formula(self, node: Node) -> str:
        match node:
            case Equal():
                return f"{self.at(node.left)} = {self.at(node.right)}"
            case Less():
                return f"{self.at(node.left)} < {self.at(node.right)}"
            case Member():
                members = ", ".join(self._literal(m.kind, m.value) for m in node.members)
                return f"{self.at(node.term)} \\in {{{members}}}"
            case Not(body=Equal() as equal):
                return f"{self.at(equal.left)} # {self.at(equal.right)}"
            case Not(body=Less(left=(Literal() | Constant()) as bound, right=term)):
                return f"{self.at(term)} <= {self.at(bound)}"
            case Not(body=Less() as less):
                return f"{self.at(less.left)} >= {self.at(less.right)}"
            case Not():
                return f"~{self.at(node.body)}"
            case And():
                return " /\\ ".join(map(self.at, node.parts)) or "TRUE"
            case Or(parts=(Not(body=condition), conclusion)):
                return f"{self.at(condition)} => {self.at(conclusion)}"
            case Or():
                return " \\/ ".join(map(self.at, node.parts)) or "FALSE"
            case ForAll():
                ranges = self._enter(node.bound)
                body = self.text(node.body)
                self._leave(node.bound)
                return f"\\A {ranges} : {body}"
            case _:
                raise ModelError(f"no TLA+ is known for {type(node).__name__}")
