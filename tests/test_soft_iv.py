"""Does the observer of the test run see a (key, IV) pair that is used twice?"""

from iv_record import RECORD
from soft_pair import Pair

from tdxmig_model.backend.soft.host import Host
from tdxmig_model.backend.soft.snapshot import Snapshot
from tdxmig_model.engine import commands as c


def test_every_encryption_of_a_session_is_seen():
    before = RECORD.total
    pair = Pair(8)
    pair.start()
    pair.finish_in_pause()
    # Immutable, TD and vCPU state, two MBMDs without content, eight pages.
    assert RECORD.total - before == 3 + 2 + 8
    assert RECORD.take_repeated() == []


def test_a_counter_that_goes_back_is_seen():
    pair = Pair(4)
    pair.start()
    pair.on_source(c.ExportTrack())
    migsc = pair.source._tdcs.links[1].migsc
    migsc.iv_counter -= 1
    pair.on_source(c.ExportTrack())
    ((key, iv),) = RECORD.take_repeated()
    assert key == pair.source._tdcs.mig_enc_working_key
    assert iv == migsc.iv_counter.to_bytes(8, "little") + bytes(4)


def test_a_key_and_iv_that_both_sides_use_are_seen():
    pair = Pair(4)
    pair.start()
    # By hand, for no exchange of keys ends like this: both directions have one key.
    pair.destination._tdcs.mig_enc_working_key = pair.source._tdcs.mig_enc_working_key
    token = pair.on_destination(c.ImportAbort()).bundle.mbmd
    ((key, iv),) = RECORD.take_repeated()
    assert (key, iv) == (pair.source._tdcs.mig_enc_working_key, token.iv())


def test_pairs_have_records_of_their_own():
    for _ in range(2):
        pair = Pair(4)
        pair.start()
    assert RECORD.take_repeated() == []


def test_a_snapshot_takes_back_what_its_own_module_did():
    pair = Pair(4)
    pair.start()
    snapshot = Snapshot(pair.source_host.module)
    token = pair.on_source(c.ExportTrack())
    snapshot.restore()
    assert pair.on_source(c.ExportTrack()).bundle.mbmd == token.bundle.mbmd
    assert RECORD.take_repeated() == []
    pair.source._tdcs.links[1].migsc.iv_counter -= 1
    pair.on_source(c.ExportTrack())
    assert len(RECORD.take_repeated()) == 1


def test_modules_with_real_randomness_share_one_record():
    hosts = [Host(memory_bytes=1 << 20, shared_bytes=8 << 20) for _ in range(2)]
    pairs = [host.module.iv_observer.pairs for host in hosts]
    assert pairs[0] is pairs[1] is RECORD.shared
    assert Pair(4).source_host.module.iv_observer.pairs is not RECORD.shared
