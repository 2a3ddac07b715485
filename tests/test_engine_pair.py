"""Do both engines move a running TD between two software modules, and back on failure?"""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from ends import End, Ends, exchange_keys

from tdxmig_model.backend.soft.backend import SoftBackend
from tdxmig_model.engine import (
    Decision,
    DestinationEngine,
    Operation,
    PreCopy,
    PreCopyLimits,
    SourceEngine,
    drive,
)
from tdxmig_model.engine.commands import Gpas, ImportAbort, Send, VpEnter
from tdxmig_model.engine.pages import NO_PAGES
from tdxmig_model.engine.steps import ALL_CAPABILITIES
from tdxmig_model.errors import BackendError, PeerError, PeerLost, WireError
from tdxmig_model.premigration import MigrationKey, Versions, exchange, make_identity
from tdxmig_model.transport import Faults, Listener, Transport, connect, memory_pair
from tdxmig_model.wire import Capability, RecordParser, ReturnPathParser, encode, encode_return
from tdxmig_model.wire.extensions import ReturnMessage
from tdxmig_model.wire.records import EpochRecord, Record, StartSection

PAGES, VCPUS, STREAMS = 96, 2, 2


class SourceSide:
    """A source TD, its engine, and its end of the connection."""

    def __init__(
        self,
        transport: Transport,
        end: End,
        *,
        capabilities: Capability = ALL_CAPABILITIES,
        batch: int = 16,
    ) -> None:
        self.end = end
        self.backend, self.truth = end.backend, end.truth
        self.transport = transport
        self.engine = SourceEngine(
            bytes(16), pages=PAGES, vcpus=VCPUS, streams=STREAMS, capabilities=capabilities
        )
        limits = PreCopyLimits(batch=batch, epochs=4, remaining=2)
        self.precopy = PreCopy(self.truth.page_gpas(), limits)
        self.parser = ReturnPathParser()
        self.violations = 0

    def do(self, operation: Operation[Any]) -> Any:
        return drive(operation, self.backend.execute, self.send)

    def send(self, send: Send) -> None:
        self.transport.send(encode(cast(Record, send.record)))

    def hear(self) -> list[str | None]:
        heard = []
        while self.transport.poll():
            for message in self.parser.records(self.transport.recv(1 << 20)):
                heard.append(self.engine.receive(message))
        return heard

    def run_guest(self, budget: int = 40) -> None:
        if self.end.kvm is not None:
            self.run_guest_under_kvm(budget)
            return
        for vcpu in range(VCPUS):
            left = budget
            while left > 0:
                result = self.backend.execute(VpEnter(vcpu, left))
                assert result.ok, result.status_name
                assert result.exit is not None
                left -= result.exit.instructions
                if result.exit.reason != "ept_violation":
                    break
                page = (result.exit.gpa or 0) & ~0xFFF
                self.do(self.engine.unblock_page(page))
                self.precopy.dirty(page)
                self.violations += 1

    def run_guest_under_kvm(self, budget: int) -> None:
        """KVM lets the guest write, and tells of it in the dirty log."""
        before = self.end.dirty_pages().size
        for vcpu in range(VCPUS):
            assert self.end.run(vcpu, budget).reason == "budget"
        dirty = self.end.dirty_pages()
        self.precopy.dirty(dirty)
        self.violations += dirty.size - before

    def export_epoch(self, *, live: bool) -> None:
        self.precopy.next_epoch()
        self.do(self.engine.start_epoch())
        stream = 0
        while (batch := self.precopy.next_batch()) is not None:
            outcome = self.do(self.engine.export_memory(batch, stream))
            self.precopy.sent(batch, outcome.unsent)
            stream = (stream + 1) % STREAMS
            if live:
                self.run_guest()

    def export_live(self) -> None:
        while True:
            self.export_epoch(live=True)
            if self.precopy.decide() is not Decision.NEXT_EPOCH:
                return

    def export_rest(self) -> None:
        self.do(self.engine.pause())
        while not self.precopy.done:
            self.export_epoch(live=False)
            assert not self.precopy.stalled

    def export_state(self, streams: int = STREAMS) -> None:
        self.do(self.engine.export_td_state())
        for vcpu in range(VCPUS):
            self.do(self.engine.export_vcpu_state(vcpu, vcpu % streams))

    @property
    def op_state(self) -> Any:
        return self.truth.observe()["op_state"]


