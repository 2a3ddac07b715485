"""Terms as Python expressions over a flat state, with the meaning that the interpreter gives them.

Each writer below prints one way of reading the state; what stands above a variable is the same in
all of them.  Conjunction, disjunction and choice are evaluated from left to right and only as far
as needed, as in the interpreter.
"""

from __future__ import annotations

import keyword
import linecache
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import Any, NoReturn

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    Add,
    And,
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
    Variable,
    subterms,
)

# How tightly a Python expression binds; a looser one is bracketed where a tighter one is needed.
CHOICE, OR, AND, NOT, COMPARE, ADD, ATOM = range(7)


def identifier(name: str) -> str:
    """A name of the model as a Python name that no generated name can be."""
    plain = "".join(c if c.isalnum() else "_" for c in name)
    return f"{plain}_" if keyword.iskeyword(plain) or plain in ("state", "inside") else plain


def no_size(index: str) -> NoReturn:
    """What generated code calls where it would have to enumerate an unbounded index."""
    raise ModelError(f"{index} has no size in this instance and cannot be enumerated")


def inside(key: int, size: int) -> int:
    """What generated code calls for a computed key: IndexError if it is outside its index.

    Without it a negative one would count from the end, and one of several keys that is too large
    would be the position of another element.
    """
    if 0 <= key < size:
        return key
    raise IndexError(f"{key} is not in the range 0 to {size - 1}")


