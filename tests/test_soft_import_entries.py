"""What an IMPORT.MEM entry can have wrong with it, row by row, in order and out of order.

The sender has the session key, so every MAC is right unless the row is about a MAC.
"""

from typing import NamedTuple

import numpy as np
import pytest
from soft_pair import CANCEL, MIGRATE, Forger, Pair

from tdxmig_model.backend.soft.call import NO_PAGE
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.memory import PageType
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.sept import LOCK_BIT, SeptState
from tdxmig_model.backend.soft.status import (
    FATAL_BIT,
    Operand,
    Status,
    describe_status,
    with_operand,
)
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import GpaEntry, GpaOperation, GpaStatus
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import Bundle

NOP, REMIGRATE = GpaOperation.NOP, GpaOperation.REMIGRATE
HERE, PENDING_HERE, NEW = 0, 5 * PAGE_SIZE, 6 * PAGE_SIZE
"""A mapped page, a pending page and one that was not imported."""


def entry(operation, gpa, **fields):
    return GpaEntry(gpa, operation, **fields).to_int()


class Row(NamedTuple):
    """One way to be wrong; `severity` A ends the import, B only while it is in order."""

    name: str
    entry: int
    status: Status
    entry_status: GpaStatus
    severity: str
    operand: Operand | None = Operand.GPA_LIST_ENTRY
    phases: tuple[str, ...] = ("in order", "out of order")
    mac: bytes | None = None


IN_ORDER, OUT_OF_ORDER = ("in order",), ("out of order",)
WRONG_STATE = Status.TDX_EPT_ENTRY_STATE_INCORRECT, GpaStatus.SEPT_ENTRY_STATE_INCORRECT
INVALID = Status.TDX_OPERAND_INVALID, GpaStatus.GPA_LIST_ENTRY_INVALID
BAD_MAC = Status.TDX_INVALID_PAGE_MAC, GpaStatus.INVALID_PAGE_MAC
OTHER_PHASE = Status.TDX_OP_STATE_INCORRECT, GpaStatus.OP_STATE_INCORRECT
SAME_EPOCH = Status.TDX_MIGRATED_IN_CURRENT_EPOCH, GpaStatus.MIGRATED_IN_CURRENT_EPOCH
ZERO = bytes(16)

ROWS = [
    Row("NOP with a wrong MAC", entry(NOP, NEW), *BAD_MAC, "A", mac=ZERO),
    Row("NOP with reserved bits", entry(NOP, NEW) | 1 << 54, *INVALID, "A"),
    Row("reserved bits", entry(MIGRATE, NEW) | 1 << 61, *INVALID, "A"),
    Row("level", entry(MIGRATE, NEW) | 1, *INVALID, "A"),
    Row("shared GPA", entry(MIGRATE, 1 << 47), *INVALID, "A"),
    Row("mapped", entry(MIGRATE, HERE), *WRONG_STATE, "B"),
    Row("pending", entry(MIGRATE, PENDING_HERE), *WRONG_STATE, "B"),
    Row("wrong MAC", entry(MIGRATE, NEW), *BAD_MAC, "A", mac=ZERO),
    Row("pending, wrong MAC", entry(MIGRATE, NEW, pending=True), *BAD_MAC, "A", mac=ZERO),
    Row("out of order REMIGRATE", entry(REMIGRATE, HERE), *OTHER_PHASE, "A", None, OUT_OF_ORDER),
    Row("out of order CANCEL", entry(CANCEL, HERE), *OTHER_PHASE, "A", None, OUT_OF_ORDER),
    Row("REMIGRATE of nothing", entry(REMIGRATE, NEW), *WRONG_STATE, "A", phases=IN_ORDER),
    Row("CANCEL of nothing", entry(CANCEL, NEW), *WRONG_STATE, "A", phases=IN_ORDER),
    Row("REMIGRATE, same epoch", entry(REMIGRATE, HERE), *SAME_EPOCH, "A", phases=IN_ORDER),
    Row("CANCEL, same epoch", entry(CANCEL, HERE), *SAME_EPOCH, "A", phases=IN_ORDER),
    Row("CANCEL, wrong MAC", entry(CANCEL, HERE), *BAD_MAC, "A", phases=IN_ORDER, mac=ZERO),
]


@pytest.fixture
def pair():
    """Five mapped pages and a pending one are imported; two more are not."""
    pair = Pair(8, pending_pages=0)
    pair.start()
    pair.pause()
    pair.move(pair.gpas[:5])
    pending = entry(MIGRATE, PENDING_HERE, pending=True)
    assert pair.destination.execute(c.ImportMem(0, Forger(pair, 500).memory([pending]))).ok
    # The source counts one bundle less than the destination now; tokens are forged, too.
    return pair