class DestinationSide:
    """A destination TD, its engine, and its end of the connection."""

    def __init__(
        self, transport: Transport, end: End, *, capabilities: Capability = ALL_CAPABILITIES
    ) -> None:
        self.end = end
        self.backend, self.truth = end.backend, end.truth
        self.transport = transport
        self.engine = DestinationEngine(
            pages=PAGES, vcpus=VCPUS, streams=STREAMS, capabilities=capabilities
        )
        self.parser = RecordParser()
        self.events: list[str] = []

    def do(self, operation: Operation[Any]) -> Any:
        return drive(operation, self.backend.execute, self.send)

    def send(self, send: Send) -> None:
        self.transport.send([encode_return(cast(ReturnMessage, send.record))])

    def serve(self) -> None:
        """Import everything that has arrived."""
        while self.transport.poll():
            for record in self.parser.records(self.transport.recv(1 << 20)):
                event = self.engine.accept(record)
                if event is None or event == "abort":
                    continue
                self.events.append(event)
                if event == "setup":
                    self.do(self.engine.setup())
                    continue
                whole = not isinstance(record, StartSection | EpochRecord)
                argument: Any = record if whole else cast(StartSection, record).bundle
                self.do(getattr(self.engine, event)(argument))

    @property
    def op_state(self) -> Any:
        return self.truth.observe()["op_state"]


def new_source(ends: Ends) -> End:
    return ends.source(PAGES, vcpus=VCPUS, streams=STREAMS)


def new_destination(ends: Ends) -> End:
    return ends.destination(PAGES, vcpus=VCPUS, streams=STREAMS)


def connected(
    ends: Ends,
    *,
    source_end: End | None = None,
    faults: Faults | None = None,
    capabilities: Capability = ALL_CAPABILITIES,
) -> tuple[SourceSide, DestinationSide]:
    near, far = memory_pair(forward=faults or Faults())
    source = SourceSide(near, source_end or new_source(ends), capabilities=capabilities)
    destination = DestinationSide(far, new_destination(ends), capabilities=capabilities)
    exchange_keys(source.end, destination.end)
    return source, destination


def begin(source: SourceSide, destination: SourceSide | DestinationSide) -> None:
    """HELLO both ways, immutable state, confirmation."""
    assert isinstance(destination, DestinationSide)
    source.do(source.engine.setup())
    destination.serve()
    source.hear()
    source.do(source.engine.export_immutable())
    destination.serve()
    assert source.hear() == ["confirm_import"]
    source.do(source.engine.confirm_import())


def begun(ends: Ends, **options: Any) -> tuple[SourceSide, DestinationSide]:
    source, destination = connected(ends, **options)
    begin(source, destination)
    return source, destination


def hand_over(source: SourceSide, destination: DestinationSide) -> None:
    """The paused part, up to and with the start token."""
    source.export_rest()
    source.export_state(vcpu_streams(destination))
    source.do(source.engine.finish_epochs())
    destination.serve()


def vcpu_streams(destination: DestinationSide) -> int:
    """Streams that may carry vCPU states to this destination."""
    return STREAMS if destination.end.has("vcpu_streams") else 1


def assert_equal(source: SourceSide, destination: DestinationSide) -> None:
    assert destination.truth.memory_digest() == source.truth.memory_digest()
    assert destination.truth.vcpu_digest() == source.truth.vcpu_digest()


def test_a_paused_td_arrives_whole(ends: Ends) -> None:
    source, destination = begun(ends)
    hand_over(source, destination)
    destination.do(destination.engine.end(bytes(32)))
    assert source.hear() == [None, "cleanup"]
    assert source.engine.in_order_done
    assert_equal(source, destination)
    assert (source.op_state, destination.op_state) == ("POST_EXPORT", "RUNNABLE")
    assert destination.engine.pages_imported == PAGES


def test_a_running_td_arrives_with_its_last_writes(ends: Ends) -> None:
    source, destination = begun(ends)
    source.export_live()
    destination.serve()
    assert source.violations > 0  # the guest did write pages that had been exported
    hand_over(source, destination)
    destination.do(destination.engine.commit())
    assert destination.op_state == "LIVE_IMPORT"
    assert_equal(source, destination)
    destination.do(destination.engine.end())
    assert source.precopy.exports > PAGES
    for vcpu in range(VCPUS):
        assert destination.end.run(vcpu, 50).reason == "budget"
    assert source.truth.execute(VpEnter(0, 50)).status_name == "TDX_OP_STATE_INCORRECT"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_it_works_over_sockets_with_each_side_in_its_own_thread(
    ends: Ends, kind: str, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path / 'stream'}" if kind == "unix" else "tcp:127.0.0.1:0"
    problems: list[BaseException] = []
    with Listener(address) as listener:
        source = SourceSide(connect(listener.address), new_source(ends))
        destination = DestinationSide(listener.accept(), new_destination(ends))
    exchange_keys(source.end, destination.end)

    def receive() -> None:
        try:
            while not destination.engine.start_token_imported:
                assert destination.transport.poll(10.0)
                destination.serve()
            destination.do(destination.engine.end())
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    source.do(source.engine.setup())
    while source.engine.peer is None:
        assert source.transport.poll(10.0)
        source.hear()
    source.do(source.engine.export_immutable())
    while not source.engine.session_started:
        assert source.transport.poll(10.0)
        source.hear()
    source.export_live()
    source.export_rest()
    source.export_state(vcpu_streams(destination))
    source.do(source.engine.finish_epochs())
    thread.join(20)
    assert not problems
    source.transport.poll(10.0)
    assert source.hear() == [None, "cleanup"]
    assert source.engine.in_order_done
    assert_equal(source, destination)
    for side in (source, destination):
        side.transport.close()


