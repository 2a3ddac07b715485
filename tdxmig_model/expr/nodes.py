"""The terms and formulas of the model's language, as plain frozen data.

The rules of the house:

* `==` compares nodes as data and is never a formula; write `a.eq(b)`.
* A node has no truth value.  `and`, `or`, `not`, `in` and chained comparisons would silently build
  another
  system than the one that was written, so `bool(node)` raises and says what to write.
* Arithmetic is addition of constants.  Only properties quantify.
* Every ill-typed term is refused where it is built, by name.

A node kind that a use does not know must raise there; the last case of every `match` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from tdxmig_model.errors import ModelError
from tdxmig_model.expr.types import (
    BOOL,
    INT,
    BoolType,
    EnumType,
    IndexType,
    Type,
    compatible,
    is_integer,
)

Operand = "Node | int | bool"


class Node:
    """Base of all terms and formulas."""

    __slots__ = ()

    @property
    def type(self) -> Type:
        """The type of the value."""
        raise NotImplementedError

    def children(self) -> tuple[Node, ...]:
        """The direct subterms."""
        return ()

    def __bool__(self) -> bool:
        raise ModelError(
            f"({self}) has no truth value while the model is built: write all_of(), any_of(), "
            "not_() or .in_() instead of and, or, not, in, if and chained comparisons"
        )

    def _no_operator(self, _other: object) -> NoReturn:
        raise ModelError(
            f"({self}) is compared with an operator: "
            "write .lt(), .le(), .gt() or .ge() instead of <, <=, > and >="
        )

    __lt__ = __le__ = __gt__ = __ge__ = _no_operator

    def __contains__(self, _item: object) -> bool:
        raise ModelError(f"({self}) is no container: write .in_() on the left term instead of in")

    def __iter__(self) -> Iterator[Node]:
        raise ModelError(f"({self}) cannot be iterated over")

    def eq(self, other: Node | int | bool) -> Node:
        """Equality as a formula."""
        return Equal(self, lift(other, self.type, f"({self}).eq"))

    def ne(self, other: Node | int | bool) -> Node:
        """Inequality."""
        return Not(self.eq(other))

    def lt(self, other: Node | int) -> Node:
        """Strictly less, on integers."""
        return Less(self, lift(other, self.type, f"({self}).lt"))

    def le(self, other: Node | int) -> Node:
        """Less or equal, on integers."""
        return Not(Less(lift(other, self.type, f"({self}).le"), self))

    def gt(self, other: Node | int) -> Node:
        """Strictly greater, on integers."""
        return Less(lift(other, self.type, f"({self}).gt"), self)

    def ge(self, other: Node | int) -> Node:
        """Greater or equal, on integers."""
        return Not(self.lt(other))

    def in_(self, *members: Literal) -> Node:
        """Membership of an enum term in a set of literals."""
        return Member(self, tuple(members))

    def __add__(self, amount: int | Node) -> Node:
        return Add(self, _amount(amount, self))

    def __sub__(self, amount: int) -> Node:
        if isinstance(amount, bool) or not isinstance(amount, int):
            raise ModelError(f"({self}) - {amount}: only a constant may be subtracted")
        return Add(self, Literal(-amount, INT))


def _amount(amount: int | Node, term: Node) -> Node:
    """A constant to add: an int, or a choice between ints."""
    if isinstance(amount, int) and not isinstance(amount, bool):
        return Literal(amount, INT)
    if (
        isinstance(amount, Literal | Choice)
        and amount.type == INT
        and all(isinstance(n, Literal) for n in _leaves(amount))
    ):
        return amount
    raise ModelError(
        f"({term}) + ({amount}): only a constant, or a choice of constants, may be added"
    )


def _leaves(node: Node) -> Iterator[Node]:
    if isinstance(node, Choice):
        yield from _leaves(node.then)
        yield from _leaves(node.otherwise)
    else:
        yield node


def lift(value: object, kind: Type, where: str) -> Node:
    """A Python int or bool as a literal of the wanted type; anything else must be a node."""
    if isinstance(value, Node):
        return value
    if isinstance(value, bool) and isinstance(kind, BoolType):
        return Literal(value, BOOL)
    if isinstance(value, int) and not isinstance(value, bool) and is_integer(kind):
        return Literal(value, INT)
    raise ModelError(f"{where} needs a {kind.name}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Literal(Node):
    """A constant value: a truth value, an integer, or an enum member's position."""

    value: int | bool
    kind: Type

    @property
    def type(self) -> Type:
        return self.kind

    def __str__(self) -> str:
        if isinstance(self.kind, EnumType):
            return self.kind.members[int(self.value)]
        return str(self.value).lower() if isinstance(self.value, bool) else str(self.value)


@dataclass(frozen=True, slots=True)
class Constant(Node):
    """A named integer: its value at run time, any from `least` on in a proof, `small` in search."""

    name: str
    value: int
    small: int
    least: int

    @property
    def type(self) -> Type:
        return INT

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Size(Node):
    """How many elements an index has."""

    of: IndexType

    @property
    def type(self) -> Type:
        return INT

    def __str__(self) -> str:
        return f"number of {self.of.name}s"


