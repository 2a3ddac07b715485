"""Are the published weaknesses of TDX module 1.5 there in tdx-1.5.01, and gone in hardened?

Each is public, with its reference at the test.  CVE-2025-30513 is shown in full by a profile of its
own, which is no shipped module.
"""

import struct

import numpy as np
import pytest
from soft_pair import CANCEL, MIGRATE, Forger, Pair

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.fields import FIELDS
from tdxmig_model.backend.soft.findings import Finding
from tdxmig_model.backend.soft.gpa_entries import INVALID_BIT
from tdxmig_model.backend.soft.guest import EptViolation, GuestImage, Program
from tdxmig_model.backend.soft.leaves_build import ATTR_DEBUG, ATTR_MIGRATABLE, TD_PARAMS_SIZE
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.backend.soft.status import FATAL_BIT, LOW_32, Operand, Status, with_operand
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import GpaStatus, build_entries
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import Bundle

PUBLISHED, HARDENED, DEMONSTRATION = "tdx-1.5.01", "hardened", "demo-cve-2025-30513"
RESUME = 1 << 63
WRITE_MASK_VALID = 1 << 51


# --- CVE-2025-30513: TDH.MNG.INIT while an import of immutable state is interrupted --------------


class InterruptedImport:
    """An IMPORT.STATE.IMMUTABLE that stopped after the page that holds ATTRIBUTES."""

    def __init__(self, profile):
        # A sender whose immutable TD state takes two pages, so that there is something to resume.
        self.pair = Pair(4, profile=profile, source_profile=DEMONSTRATION)
        bundle = self.pair.on_source(c.ExportStateImmutable()).bundle
        assert len(bundle.pages) == 3
        self.host, self.td = self.pair.destination_host, self.pair.destination.td
        buffers = self.host.stream_buffers(0)
        buffers.write_mbmd(bundle.mbmd.pack())
        buffers.write_pages(bundle.pages)
        self.operands = {
            "rcx": self.td.tdr,
            "r8": buffers.mbmd_register,
            "r9": buffers.page_list(len(bundle.pages)),
        }
        pending = iter([False, True])
        stopped = self.host.seamcall(
            Leaf.IMPORT_STATE_IMMUTABLE, interrupt=lambda: next(pending), **self.operands
        )
        assert stopped.rax == Status.TDX_INTERRUPTED_RESUMABLE
        assert stopped.rcx == self.td.tdr
        assert self.attributes() == ATTR_MIGRATABLE

    def attributes(self):
        return self.pair.destination._tdcs.fields["ATTRIBUTES"]

    def init(self, **changes):
        """TDH.MNG.INIT with TD_PARAMS that ask for a debug TD."""
        params = {"attributes": ATTR_DEBUG, "xfam": 0, "max_vcpus": 1, "tsc": 100, **changes}
        raw = struct.pack(
            "<QQHBB4xQQH",
            *(params["attributes"], params["xfam"], params["max_vcpus"]),
            *(0, 0, 0x1E, 0, params["tsc"]),
        )
        buffers = self.host.stream_buffers(1)
        place = buffers.buffers & ~(TD_PARAMS_SIZE - 1)
        self.host.memory.bytes[place : place + TD_PARAMS_SIZE] = raw.ljust(TD_PARAMS_SIZE, b"\0")
        return self.host.seamcall(Leaf.MNG_INIT, rcx=self.td.tdr, rdx=place).rax

    def resume(self):
        return self.host.seamcall(Leaf.IMPORT_STATE_IMMUTABLE, r10=RESUME, **self.operands).rax

    def op_state(self):
        return self.pair.state(self.pair.destination)


XFAM_INVALID = with_operand(Status.TDX_OPERAND_INVALID, Operand.XFAM)


def test_cve_2025_30513_as_published():
    """A TD that was not debuggable is, after its import: digby, Google security-research."""
    attack = InterruptedImport(DEMONSTRATION)
    assert attack.init() == XFAM_INVALID
    assert attack.op_state() == "UNINITIALIZED"
    assert attack.resume() == Status.TDX_SUCCESS
    assert attack.op_state() == "MEMORY_IMPORT"
    assert attack.attributes() == ATTR_DEBUG
    assert attack.pair.source._tdcs.fields["ATTRIBUTES"] == ATTR_MIGRATABLE


