"""What is claimed of the lifecycle: the order of events that an honest host keeps, ids O1..On."""

from __future__ import annotations

from collections.abc import Callable

from tdxmig_model.expr import (
    Goal,
    Node,
    Property,
    Size,
    all_of,
    any_of,
    count,
    forall,
    implies,
    not_,
)
from tdxmig_model.model.lifecycle_events import (
    abort_token,
    confirmation,
    destination_epoch,
    destination_owns,
    destination_vcpu_imported,
    epoch_position,
    exported_vcpus,
    imported_vcpus,
    in_destination,
    in_source,
    is_record,
    paused,
    received,
    record_epoch,
    record_kind,
    sent,
    source_confirmed,
    source_epoch,
    source_owns,
    source_vcpu_exported,
    td_position,
)
from tdxmig_model.model.words import MESSAGE, START_EPOCH, VCPU


def _every_record(body: Callable[[Node], Node]) -> Node:
    """For every record sent."""
    return forall(
        {"m": MESSAGE},
        lambda m: implies(all_of(m.ge(0), m.lt(sent)), body(m)),
        lambda m: (record_kind[m],),
    )


def _every_pair(body: Callable[[Node, Node], Node]) -> Node:
    """For every record a sent before a record b."""
    return forall(
        {"a": MESSAGE, "b": MESSAGE},
        lambda a, b: implies(all_of(a.ge(0), a.lt(b), b.lt(sent)), body(a, b)),
        lambda a, b: (record_kind[a], record_kind[b]),
    )


def _token(epoch: Node) -> Node:
    """The token of an epoch is an epoch token, and a start token for the start epoch."""
    position = epoch_position[epoch]
    return any_of(
        all_of(epoch.lt(START_EPOCH), is_record(position, "EPOCH")),
        all_of(epoch.eq(START_EPOCH), is_record(position, "START_TOKEN")),
    )


_source_may_run = any_of(
    in_source("IDLE", "READY", "LIVE", "ABORTED"), all_of(in_source("CLOSED"), source_owns)
)

_importing = in_destination("MEMORY", "STATE", "MAY_COMMIT", "COMMITTED", "ENDED")
_td_state_sent = is_record(td_position, "TD_STATE")
_vcpu_records = count("vCPU records", MESSAGE, lambda m: is_record(m, "VCPU_STATE"))
_start_token_sent = source_epoch.eq(START_EPOCH)

PROPERTIES = (
    Property(
        "O1",
        _every_record(
            lambda m: any_of(
                all_of(m.eq(0), is_record(m, "IMMUTABLE")),
                all_of(m.gt(0), not_(is_record(m, "IMMUTABLE"))),
            )
        ),
        "The immutable state is the first record of a migration, and the only one of its kind.",
        "lifecycle",
        guards=(
            ("export_memory", "phase"),
            ("start_epoch", "phase"),
            ("export_immutable", "phase"),
        ),
        witness=sent.gt(1),
    ),
    Property(
        "O2",
        _every_record(
            lambda m: implies(
                all_of(is_record(m, "MEMORY"), record_epoch[m].ge(1)),
                all_of(
                    epoch_position[record_epoch[m]].ge(0),
                    epoch_position[record_epoch[m]].lt(m),
                    _token(record_epoch[m]),
                    record_epoch[epoch_position[record_epoch[m]]].eq(record_epoch[m]),
                ),
            )
        ),
        "From epoch 1 on, an epoch's token is sent before the memory of that epoch.",
        "lifecycle",
        guards=(("start_epoch", "epoch_overflow"),),
        witness=all_of(sent.gt(2), is_record(sent - 1, "MEMORY"), record_epoch[sent - 1].ge(1)),
    ),
    Property(
        "O3",
        _every_pair(
            lambda a, b: implies(
                is_record(a, "START_TOKEN"),
                all_of(is_record(b, "MEMORY"), record_epoch[b].eq(START_EPOCH)),
            )
        ),
        "After the start token only out-of-order memory is sent.",
        "lifecycle",
        guards=(("pause", "phase"), ("export_td_state", "phase")),
        witness=all_of(in_source("HANDED_OVER"), is_record(sent - 1, "MEMORY")),
    ),
    Property(
        "O4",
        all_of(
            _every_record(
                lambda m: implies(
                    any_of(is_record(m, "TD_STATE"), is_record(m, "VCPU_STATE")), paused
                )
            ),
            _every_record(
                lambda m: implies(
                    is_record(m, "VCPU_STATE"),
                    all_of(td_position.lt(m), is_record(td_position, "TD_STATE")),
                )
            ),
        ),
        "TD state is sent only after the pause, and vCPU state only after TD state.",
        "lifecycle",
        guards=(("export_td_state", "phase"), ("export_vcpu_state", "phase")),
        witness=is_record(sent - 1, "VCPU_STATE"),
    ),
    Property(
        "O5",
        all_of(
            _every_record(
                lambda m: implies(
                    is_record(m, "START_TOKEN"),
                    all_of(
                        forall({"v": VCPU}, lambda v: source_vcpu_exported[v]),
                        source_confirmed,
                    ),
                )
            ),
            implies(
                in_destination("MAY_COMMIT", "COMMITTED", "ENDED"),
                forall({"v": VCPU}, lambda v: destination_vcpu_imported[v]),
            ),
        ),
        "The start token is sent after every vCPU and the confirmation, taken after every vCPU.",
        "lifecycle",
        guards=(
            ("finish_epochs", "every_vcpu"),
            ("finish_epochs", "confirmed"),
        ),
        witness=in_destination("MAY_COMMIT"),
    ),
    Property(
        "O6",
        not_(all_of(_source_may_run, destination_owns)),
        "Never may both sides run the TD.",
        "lifecycle",
        guards=(
            ("abort_with_token", "abort_token"),
            ("abort", "phase"),
            ("destination_abort", "phase"),
        ),
        witness=in_destination("ENDED"),
    ),
    Property(
        "O7",
        _every_record(
            lambda m: implies(is_record(m, "START_TOKEN"), implies(source_owns, abort_token))
        ),
        "After the start token the source gets the TD back only with an abort token.",
        "lifecycle",
        guards=(("abort_with_token", "abort_token"), ("abort", "phase")),
        witness=all_of(source_owns, is_record(sent - 1, "START_TOKEN")),
    ),
    Property(
        "O8",
        implies(
            destination_owns,
            all_of(
                received.gt(0),
                destination_epoch.eq(START_EPOCH),
                is_record(epoch_position[START_EPOCH], "START_TOKEN"),
                epoch_position[START_EPOCH].lt(received),
            ),
        ),
        "The import ends only after the start token was taken.",
        "lifecycle",
        guards=(("end", "phase"), ("commit", "phase")),
        witness=destination_owns,
    ),
    Property(
        "O9",
        implies(
            all_of(not_(source_owns), not_(destination_owns)),
            any_of(
                abort_token,
                in_destination("MEMORY", "STATE", "MAY_COMMIT"),
            ),
        ),
        "While no side owns the TD there is an abort token, or a destination that can make one.",
        "lifecycle",
        guards=(("finish_epochs", "confirmed"), ("confirm_import", "confirmation")),
        witness=not_(source_owns),
    ),
)

