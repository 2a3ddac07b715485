"""What a Migration TD reads and writes of the TD that it serves, and what a binding returns."""

import pytest
from soft_pair import Pair
from soft_state import changes, snapshot

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.leaves_servtd import (
    EXPORT_COUNT,
    MIG_DEC_KEY,
    MIG_DEC_KEY_SET,
    MIG_ENC_KEY,
    MIG_ENC_WORKING_KEY,
    MIG_VERSION,
    MIG_WORKING_VERSION,
    PRE_IMPORT_UUID,
    TD_UUID,
)
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf
from tdxmig_model.backend.soft.status import Operand, Status, with_operand

ALL_ONES = (1 << 64) - 1
READ, WRITE = GuestLeaf.SERVTD_RD, GuestLeaf.SERVTD_WR
FIRST = Status.TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT
UNKNOWN = Status.TDX_METADATA_FIELD_ID_INCORRECT
NOT_WRITABLE = Status.TDX_METADATA_FIELD_NOT_WRITABLE


@pytest.fixture(params=["tdx-1.5.01", "hardened"])
def pair(request):
    return Pair(2, profile=request.param)


def access(pair, leaf, field, *, value=0, mask=ALL_ONES, **more):
    host, td = pair.source_host, pair.source.td
    registers = Registers(rcx=td.binding_handle, rdx=field, r8=value, r9=mask)
    registers.r10, registers.r11, registers.r12, registers.r13 = td.uuid
    for name, changed in more.items():
        setattr(registers, name, changed)
    host.module.tdcall(leaf, registers, host._migration_td.vcpus[0])
    return registers


def test_the_next_field_leads_through_every_field_that_can_be_read(pair):
    """Each is read on the way; the null id is before the first and after the last."""
    first = access(pair, READ, ALL_ONES)
    assert (first.rax, first.rdx, first.r8) == (FIRST, TD_UUID, 0)
    values, field = {}, first.rdx
    while field != ALL_ONES:
        left = access(pair, READ, field)
        assert left.rax == Status.TDX_SUCCESS
        values[field], field = left.r8, left.rdx
    tdr, tdcs = pair.source_host.module.tdrs[pair.source.td.tdr], pair.source._tdcs
    assert tuple(values[TD_UUID + word] for word in range(4)) == tdr.uuid
    assert tuple(values[PRE_IMPORT_UUID + word] for word in range(4)) == tdcs.pre_import_uuid
    assert (
        tuple(values[0x9910000300000000 + word] for word in range(6)) == tdcs.fields["SERVTD_HASH"]
    )
    assert values[0x1110000300000000] == tdcs.fields["ATTRIBUTES"]
    assert values[0x1110000300000004] == tdcs.fields["EPTP"] & 0xFFF
    assert len(values) == 4 + 6 + 2 + 4 * 4 + 2 + 4 + 7
    assert list(values)[-1] == 0x9910000100000006
    assert access(pair, READ, EXPORT_COUNT).rdx == EXPORT_COUNT + 1
    assert access(pair, READ, MIG_WORKING_VERSION).rdx == PRE_IMPORT_UUID


def test_a_read_that_fails_gives_the_null_field_and_no_value(pair):
    for field, status in (
        (0x1234, UNKNOWN),
        (MIG_DEC_KEY_SET, Status.TDX_METADATA_FIELD_NOT_READABLE),
    ):
        left = access(pair, READ, field, value=7)
        assert (left.rax, left.rdx, left.r8) == (status, ALL_ONES, 0)
    left = access(pair, READ, EXPORT_COUNT, value=7, r10=1)
    assert left.rax == Status.TDX_TARGET_UUID_MISMATCH
    assert (left.rdx, left.r8) == (ALL_ONES, 0)


@pytest.mark.parametrize("context", range(8))
def test_the_context_code_is_always_that_of_the_td(pair, context):
    elsewhere = EXPORT_COUNT & ~(7 << 52) | context << 52
    assert access(pair, READ, elsewhere).rax == Status.TDX_SUCCESS
    assert access(pair, READ, ALL_ONES & ~(7 << 52) | context << 52).rax == FIRST
    version = MIG_VERSION & ~(7 << 52) | context << 52
    assert access(pair, WRITE, version).rax == Status.TDX_SUCCESS


@pytest.mark.parametrize(
    ("field", "mask", "status"),
    [
        (MIG_DEC_KEY, 0, NOT_WRITABLE),
        (MIG_DEC_KEY + 3, 0, NOT_WRITABLE),
        (MIG_VERSION, 0, NOT_WRITABLE),
        (MIG_VERSION, 0xFFFF_0000, NOT_WRITABLE),
        (MIG_ENC_KEY, ALL_ONES, NOT_WRITABLE),
        (MIG_ENC_WORKING_KEY, ALL_ONES, NOT_WRITABLE),
        (MIG_DEC_KEY_SET, ALL_ONES, NOT_WRITABLE),
        (0x1234, ALL_ONES, UNKNOWN),
        (ALL_ONES, ALL_ONES, UNKNOWN),
    ],
)
def test_what_cannot_be_written_changes_nothing(pair, field, mask, status):
    pair.source._tdcs.mig_dec_key_set = False
    before = snapshot(pair.source_host.module)
    left = access(pair, WRITE, field, value=5, mask=mask)
    assert (left.rax, left.rdx, left.r8) == (status, field, 0)
    assert not changes(before, snapshot(pair.source_host.module))


def test_a_binding_that_fails_returns_zeros(pair):
    tdr, service = pair.source.td.tdr, pair.source_host._migration_td.tdr
    outputs = ("rcx", "r10", "r11", "r12", "r13")
    operands = {"rcx": tdr, "rdx": service, "r11": 1, "r12": 2, "r13": 3}
    bound = pair.source_host.seamcall(Leaf.SERVTD_BIND, **operands)
    assert bound.rax == Status.TDX_SUCCESS
    assert (bound.rcx, bound.r10, bound.r11, bound.r12, bound.r13) == (
        pair.source.td.binding_handle,
        *pair.source.td.uuid,
    )
    for wrong in ({"rdx": tdr}, {"rcx": tdr | 8}, {"r8": 1}, {"r10": 1}, {"r10": 1 << 60}):
        left = pair.source_host.seamcall(Leaf.SERVTD_BIND, **{**operands, **wrong})
        assert left.rax & 1 << 63
        assert [getattr(left, name) for name in outputs] == [0] * 5


def test_mng_init_returns_nothing_in_rcx(pair):
    host = pair.destination_host
    td = host._new_td(1)
    left = host.seamcall(Leaf.MNG_INIT, rcx=td.tdr, rdx=8)
    assert left.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.RDX)
    assert left.rcx == 0
    assert host.seamcall(Leaf.MNG_INIT, rcx=td.tdr | 1, rdx=8).rcx == 0
