"""A stream in a file: written once by the source, read later by whoever loads it.

A file has no way back: nothing that the reader says reaches the writer.  The stream grows in
``PATH.part`` and gets its name only when it is complete and safely stored, so that a file with the
name is whole.  `FileWriter.sync` makes what was written survive a power failure; `reserve` takes
the room for the last bytes in advance, because they must not fail for want of it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from tdxmig_model.errors import PeerLost, UsageError
from tdxmig_model.transport.base import Readable, Writable, byte_views
from tdxmig_model.transport.socket import MAX_BUFFERS

NO_WAY_BACK = "a file has no return path"


class FileWriter:
    """The sending end of a file; see `Transport` for the calls.

    UsageError: the file is there already, somebody else writes it, or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        if path.exists():
            raise UsageError(f"{path} exists; a stored TD is not overwritten, choose another name")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(self._part, flags, 0o600)
        except FileExistsError as error:
            raise UsageError(
                f"{self._part} exists: somebody writes it, or a migration died; remove it if not"
            ) from error
        except OSError as error:
            raise UsageError(f"cannot write {self._part}: {error.strerror}") from error
        self._open = True
        self._stored = False
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def peer(self) -> str:
        return f"file:{self.path}"

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        """Write all buffers.  A disk has no deadline: the kernel takes them or refuses."""
        self._check_open()
        views = byte_views(buffers)
        index = 0
        try:
            while index < len(views):
                written = os.writev(self._file, views[index : index + MAX_BUFFERS])
                self.bytes_sent += written
                while written:
                    if written < views[index].nbytes:
                        views[index] = views[index][written:]
                        break
                    written -= views[index].nbytes
                    index += 1
        except OSError as error:
            raise self._failed("written", error) from error

    def reserve(self, count: int) -> None:
        """Take room on the disk for ``count`` more bytes.  PeerLost: there is none."""
        self._check_open()
        try:
            os.posix_fallocate(self._file, self.bytes_sent, count)
            os.fsync(self._file)
        except OSError as error:
            raise self._failed("enlarged", error) from error

    def sync(self) -> None:
        """Return when everything written is on the disk.  PeerLost: it is not."""
        self._check_open()
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failed("stored", error) from error

    def finish(self) -> None:
        """Store all of it and give it its name.  PeerLost: it is not known to be stored."""
        self._check_open()
        try:
            os.ftruncate(self._file, self.bytes_sent)  # what was reserved and not needed
            os.fsync(self._file)
            os.link(self._part, self.path)  # unlike a rename it replaces nothing
            self._part.unlink()
            store_directory(self.path.parent)
        except OSError as error:
            raise self._failed("stored", error) from error
        self._stored = True

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        self._check_open()
        raise self._lost(NO_WAY_BACK)

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        self._check_open()
        raise self._lost(NO_WAY_BACK)

    def poll(self, timeout: float = 0.0) -> bool:
        self._check_open()
        return True

    def close(self) -> None:
        """Without `finish` the stream stays under its other name; see `discard`."""
        if self._open:
            self._open = False
            os.close(self._file)

    def discard(self) -> None:
        """Remove what was written, unless it is a whole stream.  Idempotent."""
        self.close()
        if not self._stored:
            with contextlib.suppress(FileNotFoundError):
                self._part.unlink()

    def _check_open(self) -> None:
        if not self._open:
            raise PeerLost(f"{self.peer}: this end is already closed")

    def _failed(self, what: str, error: OSError) -> PeerLost:
        return self._lost(f"the file could not be {what} ({error.strerror})")

    def _lost(self, what: str) -> PeerLost:
        return PeerLost(f"{self.peer}: {what} ({self.bytes_sent} bytes written)")


class FileReader:
    """The receiving end of a whole file; see `Transport` for the calls.  It never waits.

    UsageError: there is no such file, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        if not path.is_file():
            os.close(self._file)
            raise UsageError(f"{path} is no regular file")
        self._open = True
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def peer(self) -> str:
        return f"file:{self.path}"

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        self._check_open()
        raise self._lost(NO_WAY_BACK)

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        buffer = bytearray(min(limit, 1 << 20))
        return bytes(memoryview(buffer)[: self.recv_into(buffer)])

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        self._check_open()
        try:
            count = os.readv(self._file, [memoryview(buffer).cast("B")])
        except OSError as error:
            raise self._lost(f"the file could not be read ({error.strerror})") from error
        if not count:
            raise self._lost("the file ends here")
        self.bytes_received += count
        return count

    def poll(self, timeout: float = 0.0) -> bool:
        self._check_open()
        return True

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._file)

    def _check_open(self) -> None:
        if not self._open:
            raise PeerLost(f"{self.peer}: this end is already closed")

    def _lost(self, what: str) -> PeerLost:
        return PeerLost(f"{self.peer}: {what} ({self.bytes_received} bytes received)")


def store_directory(directory: Path) -> None:
    """Make names that were added to ``directory`` or removed survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
