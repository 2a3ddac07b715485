"""Several TDH.IMPORT.MEM calls in flight after the start token, and what ends the import.

All of them share the TDR and OP_STATE, so none excludes another; COMMIT, END and ABORT have the TDR
alone.  A failing entry ends the import, which writes OP_STATE under the shared lock.  The model
begins where the start token has been accepted.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Goal,
    Literal,
    Need,
    Node,
    Property,
    System,
    all_of,
    any_of,
    choose,
    enum,
    forall,
    implies,
    mapping,
    member,
    need,
    not_,
    param,
    scalar,
    step,
)
from tdxmig_model.model.locks import EXCLUSIVE, LINK, MODE, NONE, PROCESSOR, SHARED
from tdxmig_model.model.words import (
    ALL_PROFILES,
    DESTINATION,
    FAILED_IMPORT,
    FREE,
    LIVE_IMPORT,
    MAPPED,
    MODULE,
    OP_STATE,
    PAGE,
    POST_IMPORT,
    REMOVED,
    RUNNABLE,
    SEPT,
    cite_leaf,
    repaired,
)

LEAF = enum("ImportLeaf", "IMPORT_MEM", "IMPORT_CONTROL", "PAGE_REMOVE", "VP_ENTER")
IMPORT_MEM, IMPORT_CONTROL, PAGE_REMOVE, VP_ENTER = (member(LEAF, n) for n in LEAF.members)
STAGE = enum("ImportStage", "IDLE", "CHECKED", "LINK", "GUEST", "DONE")
IDLE, CHECKED, HAS_LINK, GUEST, DONE = (member(STAGE, name) for name in STAGE.members)

IMPORTING = (POST_IMPORT, LIVE_IMPORT)

stage = mapping("import_stage", (PROCESSOR,), STAGE, IDLE, DESTINATION)
leaf = mapping("import_leaf", (PROCESSOR,), LEAF, IMPORT_MEM, DESTINATION)
holds_tdr = mapping("import_tdr", (PROCESSOR,), MODE, NONE, DESTINATION)
has_link = mapping("import_has_link", (PROCESSOR,), BOOL, False, DESTINATION)
link_of = mapping("import_link", (PROCESSOR,), INT, 0, DESTINATION)
link_locked = mapping("import_link_locked", (LINK,), BOOL, False, DESTINATION)
tdr_alone = scalar("import_tdr_alone", BOOL, False, DESTINATION, doc="someone has the TDR alone")
sharers = scalar("import_tdr_sharers", INT, 0, DESTINATION, doc="how many share the TDR")
op_state = scalar("import_op_state", OP_STATE, POST_IMPORT, DESTINATION, doc="OP_STATE")
page = mapping("import_page", (PAGE,), SEPT, FREE, DESTINATION, doc="Secure EPT entry state")
token = scalar("import_token", BOOL, False, DESTINATION, doc="an abort token was made")

committed = scalar("import_committed", BOOL, False, DESTINATION, ghost=True)
overtaken = mapping(
    "import_overtaken", (PROCESSOR,), BOOL, False, DESTINATION, ghost=True, doc="it acted too late"
)
times = mapping("import_times", (PAGE,), INT, 0, DESTINATION, ghost=True, doc="imports of a page")

VARIABLES = (
    stage,
    leaf,
    holds_tdr,
    has_link,
    link_of,
    link_locked,
    tdr_alone,
    sharers,
    op_state,
    page,
    token,
    committed,
    overtaken,
    times,
)


p = param("processor", PROCESSOR)
f = param("leaf", LEAF)
i = param("link", LINK)
g = param("page", PAGE)


def _leaf(*leaves: Literal) -> Need:
    return need("leaf", leaf[p].in_(*leaves))


def _order(*stages: Literal) -> Need:
    return need("order", stage[p].in_(*stages))


_still_importing = need("still_importing", op_state.in_(*IMPORTING), *repaired("R9"))
_too_late = overtaken[p].to(any_of(overtaken[p], not_(op_state.in_(*IMPORTING))))
_LOCKS = f"lock table of the SEAMCALL leaves; {MODULE}"

STEPS = (
    step(
        "share_import_tdr",
        DESTINATION,
        (p, f),
        when=(
            _order(IDLE),
            need("leaf", f.ne(IMPORT_CONTROL)),
            need("no_exclusive_holder", not_(tdr_alone)),
            need(
                "op_state",
                any_of(
                    all_of(f.eq(IMPORT_MEM), op_state.in_(*IMPORTING)),
                    all_of(f.eq(PAGE_REMOVE), op_state.in_(*IMPORTING, RUNNABLE, FAILED_IMPORT)),
                    all_of(f.eq(VP_ENTER), op_state.in_(LIVE_IMPORT, RUNNABLE)),
                ),
            ),
        ),
        then=(
            stage[p].to(CHECKED),
            leaf[p].to(f),
            holds_tdr[p].to(SHARED),
            sharers.to(sharers + 1),
        ),
        why="The TDR and OP_STATE are shared, and OP_STATE is checked once.",
        cite=_LOCKS,
    ),
    step(
        "own_import_tdr",
        DESTINATION,
        (p,),
        when=(
            _order(IDLE),
            need("no_exclusive_holder", not_(tdr_alone)),
            need("no_shared_holder", sharers.eq(0)),
        ),
        then=(
            stage[p].to(CHECKED),
            leaf[p].to(IMPORT_CONTROL),
            holds_tdr[p].to(EXCLUSIVE),
            tdr_alone.to(True),
        ),
        why="COMMIT, END and ABORT have the TDR alone: no other call is in flight.",
        cite=_LOCKS,
    ),
    step(
        "take_import_link",
        DESTINATION,
        (p, i),
        when=(_order(CHECKED), _leaf(IMPORT_MEM), need("link_free", not_(link_locked[i]))),
        then=(
            stage[p].to(HAS_LINK),
            has_link[p].to(True),
            link_of[p].to(i),
            link_locked[i].to(True),
        ),
        why="Each call has a stream of its own.",
        cite=_LOCKS,
    ),
    step(
        "import_entry",
        DESTINATION,
        (p, g),
        when=(_order(HAS_LINK), _still_importing, need("sept_state", page[g].eq(FREE))),
        then=(page[g].to(MAPPED), times[g].to(times[g] + 1), _too_late),
        why="An entry is imported over a free one; its Secure EPT entry is locked meanwhile.",
        cite=cite_leaf("IMPORT.MEM", 83),
    ),
    step(
        "fail_entry",
        DESTINATION,
        (p,),
        when=(_order(HAS_LINK), _still_importing),
        then=(
            stage[p].to(DONE),
            op_state.to(choose(op_state.eq(LIVE_IMPORT), RUNNABLE, FAILED_IMPORT)),
            _too_late,
        ),
        why="A wrong entry ends the import: the TD goes on running once it was committed.",
        cite=cite_leaf("IMPORT.MEM", 83) + ", errors that abort always",
    ),
    step(
        "commit_import",
        DESTINATION,
        (p,),
        when=(_order(CHECKED), _leaf(IMPORT_CONTROL), need("op_state", op_state.eq(POST_IMPORT))),
        then=(stage[p].to(DONE), op_state.to(LIVE_IMPORT), committed.to(True)),
        why="The destination takes the TD over.",
        cite=cite_leaf("IMPORT.COMMIT", 82),
    ),
    step(
        "end_import",
        DESTINATION,
        (p,),
        when=(
            _order(CHECKED),
            _leaf(IMPORT_CONTROL),
            need("op_state", op_state.in_(*IMPORTING)),
        ),
        then=(stage[p].to(DONE), op_state.to(RUNNABLE), committed.to(True)),
        why="The import is over.",
        cite=cite_leaf("IMPORT.END", 81),
    ),
    step(
        "abort_import",
        DESTINATION,
        (p,),
        when=(
            _order(CHECKED),
            _leaf(IMPORT_CONTROL),
            need("op_state", op_state.in_(POST_IMPORT, FAILED_IMPORT)),
        ),
        then=(stage[p].to(DONE), op_state.to(FAILED_IMPORT), token.to(True)),
        why="The destination gives up for ever, and makes a token.",
        cite=cite_leaf("IMPORT.ABORT", 80),
    ),
    step(
        "remove_page",
        DESTINATION,
        (p, g),
        when=(_order(CHECKED), _leaf(PAGE_REMOVE), need("sept_state", page[g].eq(MAPPED))),
        then=(
            stage[p].to(DONE),
            page[g].to(choose(op_state.in_(*IMPORTING), REMOVED, FREE)),
        ),
        why="During an import a removed page leaves a mark, so that it is not imported again.",
        cite=cite_leaf("MEM.PAGE.REMOVE", 29),
    ),
    step(
        "run_imported_guest",
        DESTINATION,
        (p,),
        when=(_order(CHECKED), _leaf(VP_ENTER)),
        then=(stage[p].to(GUEST),),
        why="The guest runs on the destination.",
        cite=cite_leaf("VP.ENTER", 0),
    ),
    step(
        "release_import",
        DESTINATION,
        (p,),
        when=(_order(CHECKED, HAS_LINK, GUEST, DONE),),
        then=(
            stage[p].to(IDLE),
            holds_tdr[p].to(NONE),
            sharers.to(sharers + choose(holds_tdr[p].eq(SHARED), -1, 0)),
            tdr_alone.to(all_of(tdr_alone, holds_tdr[p].ne(EXCLUSIVE))),
            leaf[p].to(IMPORT_MEM),
            has_link[p].to(False),
            link_of[p].to(0),
            link_locked[link_of[p]].to(all_of(link_locked[link_of[p]], not_(has_link[p]))),
        ),
        why="Every exit gives back what was taken.",
        cite=_LOCKS,
    ),
)


def _every(body: object) -> Node:
    assert callable(body)
    return forall({"p": PROCESSOR}, body, lambda p: (stage[p],))


def _some(body: object) -> Node:
    assert callable(body)
    return not_(forall({"p": PROCESSOR}, lambda p: not_(body(p))))


PROPERTIES = (
    Property(
        "L43",
        _every(lambda p: not_(overtaken[p])),
        "An IMPORT.MEM that is in flight when another one ends the import imports nothing more "
        "and decides nothing.",
        "leaf",
        "TDH.IMPORT.MEM, OP_STATE under a shared lock (the import part of P43)",
        guards=(
            ("import_entry", "still_importing"),
            ("fail_entry", "still_importing"),
        ),
        witness=all_of(op_state.eq(RUNNABLE), _some(lambda p: stage[p].eq(HAS_LINK))),
    ),
    Property(
        "L44",
        implies(committed, all_of(op_state.in_(LIVE_IMPORT, RUNNABLE), not_(token))),
        "After the commit the import cannot fail, and no abort token can be made.",
        "leaf",
        "TDH.IMPORT.COMMIT, TDH.IMPORT.MEM, TDH.IMPORT.ABORT",
        guards=(
            ("fail_entry", "still_importing"),
            ("abort_import", "op_state"),
            ("commit_import", "op_state"),
            ("end_import", "op_state"),
        ),
        witness=committed,
    ),
    Property(
        "L45",
        forall({"g": PAGE}, lambda g: times[g].le(1), lambda g: (times[g],)),
        "After the start token a page is imported at most once, however many calls are in flight.",
        "leaf",
        "TDH.IMPORT.MEM, TDH.MEM.PAGE.REMOVE",
        guards=(("import_entry", "still_importing"), ("import_entry", "sept_state")),
        witness=times[0].gt(0),
    ),
    Property(
        "L46",
        _every(
            lambda p: implies(
                all_of(leaf[p].eq(VP_ENTER), stage[p].in_(CHECKED, GUEST)),
                op_state.in_(LIVE_IMPORT, RUNNABLE),
            )
        ),
        "A vCPU enters the imported guest, and is inside, only while the TD may run.",
        "leaf",
        "TDH.VP.ENTER, TDH.IMPORT.ABORT",
        guards=(("share_import_tdr", "op_state"), ("fail_entry", "still_importing")),
        witness=_some(lambda p: stage[p].eq(GUEST)),
    ),
)

LEMMAS = (
    Property(
        "import_locks",
        _every(
            lambda p: not_(
                any_of(
                    all_of(stage[p].eq(IDLE), holds_tdr[p].ne(NONE)),
                    all_of(stage[p].ne(IDLE), holds_tdr[p].eq(NONE)),
                    all_of(holds_tdr[p].eq(EXCLUSIVE), leaf[p].ne(IMPORT_CONTROL)),
                    all_of(leaf[p].eq(IMPORT_CONTROL), holds_tdr[p].eq(SHARED)),
                    all_of(stage[p].eq(HAS_LINK), leaf[p].ne(IMPORT_MEM)),
                    all_of(stage[p].eq(GUEST), leaf[p].ne(VP_ENTER)),
                    all_of(leaf[p].eq(VP_ENTER), stage[p].eq(IDLE)),
                )
            )
        ),
        "What a call holds is what its leaf takes.",
        "lemma",
    ),
    Property(
        "import_entered",
        _every(
            lambda p: implies(leaf[p].eq(VP_ENTER), op_state.in_(LIVE_IMPORT, RUNNABLE)),
        ),
        "A call that enters the guest, however far it has come, finds a TD that may run.",
        "lemma",
        profiles=frozenset(repaired("R9")),
    ),
    Property(
        "import_states",
        all_of(
            op_state.in_(*IMPORTING, RUNNABLE, FAILED_IMPORT),
            implies(op_state.in_(LIVE_IMPORT, RUNNABLE), committed),
            implies(token, op_state.eq(FAILED_IMPORT)),
            forall(
                {"g": PAGE},
                lambda g: all_of(
                    times[g].ge(0),
                    implies(all_of(op_state.in_(*IMPORTING), page[g].eq(FREE)), times[g].eq(0)),
                ),
                lambda g: (times[g],),
            ),
        ),
        "A free entry was not imported yet, as long as the import goes on.",
        "lemma",
    ),
)

GOALS = (
    Goal(
        "two_imports_at_once",
        not_(
            forall(
                {"p": PROCESSOR, "q": PROCESSOR},
                lambda p, q: not_(all_of(p.ne(q), stage[p].eq(HAS_LINK), stage[q].eq(HAS_LINK))),
            )
        ),
        "Two memory bundles are imported at the same time.",
    ),
    Goal("import_token", token, "The destination gives up before the commit."),
)

IMPORT_LOCKS = System(
    name="import locks",
    variables=VARIABLES,
    steps=STEPS,
    properties=PROPERTIES + LEMMAS,
    goals=GOALS,
    assumptions=(
        "an entry of IMPORT.MEM, with the look at OP_STATE before it, is one step",
        "a page is removed only once; the guest gets no new page in its place",
    ),
    profiles=ALL_PROFILES,
)
