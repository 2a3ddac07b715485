"""Processes that encrypt and decrypt pages for the module, and know nothing of the protocol.

A worker shares the memory of the host and gets columns: where each page is, where it goes, IV
counter and AAD.  It gives back tags, or which tags were right.  All decisions, and all state, stay
in the process that has the module; without workers the same calls are made there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import struct
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from tdxmig_model.backend.soft.memory import Memory
from tdxmig_model.errors import BackendError, UsageError
from tdxmig_model.wire.constants import MAC_SIZE, PAGE_SIZE

ANSWER_SECONDS = 30.0
ORPHAN_SECONDS = 1.0
"""How often an idle worker looks whether its host is still there."""
MAX_WORKERS = 64

_HEADER = struct.Struct("<B32s4sI")
_SEAL, _OPEN = 0, 1
Column = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class PageColumns:
    """Pages of one stream: HPAs `source` and `target`, IV counters and 8-byte AADs, each ``(n,)``.

    `key` is the 32-byte key and `suffix` the last four bytes of the IV.
    """

    key: bytes
    suffix: bytes
    source: Column
    target: Column
    counter: Column
    aad: Column

    def part(self, rows: slice) -> PageColumns:
        """Some of the rows."""
        columns = (self.source[rows], self.target[rows], self.counter[rows], self.aad[rows])
        return PageColumns(self.key, self.suffix, *columns)


class Workers:
    """`count` processes with the memory of one host.  Close them, or end the host's process."""

    def __init__(self, memory: Memory, count: int) -> None:
        if not 1 <= count <= MAX_WORKERS:
            raise UsageError(f"{count} workers; there can be 1 to {MAX_WORKERS}")
        context = multiprocessing.get_context("fork")
        self._crew: list[tuple[BaseProcess, Connection]] = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(memory, theirs, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self._crew.append((process, ours))

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [process.pid or 0 for process, _ in self._crew]

    def seal(self, columns: PageColumns) -> bytes:
        """Encrypt each source page into its target; the tags, 16 bytes each."""
        return self._share(_SEAL, columns, b"", MAC_SIZE)

    def open(self, columns: PageColumns, macs: bytes) -> NDArray[np.bool_]:
        """Decrypt each source page into its target; which tags were right, shape ``(n,)``.

        A target whose tag was wrong is undefined.
        """
        return np.frombuffer(self._share(_OPEN, columns, macs, 1), dtype=np.bool_)

    def _share(self, operation: int, columns: PageColumns, macs: bytes, size: int) -> bytes:
        """Each worker gets an equal part; the answers in order.  BackendError if one is lost."""
        if not self._crew:
            raise _lost("they are closed", 0)
        rows = columns.source.size
        step = -(-rows // len(self._crew))
        parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        crew = self._crew[: len(parts)]
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            for (process, connection), part in zip(crew, parts, strict=True):
                tags = macs[part.start * MAC_SIZE : part.stop * MAC_SIZE]
                request = _pack(operation, columns.part(part), tags)
                _send(process, connection, request)
            answers = [
                _answer(process, connection, size * (part.stop - part.start))
                for (process, connection), part in zip(crew, parts, strict=True)
            ]
            on_error.pop_all()
        return b"".join(answers)

    def close(self) -> None:
        """End the workers and wait for them.  Idempotent."""
        crew, self._crew = self._crew, []
        for _, connection in crew:
            connection.close()
        for process, _ in crew:
            process.terminate()
            process.join()


def _lost(why: str, pid: int) -> BackendError:
    return BackendError(
        "page encryption",
        0,
        "WORKER_LOST",
        f"worker process {pid or 'pool'}: {why}; close the host and build it anew, or do without "
        "workers",
    )


def _send(process: BaseProcess, connection: Connection, request: bytes) -> None:
    try:
        connection.send_bytes(request)
    except OSError:
        raise _lost("it has ended", process.pid or 0) from None


def _answer(process: BaseProcess, connection: Connection, length: int) -> bytes:
    pid = process.pid or 0
    try:
        if not connection.poll(ANSWER_SECONDS):
            raise _lost(f"no answer within {ANSWER_SECONDS:g} s", pid)
        answer = connection.recv_bytes()
    except (EOFError, OSError):
        raise _lost("it has ended", pid) from None
    if len(answer) != length:
        raise _lost(f"{len(answer)} bytes in its answer, not {length}", pid)
    return answer


def _pack(operation: int, columns: PageColumns, macs: bytes) -> bytes:
    header = _HEADER.pack(operation, columns.key, columns.suffix, columns.source.size)
    members = (columns.source, columns.target, columns.counter, columns.aad)
    return b"".join((header, *(member.tobytes() for member in members), macs))


# --- in the worker -------------------------------------------------------------------------------


def _serve(memory: Memory, connection: Connection, host: int) -> None:
    """Answer requests until the host closes the connection or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(EOFError, OSError):
        while True:
            # Another process may hold the host's end of the connection, so its end is no sign.
            while not connection.poll(ORPHAN_SECONDS):
                if os.getppid() != host:
                    return
            connection.send_bytes(_work(memory, connection.recv_bytes()))


def _work(memory: Memory, request: bytes) -> bytes:
    operation, key, suffix, rows = _HEADER.unpack_from(request)
    columns = np.frombuffer(request, dtype="<u8", count=4 * rows, offset=_HEADER.size)
    source, target, counter, aad = columns.reshape(4, rows).tolist()
    macs = request[_HEADER.size + 32 * rows :]
    aead, slot = AESGCM(key), memoryview(bytearray(PAGE_SIZE + MAC_SIZE))
    answer = bytearray()
    for row in range(rows):
        iv = counter[row].to_bytes(8, "little") + suffix
        data = aad[row].to_bytes(8, "little")
        page = memory.page(source[row])
        if operation == _SEAL:
            aead.encrypt_into(iv, page, data, slot)
            memory.page(target[row])[:] = slot[:PAGE_SIZE]
            answer += slot[PAGE_SIZE:]
            continue
        slot[:PAGE_SIZE] = page
        slot[PAGE_SIZE:] = macs[MAC_SIZE * row : MAC_SIZE * (row + 1)]
        try:
            aead.decrypt_into(iv, slot, data, memory.page(target[row]))
            answer.append(1)
        except InvalidTag:
            answer.append(0)
    return bytes(answer)
