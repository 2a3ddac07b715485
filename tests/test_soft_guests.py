"""Do guest programs do what they are set to do, and are pages converted by leaves alone?"""

from collections import Counter

import numpy as np
import pytest
from soft_pair import Pair

from tdxmig_model.backend.soft.backend import SoftBackend, soft_source
from tdxmig_model.backend.soft.call import Point, Registers
from tdxmig_model.backend.soft.conversion import map_gpa
from tdxmig_model.backend.soft.guest import (
    MAP_GPA,
    MAP_GPA_INVALID,
    MAP_GPA_RETRY,
    MAP_GPA_SUCCESS,
    SHARED_BIT,
    EptViolation,
    GuestImage,
    Phase,
    Program,
    Ran,
    step,
)
from tdxmig_model.backend.soft.host import Host
from tdxmig_model.backend.soft.leaves_run import EXIT_TDCALL, LAST_EXIT_VMCALL
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf
from tdxmig_model.backend.soft.sept import (
    ACCEPT,
    LOCK_BIT,
    READABLE_STATES,
    STATE_BITS,
    STATE_MASK,
    SeptState,
    removed_entry,
)
from tdxmig_model.backend.soft.status import Operand, Status, with_operand
from tdxmig_model.enforcer import Enforcer
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import PAGE_SIZE

WRITERS = ["random-writer", "hot-set", "sequential"]


class Bench:
    """A machine without a module: memory as a dictionary, accesses counted."""

    def __init__(self, image, vcpu=0):
        raw = image.page()
        self.words = {at: int.from_bytes(raw[at : at + 8], "little") for at in range(0, 64, 8)}
        self.registers = dict.fromkeys(("GUEST_RIP", "RBX", "RCX", "RDX", "RDI", "R8"), 0)
        self.registers["RSI"] = vcpu
        self.reads, self.writes, self.accepted = Counter(), Counter(), []

    def read(self, gpa):
        self.reads[gpa >> 12] += 1
        return self.words.get(gpa, 0)

    def write(self, gpa, value):
        self.writes[gpa >> 12] += 1
        self.words[gpa] = value

    def accept(self, gpa):
        self.accepted.append(gpa)

    def run(self, instructions):
        return [step(self) for _ in range(instructions)]


# --- write rates ---------------------------------------------------------------------------------


@pytest.mark.parametrize("guest", [Program.RANDOM_WRITER, Program.HOT_SET, Program.SEQUENTIAL])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_instructions_that_write(guest, rate):
    bench = Bench(GuestImage(guest, PAGE_SIZE, 64, seed=5, hot_pages=4, write_rate=rate))
    assert bench.run(4001) == [Ran.ON] * 4001
    writes = sum(bench.writes.values())
    assert abs(writes / 4000 - rate) < 0.03
    assert (writes in (0, 4000)) == (rate in (0.0, 1.0))
    assert set(bench.writes) <= set(range(1, 65))
    # Those that do not write read the same pages: the working set does not depend on the rate.
    assert set(bench.reads) - {0} == set(range(1, 65))


def test_the_hot_set_is_written_most_at_any_rate():
    for rate in (0.2, 1.0):
        image = GuestImage(Program.HOT_SET, PAGE_SIZE, 64, hot_pages=4, write_rate=rate)
        bench = Bench(image)
        bench.run(3000)
        hot = sum(bench.writes[page] for page in range(1, 5))
        assert hot > 0.85 * sum(bench.writes.values())


def test_an_idle_guest_halts():
    assert Bench(GuestImage(Program.IDLE, PAGE_SIZE, 8)).run(3) == [Ran.ON, Ran.HALTED, Ran.HALTED]
    empty = Bench(GuestImage(Program.PAGE_CONVERTER, PAGE_SIZE, 0))
    assert Ran.CALLED not in empty.run(200)


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_is_a_share(rate):
    with pytest.raises(UsageError, match="between 0 and 1"):
        soft_source(4, write_rate=rate)


