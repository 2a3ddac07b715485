"""Does each command of a stream do what KVM's migration driver does, odd parts included?"""

from __future__ import annotations

import errno
import struct

import numpy as np
import pytest
from kvm_caller import (
    ABORT,
    CANCEL,
    EXPORT_IMMUTABLE,
    EXPORT_MEM,
    EXPORT_TRACK,
    EXPORT_VP,
    IMPORT_IMMUTABLE,
    IMPORT_MEM,
    IMPORT_VP,
    MIGRATE,
    PAUSE,
    begin,
    clear_log,
    dirty_log,
    gpas_of,
)

PAGES = 24


def test_the_backward_stream_is_created_first_and_contexts_are_kept(callers):
    ends = callers()
    observed = ends.pair.source.observe
    assert observed()["num_migs"] == 0
    first = ends.source.stream()
    assert observed()["num_migs"] == 2
    second = ends.source.stream()
    assert observed()["num_migs"] == 3
    for fd in (second, first):
        assert ends.source.kvm.close(fd) == 0
    again = ends.source.stream()
    assert observed()["num_migs"] == 3
    ends.source.ok(again, EXPORT_IMMUTABLE)
    # A session with fewer streams still announces all contexts that there are.
    assert struct.unpack_from("<H", ends.source.get(again, 0, 48), 24)[0] == 2
    refused = ends.destination.stream()
    ends.carry(again, refused, 3)
    assert ends.destination.call(refused, IMPORT_IMMUTABLE, 3) == -errno.EIO


def test_more_streams_than_the_module_has_are_refused(callers):
    kvm = callers().source.kvm
    fds = []
    while (fd := kvm.create_device(11, False)) > 0:
        fds.append(fd)
    assert (len(fds), fd) == (511, -errno.EIO)


def test_a_failed_entry_is_no_failure_and_is_dirty_again(callers):
    ends = callers(clear_dirty_log=False)
    here, _ = begin(ends)
    assert clear_log(ends.source, 0, PAGES) == 0
    assert not dirty_log(ends.source).any()
    absent = PAGES << 12
    assert ends.source.export(here[0], [0x1000 | MIGRATE, absent | MIGRATE, 0x3000]) == 0
    # One page with content; two that count as none.
    assert ends.source.word.value == 1
    done, failed, skipped = ends.source.entries(here[0], 3)
    assert (done >> 52 & 3, done >> 56) == (1, 0)
    assert (failed >> 52 & 3, failed >> 56) == (0, 4)
    assert (skipped >> 52 & 3, skipped >> 56) == (0, 1)
    assert dirty_log(ends.source).nonzero()[0].tolist() == [3]
    # Exported a second time in the same epoch, a page fails, and is dirty again.
    assert ends.source.export(here[0], [0x1000 | MIGRATE]) == 0
    assert ends.source.entries(here[0], 1)[0] >> 56 == 4
    assert dirty_log(ends.source).nonzero()[0].tolist() == [1, 3]


def test_a_page_whose_log_was_not_cleared_is_not_exported_live(callers):
    ends = callers(clear_dirty_log=False)
    here, _ = begin(ends)
    assert ends.source.export(here[0], [0x1000 | MIGRATE]) == 0
    assert ends.source.entries(here[0], 1)[0] >> 56 & 31 == 4
    assert clear_log(ends.source, 0, PAGES, b"\x02" + bytes(7)) == 0
    assert ends.source.export(here[0], [0x1000 | MIGRATE]) == 0
    assert ends.source.entries(here[0], 1)[0] >> 56 == 0


@pytest.mark.parametrize(
    ("first", "count", "slot", "code"),
    [
        (1, 64, 0, errno.EINVAL),
        (0, 65, 0, errno.EINVAL),
        (0, 128, 0, errno.EINVAL),
        (128, 64, 0, errno.EINVAL),
        (0, 64, 1, errno.ENOENT),
        (0, 64, 0, 0),
        (64, 36, 0, 0),
    ],
)
def test_the_dirty_log_is_cleared_in_whole_words_of_the_slot(callers, first, count, slot, code):
    caller = callers(pages=100).source
    assert clear_log(caller, first, count, slot=slot) == -code
    assert int(dirty_log(caller).sum()) == (100 if code else 100 - count)