def into(pair, phase):
    """Both TDs' states go over, and a start token if the phase is out of order."""
    if phase == "in order":
        return
    pair.source._tdcs.total_mb_count += 1
    pair.source._tdcs.links[1].migsc.next_mb_counter += 1
    pair.states()
    pair.start_token()


def blamed(row):
    return int(row.status) if row.operand is None else with_operand(row.status, row.operand)


CASES = [pytest.param(r, p, id=f"{r.name}, {p}") for r in ROWS for p in r.phases]


@pytest.mark.parametrize(("row", "phase"), CASES)
def test_row(pair, row, phase):
    into(pair, phase)
    before = pair.destination.memory_digest()
    bundle = Forger(pair).memory([row.entry], mac=row.mac)
    result = pair.destination.execute(c.ImportMem(0, bundle))
    assert result.statuses.tolist() == [row.entry_status]
    if phase == "out of order" and row.severity == "B":
        assert result.status == 1
        assert pair.state(pair.destination) == "POST_IMPORT"
    else:
        assert result.status == blamed(row) | FATAL_BIT, describe_status(result.status)
        assert pair.state(pair.destination) == "FAILED_IMPORT"
    assert pair.destination.memory_digest() == before


@pytest.mark.parametrize(
    "row", [r for r in ROWS if "out of order" in r.phases], ids=lambda r: r.name
)
def test_after_commit_a_severity_a_error_makes_the_td_runnable(pair, row):
    into(pair, "out of order")
    pair.on_destination(c.ImportCommit())
    result = pair.destination.execute(c.ImportMem(0, Forger(pair).memory([row.entry], mac=row.mac)))
    if row.severity == "A":
        assert result.status == blamed(row)
        assert pair.state(pair.destination) == "RUNNABLE"
    else:
        assert result.status == 1
        assert pair.state(pair.destination) == "LIVE_IMPORT"


def test_a_nop_is_skipped_and_not_counted(pair):
    entries = [entry(NOP, NEW), entry(MIGRATE, NEW), entry(NOP, 1 << 47)]
    result = pair.on_destination(c.ImportMem(0, Forger(pair).memory(entries)))
    assert result.status == Status.TDX_SUCCESS
    assert result.statuses.tolist() == [GpaStatus.SKIPPED, 0, GpaStatus.SKIPPED]
    assert pair.destination.read_page(NEW) == b"\x5a" * PAGE_SIZE


def test_the_entries_before_a_fatal_one_are_imported(pair):
    entries = [entry(MIGRATE, NEW), entry(MIGRATE, HERE), entry(MIGRATE, 7 * PAGE_SIZE)]
    result = pair.destination.execute(c.ImportMem(0, Forger(pair).memory(entries)))
    assert result.status & FATAL_BIT
    assert pair.destination.page_states(np.array([NEW, 7 * PAGE_SIZE], np.uint64)).tolist() == [
        SeptState.MAPPED,
        SeptState.FREE,
    ]


def test_newer_epochs_may_overwrite_and_cancel(pair):
    forger = Forger(pair)
    total = pair.destination.observe()["total_mb_count"] + 1
    token = forger.seal(Mbmd.epoch_token(total_mb=total, mig_epoch=1, iv_counter=0))
    pair.on_destination(c.ImportTrack(Bundle.of(token)))
    entries = [
        entry(REMIGRATE, HERE),
        entry(CANCEL, PAGE_SIZE),
        entry(REMIGRATE, PENDING_HERE, pending=True),
    ]
    pair.on_destination(c.ImportMem(0, forger.memory(entries)))
    states = pair.destination.page_states(pair.gpas[:6]).tolist()
    assert states == [SeptState.MAPPED, SeptState.REMOVED, *[SeptState.MAPPED] * 3, 10]
    assert pair.destination.read_page(HERE) == b"\x5a" * PAGE_SIZE


def test_pending_content_replaces_only_pending_pages(pair):
    """A page that the guest accepted does not become pending again."""
    pair.destination._tdcs.mig_epoch = 1
    forger = Forger(pair)
    wrong = forger.memory([entry(REMIGRATE, HERE, pending=True)])
    result = pair.destination.execute(c.ImportMem(0, wrong))
    mismatch = with_operand(Status.TDX_IMPORT_MISMATCH, Operand.GPA_LIST_ENTRY)
    assert result.status == mismatch | FATAL_BIT


