"""Are state bundles applied page by page, before their tag is known, with errors that stick?"""

import struct

import pytest
from soft_pair import Forger, Pair

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.fields import FIELDS
from tdxmig_model.backend.soft.host import Host
from tdxmig_model.backend.soft.leaves_build import ATTR_DEBUG, ATTR_MIGRATABLE, TD_PARAMS_SIZE
from tdxmig_model.backend.soft.metadata import build_lists
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf
from tdxmig_model.backend.soft.servtd import binding_importable
from tdxmig_model.backend.soft.state import Binding, BindingState, VcpuState
from tdxmig_model.backend.soft.status import FATAL_BIT, LOW_32, Operand, Status, with_operand
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import BackendError
from tdxmig_model.wire.constants import PAGE_SIZE

PUBLISHED, DEMONSTRATION = "tdx-1.5.01", "demo-cve-2025-30513"
RESUME = 1 << 63
NOT_VALID = Status.TDX_METADATA_FIELD_VALUE_NOT_VALID


class Importing:
    """A state bundle in the buffers of the destination, and the leaf that takes it."""

    def __init__(self, pair, leaf, bundle, rcx=None):
        self.pair, self.leaf, self.bundle = pair, leaf, bundle
        self.host = pair.destination_host
        self.buffers = self.host.stream_buffers(0)
        self.rcx = rcx or pair.destination.td.tdr
        self.buffers.write_mbmd(bundle.mbmd.pack())
        self.buffers.write_pages(bundle.pages)

    def call(self, after=0, **changes):
        """The registers at its end; interrupted after `after` pages if that is not 0."""
        pending = iter([False] * (after - 1))
        operands = {
            "rcx": self.rcx,
            "rdx": 0x55,
            "r8": self.buffers.mbmd_register,
            "r9": self.buffers.page_list(len(self.bundle.pages)),
            **changes,
        }
        interrupt = (lambda: next(pending, True)) if after else None
        return self.host.seamcall(self.leaf, interrupt=interrupt, **operands)

    def resume(self, after=0):
        return self.call(after, r10=RESUME)


def immutable(profile=PUBLISHED, **changes):
    """Immutable state on three pages, with values changed by someone who has the key."""
    pair = Pair(4, profile=profile, source_profile=DEMONSTRATION, vcpus=2)
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    if changes:
        bundle = Forger(pair).state(bundle.mbmd, pages_with(pair, **changes))
    assert len(bundle.pages) == 3
    return Importing(pair, Leaf.IMPORT_STATE_IMMUTABLE, bundle)


def pages_with(pair, **changes):
    tdr = pair.source_host.module.tdrs[pair.source.td.tdr]
    tdcs = pair.source._tdcs
    scopes = ("sys", "immutable")
    values = {name: tdcs.fields[name] for name in tdcs.fields if FIELDS[name].scope in scopes}
    values.update(TD_UUID=tdr.uuid, NUM_VCPUS=tdcs.num_vcpus, EXPORT_COUNT=tdcs.export_count)
    return build_lists("immutable", {**values, **changes}, list_size=512)


# --- page by page --------------------------------------------------------------------------------


def test_the_pages_so_far_are_in_the_td_while_the_import_is_interrupted():
    leaf = immutable(MROWNER=(7,) * 6, VIRTUAL_IA32_VMX_EXIT_CTLS2=9)
    tdr = leaf.host.module.tdrs[leaf.rcx]
    tdcs, uuid = tdr.tdcs, tdr.uuid
    assert leaf.call(after=1).rax == Status.TDX_INTERRUPTED_RESUMABLE
    assert (tdcs.num_vcpus, tdcs.fields["ATTRIBUTES"], tdr.uuid) == (0, 0, uuid)
    assert leaf.resume(after=1).rax == Status.TDX_INTERRUPTED_RESUMABLE
    source = leaf.pair.source_host.module.tdrs[leaf.pair.source.td.tdr]
    assert (tdcs.num_vcpus, tdcs.export_count, tdr.uuid) == (2, 0, source.uuid)
    assert tdcs.pre_import_uuid == uuid
    assert tdcs.fields["ATTRIBUTES"] == ATTR_MIGRATABLE
    assert tdcs.fields["VIRTUAL_IA32_VMX_EXIT_CTLS2"] == 0
    assert leaf.pair.state(leaf.pair.destination) == "UNINITIALIZED"
    assert leaf.resume().rax == Status.TDX_SUCCESS
    assert (tdcs.export_count, tdcs.fields["VIRTUAL_IA32_VMX_EXIT_CTLS2"]) == (1, 9)
    assert (tdcs.td_epoch, tdcs.refcount, tdcs.total_mb_count) == (1, [0, 0], 1)


