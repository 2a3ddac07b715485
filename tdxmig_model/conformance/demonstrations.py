"""Public weaknesses shown on the software module, for models whose rows are no calls of a pair.

Each is the counterexample of its property in calls: what tdx-1.5.01 lets happen, and what stops it
in hardened.  References: specs/repairs.toml, by the repair that is named.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tdxmig_model.backend.soft.call import NO_PAGE, STREAM_COMMAND_BIT, Registers
from tdxmig_model.backend.soft.fields import FIELDS, identifier_key
from tdxmig_model.backend.soft.guest import EptViolation
from tdxmig_model.backend.soft.leaves_build import (
    ATTR_DEBUG,
    TD_PARAMS,
    TD_PARAMS_SIZE,
    attributes_valid,
    int_field,
)
from tdxmig_model.backend.soft.metadata import LIST_HEADER_SIZE, SLOT_SIZE
from tdxmig_model.backend.soft.module import Profile
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf
from tdxmig_model.backend.soft.status import FATAL_BIT, LOW_32, Status, is_error, status_name
from tdxmig_model.conformance import keys
from tdxmig_model.conformance.answers import INTERRUPTED
from tdxmig_model.conformance.replay import Replayed
from tdxmig_model.conformance.side import HOST_LP, Side, always, gpa_of
from tdxmig_model.conformance.twin import Call, Twin
from tdxmig_model.errors import ModelError
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.wire.constants import MAX_ENTRIES, PAGE_SIZE
from tdxmig_model.wire.mbmd import Mbmd

WRITE_MASK_VALID: Final = 1 << 51
TWO_PAGES: Final = 512
"""Bytes of each metadata page at which the immutable TD state takes two, so that it can be stopped.
"""
_NOTHING: Final[Mapping[str, int]] = MappingProxyType({})
_MAX_VCPUS, _EPTP, _TSC = 1, 0x1E, 100


class _Shown:
    """The calls of one demonstration as they go, and what they come to."""

    def __init__(self, profile: Profile, of: int) -> None:
        self.profile = profile
        self.of = of
        self.made = 0
        self.refused: list[tuple[int, str, str]] = []

    def call(self, name: str, status: int, *, counts: bool | None = None) -> bool:
        """Note a call; `counts` says whether it did what is to be shown, by default no error."""
        done = not is_error(status) or status == INTERRUPTED if counts is None else counts
        if done:
            self.made += 1
        else:
            word = status_name(status & ~LOW_32 & ~FATAL_BIT).removeprefix("TDX_")
            self.refused.append((self.made + len(self.refused) + 1, name, word))
        return done

    def end(self, *, reproduces: bool, why: str) -> Replayed:
        """The result."""
        return Replayed(self.profile, reproduces, self.made, self.of, tuple(self.refused), why)


# --- a pair with a session, and bundles that its sender forges ------------------------------------


def _pair(profile: Profile) -> tuple[Side, Side]:
    """A source and a destination whose Migration TDs have exchanged keys."""
    source = Side("source", profile, 1, 1, 1, 0)
    destination = Side("destination", profile, 1, 1, 1, 0)
    source.write_key(keys.key_of(1))
    destination.write_key(keys.FORWARD)
    keys.begin_observed(source)
    keys.begin_import(destination)
    return source, destination


def _export(side: Side, leaf: Leaf, rcx: int) -> tuple[Mbmd, list[bytes]]:
    """The MBMD and the pages of a state bundle."""
    buffers = side.buffers()
    pages = buffers.page_list(MAX_ENTRIES)
    lp = 0 if leaf is Leaf.EXPORT_STATE_VP else HOST_LP
    done = side.host.require(leaf, lp=lp, rcx=rcx, r8=buffers.mbmd_register, r9=pages)
    kept = [bytes(page) for page in buffers.read_pages(done.rdx)]
    return Mbmd.unpack(buffers.read_mbmd()), kept


def _opened(mbmd: Mbmd, pages: list[bytes]) -> list[bytes]:
    """The plaintext of a state bundle, for whoever has the session key."""
    sealed = b"".join(pages) + mbmd.mac
    plain = AESGCM(keys.FORWARD).decrypt(mbmd.iv(), sealed, mbmd.aad())
    return [plain[at : at + PAGE_SIZE] for at in range(0, len(plain), PAGE_SIZE)]


def _sealed(mbmd: Mbmd, plain: list[bytes]) -> tuple[Mbmd, list[bytes]]:
    """Such a bundle of other pages."""
    sealed = AESGCM(keys.FORWARD).encrypt(mbmd.iv(), b"".join(plain), mbmd.aad())
    pages = [sealed[at : at + PAGE_SIZE] for at in range(0, len(sealed) - 16, PAGE_SIZE)]
    return mbmd.with_mac(sealed[-16:]), pages


def _operands(side: Side, rcx: int, mbmd: Mbmd, pages: list[bytes]) -> dict[str, int]:
    """Registers of an import of this bundle."""
    buffers = side.buffers()
    buffers.write_mbmd(mbmd.pack())
    buffers.write_pages(pages)
    return {"rcx": rcx, "r8": buffers.mbmd_register, "r9": buffers.page_list(len(pages))}


# --- R3: something comes between an interrupted import and its RESUME -----------------------------


def import_taken_over(profile: Profile) -> Replayed:
    """TDH.MNG.INIT while IMPORT.STATE.IMMUTABLE is interrupted (CVE-2025-30513)."""
    shown = _Shown(profile, 3)
    source, destination = _pair(profile)
    source.host.module.list_size = TWO_PAGES
    mbmd, pages = _export(source, Leaf.EXPORT_STATE_IMMUTABLE, source.td.tdr)
    operands = _operands(destination, destination.td.tdr, mbmd, pages)
    pending = iter([False, True])
    leaf = Leaf.IMPORT_STATE_IMMUTABLE
    stopped = destination.call(leaf, operands, interrupt=lambda: next(pending))
    shown.call("import_state_immutable", stopped.rax)
    before = destination.tdcs.fields["ATTRIBUTES"]
    status = destination.call(Leaf.MNG_INIT, rcx=destination.td.tdr, rdx=_debug(destination)).rax
    changed = destination.tdcs.fields["ATTRIBUTES"] != before
    if not shown.call("mng_init", status, counts=changed):
        return shown.end(reproduces=False, why=f"the module refuses MNG.INIT: {_word(status)}")
    _operands(destination, destination.td.tdr, mbmd, pages)
    resumed = destination.call(leaf, operands, r10=STREAM_COMMAND_BIT).rax
    went_on = resumed & ~LOW_32 & ~FATAL_BIT not in _STOPPED
    shown.call("import_state_immutable, RESUME", resumed, counts=went_on)
    ended = f"to its end: {_word(resumed)}"
    why = f"MNG.INIT changed ATTRIBUTES of the half-imported TD, and RESUME went on {ended}"
    return shown.end(reproduces=went_on, why=why)


_STOPPED: Final = (Status.TDX_OP_STATE_INCORRECT, Status.TDX_INVALID_RESUMPTION)


def _debug(side: Side) -> int:
    """HPA of TD_PARAMS that ask for a debug TD, and are wrong in XFAM."""
    params = TD_PARAMS.pack(ATTR_DEBUG, 0, _MAX_VCPUS, 0, 0, b"", _EPTP, 0, _TSC, *[b""] * 4)
    place = side.buffers(1).buffers
    side.host.memory.bytes[place : place + TD_PARAMS_SIZE] = params.ljust(TD_PARAMS_SIZE, b"\0")
    return place


def _word(status: int) -> str:
    return status_name(status & ~LOW_32 & ~FATAL_BIT).removeprefix("TDX_")


# --- R2: what a forged metadata list can do -------------------------------------------------------


def required_field_skipped(profile: Profile) -> Replayed:
    """Immutable state in which a required field is present under write mask 0 ("eddie")."""
    shown, destination = _import_with_masked(profile, "EPTP")
    if shown.refused:
        return _refuses_bundle(shown)
    skipped = [one.detail for one in destination.host.module.findings]
    why = f"the import succeeds and a required field was never written: {', '.join(skipped)}"
    return shown.end(reproduces=bool(skipped), why=why)


def attributes_skipped(profile: Profile) -> Replayed:
    """The same of ATTRIBUTES, which are then those of no TD that was ever checked."""
    shown, destination = _import_with_masked(profile, "ATTRIBUTES")
    if shown.refused:
        return _refuses_bundle(shown)
    left = int_field(destination.tdcs, "ATTRIBUTES")
    why = f"the import succeeds and ATTRIBUTES are 0x{left:X}: not those of a migratable TD"
    return shown.end(reproduces=not attributes_valid(left, importing=True), why=why)


def _import_with_masked(profile: Profile, name: str) -> tuple[_Shown, Side]:
    """Import immutable state in which one field comes under write mask 0."""
    shown = _Shown(profile, 1)
    source, destination = _pair(profile)
    mbmd, pages = _export(source, Leaf.EXPORT_STATE_IMMUTABLE, source.td.tdr)
    plain = _opened(mbmd, pages)
    forged = _sealed(mbmd, [plain[0], _masked(plain[1], name), *plain[2:]])
    operands = _operands(destination, destination.td.tdr, *forged)
    status = destination.call(Leaf.IMPORT_STATE_IMMUTABLE, operands).rax
    shown.call("import_state_immutable", status)
    return shown, destination


def _masked(page: bytes, name: str) -> bytes:
    """The metadata page with one field under write mask 0, in a sequence of its own."""
    used, sequences = struct.unpack_from("<HH", page)
    places = range(LIST_HEADER_SIZE, used, SLOT_SIZE)
    wanted = FIELDS[name].identifier
    words = {at: struct.unpack_from("<Q", page, at)[0] for at in places}
    key = identifier_key(wanted)
    at, header = next((at, word) for at, word in words.items() if identifier_key(word) == key)
    end = at + 2 * SLOT_SIZE
    own = struct.pack("<QQ", wanted | WRITE_MASK_VALID, 0) + page[at + SLOT_SIZE : end]
    more = SLOT_SIZE
    if header != wanted:  # one more field is in this sequence, and begins one of its own
        own += struct.pack("<Q", FIELDS[_NEIGHBOUR[name]].identifier)
        more, sequences = more + SLOT_SIZE, sequences + 1
    changed = struct.pack("<HH", used + more, sequences) + page[4:at] + own + page[end:]
    return changed[:PAGE_SIZE]


_NEIGHBOUR: Final = MappingProxyType({"ATTRIBUTES": "XFAM"})
"""What the exporter puts into one sequence with a field."""


def _refuses_bundle(shown: _Shown) -> Replayed:
    return shown.end(reproduces=False, why=f"the module refuses the bundle: {shown.refused[-1][2]}")


def read_outside_a_list(profile: Profile) -> Replayed:
    """vCPU state with a list that is shorter than its header (CVE-2025-32007)."""
    shown = _Shown(profile, 3)
    source, destination = _pair(profile)
    immutable = _export(source, Leaf.EXPORT_STATE_IMMUTABLE, source.td.tdr)
    source.host.require(Leaf.EXPORT_PAUSE, rcx=source.td.tdr)
    state = _export(source, Leaf.EXPORT_STATE_TD, source.td.tdr)
    mbmd, pages = _export(source, Leaf.EXPORT_STATE_VP, source.td.vcpus[0])
    tdr = destination.td.tdr
    first = destination.call(Leaf.IMPORT_STATE_IMMUTABLE, _operands(destination, tdr, *immutable))
    shown.call("import_state_immutable", first.rax)
    second = destination.call(Leaf.IMPORT_STATE_TD, _operands(destination, tdr, *state))
    shown.call("import_state_td", second.rax)
    destination.create_vcpus()
    plain = _opened(mbmd, pages)
    _, sequences = struct.unpack_from("<HH", plain[0])
    plain[0] = struct.pack("<HH", 1, sequences + 1) + plain[0][4:]
    operands = _operands(destination, destination.td.vcpus[0], *_sealed(mbmd, plain))
    status = destination.call(Leaf.IMPORT_STATE_VP, operands, lp=0).rax
    found = [one.detail for one in destination.host.module.findings]
    if not shown.call("import_state_vp", status, counts=bool(found)):
        return shown.end(reproduces=False, why=f"the module refuses the list: {_word(status)}")
    why = f"the parser wants what is outside its list, which is not read here: {found[-1]}"
    return shown.end(reproduces=True, why=why)


# --- R5: keys that are no peer's ------------------------------------------------------------------


def one_key_for_both_directions(profile: Profile) -> Replayed:
    """The decryption key that is written is the TD's own encryption key."""
    shown = _Shown(profile, 2)
    source = Side("source", profile, 1, 1, 1, 0)
    shown.call("write_dec_key", source.write_key(source.tdcs.mig_enc_key))
    return _start(shown, source, "both directions of the session have one key")