@dataclass(frozen=True, slots=True)
class Parameter(Node):
    """A choice made by whoever takes the step."""

    name: str
    kind: Type

    @property
    def type(self) -> Type:
        return self.kind

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Bound(Node):
    """A quantified element, in properties, counts and `fill`."""

    name: str
    kind: IndexType

    @property
    def type(self) -> Type:
        return self.kind

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Variable(Node):
    """A scalar of the state.  `owner` is who may write it; a ghost is read by properties only."""

    name: str
    kind: Type
    init: Literal
    owner: str
    ghost: bool = False
    doc: str = ""

    @property
    def type(self) -> Type:
        return self.kind

    def to(self, value: Node | int | bool) -> Assign:
        """The update `self := value`."""
        return Assign(self, (), (), lift(value, self.kind, f"{self.name}.to"))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class MapVariable:
    """A total function of the state over one or two indexes."""

    name: str
    indexes: tuple[IndexType, ...]
    kind: Type
    init: Literal
    owner: str
    ghost: bool = False
    doc: str = ""

    def __getitem__(self, key: Node | int | tuple[Node | int, ...]) -> Read:
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) != len(self.indexes):
            raise ModelError(f"{self.name} has {len(self.indexes)} indexes, got {len(keys)}")
        lifted = tuple(
            lift(k, i, f"{self.name}[...]") for k, i in zip(keys, self.indexes, strict=True)
        )
        for given, wanted in zip(lifted, self.indexes, strict=True):
            if not compatible(given.type, wanted):
                raise ModelError(
                    f"{self.name}[{given}]: the index is {given.type.name}, not {wanted.name}"
                )
        return Read(self, lifted)

    def __contains__(self, _item: object) -> bool:
        raise ModelError(
            f"{self.name} is a map of the model: write {self.name}[i].in_() instead of in"
        )

    def __iter__(self) -> Iterator[Node]:
        raise ModelError(f"{self.name} is a map of the model and cannot be iterated over")

    def fill(self, value: Callable[..., Node | int | bool]) -> Assign:
        """The update of every element at once: `value` gets the bound elements and gives the new
        value.
        """
        names = ("i", "j")[: len(self.indexes)]
        bound = tuple(Bound(n, k) for n, k in zip(names, self.indexes, strict=True))
        return Assign(self, (), bound, lift(value(*bound), self.kind, f"{self.name}.fill"))


@dataclass(frozen=True, slots=True)
class Read(Node):
    """One element of a map."""

    map: MapVariable
    keys: tuple[Node, ...]

    @property
    def type(self) -> Type:
        return self.map.kind

    def children(self) -> tuple[Node, ...]:
        return self.keys

    def to(self, value: Node | int | bool) -> Assign:
        """The update of this one element."""
        return Assign(self.map, self.keys, (), lift(value, self.map.kind, f"{self}.to"))

    def __str__(self) -> str:
        return f"{self.map.name}[{', '.join(str(k) for k in self.keys)}]"


@dataclass(frozen=True, slots=True)
class Add(Node):
    """An integer plus a constant (or plus a choice of constants)."""

    term: Node
    amount: Node

    def __post_init__(self) -> None:
        if not is_integer(self.term.type):
            raise ModelError(
                f"({self.term}) + ({self.amount}): {self.term.type.name} has no addition"
            )

    @property
    def type(self) -> Type:
        return INT

    def children(self) -> tuple[Node, ...]:
        return (self.term, self.amount)

    def __str__(self) -> str:
        if isinstance(self.amount, Literal) and int(self.amount.value) < 0:
            return f"{self.term} - {-int(self.amount.value)}"
        return f"{self.term} + {self.amount}"


@dataclass(frozen=True, slots=True)
class Equal(Node):
    """left = right."""

    left: Node
    right: Node

    def __post_init__(self) -> None:
        if not compatible(self.left.type, self.right.type):
            raise ModelError(
                f"({self.left}) = ({self.right}) compares "
                f"{self.left.type.name} with {self.right.type.name}"
            )

    @property
    def type(self) -> Type:
        return BOOL

    def children(self) -> tuple[Node, ...]:
        return (self.left, self.right)

    def __str__(self) -> str:
        return f"{self.left} = {self.right}"


@dataclass(frozen=True, slots=True)
class Less(Node):
    """left < right, on integers."""

    left: Node
    right: Node

    def __post_init__(self) -> None:
        for side in (self.left, self.right):
            if not is_integer(side.type):
                raise ModelError(f"({self.left}) < ({self.right}): {side.type.name} has no order")

    @property
    def type(self) -> Type:
        return BOOL

    def children(self) -> tuple[Node, ...]:
        return (self.left, self.right)

    def __str__(self) -> str:
        return f"{self.left} < {self.right}"