def test_a_wrong_tag_is_known_only_after_everything_was_applied():
    leaf = immutable()
    mbmd = bytearray(leaf.bundle.mbmd.pack())
    mbmd[40] ^= 1
    leaf.buffers.write_mbmd(bytes(mbmd))
    failed = leaf.call()
    assert failed.rax == Status.TDX_INCORRECT_MBMD_MAC | FATAL_BIT
    assert (failed.rcx, failed.rdx) == (0, 0)
    assert leaf.pair.destination._tdcs.fields["ATTRIBUTES"] == ATTR_MIGRATABLE
    assert leaf.pair.state(leaf.pair.destination) == "FAILED_IMPORT"


def test_an_error_sticks_over_interruptions_and_the_first_one_is_reported():
    leaf = immutable(XFAM=1, GPAW=1, VIRTUAL_IA32_VMX_EXIT_CTLS2=9)
    for stopped in (leaf.call(after=1), leaf.resume(after=1)):
        assert stopped.rax == Status.TDX_INTERRUPTED_RESUMABLE
        assert (stopped.rcx, stopped.rdx) == (leaf.rcx, 0x55)
    failed = leaf.resume()
    assert failed.rax & ~LOW_32 == NOT_VALID | FATAL_BIT
    assert failed.rcx == FIELDS["XFAM"].identifier
    assert failed.rdx == 0
    assert leaf.pair.state(leaf.pair.destination) == "FAILED_IMPORT"


def test_td_and_vcpu_state_are_applied_page_by_page_too():
    pair = Pair(4, profile=PUBLISHED)
    pair.run(0, 9)
    pair.start()
    pair.pause()
    pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))
    pair.source._tdvps(0).registers["IA32_TSC_AUX"] = 5
    bundle = pair.on_source(c.ExportStateVp(0)).bundle
    pair.destination_host.ensure_vcpus(pair.destination.td, 1)
    leaf = Importing(pair, Leaf.IMPORT_STATE_VP, bundle, pair.destination.td.vcpus[0])
    assert leaf.call(after=1).rax == Status.TDX_INTERRUPTED_RESUMABLE
    vcpu, sent = pair.destination._tdvps(0), pair.source.read_vcpu(0)
    assert vcpu.state is VcpuState.IMPORT
    assert vcpu.registers["GUEST_RIP"] == sent["GUEST_RIP"] == 1
    assert (vcpu.registers["IA32_TSC_AUX"], sent["IA32_TSC_AUX"]) == (0, 5)
    assert leaf.resume().rax == Status.TDX_SUCCESS
    assert pair.source.vcpu_digest() == pair.destination.vcpu_digest()


@pytest.mark.parametrize(
    ("count", "leaf"),
    [(1, Leaf.IMPORT_STATE_IMMUTABLE), (3, Leaf.IMPORT_STATE_VP)],
)
def test_lists_that_are_too_short_are_fatal(count, leaf):
    pair = Pair(2, profile=PUBLISHED)
    bundle, rcx = pair.on_source(c.ExportStateImmutable()).bundle, None
    if leaf is Leaf.IMPORT_STATE_VP:
        pair.on_destination(c.ImportStateImmutable(bundle))
        pair.pause()
        pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))
        bundle = pair.on_source(c.ExportStateVp(0)).bundle
        pair.destination_host.ensure_vcpus(pair.destination.td, 1)
        rcx = pair.destination.td.vcpus[0]
    importing = Importing(pair, leaf, bundle, rcx)
    failed = importing.call(r9=importing.buffers.page_list(count))
    assert failed.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.R9) | FATAL_BIT
    assert (failed.rcx, failed.rdx) == (0, 0)


# --- values --------------------------------------------------------------------------------------


def mutable(field, value, scope):
    """An import of TD or vCPU state in which a field has another value; the status."""
    pair = Pair(2, profile=PUBLISHED)
    pair.start()
    pair.pause()
    if scope == "td":
        pair.source._tdcs.fields[field] = value
        return pair.destination.execute(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))
    pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))
    pair.source._tdvps(0).registers[field] = value
    return pair.destination.execute(c.ImportStateVp(pair.on_source(c.ExportStateVp(0)).bundle, 0))


