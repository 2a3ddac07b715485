"""All of z3 that the package uses, behind typed functions.  The only file that imports z3.

Terms are opaque outside this file.  Everything runs in z3's one global context, which belongs to
one thread: parallel work uses processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, cast

import z3

from tdxmig_model.errors import ModelError


class Term:
    """An opaque z3 expression: an integer, a bit vector or a truth value."""


class Answer(Enum):
    """What a solver says of a set of assertions."""

    UNSAT = "unsat"
    SAT = "sat"
    UNKNOWN = "unknown"


Function = Callable[..., Term]
_fresh = 0


def _raw(term: Term) -> Any:
    return term


def _term(value: Any) -> Term:
    return cast(Term, value)


def fresh_name(stem: str) -> str:
    """A name that no other term has: z3 captures a constant that is named like a bound variable."""
    global _fresh
    _fresh += 1
    return f"{stem}!{_fresh}"


def version() -> str:
    """The version of the solver library."""
    return str(z3.get_version_string())


# Integers and truth values.


def boolean(value: bool) -> Term:
    """A literal truth value."""
    return _term(z3.BoolVal(value))


TRUE, FALSE = boolean(True), boolean(False)


def integer(value: int) -> Term:
    """A literal integer."""
    return _term(z3.IntVal(value))


def int_const(name: str) -> Term:
    """An unknown integer."""
    return _term(z3.Int(name))


def bool_const(name: str) -> Term:
    """An unknown truth value."""
    return _term(z3.Bool(name))


def function(name: str, arity: int, *, predicate: bool) -> Function:
    """An unknown function from integers to an integer or a truth value."""
    result = z3.BoolSort() if predicate else z3.IntSort()
    declared = z3.Function(name, *([z3.IntSort()] * arity), result)

    def apply(*arguments: Term) -> Term:
        return _term(declared(*arguments))

    return apply


def add(left: Term, right: Term) -> Term:
    """Addition, of integers or of bit vectors of one width."""
    return _term(_raw(left) + _raw(right))


def less(left: Term, right: Term) -> Term:
    """Strictly less; bit vectors are signed."""
    return _term(_raw(left) < _raw(right))


def at_most(left: Term, right: Term) -> Term:
    """Less or equal; bit vectors are signed."""
    return _term(_raw(left) <= _raw(right))


def equal(left: Term, right: Term) -> Term:
    """Equality of two terms of one sort."""
    if same(left, right):
        return TRUE
    a, b = value_of(left), value_of(right)
    if a is not None and b is not None:
        return boolean(a == b)
    return _term(_raw(left) == _raw(right))


# Connectives.  Literal arguments are folded, so that what a step leaves alone stays small.


def is_true(term: Term) -> bool:
    """Whether the term is the literal true."""
    return bool(z3.is_true(term))


def is_false(term: Term) -> bool:
    """Whether the term is the literal false."""
    return bool(z3.is_false(term))


def both(parts: Iterable[Term]) -> Term:
    """Conjunction."""
    kept = []
    for part in parts:
        if is_false(part):
            return FALSE
        if not is_true(part):
            kept.append(part)
    if not kept:
        return TRUE
    return kept[0] if len(kept) == 1 else _term(z3.And(kept))


def either(parts: Iterable[Term]) -> Term:
    """Disjunction."""
    kept = []
    for part in parts:
        if is_true(part):
            return TRUE
        if not is_false(part):
            kept.append(part)
    if not kept:
        return FALSE
    return kept[0] if len(kept) == 1 else _term(z3.Or(kept))


def negate(term: Term) -> Term:
    """Negation."""
    if is_true(term):
        return FALSE
    if is_false(term):
        return TRUE
    return _term(z3.Not(term))


def when(condition: Term, conclusion: Term) -> Term:
    """Implication."""
    return either((negate(condition), conclusion))


def choose(condition: Term, then: Term, otherwise: Term) -> Term:
    """If condition then one term else the other."""
    if is_true(condition) or same(then, otherwise):
        return then
    if is_false(condition):
        return otherwise
    return _term(z3.If(condition, then, otherwise))


def same(left: Term, right: Term) -> bool:
    """Whether two terms are syntactically identical."""
    return bool(_raw(left).eq(right))


def value_of(term: Term) -> int | bool | None:
    """The Python value of a literal term, None for any other; bit vectors are signed."""
    raw = _raw(term)
    if z3.is_true(raw):
        return True
    if z3.is_false(raw):
        return False
    if z3.is_int_value(raw):
        return int(raw.as_long())
    if z3.is_bv_value(raw):
        return int(raw.as_signed_long())
    return None


# Quantifiers.


def for_all(variables: Sequence[Term], body: Term, patterns: Sequence[Sequence[Term]]) -> Term:
    """A quantified formula; each pattern is a set of terms that together mention all variables."""
    if is_true(body):
        return TRUE
    made = [z3.MultiPattern(*p) for p in patterns]
    return _term(z3.ForAll(list(variables), body, patterns=made))


def _uninterpreted(raw: Any) -> bool:
    return bool(z3.is_app(raw) and raw.decl().kind() == z3.Z3_OP_UNINTERPRETED)


def mention(term: Term) -> Term:
    """A formula that says nothing but makes E-matching look at a term: an unused predicate."""
    raw = _raw(term)
    seen = z3.Function(f"mentioned {raw.sort()}", raw.sort(), z3.BoolSort())
    return _term(seen(raw))


def applications(body: Term, variables: Sequence[Term]) -> list[tuple[Term, frozenset[int]]]:
    """The applications of unknown functions in `body` that can serve as patterns, outermost last.

    Each comes with the positions of the variables it mentions.  An application whose arguments
    hold arithmetic or a choice cannot be matched and is left out.
    """
    position = {_raw(v).get_id(): i for i, v in enumerate(variables)}
    memo: dict[int, tuple[frozenset[int], bool]] = {}
    found: dict[int, tuple[Term, frozenset[int]]] = {}

    def visit(raw: Any) -> tuple[frozenset[int], bool]:
        key = raw.get_id()
        if key in memo:
            return memo[key]
        if key in position:
            memo[key] = (frozenset({position[key]}), True)
            return memo[key]
        if not z3.is_app(raw):
            memo[key] = (frozenset(), False)
            return memo[key]
        below = [visit(child) for child in raw.children()]
        mentioned: frozenset[int] = frozenset().union(*(m for m, _ in below))
        plain = all(p for _, p in below) and (_uninterpreted(raw) or z3.is_int_value(raw))
        if plain and mentioned and raw.num_args() > 0:
            found[key] = (_term(raw), mentioned)
        memo[key] = (mentioned, plain)
        return memo[key]

    visit(body)
    return list(found.values())


def matchable(term: Term) -> bool:
    """Whether a term can be a pattern: an application without arithmetic or choice inside."""

    def plain(raw: Any) -> bool:
        return bool(
            z3.is_int_value(raw) or (_uninterpreted(raw) and all(plain(c) for c in raw.children()))
        )

    return bool(_raw(term).num_args()) and plain(term)


# Bit vectors: for finite instances, and for arithmetic of machine widths.


def bits_value(value: int, width: int) -> Term:
    """A literal bit vector."""
    return _term(z3.BitVecVal(value, width))


def bits_const(name: str, width: int) -> Term:
    """An unknown bit vector."""
    return _term(z3.BitVec(name, width))


def bits_subtract(left: Term, right: Term) -> Term:
    """Subtraction of bit vectors of one width, which wraps."""
    return _term(_raw(left) - _raw(right))


def bits_at_most(left: Term, right: Term) -> Term:
    """Less or equal, of unsigned bit vectors of one width."""
    return _term(z3.ULE(_raw(left), _raw(right)))


def bits_below(left: Term, right: Term) -> Term:
    """Strictly less, of unsigned bit vectors of one width."""
    return _term(z3.ULT(_raw(left), _raw(right)))


def bits_widened(term: Term, width: int) -> Term:
    """The same unsigned value in more bits."""
    raw = _raw(term)
    return _term(z3.ZeroExt(width - raw.size(), raw))


def bits_narrowed(term: Term, width: int) -> Term:
    """The low bits of a bit vector: what an assignment to a smaller variable keeps."""
    return _term(z3.Extract(width - 1, 0, _raw(term)))


def bits_width(term: Term) -> int:
    """The number of bits of a bit vector."""
    return int(_raw(term).size())


# Solving.


class Model:
    """Values that satisfy what a solver was given."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def value(self, term: Term) -> int | bool:
        """The value of a term, with arbitrary values for what does not matter."""
        found = value_of(_term(self._raw.eval(term, model_completion=True)))
        if found is None:
            raise ModelError(f"z3 gives no value for {term}")
        return found


