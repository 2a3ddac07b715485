"""The destination TD: one row for each import leaf, failures that change it, and running it.

An import row takes any bundle of the log: which one, and how often, is the adversary's choice.  A
failing import that changes the state is a row of its own; all refusals without an effect are no row
at all.  A call that uses a stream ends the unfinished IMPORT.MEM there, as it ends every call that
could be resumed; that a refused IMPORT.MEM does so too is left out.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Literal,
    Need,
    Node,
    Size,
    all_of,
    any_of,
    choose,
    count,
    mapping,
    need,
    not_,
    param,
    scalar,
    step,
)
from tdxmig_model.model import network
from tdxmig_model.model.words import (
    DESTINATION,
    EPOCH_TOKEN,
    FAILED_IMPORT,
    FREE,
    IMMUTABLE_TD_STATE,
    INITIALIZED,
    LIVE_EXPORT,
    LIVE_IMPORT,
    MAPPED,
    MEM,
    MEMORY_IMPORT,
    MESSAGE,
    MODULE,
    MUTABLE_TD_STATE,
    MUTABLE_VCPU_STATE,
    OP_STATE,
    PAGE,
    PAUSED_EXPORT,
    PENDING,
    POST_EXPORT,
    POST_IMPORT,
    REMOVED,
    RUNNABLE,
    SEPT,
    START_EPOCH,
    STATE_IMPORT,
    STREAM,
    UNINITIALIZED,
    VCPU,
    cite_leaf,
)

op_state = scalar("destination_op_state", OP_STATE, UNINITIALIZED, DESTINATION)
key_set = scalar("destination_mig_dec_key_set", BOOL, False, DESTINATION, doc="MIG_DEC_KEY_SET")
num_migs = scalar(
    "destination_num_migs", INT, 2, DESTINATION, doc="NUM_MIGS, the backward stream included"
)
mig_epoch = scalar("destination_mig_epoch", INT, 0, DESTINATION, doc="MIG_EPOCH")
total_mb_count = scalar("destination_total_mb_count", INT, 0, DESTINATION, doc="TOTAL_MB_COUNT")
migrated_vcpus = scalar(
    "destination_num_migrated_vcpus", INT, 0, DESTINATION, doc="NUM_MIGRATED_VCPUS"
)
expected_mb_counter = mapping("destination_expected_mb_counter", (STREAM,), INT, 0, DESTINATION)
unfinished = mapping("destination_unfinished", (STREAM,), BOOL, False, DESTINATION)
unfinished_bundle = mapping("destination_unfinished_bundle", (STREAM,), INT, 0, DESTINATION)
page = mapping("destination_page", (PAGE,), SEPT, FREE, DESTINATION, doc="Secure-EPT entry state")
page_epoch = mapping(
    "destination_page_epoch", (PAGE,), INT, 0, DESTINATION, doc="MIG_EPOCH of the last import"
)
vcpu_imported = mapping("destination_vcpu_imported", (VCPU,), BOOL, False, DESTINATION)

# Ghosts: what has happened, for properties only.
accepted = mapping("destination_accepted", (MESSAGE,), BOOL, False, DESTINATION, ghost=True)
td_imported = scalar("destination_td_imported", BOOL, False, DESTINATION, ghost=True)
ran = scalar("destination_ran", BOOL, False, DESTINATION, ghost=True)

VARIABLES = (
    op_state,
    key_set,
    num_migs,
    mig_epoch,
    total_mb_count,
    migrated_vcpus,
    expected_mb_counter,
    unfinished,
    unfinished_bundle,
    page,
    page_epoch,
    vcpu_imported,
    accepted,
    td_imported,
    ran,
)

imported_vcpus = count("imported vCPUs", VCPU, lambda v: vcpu_imported[v])

m = param("m", MESSAGE)
i = param("stream", STREAM)
p = param("p", PAGE)
v = param("v", VCPU)


def _in(*states: Literal) -> Need:
    """The leaf's row of the OP_STATE permission table."""
    return need("op_state", op_state.in_(*states))


def _header(formula: Node) -> Node:
    """What an MBMD says, of a bundle that was sent; an MBMD of nobody says what its maker likes."""
    return any_of(m.ge(network.log_length), formula)