def key_of_the_session_before(profile: Profile) -> Replayed:
    """The decryption key that is written is that of the session before."""
    shown = _Shown(profile, 4)
    source = Side("source", profile, 1, 1, 1, 0)
    shown.call("write_dec_key", source.write_key(keys.key_of(1)))
    _export(source, Leaf.EXPORT_STATE_IMMUTABLE, source.td.tdr)
    shown.call("start_export", 0)
    source.host.require(Leaf.EXPORT_ABORT, rcx=source.td.tdr)
    shown.call("write_dec_key", source.write_key(keys.key_of(1)))
    return _start(shown, source, "the session has the decryption key of the one before")


def _start(shown: _Shown, source: Side, why: str) -> Replayed:
    buffers = source.buffers()
    status = source.call(
        Leaf.EXPORT_STATE_IMMUTABLE,
        rcx=source.td.tdr,
        r8=buffers.mbmd_register,
        r9=buffers.page_list(MAX_ENTRIES),
    ).rax
    if shown.call("start_export", status):
        return shown.end(reproduces=True, why=why)
    return shown.end(reproduces=False, why=f"the module refuses to start: {_word(status)}")


# --- R4: an import leaf uses a stream of an export that is only beginning ------------------------

_TAKEN_OVER: Final[tuple[tuple[str, Mapping[str, int]], ...]] = (
    ("destination_mig_stream_create", _NOTHING),
    ("source_set_migration_key", _NOTHING),
    ("export_state_immutable", _NOTHING),
    ("export_pause", _NOTHING),
    ("export_state_td", _NOTHING),
    ("export_state_vp", {"stream": 0, "v": 0}),
    ("export_track_start", _NOTHING),
    ("destination_set_migration_key", _NOTHING),
    ("import_state_immutable", {"m": 0}),
    ("import_state_td", {"m": 1}),
    ("import_state_vp", {"stream": 0, "m": 2, "v": 0}),
    ("import_track_start", {"m": 3}),
    ("import_commit", _NOTHING),
)
_STREAM: Final = 1
"""Not stream 0, which the beginning export has in use."""