@pytest.mark.parametrize("guest", WRITERS)
def test_a_rate_travels_with_the_guest(guest):
    """What the destination goes on with is what an untouched twin does."""
    host = Host(memory_bytes=20 * PAGE_SIZE)
    digests = []
    for migrated in (False, True):
        pair = Pair(20)
        pair.source.close()
        td = pair.source_host.create_td(20, guest=guest, seed=3, write_rate=0.3)
        pair.source = SoftBackend(pair.source_host, td)
        pair.run(0, 100)
        before = pair.source.memory_digest()
        side = pair.source
        if migrated:
            pair.exchange_keys()
            pair.start()
            pair.finish_in_pause()
            pair.on_destination(c.ImportEnd())
            side = pair.destination
        assert side.memory_digest() == before
        assert side.execute(c.VpEnter(0, 150)).exit == c.VcpuExit("budget", None, 150)
        assert side.memory_digest() != before
        digests.append((side.memory_digest(), side.vcpu_digest()))
    assert digests[0] == digests[1]
    host.close()


def test_a_guest_that_only_reads_never_exits():
    """Reading a write-blocked page is no EPT violation: nothing becomes dirty."""
    pair = Pair(8)
    pair.source.close()
    td = pair.source_host.create_td(8, guest="random-writer", write_rate=0.0)
    pair.source = SoftBackend(pair.source_host, td)
    pair.exchange_keys()
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    assert pair.on_source(c.VpEnter(0, 500)).exit == c.VcpuExit("budget", None, 500)
    assert pair.source.observe()["dirty_count"] == 0


# --- the page converter --------------------------------------------------------------------------


def converting(pages=40, *, hot=8, vcpus=1, rate=1.0, **more):
    image = GuestImage(
        Program.PAGE_CONVERTER, PAGE_SIZE, pages - 1, seed=9, hot_pages=hot, write_rate=rate
    )
    return Pair(pages, guest=image, vcpus=vcpus, **more)


def registers_of(backend, vcpu=0):
    return backend.read_vcpu(vcpu)


def recorded(host):
    """The leaves that this host calls from now on."""
    leaves, call = [], host.module.call

    def record(leaf, registers, **more):
        status = call(leaf, registers, **more)
        leaves.append((Leaf(leaf), status))
        return status

    host.module.call = record
    return leaves


def test_the_program_asks_and_acts_on_the_answer():
    """Shared, private, accept, one write: only on the pages that are for it, which differ."""
    asked = []
    for vcpu in (0, 1):
        image = GuestImage(Program.PAGE_CONVERTER, PAGE_SIZE, 40, seed=2, hot_pages=20)
        bench = Bench(image, vcpu)
        registers, calls = bench.registers, []
        answers = iter([MAP_GPA_RETRY, MAP_GPA_SUCCESS] * 5000)
        for _ in range(4000):
            if step(bench) is Ran.CALLED:
                assert (registers["R10"], registers["R11"]) == (0, MAP_GPA)
                assert registers["R13"] == PAGE_SIZE
                registers["R10"] = next(answers)
                calls.append((registers["R12"], registers["R10"]))
        to_shared = {gpa & ~SHARED_BIT for gpa, _ in calls if gpa & SHARED_BIT}
        to_private = [gpa for gpa, answer in calls if not gpa & SHARED_BIT and not answer]
        assert bench.accepted == to_private[: len(bench.accepted)]
        assert registers["RDI"] in (len(bench.accepted), len(bench.accepted) - 1)
        assert registers["RDI"] > 20
        assert registers["R10"] == 4000 - 1 or registers["R8"] in (1, 3)
        asked.append(to_shared)
        # Everything else it writes is in front of the pages for conversion.
        assert {page for page in bench.writes if page > 20} <= {gpa >> 12 for gpa in to_shared}
    assert asked[0] == {(21 + n) * PAGE_SIZE for n in (0, 16)}
    assert asked[1] == {(21 + n) * PAGE_SIZE for n in (1, 17)}