@pytest.mark.parametrize(
    ("scope", "field", "good", "bad"),
    [
        ("td", "HP_LOCK_TIMEOUT", 10_000, 9_999),
        ("td", "HP_LOCK_TIMEOUT", 100_000_000, 100_000_001),
        ("td", "NOTIFY_ENABLES", 1, 2),
        ("td", "TD_CTLS", 1, 2),
        ("vp", "LAST_TD_EXIT", 2, 3),
        ("vp", "CURR_VM", 0, 1),
        ("vp", "IA32_XSS", 0x3, 0x100),
        ("vp", "IA32_DEBUGCTL", 0xFFC7, 0x8),
        ("vp", "CPUID_CONTROL", (3,) * 128, (4,) * 128),
    ],
)
def test_values_that_the_importing_td_refuses(scope, field, good, bad):
    """Also bits that an import does not write, and that are not as they are here."""
    assert mutable(field, good, scope).status == Status.TDX_SUCCESS
    refused = mutable(field, bad, scope)
    assert refused.status & ~LOW_32 == NOT_VALID | FATAL_BIT


@pytest.mark.parametrize("pages", [6, 9])
def test_l2_virtual_machines_need_pages_and_do_not_migrate(pages):
    leaf = immutable(NUM_L2_VMS=1)
    for page in leaf.host.take_private_pages(pages - 6):
        leaf.host.require(Leaf.MNG_ADDCX, rcx=page, rdx=leaf.rcx)
    failed = leaf.call().rax
    if pages == 6:
        assert failed & ~LOW_32 == Status.TDX_TDCS_NOT_ALLOCATED | FATAL_BIT
    else:
        assert failed == with_operand(Status.TDX_OPERAND_INVALID, Operand.RDX) | FATAL_BIT


def binding_words(state, servtd_type=0, attributes=0):
    return struct.unpack(
        "<16Q", struct.pack("<BxHxxxxQ", state, servtd_type, attributes).ljust(128)
    )


def test_imported_bindings():
    bound = Binding(BindingState.BOUND)
    for here in (Binding(), bound):
        assert binding_importable(here, binding_words(0, 9, 9))
        assert binding_importable(here, binding_words(1))
        assert binding_importable(here, binding_words(2))
        assert not binding_importable(here, binding_words(3))
        assert not binding_importable(here, binding_words(2, servtd_type=1))
        assert not binding_importable(here, binding_words(2, attributes=2))
    assert binding_importable(Binding(), binding_words(2, attributes=1))
    assert not binding_importable(bound, binding_words(2, attributes=1))


# --- TDH.MNG.INIT --------------------------------------------------------------------------------


def initialized(host, td, **changes):
    """TDH.MNG.INIT with these parts of TD_PARAMS; RAX."""
    parts = {
        "attributes": ATTR_DEBUG,
        "xfam": 3,
        "max_vcpus": 5,
        "l2": 0,
        "msrs": 0,
        "reserved0": 0,
        "eptp": 0x1E,
        "flags": 0,
        "tsc": 100,
        "reserved1": b"",
        "rest": b"",
    }
    parts.update(changes)
    raw = struct.pack(
        "<QQHBBIQQH38s48s48s48s800s",
        *(parts["attributes"], parts["xfam"], parts["max_vcpus"], parts["l2"], parts["msrs"]),
        *(parts["reserved0"], parts["eptp"], parts["flags"], parts["tsc"], parts["reserved1"]),
        *(b"", bytes([7]) * 48, b"", parts["rest"]),
    )
    assert len(raw) == TD_PARAMS_SIZE
    place = host.stream_buffers(0).buffers
    place += -place % TD_PARAMS_SIZE
    host.memory.bytes[place : place + TD_PARAMS_SIZE] = raw
    return host.seamcall(Leaf.MNG_INIT, rcx=td.tdr, rdx=place).rax


