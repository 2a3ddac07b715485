"""The words in which formulas are written: all_of, any_of, not_, implies, choose, lookup, forall,
count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from tdxmig_model.errors import ModelError
from tdxmig_model.expr.counts import Count
from tdxmig_model.expr.nodes import (
    And,
    Bound,
    Choice,
    ForAll,
    Literal,
    Lookup,
    Node,
    Not,
    Or,
    as_formula,
    lift,
)
from tdxmig_model.expr.types import BOOL, INT, IndexType


def all_of(*parts: Node) -> Node:
    """Conjunction of formulas."""
    for part in parts:
        as_formula(part, "all_of")
    return parts[0] if len(parts) == 1 else And(parts)


def any_of(*parts: Node) -> Node:
    """Disjunction of formulas."""
    for part in parts:
        as_formula(part, "any_of")
    return parts[0] if len(parts) == 1 else Or(parts)


def not_(part: Node) -> Node:
    """Negation of a formula."""
    return Not(as_formula(part, "not_"))


def implies(condition: Node, conclusion: Node) -> Node:
    """If condition then conclusion."""
    return any_of(not_(condition), conclusion)


def choose(condition: Node, then: Node | int | bool, otherwise: Node | int | bool) -> Node:
    """A term that is `then` where the condition holds and `otherwise` elsewhere."""
    anchor = next((t.type for t in (then, otherwise) if isinstance(t, Node)), None)
    if anchor is None:
        anchor = BOOL if isinstance(then, bool) else INT
    return Choice(condition, lift(then, anchor, "choose"), lift(otherwise, anchor, "choose"))


def lookup(term: Node, table: Mapping[Literal, Literal]) -> Node:
    """Map an enum term through a table; members not listed stay as they are."""
    for a, b in table.items():
        if a.kind != term.type or b.kind != term.type:
            raise ModelError(f"lookup({term}): {a} → {b} are not both members of {term.type.name}")
    return Lookup(term, tuple(table.items()))


def forall(
    indexes: Mapping[str, IndexType],
    body: Callable[..., Node],
    triggers: Callable[..., tuple[Node, ...]] | None = None,
) -> Node:
    """For every element: `forall({"p": PAGE}, lambda p: ...)`.  Properties only."""
    bound = tuple(Bound(name, kind) for name, kind in indexes.items())
    inner = as_formula(body(*bound), "forall")
    _bound_once(inner, bound)
    return ForAll(bound, inner, triggers(*bound) if triggers else ())


def count(name: str, over: IndexType, predicate: Callable[[Bound], Node]) -> Count:
    """Declare how many elements satisfy a predicate."""
    bound = Bound("element", over)
    inner = as_formula(predicate(bound), f"count {name}")
    _bound_once(inner, (bound,))
    return Count(name, bound, inner)


def _bound_once(body: Node, bound: tuple[Bound, ...]) -> None:
    """Refuse an inner quantifier of the same name: the outer element could not be named inside."""
    names = {b.name for b in bound}
    for node in subterms(body):
        inner = node.bound if isinstance(node, ForAll) else ()
        inner = (node.bound,) if isinstance(node, Count) else inner
        for element in inner:
            if element.name in names:
                raise ModelError(
                    f"({node}) binds {element.name}, which a quantifier around it binds too: "
                    "give one of them another name"
                )


def subterms(node: Node) -> Iterator[Node]:
    """The node and everything below it, depth first."""
    yield node
    for child in node.children():
        yield from subterms(child)