def test_pages_are_converted_by_leaves():
    pair = converting(vcpus=2)
    leaves = recorded(pair.source_host)
    assert pair.on_source(c.VpEnter(0, 2000)).exit == c.VcpuExit("budget", None, 2000)
    assert pair.on_source(c.VpEnter(1, 2000)).exit.reason == "budget"
    names = [leaf for leaf, _ in leaves if leaf is not Leaf.VP_ENTER]
    given_back = [Leaf.MEM_RANGE_BLOCK, Leaf.MEM_TRACK, Leaf.MEM_PAGE_REMOVE]
    while names:
        expected = [Leaf.MEM_PAGE_AUG] if names[0] is Leaf.MEM_PAGE_AUG else given_back
        assert names[: len(expected)] == expected
        del names[: len(expected)]
    assert not any(status >> 63 for _, status in leaves)
    for vcpu in (0, 1):
        assert registers_of(pair.source, vcpu)["RDI"] > 20
    states = Counter(SeptState(state).name for state in pair.source.page_states(pair.gpas))
    assert set(states) <= {"MAPPED", "FREE", "PENDING"}
    assert states["MAPPED"] >= 38
    assert pair.source.td.page_hpas.keys() >= set(pair.source.page_gpas().tolist())


def test_a_page_that_was_taken_again_is_empty_but_for_one_word():
    pair = converting(hot=1)
    gpa = int(pair.gpas[-1])
    old = pair.source.read_page(gpa)
    while registers_of(pair.source)["RDI"] < 3 or registers_of(pair.source)["R8"] != Phase.WORK:
        pair.run(0, 1)
    content = pair.source.read_page(gpa)
    assert content != old
    assert content.count(0) >= PAGE_SIZE - 8


def test_pages_return_to_the_allocator():
    """Thousands of conversions in a host that has room for the TD and no more."""
    pair = converting(16, hot=4)
    host = pair.source_host
    owned = np.count_nonzero(np.frombuffer(host.memory.page_type, dtype=np.uint8))
    pair.on_source(c.VpEnter(0, 20_000))
    assert registers_of(pair.source)["RDI"] > 500
    after = np.count_nonzero(np.frombuffer(host.memory.page_type, dtype=np.uint8))
    assert owned - 1 <= after <= owned
    pair.source.close()
    assert len(host.module.tdrs) == 1


def test_a_call_is_answered_even_when_the_budget_ends_with_it():
    pair = converting()
    for _ in range(3000):
        pair.on_source(c.VpEnter(0, 1))
        assert registers_of(pair.source)["LAST_TD_EXIT"] != LAST_EXIT_VMCALL
    twin = converting()
    twin.on_source(c.VpEnter(0, 3000))
    assert pair.source.vcpu_digest() == twin.source.vcpu_digest()


def test_the_registers_of_a_vmcall_exit():
    """RAX says TDCALL, RCX which registers; the next entry brings R10 and nothing else changes."""
    pair = converting()
    module, vcpu = pair.source_host.module, pair.source.td.vcpus[0]
    module.processors[0].timer = 5000
    registers = Registers(rcx=vcpu)
    module.call(Leaf.VP_ENTER, registers)
    assert registers.rax == EXIT_TDCALL
    assert registers.rcx == 0x3C00
    assert (registers.r10, registers.r11, registers.r13) == (0, MAP_GPA, PAGE_SIZE)
    assert registers.r12 & SHARED_BIT
    guest = registers_of(pair.source)
    assert guest["LAST_TD_EXIT"] == LAST_EXIT_VMCALL
    assert guest["R8"] == Phase.ASKED_TO_SHARE
    module.processors[0].timer = 0
    registers.rcx, registers.r10 = vcpu, MAP_GPA_RETRY
    module.call(Leaf.VP_ENTER, registers)
    assert registers_of(pair.source)["R10"] == MAP_GPA_RETRY
    module.processors[0].timer = 1
    registers = Registers(rcx=vcpu, r10=77)
    module.call(Leaf.VP_ENTER, registers)
    guest = registers_of(pair.source)
    assert guest["R8"] == Phase.WORK
    assert guest["RAX"] == 0