def _bundle(kind: Literal) -> tuple[Need, ...]:
    """The MBMD's MAC verifies (the bundle was sent under this session's key) and its type fits."""
    return (
        need("mbmd_mac", m.lt(network.log_length)),
        need("mb_type", _header(network.log_kind[m].eq(kind))),
    )


_counter = need("mb_counter", _header(network.log_counter[m].eq(expected_mb_counter[i])))
_counter_0 = need("mb_counter", _header(network.log_counter[m].eq(expected_mb_counter[0])))
_stream = need("migs_index", _header(network.log_stream[m].eq(i)))
_stream_0 = need("migs_index", _header(network.log_stream[m].eq(0)))
_epoch = need("mig_epoch", _header(network.log_epoch[m].eq(mig_epoch)))
_token = (
    need("token_counter", _header(network.log_counter[m].eq(0))),
    need("mig_epoch", _header(network.log_epoch[m].gt(mig_epoch))),
    need("total_mb", _header(network.log_total[m].eq(total_mb_count + 1))),
)
_entry = (
    _in(MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT, LIVE_IMPORT),
    need("unfinished", unfinished[i]),
)
_in_order = need("in_order", op_state.in_(MEMORY_IMPORT, STATE_IMPORT))
_not_over_removed = need("not_over_removed", any_of(page[p].eq(FREE), page_epoch[p].lt(mig_epoch)))
_older = need("not_in_this_epoch", page_epoch[p].lt(mig_epoch))

