"""Does the search over columns see what explicit search sees, and the one in phases find runs?"""

from __future__ import annotations

import numpy as np
import pytest
from random_models import VARIABLES, Terms
from small_instances import SMALL, small

from tdxmig_model.explore import box_of, explore, in_phases
from tdxmig_model.explore.phases import first_actor
from tdxmig_model.explore.wide import HashSet, Wide
from tdxmig_model.expr import (
    BOOL,
    INT,
    Instance,
    System,
    all_of,
    choose,
    index,
    mapping,
    need,
    not_,
    param,
    scalar,
    step,
)
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.model.words import HARDENED, TDX_1_5_01
from tdxmig_model.smt.bounded import inside
from tdxmig_model.smt.runs import replay
from tdxmig_model.verify.judge import ceiling, phased, small_instance, witness_box


def layers(system, instance, limits):
    """How many states the search over columns finds at each distance."""
    search = Wide(system, instance, limits)
    layer = search.begin(search.first())
    sizes = []
    while layer.size:
        sizes.append(layer.size)
        layer = search.expand(layer)
    return sizes


def test_random_systems_have_as_many_states_as_the_explicit_search_finds():
    sizes = []
    for seed in range(60):
        terms = Terms(seed, wander=True)
        system = System("toy", VARIABLES, tuple(terms.step(f"s{k}") for k in range(8)))
        instance = Instance.small(system, {"Cell": 2, "Worker": 1})
        seen = explore(system, instance, ceiling=2, limit=400, digest=False)
        if not seen.truncated:
            found = layers(system, instance, 2)
            assert (sum(found), len(found) - 1) == (seen.states, seen.depth), seed
            sizes.append(seen.states)
    assert sum(size > 10 for size in sizes) >= 5


QUICK = [name for name in SMALL if name not in ("leaf", "order", "memory", "calls", "terms")]


@pytest.mark.parametrize("name", QUICK)
def test_the_models_have_as_many_states_as_the_explicit_search_finds(name):
    system, instance, limits = small(name, HARDENED)
    seen = explore(system, instance, ceiling=limits, limit=60_000, digest=False)
    assert not seen.truncated
    found = layers(system, instance, limits)
    assert (sum(found), len(found) - 1) == (seen.states, seen.depth)


def test_a_set_of_hashes_tells_what_is_new():
    chance = np.random.default_rng(5)
    ours, theirs = HashSet(), set()
    for _ in range(20):
        # Few different low and high bits, so that many hashes want the same slot.
        some = (chance.integers(1, 90, 3_000, np.uint64) << np.uint64(40)) + chance.integers(
            1, 900, 3_000, np.uint64
        )
        some = np.unique(some)
        new = ours.add(some)
        assert new.tolist() == [int(h) not in theirs for h in some]
        theirs |= set(some.tolist())
    assert len(ours) == len(theirs) > 2**15


# A writer fills a log; a reader, who comes later, takes every entry and sums up.
ENTRY = index("Entry")
k = param("k", ENTRY)
log = mapping("log", (ENTRY,), INT, 0, "writer")
size = scalar("size", INT, 0, "writer")
closed = scalar("closed", BOOL, False, "writer")
taken = scalar("taken", INT, 0, "reader")
total = scalar("total", INT, 0, "reader")


def _step(name, actor, params, when, then):
    return step(name, actor, params, when=when, then=then, why="toy", cite="none")


MAILBOX = System(
    "mailbox",
    (log, size, closed, taken, total),
    (
        _step(
            "take",
            "reader",
            (),
            (need("closed", closed), need("left", taken.lt(size))),
            (total.to(total + choose(log[taken].eq(1), 1, 0)), taken.to(taken + 1)),
        ),
        _step(
            "one", "writer", (), (need("open", not_(closed)),), (log[size].to(1), size.to(size + 1))
        ),
        _step("none", "writer", (), (need("open", not_(closed)),), (size.to(size + 1),)),
        _step("close", "writer", (), (need("open", not_(closed)),), (closed.to(True),)),
    ),
)


def of_mailbox(wanted, box, slack=0, limit=10_000):
    instance = Instance({"Entry": 5})
    return in_phases(MAILBOX, instance, wanted, ceiling=5, box=box, slack=slack, limit=limit)


def test_who_sees_nothing_of_the_others_goes_first():
    assert first_actor(MAILBOX, Instance({"Entry": 2})) == "writer"
    assert first_actor(MEMORY.under(HARDENED), small_instance(MEMORY.under(HARDENED))) == "source"


def test_the_others_go_on_from_every_kind_of_state():
    wanted = all_of(total.eq(3), taken.eq(5))
    found = of_mailbox(wanted, {})
    run = replay(MAILBOX, Instance({"Entry": 5}), [(s.step, s.params) for s in found.trace], wanted)
    names = [name for name, _ in run.moves]
    assert names.index("take") == names.index("close") + 1
    assert sorted(names) == ["close", "none", "none", "one", "one", "one", *["take"] * 5]


def test_the_box_is_as_large_as_the_runs_and_the_slack_more():
    short = of_mailbox(all_of(total.eq(1), taken.eq(2)), {})
    moves = [(s.step, s.params) for s in short.trace]
    run = replay(MAILBOX, Instance({"Entry": 5}), moves)
    box = box_of(MAILBOX, [run.states])
    assert box == {"log": 1, "size": 2, "taken": 2, "total": 1}
    assert of_mailbox(total.eq(2), box).trace is None
    assert of_mailbox(total.eq(2), box, slack=99).trace is None
    assert of_mailbox(total.eq(2), box, slack=100).trace is not None


def test_the_limit_ends_the_search():
    found = of_mailbox(total.eq(5), {}, limit=20)
    assert found.trace is None
    assert 20 <= found.states < 100


def test_without_the_dirty_count_a_stale_page_is_found():
    """The page that no other search finds in reasonable time: P13 without its first guard."""
    part = MEMORY.under(HARDENED)
    mutant = part.without("export_track_start", "dirty_count")
    instance = small_instance(part)
    wanted = inside(not_(part.property("P13").formula), instance)
    run = phased(mutant, instance, wanted, witness_box(part))
    assert run is not None
    assert run.depth >= 20
    assert replay(mutant, instance, run.moves, wanted).states == run.states


@pytest.mark.slow
def test_the_published_module_accepts_a_stale_page():
    part = MEMORY.under(TDX_1_5_01)
    instance = small_instance(part)
    wanted = inside(not_(part.property("P13").formula), instance)
    run = phased(part, instance, wanted, witness_box(part))
    assert run is not None
    assert ceiling(instance) == 6
    names = [name for name, _ in run.moves]
    assert "guest_write" in names
    assert names[-1] == "import_track_start"