@pytest.mark.parametrize(
    ("changes", "operand", "stored"),
    [
        ({"attributes": 2}, Operand.ATTRIBUTES, set()),
        ({"xfam": 0}, Operand.XFAM, {"ATTRIBUTES"}),
        ({"max_vcpus": 0}, Operand.MAX_VCPUS, {"ATTRIBUTES", "XFAM"}),
        ({"l2": 4}, Operand.NUM_L2_VMS, {"ATTRIBUTES", "XFAM", "MAX_VCPUS"}),
        ({"l2": 1}, None, {"ATTRIBUTES", "XFAM", "MAX_VCPUS"}),
        ({"reserved0": 1}, Operand.RDX, {"ATTRIBUTES", "XFAM", "MAX_VCPUS"}),
        ({"flags": 1}, Operand.EXEC_CONTROLS, {"ATTRIBUTES", "XFAM", "MAX_VCPUS"}),
        ({"eptp": 0}, Operand.EPTP_CONTROLS, {"ATTRIBUTES", "XFAM", "MAX_VCPUS"}),
        ({"tsc": 3}, Operand.TSC_FREQUENCY, {"ATTRIBUTES", "XFAM", "MAX_VCPUS", "EPTP"}),
        (
            {"reserved1": b"\1"},
            Operand.RDX,
            {"ATTRIBUTES", "XFAM", "MAX_VCPUS", "EPTP", "TSC_FREQUENCY"},
        ),
        (
            {"msrs": 2},
            Operand.RDX,
            {"ATTRIBUTES", "XFAM", "MAX_VCPUS", "EPTP", "TSC_FREQUENCY", "MROWNER"},
        ),
        (
            {"rest": b"\1"},
            Operand.IA32_ARCH_CAPABILITIES_CONFIG,
            {"ATTRIBUTES", "XFAM", "MAX_VCPUS", "EPTP", "TSC_FREQUENCY", "MROWNER"},
        ),
        (
            {"rest": bytes(8) + b"\1"},
            Operand.RDX,
            {"ATTRIBUTES", "XFAM", "MAX_VCPUS", "EPTP", "TSC_FREQUENCY", "MROWNER"},
        ),
        (
            {"rest": bytes(32) + b"\1"},
            Operand.CPUID_CONFIG,
            {"ATTRIBUTES", "XFAM", "MAX_VCPUS", "EPTP", "TSC_FREQUENCY", "MROWNER"},
        ),
    ],
)
def test_a_failing_init_leaves_what_it_stored_before(changes, operand, stored):
    host = Host(memory_bytes=0)
    td = host.create_destination_td()
    fields = host.module.tdrs[td.tdr].tdcs.fields
    before = dict(fields)
    status = initialized(host, td, **changes)
    if operand is None:
        assert status == Status.TDX_TDCS_NOT_ALLOCATED
    else:
        assert status == with_operand(Status.TDX_OPERAND_INVALID, operand)
    changed = {name for name in fields if fields[name] != before[name]}
    assert changed == stored | {"HP_LOCK_TIMEOUT"}
    assert host.module.tdrs[td.tdr].tdcs.op_state.name == "UNINITIALIZED"
    assert initialized(host, td) == Status.TDX_SUCCESS
    assert host.module.tdrs[td.tdr].tdcs.op_state.name == "INITIALIZED"


# --- entropy -------------------------------------------------------------------------------------


def no_entropy(_length):
    raise BlockingIOError


@pytest.mark.parametrize("source_of_entropy", [lambda _length: None, no_entropy])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_session_does_not_begin_without_entropy(side, source_of_entropy):
    pair = Pair(2, profile=PUBLISHED)
    if side == "source":
        backend, command = pair.source, c.ExportStateImmutable()
    else:
        bundle = pair.on_source(c.ExportStateImmutable()).bundle
        backend, command = pair.destination, c.ImportStateImmutable(bundle)
    module, before = backend.host.module, backend.observe()
    random, module.random = module.random, source_of_entropy
    assert backend.execute(command).status == Status.TDX_RND_NO_ENTROPY
    assert backend.observe() == before
    module.random = random
    assert backend.execute(command).ok


def test_no_td_is_built_without_entropy():
    host = Host(memory_bytes=0)
    random, host.module.random = host.module.random, lambda _length: None
    with pytest.raises(BackendError, match="TDX_RND_NO_ENTROPY"):
        host.create_td(1, bind=False, guest="idle")
    assert not host.module.tdrs
    assert not host.module.hkids
    host.module.random = random
    assert host._new_td(1).tdr in host.module.tdrs


def test_the_sixth_control_page_needs_entropy():
    draws = iter([bytes(32), None, bytes(range(32))])
    host = Host(memory_bytes=0, random=lambda _length: next(draws))
    with pytest.raises(BackendError, match=r"TDH.MNG.ADDCX.*TDX_RND_NO_ENTROPY"):
        host._new_td(1)
    (tdr,) = host.module.tdrs.values()
    assert (len(tdr.tdcx), tdr.tdcs) == (5, None)
    page = host.take_private_pages(1)[0]
    assert host.seamcall(Leaf.MNG_ADDCX, rcx=page, rdx=tdr.hpa).rax == Status.TDX_SUCCESS
    assert tdr.tdcs.mig_enc_key == bytes(range(32))


def test_a_vcpu_that_is_not_ready_cannot_call():
    """A TDCALL of it is refused before anything else."""
    pair = Pair(2, profile=PUBLISHED)
    pair.source._tdvps(0).state = VcpuState.DISABLED
    registers = Registers(rcx=PAGE_SIZE)
    module, vcpu = pair.source_host.module, pair.source.td.vcpus[0]
    status = module.tdcall(GuestLeaf.MEM_PAGE_ACCEPT, registers, vcpu)
    assert status == Status.TDX_VCPU_STATE_INCORRECT
