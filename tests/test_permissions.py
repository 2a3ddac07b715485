"""Do the guards of every model allow what the published tables allow, and nothing else?

A guard is projected on OP_STATE, or on the Secure EPT entry: the values with which z3 can satisfy
it, everything else being free.  What differs from the tables is listed in permission_tables.py, row
by row; a difference that is listed and not there is an error too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from guards import Guards, at_parameter, values
from permission_tables import (
    ACCEPT,
    ALL_STATES,
    DIFFERENCES,
    ENTRIES,
    ENTRY_DIFFERENCES,
    ENTRY_VARIABLES,
    JOINED,
    JOINED_IN_FORKS,
    KINDS,
    LEAF_MODELS,
    LEAVES,
    LEAVES_WITHOUT,
    LIVE,
    LOCKS_WITHOUT,
    NO_OP_STATE,
    UNCHECKED,
    UNREPAIRED,
    VARIABLES,
    WITHOUT_IF_HARDENED,
    Differences,
    States,
    entries,
    published,
)

from tdxmig_model.expr import (
    EnumType,
    Literal,
    MapVariable,
    Node,
    Read,
    Step,
    System,
    Variable,
    all_of,
    any_of,
    members,
    not_,
    subterms,
)
from tdxmig_model.model import import_locks, locks
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import HARDENED, PROFILES, SEPT, TDX_1_5_01

MODELS = {system.name: system for system in SYSTEMS}
NOTHING: States = frozenset()
StateVariable = Variable | MapVariable


def cases(names: object) -> list[object]:
    assert isinstance(names, dict)
    return [pytest.param(n, p, id=f"{n}-{p}") for n in names for p in PROFILES]


def leaves_of(row: Step) -> list[str]:
    """The leaves of the tables that a row is, or is a part of, as it cites them."""
    cited = re.findall(r"TD[HG]\.[A-Z.]+[A-Z]", row.cite)
    return [leaf for leaf in cited if leaf in LEAVES or leaf == ACCEPT]


# The rows of the models of locks that take and give locks are of many leaves.
LOCKS: dict[str, dict[Literal, str]] = {
    "locks": {
        locks.EXPORT_MEM: "TDH.EXPORT.MEM",
        locks.EXPORT_TRACK: "TDH.EXPORT.TRACK",
        locks.EXPORT_PAUSE: "TDH.EXPORT.PAUSE",
        locks.EXPORT_ABORT: "TDH.EXPORT.ABORT",
        locks.EXPORT_UNBLOCKW: "TDH.EXPORT.UNBLOCKW",
        locks.VP_ENTER: "TDH.VP.ENTER",
    },
    "import locks": {
        import_locks.IMPORT_MEM: "TDH.IMPORT.MEM",
        import_locks.PAGE_REMOVE: "TDH.MEM.PAGE.REMOVE",
        import_locks.VP_ENTER: "TDH.VP.ENTER",
    },
}
TAKES_LOCKS = {
    "locks": {
        *("take_tdr_shared", "take_tdr_exclusive", "check_op_state", "take_op_state_shared"),
        *("take_op_state_exclusive", "take_mig_shared", "take_mig_exclusive", "take_link"),
        "release",
    },
    "import locks": {"share_import_tdr", "own_import_tdr", "take_import_link", "release_import"},
}
CHECKS = {
    "locks": ("check_op_state", "take_op_state_shared", "take_op_state_exclusive"),
    "import locks": ("share_import_tdr",),
}


# --- OP_STATE ------------------------------------------------------------------------------------


def scope(system: System, variable: StateVariable) -> States:
    """The states in which a model is compared."""
    return ALL_STATES if system.name in LEAF_MODELS else frozenset(values(system, variable))


def expected(system: System, variable: StateVariable, leaf: str) -> States:
    """The states of the model in which the tables allow a leaf."""
    joined = (JOINED_IN_FORKS if system.name == "forks" else JOINED).get(variable.name, {})
    found = published(leaf)
    return frozenset(s for s in scope(system, variable) if found & set(joined.get(s, (s,))))


def reads(formula: Node, variable: StateVariable) -> bool:
    return any(
        n == variable or (isinstance(n, Read) and n.map == variable) for n in subterms(formula)
    )


def allowed(guards: Guards, row: Step, variable: StateVariable) -> States:
    """The states in which a row can be taken."""
    term = at_parameter(variable, row)
    if term is None:
        assert not any(reads(n.formula, variable) for n in row.when)
        return scope(guards.system, variable)
    return frozenset(guards.of(row).names(term)) & scope(guards.system, variable)


def compared(system: System) -> Iterator[tuple[Step, StateVariable]]:
    """The rows with leaves of the tables, and the OP_STATE of the TD that they are called on."""
    for row in system.steps:
        name = VARIABLES[system.name].get(row.actor)
        if name is not None and leaves_of(row):
            yield row, system.variable(name)


def listed(profile: str) -> Differences:
    return DIFFERENCES | (UNREPAIRED if profile == TDX_1_5_01 else {})


def of_tables(system: System, row: Step, variable: StateVariable) -> States:
    return NOTHING.union(*(expected(system, variable, leaf) for leaf in leaves_of(row)))


def wanted(system: System, profile: str, row: Step, variable: StateVariable) -> States:
    """The states in which a row should be allowed: those of its leaves, or what is listed."""
    tables = of_tables(system, row, variable)
    found, _ = listed(profile).get((system.name, row.name), (tables, ""))
    return found & scope(system, variable)


@pytest.mark.parametrize(("name", "profile"), cases(VARIABLES))
def test_each_row_is_allowed_where_its_leaf_is(name: str, profile: str) -> None:
    system = MODELS[name].under(profile)
    guards = Guards(system)
    for row, variable in compared(system):
        assert allowed(guards, row, variable) == wanted(system, profile, row, variable), row.name


@pytest.mark.parametrize(("name", "profile"), cases(VARIABLES))
def test_the_rows_of_a_leaf_have_its_states_together(name: str, profile: str) -> None:
    """Rows that check nothing themselves do not count."""
    system = MODELS[name].under(profile)
    guards = Guards(system)
    missing: dict[tuple[str, str, str], States] = {}
    for row, variable in compared(system):
        _, reason = listed(profile).get((name, row.name), (NOTHING, ""))
        if reason in UNCHECKED:
            continue
        for leaf in leaves_of(row):
            key = name, variable.name, leaf
            left = missing.get(key, expected(system, variable, leaf))
            missing[key] = left - allowed(guards, row, variable)
    without = LEAVES_WITHOUT | (WITHOUT_IF_HARDENED if profile == HARDENED else {})
    assert {key: left for key, left in missing.items() if left} == {
        key: states for key, (states, _) in without.items() if key[0] == name
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_listed_is_different(profile: str) -> None:
    rows = {
        (system.name, row.name): (system, row, variable)
        for name in VARIABLES
        for system in (MODELS[name].under(profile),)
        for row, variable in compared(system)
    }
    everywhere = {key for key in DIFFERENCES if MODELS[key[0]].step(key[1]).profiles is None}
    assert everywhere <= rows.keys()
    for key in listed(profile).keys() & rows.keys():
        system, row, variable = rows[key]
        same = wanted(system, profile, row, variable) == of_tables(system, row, variable)
        # Only repair R3 has START_IMPORT.
        assert not same or (key[0] == "control" and profile == TDX_1_5_01), key


def test_every_model_is_compared_or_has_no_op_state() -> None:
    assert VARIABLES.keys() | NO_OP_STATE.keys() == MODELS.keys()
    for name in NO_OP_STATE:
        assert not any(str(v.kind) == "OpState" for v in MODELS[name].variables)


def test_rows_that_are_not_compared_are_no_leaves_of_a_td() -> None:
    rest = {
        (name, row.name)
        for name in VARIABLES
        for row in MODELS[name].steps
        if row.name not in {r.name for r, _ in compared(MODELS[name])}
    }
    leaves = {(name, row) for name, row in rest if name in LEAF_MODELS}
    assert leaves == {
        *((name, "import_failure") for name in LEAF_MODELS),  # An error of any import leaf.
        ("memory", "guest_write"),  # The guest by itself.
    }
    assert rest - leaves == {
        ("keys", "another_module_makes_a_key"),
        ("bindings", "build_service_td"),  # Of the service TD.
        ("guest pages", "new_destination"),
        *((name, row) for name in LOCKS for row in TAKES_LOCKS[name]),
    }


# --- the check of OP_STATE in the models of locks ------------------------------------------------


def called(row: Step) -> Node:
    """The leaf that the processor of a row executes, or begins."""
    begun = [p for p in row.params if p.kind == import_locks.LEAF]
    term = begun[0] if begun else at_parameter(locks.leaf, row)
    assert term is not None
    return term


def checked(system: System, leaf: Literal) -> States:
    """The states in which a call of a leaf passes the check of OP_STATE."""
    (name,) = VARIABLES[system.name].values()
    guards = Guards(system)
    found: set[str] = set()
    for row in (system.step(name) for name in CHECKS[system.name]):
        found |= guards.of(row).names(system.variable(name), called(row).eq(leaf))
    return frozenset(found)


@pytest.mark.parametrize(("name", "profile"), cases(LOCKS))
def test_a_call_that_takes_locks_is_checked_by_the_tables(name: str, profile: str) -> None:
    system = MODELS[name].under(profile)
    (variable,) = VARIABLES[name].values()
    for leaf, called_leaf in LOCKS[name].items():
        tables = published(called_leaf) & scope(system, system.variable(variable))
        without, _ = LOCKS_WITHOUT.get((name, called_leaf), (NOTHING, ""))
        assert without <= tables
        assert checked(system, leaf) == tables - without, called_leaf


# --- Secure EPT entries --------------------------------------------------------------------------


def column(leaf: str) -> str:
    """The column of a leaf in the table of entry states."""
    (found,) = (c for c in ENTRIES[0] if c.endswith(f"_{leaf}"))
    return found


def entry_rows(system: System) -> Iterator[tuple[Step, Node]]:
    """The rows that check the entry of a page, and the entry."""
    for row in system.steps:
        name = ENTRY_VARIABLES[system.name].get(row.actor)
        if name and leaves_of(row) and any(n.label == "sept_state" for n in row.when):
            entry = at_parameter(system.variable(name), row)
            assert entry is not None
            yield row, entry


def entries_wanted(system: System, row: Step, op_state: str) -> States:
    """The entry states that a row should accept in an OP_STATE."""
    (leaf,) = leaves_of(row)
    columns = [KINDS.get(row.name) or column(leaf)]
    if row.name in LIVE and op_state == "LIVE_EXPORT":
        columns.append("live_export_allowed")
    tables = entries(*columns)
    if system.name not in LEAF_MODELS:
        tables &= values(system, system.variable(ENTRY_VARIABLES[system.name][row.actor]))
    found, _ = ENTRY_DIFFERENCES.get((system.name, row.name), (tables, ""))
    return found


@pytest.mark.parametrize(("name", "profile"), cases(ENTRY_VARIABLES))
def test_each_row_accepts_the_published_entries(name: str, profile: str) -> None:
    """In the leaf models in each OP_STATE by itself."""
    system = MODELS[name].under(profile)
    guards = Guards(system)
    for row, entry in entry_rows(system):
        if name not in LEAF_MODELS:
            assert guards.of(row).names(entry) == entries_wanted(system, row, ""), row.name
            continue
        variable = system.variable(VARIABLES[name][row.actor])
        assert isinstance(variable, Variable)
        assert guards.of(row).pairs(variable, entry) == {
            (op_state, state)
            for op_state in wanted(system, profile, row, variable)
            for state in entries_wanted(system, row, op_state)
        }, row.name


def test_every_check_of_an_entry_is_compared() -> None:
    for name, system in MODELS.items():
        rows = {r.name for r in system.steps if any(n.label == "sept_state" for n in r.when)}
        if name in ENTRY_VARIABLES:
            assert rows == {row.name for row, _ in entry_rows(system)}
        else:
            # Locks: an entry is exported, writable or neither there.
            assert not rows or rows == {"lock_entry", "unblock_page"}


@pytest.mark.parametrize("key", ENTRY_DIFFERENCES)
def test_entries_that_are_listed_are_different(key: tuple[str, str]) -> None:
    name, row = key
    (leaf,) = leaves_of(MODELS[name].step(row))
    listed_entries, reason = ENTRY_DIFFERENCES[key]
    assert reason
    assert listed_entries != entries(KINDS.get(row) or column(leaf))


# --- a guard that is changed ---------------------------------------------------------------------


def flipped(row: Step, label: str, term: Node, state: Literal) -> Step:
    """The row with one conjunct that allows a state if it did not, and does not if it did."""
    formula = row.needs(label).formula
    other = any_of(all_of(formula, term.ne(state)), all_of(not_(formula), term.eq(state)))
    when = tuple(replace(n, formula=other) if n.label == label else n for n in row.when)
    return replace(row, when=when)


def states_of(term: Node, among: States) -> list[Literal]:
    assert isinstance(term.type, EnumType)
    return [literal for literal in members(term.type) if str(literal) in among]


@pytest.mark.parametrize("name", [n for n in VARIABLES if n != "locks"])
def test_a_state_more_or_less_in_a_guard_is_noticed(name: str) -> None:
    system = MODELS[name].under(HARDENED)
    guards = Guards(system)
    changed = 0
    for row, variable in compared(system):
        about = [n.label for n in row.when if reads(n.formula, variable)]
        term = at_parameter(variable, row)
        # Where two conjuncts read the OP_STATE, one of them may change and the guard not.
        if len(about) != 1 or term is None:
            continue
        for state in states_of(term, scope(system, variable)):
            changed += 1
            mutant = flipped(row, about[0], term, state)
            found = allowed(guards, mutant, variable)
            assert found != wanted(system, HARDENED, row, variable), f"{row.name}: {state}"
    assert changed >= 12


@pytest.mark.parametrize("name", LOCKS)
def test_a_state_more_or_less_in_a_check_of_a_lock_is_noticed(name: str) -> None:
    system = MODELS[name].under(HARDENED)
    variable = system.variable(*VARIABLES[name].values())
    assert isinstance(variable, Variable)
    guards = Guards(system)
    for row in (system.step(r) for r in CHECKS[name]):
        for leaf, called_leaf in LOCKS[name].items():
            before = guards.of(row).names(variable, called(row).eq(leaf))
            for state in states_of(variable, scope(system, variable)) if before else ():
                mutant = flipped(row, "op_state", variable, state)
                after = guards.of(mutant).names(variable, called(row).eq(leaf))
                assert after == before ^ {str(state)}, f"{row.name}: {called_leaf} in {state}"


@pytest.mark.parametrize("name", ENTRY_VARIABLES)
def test_an_entry_state_more_or_less_in_a_guard_is_noticed(name: str) -> None:
    system = MODELS[name].under(HARDENED)
    guards = Guards(system)
    for row, entry in entry_rows(system):
        tables = NOTHING.union(*(entries_wanted(system, row, o) for o in ("", *ALL_STATES)))
        for state in states_of(entry, frozenset(SEPT.members)):
            mutant = flipped(row, "sept_state", entry, state)
            assert guards.of(mutant).names(entry) != tables, f"{row.name}: {state}"


def test_a_guard_that_is_deleted_is_noticed() -> None:
    for name in LEAF_MODELS:
        system = MODELS[name].under(HARDENED)
        for row, variable in compared(system):
            if all(n.label != "op_state" for n in row.when):
                continue
            mutant = system.without(row.name, "op_state")
            found = allowed(Guards(mutant), mutant.step(row.name), variable)
            # An EXPORT.MEM or IMPORT.MEM entry in or out of order has a conjunct of its own.
            own = {n.label for n in row.when} & {"in_order", "out_of_order", "paused"}
            assert bool(own) == (found == wanted(system, HARDENED, row, variable)), row.name
