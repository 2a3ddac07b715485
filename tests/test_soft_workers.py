"""Do worker processes give what the module's own process gives, and never outlive it?"""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from soft_calls import export, exported, load
from soft_pair import MIGRATE, Pair

from tdxmig_model.backend.soft.backend import SoftBackend
from tdxmig_model.backend.soft.batches import SMALLEST_BATCH
from tdxmig_model.backend.soft.gpa_entries import INVALID_BIT
from tdxmig_model.backend.soft.host import Host
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.schedulers import Seeded
from tdxmig_model.backend.soft.status import Operand, Status, with_operand
from tdxmig_model.backend.soft.workers import Workers
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import BackendError, UsageError
from tdxmig_model.wire.constants import PAGE_SIZE

PAGES = 160


@pytest.fixture
def pairs():
    """A pair without workers and an equal one with two on each side; both paused."""
    made = []
    for workers in (0, 2):
        pair = Pair(PAGES, pending_pages=10)
        hosts = (pair.source_host, pair.destination_host)
        for host in hosts if workers else ():
            host.module.workers = Counting(Workers(host.memory, workers))
        pair.start()
        pair.pause()
        made.append(pair)
    yield made
    for pair in made:
        for host in (pair.source_host, pair.destination_host):
            if host.module.workers is not None:
                host.module.workers.close()


class Counting:
    """Workers, and how many pages they were asked for."""

    def __init__(self, workers):
        self.workers, self.pages = workers, 0

    def seal(self, columns):
        self.pages += columns.source.size
        return self.workers.seal(columns)

    def open(self, columns, macs):
        self.pages += columns.source.size
        return self.workers.open(columns, macs)

    def __getattr__(self, name):
        return getattr(self.workers, name)


def asked(pair):
    return [host.module.workers.pages for host in (pair.source_host, pair.destination_host)]


def parts(bundle):
    return bundle.mbmd, [bytes(page) for page in bundle.pages], bundle.gpa_list, bundle.macs


def both(pairs, act):
    """What `act` gives for either pair, which has to be the same."""
    plain, shared = (act(pair) for pair in pairs)
    assert plain == shared
    assert pairs[0].iv_pairs == pairs[1].iv_pairs
    for side in ("source", "destination"):
        one, two = (getattr(pair, side) for pair in pairs)
        assert one.observe() == two.observe()
        assert one.memory_digest() == two.memory_digest()
        gpas = pairs[0].gpas
        assert one.page_states(gpas).tolist() == two.page_states(gpas).tolist()
    return shared


def test_a_migration_is_the_same(pairs):
    def migrate(pair):
        sent = []
        for gpas in np.array_split(pair.gpas, 2):
            bundle = pair.export(gpas)
            sent.append(parts(bundle))
            assert not pair.on_destination(c.ImportMem(0, bundle)).statuses.any()
        pair.states()
        pair.start_token()
        pair.assert_equal()
        return sent

    both(pairs, migrate)
    # The pages with content of both bundles: the pending ones have none.
    assert asked(pairs[1]) == [150, 150]


def test_short_interrupted_and_interleaved_calls_stay_here(pairs):
    def act(pair):
        pair.move(pair.gpas[: SMALLEST_BATCH - 1])
        pair.source.interrupt = pair.destination.interrupt = lambda: False
        pair.move(pair.gpas[63:140])
        module = pair.source_host.module
        assert Seeded(module, 1).run([export(pair, pair.gpas[140:])]).final == [0]

    both(pairs, act)
    assert asked(pairs[1]) == [0, 0]