def test_a_removed_page_comes_back_only_in_a_newer_epoch(pair):
    tdcs = pair.destination._tdcs
    tdcs.mig_epoch = 1
    forger = Forger(pair)
    pair.on_destination(c.ImportMem(0, forger.memory([entry(CANCEL, HERE)])))
    tdcs.mig_epoch = 2
    pair.on_destination(c.ImportMem(0, forger.memory([entry(MIGRATE, HERE)])))
    tdcs.mig_epoch = 3
    pair.on_destination(c.ImportMem(0, forger.memory([entry(CANCEL, HERE)])))
    result = pair.destination.execute(c.ImportMem(0, forger.memory([entry(MIGRATE, HERE)])))
    status = with_operand(Status.TDX_DISALLOWED_IMPORT_OVER_REMOVED, Operand.GPA_LIST_ENTRY)
    assert result.status == status | FATAL_BIT


def raw_import(pair, bundle, *, list_entry=None, new_page=None, **changes):
    """IMPORT.MEM by registers, with single operands or list entries changed."""
    host, td = pair.destination_host, pair.destination.td
    buffers = host.stream_buffers(0)
    raw = np.frombuffer(bundle.gpa_list, dtype=np.uint64)
    host.add_tables(td, raw & np.uint64(0x7FFF_FFFF_F000))
    operands = {"rcx": buffers.gpa_list(raw), "rdx": td.tdr, "r8": buffers.mbmd_register}
    buffers.write_mbmd(bundle.mbmd.pack())
    buffers.write_pages(bundle.pages)
    buffers.write_macs(bundle.macs)
    buffers.offer_buffers(raw.size)
    operands.update(r9=buffers.list, r11=buffers.macs_low, r12=buffers.macs_high, r13=NO_PAGE)
    if list_entry is not None:
        host.memory.page_words(buffers.list)[0] = list_entry
    if new_page is not None:
        buffers.offer_new_pages(np.array([new_page] * raw.size, dtype=np.uint64))
        operands["r13"] = buffers.new_pages
    operands.update(changes)
    return host.seamcall(Leaf.IMPORT_MEM, **operands)


def free_page(pair):
    return pair.destination_host.take_private_pages(1)[0]


def page_cases():
    """(list entry, new page, status, operand, entry status) of pages that cannot be used."""
    buffer, new = Operand.MIG_BUFF_LIST_ENTRY, Operand.NEW_PAGE_LIST_ENTRY
    no_buffer, no_page = GpaStatus.MIG_BUFFER_NOT_AVAILABLE, GpaStatus.NEW_PAGE_NOT_AVAILABLE
    invalid = Status.TDX_OPERAND_INVALID
    return [
        pytest.param(1 << 63, "free", invalid, buffer, no_buffer, id="no buffer"),
        pytest.param(1 << 51, "free", invalid, buffer, no_buffer, id="buffer nowhere"),
        pytest.param("owned", "free", invalid, buffer, no_buffer, id="buffer of a TD"),
        pytest.param(None, 8, invalid, new, no_page, id="page misaligned"),
        pytest.param(None, 1 << 47, invalid, new, no_page, id="page with a key id"),
        pytest.param(
            None, PAGE_SIZE, Status.TDX_OPERAND_ADDR_RANGE_ERROR, new, no_page, id="no PAMT"
        ),
        pytest.param(
            None, "owned", Status.TDX_PAGE_METADATA_INCORRECT, new, no_page, id="page in use"
        ),
        pytest.param(None, "locked", Status.TDX_OPERAND_BUSY, new, no_page, id="page locked"),
        pytest.param(
            None, 1 << 63, Status.TDX_OPERAND_ADDR_RANGE_ERROR, new, no_page, id="in place, no PAMT"
        ),
    ]


@pytest.mark.parametrize(
    ("list_entry", "new_page", "status", "operand", "entry_status"), page_cases()
)
def test_buffers_and_pages_that_cannot_be_used(
    pair, list_entry, new_page, status, operand, entry_status
):
    memory = pair.destination_host.memory
    owned = pair.destination.td.page_hpas[HERE]
    places = {"owned": owned, "free": free_page(pair), "locked": free_page(pair)}
    if new_page == "locked":
        assert memory.try_lock(places["locked"], Mode.SHARED)
    bundle = Forger(pair).memory([entry(MIGRATE, NEW)])
    registers = raw_import(
        pair,
        bundle,
        list_entry=places.get(list_entry, list_entry),
        new_page=places.get(new_page, new_page),
    )
    assert registers.rax == with_operand(status, operand) | FATAL_BIT
    buffers = pair.destination_host.stream_buffers(0)
    assert int(buffers.entries(1)[0]) >> 56 == entry_status
    assert memory.page_words(buffers.new_pages)[0] >> np.uint64(63) == 1
    assert memory.page_type[places["free"] >> 12] == PageType.NDA
    assert pair.destination.page_states(np.array([NEW], np.uint64)).tolist() == [SeptState.FREE]


