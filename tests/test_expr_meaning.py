"""Does the interpreter give terms, guards and updates the meaning that the language states?"""

from __future__ import annotations

import pytest
from expr_toy import (
    EXPORT,
    IDLE,
    IMPORT,
    OTHER,
    PAGE,
    STATE,
    TOP,
    VARIABLES,
    VCPU,
    epoch,
    guarded,
    open_,
    p,
    page,
    row,
    seen,
    state,
    total,
    v,
    version,
)

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    BOOL,
    INT,
    Count,
    ForAll,
    Instance,
    Interpreter,
    Literal,
    Size,
    Sparse,
    System,
    all_of,
    any_of,
    choose,
    count,
    forall,
    implies,
    initial_state,
    lookup,
    need,
    not_,
    only,
    param,
    show,
    slots,
    step,
    subterms,
)

INSTANCE = Instance({"Page": 3, "Vcpu": 2}, {"TOP": 3})
TOY = System("toy", VARIABLES, ())
READER = Interpreter(TOY, INSTANCE)


def start(**values: object) -> list[object]:
    """The initial state with some variables changed."""
    made = initial_state(TOY, INSTANCE)
    for name, value in values.items():
        made[slots(TOY)[name]] = value
    return made


HERE = start(
    state=1,
    epoch=2,
    total=5,
    open=True,
    page=[0, 1, 2],
    version=[4, 2, 0],
    seen=[False, True, False, True, True, False],
)

VALUES = [
    (Literal(7, INT), 7),
    (TOP, 3),
    (Size(PAGE), 3),
    (state, 1),
    (page[2], 2),
    (version[epoch - 1], 2),
    (seen[v, p], False),
    (seen[v, 1], True),
    (epoch + 3, 5),
    (epoch - 3, -1),
    (epoch + choose(open_, 10, 20), 12),
    (state.eq(EXPORT), True),
    (state.ne(EXPORT), False),
    (epoch.lt(2), False),
    (epoch.le(2), True),
    (epoch.gt(2), False),
    (epoch.ge(2), True),
    (epoch.eq(p), True),
    (state.in_(IDLE, IMPORT), False),
    (state.in_(), False),
    (not_(open_), False),
    (all_of(), True),
    (any_of(), False),
    (all_of(open_, epoch.eq(9)), False),
    (any_of(epoch.eq(9), open_), True),
    (implies(open_, epoch.eq(9)), False),
    (implies(epoch.eq(9), not_(open_)), True),
    (choose(open_, IMPORT, IDLE), 2),
    (choose(epoch.eq(9), True, False), False),
    (lookup(state, {EXPORT: IMPORT}), 2),
    (lookup(state, {IDLE: IMPORT}), 1),
    (count("old", PAGE, lambda i: version[i].gt(0)), 2),
    (count("old", PAGE, lambda i: version[i].gt(0)).below(1), 1),
    (count("old", PAGE, lambda i: version[i].gt(0)).below(epoch + 9), 2),
    (count("old", PAGE, lambda i: version[i].gt(0)).below(epoch - 9), 0),
    (forall({"a": PAGE}, lambda a: version[a].le(4)), True),
    (forall({"a": PAGE}, lambda a: version[a].lt(4)), False),
    (
        forall({"a": PAGE, "b": PAGE}, lambda a, b: implies(a.lt(b), version[b].lt(version[a]))),
        True,
    ),
    (forall({"w": VCPU}, lambda w: any_of(seen[w, 0], seen[w, 1])), True),
]


@pytest.mark.parametrize("case", range(len(VALUES)), ids=[str(term) for term, _ in VALUES])
def test_a_term_has_its_value(case: int) -> None:
    term, value = VALUES[case]
    found = READER.value(term, HERE, {"p": 2, "v": 1})
    assert found == value
    assert type(found) is type(value)


def test_evaluation_stops_where_the_value_is_known() -> None:
    outside = version[epoch + 90].eq(0)
    assert READER.value(all_of(epoch.eq(9), outside), HERE, {}) is False
    assert READER.value(any_of(open_, outside), HERE, {}) is True
    assert READER.value(choose(open_, open_, outside), HERE, {}) is True
    with pytest.raises(IndexError):
        READER.value(outside, HERE, {})


def test_updates_are_simultaneous() -> None:
    swap = row(
        then=(
            epoch.to(total),
            total.to(epoch),
            version[epoch].to(epoch),
            page[p].to(state),
            state.to(page[p]),
        )
    )
    before = start(epoch=1, total=2, state=1, page=[0, 2, 0])
    after = READER.apply(swap, before, {"p": 1, "v": 0})
    assert before == start(epoch=1, total=2, state=1, page=[0, 2, 0]), "the old state stays"
    assert after == start(epoch=2, total=1, state=2, page=[0, 1, 0], version=[0, 1, 0])


def test_fill_reads_the_state_before() -> None:
    shift = row(then=(version.fill(lambda i: choose(i.eq(0), 9, version[0])), epoch.to(version[0])))
    after = READER.apply(shift, start(version=[5, 6, 7]), {"p": 0, "v": 0})
    assert after == start(version=[9, 5, 5], epoch=5)


