"""What both halves have: the state of the two modules, by the names of the model's variables.

A counter of a stream is looked at in a session only: afterwards the module keeps what it was, and
the model too, until the stream is used again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from tdxmig_model.backend.soft.memory import MIG_EPOCH_MASK
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.sept import (
    HPA_MASK,
    READABLE_STATES,
    REMOVED_EPOCH_MASK,
    REMOVED_EPOCH_SHIFT,
    WRITE_BIT,
    SeptState,
)
from tdxmig_model.backend.soft.state import MigscLink, VcpuState
from tdxmig_model.conformance.answers import Sent
from tdxmig_model.conformance.side import Side
from tdxmig_model.expr import EnumType, System
from tdxmig_model.model.words import BUNDLE, OPERATION
from tdxmig_model.observation import SCALARS
from tdxmig_model.wire.gpa_list import GpaEntry
from tdxmig_model.wire.mbmd import BundleType, Mbmd

Get = Callable[[str], Any]
"""The value of a variable in the state of the model."""

Differences = dict[str, tuple[object, object]]
"""Name -> (in the model, in the modules)."""

_EXPORTING: Final = (OpState.LIVE_EXPORT, OpState.PAUSED_EXPORT, OpState.POST_EXPORT)
_IMPORTING: Final = (
    OpState.MEMORY_IMPORT,
    OpState.STATE_IMPORT,
    OpState.POST_IMPORT,
    OpState.LIVE_IMPORT,
)

_SCALAR_OF: Final[dict[str, Callable[[Any], int | str]]] = {
    "op_state": lambda tdcs: str(tdcs.op_state.name),
    "mig_dec_key_set": lambda tdcs: int(tdcs.mig_dec_key_set),
    "num_migs": lambda tdcs: int(tdcs.num_migs),
}


def digest(content: bytes) -> str:
    """A page's content, short."""
    return hashlib.sha256(content).hexdigest()[:12]


def scalars(side: Side) -> dict[str, int | str]:
    """The fields of the TDCS that the model has as scalars, by variable name."""
    tdcs = side.tdcs
    found: dict[str, int | str] = {}
    for key in SCALARS[side.name]:
        read = _SCALAR_OF.get(key)
        found[f"{side.name}_{key}"] = read(tdcs) if read else int(getattr(tdcs, key))
    if side.name == "source":
        odd = tdcs.td_epoch & 1
        found["source_refcount"] = tdcs.refcount[odd]
        found["source_refcount_previous"] = tdcs.refcount[1 - odd]
    return found


def _is_unfinished(link: MigscLink, leaf: Leaf) -> bool:
    record = link.migsc.interrupted
    return link.initialized and record is not None and record.leaf == leaf


def source_maps(side: Side, pages: int, streams: int) -> dict[str, list[Any]]:
    """The source's maps; of counters and calls those of a session."""
    tdcs = side.tdcs
    words = [side.entry(page) for page in range(pages)]
    readable = [side.state_of(page) in READABLE_STATES for page in range(pages)]
    vcpus = [side.tdvps(vcpu) for vcpu in range(side.vcpus)]
    found: dict[str, list[Any]] = {
        "source_page": side.states(pages),
        # A pending page has no permissions; what the model keeps of it is not looked at.
        "source_writable": [
            bool(word & WRITE_BIT) if there else None
            for word, there in zip(words, readable, strict=True)
        ],
        "source_vcpu_export_count": [v.export_count if v else None for v in vcpus],
    }
    if tdcs.op_state in _EXPORTING:
        links = [tdcs.links[1 + i] if 1 + i < tdcs.num_migs else None for i in range(streams)]
        found["source_next_mb_counter"] = [
            link.migsc.next_mb_counter if link and link.initialized else 0 for link in links
        ]
        found["source_unfinished"] = [
            bool(link) and _is_unfinished(link, Leaf.EXPORT_MEM) if link else False
            for link in links
        ]
    return found


