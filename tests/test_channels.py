"""Do several channels carry one migration as one would, whatever comes first on which of them?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from engine_play import OK, gpas, immutable, memory_bundle, play, td_state
from test_session import PAGES, VCPUS, Migration, backends, migrate

from tdxmig_model.engine import DestinationEngine
from tdxmig_model.errors import PeerLost
from tdxmig_model.session import Ending, SessionOptions
from tdxmig_model.trace import read_trace
from tdxmig_model.transport import Faults, MemoryTransport, Transport, memory_pair
from tdxmig_model.transport.base import Readable
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import Bundle, EpochRecord, MemoryRecord, RecordParser

SMALL = SessionOptions(batch=8, converged_pages=8, peer_timeout=1.0)


class Slow:
    """A receiving end on which bytes are seen only when it was asked `turns` times."""

    def __init__(self, inner: Transport, turns: int) -> None:
        self._inner = inner
        self._turns = turns
        self._asked = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def poll(self, timeout: float = 0.0) -> bool:
        self._asked += 1
        if self._asked <= self._turns:
            return False
        if self._inner.poll(0.0):
            self._asked = 0
            return True
        return False

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        return self._inner.recv(min(limit, 40_000), timeout)


class Recorded:
    """A sending end that keeps what was sent."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.data = bytearray()

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        for buffer in buffers:
            self.data += buffer
        self._inner.send(buffers, timeout)


class Mute(Recorded):
    """A sending end that has no room."""

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        raise PeerLost("no room to send before the deadline")


def channels(
    count: int, *, faults: Faults | None = None
) -> list[tuple[MemoryTransport, MemoryTransport]]:
    """Pairs for channels 1 to `count` - 1; the faults are those of channel 1."""
    return [
        memory_pair(forward=faults or Faults()) if not number else memory_pair()
        for number in range(count - 1)
    ]


def assert_arrived(done: Migration) -> None:
    ours, theirs = backends(done)
    assert [outcome.ending for outcome in done.outcomes] == [Ending.MIGRATED] * 2
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    assert theirs.memory_digest() == ours.memory_digest()
    assert theirs.vcpu_digest() == ours.vcpu_digest()
    done.assert_accepted()


# --- the engine: what waits for what -------------------------------------------------------------


def token(epoch: int, total: int) -> Bundle:
    return Bundle.of(Mbmd.epoch_token(total_mb=total, mig_epoch=epoch, iv_counter=2))


def memory(*pages: int, epoch: int = 1, stream: int = 1) -> MemoryRecord:
    column = gpas(*pages)
    bundle = memory_bundle(column, stream=stream, epoch=epoch)
    return MemoryRecord(int(column[0]), "pc.ram", bundle)


def importing(streams: int = 2) -> DestinationEngine:
    engine = DestinationEngine(pages=64, vcpus=1, streams=streams)
    play(engine.import_immutable(immutable(streams)), OK)
    return engine


def test_memory_waits_for_the_session_and_for_its_epoch() -> None:
    engine = DestinationEngine(pages=64, vcpus=1, streams=2)
    assert not engine.ready(memory(1, epoch=0))
    play(engine.import_immutable(immutable(2)), OK)
    assert engine.ready(memory(1, epoch=0))
    assert not engine.ready(memory(1, epoch=1))
    play(engine.import_epoch(token(1, 2)), OK)
    assert engine.ready(memory(1, epoch=1))
    assert engine.ready(memory(1, epoch=0)), "a stale bundle is refused by the module, not kept"
    assert not engine.ready(memory(1, epoch=0xFFFFFFFF))


def test_a_token_waits_for_every_bundle_that_it_counts() -> None:
    engine = importing()
    play(engine.import_epoch(token(1, 2)), OK)
    late = EpochRecord(token(2, 5))
    for page in (1, 2):
        assert not engine.ready(late)
        play(engine.import_memory(memory(page)), OK)
    assert engine.ready(late)
    assert engine.ready(EpochRecord(token(2, 3))), "a token that counts too few is refused"
    assert engine.ready(td_state(link=True))
    assert not engine.ready(Bundle.of(token(0xFFFFFFFF, 9).mbmd))


def test_it_can_say_what_is_missing() -> None:
    engine = importing()
    assert "counts 4 bundles before it, 1 have arrived" in engine.missing(EpochRecord(token(1, 5)))
    assert "epoch 3 waits for the token" in engine.missing(memory(1, epoch=3))


# --- whole migrations ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_running_td_arrives_over_several_channels(count: int, tmp_path: Path) -> None:
    done = migrate(tmp_path, options=SMALL, more_channels=channels(count))
    assert_arrived(done)
    used = Counter(
        record.message.stream
        for record in read_trace(done.traces[1])
        if record.step == "import_mem" and record.message is not None
    )
    assert set(used) == set(range(count))
    assert max(used.values()) - min(used.values()) <= 1, "the bundles are not distributed"


