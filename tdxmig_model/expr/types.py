"""The types of the model's language: truth values, integers, finite enums, and two kinds of index.

An *unordered* index (a vCPU) has only equality, so a proof may permute its elements.  An *ordered*
index
(a page, a position in the message log, a stream) is the integers 0, 1, 2, ... below its size.  No
size is
fixed here: a proof holds for every size, a finite instance chooses one.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from tdxmig_model.errors import ModelError


@dataclass(frozen=True, slots=True)
class BoolType:
    """Truth values."""

    name: str = "Bool"


@dataclass(frozen=True, slots=True)
class IntType:
    """Unbounded integers.  Machine widths are separate lemmas, never assumed by a row."""

    name: str = "Int"


@dataclass(frozen=True, slots=True)
class EnumType:
    """A finite set of named members; a value is the member's position."""

    name: str
    members: tuple[str, ...]

    def position(self, member: str) -> int:
        """The position of a member, or a ModelError that suggests the nearest name."""
        if member not in self.members:
            close = difflib.get_close_matches(member, self.members, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ModelError(f"{member} is not a member of {self.name}{hint}")
        return self.members.index(member)


@dataclass(frozen=True, slots=True)
class IndexType:
    """The domain of a map.  `ordered` indexes have 0, +1 and <; the others only equality."""

    name: str
    ordered: bool


Type = BoolType | IntType | EnumType | IndexType

BOOL = BoolType()
INT = IntType()


def enum(name: str, *members: str) -> EnumType:
    """Declare a finite enum."""
    if len(set(members)) != len(members) or not members:
        raise ModelError(f"enum {name} needs distinct members, got {members}")
    return EnumType(name, members)


def sort(name: str) -> IndexType:
    """Declare an unordered index: equality only."""
    return IndexType(name, ordered=False)


def index(name: str) -> IndexType:
    """Declare an ordered index: integers from 0."""
    return IndexType(name, ordered=True)


def is_integer(kind: Type) -> bool:
    """Whether terms of this type are integers with order and addition."""
    return isinstance(kind, IntType) or (isinstance(kind, IndexType) and kind.ordered)


def compatible(left: Type, right: Type) -> bool:
    """Whether two terms may be compared or assigned: the same type, or both integers."""
    return left == right or (is_integer(left) and is_integer(right))