def test_fill_of_two_indexes_is_row_major() -> None:
    mark = row(then=(seen.fill(lambda i, j: all_of(i.eq(v), j.eq(p))),))
    after = READER.apply(mark, start(), {"p": 2, "v": 1})
    assert after == start(seen=[False] * 5 + [True])


def test_enabled_is_the_conjunction() -> None:
    both = row(when=(need("a", open_), need("b", epoch.eq(2))))
    assert READER.enabled(both, HERE, {})
    assert not READER.enabled(both, start(open=True), {})
    assert READER.enabled(row(), start(), {})


def test_choices_are_all_values_of_the_parameters() -> None:
    switch = step(
        "row",
        "host",
        (p, param("switch", BOOL), param("kind", OTHER)),
        when=(),
        then=(),
        why="a reason",
        cite="a source",
    )
    choices = list(READER.choices(switch))
    assert len(choices) == 6
    assert choices[0] == {"p": 0, "switch": False, "kind": 0}
    assert choices[-1] == {"p": 2, "switch": True, "kind": 0}
    assert choices[0]["switch"] is False


def test_a_map_over_an_unbounded_index_is_sparse() -> None:
    endless = Instance({"Page": None, "Vcpu": 2})
    reader = Interpreter(TOY, endless)
    state_ = initial_state(TOY, endless)
    write = row(then=(version[p].to(7),))
    after = reader.apply(write, state_, {"p": 10**12, "v": 0})
    written = after[slots(TOY)["version"]]
    assert isinstance(written, Sparse)
    assert written[10**12] == 7
    assert written[3] == 0
    assert state_[slots(TOY)["version"]] == {}
    with pytest.raises(ModelError, match="version has no size here and cannot be filled"):
        reader.apply(row(then=(version.fill(lambda i: 0),)), state_, {})
    with pytest.raises(ModelError, match="Page has no size in this instance and cannot be enum"):
        reader.value(count("all", PAGE, lambda i: version[i].eq(0)), state_, {})
    with pytest.raises(ModelError, match=r"this instance gives no size to Page; it has \{\}"):
        initial_state(TOY, Instance())


def test_constants_have_three_values() -> None:
    system = System("toy", VARIABLES, (guarded(epoch.lt(TOP)),))
    assert system.constants() == (TOP,)
    sizes = {"Page": 3, "Vcpu": 2}
    assert Instance.small(system, sizes).constant(TOP) == 3
    assert Instance(sizes).constant(TOP) == 1000


def test_profiles_and_mutants_take_rows_apart() -> None:
    one = step(
        "one",
        "host",
        (),
        when=(need("both", open_), need("later", epoch.eq(0), "b")),
        then=(only("a", epoch.to(1)), only("b", epoch.to(2)), total.to(0)),
        why="a reason",
        cite="a source",
    )
    two = step(
        "two", "host", (), when=(), then=(), why="a reason", cite="a source", profiles=("b",)
    )
    system = System("toy", VARIABLES, (one, two), profiles=("a", "b"))
    under_a, under_b = system.under("a"), system.under("b")
    assert [s.name for s in under_a.steps] == ["one"]
    assert [s.name for s in under_b.steps] == ["one", "two"]
    assert [n.label for n in under_a.step("one").when] == ["both"]
    assert [str(a) for a in under_a.step("one").then] == ["epoch := 1", "total := 0"]
    assert [str(a) for a in under_b.step("one").then] == ["epoch := 2", "total := 0"]
    mutant = under_b.without("one", "both")
    assert [n.label for n in mutant.step("one").when] == ["later"]
    assert [n.label for n in under_b.step("one").when] == ["both", "later"]
    assert not under_b.without_step("two").has_step("two")


def test_terms_are_data_and_print_as_they_are_written() -> None:
    assert state.eq(IDLE) == state.eq(IDLE)
    assert len({state.eq(IDLE), state.eq(IDLE), state.ne(IDLE)}) == 2
    texts = {
        str(state.ne(IDLE)): "state ≠ IDLE",
        str(epoch.ge(total - 1)): "epoch ≥ total - 1",
        str(all_of(open_, any_of(open_, epoch.lt(3)))): "open and (open or epoch < 3)",
        str(page[p].in_(IDLE, EXPORT)): "page[p] in {IDLE, EXPORT}",
        str(lookup(state, {IDLE: EXPORT})): "state through {IDLE → EXPORT}",
        str(choose(open_, epoch, Size(PAGE))): "(epoch if open else number of Pages)",
        str(version.fill(lambda i: 0)): "version[every i] := 0",
        str(seen[v, p].to(True)): "seen[v, p] := true",
    }
    assert all(text == wanted for text, wanted in texts.items())
    quantified = forall({"a": PAGE}, lambda a: version[a].eq(0), lambda a: (version[a],))
    assert isinstance(quantified, ForAll)
    assert quantified == forall({"a": PAGE}, lambda a: version[a].eq(0)), "triggers do not count"
    assert str(quantified) == "for every a: Page: version[a] = 0"
    assert isinstance(count("all", PAGE, lambda i: version[i].eq(0)), Count)
    assert len(list(subterms(version[p + 1].eq(2)))) == 6


def test_values_are_shown_by_name() -> None:
    assert show(STATE, 2) == "IMPORT"
    assert show(BOOL, True) == "yes"
    assert show(INT, 12) == "12"