def test_the_number_of_pages_is_one_too_high_with_a_second_mac_list(callers):
    ends = callers(pages=300)
    here, _ = begin(ends)
    for count, told in ((256, 256), (257, 258)):
        ends.source.ok(here[0], EXPORT_TRACK)
        ends.source.put(here[0], 1, bytes(4096))
        gpas = gpas_of(ends)[:count]
        if count == 257:
            ends.source.ok(here[0], PAUSE, None)
            ends.source.export(here[0], [gpa | CANCEL for gpa in gpas[:256]])
            ends.source.ok(here[0], EXPORT_TRACK)
        assert ends.source.export(here[0], [gpa | MIGRATE for gpa in gpas]) == 0
        assert ends.source.word.value == told


def test_counts_are_bounded_where_the_driver_bounds_them(callers):
    ends = callers()
    here, there = begin(ends, pages=5)
    assert ends.source.call(here[0], EXPORT_MEM, 6) == -errno.EINVAL
    assert ends.destination.call(there[0], IMPORT_MEM, 513) == -errno.EINVAL
    # A count of 0 is 512 entries; none of them asks for anything.
    ends.source.put(here[0], 1, bytes(4096))
    assert ends.source.call(here[0], EXPORT_MEM, 0) == -errno.EIO  # there is no second MAC list
    wide = callers()
    here, _ = begin(wide, pages=512)
    wide.source.put(here[0], 1, bytes(4096))
    assert wide.source.call(here[0], EXPORT_MEM, 0) == 0
    assert {entry >> 56 for entry in wide.source.entries(here[0], 512)} == {1}


def test_the_first_import_of_a_page_has_to_be_a_migrate(callers):
    ends = callers()
    here, there = begin(ends)
    assert ends.source.export(here[0], [0x1000 | MIGRATE]) == 0
    ends.carry(here[0], there[0], 1, 1)
    remigrate = 3 << 52
    ends.destination.put(there[0], 1, struct.pack("<Q", 0x1000 | remigrate))
    assert ends.destination.call(there[0], IMPORT_MEM, 1) == -errno.EINVAL
    ends.destination.put(there[0], 1, struct.pack("<Q", 1 << 46 | MIGRATE))
    assert ends.destination.call(there[0], IMPORT_MEM, 1) == -errno.EIO  # no memory slot there
    ends.carry(here[0], there[0], 1, 1)
    ends.destination.ok(there[0], IMPORT_MEM, 1)


def test_a_failed_import_gives_the_pages_back(callers):
    ends = callers()
    here, there = begin(ends)
    gpas = gpas_of(ends)[:8]
    assert ends.source.export(here[0], [gpa | MIGRATE for gpa in gpas]) == 0
    ends.carry(here[0], there[0], 8, 8)
    ends.destination.put(there[0], 2, bytes(16 * 8))
    assert ends.destination.call(there[0], IMPORT_MEM, 8) == -errno.EIO
    assert ends.pair.state(ends.pair.destination) == "FAILED_IMPORT"
    assert not ends.pair.destination.td.page_hpas


def test_the_next_vcpu_is_exported_and_the_count_survives_an_abort(callers):
    ends = callers(vcpus=2)
    here, _ = begin(ends)
    ends.source.ok(here[0], PAUSE, None)
    ends.source.ok(here[0], EXPORT_VP)
    assert struct.unpack_from("<H", ends.source.get(here[0], 0, 48), 24)[0] == 0
    ends.source.ok(here[0], ABORT, PAGES)
    ends.pair.new_destination(0)
    ends.pair.exchange_keys()
    ends.source.ok(here[0], EXPORT_IMMUTABLE)
    ends.source.ok(here[0], PAUSE, None)
    ends.source.ok(here[0], EXPORT_VP)
    assert struct.unpack_from("<H", ends.source.get(here[0], 0, 48), 24)[0] == 1
    assert ends.source.call(here[0], EXPORT_VP) == -errno.EINVAL


def test_a_vcpu_that_the_vm_has_not_is_refused(callers):
    ends = callers()
    _, there = begin(ends)
    ends.destination.put(there[0], 0, struct.pack("<HHHB17xH", 48, 0, 0, 2, 1))
    assert ends.destination.call(there[0], IMPORT_VP, 5) == -errno.EINVAL


@pytest.mark.parametrize(
    ("dialect", "end", "restored"), [("Gen-1a", 4, 4), ("Gen-1a", 1 << 63, 8), ("Gen-1b", 0, 8)]
)
def test_an_abort_restores_what_its_dialect_says(callers, dialect, end, restored):
    ends = callers(dialect)
    here, there = begin(ends)
    ends.memory(here[0], there[0], gpas_of(ends)[:8])
    assert ends.source.call(here[0], ABORT, end) == 0
    assert ends.pair.state(ends.pair.source) == "RUNNABLE"
    assert ends.pair.source.observe()["mig_count"] == 8 - restored
    # The default stream's own list was used for it.
    assert ends.source.entries(here[0], 2)[0] & -4096 & (1 << 52) - 1 == (restored - 1) << 12