def bundle_of_another_session(profile: Profile) -> Replayed:
    """A TD that was taken over sends under the key with which it should only receive.

    Whoever sent it that key sent it to a third TD, which imports something else.
    """
    shown = _Shown(profile, len(_TAKEN_OVER) + 7)
    sender = _brought(shown, _TAKEN_OVER, streams=2).destination.side
    third = _third(profile)
    shown.call("import_state_immutable", 0)
    shown.call("write_dec_key", sender.write_key(_SHARED))
    buffers = sender.buffers()
    operands = {"rcx": sender.td.tdr, "r8": buffers.mbmd_register, "r9": buffers.page_list(3)}
    leaf = Leaf.EXPORT_STATE_IMMUTABLE
    shown.call("start_export", sender.call(leaf, operands, interrupt=always).rax)
    status = _memory(sender, Leaf.IMPORT_MEM)
    touched = sender.tdcs.links[1 + _STREAM].initialized
    if not shown.call("import_mem", status, counts=touched):
        why = f"the module refuses IMPORT.MEM while the export begins: {_word(status)}"
        return shown.end(reproduces=False, why=why)
    resumed = sender.call(leaf, operands, r10=STREAM_COMMAND_BIT).rax
    shown.call("start_export, RESUME", resumed)
    sent = _memory(sender, Leaf.EXPORT_MEM)
    shown.call("export_mem", sent)
    entry = _carry(sender, third)
    accepted = shown.call("import_mem", _memory(third, Leaf.IMPORT_MEM, entry))
    why = "a TD accepts a bundle of a session in which it has no part"
    return shown.end(reproduces=accepted, why=why)


