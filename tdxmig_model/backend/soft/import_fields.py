"""Writing imported metadata fields into a TD, one by one, before their bundle is authenticated.

Facts of TDX module 1.5.01 (public source, metadata_td.c and metadata_vp.c): what is checked is the
value under the write mask, what is stored is the old value with the masked bits replaced, and bits
that an import does not write must be as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tdxmig_model.backend.soft.fields import Field
from tdxmig_model.backend.soft.leaves_build import (
    EPTP_WRITE_BACK_FOUR_LEVELS,
    attributes_valid,
    int_field,
    tdcs_pages_suffice,
    xfam_valid,
)
from tdxmig_model.backend.soft.metadata import Store
from tdxmig_model.backend.soft.servtd import binding_importable
from tdxmig_model.backend.soft.state import Tdcs, Tdr, Tdvps
from tdxmig_model.backend.soft.status import Status

NOT_VALID = int(Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
HP_LOCK_TIMEOUT_USEC = range(10_000, 100_000_001)
LAST_TD_EXITS = range(3)
"""LAST_TD_EXIT: asynchronous fault, asynchronous trap, TDG.VP.VMCALL."""

_COUNTERS = {
    "NUM_VCPUS": "num_vcpus",
    "EXPORT_COUNT": "export_count",
    "IMPORT_COUNT": "import_count",
}
_TD_CHECKS: dict[str, Callable[[Tdcs, int], bool]] = {
    "ATTRIBUTES": lambda _, value: attributes_valid(value, importing=True),
    "XFAM": lambda _, value: xfam_valid(value),
    "CONFIG_FLAGS": lambda _, value: value == 0,
    "EPTP": lambda tdcs, value: value == EPTP_WRITE_BACK_FOUR_LEVELS and tdcs.fields["GPAW"] == 0,
    "HP_LOCK_TIMEOUT": lambda _, value: value in HP_LOCK_TIMEOUT_USEC,
}
_VP_CHECKS: dict[str, Callable[[Tdcs, int], bool]] = {
    "VCPU_INDEX": lambda tdcs, value: value < tdcs.num_vcpus,
    "LAST_TD_EXIT": lambda _, value: value in LAST_TD_EXITS,
    "CURR_VM": lambda tdcs, value: value <= int_field(tdcs, "NUM_L2_VMS"),
    "IA32_XSS": lambda tdcs, value: not value & ~int_field(tdcs, "XFAM"),
}


def _merged(row: Field, old: list[int], words: tuple[int, ...], mask: int) -> list[int] | None:
    """The words to store, or None if a bit that is not writable would change."""
    writable, forbidden = row.import_mask & mask, mask & row.size_mask & ~row.import_mask
    if any((before ^ word) & forbidden for before, word in zip(old, words, strict=True)):
        return None
    return [before & ~writable | word & writable for before, word in zip(old, words, strict=True)]


def _store(
    target: dict[str, Any], row: Field, index: int, words: tuple[int, ...], mask: int
) -> int:
    """Write one field of a row into the values of a TD or a vCPU."""
    value = target.get(row.name, 0 if row.slots == 1 else (0,) * row.slots)
    slots = [value] if row.slots == 1 else list(value)
    part = slice(index * row.elements, (index + 1) * row.elements)
    merged = _merged(row, slots[part], words, mask)
    if merged is None:
        return NOT_VALID
    slots[part] = merged
    target[row.name] = slots[0] if row.slots == 1 else tuple(slots)
    return 0


def td_writer(tdr: Tdr, tdcs: Tdcs) -> Store:
    """The writer of immutable and mutable TD state."""

    def write(row: Field, index: int, words: tuple[int, ...], mask: int) -> int:
        name, value = row.name, words[0] & row.import_mask & mask
        check = _TD_CHECKS.get(name)
        if check is not None and not check(tdcs, value):
            return NOT_VALID
        if name == "TD_UUID":
            return _write_uuid(tdr, tdcs, row, words, mask)
        if name == "EPTP":
            # The root of the Secure EPT is this platform's own; only the controls are imported.
            tdcs.fields[name] = value | tdcs.sept.root_hpa
            return 0
        if name == "SERVTD_BINDINGS_TABLE":
            # A binding stays this platform's own; its type and attributes are compared.
            return 0 if binding_importable(tdcs.binding, words) else NOT_VALID
        if name == "NUM_CPUID_VALUES":
            return 0
        if name in _COUNTERS:
            kept = getattr(tdcs, _COUNTERS[name]) & ~(row.import_mask & mask)
            setattr(tdcs, _COUNTERS[name], kept | value)
            return 0
        status = _store(tdcs.fields, row, index, words, mask)
        if name == "NUM_L2_VMS" and not tdcs_pages_suffice(tdr, words[0]):
            return int(Status.TDX_TDCS_NOT_ALLOCATED)
        return status

    return write


def _write_uuid(tdr: Tdr, tdcs: Tdcs, row: Field, words: tuple[int, ...], mask: int) -> int:
    """The source's TD_UUID; the one before is what the Migration TD may still use."""
    tdcs.pre_import_uuid = tdr.uuid
    merged = _merged(row, list(tdr.uuid), words, mask)
    if merged is None:
        return NOT_VALID
    tdr.uuid = (merged[0], merged[1], merged[2], merged[3])
    return 0


def vcpu_writer(tdcs: Tdcs, vcpu: Tdvps) -> Store:
    """The writer of vCPU state."""

    def write(row: Field, index: int, words: tuple[int, ...], mask: int) -> int:
        check = _VP_CHECKS.get(row.name)
        if check is not None and not check(tdcs, words[0] & row.import_mask & mask):
            return NOT_VALID
        if row.name == "VCPU_STATE":
            # Looked at only if the vCPU here is DISABLED, which a new one never is.
            return 0
        return _store(vcpu.registers, row, index, words, mask)

    return write
