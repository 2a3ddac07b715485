"""Is a TD in a file safe: stored before the start token, whole or not there, loaded once?"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_session import OPTIONS, PAGES, SESSION, VCPUS, StopBefore

from tdxmig_model import replay
from tdxmig_model.backend.soft.backend import SoftBackend, soft_destination, soft_source
from tdxmig_model.errors import PeerError, PeerLost, UsageError
from tdxmig_model.premigration import MigrationKey, Versions, make_identity
from tdxmig_model.sealed import seal, unseal
from tdxmig_model.session import (
    Ending,
    Hooks,
    SideOutcome,
    StoredDestinationSession,
    StoredSourceSession,
)
from tdxmig_model.supervisor.stored import StoredFile
from tdxmig_model.trace import TraceWriter, read_trace
from tdxmig_model.transport import FileReader, FileWriter
from tdxmig_model.transport.base import Readable

# --- the transport -------------------------------------------------------------------------------


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "td"
    writer = FileWriter(path)
    pieces = [bytes([n % 251]) * (n % 7) for n in range(3000)]
    writer.send(pieces[:2000])
    writer.reserve(1 << 16)
    writer.sync()
    writer.send(pieces[2000:])
    assert not path.exists()
    writer.finish()
    writer.close()
    assert path.read_bytes() == b"".join(pieces)
    assert writer.bytes_sent == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]

    reader = FileReader(path)
    assert reader.poll()
    assert reader.recv(1 << 20) == b"".join(pieces)
    with pytest.raises(PeerLost, match="the file ends here"):
        reader.recv(1)
    with pytest.raises(PeerLost, match="no return path"):
        reader.send([b"x"])
    reader.close()
    reader.close()
    with pytest.raises(PeerLost, match="already closed"):
        reader.recv(1)


def test_a_writer_replaces_nothing_and_hears_nothing(tmp_path: Path) -> None:
    path = tmp_path / "td"
    writer = FileWriter(path)
    for use in (lambda: writer.recv(1), lambda: writer.recv_into(bytearray(1))):
        with pytest.raises(PeerLost, match="no return path"):
            use()
    with pytest.raises(UsageError, match="somebody writes it"):
        FileWriter(path)
    writer.send([b"stored"])
    path.write_text("somebody else's")
    with pytest.raises(PeerLost, match="could not be stored"):
        writer.finish()
    assert path.read_text() == "somebody else's"
    writer.discard()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UsageError, match="exists"):
        FileWriter(path)
    with pytest.raises(PeerLost, match="already closed"):
        writer.send([b"x"])
    with pytest.raises(UsageError, match="cannot write"):
        FileWriter(tmp_path / "absent" / "td")
    for unusable in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError):
            FileReader(unusable)


# --- sessions ------------------------------------------------------------------------------------


class Watched(FileWriter):
    """Remembers the order of what is asked of it, and fails where it is told to."""

    def __init__(self, path: Path, fail: str = "") -> None:
        super().__init__(path)
        self.calls: list[str] = []
        self.fail = fail

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fail:
            raise self._failed("stored", OSError(errno.EIO, "Input/output error"))

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        super().send(buffers, timeout)
        self._note("send")

    def reserve(self, count: int) -> None:
        self._note("reserve")
        super().reserve(count)

    def sync(self) -> None:
        self._note("sync")
        super().sync()

    def finish(self) -> None:
        self._note("finish")
        super().finish()


@dataclass
class Pair:
    """Two TDs with each other's keys, and where their traces go."""

    source: SoftBackend
    destination: SoftBackend
    folder: Path

    def store(self, writer: FileWriter, hooks: Hooks | None = None) -> SideOutcome:
        with TraceWriter(self.folder / "source", "source", SESSION) as trace:
            return StoredSourceSession(
                self.source,
                writer,
                trace,
                gpas=self.source.page_gpas(),
                vcpus=VCPUS,
                session_id=SESSION,
                options=OPTIONS,
                hooks=hooks,
            ).run()

    def load(self, path: Path) -> SideOutcome:
        with TraceWriter(self.folder / "destination", "destination", SESSION) as trace:
            return StoredDestinationSession(
                self.destination, FileReader(path), trace, pages=PAGES, vcpus=VCPUS, options=OPTIONS
            ).run()

    def accepted(self, *sides: str) -> bool:
        return replay.judge_records([list(read_trace(self.folder / side)) for side in sides]).ok


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    source = soft_source(PAGES, vcpus=VCPUS)
    destination = soft_destination(PAGES, vcpus=VCPUS)
    ours, theirs = (
        source.read_migration_encryption_key(),
        destination.read_migration_encryption_key(),
    )
    source.write_migration_decryption_key(theirs)
    destination.write_migration_decryption_key(ours)
    return Pair(source, destination, tmp_path)


def test_everything_is_on_the_disk_before_the_start_token_is_made(pair: Pair) -> None:
    writer = Watched(pair.folder / "td")
    made_at: list[int] = []

    class AtToken(Hooks):
        def stop_requested(self, event: str | None) -> str | None:
            if event == "finish_epochs":
                made_at.append(len(writer.calls))
            return None

    outcome = pair.store(writer, AtToken())
    assert (outcome.ending, outcome.op_state) == (Ending.STORED, "POST_EXPORT")
    before, after = writer.calls[: made_at[0]], writer.calls[made_at[0] :]
    assert before[-2:] == ["reserve", "sync"], "something was written after the last sync"
    assert set(before[:-2]) == {"send"}
    assert after == ["send", "send", "finish"]  # the token, the end of the stream

    loaded = pair.load(pair.folder / "td")
    assert (loaded.ending, loaded.runnable) == (Ending.MIGRATED, True)
    assert pair.destination.memory_digest() == pair.source.memory_digest()
    assert pair.destination.vcpu_digest() == pair.source.vcpu_digest()
    assert pair.accepted("source", "destination")