_SHARED: Final = keys.key_of(7)
"""The key of one source that is given to two TDs."""


def _third(profile: Profile) -> Side:
    """A TD that imports what another source exports under the shared key."""
    source = Side("source", profile, 1, 1, 2, 0)
    third = Side("destination", profile, 1, 1, 2, 0)
    source.write_key(keys.key_of(1))
    source.tdcs.mig_enc_key = _SHARED
    third.write_key(_SHARED)
    for side in (source, third):
        side.create_stream()
    mbmd, pages = _export(source, Leaf.EXPORT_STATE_IMMUTABLE, source.td.tdr)
    operands = _operands(third, third.td.tdr, mbmd, pages)
    status = third.call(Leaf.IMPORT_STATE_IMMUTABLE, operands).rax
    if is_error(status):
        raise ModelError(f"import_state_immutable is refused: {_word(status)}")
    return third


def _carry(sender: Side, third: Side) -> int:
    """Bring the MBMD and the MAC of the bundle from one host to the other; its entry."""
    sent, taken = sender.buffers(_STREAM), third.buffers(_STREAM)
    taken.write_mbmd(sent.read_mbmd())
    mac = bytes(sender.host.memory.bytes[sent.macs_low : sent.macs_low + 16])
    third.host.memory.bytes[taken.macs_low : taken.macs_low + 16] = mac
    return int(sent.entries(1)[0])


