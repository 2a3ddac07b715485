"""A small hand-over protocol with everything that the z3 encoding must get right.

A writer dirties cells while it runs, a copier cleans them; once paused, each worker is taken once;
the hand-over needs that no cell is dirty and that every worker was taken.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Goal,
    Property,
    Size,
    System,
    all_of,
    count,
    enum,
    forall,
    implies,
    index,
    mapping,
    member,
    need,
    not_,
    param,
    scalar,
    sort,
    step,
)
from tdxmig_model.smt.induction import prove

PHASE = enum("Phase", "RUNNING", "PAUSED", "DONE")
RUNNING, PAUSED, DONE = (member(PHASE, name) for name in PHASE.members)
CELL, LANE, WORKER = index("Cell"), index("Lane"), sort("Worker")
SIZES = {"Cell": 2, "Lane": 2, "Worker": 2}

phase = scalar("phase", PHASE, RUNNING, "host")
dirty = mapping("dirty", (CELL,), BOOL, False, "host")
copied = mapping("copied", (LANE, CELL), BOOL, False, "host")
taken = mapping("taken", (WORKER,), BOOL, False, "host")
dirty_count = scalar("dirty_count", INT, 0, "host")
last = scalar("last", CELL, 0, "host")

dirty_cells = count("dirty cells", CELL, lambda c: dirty[c])
taken_workers = count("taken workers", WORKER, lambda w: taken[w])
c, lane, w = param("c", CELL), param("lane", LANE), param("w", WORKER)


def _step(name, params, when, then):
    return step(name, "host", params, when=when, then=then, why="toy", cite="none")


STEPS = (
    _step(
        "write",
        (c,),
        (need("running", phase.eq(RUNNING)), need("clean", not_(dirty[c]))),
        (dirty[c].to(True), dirty_count.to(dirty_count + 1), last.to(c)),
    ),
    _step(
        "copy",
        (lane, c),
        (need("not_done", phase.ne(DONE)), need("dirty", dirty[c])),
        (dirty[c].to(False), dirty_count.to(dirty_count - 1), copied[lane, c].to(True)),
    ),
    _step("pause", (), (need("running", phase.eq(RUNNING)),), (phase.to(PAUSED),)),
    _step(
        "take",
        (w,),
        (need("paused", phase.eq(PAUSED)), need("once", not_(taken[w]))),
        (taken[w].to(True),),
    ),
    _step(
        "finish",
        (),
        (
            need("paused", phase.eq(PAUSED)),
            need("clean", dirty_count.eq(0)),
            need("every_worker", taken_workers.eq(Size(WORKER))),
        ),
        (phase.to(DONE),),
    ),
    _step(
        "restart",
        (),
        (need("done", phase.eq(DONE)),),
        (
            phase.to(RUNNING),
            dirty.fill(lambda i: False),
            taken.fill(lambda i: False),
            copied.fill(lambda i, j: False),
            dirty_count.to(0),
        ),
    ),
)

NEVER = _step(
    "never",
    (),
    (need("done", phase.eq(DONE)), need("dirty", dirty_count.gt(0))),
    (dirty_count.to(0),),
)
"""A step that is possible only where CLEAN does not hold."""

CLEAN = Property(
    "clean",
    implies(phase.eq(DONE), forall({"c": CELL}, lambda c: not_(dirty[c]))),
    "At the hand-over no cell is dirty.",
    "leaf",
    guards=(("finish", "clean"),),
    witness=phase.eq(DONE),
)
WORKERS = Property(
    "workers",
    implies(phase.eq(DONE), forall({"w": WORKER}, lambda w: taken[w])),
    "At the hand-over every worker was taken.",
    "leaf",
    guards=(("finish", "every_worker"),),
    witness=phase.eq(DONE),
)
COUNTED = Property(
    "counted", dirty_count.eq(dirty_cells), "The counter is the number of dirty cells.", "lemma"
)
NONE_TAKEN = Property(
    "none_taken",
    implies(phase.eq(RUNNING), taken_workers.eq(0)),
    "No worker is taken while it runs.",
    "lemma",
)
REACHED = Goal("done", all_of(phase.eq(DONE), copied[1, 0]), "The hand-over happens.")


def toy(*properties: Property, steps=STEPS, goals=(REACHED,)) -> System:
    """The system with the given properties."""
    return System(
        "handover",
        (phase, dirty, copied, taken, dirty_count, last),
        steps,
        properties,
        goals,
        profiles=("plain",),
    )


SAFE = toy(CLEAN, WORKERS, COUNTED, NONE_TAKEN)


def claim(name: str, formula, level: str = "leaf", **more) -> Property:
    return Property(name, formula, f"{name}.", level, **more)


def proved(system: System, name: str, seed: int = 0) -> bool:
    return prove(system, seed=seed).proves(name)


def host_row(name, params, when, then):
    return step(name, "host", params, when=when, then=then, why="toy", cite="none")