def test_the_mechanism_of_cve_2025_30513_in_1_5_01():
    """The failing call writes the half-imported TD; the cross check of NUM_VCPUS then notices."""
    attack = InterruptedImport(PUBLISHED)
    assert attack.pair.destination._tdcs.num_vcpus == 1
    assert attack.init() == XFAM_INVALID
    assert attack.attributes() == ATTR_DEBUG
    assert attack.pair.destination._tdcs.num_vcpus == 0
    assert attack.resume() == with_operand(Status.TDX_OPERAND_INVALID, Operand.RDX) | FATAL_BIT
    assert attack.op_state() == "FAILED_IMPORT"


def test_in_1_5_01_an_interrupted_import_can_be_taken_over():
    attack = InterruptedImport(PUBLISHED)
    assert attack.init(xfam=3) == Status.TDX_SUCCESS
    assert attack.op_state() == "INITIALIZED"
    assert attack.resume() == Status.TDX_OP_STATE_INCORRECT


@pytest.mark.parametrize("xfam", [0, 3])
def test_hardened_nothing_comes_between_interruption_and_resumption(xfam):
    attack = InterruptedImport(HARDENED)
    assert attack.op_state() == "START_IMPORT"
    assert attack.init(xfam=xfam) == Status.TDX_OP_STATE_INCORRECT
    assert attack.resume() == Status.TDX_SUCCESS
    assert attack.op_state() == "MEMORY_IMPORT"
    assert attack.attributes() == ATTR_MIGRATABLE


@pytest.mark.parametrize("profile", [PUBLISHED, DEMONSTRATION, HARDENED])
def test_an_interrupted_import_that_is_let_alone_completes(profile):
    attack = InterruptedImport(profile)
    assert attack.resume() == Status.TDX_SUCCESS
    assert attack.attributes() == ATTR_MIGRATABLE
    tdcs = [side._tdcs.fields for side in (attack.pair.source, attack.pair.destination)]
    assert all(tdcs[0][name] == tdcs[1][name] for name in ("XFAM", "MAX_VCPUS", "MRTD"))


# --- CVE-2025-32007: a list shorter than its header ----------------------------------------------


def vcpu_bundle_behind_the_page(pair):
    """vCPU state whose first list, of size 1, has one sequence more than the full page holds."""
    pair.start()
    pair.pause()
    pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))
    bundle = pair.on_source(c.ExportStateVp(0)).bundle
    forger = Forger(pair)
    pages = forger.open_state(bundle)
    used, sequences = struct.unpack_from("<HH", pages[0])
    assert used == PAGE_SIZE
    pages[0] = struct.pack("<HH", 1, sequences + 1) + pages[0][4:]
    return forger.state(bundle.mbmd, pages)


def import_vcpu(pair, bundle):
    """IMPORT.STATE.VP of a forged bundle; the registers, for extended error information."""
    host, td = pair.destination_host, pair.destination.td
    host.ensure_vcpus(td, 1)
    buffers = host.stream_buffers(0)
    buffers.write_mbmd(bundle.mbmd.pack())
    buffers.write_pages(bundle.pages)
    r9 = buffers.page_list(len(bundle.pages))
    return host.seamcall(Leaf.IMPORT_STATE_VP, rcx=td.vcpus[0], r8=buffers.mbmd_register, r9=r9)


def test_cve_2025_32007_in_1_5_01():
    """melllvar, Google security-research: the read behind the page is found, and not performed."""
    pair = Pair(4, profile=PUBLISHED)
    failed = import_vcpu(pair, vcpu_bundle_behind_the_page(pair))
    expected = Status.TDX_METADATA_FIELD_ID_INCORRECT | FATAL_BIT
    assert failed.rax & ~LOW_32 == expected
    assert (failed.rcx, failed.rdx) == (0, 0)
    findings = pair.destination_host.module.findings
    assert {finding.kind for finding in findings} == {"out_of_range_read"}
    beyond = "page 0: 8 bytes at offset 4096 of a list of 1 bytes"
    assert findings[-1] == Finding("out_of_range_read", "TDH.IMPORT.STATE.VP", beyond)


def test_cve_2025_32007_is_refused_in_hardened():
    pair = Pair(4)
    failed = import_vcpu(pair, vcpu_bundle_behind_the_page(pair))
    assert failed.rax == Status.TDX_INVALID_METADATA_LIST_HEADER | FATAL_BIT
    assert pair.destination_host.module.findings == []


# --- "eddie": required fields under write mask 0 -------------------------------------------------