@pytest.mark.parametrize("slow", [[0], [1], [2], [1, 2], [0, 2]])
def test_whichever_channel_is_late(slow: list[int], tmp_path: Path) -> None:
    """Tokens come before the memory that they count, and memory before the token of its epoch."""
    pairs = channels(3)
    more = [(near, Slow(far, 25) if n in slow else far) for n, (near, far) in enumerate(pairs, 1)]

    def prepare(_source: object, destination: object) -> None:
        if 0 in slow:
            inlet = destination._inlets.channels[0]  # type: ignore[attr-defined]
            inlet.transport = Slow(inlet.transport, 25)

    # The last epoch has pages for every channel, so that the TD state could overtake them.
    options = SessionOptions(batch=4, converged_pages=PAGES, guest_budget=1000, peer_timeout=2.0)
    done = migrate(tmp_path, options=options, more_channels=more, prepare=prepare)  # type: ignore[arg-type]
    assert_arrived(done)


def test_full_lists_travel_on_every_channel(tmp_path: Path) -> None:
    """Lists of more than 256 entries have a second MAC page."""
    import test_session

    from tdxmig_model.backend.soft.backend import soft_destination, soft_source

    pages = 1100
    done = migrate(
        tmp_path,
        ours=soft_source(pages, vcpus=VCPUS, streams=2, guest="idle"),
        theirs=soft_destination(pages, vcpus=VCPUS, streams=2),
        options=SessionOptions(batch=512, peer_timeout=2.0),
        more_channels=channels(2),
        room=pages,
    )
    assert test_session.PAGES == PAGES
    assert_arrived(done)
    sizes = [
        (record.message.stream, record.message.n)
        for record in read_trace(done.traces[0])
        if record.step == "export_mem" and record.message is not None
    ]
    assert sizes[:3] == [(0, 512), (1, 512), (0, 76)]


def test_each_channel_is_a_stream_that_can_be_parsed_alone(tmp_path: Path) -> None:
    """The block is named on each, and each has memory of its own stream and nothing else."""
    pairs = [(Recorded(near), far) for near, far in channels(3)]
    migrate(tmp_path, options=SMALL, more_channels=pairs)  # type: ignore[arg-type]
    for number, (near, _) in enumerate(pairs, 1):
        parser = RecordParser()
        records = list(parser.records(bytes(near.data)))
        assert parser.at_boundary
        assert all(isinstance(record, MemoryRecord) for record in records)
        assert {record.bundle.mbmd.migs_index for record in records} == {number}  # type: ignore[union-attr]
        named = [record.same_block for record in records]  # type: ignore[union-attr]
        assert named == [False] + [True] * (len(records) - 1)


def test_streams_share_a_channel_if_there_is_only_one(tmp_path: Path) -> None:
    from tdxmig_model.backend.soft.backend import soft_destination, soft_source

    done = migrate(
        tmp_path,
        ours=soft_source(PAGES, vcpus=VCPUS, streams=3),
        theirs=soft_destination(PAGES, vcpus=VCPUS, streams=3),
        options=SMALL,
        streams=3,
    )
    assert_arrived(done)


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["start_epoch", "export_memory", "pause", "finish_epochs"])
def test_a_stop_ends_every_channel(event: str, tmp_path: Path) -> None:
    pairs = channels(3)
    done = migrate(tmp_path, options=SMALL, more_channels=pairs, stop=("source", event))
    assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert done.runnable == (True, False)
    assert all(end._closed for pair in pairs for end in pair)
    done.assert_accepted()


@pytest.mark.parametrize("at", [0, 1, 3000, 40_000, 150_000])
@pytest.mark.parametrize("kind", ["cut_at", "truncate_at", "flip_at"])
def test_a_fault_on_a_further_channel_costs_the_migration_and_not_the_td(
    kind: str, at: int, tmp_path: Path
) -> None:
    pairs = channels(2, faults=Faults(**{kind: at}))
    done = migrate(tmp_path, options=SMALL, more_channels=pairs)
    assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert done.runnable == (True, False)
    assert done.destination.outcome.cause
    done.assert_accepted()


def test_a_channel_that_cannot_send_is_told_on_the_first(tmp_path: Path) -> None:
    pairs = [(Mute(near), far) for near, far in channels(2)]
    done = migrate(tmp_path, options=SMALL, more_channels=pairs)  # type: ignore[arg-type]
    assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert "no room" in done.source.outcome.cause
    assert "the source gave up" in done.destination.outcome.cause
    done.assert_accepted()


def test_memory_that_never_comes_is_missed_at_the_token(tmp_path: Path) -> None:
    pairs = [(near, Slow(far, 1 << 60)) for near, far in channels(2)]
    done = migrate(tmp_path, options=SMALL, more_channels=pairs)  # type: ignore[arg-type]
    assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert "a token counts" in done.destination.outcome.cause
    done.assert_accepted()


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    """A channel whose first record has to wait is not read any further."""
    near, far = memory_pair()
    engine = importing()
    from tdxmig_model.session.channels import Inlets
    from tdxmig_model.wire.records import encode

    main_near, main_far = memory_pair()
    inlets = Inlets([main_far, far], engine.ready)
    for page in range(1, 1000):
        near.send(encode(memory(page, epoch=4)))
    assert inlets.read()
    assert inlets.take() is None
    before = far.bytes_received
    assert before <= 1 << 20
    assert not inlets.read()
    assert far.bytes_received == before
    assert inlets.awaited == [main_far]
    main_near.send(encode(EpochRecord(token(4, 2))))
    assert inlets.read()
    record = inlets.take()
    assert isinstance(record, EpochRecord)
    play(engine.import_epoch(record.bundle), OK)
    assert isinstance(inlets.take(), MemoryRecord)
