"""How many elements of an index satisfy a predicate: all of them, or those before a limit."""

from __future__ import annotations

from dataclasses import dataclass

from tdxmig_model.errors import ModelError
from tdxmig_model.expr.nodes import And, Bound, Less, Node, lift
from tdxmig_model.expr.types import INT, Type, is_integer


@dataclass(frozen=True, slots=True)
class Count(Node):
    """How many elements of an index satisfy a predicate: the only way for a guard to speak of all
    elements.
    """

    name: str
    bound: Bound
    predicate: Node

    @property
    def type(self) -> Type:
        return INT

    def below(self, limit: Node | int) -> CountBelow:
        """How many of the elements before a limit satisfy the predicate."""
        return CountBelow(self, lift(limit, INT, f"({self}).below"))

    def children(self) -> tuple[Node, ...]:
        return (self.predicate,)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class CountBelow(Node):
    """How many of the elements before a limit satisfy the predicate of a count."""

    of: Count
    limit: Node

    def __post_init__(self) -> None:
        if not is_integer(self.limit.type):
            raise ModelError(f"({self.of}).below({self.limit}): the limit is no integer")

    @property
    def type(self) -> Type:
        return INT

    def children(self) -> tuple[Node, ...]:
        return (self.of, self.limit)

    def as_count(self) -> Count:
        """The same as a count whose predicate has the limit in it."""
        bound = self.of.bound
        return Count(str(self), bound, And((Less(bound, self.limit), self.of.predicate)))

    def __str__(self) -> str:
        return f"{self.of} below {self.limit}"
