"""Which calls of leaves make up which lifecycle event, in the trace of one side.

A lifecycle record stands after the records of the leaves that its event called.  Between two such
records there may only be what belongs to the second, and what the guest did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from tdxmig_model.trace import Record

_OF_THE_GUEST: Final = ("vp_enter", "export_unblockw")
_MEMORY: Final = "export_blockw (mem_track export_mem )?|export_mem "

PROGRAMS: Final[Mapping[str, Mapping[str, str]]] = {
    "source": {
        "setup": "",
        "export_immutable": "export_state_immutable ",
        "confirm_import": "",
        "start_epoch": "export_track ",
        "export_memory": _MEMORY,
        "cancel_page": _MEMORY,
        "pause": "export_pause ",
        "export_td_state": "export_state_td ",
        "export_vcpu_state": "export_state_vp ",
        "finish_epochs": "export_track_start ",
        "abort": "export_abort (export_restore )*",
        "abort_with_token": "export_abort_with_token (export_restore )*",
        "cleanup": "",
    },
    "destination": {
        "setup": "",
        "import_immutable": "import_state_immutable ",
        "import_epoch": "import_track ",
        "import_memory": "import_mem ",
        "import_td_state": "import_state_td ",
        "import_vcpu_state": "import_state_vp ",
        "import_start_token": "import_track_start ",
        "commit": "import_commit ",
        "end": "import_end ",
        "abort": "(import_abort )?",
        "cleanup": "",
    },
}
"""Regular expression over the leaves that succeeded, each followed by a space, by event."""

_ENDINGS: Final = ("abort", "abort_with_token", "cleanup")


def misattributed(trace: Iterable[Record]) -> tuple[Record, str] | None:
    """The first record whose leaves and events do not fit together, and what is wrong with it.

    An event that failed leaves its calls behind without a lifecycle record; a note says why, and
    only giving up can follow.  A trace may end in the middle of an event: its process was killed.
    """
    pending: list[Record] = []
    given_up = False
    last: Record | None = None
    for record in trace:
        last = record
        if record.kind == "leaf":
            succeeded = record.status is not None and not record.status >> 63
            if succeeded and record.step not in _OF_THE_GUEST:
                pending.append(record)
        elif record.kind == "lifecycle":
            problem = _wrong_event(record, pending)
            if not problem and given_up and record.step not in _ENDINGS:
                problem = f"{record.step} after an event that was not completed"
            if problem:
                return record, problem
            pending, given_up = [], False
        elif pending:
            if problem := _no_beginning(record.side, pending):
                return record, problem
            pending, given_up = [], True
    problem = _no_beginning(last.side, pending) if last else ""
    return (pending[0], problem) if problem else None


def _wrong_event(record: Record, pending: list[Record]) -> str:
    program = PROGRAMS[record.side].get(record.step)
    if program is None:
        return f"{record.step} is no lifecycle event of the {record.side}"
    steps = [leaf.step for leaf in pending]
    if re.fullmatch(program, "".join(f"{step} " for step in steps)) is None:
        return f"{record.step} does not consist of {', '.join(steps) or 'no call at all'}"
    for leaf in pending:
        ours, theirs = record.params.get("vcpu"), leaf.params.get("vcpu")
        if ours != theirs and "vcpu" in leaf.params:
            return f"{record.step} of vCPU {ours} calls {leaf.step} of vCPU {theirs}"
    return ""


def _no_beginning(side: str, pending: list[Record]) -> str:
    """Why these calls are not those of one event that was begun."""
    steps = [leaf.step for leaf in pending]
    for program in PROGRAMS[side].values():
        if set(steps) <= set(re.findall(r"\w+", program)):
            return ""
    return f"{', '.join(steps)} belong to no lifecycle event"
