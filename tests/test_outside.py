"""Is a key outside its index an error to every reader of the rows, and never another element?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from agreement import OUTSIDE, Witnesses, as_arrays, as_lists, copied
from reference import Reference

from tdxmig_model.compile import Compiled
from tdxmig_model.explore import explore
from tdxmig_model.expr import (
    INT,
    Instance,
    Interpreter,
    System,
    index,
    initial_state,
    mapping,
    need,
    param,
    scalar,
    step,
)
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.words import HARDENED

SHELF = index("Shelf")
PLACE = index("Place")
BOOK = index("Book")

books = mapping("books", (SHELF, PLACE), INT, 0, "reader")
loans = mapping("loans", (BOOK,), INT, 0, "reader")
shelf = scalar("shelf", INT, 0, "reader")
place = scalar("place", INT, 0, "reader")
moves = scalar("moves", INT, 0, "reader")
book = param("book", BOOK)


def row(name: str, params: Any, when: Any, then: Any) -> Any:
    return step(name, "reader", params, when=when, then=then, why="a test", cite="none")


LIBRARY = System(
    "library",
    (books, loans, shelf, place, moves),
    (
        row("go", (), [], [place.to(place + 1)]),
        row("up", (), [], [shelf.to(shelf + 1)]),
        row("back", (), [], [place.to(place - 1)]),
        row("read", (), [need("there", books[shelf, place].eq(0))], [moves.to(0)]),
        row("put", (), [], [moves.to(moves + 1), books[shelf, place].to(1)]),
        row(
            "lend",
            (book,),
            [need("in", loans[book].eq(0))],
            [moves.to(moves + 1), loans[book].to(1), books[shelf, place].to(1)],
        ),
    ),
)
SMALL = Instance({"Shelf": 2, "Place": 3, "Book": 2})
PLACES = [(a, b) for a in range(-2, 4) for b in range(-2, 5)]


def at(a: int, b: int) -> list[Any]:
    """The state before, with the reader at a place; every element is different."""
    return [list(range(6)), [0, 0], a, b, 0]


def inside(a: int, b: int) -> bool:
    return 0 <= a < 2 and 0 <= b < 3


@pytest.mark.parametrize(("a", "b"), PLACES)
def test_a_key_outside_is_an_error_of_interpreter_and_compiled_code(a: int, b: int) -> None:
    interpreter, compiled = Interpreter(LIBRARY, SMALL), Compiled(LIBRARY, SMALL)
    for layout in (at(a, b), as_arrays(at(a, b))):
        for name, params in (("put", {}), ("lend", {"book": 1})):
            wanted = copied(layout)
            if inside(a, b):
                compiled.apply(name)(layout, *params.values())
                after = interpreter.apply(LIBRARY.step(name), wanted, params)
                assert as_lists(layout) == as_lists(after)
                assert as_lists(layout)[0][3 * a + b] == 1
                continue
            with pytest.raises(IndexError):
                interpreter.apply(LIBRARY.step(name), wanted, params)
            with pytest.raises(IndexError):
                compiled.apply(name)(layout, *params.values())
            assert as_lists(layout) == at(a, b), "nothing was written before the error"
            with pytest.raises(IndexError):
                interpreter.enabled(LIBRARY.step("read"), layout, {})
            with pytest.raises(IndexError):
                compiled.guard("read")(layout)


@pytest.mark.parametrize(("a", "b"), PLACES)
def test_a_bulk_step_writes_nothing_if_a_key_is_outside(a: int, b: int) -> None:
    bulk = Compiled(LIBRARY, SMALL).bulk("lend", "book")
    state = as_arrays(at(a, b))
    if inside(a, b):
        bulk.apply(state, np.array([0, 1]))
        assert as_lists(state)[1] == [1, 1]
        return
    with pytest.raises(IndexError):
        bulk.apply(state, np.array([0, 1]))
    assert as_lists(state) == at(a, b)


def test_z3_agrees() -> None:
    witnesses = Witnesses(LIBRARY, SMALL, around=8)
    outside = 0
    for a, b in PLACES:
        for name in ("put", "read"):
            witnesses.agree(at(a, b), LIBRARY.step(name), {}, z3=True)
            outside += witnesses.after(LIBRARY.step(name), at(a, b), {}) is OUTSIDE
    assert outside == 2 * (len(PLACES) - 6)


def test_the_search_clips_what_the_interpreter_refuses() -> None:
    ceiling = {"books": 1, "loans": 1, "shelf": 3, "place": 4, "moves": 1}
    wanted = Reference(LIBRARY, SMALL, ceiling)
    found = explore(LIBRARY, SMALL, ceiling=ceiling)
    assert (found.states, found.transitions) == (len(wanted.distance), wanted.transitions)
    assert found.clipped == wanted.clipped > 0
    corners = {(state[2], state[3]) for state in wanted.distance}
    assert {(0, 3), (2, 0), (0, -1)} <= corners


def test_a_constant_key_outside_is_an_error() -> None:
    system = System("corner", (books,), (row("far", (), [], [books[0, 3].to(1)]),))
    with pytest.raises(IndexError):
        Compiled(system, SMALL).apply("far")(initial_state(system, SMALL))
    with pytest.raises(IndexError):
        Interpreter(system, SMALL).apply(system.step("far"), initial_state(system, SMALL), {})
    assert explore(system, SMALL).clipped == 1


def test_in_an_unbounded_index_no_key_is_outside() -> None:
    instance = Instance({"Shelf": None, "Place": 3, "Book": 2})
    compiled = Compiled(LIBRARY, instance)
    state = initial_state(LIBRARY, instance)
    state[2], state[3] = 10**6, 2
    compiled.apply("put")(state)
    assert state[0] == {3 * 10**6 + 2: 1}
    state[3] = 3
    for failing in (
        lambda: compiled.apply("put")(state),
        lambda: Interpreter(LIBRARY, instance).apply(LIBRARY.step("put"), state, {}),
    ):
        with pytest.raises(IndexError):
            failing()


@pytest.mark.parametrize("system", [LEAF, LIFECYCLE], ids=lambda s: s.name)
def test_what_is_checked_at_run_time_costs_nothing(system: System) -> None:
    """There messages and epochs have no size, and all other maps are read at parameters."""
    sizes = {"Page": 16, "Vcpu": 2, "Stream": 2, "Message": None, "Epoch": None}
    compiled = Compiled(system.under(HARDENED), Instance(sizes))
    for taken in compiled.system.steps:
        assert "inside(" not in compiled.source(taken.name)
    assert "inside(" in Compiled(LIBRARY, SMALL).source("put")
