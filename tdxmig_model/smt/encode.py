"""Terms of the model's language as z3 terms: what finite and unbounded encodings share.

A `View` is one state: scalars are terms, maps are closures from keys to terms.  The state after a
step is a view whose closures choose between the new value and the state before, so there are no
arrays and no frame axioms: what a step does not write is the very same closure.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    Add,
    And,
    Assign,
    Bound,
    Choice,
    Constant,
    Count,
    CountBelow,
    EnumType,
    Equal,
    ForAll,
    IndexType,
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
    Variable,
    subterms,
)
from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.z3api import Term

Reader = Callable[[Sequence[Term]], Term]
Environment = Mapping[str, Term]
"""Values of parameters and quantified elements, by name, as in the interpreter."""


@dataclass
class View:
    """One state: a term for each scalar, a closure for each map, a closure for each count.

    A count's closure gives, for n, how many of the elements 0..n-1 satisfy the predicate.
    """

    scalars: dict[str, Term]
    maps: dict[str, Reader]
    prefixes: dict[str, Callable[[Term], Term]] = field(default_factory=dict)


class Encoder(ABC):
    """Turns nodes into z3 terms over a view."""

    def __init__(self, system: System) -> None:
        self.system = system

    @abstractmethod
    def number(self, value: int) -> Term:
        """A literal integer."""

    @abstractmethod
    def member(self, kind: EnumType, position: int) -> Term:
        """A literal enum member."""

    @abstractmethod
    def constant(self, constant: Constant) -> Term:
        """A named constant."""

    @abstractmethod
    def size(self, index: IndexType) -> Term:
        """The number of elements of an index."""

    @abstractmethod
    def quantified(self, node: ForAll, view: View, env: Environment) -> Term:
        """For every element."""

    @abstractmethod
    def counted(self, node: Count, view: View, env: Environment) -> Term:
        """The number of elements that satisfy the predicate."""

    def counted_below(self, node: CountBelow, view: View, env: Environment) -> Term:
        """The number of elements before a limit that satisfy the predicate."""
        return self.counted(node.as_count(), view, env)

    def literal(self, node: Literal) -> Term:
        """A literal of any type."""
        if isinstance(node.value, bool):
            return z.boolean(node.value)
        if isinstance(node.kind, EnumType):
            return self.member(node.kind, node.value)
        return self.number(node.value)

    def term(self, node: Node, view: View, env: Environment) -> Term:
        """The z3 term of a node in one state."""
        match node:
            case Literal():
                return self.literal(node)
            case Constant():
                return self.constant(node)
            case Size():
                return self.size(node.of)
            case Parameter() | Bound():
                return env[node.name]
            case Variable():
                return view.scalars[node.name]
            case Read():
                return view.maps[node.map.name]([self.term(k, view, env) for k in node.keys])
            case Add():
                return z.add(self.term(node.term, view, env), self.term(node.amount, view, env))
            case Equal():
                return z.equal(self.term(node.left, view, env), self.term(node.right, view, env))
            case Less():
                return z.less(self.term(node.left, view, env), self.term(node.right, view, env))
            case Member():
                found = self.term(node.term, view, env)
                return z.either(z.equal(found, self.literal(m)) for m in node.members)
            case Not():
                return z.negate(self.term(node.body, view, env))
            case And():
                return z.both([self.term(p, view, env) for p in node.parts])
            case Or():
                return z.either([self.term(p, view, env) for p in node.parts])
            case Choice():
                condition = self.term(node.condition, view, env)
                then = self.term(node.then, view, env)
                return z.choose(condition, then, self.term(node.otherwise, view, env))
            case Lookup():
                found = self.term(node.term, view, env)
                result = found
                for key, value in reversed(node.table):
                    hit = z.equal(found, self.literal(key))
                    result = z.choose(hit, self.literal(value), result)
                return result
            case ForAll():
                return self.quantified(node, view, env)
            case Count():
                return self.counted(node, view, env)
            case CountBelow():
                return self.counted_below(node, view, env)
            case _:
                raise ModelError(f"the z3 encoding does not know {type(node).__name__}")

    def guard(self, step: Step, view: View, env: Environment) -> Term:
        """The whole guard of a step."""
        return z.both([self.term(n.formula, view, env) for n in step.when])

    def after(self, step: Step, view: View, env: Environment) -> View:
        """The state after a step: every update over the state before.  Counts are left out."""
        scalars, maps = dict(view.scalars), dict(view.maps)
        for assign in step.then:
            name = assign.target.name
            if isinstance(assign.target, Variable):
                scalars[name] = self.term(assign.value, view, env)
            else:
                maps[name] = self._written(assign, view, env)
        return View(scalars, maps)

    def _written(self, assign: Assign, view: View, env: Environment) -> Reader:
        if assign.bound:

            def filled(keys: Sequence[Term]) -> Term:
                names = (b.name for b in assign.bound)
                inner = {**env, **dict(zip(names, keys, strict=True))}
                return self.term(assign.value, view, inner)

            return filled
        before = view.maps[assign.target.name]
        at = [self.term(k, view, env) for k in assign.keys]
        value = self.term(assign.value, view, env)

        def pointwise(keys: Sequence[Term]) -> Term:
            hit = z.both([z.equal(k, a) for k, a in zip(keys, at, strict=True)])
            if z.is_true(hit):
                return value
            return z.choose(hit, value, before(keys))

        return pointwise


def reads(node: Node) -> frozenset[str]:
    """Names of the variables that a node mentions, inside counts too."""
    names = set()
    for sub in subterms(node):
        if isinstance(sub, Variable):
            names.add(sub.name)
        elif isinstance(sub, Read):
            names.add(sub.map.name)
    return frozenset(names)


def split(node: Node) -> list[Node]:
    """Conjuncts that together say the same, taken out of implications and quantifiers."""
    match node:
        case And():
            return [piece for part in node.parts for piece in split(part)]
        case ForAll():
            bodies = split(node.body)
            if len(bodies) == 1:
                return [node]
            return [ForAll(node.bound, b, node.triggers) for b in bodies]
        case Or():
            for position, part in enumerate(node.parts):
                pieces = split(part)
                if len(pieces) > 1:
                    before, behind = node.parts[:position], node.parts[position + 1 :]
                    return [final for p in pieces for final in split(Or((*before, p, *behind)))]
            return [node]
        case _:
            return [node]


def map_key_positions(predicate: Node, bound: Bound) -> list[tuple[MapVariable, int | None]]:
    """For each map that a predicate reads, where the bound element is its key.

    None stands for any other use, such as a key that depends on the element through another map.
    """
    found = []
    for sub in subterms(predicate):
        if not isinstance(sub, Read):
            continue
        direct = [i for i, k in enumerate(sub.keys) if k == bound]
        elsewhere = any(n == bound for k in sub.keys if k != bound for n in subterms(k))
        found.append((sub.map, direct[0] if len(direct) == 1 and not elsewhere else None))
    return found
