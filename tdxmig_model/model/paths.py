"""Path properties: what can, or must, still happen.  See `verify.liveness` for their meaning.

Honest hosts are the lifecycle itself without the rows that give up, and with limits on what a host
repeats: pre-copy stops in time for what has to follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tdxmig_model.expr import Need, Node, Size, System, all_of, any_of, forall, need, not_
from tdxmig_model.model import guest_pages as pages
from tdxmig_model.model import lifecycle_events as life
from tdxmig_model.model.guest_pages import GUEST_PAGES
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.lifecycle_events import in_destination, in_source
from tdxmig_model.model.words import MAPPED, MESSAGE, PAGE


@dataclass(frozen=True, slots=True)
class Path:
    """From every reachable state with the premise the goal can be reached, or a dead end with its
    reason; with `must` no weakly fair run avoids it for ever.  `without` are the rows that nobody
    takes; `policies` are what a host adds to the guard of a row.
    """

    identifier: str
    sentence: str
    system: System
    premise: Node
    goal: Node
    must: bool = False
    level: str = "lifecycle"
    dead_ends: tuple[tuple[str, Node], ...] = ()
    without: tuple[str, ...] = ()
    policies: tuple[tuple[str, Need], ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()


LIFE_SIZES = {"Message": 6, "Epoch": 4, "Vcpu": 1}
PAGE_SIZES = {"Page": 2}

_always = any_of(life.source_owns, not_(life.source_owns))
_session_over = in_source("HANDED_OVER", "ABORTED")
# TD state, one record for each vCPU and the start token are still to come.
_room = need("pre_copy_ends", life.sent.lt(Size(MESSAGE) - 3))
_closes_late = need("not_before_the_end", _session_over)
_destination_closes_late = need("not_before_the_end", in_destination("ENDED", "ABORTED"))

_source_runs = all_of(life.source_owns, in_source("IDLE", "READY", "LIVE", "ABORTED", "CLOSED"))
_thrown_away = (
    "the source was cleaned up after the start token, and then the destination gave up",
    all_of(in_source("CLOSED"), not_(life.source_owns), life.abort_token),
)

_pages_always = any_of(pages.given, not_(pages.given))
_pages_moved = pages.destination.eq(pages.RUNNING)

PATHS = (
    Path(
        "P45",
        "Honest hosts and no loss: the migration completes.",
        LIFECYCLE,
        _always,
        all_of(life.destination_owns, in_source("CLOSED"), in_destination("CLOSED")),
        must=True,
        without=("abort", "abort_with_token", "destination_abort", "cancel_page"),
        policies=(
            ("export_memory", _room),
            ("start_epoch", _room),
            ("cleanup", _closes_late),
            ("destination_cleanup", _destination_closes_late),
        ),
        sizes=LIFE_SIZES,
        assumptions=(
            "P45: nobody gives up, pre-copy ends in time, every row that stays enabled is taken",
        ),
    ),
    Path(
        "P46",
        "From every state the hosts can come to a source that runs or a destination that owns.",
        LIFECYCLE,
        _always,
        any_of(_source_runs, life.destination_owns),
        dead_ends=(_thrown_away,),
        sizes=LIFE_SIZES,
        assumptions=(f"P46: a dead end is told: {_thrown_away[0]}",),
    ),
    Path(
        "P47",
        "After an abort a new session can begin, and the migration can still be completed.",
        GUEST_PAGES,
        pages.source.eq(pages.RUNNING),
        _pages_moved,
        sizes=PAGE_SIZES,
        assumptions=("P47: a destination that failed is torn down and another one is built",),
    ),
    Path(
        "P48",
        "After the end of the import the guest can get every page accepted.",
        GUEST_PAGES,
        _pages_moved,
        all_of(
            _pages_moved,
            forall({"g": PAGE}, lambda g: pages.there[g].eq(MAPPED)),
        ),
        sizes=PAGE_SIZES,
        assumptions=("P48: a VMM that is asked for a page adds one",),
    ),
    Path(
        "P50",
        "Until the destination owns the TD the source can get it back, with its help if need be.",
        LIFECYCLE,
        all_of(not_(life.destination_owns), not_(in_source("CLOSED"))),
        _source_runs,
        sizes=LIFE_SIZES,
        assumptions=("P50: a source that was cleaned up has thrown its TD away",),
    ),
)