@pytest.mark.parametrize("bits", [1, 0xFFF, 1 << 52, 1 << 60, 1 << 62])
def test_a_buffer_is_bits_51_to_12_of_its_list_entry(pair, bits):
    bundle = Forger(pair).memory([entry(MIGRATE, NEW)])
    place = pair.destination_host.stream_buffers(0).buffers | bits
    registers = raw_import(pair, bundle, list_entry=place, new_page=free_page(pair))
    assert hex(registers.rax) == "0x0"
    assert pair.destination.read_page(NEW) == b"\x5a" * PAGE_SIZE


@pytest.mark.parametrize("key_id", [1, 40, 63])
def test_a_pending_page_in_place_loses_its_key_id(pair, key_id):
    bundle = Forger(pair).memory([entry(MIGRATE, NEW, pending=True)])
    page = free_page(pair)
    assert raw_import(pair, bundle, list_entry=page | key_id << 46).rax == 0
    assert pair.destination_host.memory.page_type[page >> 12] == PageType.REG
    assert pair.destination.page_states(np.array([NEW], np.uint64)).tolist() == [SeptState.PENDING]


def test_walks_and_locks(pair):
    into(pair, "out of order")
    memory, sept = pair.destination_host.memory, pair.destination._tdcs.sept
    far = 1 << 40
    bundle = Forger(pair).memory([entry(MIGRATE, far)])
    pair.destination_host.add_tables = lambda td, gpas: None
    missing = raw_import(pair, bundle)
    assert missing.rax == 1
    assert int(pair.destination_host.stream_buffers(0).entries(1)[0]) >> 56 == 2
    memory.words[sept.slot(NEW)] |= LOCK_BIT
    bundle = Forger(pair, 2000).memory([entry(MIGRATE, NEW)])
    result = pair.on_destination(c.ImportMem(0, bundle))
    assert result.statuses.tolist() == [GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY]


def test_a_blocked_page_is_not_imported_over(pair):
    into(pair, "out of order")
    td = pair.destination.td
    pair.destination_host.require(Leaf.MEM_RANGE_BLOCK, rcx=HERE, rdx=td.tdr)
    bundle = Forger(pair).memory([entry(MIGRATE, HERE)])
    result = pair.on_destination(c.ImportMem(0, bundle))
    assert result.statuses.tolist() == [GpaStatus.SEPT_ENTRY_STATE_INCORRECT]


@pytest.mark.parametrize(
    ("changes", "status", "operand"),
    [
        ({"rcx": 2}, Status.TDX_OPERAND_INVALID, Operand.RCX),
        ({"r13": 5}, Status.TDX_OPERAND_INVALID, Operand.R13),
        ({"r10": 7}, Status.TDX_OPERAND_INVALID, Operand.R10),
        ({"r10": 1 << 63}, Status.TDX_INVALID_RESUMPTION, None),
    ],
)
def test_operands(pair, changes, status, operand):
    registers = raw_import(pair, Forger(pair).memory([entry(MIGRATE, NEW)]), **changes)
    assert registers.rax == (status if operand is None else with_operand(status, operand))
    assert pair.state(pair.destination) == "MEMORY_IMPORT"


def test_first_entry_of_a_new_bundle_is_zero(pair):
    bundle = Forger(pair).memory([entry(MIGRATE, NEW), entry(NOP, 0)])
    buffers = pair.destination_host.stream_buffers(0)
    registers = raw_import(pair, bundle, rcx=buffers.gpas | 1 << 3 | 1 << 55)
    assert registers.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)


def test_a_pending_page_in_place_needs_its_buffer(pair):
    bundle = Forger(pair).memory([entry(MIGRATE, NEW, pending=True)])
    registers = raw_import(pair, bundle, list_entry=1 << 63)
    no_buffer = with_operand(Status.TDX_OPERAND_INVALID, Operand.MIG_BUFF_LIST_ENTRY)
    assert registers.rax == no_buffer | FATAL_BIT