class Writer:
    """Print terms as Python; the state is the interpreter's, one slot per variable."""

    def __init__(self, instance: Instance, slots: Mapping[str, int]) -> None:
        self.instance = instance
        self.slots = slots

    # --- reading the state, which other layouts do in their own way -------------------------------

    def scalar(self, variable: Variable) -> str:
        """The expression that reads a scalar."""
        return f"state[{self.slots[variable.name]}]"

    def column(self, variable: MapVariable) -> str:
        """The expression that is a whole map."""
        return f"state[{self.slots[variable.name]}]"

    def element(self, node: Read) -> str:
        """The expression that reads one element of a map."""
        return f"{self.column(node.map)}[{self.offset(node.map, node.keys)}]"

    def offset(self, variable: MapVariable, keys: Iterable[Node]) -> str:
        """The expression for the flat position of an element."""
        (key, kind), *others = zip(keys, variable.indexes, strict=True)
        flat, level = self.key(key, kind)
        for key, kind in others:
            bracketed = f"({flat})" if level < ADD + 1 else flat
            text, own = self.key(key, kind)
            flat = f"{bracketed} * {self._size(kind)} + {text if own >= ADD else f'({text})'}"
            level = ADD
        return flat

    def key(self, key: Node, kind: IndexType) -> tuple[str, int]:
        """The expression for one key, and its level; it is checked unless it is surely inside."""
        if self.surely_inside(key, kind):
            return self._write(key)
        return f"inside({self.text(key)}, {self._size(kind)})", ATOM

    def surely_inside(self, key: Node, kind: IndexType) -> bool:
        """Whether a key needs no check: an element of the index, or of one without a size."""
        size = self.instance.size(kind)
        if size is None:
            return True
        match key:
            case Literal() | Constant():
                value = key.value if isinstance(key, Literal) else self.instance.constant(key)
                return 0 <= int(value) < size
            case Parameter() | Bound() if isinstance(key.type, IndexType):
                own = self.instance.size(key.type)
                return own is not None and own <= size
            case _:
                return not kind.ordered  # nothing is computed from an element of a sort

    def surely_all_inside(self, variable: MapVariable, keys: Iterable[Node]) -> bool:
        """Whether no key of an element needs a check."""
        pairs = zip(keys, variable.indexes, strict=True)
        return all(self.surely_inside(key, kind) for key, kind in pairs)

    def parameter(self, node: Parameter) -> str:
        """The expression for a parameter of the step."""
        return identifier(node.name)

    # --- terms -----------------------------------------------------------------------------------

    def text(self, node: Node) -> str:
        """The expression for a term."""
        return self._write(node)[0]

    def at(self, node: Node, level: int) -> str:
        """The expression for a term, bracketed if it binds more loosely than `level`."""
        text, own = self._write(node)
        return text if own >= level else f"({text})"

    def _size(self, kind: IndexType) -> str:
        size = self.instance.size(kind)
        return f"no_size({kind.name!r})" if size is None else str(size)

    def _write(self, node: Node) -> tuple[str, int]:
        match node:
            case Literal():
                negative = not isinstance(node.value, bool) and node.value < 0
                return repr(node.value), NOT if negative else ATOM
            case Constant():
                return str(self.instance.constant(node)), ATOM
            case Size():
                return self._size(node.of), ATOM
            case Parameter():
                return self.parameter(node), ATOM
            case Bound():
                return f"each_{identifier(node.name)}", ATOM
            case Variable():
                return self.scalar(node), ATOM
            case Read():
                return self.element(node), ATOM
            case Add():
                return self._add(node)
            case Equal():
                return f"{self.at(node.left, ADD)} == {self.at(node.right, ADD)}", COMPARE
            case Less():
                return f"{self.at(node.left, ADD)} < {self.at(node.right, ADD)}", COMPARE
            case Member():
                return self._member(node)
            case Not(body=Equal() as equal):
                return f"{self.at(equal.left, ADD)} != {self.at(equal.right, ADD)}", COMPARE
            case Not(body=Less() as less):
                return f"{self.at(less.left, ADD)} >= {self.at(less.right, ADD)}", COMPARE
            case Not():
                return f"not {self.at(node.body, NOT)}", NOT
            case And():
                return self._joined(node.parts, " and ", "True", NOT, AND)
            case Or():
                return self._joined(node.parts, " or ", "False", AND, OR)
            case Choice():
                then, condition = self.at(node.then, OR), self.at(node.condition, OR)
                return f"{then} if {condition} else {self.at(node.otherwise, CHOICE)}", CHOICE
            case Lookup():
                return f"{lookup_table(node)}[{self.text(node.term)}]", ATOM
            case ForAll():
                return f"all({self.text(node.body)}{self.loops(node.bound)})", ATOM
            case Count():
                return self._count(node)
            case CountBelow():
                return self._write(node.as_count())
            case _:
                raise ModelError(f"no Python is known for {type(node).__name__}")

    def _add(self, node: Add) -> tuple[str, int]:
        if isinstance(node.amount, Literal) and int(node.amount.value) < 0:
            return f"{self.at(node.term, ADD)} - {-int(node.amount.value)}", ADD
        return f"{self.at(node.term, ADD)} + {self.at(node.amount, ATOM)}", ADD

    def _member(self, node: Member) -> tuple[str, int]:
        values = [repr(m.value) for m in node.members]
        if len(values) == 1:
            return f"{self.at(node.term, ADD)} == {values[0]}", COMPARE
        listed = f"{{{', '.join(values)}}}" if values else "()"
        return f"{self.at(node.term, ADD)} in {listed}", COMPARE

    def _joined(
        self, parts: tuple[Node, ...], word: str, empty: str, inner: int, outer: int
    ) -> tuple[str, int]:
        if not parts:
            return empty, ATOM
        if len(parts) == 1:
            return self._write(parts[0])
        return word.join(self.at(p, inner) for p in parts), outer

    def loops(self, bound: tuple[Bound, ...]) -> str:
        """The `for` clauses of a comprehension over all elements."""
        return "".join(
            f" for each_{identifier(b.name)} in range({self._size(b.kind)})" for b in bound
        )

    def _count(self, node: Count) -> tuple[str, int]:
        return f"sum(1{self.loops((node.bound,))} if {self.at(node.predicate, OR)})", ATOM


def lookup_table(node: Lookup) -> tuple[int | bool, ...]:
    """The table of a lookup, with one entry for every member."""
    listed: dict[int | bool, int | bool] = {}
    for old, new in node.table:
        listed[old.value] = new.value
    kind = node.type
    if isinstance(kind, EnumType):
        return tuple(listed.get(i, i) for i in range(len(kind.members)))
    return tuple(listed.get(value, value) for value in (False, True))


def may_be_numpy(node: Node) -> bool:
    """Whether the value of the term can be a NumPy scalar when maps are arrays."""
    return any(isinstance(n, Read) for n in subterms(node))


def define(source: str, name: str, known: Mapping[str, object]) -> dict[str, Any]:
    """Execute generated source; tracebacks and debuggers show its lines.

    Equal sources of one name share one entry of `linecache`.
    """
    filename = f"<{name} {sha256(source.encode()).hexdigest()[:8]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    space: dict[str, Any] = {"no_size": no_size, "inside": inside, **known}
    exec(compile(source, filename, "exec"), space)
    return space


Function = Callable[..., Any]
