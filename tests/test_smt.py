"""Does z3 see the system that the interpreter runs, and prove what is true of every size?"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from random_models import LIMIT, PARAMS, SIZES, VARIABLES, Terms, random_state
from toy_handover import (
    CELL,
    CLEAN,
    COUNTED,
    DONE,
    NEVER,
    NONE_TAKEN,
    PAUSED,
    RUNNING,
    SAFE,
    STEPS,
    WORKER,
    WORKERS,
    c,
    claim,
    copied,
    dirty,
    dirty_cells,
    dirty_count,
    host_row,
    lane,
    phase,
    proved,
    taken,
    taken_workers,
    toy,
)
from toy_handover import SIZES as TOY_SIZES

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    BOOL,
    INT,
    Instance,
    Interpreter,
    MapVariable,
    Size,
    System,
    all_of,
    any_of,
    choose,
    count,
    forall,
    implies,
    mapping,
    need,
    not_,
    param,
    scalar,
    step,
)
from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.bounded import search
from tdxmig_model.smt.cti import find
from tdxmig_model.smt.encode import split
from tdxmig_model.smt.finite import Finite, slice_for, width_for
from tdxmig_model.smt.induction import INIT, Prover, conjuncts, prove
from tdxmig_model.smt.lemmas import count_lemmas
from tdxmig_model.smt.runs import replay
from tdxmig_model.smt.unbounded import Unbounded, sized_indexes
from tdxmig_model.smt.z3api import Answer, Solver

INSTANCE = Instance(TOY_SIZES)


# --- the same meaning as the interpreter ----------------------------------------------------------


def _random_system(seed: int) -> tuple[System, list, Instance, random.Random]:
    terms = Terms(seed)
    rows = [terms.step(f"s{k}") for k in range(2)]
    system = System("random", VARIABLES, tuple(rows))
    return system, rows, Instance(SIZES, {"LIMIT": LIMIT.small}), random.Random(seed)


def _choice(row, chance: random.Random) -> dict[str, int | bool]:
    ranges = {"cell": SIZES["Cell"], "worker": SIZES["Worker"], "shade": 3, "switch": 2}
    values = {p.name: chance.randrange(ranges[p.name]) for p in PARAMS}
    return {n: bool(v) if n == "switch" else v for n, v in values.items()}


@pytest.mark.parametrize("seed", range(20))
def test_a_finite_encoding_agrees_with_the_interpreter(seed):
    system, rows, instance, chance = _random_system(seed)
    interpreter = Interpreter(system, instance)
    encoder = Finite(system, instance, width_for(system, instance, [], 3, around=20))
    for row in rows:
        state, values = random_state(system, instance, chance), _choice(row, chance)
        cells = {
            v.name: [
                encoder.literal_of(v.kind, x)
                for x in (value if isinstance(v, MapVariable) else [value])
            ]
            for v, value in zip(system.variables, state, strict=True)
        }
        view = encoder.view(cells)
        env = {p.name: encoder.literal_of(p.kind, values[p.name]) for p in row.params}
        for wanted in row.when:
            found = z.evaluated(encoder.term(wanted.formula, view, env))
            assert found == interpreter.value(wanted.formula, state, values)
        after = interpreter.apply(row, state, values)
        for name, terms in encoder.written(row, view, env).items():
            expected = after[interpreter.slots[name]]
            expected = expected if isinstance(expected, list) else [expected]
            assert [z.evaluated(t) for t in terms] == expected, name


def _provable_seeds(wanted: int) -> list[int]:
    """Seeds whose random counts are of one predicate for each name, without parameters."""
    found: list[int] = []
    for seed in itertools.count(100):
        try:
            Unbounded(_random_system(seed)[0])
        except ModelError:
            continue
        found.append(seed)
        if len(found) == wanted:
            return found
    raise AssertionError


@pytest.mark.parametrize("seed", _provable_seeds(12))
def test_the_encoding_for_every_size_agrees_with_the_interpreter(seed):
    """Fix a state of a small size in the unbounded encoding: it must force the same values."""
    system, rows, instance, chance = _random_system(seed)
    interpreter = Interpreter(system, instance)
    encoder = Unbounded(system)
    before, facts = encoder.before()
    row = rows[0]
    state, values = random_state(system, instance, chance), _choice(row, chance)
    fixed = [*encoder.axioms(), *facts]
    for kind in system.indexes():
        fixed.append(z.equal(encoder.size(kind), z.integer(SIZES[kind.name])))
    for constant in system.constants():
        fixed.append(z.equal(encoder.constant(constant), z.integer(instance.constant(constant))))
    for variable, value in zip(system.variables, state, strict=True):
        for term, known in _elements(before, variable, value, instance):
            fixed.append(z.equal(term, _known(known)))
    env, ranges = encoder.parameters(row)
    fixed += [*ranges, *(z.equal(env[n], _known(v)) for n, v in values.items() if n in env)]
    after, more = encoder.post(row, before, env)
    fixed += more
    assert _answer(fixed) is not Answer.UNSAT
    claims = []
    for wanted in row.when:
        known = _known(interpreter.value(wanted.formula, state, values))
        claims.append(z.equal(encoder.term(wanted.formula, before, env), known))
    expected = interpreter.apply(row, state, values)
    for variable, value in zip(system.variables, expected, strict=True):
        if variable.name in row.writes():
            pairs = _elements(after, variable, value, instance)
            claims += [z.equal(term, _known(known)) for term, known in pairs]
    for counted in system.counts():
        known = interpreter.value(counted, expected, {})
        claims.append(z.equal(encoder.term(counted, after, {}), z.integer(int(known))))
    for claimed in claims:
        assert _answer([*fixed, z.negate(claimed)]) is Answer.UNSAT


def _elements(view, variable, value, instance):
    if not isinstance(variable, MapVariable):
        return [(view.scalars[variable.name], value)]
    sizes = [instance.bounded(k) for k in variable.indexes]
    keys = [[]]
    for size in sizes:
        keys = [[*k, n] for k in keys for n in range(size)]
    read = view.maps[variable.name]
    return [(read([z.integer(n) for n in k]), x) for k, x in zip(keys, value, strict=True)]


def _known(value: int | bool):
    return z.boolean(value) if isinstance(value, bool) else z.integer(value)


def _answer(facts) -> Answer:
    solver = Solver(quantified=True)
    solver.add(*facts)
    return solver.check(rlimit=3_000_000)


# --- induction ------------------------------------------------------------------------------------


def test_the_lemmas_about_counts_are_proved():
    assert [lemma.identifier for lemma in count_lemmas() if not lemma.proved] == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_safe_system_is_proved_for_every_number_of_workers_and_cells(seed):
    result = prove(SAFE, seed=seed)
    assert result.failed == {}
    assert all(result.proves(p.identifier) for p in SAFE.properties)
    assert result.fallbacks == 0


def test_processes_give_the_same_answers():
    alone, shared = prove(SAFE), prove(SAFE, jobs=2)
    assert (alone.inductive, alone.queries) == (shared.inductive, shared.queries)


@pytest.mark.parametrize(
    ("label", "broken"), [("clean", {"clean"}), ("every_worker", {"workers"}), ("paused", set())]
)
def test_a_deleted_guard_is_noticed_exactly_where_it_matters(label, broken):
    result = prove(SAFE.without("finish", label))
    failed = {p.identifier for p in SAFE.properties if not result.proves(p.identifier)}
    assert failed == broken


def test_what_rests_on_a_false_lemma_is_not_proved():
    """The lemma implies the property, but is itself false: neither may be called proved."""
    lemma = claim("never_two", dirty_count.lt(2), "lemma")
    upper = claim("never_three", dirty_count.lt(3))
    result = prove(toy(upper, lemma, COUNTED))
    assert not result.proves("never_two")
    assert not result.proves("never_three")
    assert result.proves("counted")
    assert result.why("never_two") == "never_two is not kept by write"


def test_an_initial_state_that_breaks_a_property_is_noticed():
    result = prove(toy(claim("wrong_start", any_of(dirty_count.ge(1), phase.eq(DONE)))))
    assert INIT in {q.step for q in result.failed["wrong_start"]}


def test_a_count_over_a_predicate_that_a_fill_changes():
    """After a fill the count is known only through its extremes and comparisons."""
    spread = step(
        "spread",
        "host",
        (),
        when=(need("some", dirty_cells.ge(1)),),
        then=(dirty.fill(lambda i: any_of(dirty[i], phase.eq(DONE))),),
        why="toy",
        cite="none",
    )
    grows = toy(
        claim("some", any_of(dirty_cells.ge(0), dirty_cells.le(Size(CELL)))), steps=(spread,)
    )
    assert proved(grows, "some")
    never = claim("none", dirty_cells.eq(0))
    assert proved(toy(never, steps=(spread,)), "none")
    mark = replace(spread, name="mark", when=(), then=(dirty.fill(lambda i: True),))
    all_or_none = claim("all_or_none", any_of(dirty_cells.eq(0), dirty_cells.eq(Size(CELL))))
    assert proved(toy(all_or_none, steps=(mark,)), "all_or_none")
    assert not proved(toy(claim("not_all", dirty_cells.lt(Size(CELL))), steps=(mark,)), "not_all")


def test_counts_are_compared_element_by_element():
    """Cells copied on lane 0 and dirty are at most the dirty ones; strictly fewer if one is not."""
    both = count("dirty and copied", CELL, lambda i: all_of(dirty[i], copied[0, i]))
    fewer = claim("fewer", both.le(dirty_cells))
    assert proved(toy(fewer), "fewer")
    assert not proved(toy(claim("more", dirty_cells.le(both))), "more")


def test_one_more_element_says_nothing_if_another_is_missing():
    """A dirty cell that lane 0 did not copy makes the dirty ones more only if they are all."""
    on_lane = count("copied on lane 0", CELL, lambda i: copied[0, i])
    more = claim(
        "more",
        implies(
            phase.eq(PAUSED),
            forall(
                {"c": CELL},
                lambda i: implies(all_of(dirty[i], not_(copied[0, i])), on_lane.lt(dirty_cells)),
            ),
        ),
    )
    write, copy, pause = (SAFE.step(name) for name in ("write", "copy", "pause"))
    live = need("running", phase.eq(RUNNING))
    copying = replace(copy, when=(live, *copy.when))
    assert not proved(toy(more, steps=(write, copying, pause)), "more")
    no_others = claim("no_others", forall({"c": CELL}, lambda i: implies(copied[0, i], dirty[i])))
    assert proved(toy(more, no_others, steps=(write, pause)), "more")


def test_two_maps_written_at_different_elements_change_a_count_at_both():
    other = param("other", CELL)
    seen = mapping("seen", (CELL,), BOOL, False, "host")
    marked = count("marked", CELL, lambda i: any_of(dirty[i], seen[i]))
    put = host_row(
        "put", (c, other), (need("none", marked.eq(0)),), (dirty[c].to(True), seen[other].to(True))
    )
    one, two = claim("one", marked.lt(2)), claim("two", marked.lt(3))
    system = System("marks", (dirty, seen), (put,), (one, two))
    assert not proved(system, "one")
    again = host_row("put", (c,), put.when, (dirty[c].to(True), seen[c].to(True)))
    assert proved(replace(system, steps=(again,), _by_name={}), "one")


def test_what_holds_of_every_element_says_nothing_of_positions_past_the_last():
    place, value = scalar("place", INT, 0, "host"), scalar("value", INT, 0, "host")
    level = mapping("level", (CELL,), INT, 0, "host")
    steps = (
        host_row("move", (), (), (place.to(place + 1),)),
        host_row("past", (), (need("past", place.ge(Size(CELL))),), (level[place].to(9),)),
        host_row("load", (), (), (value.to(level[place]),)),
    )
    low = claim("low", forall({"c": CELL}, lambda i: level[i].eq(0)))
    loaded = claim("loaded", value.eq(0))
    result = prove(System("past", (place, value, level), steps, (low, loaded)))
    assert result.proves("low")
    assert not result.proves("loaded")


def test_two_indexes_are_updated_at_one_pair():
    """Only the copied pair changes: the other lane and the other cell keep their value."""
    copier = next(s for s in STEPS if s.name == "copy")
    seen = mapping("seen", (CELL,), BOOL, False, "host")
    marking = replace(copier, then=(*copier.then, seen[c].to(True)))
    rest = tuple(marking if s is copier else s for s in STEPS if s.name != "restart")
    follows = claim(
        "follows",
        forall({"l": lane.kind, "c": CELL}, lambda i, j: implies(copied[i, j], seen[j])),
    )
    system = System("marks", (*SAFE.variables, seen), rest, (follows,))
    assert proved(system, "follows")
    one_lane = claim(
        "one_lane",
        forall({"l": lane.kind, "c": CELL}, lambda i, j: implies(copied[i, j], i.eq(0))),
    )
    assert not proved(replace(system, properties=(one_lane,), _by_name={}), "one_lane")


def test_index_valued_variables_stay_in_range():
    names = {x.identifier for x in conjuncts(SAFE)}
    assert "type of last" in names
    assert prove(SAFE).proves("type of last")


def test_constants_have_every_value_from_their_least():
    level = scalar("level", INT, 0, "host")
    up = step(
        "up",
        "host",
        (),
        when=(need("below", level.lt(LIMIT)),),
        then=(level.to(level + 1),),
        why="toy",
        cite="none",
    )

    def system(formula):
        return System("levels", (level,), (up,), (claim("level", formula),))

    assert proved(system(level.le(LIMIT)), "level")
    assert not proved(system(level.le(LIMIT.small)), "level")
    assert not proved(system(level.le(LIMIT.value)), "level")


def test_an_index_has_a_size_only_if_the_system_speaks_of_it():
    assert sized_indexes(SAFE) == {"Cell", "Worker"}
    negated = claim(
        "negated", implies(forall({"l": lane.kind}, lambda i: copied[i, 0]), phase.eq(DONE))
    )
    assert sized_indexes(toy(negated)) == {"Lane", "Worker"}


def test_a_count_of_a_parameter_is_refused():
    def of(cell):
        return count("of a parameter", WORKER, lambda w: copied[0, cell]).eq(0)

    with pytest.raises(ModelError, match="depends on c"):
        Unbounded(toy(claim("odd", of(c))))


def test_splitting_a_property_keeps_its_meaning():
    formula = all_of(
        CLEAN.formula,
        implies(phase.eq(DONE), all_of(dirty_count.eq(0), dirty_cells.eq(0), taken_workers.ge(0))),
        forall({"w": WORKER}, lambda w: all_of(not_(taken[w]), dirty_count.ge(0))),
    )
    pieces = split(formula)
    assert len(pieces) == 6
    interpreter = Interpreter(SAFE, INSTANCE)
    chance = random.Random(7)
    for _ in range(50):
        state = random_state(SAFE, INSTANCE, chance)
        whole = interpreter.value(formula, state, {})
        assert whole == all(interpreter.value(p, state, {}) for p in pieces)


def test_a_step_that_the_invariant_forbids_is_recognized():
    clean = claim("clean_count", implies(phase.eq(DONE), dirty_count.eq(0)), "lemma")
    system = toy(clean, COUNTED, steps=(*STEPS, NEVER))
    prover = Prover(system, conjuncts(system))
    fires = {s.name: prover.can_fire(s) for s in system.steps}
    assert [name for name, answer in fires.items() if answer is Answer.UNSAT] == ["never"]


# --- bounded search -------------------------------------------------------------------------------


def test_a_shortest_run_is_found_and_replays():
    found = search(SAFE, INSTANCE, all_of(phase.eq(DONE), copied[1, 0]), depth=10)
    assert found.run is not None
    names = sorted(name for name, _ in found.run.moves)
    assert names == ["copy", "finish", "pause", "take", "take", "write"]
    assert found.run.states == replay(SAFE, INSTANCE, found.run.moves).states


def test_no_run_is_a_bound_and_says_which():
    found = search(SAFE, INSTANCE, all_of(phase.eq(DONE), dirty[0]), depth=9)
    assert (found.run, found.depth, found.complete) == (None, 9, True)


def test_the_bound_on_work_is_no_answer():
    found = search(SAFE, INSTANCE, all_of(phase.eq(DONE), dirty[0]), depth=9, work=1)
    assert not found.complete
    assert found.depth < 9


def test_a_run_that_is_none_is_refused():
    pause, write = ("pause", {}), ("write", {"c": 0})
    with pytest.raises(ModelError, match="step 2, write, needs running"):
        replay(SAFE, INSTANCE, [pause, write])
    with pytest.raises(ModelError, match="leaves the instance"):
        replay(SAFE, INSTANCE, [("write", {"c": 5})])
    with pytest.raises(ModelError, match="does not end in"):
        replay(SAFE, INSTANCE, [write], phase.eq(DONE))


def test_a_slice_keeps_what_the_formula_depends_on():
    part = slice_for(SAFE, INSTANCE, [taken_workers.eq(1)])
    assert {v.name for v in part.variables} == {"phase", "taken", "dirty_count", "dirty"}
    assert "copy" in {s.name for s in part.steps}
    assert all("copied" not in s.writes() for s in part.steps)


def test_integers_never_wrap():
    """A counter that grows by 100 in each step is exact at any depth of the search."""
    level = scalar("level", INT, 0, "host")
    jump = step("jump", "host", (), when=(), then=(level.to(level + 100),), why="toy", cite="none")
    system = System("jumps", (level,), (jump,))
    assert search(system, Instance(), level.lt(0), depth=12).run is None
    found = search(system, Instance(), level.eq(700), depth=12)
    assert found.depth == 7


def test_what_lies_outside_an_instance_is_not_a_run():
    """A position past the end of the instance is neither read nor written."""
    position = scalar("position", INT, 0, "host")
    log = mapping("log", (CELL,), INT, 5, "host")
    append = step(
        "append",
        "host",
        (),
        when=(),
        then=(log[position].to(1), position.to(position + 1)),
        why="toy",
        cite="none",
    )
    system = System("log", (position, log), (append,))
    instance = Instance({"Cell": 3})
    assert search(system, instance, position.eq(3), depth=6).depth == 3
    assert search(system, instance, position.eq(4), depth=6).run is None
    assert search(system, instance, log[position].eq(5), depth=6).depth == 0
    assert search(system, instance, log[position - 1].eq(5), depth=6).run is None


# --- counterexamples to induction -----------------------------------------------------------------


def test_a_counterexample_to_induction_is_shown_and_confirmed():
    found = find(toy(CLEAN), "finish", "clean")
    assert found is not None
    assert found.confirmed
    interpreter = Interpreter(found.system, found.instance)
    assert interpreter.value(CLEAN.formula, found.before, {})
    assert not interpreter.value(CLEAN.formula, found.after, {})
    text = found.text()
    assert "finish() breaks clean" in text
    assert "phase = PAUSED -> DONE" in text
    assert "it fails for c = " in text


def test_an_inductive_conjunct_has_no_counterexample():
    assert find(SAFE, "finish", "clean", largest=3) is None
    with pytest.raises(ModelError, match="no conjunct nonsense"):
        find(SAFE, "finish", "nonsense")


def test_a_counterexample_differs_from_the_initial_state_only_where_it_must():
    found = find(toy(WORKERS, NONE_TAKEN), "take", "none_taken")
    assert found is None
    found = find(toy(COUNTED), "write", "counted")
    assert found is None
    loose = find(toy(claim("small", dirty_count.lt(2))), "write", "small")
    assert loose is not None
    assert [line for line in loose._differences() if "dirty_count" not in line] == []


def test_choices_and_parameters_of_every_kind():
    """A Boolean and an enum parameter, and a choice in an update."""
    flag, kind = param("flag", BOOL), param("kind", phase.kind)
    odd = step(
        "odd",
        "host",
        (flag, kind),
        when=(need("no_jump", any_of(flag, kind.ne(DONE))),),
        then=(phase.to(choose(flag, phase, kind)),),
        why="toy",
        cite="none",
    )
    system = toy(claim("no_jump", phase.ne(DONE)), steps=(odd,))
    assert proved(system, "no_jump")
    assert not proved(system.without("odd", "no_jump"), "no_jump")
    assert search(system.without("odd", "no_jump"), INSTANCE, phase.eq(DONE), depth=2).depth == 1
