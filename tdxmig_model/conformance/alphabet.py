"""Which calls are tried in a state: all that the host can make with the bundles that there are.

Parameters are all pages, vCPUs and streams, the last of which is never created, and the newest
bundles of the log with one that nobody sent.  A call that no host can make is left out: an
instruction of a guest in which no vCPU is, an entry behind the end of a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tdxmig_model.conformance.twin import Call, Twin, Values
from tdxmig_model.model.words import SEPT

_PLAIN: Final = (
    "source_set_migration_key",
    "export_pause",
    "mem_track",
    "export_track",
    "export_track_start",
    "export_state_td",
    "export_abort",
    "export_abort_with_token",
    "destination_set_migration_key",
    "import_commit",
    "import_end",
    "import_abort",
)
_PENDING: Final = tuple(n for n, name in enumerate(SEPT.members) if name.startswith("PENDING"))
_EXPORT_ENTRY: Final = ("export_mem_migrate", "export_mem_remigrate", "export_mem_out_of_order")
_IMPORT_ENTRIES: Final = (
    "import_mem_migrate",
    "import_mem_migrate_pending",
    "import_mem_remigrate",
    "import_mem_remigrate_pending",
    "import_mem_cancel",
)
NEWEST: Final = 8
"""How many bundles of the log are tried, from the newest back."""


def calls(twin: Twin) -> Iterator[Call]:
    """Every call that is tried in the present state."""
    for row in _PLAIN:
        yield Call((row,), {})
    first = twin.get("session_used")
    yield Call(("export_state_immutable_other" if first else "export_state_immutable",), {})
    yield from _created_streams(twin)
    yield from _guest(twin)
    for page in range(twin.pages):
        for row in ("export_blockw", "export_unblockw", "export_restore"):
            yield Call((row,), {"p": page})
    for stream in range(twin.streams):
        yield from _exports(twin, stream)
        yield from _imports(twin, stream)
    for m in messages(twin):
        yield Call(("import_state_immutable",), {"m": m})
        yield Call(("import_state_td",), {"m": m})
        yield Call(("import_track", "import_track_start"), {"m": m})
    yield from _failures(twin)


def messages(twin: Twin) -> Iterator[int]:
    """The newest bundles, and behind the end of the log one that nobody sent."""
    length = len(twin.log)
    if length:
        yield from range(max(0, length - NEWEST), length + 1)


def _created_streams(twin: Twin) -> Iterator[Call]:
    for side in ("source", "destination"):
        if twin.get(f"{side}_num_migs") < twin.streams:
            yield Call((f"{side}_mig_stream_create",), {})


def _guest(twin: Twin) -> Iterator[Call]:
    inside = twin.source.inside
    if len(inside) < twin.vcpus:
        yield Call(("vp_enter",), {})
    epoch = twin.source.side.tdcs.td_epoch
    if any(one.epoch == epoch for one in inside):
        yield Call(("vp_exit",), {})
    if any(one.epoch != epoch for one in inside):
        yield Call(("vp_exit_previous",), {})
    for page in range(twin.pages if inside else 0):
        yield Call(("page_accept",), {"p": page})
        if twin.get("source_page")[page] not in _PENDING:
            yield Call(("guest_write",), {"p": page})
    if twin.destination.side.td.vcpus:
        yield Call(("destination_vp_enter",), {})


def _exports(twin: Twin, stream: int) -> Iterator[Call]:
    here = {"stream": stream}
    yield Call(("export_mem_begin",), here)
    yield Call(("export_mem_end",), here)
    # A vCPU in the guest is locked, which the module finds before anything else.
    inside = {one.vcpu for one in twin.source.inside}
    for v in set(range(twin.vcpus)) - inside:
        yield Call(("export_state_vp",), {**here, "v": v})
    if twin.room(stream):
        for page in range(twin.pages):
            yield Call(_EXPORT_ENTRY, {**here, "p": page})
            yield Call(("export_mem_cancel",), {**here, "p": page})
        yield Call(("export_mem_failed_entry",), here)
        yield Call(("export_mem_dropped",), here)


def _imports(twin: Twin, stream: int) -> Iterator[Call]:
    here = {"stream": stream}
    for m in messages(twin):
        yield Call(("import_mem_begin",), {**here, "m": m})
        for v in range(twin.vcpus):
            yield Call(("import_state_vp",), {**here, "m": m, "v": v})
    under_way = twin.get("destination_unfinished")[stream]
    if not under_way or _asks(twin, "import_mem_migrate", {**here, "p": 0}, "next_entry"):
        yield from _import_entries(twin, here)
    if _asks(twin, "import_mem_nop", here, "nop_or_late", "next_entry"):
        yield Call(("import_mem_nop",), here)
    if _asks(twin, "import_mem_end", here, "last_entry"):
        yield Call(("import_mem_end",), here)
    if twin.enabled("import_mem_refused", here):
        yield Call(("import_mem_refused",), here)


def _import_entries(twin: Twin, here: Values) -> Iterator[Call]:
    for page in range(twin.pages):
        for row in _IMPORT_ENTRIES:
            yield Call((row,), {**here, "p": page})


def _asks(twin: Twin, row: str, values: Values, *labels: str) -> bool:
    """Whether these conjuncts, which say what the call is and not whether it may be, hold."""
    return twin.unmet(row, values).isdisjoint(labels)


def _failures(twin: Twin) -> Iterator[Call]:
    for row in ("import_failure", "import_failure_live"):
        if twin.enabled(row, {}):
            yield Call((row,), {})