@pytest.mark.parametrize("fail", ["send", "reserve", "sync"])
def test_a_disk_that_fails_before_the_start_token_leaves_the_td_where_it_was(
    pair: Pair, fail: str
) -> None:
    outcome = pair.store(Watched(pair.folder / "td", fail))
    assert (outcome.ending, outcome.op_state) == (Ending.ABORTED, "RUNNABLE")
    assert outcome.runnable
    assert "Input/output error" in outcome.cause
    assert {path.name for path in pair.folder.iterdir()} == {"source"}
    assert pair.accepted("source")


def test_a_disk_that_fails_after_the_start_token_is_told_as_it_is(pair: Pair) -> None:
    outcome = pair.store(Watched(pair.folder / "td", "finish"))
    assert (outcome.ending, outcome.op_state) == (Ending.UNDECIDED, "POST_EXPORT")
    assert not outcome.runnable
    assert "not known to be stored" in outcome.sentence
    assert (pair.folder / "td.part").exists(), "the only copy of the TD was thrown away"
    assert pair.accepted("source")


def test_a_stop_before_the_start_token_stores_nothing(pair: Pair) -> None:
    outcome = pair.store(FileWriter(pair.folder / "td"), StopBefore("finish_epochs"))
    assert (outcome.ending, outcome.runnable, outcome.stopped) == (Ending.ABORTED, True, True)
    assert {path.name for path in pair.folder.iterdir()} == {"source"}


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_file_never_runs(pair: Pair, damage: str) -> None:
    path = pair.folder / "td"
    assert pair.store(FileWriter(path)).ending is Ending.STORED
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-30:]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)
    outcome = pair.load(path)
    assert (outcome.runnable, outcome.op_state) == (False, "FAILED_IMPORT")
    assert "the source cannot be told" in outcome.sentence
    assert outcome.cause
    assert pair.accepted("source", "destination")


def test_a_stream_that_expects_answers_is_no_file(pair: Pair, tmp_path: Path) -> None:
    """What a source writes to a socket, kept in a file: nobody confirmed anything to it."""
    path = pair.folder / "td"
    assert pair.store(FileWriter(path)).ending is Ending.STORED
    data = bytearray(path.read_bytes())
    # HELLO: mark (1), type and length (4), version and streams (4), capabilities.
    capabilities = int.from_bytes(data[9:13], "big")
    data[9:13] = (capabilities | 4).to_bytes(4, "big")  # RETURN_PATH
    path.write_bytes(data)
    outcome = pair.load(path)
    assert not outcome.runnable
    assert "not made for a file" in outcome.cause


# --- sealed keys ---------------------------------------------------------------------------------


def test_a_sealed_key_is_for_one_destination_and_of_one_source() -> None:
    source, destination, other = (make_identity(name) for name in ("s", "d", "o"))
    material = os.urandom(32)
    key = MigrationKey(material)
    data, session_id = seal(source, destination.certificate, key, Versions())
    assert key.taken
    assert material not in data
    agreement = unseal(data, destination, source.certificate, Versions())
    assert agreement.peer_key.take() == material
    assert agreement.session_id == session_id
    with pytest.raises(PeerError, match="another destination"):
        unseal(data, other, source.certificate, Versions())
    with pytest.raises(PeerError, match="not signed by the source"):
        unseal(data, destination, other.certificate, Versions())
    with pytest.raises(PeerError, match="no migration version in common"):
        unseal(data, destination, source.certificate, Versions(0, 0, 1, 2))


def test_any_change_of_a_sealed_key_is_noticed() -> None:
    source, destination = make_identity("s"), make_identity("d")
    data, _ = seal(source, destination.certificate, MigrationKey(os.urandom(32)), Versions())
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x40
        with pytest.raises(PeerError):
            unseal(bytes(changed), destination, source.certificate, Versions())
    for length in range(len(data)):
        with pytest.raises(PeerError):
            unseal(data[:length], destination, source.certificate, Versions())


# --- the note that it was loaded -----------------------------------------------------------------


def test_a_file_is_used_once(tmp_path: Path) -> None:
    stored = StoredFile(tmp_path / "td")
    with pytest.raises(UsageError, match="there is no file"):
        stored.check_whole()
    stored.path.touch()
    stored.keys.touch()
    with stored.claimed():  # loading failed: it may be tried again
        with pytest.raises(UsageError, match="is being loaded"), stored.claimed():
            pass
        with pytest.raises(UsageError, match="is being loaded"):
            stored.check_whole()
    stored.check_whole()
    with stored.claimed() as claim:
        claim.used = True
    with pytest.raises(UsageError, match="was loaded before"):
        stored.check_whole()
    with pytest.raises(UsageError, match="was loaded before"), stored.claimed():
        pass
    with pytest.raises(UsageError, match="not overwritten"):
        stored.check_free()


def test_a_crash_while_it_is_loaded_leaves_the_note(tmp_path: Path) -> None:
    stored = StoredFile(tmp_path / "td")
    with pytest.raises(ZeroDivisionError), stored.claimed():
        raise ZeroDivisionError
    assert stored.note.exists()
