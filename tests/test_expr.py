"""Does the language refuse each typical mistake, by name?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from expr_toy import (
    EXPORT,
    IDLE,
    IMPORT,
    OTHER,
    PAGE,
    STATE,
    VARIABLES,
    VCPU,
    channel,
    epoch,
    foreign,
    ghost,
    guarded,
    open_,
    p,
    page,
    past,
    row,
    seen,
    state,
    total,
    v,
    version,
)

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    INT,
    Goal,
    Property,
    System,
    all_of,
    choose,
    count,
    enum,
    forall,
    implies,
    lookup,
    mapping,
    member,
    need,
    not_,
    only,
    param,
    scalar,
    step,
)

NO_TRUTH = (
    "has no truth value while the model is built: write all_of(), any_of(), not_() or .in_() "
    "instead of and, or, not, in, if and chained comparisons"
)
NO_OPERATOR = (
    "is compared with an operator: write .lt(), .le(), .gt() or .ge() instead of <, <=, > and >="
)
NO_FORMULA = (
    "not a formula: ==, in, and, or on terms give Python values; "
    "write .eq(), .in_(), all_of(), any_of()"
)
PYTHON_VALUE = "A Python True or False here usually means that ==, in, and or or was written"

MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    # Python where the language was meant
    "and": (lambda: open_ and state.eq(IDLE), f"(open) {NO_TRUTH}"),
    "or": (lambda: state.eq(IDLE) or open_, f"(state = IDLE) {NO_TRUTH}"),
    "not": (lambda: not open_, f"(open) {NO_TRUTH}"),
    "if": (lambda: 1 if open_ else 2, f"(open) {NO_TRUTH}"),
    "chained comparison": (lambda: 0 < epoch < 3, f"(epoch) {NO_OPERATOR}"),
    "chained formula": (lambda: epoch.ge(0) and epoch.lt(3), f"(epoch ≥ 0) {NO_TRUTH}"),
    "less": (lambda: epoch <= 3, f"(epoch) {NO_OPERATOR}"),
    "minimum": (lambda: min(epoch, total), f"(total) {NO_OPERATOR}"),
    "any": (lambda: any([open_]), f"(open) {NO_TRUTH}"),
    "equals": (
        lambda: guarded(state == IDLE),
        f"conjunct wanted is False (bool), {NO_FORMULA}",
    ),
    "differs": (
        lambda: guarded(state != IDLE),
        f"conjunct wanted is True (bool), {NO_FORMULA}",
    ),
    "in a tuple": (
        lambda: guarded(state in (IDLE, EXPORT)),
        f"conjunct wanted is False (bool), {NO_FORMULA}",
    ),
    "in a term": (
        lambda: IDLE in state,
        "(state) is no container: write .in_() on the left term instead of in",
    ),
    "in a map": (
        lambda: IDLE in page,
        "page is a map of the model: write page[i].in_() instead of in",
    ),
    "loop over a map": (
        lambda: list(page),
        "page is a map of the model and cannot be iterated over",
    ),
    "loop over a term": (lambda: list(state), "(state) cannot be iterated over"),
    "True in all_of": (
        lambda: all_of(open_, True),  # type: ignore[arg-type]
        f"all_of needs formulas; got True (bool). {PYTHON_VALUE}",
    ),
    "equals in implies": (
        lambda: implies(open_, state == IDLE),  # type: ignore[arg-type]
        f"any_of needs formulas; got False (bool). {PYTHON_VALUE}",
    ),
    "True in forall": (
        lambda: forall({"a": PAGE}, lambda a: version[a] == epoch),
        f"forall needs formulas; got False (bool). {PYTHON_VALUE}",
    ),
    # types
    "misspelt member": (
        lambda: member(STATE, "EXPROT"),
        "EXPROT is not a member of State; did you mean EXPORT?",
    ),
    "unknown member": (lambda: member(STATE, "zzz"), "zzz is not a member of State"),
    "enum with int": (lambda: state.eq(1), "(state).eq needs a State, got 1"),
    "enum with another enum": (
        lambda: state.eq(member(OTHER, "IDLE")),
        "(state) = (IDLE) compares State with Other",
    ),
    "member of another enum": (
        lambda: state.in_(IDLE, member(OTHER, "IDLE")),
        "(state) is a State; (IDLE) is not one of its members",
    ),
    "int as a member": (
        lambda: state.in_(1),  # type: ignore[arg-type]
        "(state) is a State; (1) is not one of its members",
    ),
    "order of an enum": (lambda: state.lt(IDLE), "(state) < (IDLE): State has no order"),  # type: ignore[arg-type]
    "order of a sort": (lambda: v.lt(v), "(v) < (v): Vcpu has no order"),
    "addition to an enum": (lambda: state + 1, "(state) + (1): State has no addition"),
    "addition of a variable": (
        lambda: epoch + total,
        "(epoch) + (total): only a constant, or a choice of constants, may be added",
    ),
    "addition of True": (
        lambda: epoch + True,
        "(epoch) + (True): only a constant, or a choice of constants, may be added",
    ),
    "subtraction of a variable": (
        lambda: epoch - total,  # type: ignore[operator]
        "(epoch) - total: only a constant may be subtracted",
    ),
    "bool given an int": (lambda: open_.to(1), "open.to needs a Bool, got 1"),
    "int given a bool": (lambda: epoch.to(True), "epoch.to needs a Int, got True"),
    "enum given an int": (lambda: state.to(0), "state.to needs a State, got 0"),
    "enum given another variable": (
        lambda: state.to(epoch),
        "state is a State; (epoch) is a Int",
    ),
    "element given a bool": (lambda: version[p].to(False), "version[p].to needs a Int, got False"),
    "number as a formula": (
        lambda: not_(epoch),
        f"not_ needs formulas; got epoch (Variable). {PYTHON_VALUE}",
    ),
    "branches of two types": (
        lambda: choose(open_, IDLE, epoch),
        "choose: the branches are State and Int",
    ),
    "condition of Python": (
        lambda: choose(True, 1, 2),  # type: ignore[arg-type]
        f"choose needs formulas; got True (bool). {PYTHON_VALUE}",
    ),
    "table of another enum": (
        lambda: lookup(state, {IDLE: member(OTHER, "IDLE")}),
        "lookup(state): IDLE → IDLE are not both members of State",
    ),
    "initial value": (
        lambda: scalar("bad", STATE, 0, "host"),
        "bad is a State; its initial value 0 is a Int",
    ),
    "initial bool for an int": (
        lambda: scalar("bad", INT, True, "host"),
        "bad is a Int; its initial value true is a Bool",
    ),
    "integer parameter": (
        lambda: param("n", INT),
        "parameter n: a Int has no finite instance to choose from",
    ),
    "enum twice": (
        lambda: enum("Twice", "A", "A"),
        "enum Twice needs distinct members, got ('A', 'A')",
    ),
    # indexes
    "wrong index": (lambda: page[v], "page[v]: the index is Vcpu, not Page"),
    "enum as an index": (lambda: page[state], "page[state]: the index is State, not Page"),
    "swapped indexes": (lambda: seen[p, v], "seen[p]: the index is Page, not Vcpu"),
    "position in a sort": (lambda: seen[0, p], "seen[...] needs a Vcpu, got 0"),
    "too many indexes": (lambda: page[p, v], "page has 1 indexes, got 2"),
    "too few indexes": (lambda: seen[v], "seen has 2 indexes, got 1"),
    "three indexes": (
        lambda: mapping("bad", (PAGE, PAGE, PAGE), INT, 0, "host"),
        "map bad needs one or two indexes, got 3",
    ),
    # rows
    "guard without a label": (
        lambda: row(when=(open_,)),
        "step row: open is not a labelled conjunct; write need(label, formula)",
    ),
    "label twice": (
        lambda: row(when=(need("a", open_), need("a", open_))),
        "step row has two conjuncts with one label: ['a', 'a']",
    ),
    "no reason": (
        lambda: row(why=""),
        "step row needs a reason (why=) and a citation (cite=)",
    ),
    "no citation": (
        lambda: row(cite=""),
        "step row needs a reason (why=) and a citation (cite=)",
    ),
    "ghost in a guard": (
        lambda: guarded(ghost.eq(0)),
        "step row reads the ghost ghost; only properties and ghosts may",
    ),
    "ghost map in a guard": (
        lambda: guarded(past[p].eq(0)),
        "step row reads the ghost past; only properties and ghosts may",
    ),
    "ghost in a count": (
        lambda: guarded(count("old", PAGE, lambda i: past[i].eq(0)).eq(0)),
        "step row reads the ghost past; only properties and ghosts may",
    ),
    "ghost in a value": (
        lambda: row(then=(epoch.to(ghost),)),
        "step row reads the ghost ghost; only properties and ghosts may",
    ),
    "ghost in a position": (
        lambda: row(then=(version[ghost].to(0),)),
        "step row reads the ghost ghost; only properties and ghosts may",
    ),
    "forall in a guard": (
        lambda: guarded(forall({"a": PAGE}, lambda a: version[a].eq(0))),
        "step row quantifies; only properties may (declare a count instead)",
    ),
    "two assignments": (
        lambda: row(then=(epoch.to(0), epoch.to(1))),
        "step row assigns epoch twice",
    ),
    "two elements of one map": (
        lambda: row(then=(version[p].to(0), version[0].to(1))),
        "step row assigns version twice",
    ),
    "two assignments in one profile": (
        lambda: row(then=(only("a", epoch.to(0)), only("b", epoch.to(1)), only("a", epoch.to(2)))),
        "step row assigns epoch twice",
    ),
    "an assignment for all and one for a profile": (
        lambda: row(then=(only("a", epoch.to(0)), epoch.to(1))),
        "step row assigns epoch twice",
    ),
    "wrong owner": (
        lambda: row(then=(foreign.to(1),)),
        "step row is taken by host and may not write foreign of guest",
    ),
    "foreign parameter": (
        lambda: guarded(version[param("q", PAGE)].eq(0)),
        "step row uses the parameter q, which it does not declare",
    ),
    "parameter of another type": (
        lambda: guarded(param("p", VCPU).eq(v)),
        "step row uses the parameter p, which it does not declare",
    ),
    "parameter twice": (
        lambda: step(
            "row", "host", (p, param("p", VCPU)), when=(), then=(), why="a reason", cite="a source"
        ),
        "step row has two parameters with one name: ['p', 'p']",
    ),
    "parameter named as a bound element": (
        lambda: step(
            "row",
            "host",
            (param("element", PAGE),),
            when=(need("n", count("old", PAGE, lambda i: version[i].eq(0)).eq(0)),),
            then=(),
            why="a reason",
            cite="a source",
        ),
        (
            "step row binds element, which is also the name of a parameter: "
            "give the parameter another name"
        ),
    ),
    "name bound twice": (
        lambda: forall({"a": PAGE}, lambda a: forall({"a": PAGE}, lambda b: a.eq(b))),
        (
            "(for every a: Page: a = a) binds a, which a quantifier around it binds too: "
            "give one of them another name"
        ),
    ),
    "count in a count": (
        lambda: count(
            "outer", PAGE, lambda i: count("inner", PAGE, lambda j: version[j].lt(version[i])).eq(0)
        ),
        (
            "(inner) binds element, which a quantifier around it binds too: "
            "give one of them another name"
        ),
    ),
    # systems
    "unknown variable assigned": (
        lambda: System("toy", (state,), (row(then=(epoch.to(1),)),)),
        "step row assigns epoch, which is not declared",
    ),
    "unknown variable read": (
        lambda: System("toy", (state,), (guarded(open_),)),
        "the toy model uses open, which it does not declare",
    ),
    "unknown variable in a property": (
        lambda: System("toy", (state,), (), (Property("P", open_, "", "leaf"),)),
        "the toy model uses open, which it does not declare",
    ),
    "another variable of the same name": (
        lambda: System("toy", (scalar("epoch", INT, 7, "host"),), (row(then=(epoch.to(1),)),)),
        "step row assigns epoch, which is not declared",
    ),
    "variable twice": (
        lambda: System("toy", (state, state), ()),
        "the toy model declares state twice",
    ),
    "step twice": (
        lambda: System("toy", VARIABLES, (row(), row())),
        "the toy model has two steps named row",
    ),
    "property that is a number": (
        lambda: System("toy", VARIABLES, (), (Property("P", epoch, "", "leaf"),)),
        "property P is not a formula",
    ),
    "witness that is a number": (
        lambda: System("toy", VARIABLES, (), (Property("P", open_, "", "leaf", witness=epoch),)),
        "the witness of property P is not a formula",
    ),
    "goal of Python": (
        lambda: System("toy", VARIABLES, (), (), (Goal("G", state == IDLE, ""),)),  # type: ignore[arg-type]
        "goal G is not a formula",
    ),
    "unknown step": (
        lambda: System("toy", VARIABLES, (row(),)).step("rwo"),
        "the toy model has no step rwo; it has ['row']",
    ),
    "unknown conjunct": (
        lambda: System("toy", VARIABLES, (guarded(open_),)).without("row", "label"),
        "step row has no conjunct label; it has ['wanted']",
    ),
    "unknown profile": (
        lambda: System("toy", VARIABLES, (), profiles=("a", "b")).under("c"),
        "unknown profile c; known: a, b",
    ),
    "unknown property": (
        lambda: System("toy", VARIABLES, ()).property("P"),
        "the toy model has no property P",
    ),
    "two counts of one name": (
        lambda: System(
            "toy",
            VARIABLES,
            (
                row(
                    when=(
                        need("a", count("old", PAGE, lambda i: version[i].eq(0)).eq(0)),
                        need("b", count("old", PAGE, lambda i: version[i].eq(1)).eq(0)),
                    )
                ),
            ),
        ).counts(),
        "two different counts are named old",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_by_name(mistake: str) -> None:
    made, message = MISTAKES[mistake]
    with pytest.raises(ModelError) as refused:
        made()
    assert str(refused.value) == message


def test_what_is_right_is_accepted() -> None:
    fine = row(
        when=(need("state", state.in_(IDLE, EXPORT)), need("page", page[p].ne(IMPORT))),
        then=(
            epoch.to(epoch + choose(open_, 1, -1)),
            (version[p].to(total - 3),),
            seen[v, p].to(True),
            channel.to(p),
            ghost.to(past[p]),
            *only("a", total.to(0)),
            *only("b", total.to(1)),
        ),
    )
    assert fine.writes() == {"epoch", "version", "seen", "channel", "ghost", "total"}
    assert System("toy", VARIABLES, (fine,), profiles=("a", "b")).step("row") is fine