def test_an_abort_needs_the_default_stream(callers):
    ends = callers()
    here, _ = begin(ends, 2, pages=5)
    assert ends.source.kvm.close(here[0]) == 0
    assert ends.source.call(here[1], ABORT, PAGES) == -errno.EINVAL
    assert ends.pair.state(ends.pair.source) == "LIVE_EXPORT"


def test_every_page_is_dirty_when_a_session_begins(callers):
    ends = callers(clear_dirty_log=False)
    fd = ends.source.stream()
    assert clear_log(ends.source, 0, PAGES) == 0
    assert not dirty_log(ends.source).any()
    ends.source.ok(fd, EXPORT_IMMUTABLE)
    assert dirty_log(ends.source).all()


def test_an_entry_without_a_buffer_is_not_exported(callers):
    """A count of 0 asks for 512 entries, and for no buffer."""
    ends = callers()
    here, _ = begin(ends, pages=300)
    ends.source.ok(here[0], PAUSE, None)
    entries = bytearray(4096)
    for index, gpa in ((299, 0x1000), (300, 0x2000)):
        struct.pack_into("<Q", entries, 8 * index, gpa | MIGRATE)
    ends.source.put(here[0], 1, bytes(entries))
    assert ends.source.call(here[0], EXPORT_MEM, 0) == 0
    assert {entry >> 56 for entry in ends.source.entries(here[0], 301)[299:]} == {8}


def test_after_the_start_token_an_abort_aborts_nothing_and_says_so_neither(callers):
    ends = callers()
    here, there = begin(ends)
    ends.source.ok(here[0], PAUSE, None)
    ends.memory(here[0], there[0], gpas_of(ends))
    ends.end(here[0], there[0], 1)
    # Restoring is what its result is about; the module refuses that in POST_EXPORT.
    assert ends.source.call(here[0], ABORT, 0) == 0
    assert ends.source.call(here[0], ABORT, PAGES) == -errno.EIO
    assert ends.pair.state(ends.pair.source) == "POST_EXPORT"


def test_a_start_token_commits_and_an_epoch_token_does_not(callers):
    ends = callers()
    here, there = begin(ends)
    assert ends.pair.state(ends.pair.destination) == "MEMORY_IMPORT"
    ends.source.ok(here[0], PAUSE, None)
    ends.memory(here[0], there[0], gpas_of(ends))
    ends.end(here[0], there[0], 1)
    assert ends.pair.state(ends.pair.destination) == "LIVE_IMPORT"


def test_a_cancelled_page_is_free_again_at_the_destination(callers):
    ends = callers()
    here, there = begin(ends)
    ends.memory(here[0], there[0], [0x1000, 0x2000])
    ends.token(here[0], there[0])
    assert ends.source.export(here[0], [0x1000 | CANCEL]) == 0
    ends.carry(here[0], there[0], 1, 1)
    ends.destination.ok(there[0], IMPORT_MEM, 1)
    assert list(ends.pair.destination.td.page_hpas) == [0x2000]


def test_a_failed_write_block_ends_exports_for_good(callers):
    ends = callers(clear_dirty_log=False)
    here, _ = begin(ends)
    ends.pair.source_host.module.shut_down = True
    assert clear_log(ends.source, 0, PAGES) == 0
    ends.pair.source_host.module.shut_down = False
    assert ends.source.call(here[0], EXPORT_MEM, 1) == -errno.EBADF
    assert ends.source.call(here[0], ABORT, PAGES) == 0
    assert ends.source.call(here[0], EXPORT_MEM, 1) == -errno.EBADF


def test_interrupted_leaves_are_resumed_in_the_kernel(callers):
    ends = callers(vcpus=2)
    dice = np.random.default_rng(3)
    interrupts = []

    def interrupt():
        interrupts.append(bool(dice.random() < 0.4))
        return interrupts[-1]

    for caller in (ends.source, ends.destination):
        caller.kvm._driver.module.interrupt = interrupt
    here, there = begin(ends)
    ends.memory(here[0], there[0], gpas_of(ends))
    ends.source.ok(here[0], PAUSE, None)
    ends.end(here[0], there[0], 2)
    ends.pair.assert_equal()
    assert sum(interrupts) > 10