class Solver:
    """A solver with one purpose.

    `quantified` solvers use E-matching, and model-based instantiation only if `mbqi`; they answer
    UNKNOWN instead of SAT.  The others decide bit-vector and propositional formulas.
    """

    def __init__(self, *, quantified: bool, mbqi: bool = False, seed: int = 0) -> None:
        if quantified:
            self._raw: Any = z3.SimpleSolver()
            self._raw.set("auto_config", False)
            self._raw.set("smt.mbqi", mbqi)
            self._raw.set("smt.random_seed", seed)
            self._raw.set("random_seed", seed)
        else:
            self._raw = z3.SolverFor("QF_BV")
            self._raw.set("random_seed", seed)
        self._spent = 0

    def add(self, *terms: Term) -> None:
        """Assert terms."""
        for term in terms:
            if not is_true(term):
                self._raw.add(term)

    def push(self) -> None:
        """Open a scope of assertions."""
        self._raw.push()

    def pop(self) -> None:
        """Close the innermost scope of assertions."""
        self._raw.pop()

    def check(self, *, rlimit: int = 0, assumptions: Sequence[Term] = ()) -> Answer:
        """Decide; `rlimit` bounds the work in z3's deterministic unit, 0 for no bound.

        KeyboardInterrupt if somebody interrupts it.
        """
        self._raw.set("rlimit", rlimit)
        answer = self._raw.check(*assumptions)
        if answer == z3.unsat:
            return Answer.UNSAT
        if answer == z3.unknown and self.reason() == "interrupted from keyboard":
            raise KeyboardInterrupt  # z3 took the signal, and Python never hears of it
        return Answer.SAT if answer == z3.sat else Answer.UNKNOWN

    def model(self) -> Model:
        """The values found by the last check that answered SAT."""
        return Model(self._raw.model())

    def reason(self) -> str:
        """Why the last check answered UNKNOWN."""
        return str(self._raw.reason_unknown())

    def text(self) -> str:
        """All assertions as SMT-LIB, for other solvers."""
        return str(self._raw.to_smt2())


def substitute(term: Term, olds: Sequence[Term], news: Sequence[Term]) -> Term:
    """The term with constants `olds` replaced by `news`, all at once."""
    return _term(z3.substitute(term, *zip(olds, news, strict=True)))


def evaluated(term: Term) -> int | bool | None:
    """The Python value of a term without unknowns, None if it has some."""
    return value_of(_term(z3.simplify(term)))