def immutable_bundle_without_eptp(pair):
    """Immutable state in which EPTP is present under a write mask of 0."""
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    forger = Forger(pair)
    pages = forger.open_state(bundle)
    header = struct.pack("<Q", FIELDS["EPTP"].identifier)
    assert pages[1].count(header) == 1
    masked = struct.pack("<QQ", FIELDS["EPTP"].identifier | WRITE_MASK_VALID, 0)
    (used,) = struct.unpack_from("<H", pages[1])
    page = struct.pack("<H", used + 8) + pages[1][2:].replace(header, masked)
    return forger.state(bundle.mbmd, [pages[0], page[:PAGE_SIZE]])


def test_a_required_field_can_be_skipped_in_1_5_01():
    """eddie, Google security-research: the import succeeds and EPTP is still what it was."""
    pair = Pair(4, profile=PUBLISHED)
    pair.on_destination(c.ImportStateImmutable(immutable_bundle_without_eptp(pair)))
    assert pair.state(pair.destination) == "MEMORY_IMPORT"
    assert pair.destination._tdcs.fields["EPTP"] == 0
    finding = Finding("required_field_not_written", "TDH.IMPORT.STATE.IMMUTABLE", "EPTP")
    assert pair.destination_host.module.findings == [finding]


def test_a_required_field_cannot_be_skipped_in_hardened():
    pair = Pair(4)
    bundle = immutable_bundle_without_eptp(pair)
    result = pair.destination.execute(c.ImportStateImmutable(bundle))
    assert result.status_name == "TDX_METADATA_FIELD_ID_INCORRECT"
    assert result.status & FATAL_BIT
    assert pair.state(pair.destination) == "FAILED_IMPORT"


# --- a memory bundle that ends early, repaired in later public releases --------------------------


class NewerPage:
    """A page whose first version is at the destination and whose second is to be exported."""

    page = PAGE_SIZE

    def __init__(self, profile):
        pair = self.pair = Pair(
            4, profile=profile, guest=GuestImage(Program.SEQUENTIAL, PAGE_SIZE, 1)
        )
        pair.run(0, 3)
        pair.start()
        pair.block(pair.gpas)
        pair.move(pair.gpas)
        self.older = pair.destination.read_page(self.page)
        assert pair.run(0, 5) == self.page
        assert pair.run(0, 5) is None
        self.newer = pair.source.read_page(self.page)
        assert self.newer != self.older
        pair.pause()
        pair.epoch()

    def export(self, entries, unusable=()):
        """EXPORT.MEM of raw entries; buffers by index in `unusable` have an address of nothing."""
        host, buffers = self.pair.source_host, self.pair.source_host.stream_buffers(0)
        rcx = buffers.gpa_list(np.array(entries, dtype=np.uint64))
        buffers.offer_buffers(len(entries))
        for index in unusable:
            host.memory.page_words(buffers.list)[index] = 1 << 51
        registers = host.seamcall(
            Leaf.EXPORT_MEM,
            rcx=rcx,
            rdx=self.pair.source.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.list,
            r11=buffers.macs_low,
        )
        count = len(entries)
        bundle = Bundle.of(
            Mbmd.unpack(buffers.read_mbmd()),
            buffers.read_pages(count),
            buffers.entries(count).tobytes(),
            buffers.read_macs(count),
        )
        return registers.rax, bundle

    def finish(self):
        """TD and vCPU state, start token, commit; what the destination has at the page then."""
        self.pair.states()
        self.pair.start_token()
        self.pair.on_destination(c.ImportCommit())
        return self.pair.destination.read_page(self.page)


def entry(gpa, operation=MIGRATE):
    return int(build_entries(np.array([gpa], dtype=np.uint64), operation)[0])


MALFORMED = entry(2 * PAGE_SIZE) | 1


def unusable_buffer(newer):
    """The migration buffer of the page has an unusable address."""
    status, _ = newer.export([entry(newer.page)], unusable=[0])
    assert status == with_operand(Status.TDX_OPERAND_INVALID, Operand.MIG_BUFF_LIST_ENTRY)


def malformed_entry(newer):
    """The entry after the page is malformed."""
    status, _ = newer.export([entry(newer.page), MALFORMED])
    assert status == with_operand(Status.TDX_OPERAND_INVALID, Operand.GPA_LIST_ENTRY)


