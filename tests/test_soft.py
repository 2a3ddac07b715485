"""Do the good runs of a migration really move a TD from one software module to another?"""

import numpy as np
import pytest
from soft_pair import CANCEL, Pair

from tdxmig_model.backend.soft.backend import soft_destination, soft_source
from tdxmig_model.backend.soft.guest import GuestImage, Program
from tdxmig_model.backend.soft.host import Host
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import BackendError, UsageError
from tdxmig_model.wire.constants import PAGE_SIZE


def test_cold_migration():
    pair = Pair(24, vcpus=2)
    pair.run(0, 50)
    pair.run(1, 50)
    pair.start()
    pair.finish_in_pause()
    pair.assert_equal()
    pair.on_destination(c.ImportEnd())
    assert pair.state(pair.source) == "POST_EXPORT"
    assert pair.state(pair.destination) == "RUNNABLE"
    assert pair.destination.host.module.tdrs[pair.destination.td.tdr].tdcs.import_count == 1


def test_live_migration_with_reexport_carries_the_newer_version():
    pair = Pair(8, guest=GuestImage(Program.SEQUENTIAL, PAGE_SIZE, 1))
    page = PAGE_SIZE
    pair.run(0, 3)
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    first = pair.destination.read_page(page)
    assert pair.run(0, 5) == page
    assert pair.run(0, 5) is None
    assert pair.source.read_page(page) != first
    pair.block([page])
    pair.epoch()
    pair.move([page])
    pair.pause()
    pair.states()
    pair.start_token()
    pair.on_destination(c.ImportCommit())
    pair.assert_equal()
    pair.on_destination(c.ImportEnd())


def test_the_guest_goes_on_where_it_stopped():
    """Source and an untouched twin run the same instructions: the destination equals the twin."""
    pair, twin = Pair(20, guest="random-writer"), Pair(20, guest="random-writer")
    for side in (pair, twin):
        side.run(0, 100)
    pair.start()
    pair.finish_in_pause()
    pair.on_destination(c.ImportCommit())
    pair.on_destination(c.VpEnter(0, 150))
    twin.run(0, 150)
    assert pair.destination.memory_digest() == twin.source.memory_digest()
    assert pair.destination.read_vcpu(0)["R10"] == 250 - 1
    assert pair.destination.vcpu_digest() == twin.source.vcpu_digest()


@pytest.mark.parametrize("guest", ["idle", "random-writer", "hot-set", "sequential"])
@pytest.mark.parametrize("streams", [1, 3])
def test_several_epochs_with_a_running_guest(guest, streams):
    pair = Pair(48, vcpus=2, streams=streams, guest=guest)
    pair.start()
    pair.block(pair.gpas)
    for number, batch in enumerate(np.array_split(pair.gpas, 5)):
        pair.move(batch, stream=number % streams)
    for number in range(3):
        dirty = {pair.run(vcpu, 4) for _ in range(4) for vcpu in (0, 1)} - {None}
        pair.assert_counts()
        if dirty:
            pair.block(sorted(dirty))
        pair.epoch()
        if dirty:
            pair.move(sorted(dirty), stream=number % streams)
    pair.pause()
    pair.states()
    pair.start_token()
    pair.on_destination(c.ImportCommit())
    pair.assert_equal()
    assert pair.destination.execute(c.VpEnter(1, 20)).ok


def test_post_copy():
    pair = Pair(24)
    early, late, latest = np.array_split(pair.gpas, 3)
    pair.start()
    pair.pause()
    pair.move(early)
    pair.states()
    pair.start_token()
    pair.move(late)
    for gpa in (*early.tolist(), *late.tolist()):
        assert pair.source.read_page(gpa) == pair.destination.read_page(gpa)
    pair.on_destination(c.ImportCommit())
    missing = pair.on_destination(c.VpEnter(0, 1000)).exit
    assert missing.reason == "ept_violation"
    assert missing.gpa in latest
    pair.move(latest)
    pair.assert_counts()
    for gpa in latest.tolist():
        assert pair.source.read_page(gpa) == pair.destination.read_page(gpa)
    pair.on_destination(c.ImportEnd())
    assert pair.on_destination(c.VpEnter(0, 10)).exit.reason == "budget"