@dataclass(frozen=True, slots=True)
class Member(Node):
    """Membership in a set of enum members."""

    term: Node
    members: tuple[Literal, ...]

    def __post_init__(self) -> None:
        for member in self.members:
            if not isinstance(member, Literal) or member.kind != self.term.type:
                raise ModelError(
                    f"({self.term}) is a {self.term.type.name}; "
                    f"({member}) is not one of its members"
                )

    @property
    def type(self) -> Type:
        return BOOL

    def children(self) -> tuple[Node, ...]:
        return (self.term,)

    def __str__(self) -> str:
        return f"{self.term} in {{{', '.join(str(m) for m in self.members)}}}"


@dataclass(frozen=True, slots=True)
class Not(Node):
    """Negation."""

    body: Node

    def __post_init__(self) -> None:
        as_formula(self.body, "not_")

    @property
    def type(self) -> Type:
        return BOOL

    def children(self) -> tuple[Node, ...]:
        return (self.body,)

    def __str__(self) -> str:
        if isinstance(self.body, Equal):
            return f"{self.body.left} ≠ {self.body.right}"
        if isinstance(self.body, Less):
            return f"{self.body.left} ≥ {self.body.right}"
        return f"not ({self.body})"


@dataclass(frozen=True, slots=True)
class And(Node):
    """Conjunction."""

    parts: tuple[Node, ...]

    @property
    def type(self) -> Type:
        return BOOL

    def children(self) -> tuple[Node, ...]:
        return self.parts

    def __str__(self) -> str:
        return " and ".join(_bracket(p) for p in self.parts) or "true"


@dataclass(frozen=True, slots=True)
class Or(Node):
    """Disjunction."""

    parts: tuple[Node, ...]

    @property
    def type(self) -> Type:
        return BOOL

    def children(self) -> tuple[Node, ...]:
        return self.parts

    def __str__(self) -> str:
        return " or ".join(_bracket(p) for p in self.parts) or "false"


@dataclass(frozen=True, slots=True)
class Choice(Node):
    """then if condition else otherwise."""

    condition: Node
    then: Node
    otherwise: Node

    def __post_init__(self) -> None:
        as_formula(self.condition, "choose")
        if not compatible(self.then.type, self.otherwise.type):
            raise ModelError(
                f"choose: the branches are {self.then.type.name} and {self.otherwise.type.name}"
            )

    @property
    def type(self) -> Type:
        return self.then.type

    def children(self) -> tuple[Node, ...]:
        return (self.condition, self.then, self.otherwise)

    def __str__(self) -> str:
        return f"({self.then} if {self.condition} else {self.otherwise})"


@dataclass(frozen=True, slots=True)
class Lookup(Node):
    """A table from enum members to enum members of the same type; members not listed map to
    themselves.
    """

    term: Node
    table: tuple[tuple[Literal, Literal], ...]

    @property
    def type(self) -> Type:
        return self.term.type

    def children(self) -> tuple[Node, ...]:
        return (self.term,)

    def __str__(self) -> str:
        return f"{self.term} through {{{', '.join(f'{a} → {b}' for a, b in self.table)}}}"


@dataclass(frozen=True, slots=True)
class ForAll(Node):
    """For every element of some indexes.  `triggers` guide instantiation in proofs; other uses
    ignore them.
    """

    bound: tuple[Bound, ...]
    body: Node
    triggers: tuple[Node, ...] = field(default=(), compare=False)

    @property
    def type(self) -> Type:
        return BOOL

    def children(self) -> tuple[Node, ...]:
        return (self.body,)

    def __str__(self) -> str:
        names = ", ".join(f"{b.name}: {b.kind.name}" for b in self.bound)
        return f"for every {names}: {self.body}"


@dataclass(frozen=True, slots=True)
class Assign:
    """One update: a scalar, one element of a map, or (with `bound`) every element of a map."""

    target: Variable | MapVariable
    keys: tuple[Node, ...]
    bound: tuple[Bound, ...]
    value: Node
    profiles: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if not compatible(self.value.type, self.target.kind):
            raise ModelError(
                f"{self.target.name} is a {self.target.kind.name}; "
                f"({self.value}) is a {self.value.type.name}"
            )

    def __str__(self) -> str:
        if self.bound:
            return (
                f"{self.target.name}[every {', '.join(b.name for b in self.bound)}] := {self.value}"
            )
        keys = f"[{', '.join(str(k) for k in self.keys)}]" if self.keys else ""
        return f"{self.target.name}{keys} := {self.value}"


def as_formula(node: object, where: str) -> Node:
    if not isinstance(node, Node) or node.type != BOOL:
        raise ModelError(
            f"{where} needs formulas; got {node!s} ({type(node).__name__}). "
            "A Python True or False here usually means that ==, in, and or or was written"
        )
    return node


def _bracket(node: Node) -> str:
    return f"({node})" if isinstance(node, And | Or | ForAll) else str(node)
