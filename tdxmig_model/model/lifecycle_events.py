"""The lifecycle: what an honest hypervisor does, event by event, on both sides.

This is the machine that runs: each event is a trigger of the `transitions` machine of its side, and
an
accepted trigger is the only way by which its commands reach the engine.  Records travel in order
from source
to destination; on the way back come a confirmation that the import has begun, and an abort token.

The one rule here that the TDX module does not have: the start token waits for the confirmation.
Without it
the source could hand over to a destination that never began, which can make no abort token.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Assign,
    Literal,
    Need,
    Node,
    Size,
    any_of,
    count,
    enum,
    mapping,
    member,
    need,
    not_,
    param,
    scalar,
    step,
)
from tdxmig_model.model.words import (
    DESTINATION,
    EPOCH,
    MESSAGE,
    NETWORK,
    SOURCE,
    START_EPOCH,
    VCPU,
)

SOURCE_PHASE = enum(
    "SourcePhase",
    "IDLE",
    "READY",
    "LIVE",
    "PAUSED",
    "STATE_EXPORT",
    "HANDED_OVER",
    "ABORTED",
    "CLOSED",
)
DESTINATION_PHASE = enum(
    "DestinationPhase",
    "IDLE",
    "READY",
    "MEMORY",
    "STATE",
    "MAY_COMMIT",
    "COMMITTED",
    "ENDED",
    "ABORTED",
    "CLOSED",
)
RECORD = enum("Record", "IMMUTABLE", "EPOCH", "MEMORY", "TD_STATE", "VCPU_STATE", "START_TOKEN")


def _source(name: str) -> Literal:
    return member(SOURCE_PHASE, name)


def _destination(name: str) -> Literal:
    return member(DESTINATION_PHASE, name)


def _record(name: str) -> Literal:
    return member(RECORD, name)


# --- variables -----------------------------------------------------------------------------------

source_phase = scalar("source_phase", SOURCE_PHASE, _source("IDLE"), SOURCE)
source_epoch = scalar("source_epoch", INT, 0, SOURCE, doc="MIG_EPOCH")
source_confirmed = scalar(
    "source_confirmed", BOOL, False, SOURCE, doc="the destination is known to have begun the import"
)
source_owns = scalar("source_owns", BOOL, True, SOURCE, doc="the TD has not been handed over")
source_vcpu_exported = mapping("source_vcpu_exported", (VCPU,), BOOL, False, SOURCE)

sent = scalar("sent", INT, 0, NETWORK, doc="records sent so far")
record_kind = mapping("record_kind", (MESSAGE,), RECORD, _record("MEMORY"), NETWORK)
record_epoch = mapping("record_epoch", (MESSAGE,), INT, 0, NETWORK)
confirmation = scalar("confirmation", BOOL, False, NETWORK, doc="sent back: the import has begun")
abort_token = scalar("abort_token", BOOL, False, NETWORK, doc="sent back: an abort token")
epoch_position = mapping(
    "epoch_position", (EPOCH,), INT, 0, NETWORK, ghost=True, doc="where an epoch's token is"
)

paused = scalar("paused", BOOL, False, NETWORK, ghost=True, doc="the source has been paused")
td_position = scalar("td_position", INT, 0, NETWORK, ghost=True, doc="where the TD-scope state is")

destination_phase = scalar(
    "destination_phase", DESTINATION_PHASE, _destination("IDLE"), DESTINATION
)
received = scalar("received", INT, 0, DESTINATION, doc="records taken so far, in order")
destination_epoch = scalar("destination_epoch", INT, 0, DESTINATION, doc="MIG_EPOCH")
destination_owns = scalar("destination_owns", BOOL, False, DESTINATION, doc="the TD was taken over")
destination_vcpu_imported = mapping("destination_vcpu_imported", (VCPU,), BOOL, False, DESTINATION)

VARIABLES = (
    source_phase,
    source_epoch,
    source_confirmed,
    source_owns,
    source_vcpu_exported,
    sent,
    record_kind,
    record_epoch,
    confirmation,
    abort_token,
    epoch_position,
    paused,
    td_position,
    destination_phase,
    received,
    destination_epoch,
    destination_owns,
    destination_vcpu_imported,
)

exported_vcpus = count("exported vCPUs", VCPU, lambda v: source_vcpu_exported[v])
imported_vcpus = count("imported vCPUs", VCPU, lambda v: destination_vcpu_imported[v])

v = param("vcpu", VCPU)
CITE = "QEMU live migration of a TD, savevm and loadvm handlers"


def _when_source(*phases: str) -> Need:
    return need("phase", in_source(*phases))


def _when_destination(*phases: str) -> Need:
    return need("phase", in_destination(*phases))


def _send(kind: str, epoch: Node | int) -> tuple[Assign, ...]:
    return (
        sent.to(sent + 1),
        record_kind[sent].to(_record(kind)),
        record_epoch[sent].to(epoch),
    )


def _next(kind: str) -> tuple[Need, ...]:
    return (
        need("record_arrived", received.lt(sent)),
        need("record_kind", record_kind[received].eq(_record(kind))),
    )


_take = received.to(received + 1)


def in_source(*phases: str) -> Node:
    """The source is in one of these phases."""
    return source_phase.in_(*(_source(name) for name in phases))


def in_destination(*phases: str) -> Node:
    """The destination is in one of these phases."""
    return destination_phase.in_(*(_destination(name) for name in phases))


def is_record(position: Node, kind: str) -> Node:
    """Whether the record at this position is of this kind."""
    return record_kind[position].eq(_record(kind))


# --- source events -------------------------------------------------------------------------------

SOURCE_STEPS = (
    step(
        "setup",
        SOURCE,
        when=(_when_source("IDLE"),),
        then=(source_phase.to(_source("READY")),),
        why="Keys are exchanged and streams are created before anything is exported.",
        cite=CITE + ": savevm_state_setup",
    ),
    step(
        "export_immutable",
        SOURCE,
        when=(_when_source("READY"),),
        then=(source_phase.to(_source("LIVE")), *_send("IMMUTABLE", 0)),
        why="The session begins with the immutable state, before any memory.",
        cite=CITE + ": savevm_state_start",
    ),
    step(
        "confirm_import",
        SOURCE,
        when=(
            _when_source("LIVE", "PAUSED", "STATE_EXPORT"),
            need("confirmation", confirmation),
        ),
        then=(source_confirmed.to(True),),
        why="From here on the destination can make an abort token.",
        cite="return path; TDH.IMPORT.ABORT is allowed from MEMORY_IMPORT on",
    ),
    step(
        "start_epoch",
        SOURCE,
        when=(
            _when_source("LIVE", "PAUSED"),
            need("epoch_overflow", source_epoch.lt(START_EPOCH - 1)),
        ),
        then=(
            source_epoch.to(source_epoch + 1),
            *_send("EPOCH", source_epoch + 1),
            epoch_position[source_epoch + 1].to(sent),
        ),
        why="The token of a new pass goes before the first private page of the pass.",
        cite=CITE + ": savevm_state_ram_start_epoch",
    ),
    step(
        "export_memory",
        SOURCE,
        when=(_when_source("LIVE", "PAUSED", "HANDED_OVER"),),
        then=_send("MEMORY", source_epoch),
        why="Private pages of the current epoch; after the start token, those still missing.",
        cite=CITE + ": savevm_state_ram",
    ),
    step(
        "cancel_page",
        SOURCE,
        when=(_when_source("LIVE", "PAUSED"),),
        then=_send("MEMORY", source_epoch),
        why="An exported page is taken back while the import is still in order.",
        cite=CITE + ": savevm_state_ram_cancel",
    ),
    step(
        "pause",
        SOURCE,
        when=(_when_source("LIVE"),),
        then=(source_phase.to(_source("PAUSED")), paused.to(True)),
        why="The vCPUs are stopped; the downtime begins.",
        cite=CITE + ": savevm_state_pause",
    ),
    step(
        "export_td_state",
        SOURCE,
        when=(_when_source("PAUSED"),),
        then=(
            source_phase.to(_source("STATE_EXPORT")),
            *_send("TD_STATE", source_epoch),
            td_position.to(sent),
        ),
        why="The TD-scope state, once, after the last pass over memory.",
        cite=CITE + ": savevm_state_end",
    ),
    step(
        "export_vcpu_state",
        SOURCE,
        (v,),
        when=(
            _when_source("STATE_EXPORT"),
            need("not_exported_yet", not_(source_vcpu_exported[v])),
        ),
        then=(source_vcpu_exported[v].to(True), *_send("VCPU_STATE", source_epoch)),
        why="Each vCPU once, after the TD-scope state.",
        cite=CITE + ": savevm_state_end",
    ),
    step(
        "finish_epochs",
        SOURCE,
        when=(
            _when_source("STATE_EXPORT"),
            need("every_vcpu", exported_vcpus.eq(Size(VCPU))),
            need("confirmed", source_confirmed),
        ),
        then=(
            source_phase.to(_source("HANDED_OVER")),
            source_epoch.to(START_EPOCH),
            source_owns.to(False),
            *_send("START_TOKEN", START_EPOCH),
            epoch_position[START_EPOCH].to(sent),
        ),
        why="The start token ends the in-order phase; from here on the source may not run the TD.",
        cite=CITE + ": savevm_state_end; TDH.EXPORT.TRACK (in-order done)",
    ),
    step(
        "abort",
        SOURCE,
        when=(_when_source("LIVE", "PAUSED", "STATE_EXPORT"),),
        then=(source_phase.to(_source("ABORTED")), source_owns.to(True)),
        why="Before the start token the source takes the TD back without asking.",
        cite=CITE + ": savevm_state_ram_abort",
    ),
    step(
        "abort_with_token",
        SOURCE,
        when=(_when_source("HANDED_OVER"), need("abort_token", abort_token)),
        then=(source_phase.to(_source("ABORTED")), source_owns.to(True)),
        why="After the start token only an abort token gives the TD back.",
        cite="TDH.EXPORT.ABORT in POST_EXPORT",
    ),
    step(
        "cleanup",
        SOURCE,
        when=(_when_source("IDLE", "READY", "HANDED_OVER", "ABORTED"),),
        then=(source_phase.to(_source("CLOSED")),),
        why="Streams and buffers are released when nothing more can happen here.",
        cite=CITE + ": savevm_state_cleanup",
    ),
)

# --- destination events --------------------------------------------------------------------------

DESTINATION_STEPS = (
    step(
        "destination_setup",
        DESTINATION,
        when=(_when_destination("IDLE"),),
        then=(destination_phase.to(_destination("READY")),),
        why="Keys are exchanged and streams are created before anything is imported.",
        cite=CITE + ": loadvm_state_setup",
    ),
    step(
        "import_immutable",
        DESTINATION,
        when=(_when_destination("READY"), *_next("IMMUTABLE")),
        then=(
            destination_phase.to(_destination("MEMORY")),
            _take,
            confirmation.to(True),
        ),
        why="The import begins, and the source is told that it has.",
        cite=CITE + ": loadvm_state",
    ),
    step(
        "import_epoch",
        DESTINATION,
        when=(
            _when_destination("MEMORY"),
            *_next("EPOCH"),
            need("newer_epoch", destination_epoch.lt(record_epoch[received])),
        ),
        then=(destination_epoch.to(record_epoch[received]), _take),
        why="A token closes the epoch before it.",
        cite=CITE + ": loadvm_state",
    ),
    step(
        "import_memory",
        DESTINATION,
        when=(
            _when_destination("MEMORY", "STATE", "MAY_COMMIT", "COMMITTED"),
            *_next("MEMORY"),
            need("this_epoch", record_epoch[received].eq(destination_epoch)),
        ),
        then=(_take,),
        why="Private pages of the current epoch.",
        cite=CITE + ": loadvm_state",
    ),
    step(
        "import_td_state",
        DESTINATION,
        when=(_when_destination("MEMORY"), *_next("TD_STATE")),
        then=(destination_phase.to(_destination("STATE")), _take),
        why="The TD-scope state comes once and opens the way for the vCPUs.",
        cite=CITE + ": loadvm_state",
    ),
    step(
        "import_vcpu_state",
        DESTINATION,
        (v,),
        when=(
            _when_destination("STATE"),
            *_next("VCPU_STATE"),
            need("not_imported_yet", not_(destination_vcpu_imported[v])),
        ),
        then=(destination_vcpu_imported[v].to(True), _take),
        why="Each vCPU once, after the TD-scope state.",
        cite=CITE + ": loadvm_state",
    ),
    step(
        "import_start_token",
        DESTINATION,
        when=(
            _when_destination("STATE"),
            *_next("START_TOKEN"),
            need("every_vcpu", imported_vcpus.eq(Size(VCPU))),
        ),
        then=(
            destination_phase.to(_destination("MAY_COMMIT")),
            destination_epoch.to(START_EPOCH),
            _take,
        ),
        why="Everything in order has arrived; the destination may take the TD over or give up.",
        cite=CITE + ": loadvm_state",
    ),
    step(
        "commit",
        DESTINATION,
        when=(_when_destination("MAY_COMMIT"),),
        then=(destination_phase.to(_destination("COMMITTED")), destination_owns.to(True)),
        why="The destination takes the TD over while pages may still come.",
        cite="TDH.IMPORT.COMMIT",
    ),
    step(
        "end",
        DESTINATION,
        when=(_when_destination("MAY_COMMIT", "COMMITTED"),),
        then=(destination_phase.to(_destination("ENDED")), destination_owns.to(True)),
        why="The import is over; the TD belongs to the destination.",
        cite=CITE + ": loadvm_state_cleanup",
    ),
    step(
        "destination_abort",
        DESTINATION,
        when=(_when_destination("READY", "MEMORY", "STATE", "MAY_COMMIT"),),
        then=(
            abort_token.to(any_of(abort_token, destination_phase.ne(_destination("READY")))),
            destination_phase.to(_destination("ABORTED")),
        ),
        why="The destination gives up for ever; once the import has begun it says so in a token.",
        cite="TDH.IMPORT.ABORT",
    ),
    step(
        "destination_cleanup",
        DESTINATION,
        when=(_when_destination("IDLE", "READY", "ENDED", "ABORTED"),),
        then=(destination_phase.to(_destination("CLOSED")),),
        why="Streams and buffers are released when nothing more can happen here.",
        cite=CITE + ": loadvm_state_cleanup",
    ),
)