def test_abort_before_the_start_token_and_a_second_session():
    pair = Pair(16)
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas[:8])
    assert pair.run(0, 3) == PAGE_SIZE
    pair.on_source(c.ExportAbort(None))
    pair.assert_counts()
    refused = pair.source.execute(c.ExportStateImmutable())
    assert refused.status_name == "TDX_PREVIOUS_EXPORT_CLEANUP_INCOMPLETE"
    pair.restore_all()
    assert set(pair.source.page_states(pair.gpas)) == {SeptState.MAPPED}
    pair.assert_counts()
    assert pair.on_source(c.VpEnter(0, 100)).exit.reason == "budget"
    refused = pair.source.execute(c.ExportStateImmutable())
    assert refused.status_name == "TDX_MIGRATION_DECRYPTION_KEY_NOT_SET"
    pair.on_destination(c.ImportAbort())
    pair.new_destination()
    pair.exchange_keys()
    pair.start()
    assert pair.source.observe()["export_count"] == 2
    pair.finish_in_pause()
    pair.assert_equal()
    assert len(set(pair.iv_pairs)) == len(pair.iv_pairs)


def test_abort_after_the_start_token_brings_the_source_back():
    pair = Pair(16)
    pair.start()
    pair.finish_in_pause()
    pair.abort_with_token()
    assert pair.state(pair.source) == "RUNNABLE"
    assert pair.state(pair.destination) == "FAILED_IMPORT"
    assert not pair.destination.execute(c.VpEnter(0, 1)).ok
    pair.restore_all()
    assert pair.on_source(c.VpEnter(0, 50)).exit.reason == "budget"


def test_pending_pages_stay_pending_and_are_accepted_once():
    pair = Pair(12, pending_pages=4)
    pending = pair.gpas[8:]
    pair.start()
    pair.finish_in_pause()
    pair.on_destination(c.ImportCommit())
    pair.assert_equal()
    assert set(pair.destination.page_states(pending)) == {SeptState.PENDING}
    pair.on_destination(c.VpEnter(0, 12))
    assert set(pair.destination.page_states(pending)) == {SeptState.MAPPED}
    content = pair.destination.read_page(int(pending[0]))
    assert content != bytes(PAGE_SIZE)
    assert content.count(0) >= PAGE_SIZE - 8


def test_a_page_accepted_during_export_is_exported_again():
    pair = Pair(4, pending_pages=1, guest="sequential")
    page = int(pair.gpas[3])
    pair.run(0, 3)  # boot, and writes to the two accepted pages
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    assert pair.run(0, 10) == page
    assert pair.source.page_states(pair.gpas)[3] == SeptState.PENDING_EXPORTED_DIRTY
    pair.run(0, 1)
    assert pair.source.page_states(pair.gpas)[3] == SeptState.EXPORTED_DIRTY
    pair.assert_counts()
    pair.block([page])
    pair.epoch()
    pair.move([page])
    assert pair.source.read_page(page) == pair.destination.read_page(page)


def test_cancel_removes_the_page_and_a_newer_epoch_brings_it_back():
    pair = Pair(6)
    page = int(pair.gpas[3])
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    pair.epoch()
    pair.move([page], operation=CANCEL)
    assert pair.source.page_states(pair.gpas)[3] == SeptState.MAPPED
    assert pair.destination.page_states(pair.gpas)[3] == SeptState.REMOVED
    pair.assert_counts()
    pair.pause()
    pair.epoch()
    pair.move([page])
    pair.states()
    pair.start_token()
    pair.assert_equal()


def test_hosts_carry_several_tds_and_give_all_pages_back():
    host = Host(memory_bytes=64 * PAGE_SIZE)
    first = host.create_td(16, vcpus=2)
    second = host.create_td(16, vcpus=1, guest="idle")
    owned = np.frombuffer(host.memory.page_type, dtype=np.uint8)
    assert owned.any()
    for td in (first, second):
        host.destroy_td(td)
        host.destroy_td(td)
    # The Migration TD is the one that is left.
    assert len(host.module.tdrs) == 1
    host.destroy_td(host._migration_td)
    assert not owned.any()
    assert not host.module.hkids


def test_backends_of_their_own_host():
    source, destination = soft_source(8), soft_destination(8)
    assert source.observe()["op_state"] == "RUNNABLE"
    assert destination.observe()["op_state"] == "UNINITIALIZED"
    assert source.page_gpas().tolist() == [page * PAGE_SIZE for page in range(8)]
    source.close()
    destination.close()


def test_misuse_says_what_to_do():
    with pytest.raises(UsageError, match="unknown guest program"):
        soft_source(4, guest="busy")
    with pytest.raises(UsageError, match="unknown module profile"):
        soft_source(4, profile="lax")
    with pytest.raises(BackendError, match="memory_bytes"):
        Host(memory_bytes=0).create_td(1 << 14)