def destination_maps(side: Side, pages: int, streams: int) -> dict[str, list[Any]]:
    """The destination's maps; of counters those of a session."""
    tdcs, memory = side.tdcs, side.host.memory
    states = side.states(pages)
    epochs: list[int | None] = []
    for page, state in enumerate(states):
        word = side.entry(page)
        if state in (SeptState.MAPPED, SeptState.PENDING):
            epochs.append(memory.bepoch[(word & HPA_MASK) >> 12] & MIG_EPOCH_MASK)
        elif state == SeptState.REMOVED:
            epochs.append((word & REMOVED_EPOCH_MASK) >> REMOVED_EPOCH_SHIFT)
        else:
            epochs.append(None)
    vcpus = [side.tdvps(vcpu) for vcpu in range(side.vcpus)]
    found: dict[str, list[Any]] = {
        "destination_page": states,
        "destination_page_epoch": list(epochs),
        "destination_vcpu_imported": [v is not None and v.state is VcpuState.READY for v in vcpus],
    }
    if tdcs.op_state in _IMPORTING:
        found["destination_expected_mb_counter"] = [
            link.migsc.expected_mb_counter if link.initialized else 0
            for link in _forward(side, streams)
        ]
    return found


def _forward(side: Side, streams: int) -> list[MigscLink]:
    return side.tdcs.links[1 : 1 + streams]


def resumable(side: Side, streams: int) -> list[bool]:
    """For each stream whether an IMPORT.MEM can be resumed in the present epoch."""
    found = []
    for link in _forward(side, streams):
        record = link.migsc.interrupted
        same = record is not None and record.mig_epoch == side.tdcs.mig_epoch
        found.append(same and _is_unfinished(link, Leaf.IMPORT_MEM))
    return [*found, *[False] * (streams - len(found))]


def compare_maps(get: Get, found: Mapping[str, list[Any]]) -> Differences:
    """Where the model has something else; None is no observation."""
    wrong: Differences = {}
    for name, values in found.items():
        model = get(name)
        for at, value in enumerate(values):
            if value is not None and model[at] != value:
                wrong[f"{name}[{at}]"] = (model[at], value)
    return wrong


def compare_scalars(system: System, get: Get, found: Mapping[str, int | str]) -> Differences:
    """Where the model has something else."""
    wrong: Differences = {}
    for name, value in found.items():
        kind = system.variable(name).kind
        model = kind.members[get(name)] if isinstance(kind, EnumType) else int(get(name))
        if model != value:
            wrong[name] = (model, value)
    return wrong


def compare_bundle(get: Get, at: int, sent: Sent, width: int) -> Differences:
    """A bundle of the log against the model's; `width` is the size of the index of entries.

    The first entry of a list and those behind the model's are NOPs of the host.
    """
    mbmd = Mbmd.unpack(sent.mbmd)
    found: dict[str, object] = {
        "log_kind": mbmd.bundle_type.name,
        "log_epoch": mbmd.mig_epoch,
        "log_counter": mbmd.mb_counter,
        "log_stream": mbmd.migs_index,
    }
    if mbmd.bundle_type is BundleType.EPOCH_TOKEN:
        found["log_total"] = mbmd.total_mb
    model: dict[str, object] = {name: get(name)[at] for name in found}
    model["log_kind"] = BUNDLE.members[get("log_kind")[at]]
    if mbmd.bundle_type is BundleType.MEM:
        for slot in range(int(get("log_entries")[at])):
            place = at * width + slot
            raw = sent.entries.get(slot + 1, 0)
            entry = GpaEntry.from_int(raw)
            operation = OPERATION.members[get("entry_operation")[place]]
            model[f"entry {slot}"] = (operation,)
            found[f"entry {slot}"] = (entry.operation.name,)
            if operation == "NOP":
                continue
            pending = bool(get("entry_pending")[place]) and operation != "CANCEL"
            model[f"entry {slot}"] = (operation, get("entry_page")[place], pending)
            found[f"entry {slot}"] = (
                entry.operation.name,
                (entry.gpa >> 12) - 1,
                entry.pending and operation != "CANCEL",
            )
    return {f"{n}[{at}]": (model[n], found[n]) for n in found if model[n] != found[n]}