def _memory(side: Side, leaf: Leaf, entry: int = 0) -> int:
    """A memory call with one entry, by default one that asks for nothing; its status."""
    buffers = side.buffers(_STREAM)
    gpas = buffers.gpa_list(np.array([entry], dtype=np.uint64))
    buffers.offer_buffers(1)
    operands = {
        "rcx": gpas,
        "rdx": side.td.tdr,
        "r8": buffers.mbmd_register,
        "r9": buffers.list,
        "r10": _STREAM,
        "r11": buffers.macs_low,
        "r12": buffers.macs_high,
        "r13": NO_PAGE,
    }
    return side.call(leaf, operands).rax


# --- R1 and R13: a call that fails after it has changed what counts ------------------------------

_FAILED_EXPORT: Final[tuple[tuple[str, Mapping[str, int]], ...]] = (
    ("source_set_migration_key", _NOTHING),
    ("export_state_immutable", _NOTHING),
    ("export_pause", _NOTHING),
    ("export_mem_begin", {"stream": 0}),
    ("export_mem_migrate", {"stream": 0, "p": 0}),
)


def failed_export(profile: Profile) -> Replayed:
    """The entry behind a page that was exported is malformed."""
    shown = _Shown(profile, len(_FAILED_EXPORT) + 1)
    twin = _brought(shown, _FAILED_EXPORT)
    before = twin.source.side.tdcs.total_mb_count
    answer = twin.source.take("export_mem_dropped", {"stream": 0})
    tdcs = twin.source.side.tdcs
    if not shown.call("export_mem", answer.status, counts=answer.accepted):
        why = "harmless: the malformed entry fails alone and the call goes on"
        shown.refused[-1] = (*shown.refused[-1][:2], answer.word)
        return shown.end(reproduces=False, why=why)
    lost = tdcs.mig_count == 1 and tdcs.total_mb_count == before
    why = f"MIG_COUNT has the page, TOTAL_MB_COUNT not its bundle: {answer.word}"
    return shown.end(reproduces=lost, why=why)


