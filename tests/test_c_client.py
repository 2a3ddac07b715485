"""Does C code, written for the kernel's interface, migrate a TD against our engine and itself?"""

from __future__ import annotations

import errno
from typing import Any, cast

import numpy as np
import pytest
from c_client import COMPILER, Client, build
from kvm_caller import dirty_log
from soft_pair import Pair

from tdxmig_model.backend.softkvm import SoftKvm
from tdxmig_model.engine import DestinationEngine, SourceEngine, drive
from tdxmig_model.engine.commands import Send, VpEnter
from tdxmig_model.errors import BackendError
from tdxmig_model.wire import Capability, RecordParser, encode
from tdxmig_model.wire.records import EpochRecord, Record, StartSection

pytestmark = [
    pytest.mark.gcc,
    pytest.mark.skipif(COMPILER is None, reason="needs gcc"),
]
DIALECTS = pytest.mark.parametrize("dialect", ["Gen-1a", "Gen-1b"])
PAGES, VCPUS = 48, 2


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    return {dialect: build(folder, dialect) for dialect in ("Gen-1a", "Gen-1b")}


@pytest.fixture
def scene(libraries):
    """Makes a pair of TDs, and clients of either end; what they hold is given back."""
    made: list[Client] = []

    class Scene:
        def __init__(self, dialect: str, streams: int = 1) -> None:
            self.pair = Pair(PAGES, vcpus=VCPUS, streams=streams, guest="hot-set")
            self.dialect, self.streams = dialect, streams
            self.gpas = [int(gpa) for gpa in self.pair.gpas]

        def client(self, side: str, stream: bytes = b"", pages: int = 1) -> Client:
            host = getattr(self.pair, f"{side}_host")
            kvm = SoftKvm(host, getattr(self.pair, side).td, self.dialect)
            made.append(Client(libraries[self.dialect], kvm, stream))
            assert made[-1].setup(self.streams, pages) == 0
            return made[-1]

    yield Scene
    for client in made:
        client.call("cleanup")
        client.kvm.shut_down()


def send_running(client: Client, scene: Any, batch: int = 1) -> None:
    """What the core of a VMM has a client do: a pass while the guest runs, then the rest."""
    assert client.call("send_start") == 0
    passes = [scene.gpas]
    for number in (0, 1):
        assert client.call("send_epoch") == 0
        for at in range(0, len(passes[-1]), batch):
            stream = at // batch % scene.streams
            assert client.send_pages(passes[-1][at : at + batch], stream) == 0
        if number == 0:
            assert client.kvm.run_vcpu(0, 80).reason == "budget"
            assert client.call("pause") == 0
            passes.append([int(gfn) << 12 for gfn in np.flatnonzero(dirty_log_of(client))])
    assert 0 < len(passes[1]) < PAGES
    assert client.call("send_end", VCPUS) == 0


def dirty_log_of(client: Client) -> Any:
    return dirty_log(client)


def receive_with_the_engine(pair: Pair, stream: bytes, streams: int = 1) -> DestinationEngine:
    engine = DestinationEngine(pages=PAGES, vcpus=VCPUS, streams=streams)
    for record in RecordParser().records(stream):
        event = engine.accept(record)
        if event is not None:
            framed = isinstance(record, StartSection | EpochRecord)
            argument: Any = cast(StartSection, record).bundle if framed else record
            drive(getattr(engine, event)(argument), pair.destination.execute, print)
    return engine


def send_with_the_engine(pair: Pair, streams: int = 1) -> bytes:
    """A whole migration of a source that knows nothing of its peer, as bytes."""
    engine = SourceEngine(
        bytes(16), pages=PAGES, vcpus=VCPUS, streams=streams, capabilities=Capability(0)
    )
    written = bytearray()

    def send(item: Send) -> None:
        for part in encode(cast(Record, item.record)):
            written.extend(part)

    def do(operation: Any) -> Any:
        return drive(operation, pair.source.execute, send)

    do(engine.export_immutable())
    do(engine.start_epoch())
    for number, gpa in enumerate(pair.gpas):
        assert not do(engine.export_memory(np.array([gpa]), number % streams)).unsent.size
    dirty = sorted({pair.run(0, 6) for _ in range(6)} - {None})
    do(engine.pause())
    do(engine.start_epoch())
    for gpa in dirty:
        do(engine.export_memory(np.array([gpa], dtype=np.uint64)))
    do(engine.export_td_state())
    for vcpu in range(VCPUS):
        do(engine.export_vcpu_state(vcpu))
    do(engine.finish_epochs())
    assert dirty
    return bytes(written)