LEMMAS = (
    Property(
        "source_shape",
        all_of(
            sent.ge(0),
            implies(in_source("IDLE", "READY"), sent.eq(0)),
            implies(in_source("LIVE", "PAUSED", "STATE_EXPORT", "HANDED_OVER"), sent.ge(1)),
            source_epoch.ge(0),
            source_epoch.le(START_EPOCH),
            implies(
                in_source("IDLE", "READY", "LIVE", "PAUSED", "STATE_EXPORT"),
                all_of(source_epoch.lt(START_EPOCH), source_owns),
            ),
            implies(
                in_source("HANDED_OVER"),
                all_of(source_epoch.eq(START_EPOCH), not_(source_owns)),
            ),
            implies(in_source("ABORTED"), source_owns),
            implies(in_source("PAUSED", "STATE_EXPORT", "HANDED_OVER"), paused),
            implies(
                in_source("STATE_EXPORT"),
                all_of(
                    td_position.ge(0),
                    td_position.lt(sent),
                    is_record(td_position, "TD_STATE"),
                ),
            ),
        ),
        "The source owns the TD until it hands it over, and again after an abort.",
        "lemma",
    ),
    Property(
        "records",
        _every_record(
            lambda m: all_of(
                record_epoch[m].ge(0),
                record_epoch[m].le(source_epoch),
                implies(
                    is_record(m, "START_TOKEN"),
                    all_of(
                        record_epoch[m].eq(START_EPOCH),
                        epoch_position[START_EPOCH].eq(m),
                        in_source("HANDED_OVER", "ABORTED", "CLOSED"),
                    ),
                ),
                implies(is_record(m, "EPOCH"), record_epoch[m].lt(START_EPOCH)),
                implies(
                    any_of(is_record(m, "TD_STATE"), is_record(m, "VCPU_STATE")),
                    all_of(not_(in_source("IDLE", "READY", "LIVE", "PAUSED")), td_position.ge(0)),
                ),
                implies(
                    in_source("IDLE", "READY", "LIVE", "PAUSED", "STATE_EXPORT"),
                    not_(is_record(m, "START_TOKEN")),
                ),
            )
        ),
        "Only a source that handed the TD over has sent a start token.",
        "lemma",
    ),
    Property(
        "epochs",
        implies(
            source_epoch.ge(1),
            all_of(
                epoch_position[source_epoch].ge(0),
                epoch_position[source_epoch].lt(sent),
                _token(source_epoch),
                record_epoch[epoch_position[source_epoch]].eq(source_epoch),
            ),
        ),
        "The token of the current epoch has been sent.",
        "lemma",
    ),
    Property(
        "handed_over",
        implies(
            not_(source_owns),
            all_of(
                source_epoch.eq(START_EPOCH),
                source_confirmed,
                is_record(epoch_position[START_EPOCH], "START_TOKEN"),
                in_source("HANDED_OVER", "CLOSED"),
            ),
        ),
        "The TD is handed over by a start token, to a destination that confirmed.",
        "lemma",
    ),
    Property(
        "destination_shape",
        all_of(
            received.ge(0),
            received.le(sent),
            implies(source_confirmed, confirmation),
            implies(confirmation, not_(in_destination("IDLE", "READY"))),
            implies(
                confirmation,
                any_of(
                    abort_token,
                    in_destination("MEMORY", "STATE", "MAY_COMMIT", "COMMITTED", "ENDED", "CLOSED"),
                ),
            ),
            implies(
                all_of(confirmation, in_destination("CLOSED")),
                any_of(abort_token, destination_owns),
            ),
            implies(
                in_destination("MEMORY", "STATE", "MAY_COMMIT", "COMMITTED", "ENDED"), confirmation
            ),
            implies(abort_token, in_destination("ABORTED", "CLOSED")),
            implies(received.eq(0), not_(any_of(abort_token, _importing))),
            not_(all_of(abort_token, destination_owns)),
            implies(destination_owns, in_destination("COMMITTED", "ENDED", "CLOSED")),
            implies(in_destination("COMMITTED", "ENDED"), destination_owns),
        ),
        "A destination that confirmed owns the TD, can still give up, or has made a token.",
        "lemma",
    ),
    Property(
        "started",
        implies(
            any_of(in_destination("MAY_COMMIT"), destination_owns),
            all_of(
                not_(source_owns),
                destination_epoch.eq(START_EPOCH),
                is_record(epoch_position[START_EPOCH], "START_TOKEN"),
                epoch_position[START_EPOCH].lt(received),
                epoch_position[START_EPOCH].ge(0),
            ),
        ),
        "A destination that may run has taken the start token, and the source has let go.",
        "lemma",
    ),
    Property(
        "nothing_beyond",
        forall(
            {"m": MESSAGE},
            lambda m: implies(m.ge(sent), is_record(m, "MEMORY")),
            lambda m: (record_kind[m],),
        ),
        "A position to which nothing was sent yet holds no token and no state.",
        "lemma",
    ),
    Property(
        "state_records",
        all_of(
            _vcpu_records.below(sent).eq(exported_vcpus),
            implies(in_source("IDLE", "READY", "LIVE", "PAUSED"), not_(_td_state_sent)),
            _every_record(
                lambda m: implies(is_record(m, "TD_STATE"), m.eq(td_position)),
            ),
            forall(
                {"m": MESSAGE},
                lambda m: implies(
                    all_of(_td_state_sent, m.gt(td_position), m.lt(sent)),
                    any_of(
                        is_record(m, "VCPU_STATE"),
                        all_of(_start_token_sent, m.ge(epoch_position[START_EPOCH])),
                    ),
                ),
                lambda m: (record_kind[m], _vcpu_records.below(m)),
            ),
            implies(
                _start_token_sent,
                _vcpu_records.below(epoch_position[START_EPOCH]).eq(Size(VCPU)),
            ),
        ),
        "After the state of the TD comes that of each vCPU, and then the start token.",
        "lemma",
    ),
    Property(
        "state_taken",
        all_of(
            implies(
                any_of(received.eq(0), in_destination("IDLE", "READY", "MEMORY", "STATE")),
                all_of(
                    _vcpu_records.below(received).eq(imported_vcpus),
                    any_of(not_(_start_token_sent), received.le(epoch_position[START_EPOCH])),
                ),
            ),
            implies(
                in_destination("STATE"),
                all_of(
                    td_position.ge(0),
                    td_position.lt(received),
                    _td_state_sent,
                ),
            ),
        ),
        "Up to the start token the destination has taken as many vCPUs as records of vCPUs.",
        "lemma",
    ),
)

GOALS = (
    Goal(
        "migrated",
        all_of(in_destination("CLOSED"), destination_owns, in_source("CLOSED")),
        "A migration completes and both sides clean up.",
    ),
    Goal("abort", all_of(in_source("ABORTED"), sent.gt(1)), "The source aborts before the end."),
    Goal(
        "abort_with_token",
        all_of(in_source("ABORTED"), source_epoch.eq(START_EPOCH)),
        "The source takes the TD back with an abort token.",
    ),
    Goal(
        "post_copy",
        all_of(in_destination("COMMITTED"), is_record(received - 1, "MEMORY")),
        "A page arrives after the destination has taken the TD over.",
    ),
    Goal("second_epoch", source_epoch.eq(2), "A second pass over memory begins."),
)