def _brought(
    shown: _Shown, moves: Sequence[tuple[str, Mapping[str, int]]], *, streams: int = 1
) -> Twin:
    """A pair on which these calls were made; ModelError if one is refused."""
    twin = Twin(MEMORY.under(shown.profile), shown.profile, pages=1, streams=streams)
    for row, values in moves:
        outcome = twin.attempt(Call((row,), values))
        if outcome.kind != "accepted":
            raise ModelError(f"{row} is refused: {outcome.answer}")
        shown.call(row, 0)
    return twin


# --- R8: a page that was cancelled ----------------------------------------------------------------

_SENT_AND_CANCELLED: Final[tuple[tuple[str, Mapping[str, int]], ...]] = (
    ("source_set_migration_key", _NOTHING),
    ("export_state_immutable", _NOTHING),
    ("export_pause", _NOTHING),
    ("export_mem_begin", {"stream": 0}),
    ("export_mem_migrate", {"stream": 0, "p": 0}),
    ("export_mem_end", {"stream": 0}),
    ("export_track", _NOTHING),
    ("export_mem_begin", {"stream": 0}),
    ("export_mem_cancel", {"stream": 0, "p": 0}),
    ("export_mem_end", {"stream": 0}),
    ("export_state_td", _NOTHING),
    ("export_state_vp", {"stream": 0, "v": 0}),
    ("export_track_start", _NOTHING),
    ("destination_set_migration_key", _NOTHING),
    ("import_state_immutable", {"m": 0}),
    ("import_mem_begin", {"stream": 0, "m": 1}),
    ("import_mem_migrate", {"stream": 0, "p": 0}),
    ("import_mem_end", {"stream": 0}),
    ("import_track", {"m": 2}),
    ("import_mem_begin", {"stream": 0, "m": 3}),
    ("import_mem_cancel", {"stream": 0, "p": 0}),
    ("import_mem_end", {"stream": 0}),
    ("import_state_td", {"m": 4}),
    ("import_state_vp", {"stream": 0, "m": 5, "v": 0}),
    ("import_track_start", {"m": 6}),
    ("import_end", _NOTHING),
)


def cancelled_page(profile: Profile) -> Replayed:
    """The guest wants a page back that was sent and cancelled (intel/tdx-module issue 18)."""
    shown = _Shown(profile, len(_SENT_AND_CANCELLED) + 1)
    side = _brought(shown, _SENT_AND_CANCELLED).destination.side
    try:
        status = _accept(side)
    except EptViolation:
        page = side.spare_page()
        side.host.require(Leaf.MEM_PAGE_AUG, rcx=gpa_of(0), rdx=side.td.tdr, r8=page)
        why = f"harmless: ACCEPT exits to the VMM, which adds the page; then {_word(_accept(side))}"
        return shown.end(reproduces=False, why=why)
    shown.call("accept_without_page", status, counts=is_error(status))
    why = f"the guest is told {_word(status)} for a page that it can never have back"
    return shown.end(reproduces=is_error(status), why=why)


def _accept(side: Side) -> int:
    """TDG.MEM.PAGE.ACCEPT of page 0 by the guest; its status."""
    registers = Registers(rcx=gpa_of(0))
    return side.host.module.tdcall(GuestLeaf.MEM_PAGE_ACCEPT, registers, side.td.vcpus[0])


DEMONSTRATIONS: Final[Mapping[str, Callable[[Profile], Replayed]]] = MappingProxyType(
    {
        "P9": bundle_of_another_session,
        "P21": import_taken_over,
        "P41": import_taken_over,
        "P22": required_field_skipped,
        "P23": attributes_skipped,
        "P24": read_outside_a_list,
        "P28": one_key_for_both_directions,
        "P29": key_of_the_session_before,
        "P40": failed_export,
        "P48": cancelled_page,
    }
)
"""By the property that they break in tdx-1.5.01."""

NOT_SHOWN: Final[Mapping[str, str]] = MappingProxyType(
    {"P11": "the release knows migration version 0 alone, and the module refuses to write another"}
)
"""Why no calls break a property that a model of tdx-1.5.01 breaks."""