@pytest.mark.parametrize("spoil", ["nop", "malformed", "invalid buffer", "unusable buffer"])
def test_entries_that_are_not_exported(pairs, spoil):
    def act(pair):
        call = export(pair, pair.gpas)
        buffers, memory = pair.source_host.stream_buffers(0), pair.source_host.memory
        gpas, targets = memory.page_words(buffers.gpas), memory.page_words(buffers.list)
        if spoil == "nop":
            gpas[5:100:7] &= ~np.uint64(3 << 52)
        elif spoil == "malformed":
            gpas[90] |= np.uint64(1 << 62)
        else:
            targets[90] = INVALID_BIT if spoil == "invalid buffer" else pair.source.td.tdr
        pair.source_host.module.call(Leaf.EXPORT_MEM, call.operands)
        return call.operands.rax, call.operands.rdx, parts(exported(pair, PAGES))

    status, _, _ = both(pairs, act)
    assert status == (0 if spoil == "nop" else 1)
    assert asked(pairs[1])[0] > 100


@pytest.mark.parametrize("alias", ["one buffer twice", "a MAC list", "the buffer list"])
def test_buffers_that_serve_two_purposes(pairs, alias):
    """What a careless VMM gets does not depend on who encrypts."""

    def act(pair):
        call = export(pair, pair.gpas)
        buffers, memory = pair.source_host.stream_buffers(0), pair.source_host.memory
        targets = memory.page_words(buffers.list)
        targets[80] = {
            "one buffer twice": targets[20],
            "a MAC list": buffers.macs_low,
            "the buffer list": buffers.list,
        }[alias]
        pair.source_host.module.call(Leaf.EXPORT_MEM, call.operands)
        return call.operands.rax, parts(exported(pair, PAGES))

    both(pairs, act)


def test_published_profile_ends_at_a_bad_buffer_with_the_pages_before_it():
    outcomes = []
    for workers in (0, 2):
        pair = Pair(PAGES, profile="tdx-1.5.01")
        if workers:
            pair.source_host.module.workers = Workers(pair.source_host.memory, workers)
        pair.start()
        pair.pause()
        call = export(pair, pair.gpas)
        buffers, memory = pair.source_host.stream_buffers(0), pair.source_host.memory
        memory.page_words(buffers.list)[120] = pair.source.td.tdr
        status = pair.source_host.module.call(Leaf.EXPORT_MEM, call.operands)
        assert status == with_operand(Status.TDX_OPERAND_INVALID, Operand.MIG_BUFF_LIST_ENTRY)
        outcomes.append((parts(exported(pair, PAGES)), pair.source.observe()))
        if workers:
            pair.source_host.module.workers.close()
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("spoil", ["mac", "page", "gpa twice", "page twice", "in place"])
def test_imports_that_go_wrong(pairs, spoil):
    """The same entry fails with the same status, and no decrypted page is left in a free one."""

    def act(pair):
        bundle = pair.export(pair.gpas)
        host = pair.destination_host
        host.add_tables(pair.destination.td, pair.gpas)
        pages = host.take_private_pages(PAGES)
        call = load(pair, bundle, pages)
        buffers, memory = host.stream_buffers(0), host.memory
        if spoil == "mac":
            memory.bytes[buffers.macs_low + 16 * 100] ^= 1
        elif spoil == "page":
            memory.bytes[buffers.buffers + 100 * PAGE_SIZE + 9] ^= 1
        elif spoil == "gpa twice":
            memory.page_words(buffers.gpas)[100] = memory.page_words(buffers.gpas)[99]
        elif spoil == "page twice":
            memory.page_words(buffers.new_pages)[100] = memory.page_words(buffers.new_pages)[99]
        else:
            memory.page_words(buffers.new_pages)[100] |= np.uint64(INVALID_BIT)
        status = host.module.call(Leaf.IMPORT_MEM, call.operands)
        free = [hpa for hpa in pages if not memory.page_type[hpa >> 12]]
        assert all(bytes(memory.page(hpa)) == bytes(PAGE_SIZE) for hpa in free)
        assert len(free) >= 1
        return status, call.operands.rcx, buffers.entries(PAGES).tolist(), len(free)

    both(pairs, act)
    assert pairs[1].state(pairs[1].destination) == "FAILED_IMPORT"