def test_keys_from_a_real_pre_migration_open_a_session(ends: Ends) -> None:
    near, far = memory_pair()
    source = SourceSide(near, new_source(ends))
    destination = DestinationSide(far, new_destination(ends))
    identities = make_identity("source"), make_identity("destination")
    ends = socket.socketpair()

    def agree(role: Any, index: int, backend: SoftBackend) -> None:
        key = MigrationKey(backend.read_migration_encryption_key())
        agreement = exchange(
            role, ends[index], identities[index], identities[1 - index].certificate, key, Versions()
        )
        backend.write_migration_decryption_key(agreement.peer_key.take())
        backend.write_migration_version(agreement.version)

    thread = threading.Thread(target=agree, args=("destination", 1, destination.truth))
    thread.start()
    agree("source", 0, source.truth)
    thread.join()
    for end in ends:
        end.close()
    begin(source, destination)
    hand_over(source, destination)
    destination.do(destination.engine.end())
    assert_equal(source, destination)


def test_other_keys_end_it_before_anything_is_imported(ends: Ends) -> None:
    near, far = memory_pair()
    source = SourceSide(near, new_source(ends))
    destination = DestinationSide(far, new_destination(ends))
    exchange_keys(source.end, destination.end)
    destination.truth.write_migration_decryption_key(bytes(range(32)))
    source.do(source.engine.setup())
    destination.serve()
    source.hear()
    source.do(source.engine.export_immutable())
    refused = "MAC" if destination.end.kvm is None else "EIO"
    with pytest.raises(BackendError, match=f"import_state_immutable .*{refused}"):
        destination.serve()
    destination.do(destination.engine.abort("other keys"))
    assert "abort" in source.hear()
    assert source.engine.failure == "other keys"
    source.do(source.engine.abort())
    assert source.op_state == "RUNNABLE"


def test_an_aborted_td_runs_on_and_can_be_migrated_again(ends: Ends) -> None:
    source, destination = begun(ends)
    source.export_live()
    assert source.do(source.engine.abort("not today")).size == 0
    destination.serve()
    assert destination.engine.source_abort == "not today"
    give_up(destination, "the source aborted")
    assert source.op_state == "RUNNABLE"
    observed = source.truth.observe()
    assert observed["mig_count"] == 0

    before = source.truth.memory_digest()
    run_freely(source)
    assert source.truth.memory_digest() != before

    again, target = begun(ends, source_end=source.end)
    again.export_live()
    hand_over(again, target)
    target.do(target.engine.end())
    assert_equal(again, target)


def run_freely(source: SourceSide) -> None:
    """No page is write-blocked any more: the guest runs without a single exit."""
    for vcpu in range(VCPUS):
        assert source.end.run(vcpu, 200).reason == "budget"


def give_up(destination: DestinationSide, reason: str) -> None:
    """The destination aborts; an interface without the command says which one it lacks."""
    if destination.end.has("abort_token"):
        assert len(destination.do(destination.engine.abort(reason))) == 48
        assert destination.op_state == "FAILED_IMPORT"
        return
    with pytest.raises(BackendError, match=r"TDH\.IMPORT\.ABORT"):
        destination.do(destination.engine.abort(reason))


def test_after_the_start_token_only_the_abort_token_brings_the_td_back(ends: Ends) -> None:
    source, destination = begun(ends)
    for side in (source, destination):
        side.end.need("abort_token")
    source.export_live()
    hand_over(source, destination)
    assert source.op_state == "POST_EXPORT"
    with pytest.raises(PeerError, match="no abort token"):
        source.do(source.engine.abort_with_token())
    forged = bytearray(destination.do(destination.engine.abort("out of memory")))
    forged[40] ^= 1
    with pytest.raises(PeerError, match="TDX_INCORRECT_MBMD_MAC"):
        source.do(source.engine.abort_with_token(bytes(forged)))
    assert source.op_state == "POST_EXPORT"
    assert source.hear() == [None, None, "abort_with_token"]
    assert source.engine.failure == "out of memory"
    assert source.do(source.engine.abort_with_token()).size == 0
    assert (source.op_state, destination.op_state) == ("RUNNABLE", "FAILED_IMPORT")
    run_freely(source)


