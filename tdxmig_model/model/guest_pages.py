"""What the guest can accept: the pages of both sides through a migration, with aborts and retries.

A page is private and accepted (MAPPED), private and not yet accepted (PENDING), or not private
(FREE); the source exports it, takes it back and, when the guest converts it, removes it.  Bundles
arrive in order; there is at most one on its way for each page.  After TDH.IMPORT.END the guest
converts and accepts pages on the destination, and a VMM that is asked for a page provides one.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    Goal,
    Literal,
    Need,
    Node,
    Property,
    System,
    all_of,
    any_of,
    choose,
    count,
    enum,
    forall,
    implies,
    mapping,
    member,
    need,
    not_,
    only,
    param,
    scalar,
    step,
)
from tdxmig_model.model.words import (
    ALL_PROFILES,
    DESTINATION,
    EXPORTED_BLOCKEDW,
    FREE,
    MAPPED,
    MODULE,
    NETWORK,
    PAGE,
    PENDING,
    PENDING_EXPORTED_BLOCKEDW,
    REMOVED,
    SEPT,
    SOURCE,
    cite_leaf,
    repaired,
    unrepaired,
)

SIDE = enum("PagesPhase", "IDLE", "MIGRATING", "HANDED_OVER", "RUNNING", "FAILED")
IDLE, MIGRATING, HANDED_OVER, RUNNING, FAILED = (member(SIDE, name) for name in SIDE.members)
BUNDLE = enum("PageBundle", "NONE", "COPY", "PENDING_COPY", "CANCEL")
NONE, COPY, PENDING_COPY, CANCEL = (member(BUNDLE, name) for name in BUNDLE.members)

source = scalar("pages_source", SIDE, RUNNING, SOURCE, doc="what the source does")
here = mapping("pages_here", (PAGE,), SEPT, MAPPED, SOURCE, doc="the source's entry")
given = scalar("pages_given", BOOL, False, NETWORK, doc="the start token was made")
token = scalar("pages_abort_token", BOOL, False, NETWORK, doc="the destination's abort token")
flying = mapping("pages_bundle", (PAGE,), BUNDLE, NONE, NETWORK, doc="the bundle on its way")
session = scalar("pages_session", BOOL, False, NETWORK, doc="a session is open for an import")
destination = scalar("pages_destination", SIDE, IDLE, DESTINATION, doc="what the destination does")
there = mapping("pages_there", (PAGE,), SEPT, FREE, DESTINATION, doc="the destination's entry")
asked = mapping("pages_asked", (PAGE,), BOOL, False, DESTINATION, doc="the VMM has to add a page")
refused = mapping(
    "pages_refused", (PAGE,), BOOL, False, DESTINATION, ghost=True, doc="an ACCEPT was refused"
)

VARIABLES = (
    source,
    here,
    given,
    token,
    flying,
    session,
    destination,
    there,
    asked,
    refused,
)

EXPORTED = (EXPORTED_BLOCKEDW, PENDING_EXPORTED_BLOCKEDW)


exported = count("exported guest pages", PAGE, lambda g: here[g].in_(*EXPORTED))
left = count("guest pages not exported yet", PAGE, lambda g: here[g].in_(MAPPED, PENDING))
on_the_way = count("bundles of guest pages on their way", PAGE, lambda g: flying[g].ne(NONE))

g = param("page", PAGE)


def _accept() -> str:
    return f"TDG.MEM.PAGE.ACCEPT, TDCALL 6; {MODULE}"


def _source(*phases: Literal) -> Need:
    return need("phase", source.in_(*phases))


def _destination(*phases: Literal) -> Need:
    return need("phase", destination.in_(*phases))


_nothing_flies = need("in_order", flying[g].eq(NONE))
_pending = here[g].in_(PENDING, PENDING_EXPORTED_BLOCKEDW)
_back = here[g].to(choose(_pending, PENDING, MAPPED))

SOURCE_STEPS = (
    step(
        "begin_pages",
        SOURCE,
        when=(
            _source(RUNNING),
            need("mig_count", exported.eq(0)),
            need("fresh_key", not_(session)),
            need("fresh_peer", destination.eq(IDLE)),
        ),
        then=(
            source.to(MIGRATING),
            session.to(True),
            flying.fill(lambda i: NONE),
        ),
        why="No page is left exported, and keys were exchanged with a destination that is new.",
        cite=cite_leaf("EXPORT.STATE.IMMUTABLE", 72),
    ),
    step(
        "export_guest_page",
        SOURCE,
        (g,),
        when=(_source(MIGRATING), need("sept_state", here[g].in_(MAPPED, PENDING)), _nothing_flies),
        then=(
            flying[g].to(choose(_pending, PENDING_COPY, COPY)),
            here[g].to(choose(_pending, PENDING_EXPORTED_BLOCKEDW, EXPORTED_BLOCKEDW)),
        ),
        why="A page goes with its content, or as pending if the guest has not accepted it.",
        cite=cite_leaf("EXPORT.MEM", 68),
    ),
    step(
        "cancel_guest_page",
        SOURCE,
        (g,),
        when=(_source(MIGRATING), need("sept_state", here[g].in_(*EXPORTED)), _nothing_flies),
        then=(flying[g].to(CANCEL), _back),
        why="The page is taken back: the guest converts it, or it is to be exported again.",
        cite=cite_leaf("EXPORT.MEM", 68) + ", CANCEL",
    ),
    step(
        "convert_on_source",
        SOURCE,
        (g,),
        when=(
            _source(RUNNING, MIGRATING),
            need("sept_state", here[g].in_(MAPPED, PENDING)),
        ),
        then=(here[g].to(FREE),),
        why="The guest makes a page shared, and the VMM removes the private one.",
        cite=cite_leaf("MEM.PAGE.REMOVE", 29),
    ),
    step(
        "add_on_source",
        SOURCE,
        (g,),
        when=(_source(RUNNING, MIGRATING), need("sept_state", here[g].eq(FREE))),
        then=(here[g].to(PENDING),),
        why="The guest wants the page private, and the VMM adds one that is to be accepted.",
        cite=cite_leaf("MEM.PAGE.AUG", 6),
    ),
    step(
        "accept_on_source",
        SOURCE,
        (g,),
        when=(_source(RUNNING, MIGRATING), need("sept_state", here[g].eq(PENDING))),
        then=(here[g].to(MAPPED),),
        why="The guest accepts a page on the source.",
        cite=_accept(),
    ),
    step(
        "hand_pages_over",
        SOURCE,
        when=(
            _source(MIGRATING),
            need("every_page", left.eq(0)),
            need("nothing_on_the_way", on_the_way.eq(0)),
        ),
        then=(source.to(HANDED_OVER), given.to(True)),
        why="The start token, when every page and every bundle before it has arrived.",
        cite=cite_leaf("EXPORT.TRACK", 71) + ", in-order done",
    ),
    step(
        "abort_pages",
        SOURCE,
        when=(_source(MIGRATING),),
        then=(source.to(RUNNING), session.to(False), flying.fill(lambda i: NONE)),
        why="Before the start token the source takes the TD back.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
    step(
        "abort_pages_with_token",
        SOURCE,
        when=(_source(HANDED_OVER), need("abort_token", token)),
        then=(source.to(RUNNING), session.to(False), given.to(False), token.to(False)),
        why="After the start token it takes an abort token.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
    step(
        "restore_guest_page",
        SOURCE,
        (g,),
        when=(_source(RUNNING), need("sept_state", here[g].in_(*EXPORTED))),
        then=(_back,),
        why="After an abort the exported pages are the guest's again.",
        cite=cite_leaf("EXPORT.RESTORE", 66),
    ),
)

DESTINATION_STEPS = (
    step(
        "begin_import_of_pages",
        DESTINATION,
        when=(_destination(IDLE), need("session", session), need("in_order", not_(given))),
        then=(destination.to(MIGRATING),),
        why="A new TD takes the immutable state.",
        cite=cite_leaf("IMPORT.STATE.IMMUTABLE", 85),
    ),
    step(
        "import_guest_page",
        DESTINATION,
        (g,),
        when=(
            _destination(MIGRATING),
            need("bundle", flying[g].in_(COPY, PENDING_COPY)),
            need("sept_state", there[g].in_(FREE, REMOVED)),
        ),
        then=(
            flying[g].to(NONE),
            there[g].to(choose(flying[g].eq(COPY), MAPPED, PENDING)),
        ),
        why="A page arrives for the first time, or over one that was removed.",
        cite=cite_leaf("IMPORT.MEM", 83),
    ),
    step(
        "import_guest_cancel",
        DESTINATION,
        (g,),
        when=(
            _destination(MIGRATING),
            need("bundle", flying[g].eq(CANCEL)),
            need("sept_state", there[g].in_(MAPPED, PENDING)),
        ),
        then=(flying[g].to(NONE), there[g].to(REMOVED)),
        why="A page that was taken back leaves a mark, so that no older copy comes again.",
        cite=cite_leaf("IMPORT.MEM", 83) + ", CANCEL",
    ),
    step(
        "end_import_of_pages",
        DESTINATION,
        when=(_destination(MIGRATING), need("start_token", given)),
        then=(destination.to(RUNNING),),
        why="The TD is the destination's.",
        cite=cite_leaf("IMPORT.END", 81),
    ),
    step(
        "give_pages_up",
        DESTINATION,
        when=(_destination(MIGRATING),),
        then=(destination.to(FAILED), token.to(given)),
        why="The destination gives up for ever; a token is of use once the start token is out.",
        cite=cite_leaf("IMPORT.ABORT", 80),
    ),
    step(
        "new_destination",
        DESTINATION,
        when=(_destination(FAILED, MIGRATING), need("session_over", not_(session))),
        then=(destination.to(IDLE), there.fill(lambda i: FREE)),
        why="The failed TD is torn down, and another one built.",
        cite="tear-down and build; TDH.MNG.CREATE",
    ),
    step(
        "accept_on_destination",
        DESTINATION,
        (g,),
        when=(_destination(RUNNING), need("sept_state", there[g].eq(PENDING))),
        then=(there[g].to(MAPPED),),
        why="The guest accepts a page on the destination.",
        cite=_accept(),
    ),
    step(
        "accept_without_page",
        DESTINATION,
        (g,),
        when=(
            _destination(RUNNING),
            need("sept_state", there[g].in_(FREE, REMOVED)),
            need("not_asked", not_(asked[g])),
        ),
        then=(
            only(repaired("R8"), asked[g].to(True)),
            only(unrepaired("R8"), asked[g].to(there[g].eq(FREE))),
            only(unrepaired("R8"), refused[g].to(there[g].eq(REMOVED))),
        ),
        why="Where no page is the VMM is asked for one; in 1.5.01 not where one was removed.",
        cite=_accept() + "; intel/tdx-module issue 18",
    ),
    step(
        "add_on_destination",
        DESTINATION,
        (g,),
        when=(
            _destination(RUNNING),
            need("asked", asked[g]),
            need("sept_state", there[g].in_(FREE, REMOVED)),
        ),
        then=(there[g].to(PENDING), asked[g].to(False)),
        why="The VMM adds the page that it was asked for.",
        cite=cite_leaf("MEM.PAGE.AUG", 6),
    ),
    step(
        "convert_on_destination",
        DESTINATION,
        (g,),
        when=(_destination(RUNNING), need("sept_state", there[g].in_(MAPPED, PENDING))),
        then=(there[g].to(FREE),),
        why="The guest makes a page shared, and the VMM removes the private one.",
        cite=cite_leaf("MEM.PAGE.REMOVE", 29),
    ),
)

GUESTS = (MAPPED, PENDING, FREE)


def _quiet(g: Node) -> Node:
    """No bundle of the page is on its way."""
    return flying[g].eq(NONE)


def _one_of(*cases: Node) -> Node:
    """Some case holds, said as one conjunct."""
    return not_(all_of(*(not_(case) for case in cases)))


_arrived = all_of(given, destination.eq(MIGRATING))

PROPERTIES = (
    Property(
        "P48",
        forall(
            {"g": PAGE},
            lambda g: all_of(
                not_(refused[g]),
                implies(_arrived, here[g].in_(*EXPORTED, FREE)),
                implies(all_of(_arrived, here[g].eq(EXPORTED_BLOCKEDW)), there[g].eq(MAPPED)),
                implies(
                    all_of(_arrived, here[g].eq(PENDING_EXPORTED_BLOCKEDW)), there[g].eq(PENDING)
                ),
                implies(all_of(_arrived, here[g].eq(FREE)), there[g].in_(FREE, REMOVED)),
            ),
            lambda g: (there[g],),
        ),
        "What the guest could accept on the source it can accept on the destination.",
        "leaf",
        "TDG.MEM.PAGE.ACCEPT, TDH.IMPORT.MEM; intel/tdx-module issue 18",
        guards=(
            ("hand_pages_over", "every_page"),
            ("hand_pages_over", "nothing_on_the_way"),
        ),
        witness=all_of(destination.eq(RUNNING), there[0].eq(PENDING)),
    ),
)

LEMMAS = (
    Property(
        "page_phases",
        all_of(
            implies(given, all_of(source.eq(HANDED_OVER), session)),
            implies(source.eq(HANDED_OVER), given),
            implies(source.eq(MIGRATING), session),
            source.in_(RUNNING, MIGRATING, HANDED_OVER),
            destination.in_(IDLE, MIGRATING, RUNNING, FAILED),
            implies(source.eq(RUNNING), not_(session)),
            implies(token, all_of(given, destination.eq(FAILED))),
            implies(destination.eq(RUNNING), given),
        ),
        "Only a source that handed over has made a start token.",
        "lemma",
    ),
    Property(
        "page_pairs",
        forall(
            {"g": PAGE},
            lambda g: implies(
                all_of(
                    session,
                    any_of(
                        destination.in_(IDLE, MIGRATING),
                        all_of(destination.eq(FAILED), not_(given)),
                    ),
                ),
                _one_of(
                    all_of(flying[g].eq(COPY), here[g].eq(EXPORTED_BLOCKEDW)),
                    all_of(flying[g].eq(PENDING_COPY), here[g].eq(PENDING_EXPORTED_BLOCKEDW)),
                    all_of(flying[g].eq(CANCEL), here[g].in_(*GUESTS)),
                    all_of(_quiet(g), here[g].eq(EXPORTED_BLOCKEDW), there[g].eq(MAPPED)),
                    all_of(_quiet(g), here[g].eq(PENDING_EXPORTED_BLOCKEDW), there[g].eq(PENDING)),
                    all_of(_quiet(g), here[g].in_(*GUESTS), there[g].in_(FREE, REMOVED)),
                ),
            ),
            lambda g: (there[g],),
        ),
        "What is at the destination, or on its way, is what the source exported.",
        "lemma",
    ),
    Property(
        "new_pages",
        forall(
            {"g": PAGE},
            lambda g: all_of(
                implies(destination.eq(IDLE), there[g].eq(FREE)),
                here[g].in_(*GUESTS, *EXPORTED),
                there[g].in_(*GUESTS, REMOVED),
            ),
            lambda g: (there[g],),
        ),
        "A new destination has no pages; here is what states there are.",
        "lemma",
    ),
    Property(
        "pages_handed_over",
        forall(
            {"g": PAGE},
            lambda g: all_of(
                implies(given, all_of(_quiet(g), here[g].in_(*EXPORTED, FREE))),
                implies(asked[g], destination.eq(RUNNING)),
            ),
            lambda g: (there[g],),
        ),
        "With the start token every page is exported and has arrived; only then is one asked for.",
        "lemma",
    ),
)

GOALS = (
    Goal(
        "taken_back_and_accepted",
        all_of(destination.eq(RUNNING), here[0].eq(FREE), there[0].eq(MAPPED)),
        "The guest accepts a page on the destination that it had made shared on the source.",
    ),
    Goal(
        "second_try",
        all_of(source.eq(MIGRATING), destination.eq(MIGRATING), there[0].eq(PENDING)),
        "A pending page arrives.",
    ),
)

GUEST_PAGES = System(
    name="guest pages",
    variables=VARIABLES,
    steps=SOURCE_STEPS + DESTINATION_STEPS,
    properties=PROPERTIES + LEMMAS,
    goals=GOALS,
    assumptions=(
        "bundles of pages arrive in order and unchanged; what a page holds is not modelled here",
        "an abort token is used by the session that it was made for",
    ),
    profiles=ALL_PROFILES,
)
