"""Does generated Python mean what the interpreter means, and are bulk steps many single steps?"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from agreement import agree, as_arrays, as_lists, copied, outcome, random_parameters
from random_models import (
    CELL,
    COLOUR,
    SIZES,
    VARIABLES,
    Terms,
    cell,
    colour,
    flag,
    last,
    level,
    number,
    paint,
    random_state,
    shade,
    switch,
    total,
    wet,
    worker,
)

from tdxmig_model.compile import Compiled
from tdxmig_model.errors import ModelError, Refused, UsageError
from tdxmig_model.expr import (
    INT,
    Assign,
    Instance,
    Interpreter,
    Node,
    Parameter,
    Size,
    Sparse,
    Step,
    System,
    all_of,
    any_of,
    choose,
    count,
    forall,
    initial_state,
    lookup,
    member,
    members,
    need,
    not_,
    scalar,
    step,
)
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE


@pytest.mark.parametrize("seed", range(12))
def test_random_steps_mean_what_the_interpreter_says(seed: int) -> None:
    terms = Terms(seed, wander=seed % 2 == 1)
    system = System("toy", VARIABLES, tuple(terms.step(f"s{k}") for k in range(25)))
    seen = agree(system, Instance.small(system, SIZES), 12, seed)
    assert seen[True] > 20
    assert seen[False] > 20


@pytest.mark.parametrize("model", [LIFECYCLE, LEAF], ids=["lifecycle", "leaf"])
def test_every_property_of_the_models_means_what_the_interpreter_says(model: System) -> None:
    system = model.under("hardened")
    instance = Instance.small(system, {"Page": 2, "Stream": 2, "Vcpu": 2, "Message": 4, "Epoch": 4})
    interpreter = Interpreter(system, instance)
    compiled = Compiled(system, instance)
    chance = random.Random(5)
    for claimed in system.properties:
        holds = compiled.term(claimed.formula)
        for _ in range(40):
            state = random_state(system, instance, chance)
            expected = outcome(interpreter.value, claimed.formula, state, {})
            assert outcome(holds, state) == expected, claimed.identifier


def test_properties_with_two_bound_elements() -> None:
    system = System("toy", VARIABLES, ())
    instance = Instance.small(system, SIZES)
    rising = forall({"a": CELL, "b": CELL}, lambda a, b: any_of(b.le(a), level[a].le(level[b])))
    holds = Compiled(system, instance).term(rising)
    state = initial_state(system, instance)
    state[6] = [0, 1, 1, 3, 9]
    assert holds(state) is True
    state[6] = [0, 1, 1, 3, 2]
    assert holds(state) is False


# --- simultaneous updates, unbounded indexes, source --------------------------------------------


def toy(*rows: Step) -> System:
    return System("toy", VARIABLES, rows)


def row(name: str, params: tuple[Parameter, ...], when: list[Node], then: list[Assign]) -> Step:
    needs = [need(f"n{k}", formula) for k, formula in enumerate(when)]
    return step(name, "host", params, when=needs, then=then, why="test", cite="none")


def test_updates_are_simultaneous() -> None:
    swap = row("swap", (), [], [number.to(total), total.to(number), level[1].to(number)])
    compiled = Compiled(toy(swap), Instance.small(toy(swap), SIZES))
    state = initial_state(toy(swap), compiled.instance)
    state[2], state[3] = 4, 9
    compiled.apply("swap")(state)
    assert (state[2], state[3], state[6][1]) == (9, 4, 4)


def test_unbounded_maps_are_sparse_and_cannot_be_enumerated() -> None:
    write = row("write", (cell,), [level[cell].eq(0)], [level[cell].to(3), number.to(cell)])
    wipe = row("wipe", (), [], [number.to(9), level.fill(lambda i: 0)])
    size = row("size", (), [number.lt(Size(CELL))], [])
    system = toy(write, wipe, size)
    compiled = Compiled(system, Instance({"Cell": None, "Worker": 2}))
    state = initial_state(system, compiled.instance)
    assert compiled.guard("write")(state, 10**9)
    compiled.apply("write")(state, 10**9)
    assert not compiled.guard("write")(state, 10**9)
    assert isinstance(state[6], Sparse)
    assert dict(state[6]) == {10**9: 3}
    with pytest.raises(ModelError, match="level has no size here and cannot be filled"):
        compiled.apply("wipe")(state)
    assert state[2] == 10**9, "a step that fails changes nothing"
    with pytest.raises(ModelError, match="Cell has no size in this instance"):
        compiled.guard("size")(state)


def test_ghosts_can_be_left_out() -> None:
    ghost = scalar("ghost", INT, 0, "host", ghost=True)
    both = step(
        "both",
        "host",
        when=(),
        then=(number.to(number + 1), ghost.to(ghost + 1)),
        why="t",
        cite="t",
    )
    system = System("toy", (number, ghost), (both,))
    state = [0, 0]
    Compiled(system, Instance({}), ghosts=False).apply("both")(state)
    assert state == [1, 0]
    Compiled(system, Instance({})).apply("both")(state)
    assert state == [2, 1]


def test_source_shows_labels_and_formulas_and_tracebacks_find_it() -> None:
    system = toy(row("write", (cell,), [level[cell].eq(0)], [level[cell].to(3)]))
    compiled = Compiled(system, Instance.small(system, SIZES))
    assert compiled.source("write") == (
        "def guard(state, cell):\n"
        "    return True if (\n"
        "        state[6][cell] == 0  # n0: level[cell] = 0\n"
        "    ) else False\n"
        "\n\n"
        "def apply(state, cell):\n"
        "    state[6][cell] = 3  # level[cell] := 3"
    )
    with pytest.raises(IndexError) as failed:
        compiled.guard("write")(initial_state(system, compiled.instance), 77)
    assert str(failed.traceback[-1].statement).strip().startswith("return True if (")


def test_parameters_outside_their_domain_are_named() -> None:
    system = toy(row("write", (cell, worker), [], []))
    compiled = Compiled(system, Instance.small(system, SIZES))
    assert compiled.outside("write", 4, 2) is None
    assert compiled.outside("write", 5, 0) == "cell = 5 is no Cell (0 to 4)"
    assert compiled.outside("write", 0, -1) == "worker = -1 is no Worker (0 to 2)"
    assert compiled.outside("write", 0) == "step write takes 2 parameters, got 1"


def test_a_refusal_shows_what_was_read() -> None:
    system = toy(row("lit", (cell,), [flag, paint[cell].ne(colour)], []))
    compiled = Compiled(system, Instance.small(system, SIZES))
    state = initial_state(system, compiled.instance)
    first, second = compiled.unmet("lit", state, 3)
    assert str(first) == "n0: needs flag (flag = no)"
    assert (
        str(second) == "n1: needs paint[cell] ≠ colour (paint[cell] = RED, cell = 3, colour = RED)"
    )
    assert compiled.values("lit", "n1", state, 3) == second.values


# --- bulk steps ---------------------------------------------------------------------------------


def bulk_row(
    *updates: Assign, guard: Node | None = None, params: tuple[Parameter, ...] = (cell,)
) -> Step:
    return row("bulk", params, [guard] if guard is not None else [], list(updates))


ACCEPTED = {
    "own element": bulk_row(paint[cell].to(colour), guard=paint[cell].ne(colour)),
    "added constant": bulk_row(
        total.to(total + 1 + choose(paint[cell].eq(shade), 2, -1)),
        paint[cell].to(
            lookup(paint[cell], dict(zip(members(COLOUR), members(COLOUR)[1:], strict=False)))
        ),
        guard=all_of(flag, paint[cell].in_(*members(COLOUR)[:2])),
        params=(cell, shade),
    ),
    "last one decides": bulk_row(last.to(cell + 1), flag.to(True), colour.to(paint[cell])),
    "disjunction": bulk_row(
        flag.to(any_of(flag, level[cell].lt(number), switch)), params=(switch, cell)
    ),
    "two maps": bulk_row(
        wet[worker, cell].to(not_(wet[worker, cell])),
        level[cell].to(level[cell] + choose(wet[worker, cell], 1, 2)),
        guard=any_of(not_(wet[worker, cell]), number.ge(level[cell])),
        params=(cell, worker),
    ),
    "another map's element": bulk_row(
        level[1].to(level[1] + choose(paint[cell].eq(colour), 3, 0)),
        paint[cell].to(member(COLOUR, "BLUE")),
    ),
    "same for all": bulk_row(level.fill(lambda i: number), total.to(number)),
    "count of others": bulk_row(
        number.to(number + 5),
        guard=all_of(count("reds", CELL, lambda i: paint[i].eq(colour)).gt(1), level[cell].gt(0)),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_bulk_step_is_the_single_steps(name: str) -> None:
    system = toy(ACCEPTED[name])
    instance = Instance.small(system, {"Cell": 12, "Worker": 3})
    compiled = Compiled(system, instance)
    chance = random.Random(name)
    assert compiled.bulk_refusal("bulk", "cell") is None
    bulk = compiled.bulk("bulk", "cell")
    refused = taken = 0
    for _ in range(150):
        state = random_state(system, instance, chance)
        params = random_parameters(ACCEPTED[name], instance, chance)
        del params["cell"]
        indices = np.array(chance.sample(range(12), chance.randint(0, 6)), dtype=np.int64)
        columns = as_arrays(state)
        expected = [
            Interpreter(system, instance).enabled(ACCEPTED[name], state, {**params, "cell": int(i)})
            for i in indices
        ]
        assert bulk.guard_mask(columns, indices, **params).tolist() == expected
        assert bulk.guard_mask(columns, indices, *params.values()).tolist() == expected
        before = as_lists(copied(columns))
        if not all(expected):
            with pytest.raises(Refused):
                bulk.apply(columns, indices, **params)
            assert as_lists(columns) == before, "a refused list changes nothing"
            refused += 1
            continue
        bulk.apply(columns, indices, **params)
        after = copied(state)
        for i in indices:
            arguments = {**params, "cell": int(i)}
            ordered = [arguments[p.name] for p in ACCEPTED[name].params]
            assert compiled.guard("bulk")(after, *ordered)
            compiled.apply("bulk")(after, *ordered)
        assert as_lists(columns) == after
        assert all(type(v) in (int, bool, np.ndarray) for v in columns)
        taken += 1
    assert taken > 10
    assert refused > 10 or not ACCEPTED[name].when


REFUSED = {
    "the conjunct n0 reads number, which the step changes": bulk_row(
        number.to(number + 1), guard=number.lt(3)
    ),
    "the conjunct n0 reads paint[0], which the step changes": bulk_row(
        paint[cell].to(colour), guard=paint[0].eq(colour)
    ),
    "the conjunct n0 reads paint[element], which the step changes": bulk_row(
        paint[cell].to(colour), guard=count("reds", CELL, lambda i: paint[i].eq(colour)).eq(0)
    ),
    "the conjunct n0 reads level[cell + 1] for every index": bulk_row(
        flag.to(True), guard=level[cell + 1].eq(0)
    ),
    "the new value of total depends on number, which the step changes": bulk_row(
        total.to(number), number.to(number + 1)
    ),
    "the new value of number depends on number, which the step changes": bulk_row(
        number.to(choose(flag, number, 0))
    ),
    "the position written in level is number, which the step changes": bulk_row(
        level[number].to(1), number.to(number + 1)
    ),
    "the position written in level is computed from cell": bulk_row(level[cell + 1].to(1)),
    "the new value of level depends on cell and every element is written": bulk_row(
        level.fill(lambda i: cell)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_bulk_step_says_why(reason: str) -> None:
    system = toy(REFUSED[reason])
    compiled = Compiled(system, Instance.small(system, SIZES))
    assert compiled.bulk_refusal("bulk", "cell") == reason
    with pytest.raises(ModelError, match="step bulk is not a bulk step over cell: "):
        compiled.bulk("bulk", "cell")


def test_only_an_ordered_index_is_a_bulk_parameter() -> None:
    system = toy(row("bulk", (worker,), [], []))
    compiled = Compiled(system, Instance.small(system, SIZES))
    assert (
        compiled.bulk_refusal("bulk", "worker")
        == "worker is a Worker, not an element of an ordered index"
    )
    assert compiled.bulk_refusal("bulk", "cell") == "it has no parameter cell"


@pytest.fixture
def painting() -> tuple[Any, list[Any]]:
    system = toy(
        bulk_row(paint[cell].to(colour), total.to(total + 1), guard=paint[cell].ne(colour))
    )
    compiled = Compiled(system, Instance.small(system, SIZES))
    state = as_arrays(initial_state(system, compiled.instance))
    state[0] = 2
    return compiled.bulk("bulk", "cell"), state


def test_an_index_given_twice_is_refused(painting: tuple[Any, list[Any]]) -> None:
    bulk, state = painting
    for use in (bulk.guard_mask, bulk.apply):
        with pytest.raises(Refused, match="distinct_indices: needs each cell once") as refusal:
            use(state, np.array([3, 1, 3]))
        assert refusal.value.unmet[0].values == {"cell": 3}
    assert state[5].tolist() == [0] * 5


def test_a_failing_entry_in_mid_list_changes_nothing(painting: tuple[Any, list[Any]]) -> None:
    bulk, state = painting
    state[5][3] = 2
    with pytest.raises(Refused) as refusal:
        bulk.apply(state, np.array([0, 3, 4]))
    assert refusal.value.state == {"cell": 3}
    assert [u.label for u in refusal.value.unmet] == ["n0"]
    assert state[5].tolist() == [0, 0, 0, 2, 0]
    assert state[3] == 0
    bulk.apply(state, np.array([4, 0], dtype=np.uint64))
    assert state[5].tolist() == [2, 0, 0, 2, 2]
    assert state[3] == 2


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.array([0, 5]), r"cell = 5 is no Cell \(size 5\)"),
        (np.array([-1]), r"cell = -1 is no Cell"),
        (np.array([0.5]), "one-dimensional integer array, got float64"),
        (np.array([[1]]), r"got int64 with shape \(1, 1\)"),
    ],
)
def test_indexes_outside_are_refused(
    painting: tuple[Any, list[Any]], indices: Any, message: str
) -> None:
    bulk, state = painting
    with pytest.raises(UsageError, match=message):
        bulk.apply(state, indices)


def test_a_bulk_step_needs_arrays(painting: tuple[Any, list[Any]]) -> None:
    bulk, state = painting
    state[5] = [0] * 5
    with pytest.raises(UsageError, match="paint is a list, a bulk step needs a NumPy array"):
        bulk.apply(state, np.array([1]))


def test_no_index_at_all_changes_nothing(painting: tuple[Any, list[Any]]) -> None:
    bulk, state = painting
    bulk.apply(state, np.array([], dtype=np.int64))
    assert state[3] == 0
    assert bulk.guard_mask(state, []).tolist() == []


BULK_OVER_PAGES = [
    (model, profile, step_.name)
    for model in (LEAF,)
    for profile in model.profiles
    for step_ in model.under(profile).steps
    for p in step_.params
    if p.name == "p"
]


@pytest.mark.parametrize(("model", "profile", "name"), BULK_OVER_PAGES)
def test_page_steps_of_the_leaf_model_are_bulk_steps(
    model: System, profile: str, name: str
) -> None:
    system = model.under(profile)
    instance = Instance.small(
        system, {"Page": 16, "Stream": 2, "Vcpu": 2, "Message": 4, "Epoch": 4}
    )
    compiled = Compiled(system, instance)
    row = system.step(name)
    assert compiled.bulk_refusal(name, "p") is None
    bulk = compiled.bulk(name, "p")
    chance = random.Random(name)
    taken = 0
    for _ in range(300):
        state = random_state(system, instance, chance)
        params = random_parameters(row, instance, chance)
        del params["p"]
        columns = as_arrays(state)
        held = np.flatnonzero(bulk.guard_mask(columns, np.arange(16), **params))
        bulk.apply(columns, held, **params)
        for i in held:
            ordered = [{**params, "p": int(i)}[q.name] for q in row.params]
            assert compiled.guard(name)(state, *ordered)
            compiled.apply(name)(state, *ordered)
        assert as_lists(columns) == state
        taken += len(held)
    assert taken >= 5
