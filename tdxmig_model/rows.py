"""Which rows of the leaf model one call of a leaf is, in order.

A call that works through a GPA list is several rows: its begin, one bulk row for each kind of
entry, its end.  The enforcer asks before a call is made, the replay of a trace afterwards; both
take the rows one by one, since what a later row is may depend on the state that an earlier one
left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.errors import ModelError
from tdxmig_model.model import source_state
from tdxmig_model.monitor import Monitor

Pages = NDArray[np.int64]

CANCEL: Final = 2
"""GPA list operation 2 of EXPORT.MEM; the module chooses between MIGRATE and REMIGRATE itself."""

IMPORT_OPERATIONS: Final = {
    "migrate": (1, False),
    "migrate_pending": (1, True),
    "cancel": (2, False),
    "remigrate": (3, False),
    "remigrate_pending": (3, True),
}
"""GPA list operation and pending bit of IMPORT.MEM, by the name of the row that an entry is."""

_FIRST_TIME: Final = np.array([int(s.value) for s in source_state.FIRST_TIME])


@dataclass(frozen=True, slots=True)
class Row:
    """One step of the model; with `pages`, once for each of them (the step's parameter p)."""

    step: str
    params: Mapping[str, int]
    pages: Pages | None = None

    def take(self, monitor: Monitor) -> None:
        """Take the row, or raise Refused."""
        if self.pages is None:
            monitor.take(self.step, **self.params)
        else:
            monitor.take_each(self.step, "p", self.pages, **self.params)

    @property
    def touched(self) -> Pages:
        """The pages whose entries the row changes."""
        if self.pages is not None:
            return self.pages
        return np.array([self.params["p"]] if "p" in self.params else [], dtype=np.int64)

    @property
    def count(self) -> int:
        """How many steps of the model the row is."""
        return 1 if self.pages is None else len(self.pages)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a leaf, as the model needs it.

    `pages` are the page numbers of a GPA list, or what the guest accepted while it ran; `entries`
    those of IMPORT.MEM, by kind of entry; `message` is the position in the log of the bundle that
    an import takes.
    """

    side: str
    step: str
    stream: int = 0
    vcpu: int = 0
    operation: int = 1
    pages: Pages | None = None
    entries: Mapping[str, Pages] | None = None
    message: int | None = None


def rows_of(monitor: Monitor, call: Call) -> Iterator[Row]:
    """The rows of a call; each is to be taken before the next is asked for."""
    stream = {"stream": call.stream}
    match call.step:
        case "export_blockw" | "export_restore" | "export_unblockw":
            yield Row(call.step, {}, call.pages)
        case "export_mem":
            yield Row("export_mem_begin", stream)
            yield from _exported(monitor, call)
            yield Row("export_mem_end", stream)
        case "export_state_vp":
            yield Row(call.step, {**stream, "v": call.vcpu})
        case "import_mem":
            yield Row("import_mem_begin", {**stream, "m": _message(call)})
            for name, pages in (call.entries or {}).items():
                yield Row(f"import_mem_{name}", stream, pages)
            yield Row("import_mem_end", stream)
        case "import_state_immutable" | "import_track" | "import_track_start" | "import_state_td":
            yield Row(call.step, {"m": _message(call)})
        case "import_state_vp":
            yield Row(call.step, {**stream, "m": _message(call), "v": call.vcpu})
        case "vp_enter" if call.side == "destination":
            yield Row("destination_vp_enter", {})
        case "vp_enter":
            yield Row("vp_enter", {})
            if call.pages is not None:
                yield Row("page_accept", {}, call.pages)
            yield Row("vp_exit", {})
        case _:
            yield Row(call.step, {})


def _exported(monitor: Monitor, call: Call) -> Iterator[Row]:
    """What the module makes of each entry of EXPORT.MEM follows from the state of its page."""
    stream = {"stream": call.stream}
    assert call.pages is not None
    if call.operation == CANCEL:
        yield Row("export_mem_cancel", stream, call.pages)
    elif monitor.text("source_op_state") == "POST_EXPORT":
        yield Row("export_mem_out_of_order", stream, call.pages)
    else:
        first = np.isin(monitor["source_page"][call.pages], _FIRST_TIME)
        yield Row("export_mem_migrate", stream, call.pages[first])
        yield Row("export_mem_remigrate", stream, call.pages[~first])


def _message(call: Call) -> int:
    if call.message is None:
        raise ModelError(f"{call.step} takes a bundle, and none was given")
    return call.message