@DIALECTS
@pytest.mark.parametrize("streams", [1, 2])
def test_c_sends_a_running_td_to_our_engine(scene, dialect, streams):
    here = scene(dialect, streams)
    client = here.client("source")
    send_running(client, here)
    engine = receive_with_the_engine(here.pair, bytes(client.stream), streams)
    assert engine.start_token_imported
    drive(engine.end(), here.pair.destination.execute, print)
    here.pair.assert_equal()
    assert here.pair.state(here.pair.destination) == "RUNNABLE"
    assert here.pair.state(here.pair.source) == "POST_EXPORT"


@DIALECTS
@pytest.mark.parametrize("streams", [1, 2])
def test_c_receives_a_running_td_from_our_engine(scene, dialect, streams):
    there = scene(dialect, streams)
    client = there.client("destination", send_with_the_engine(there.pair, streams))
    assert client.call("load") == 0
    assert there.pair.state(there.pair.destination) == "LIVE_IMPORT"
    assert client.call("load_end") == 0
    there.pair.assert_equal()
    assert client.stream[client.read :] == b"\x7e"  # the footer, which is not its business
    assert client.kvm.run_vcpu(1, 40).reason == "budget"


@DIALECTS
@pytest.mark.parametrize(("streams", "batch"), [(1, 1), (3, 8), (1, 48)])
def test_c_sends_to_c(scene, dialect, streams, batch):
    both = scene(dialect, streams)
    source = both.client("source", pages=batch)
    send_running(source, both, batch)
    destination = both.client("destination", bytes(source.stream), pages=batch)
    assert destination.call("load") == 0
    assert destination.read == len(source.stream)
    assert destination.call("load_end") == 0
    both.pair.assert_equal()


@DIALECTS
def test_c_aborts_and_sends_again(scene, dialect):
    here = scene(dialect)
    client = here.client("source")
    assert client.call("send_start") == 0
    assert client.call("send_epoch") == 0
    for gpa in here.gpas[:20]:
        assert client.send_pages([gpa]) == 0
    assert client.call("abort", 20) == 0
    assert here.pair.source.observe()["mig_count"] == 0
    client.call("cleanup")
    for vcpu in range(VCPUS):
        assert client.kvm.run_vcpu(vcpu, 50).reason == "budget"

    here.pair.new_destination(1)
    here.pair.exchange_keys()
    again = here.client("source")
    send_running(again, here)
    engine = receive_with_the_engine(here.pair, bytes(again.stream))
    drive(engine.end(), here.pair.destination.execute, print)
    here.pair.assert_equal()
    client.kvm.shut_down()


def test_c_cancels_a_page_and_sends_it_again(scene):
    both = scene("Gen-1a")
    source = both.client("source")
    assert source.call("send_start") == 0
    assert source.call("send_epoch") == 0
    for gpa in both.gpas:
        assert source.send_pages([gpa]) == 0
    assert source.call("pause") == 0
    assert source.call("send_epoch") == 0
    assert source.send_pages([0x3000], cancel=True) == 0
    assert source.call("send_epoch") == 0
    assert source.send_pages([0x3000]) == 0
    assert source.call("send_end", VCPUS) == 0
    destination = both.client("destination", bytes(source.stream))
    assert destination.call("load") == 0
    both.pair.assert_equal()


def test_c_is_told_of_a_page_that_was_refused(scene):
    here = scene("Gen-1b")
    client = here.client("source")
    assert client.call("send_start") == 0
    assert client.call("send_epoch") == 0
    assert client.send_pages([0x3000]) == 0
    assert client.send_pages([0x3000]) == 1
    assert dirty_log_of(client)[3]


def test_a_stream_that_was_changed_on_the_way_fails_in_c(scene):
    """Cut anywhere, or one byte changed: an errno, and the TD does not run."""
    stream = send_with_the_engine(scene("Gen-1a").pair)
    dice = np.random.default_rng(5)
    for number in range(12):
        there = scene("Gen-1a")
        sent = bytearray(send_with_the_engine(there.pair))
        assert len(sent) == len(stream)
        if number < 6:
            del sent[int(dice.integers(len(sent) - 60)) :]
        else:
            # Headers and metadata of the bundles in front; a page's unused tail may be anything.
            sent[int(dice.integers(1, 53))] ^= 0x40
        client = there.client("destination", bytes(sent))
        assert client.call("load") in (-errno.EPIPE, -errno.EPROTO, -errno.EIO)
        assert not there.pair.destination.execute(VpEnter(0, 1)).ok


def test_another_key_is_eio_in_c(scene):
    there = scene("Gen-1b")
    stream = send_with_the_engine(there.pair)
    there.pair.destination.write_migration_decryption_key(bytes(range(32)))
    client = there.client("destination", stream)
    assert client.call("load") == -errno.EIO
    with pytest.raises(BackendError, match="KVM_RUN"):
        client.kvm.run_vcpu(0, 1)