STEPS = (
    step(
        "destination_set_migration_key",
        DESTINATION,
        when=(need("op_state", not_(op_state.in_(PAUSED_EXPORT, POST_EXPORT))),),
        then=(key_set.to(True),),
        why="The MigTD installs the peer's key before a session.",
        cite=f"TDG.SERVTD.WR of MIG_DEC_KEY, TDCALL 20; {MODULE}",
    ),
    step(
        "destination_mig_stream_create",
        DESTINATION,
        when=(
            _in(UNINITIALIZED, INITIALIZED, RUNNABLE),
            need("max_migs", num_migs.lt(512)),
        ),
        then=(num_migs.to(num_migs + 1),),
        why="Streams are created before the session; the first one is the backward stream.",
        cite=cite_leaf("MIG.STREAM.CREATE", 96),
    ),
    step(
        "import_state_immutable",
        DESTINATION,
        (m,),
        when=(
            _in(UNINITIALIZED),
            need("min_migs", num_migs.ge(2)),
            need("mig_dec_key_set", key_set),
            *_bundle(IMMUTABLE_TD_STATE),
            need("mig_epoch", _header(network.log_epoch[m].eq(0))),
            need("mb_counter", _header(network.log_counter[m].eq(0))),
        ),
        then=(
            op_state.to(MEMORY_IMPORT),
            key_set.to(False),
            mig_epoch.to(0),
            total_mb_count.to(1),
            expected_mb_counter.fill(lambda s: choose(s.eq(0), 1, 0)),
            unfinished.fill(lambda s: False),
            accepted[m].to(True),
        ),
        why="The session starts with the immutable state; nothing can be imported before it.",
        cite=cite_leaf("IMPORT.STATE.IMMUTABLE", 85),
    ),
    step(
        "import_mem_begin",
        DESTINATION,
        (i, m),
        when=(
            _in(MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT, LIVE_IMPORT),
            need("stream", i.lt(num_migs - 1)),
            *_bundle(MEM),
            _stream,
            _epoch,
            need(
                "mb_counter",
                any_of(
                    op_state.in_(POST_IMPORT, LIVE_IMPORT),
                    _header(network.log_counter[m].eq(expected_mb_counter[i])),
                ),
            ),
        ),
        then=(
            unfinished[i].to(True),
            unfinished_bundle[i].to(m),
            expected_mb_counter[i].to(expected_mb_counter[i] + 1),
        ),
        why="A memory bundle is of this session, stream and epoch, and in order while in order.",
        cite=cite_leaf("IMPORT.MEM", 83),
        part_of="import_mem",
    ),
    step(
        "import_mem_migrate",
        DESTINATION,
        (i, p),
        when=(
            *_entry,
            need("sept_state", page[p].in_(FREE, REMOVED)),
            _not_over_removed,
        ),
        then=(page[p].to(MAPPED), page_epoch[p].to(mig_epoch)),
        why="A page comes for the first time, or over one that was removed in an earlier epoch.",
        cite=cite_leaf("IMPORT.MEM", 83),
        part_of="import_mem",
    ),
    step(
        "import_mem_migrate_pending",
        DESTINATION,
        (i, p),
        when=(
            *_entry,
            need("sept_state", page[p].in_(FREE, REMOVED)),
            _not_over_removed,
        ),
        then=(page[p].to(PENDING), page_epoch[p].to(mig_epoch)),
        why="A page that the guest has not accepted yet comes without content, and stays so.",
        cite=cite_leaf("IMPORT.MEM", 83),
        part_of="import_mem",
    ),
    step(
        "import_mem_remigrate_pending",
        DESTINATION,
        (i, p),
        when=(
            *_entry,
            _in_order,
            need("sept_state", page[p].in_(PENDING)),
            _older,
        ),
        then=(page[p].to(PENDING), page_epoch[p].to(mig_epoch)),
        why="Accepted content is never replaced by a page that was not accepted.",
        cite=cite_leaf("IMPORT.MEM", 83),
        part_of="import_mem",
    ),
    step(
        "import_mem_remigrate",
        DESTINATION,
        (i, p),
        when=(
            *_entry,
            _in_order,
            need("sept_state", page[p].in_(MAPPED, PENDING)),
            _older,
        ),
        then=(page[p].to(MAPPED), page_epoch[p].to(mig_epoch)),
        why="A newer version replaces one of an earlier epoch, while the TD cannot run.",
        cite=cite_leaf("IMPORT.MEM", 83),
        part_of="import_mem",
    ),
    step(
        "import_mem_cancel",
        DESTINATION,
        (i, p),
        when=(
            *_entry,
            _in_order,
            need("sept_state", page[p].in_(MAPPED, PENDING)),
            _older,
        ),
        then=(page[p].to(REMOVED), page_epoch[p].to(mig_epoch)),
        why="The source took the page back: the copy of an earlier epoch is dropped.",
        cite=cite_leaf("IMPORT.MEM", 83),
        part_of="import_mem",
    ),
    step(
        "import_mem_end",
        DESTINATION,
        (i,),
        when=(
            *_entry,
            need("page_macs", network.log_complete[unfinished_bundle[i]]),
        ),
        then=(
            unfinished[i].to(False),
            total_mb_count.to(total_mb_count + 1),
            accepted[unfinished_bundle[i]].to(True),
        ),
        why="Every entry's MAC verified: the bundle counts.",
        cite=cite_leaf("IMPORT.MEM", 83),
        part_of="import_mem",
    ),
    step(
        "import_mem_refused",
        DESTINATION,
        (i,),
        when=(
            _in(MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT, LIVE_IMPORT),
            need("unfinished", unfinished[i]),
        ),
        then=(unfinished[i].to(False),),
        why="A new call is refused for its MBMD, and yet it ends the unfinished one of its stream.",
        cite=cite_leaf("IMPORT.MEM", 83),
        part_of="import_mem",
    ),
    step(
        "import_track",
        DESTINATION,
        (m,),
        when=(
            _in(MEMORY_IMPORT, STATE_IMPORT),
            *_bundle(EPOCH_TOKEN),
            need("not_start_token", _header(network.log_epoch[m].ne(START_EPOCH))),
            *_token,
        ),
        then=(
            mig_epoch.to(network.log_epoch[m]),
            total_mb_count.to(total_mb_count + 1),
            expected_mb_counter[0].to(1),
            unfinished[0].to(False),
            accepted[m].to(True),
        ),
        why="A new epoch begins when every bundle before its token has been imported.",
        cite=cite_leaf("IMPORT.TRACK", 84),
    ),
    step(
        "import_track_start",
        DESTINATION,
        (m,),
        when=(
            _in(MEMORY_IMPORT, STATE_IMPORT),
            *_bundle(EPOCH_TOKEN),
            need("start_token", _header(network.log_epoch[m].eq(START_EPOCH))),
            *_token,
            need("all_vcpus", migrated_vcpus.eq(Size(VCPU))),
        ),
        then=(
            op_state.to(POST_IMPORT),
            mig_epoch.to(START_EPOCH),
            total_mb_count.to(total_mb_count + 1),
            expected_mb_counter[0].to(1),
            unfinished[0].to(False),
            accepted[m].to(True),
        ),
        why="The start token is taken only when every vCPU, and so the TD state, has arrived.",
        cite=cite_leaf("IMPORT.TRACK", 84),
    ),
    step(
        "import_state_td",
        DESTINATION,
        (m,),
        when=(
            _in(MEMORY_IMPORT),
            *_bundle(MUTABLE_TD_STATE),
            _stream_0,
            _epoch,
            _counter_0,
        ),
        then=(
            op_state.to(STATE_IMPORT),
            total_mb_count.to(total_mb_count + 1),
            expected_mb_counter[0].to(expected_mb_counter[0] + 1),
            unfinished[0].to(False),
            accepted[m].to(True),
            td_imported.to(True),
        ),
        why="The TD-scope state comes once and opens the way for the vCPUs.",
        cite=cite_leaf("IMPORT.STATE.TD", 86),
    ),
    step(
        "import_state_vp",
        DESTINATION,
        (i, m, v),
        when=(
            _in(STATE_IMPORT),
            need("stream", i.lt(num_migs - 1)),
            *_bundle(MUTABLE_VCPU_STATE),
            _stream,
            _epoch,
            _counter,
            need("vcpu_state", not_(vcpu_imported[v])),
            need("num_migrated_vcpus", migrated_vcpus.lt(Size(VCPU))),
        ),
        then=(
            vcpu_imported[v].to(True),
            migrated_vcpus.to(migrated_vcpus + 1),
            total_mb_count.to(total_mb_count + 1),
            expected_mb_counter[i].to(expected_mb_counter[i] + 1),
            unfinished[i].to(False),
            accepted[m].to(True),
        ),
        why="Each vCPU is imported once, after the TD state.",
        cite=cite_leaf("IMPORT.STATE.VP", 87),
    ),
    step(
        "import_commit",
        DESTINATION,
        when=(_in(POST_IMPORT),),
        then=(op_state.to(LIVE_IMPORT),),
        why="The destination takes the TD over while pages may still come.",
        cite=cite_leaf("IMPORT.COMMIT", 82),
    ),
    step(
        "import_end",
        DESTINATION,
        when=(_in(POST_IMPORT, LIVE_IMPORT),),
        then=(op_state.to(RUNNABLE),),
        why="The import is over and the TD belongs to the destination.",
        cite=cite_leaf("IMPORT.END", 81),
    ),
    step(
        "import_abort",
        DESTINATION,
        when=(_in(MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT, FAILED_IMPORT),),
        then=(
            op_state.to(FAILED_IMPORT),
            network.abort_token.to(True),
        ),
        why="The destination gives up for ever, and says so in a token that the source can verify.",
        cite=cite_leaf("IMPORT.ABORT", 80),
    ),
    step(
        "import_failure",
        DESTINATION,
        when=(
            need(
                "before_commit",
                any_of(
                    all_of(op_state.eq(UNINITIALIZED), key_set, num_migs.ge(2)),
                    op_state.in_(MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT),
                ),
            ),
        ),
        then=(
            op_state.to(FAILED_IMPORT),
            # Only the start of a session uses up the key; one written since then stays.
            key_set.to(choose(op_state.eq(UNINITIALIZED), False, key_set)),
        ),
        why="A wrong MAC, MBMD, list or count before the commit ends the import for good.",
        cite=f"fatal errors of the IMPORT leaves; {MODULE}",
    ),
    step(
        "import_failure_live",
        DESTINATION,
        when=(need("op_state", op_state.eq(LIVE_IMPORT)),),
        then=(op_state.to(RUNNABLE),),
        why="After the commit a failing page ends the import, and the TD goes on running.",
        cite=cite_leaf("IMPORT.MEM", 83) + ", errors that abort always",
    ),
    step(
        "destination_vp_enter",
        DESTINATION,
        when=(_in(RUNNABLE, LIVE_EXPORT, LIVE_IMPORT),),
        then=(ran.to(True),),
        why="The guest runs on the destination.",
        cite=cite_leaf("VP.ENTER", 0),
    ),
)

# OP_STATEs in which the destination can be; the others belong to a TD that is built or exported.
POSSIBLE = (
    UNINITIALIZED,
    MEMORY_IMPORT,
    STATE_IMPORT,
    POST_IMPORT,
    LIVE_IMPORT,
    RUNNABLE,
    FAILED_IMPORT,
)
AFTER_START = (POST_IMPORT, LIVE_IMPORT, RUNNABLE)
OWNING = (LIVE_IMPORT, RUNNABLE)