def test_during_export_conversions_wait_and_go_on_at_the_destination():
    pair = converting(24, hot=6)
    pair.run(0, 500)
    before = registers_of(pair.source)["RDI"]
    assert before > 0
    gpas = pair.source.page_gpas()
    pair.start()
    pair.block(gpas)
    pair.move(gpas)
    leaves = recorded(pair.source_host)
    for _ in range(30):
        pair.run(0, 20)
    assert {leaf for leaf, _ in leaves} <= {Leaf.VP_ENTER, Leaf.EXPORT_UNBLOCKW}
    assert registers_of(pair.source)["RDI"] <= before + 1
    pair.pause()
    pair.epoch()
    states = pair.source.page_states(gpas)
    pair.move(gpas[states == SeptState.EXPORTED_DIRTY])
    pair.states()
    pair.start_token()
    pair.assert_equal()
    pair.on_destination(c.ImportCommit())
    done = 0
    while done < 2000:
        ended = pair.on_destination(c.VpEnter(0, 2000 - done)).exit
        assert ended.reason == "budget"
        done += ended.instructions
    assert registers_of(pair.destination)["RDI"] > before + 20
    pair.on_destination(c.ImportEnd())
    assert pair.on_destination(c.VpEnter(0, 500)).exit.reason == "budget"


def test_conversions_while_exporting():
    """Pages that were not exported yet are converted, exported ones are not; counts stay exact."""
    pair = converting(24, hot=18)
    pair.source.convert_while_exporting = True
    pair.start()
    first = pair.gpas[:21]
    pair.block(first)
    pair.move(first)  # one of the vCPU's two pages for conversion
    leaves = recorded(pair.source_host)
    for _ in range(120):
        pair.run(0, 20)
        pair.assert_counts()
    answers = {status for leaf, status in leaves if leaf is Leaf.MEM_RANGE_BLOCK}
    wrong = with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    assert answers == {Status.TDX_SUCCESS, wrong}
    assert registers_of(pair.source)["RDI"] > 5
    pair.pause()
    pair.epoch()
    present = pair.source.page_gpas()
    clean = pair.source.page_states(present) == SeptState.EXPORTED_BLOCKEDW
    pair.move(present[~clean])
    pair.states()
    pair.start_token()
    pair.assert_equal()


def test_a_page_cannot_be_taken_while_a_vcpu_runs_with_it():
    """The other vCPU is in the guest since before the block: "retry", and later success."""
    pair = converting(vcpus=2)
    gpa = int(pair.gpas[-1])
    host, td = pair.source_host, pair.source.td
    module = host.module
    module.processors[1].timer = 1 << 20
    steps = module.start(Leaf.VP_ENTER, Registers(rcx=td.vcpus[1]), lp=1)
    for point in steps:
        if point is Point.GUEST:
            break
    assert map_gpa(host, td, gpa | SHARED_BIT, PAGE_SIZE) == (MAP_GPA_RETRY, gpa | SHARED_BIT)
    assert pair.source.page_states(pair.gpas)[-1] == SeptState.BLOCKED
    module.processors[1].timer = 0
    for _ in steps:
        pass
    assert map_gpa(host, td, gpa | SHARED_BIT, PAGE_SIZE) == (MAP_GPA_SUCCESS, 0)
    assert pair.source.page_states(pair.gpas)[-1] == SeptState.FREE
    assert map_gpa(host, td, gpa | SHARED_BIT, PAGE_SIZE) == (MAP_GPA_SUCCESS, 0)
    for _ in range(2):
        assert map_gpa(host, td, gpa, PAGE_SIZE) == (MAP_GPA_SUCCESS, 0)
    assert pair.source.page_states(pair.gpas)[-1] == SeptState.PENDING


@pytest.mark.parametrize(
    ("start", "size"), [(1, PAGE_SIZE), (0, 0), (0, 100), (SHARED_BIT - PAGE_SIZE, 2 * PAGE_SIZE)]
)
def test_ranges_that_cannot_be_mapped(start, size):
    pair = converting()
    assert map_gpa(pair.source_host, pair.source.td, start, size) == (MAP_GPA_INVALID, start)