@pytest.mark.parametrize("failing", [unusable_buffer, malformed_entry])
def test_in_1_5_01_a_failed_export_leaves_an_older_page_behind(failing):
    """The page counts as exported, the bundle does not, and the start token is in order."""
    newer = NewerPage(PUBLISHED)
    assert newer.pair.source.observe()["dirty_count"] == 1
    failing(newer)
    assert newer.pair.source.observe()["dirty_count"] == 0
    newer.pair.assert_counts()
    assert newer.finish() == newer.older
    assert newer.pair.source.read_page(newer.page) == newer.newer


def test_hardened_an_unusable_buffer_leaves_the_page_dirty():
    newer = NewerPage(HARDENED)
    status, bundle = newer.export([entry(newer.page)], unusable=[0])
    assert status == Status.TDX_SUCCESS | 1
    exported = int.from_bytes(bytes(bundle.gpa_list), "little")
    assert exported >> 56 & 0x1F == GpaStatus.MIG_BUFFER_NOT_AVAILABLE
    newer.pair.on_destination(c.ImportMem(0, bundle))
    refused = newer.pair.source.execute(c.ExportTrack(True))
    assert refused.status == Status.TDX_EXPORTED_DIRTY_PAGES_REMAIN
    newer.pair.move([newer.page])
    assert newer.finish() == newer.newer


def test_hardened_a_malformed_entry_fails_alone():
    newer = NewerPage(HARDENED)
    status, bundle = newer.export([entry(newer.page), MALFORMED])
    assert status == Status.TDX_SUCCESS | 1
    newer.pair.on_destination(c.ImportMem(0, bundle))
    assert newer.finish() == newer.newer


def test_hardened_an_unusable_buffer_does_not_end_the_list():
    newer = NewerPage(HARDENED)
    pending = entry(2 * PAGE_SIZE, CANCEL)
    status, bundle = newer.export([entry(newer.page), pending], unusable=[0])
    assert status == Status.TDX_SUCCESS | 1
    lists = newer.pair.source_host.memory.page_words(newer.pair.source_host.stream_buffers(0).list)
    assert all(int(word) & INVALID_BIT for word in lists[:2])
    newer.pair.on_destination(c.ImportMem(0, bundle))
    state = newer.pair.destination.page_states(newer.pair.gpas)[2]
    assert state == SeptState.REMOVED


# --- intel/tdx-module issue 18: a page that was cancelled cannot be accepted ---------------------


def accept(backend, gpa):
    """TDG.MEM.PAGE.ACCEPT by the guest's first vCPU; RAX."""
    module = backend.host.module
    return module.tdcall(GuestLeaf.MEM_PAGE_ACCEPT, Registers(rcx=gpa), backend.td.vcpus[0])


def after_a_cancelled_page(profile):
    """A TD at its destination, one page of which was cancelled after it had been sent."""
    pair = Pair(4, profile=profile, guest="idle")
    page = int(pair.gpas[3])
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    pair.epoch()
    pair.move([page], operation=CANCEL)
    pair.pause()
    pair.states()
    pair.start_token()
    pair.on_destination(c.ImportEnd())
    assert pair.destination.page_states(pair.gpas)[3] == SeptState.REMOVED
    return pair, page


def test_in_1_5_01_a_cancelled_page_is_of_another_size():
    pair, page = after_a_cancelled_page(PUBLISHED)
    assert accept(pair.destination, page) == Status.TDX_PAGE_SIZE_MISMATCH


def test_hardened_a_cancelled_page_is_asked_for_and_accepted():
    pair, page = after_a_cancelled_page(HARDENED)
    with pytest.raises(EptViolation) as left:
        accept(pair.destination, page)
    assert left.value.gpa == page
    pair.destination_host.add_pending_page(pair.destination.td, page)
    assert accept(pair.destination, page) == Status.TDX_SUCCESS
    assert pair.destination.page_states(pair.gpas)[3] == SeptState.MAPPED
    assert accept(pair.destination, page) == Status.TDX_PAGE_ALREADY_ACCEPTED
    assert pair.destination.read_page(page) == bytes(PAGE_SIZE)


@pytest.mark.parametrize("profile", [PUBLISHED, HARDENED])
def test_a_page_that_never_was_is_asked_for(profile):
    pair = Pair(2, profile=profile, guest="idle")
    with pytest.raises(EptViolation):
        accept(pair.source, 7 * PAGE_SIZE)
    with pytest.raises(EptViolation):
        accept(pair.source, 1 << 40)
    assert accept(pair.source, 1) == Status.TDX_PAGE_SIZE_MISMATCH | 1
    assert accept(pair.source, 1 << 47) == with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