def test_cancelled_pages_leave_the_destination_and_come_back_in_a_later_epoch(ends: Ends) -> None:
    source, destination = begun(ends)
    source.export_epoch(live=False)
    cancelled = np.array([0x3000, 0x7000], dtype=np.uint64)
    if source.end.has("unblock"):
        source.do(source.engine.unblock_page(0x7000))
    source.do(source.engine.start_epoch())
    outcome = source.do(source.engine.cancel_page(cancelled))
    assert outcome.sent.tolist() == cancelled.tolist()
    destination.serve()
    assert destination.engine.pages_imported == PAGES - 2
    assert destination.truth.page_states(cancelled).tolist() == [1, 1]  # REMOVED
    source.precopy.dirty(cancelled)
    hand_over(source, destination)
    destination.do(destination.engine.end())
    assert_equal(source, destination)


def test_pages_can_follow_the_start_token(ends: Ends) -> None:
    source, destination = begun(ends)
    source.do(source.engine.pause())
    source.precopy.next_epoch()
    source.do(source.engine.start_epoch())
    first = source.precopy.next_batch()
    assert first is not None
    source.do(source.engine.export_memory(first))
    source.export_state(vcpu_streams(destination))
    source.do(source.engine.finish_epochs())
    destination.serve()
    destination.do(destination.engine.commit())
    with pytest.raises(PeerError, match=f"16 of {PAGES} pages"):
        destination.do(destination.engine.end())
    while (batch := source.precopy.next_batch()) is not None:
        outcome = source.do(source.engine.export_memory(batch, 1))
        source.precopy.sent(batch, outcome.unsent)
    destination.serve()
    destination.do(destination.engine.end())
    assert_equal(source, destination)


def test_without_post_copy_a_missing_page_is_noticed_before_the_start(ends: Ends) -> None:
    source, destination = begun(ends, capabilities=ALL_CAPABILITIES & ~Capability.POST_COPY)
    source.precopy.next_epoch()
    source.precopy.next_batch()  # forgotten
    source.precopy.sent(NO_PAGES, NO_PAGES)
    while (batch := source.precopy.next_batch()) is not None:
        source.do(source.engine.export_memory(batch))
    with pytest.raises(PeerError, match=f"after {PAGES - 16} of {PAGES} pages"):
        hand_over(source, destination)
    assert destination.op_state == "STATE_IMPORT"


def test_a_page_that_is_not_there_is_reported_and_the_rest_arrives(ends: Ends) -> None:
    source, destination = begun(ends)
    absent: Gpas = np.array([0x1000, PAGES << 12, 0x2000], dtype=np.uint64)
    for pause in (False, True):
        if pause:
            source.do(source.engine.pause())
        source.do(source.engine.start_epoch())
        outcome = source.do(source.engine.export_memory(absent + np.uint64(pause * 0x10000)))
        assert outcome.sent.size in (2, 3)
        if not pause:
            assert outcome.unsent.tolist() == [PAGES << 12]
    destination.serve()
    assert destination.engine.pages_imported == 4


def test_damage_of_any_byte_never_makes_a_td_run_with_other_memory(ends: Ends) -> None:
    source, destination = begun(ends)
    for side in (source, destination):
        side.end.need("abort_token")
    total = whole_run(source, destination)
    assert_equal(source, destination)
    dice = random.Random(11)
    caught = 0
    for _ in range(25):
        faults = Faults.drawn(dice, total)
        source, destination = connected(ends, faults=faults)
        try:
            begin(source, destination)
            whole_run(source, destination)
        except (WireError, PeerError, BackendError, AssertionError) as error:
            caught += 1
            settle(source, destination, error)
        else:
            assert_equal(source, destination)
        states = source.op_state, destination.op_state
        assert sum(state in {"RUNNABLE", "LIVE_EXPORT"} for state in states) == 1, (faults, states)
    assert caught > 15  # the rest hit bytes that carry nothing, such as an unused page


def whole_run(source: SourceSide, destination: DestinationSide) -> int:
    """From the confirmation to the end; returns the bytes that the source sent."""
    source.export_live()
    destination.serve()
    hand_over(source, destination)
    assert destination.engine.start_token_imported, "the stream stopped"
    destination.do(destination.engine.end())
    return source.transport.bytes_sent


def settle(source: SourceSide, destination: DestinationSide, error: Exception) -> None:
    """Bring both sides to a legal end after a failure; the token may travel another way."""
    with suppress(PeerLost):
        destination.do(destination.engine.abort(str(error)))
    if source.op_state == "POST_EXPORT":
        token = destination.backend.execute(ImportAbort()).bundle
        assert token is not None
        source.do(source.engine.abort_with_token(token.mbmd.pack()))
    elif source.op_state != "RUNNABLE":
        with suppress(PeerLost):
            source.do(source.engine.abort(str(error)))