def test_a_replay_out_of_order_is_skipped_without_asking(pairs):
    def act(pair):
        pair.states()
        pair.start_token()
        bundle = pair.export(pair.gpas)
        pair.on_destination(c.ImportMem(0, bundle))
        return pair.on_destination(c.ImportMem(0, bundle)).statuses.tolist()

    both(pairs, act)
    assert asked(pairs[1]) == [150, 150]


def gone(pid, seconds=8.0):
    """Does the process end within this time?"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def working_host(workers=2):
    host = Host(memory_bytes=PAGES * PAGE_SIZE, shared_bytes=4 << 20, workers=workers)
    backend = SoftBackend(host, host.create_td(PAGES))
    backend.write_migration_decryption_key(bytes(range(32)))
    assert backend.execute(c.ExportStateImmutable()).ok
    assert backend.execute(c.ExportPause()).ok
    return host, backend


def test_closing_the_host_ends_its_workers():
    host, backend = working_host(3)
    pids = host.module.workers.pids
    assert len(set(pids)) == 3
    assert os.getpid() not in pids
    assert backend.execute(c.ExportMem(0, backend.page_gpas(), MIGRATE)).status == 0
    host.close()
    assert all(gone(pid) for pid in pids)
    host.module.workers.close()


@pytest.mark.parametrize("side", ["export", "import"])
def test_a_killed_worker_is_reported_and_leaves_the_leaf_complete(pairs, side):
    pair = pairs[1]
    host = pair.source_host if side == "export" else pair.destination_host
    bundle = None if side == "export" else pair.export(pair.gpas)
    pids = host.module.workers.pids
    os.kill(pids[1], signal.SIGKILL)
    assert gone(pids[1])
    backend, command = pair.source, c.ExportMem(0, pair.gpas, MIGRATE)
    if side == "import":
        backend, command = pair.destination, c.ImportMem(0, bundle)
    with pytest.raises(BackendError, match=f"worker process {pids[1]}") as lost:
        backend.execute(command)
    assert "WORKER_LOST" in str(lost.value)
    # The others ended too, no lock is held, and every page is where it belongs.
    assert all(gone(pid) for pid in pids)
    assert not host.memory.any_locked
    if side == "export":
        host.module.workers = None
        pair.assert_counts()
        assert not pair.on_destination(c.ImportMem(0, exported(pair, PAGES))).statuses.any()
    assert pair.source.memory_digest() == pair.destination.memory_digest()
    pair.states()
    pair.start_token()


def test_lost_workers_stay_lost():
    host, backend = working_host()
    os.kill(host.module.workers.pids[0], signal.SIGKILL)
    for text in ("has ended", "are closed"):
        with pytest.raises(BackendError, match=text):
            backend.execute(c.ExportMem(0, backend.page_gpas(), MIGRATE))
        backend.execute(c.ExportTrack())
        backend.execute(c.ExportMem(0, backend.page_gpas()[:2], 2))
        cancelled = backend.execute(c.ExportMem(0, backend.page_gpas(), 2))
        assert cancelled.status_name == "TDX_SUCCESS"
    assert backend.execute(c.ExportMem(0, backend.page_gpas()[:50], MIGRATE)).status == 0
    host.close()


@pytest.mark.parametrize("count", [-1, 65])
def test_a_sensible_number_of_workers(count):
    with pytest.raises(UsageError, match="workers"):
        Host(memory_bytes=1 << 20, shared_bytes=4 << 20, workers=count)


ORPHANS = """
import os, signal, sys
from tdxmig_model.backend.soft.host import Host
host = Host(memory_bytes=1 << 20, shared_bytes=4 << 20, workers=2)
print(*host.module.workers.pids, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif sys.argv[1] == "raises":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("ending", ["killed", "raises", "returns"])
def test_no_worker_outlives_its_host(ending):
    child = subprocess.run(
        [sys.executable, "-c", ORPHANS, ending], capture_output=True, text=True, timeout=30
    )
    pids = [int(pid) for pid in child.stdout.split()]
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