def test_several_pages_in_one_call():
    pair = converting()
    host, td = pair.source_host, pair.source.td
    first, size = 30 * PAGE_SIZE, 5 * PAGE_SIZE
    assert map_gpa(host, td, first | SHARED_BIT, size) == (MAP_GPA_SUCCESS, 0)
    assert set(pair.source.page_states(pair.gpas[30:35])) == {SeptState.FREE}
    assert pair.source.page_gpas().size == 35
    assert map_gpa(host, td, first, size) == (MAP_GPA_SUCCESS, 0)
    assert set(pair.source.page_states(pair.gpas[30:35])) == {SeptState.PENDING}


def test_the_model_agrees_with_a_converting_guest():
    """The enforcer compares every leaf with the model; LIVE_EXPORT converts nothing."""
    pair = converting(24, hot=6)
    enforcer = Enforcer(pair.source, "source", pages=24, vcpus=1)
    assert enforcer.execute(c.ExportStateImmutable()).ok
    for _ in range(40):
        ended = enforcer.execute(c.VpEnter(0, 50)).exit
        assert ended.reason == "budget"
    assert enforcer.execute(c.ExportBlockw(pair.gpas)).ok
    assert enforcer.execute(c.MemTrack()).ok
    assert registers_of(pair.source)["RDI"] == 0


# --- TDG.MEM.PAGE.ACCEPT -------------------------------------------------------------------------


def accept(pair, info):
    module = pair.source_host.module
    return module.tdcall(GuestLeaf.MEM_PAGE_ACCEPT, Registers(rcx=info), pair.source.td.vcpus[0])


@pytest.mark.parametrize("state", [s for s in SeptState if s.name[:3] != "NL_"])
def test_accept_in_every_state(state):
    pair = Pair(4)
    gpa = 2 * PAGE_SIZE
    words, slot = pair.source_host.memory.words, pair.source._tdcs.sept.slot(gpa)
    before = words[slot] & ~STATE_MASK | STATE_BITS[state]
    words[slot] = before
    if state in ACCEPT:
        assert accept(pair, gpa) == Status.TDX_SUCCESS
        assert pair.source.page_states(pair.gpas)[2] == ACCEPT[state]
        assert pair.source.read_page(gpa) == bytes(PAGE_SIZE)
        assert accept(pair, gpa) == Status.TDX_PAGE_ALREADY_ACCEPTED
        return
    if state in READABLE_STATES:
        assert accept(pair, gpa) == Status.TDX_PAGE_ALREADY_ACCEPTED
    else:
        with pytest.raises(EptViolation):
            accept(pair, gpa)
    assert words[slot] == before


def test_operands_of_accept():
    pair = Pair(4, pending_pages=1)
    gpa = 3 * PAGE_SIZE
    invalid = with_operand(Status.TDX_OPERAND_INVALID, Operand.RCX)
    for info in (gpa | 8, gpa | 1 << 60, gpa | 1, 3, SHARED_BIT):
        assert accept(pair, info) == invalid
    assert accept(pair, 0 | 1) == Status.TDX_PAGE_SIZE_MISMATCH | 1
    with pytest.raises(EptViolation):
        accept(pair, 1 << 40)
    words, slot = pair.source_host.memory.words, pair.source._tdcs.sept.slot(gpa)
    words[slot] |= LOCK_BIT
    assert accept(pair, gpa) == with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
    words[slot] &= ~LOCK_BIT
    assert accept(pair, gpa) == Status.TDX_SUCCESS


def test_a_program_that_accepts_a_removed_page():
    """1.5.01 tells it of another page size, and again; repaired, the VMM is asked for it."""
    for profile, ended in (("hardened", "ept_violation"), ("tdx-1.5.01", "budget")):
        pair = converting(24, hot=6, profile=profile)
        while registers_of(pair.source)["R8"] != Phase.ACCEPT:
            pair.run(0, 1)
        gpa = registers_of(pair.source)["RDX"] * PAGE_SIZE + PAGE_SIZE
        words, slot = pair.source_host.memory.words, pair.source._tdcs.sept.slot(gpa)
        words[slot] = removed_entry(0)
        assert pair.on_source(c.VpEnter(0, 5)).exit.reason == ended
