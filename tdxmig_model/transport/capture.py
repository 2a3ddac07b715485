"""A transport that also writes down what passes: one file for each direction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Final

from tdxmig_model.transport.base import Readable, Transport, Writable, byte_views

FORWARD_SUFFIX: Final = "forward"
RETURN_SUFFIX: Final = "return"


def capture_paths(folder: Path, channel: int = 0) -> tuple[Path, Path]:
    """The files of a channel: what the source sends, and what it receives."""
    name = f"channel-{channel}"
    return folder / f"{name}.{FORWARD_SUFFIX}", folder / f"{name}.{RETURN_SUFFIX}"


class CapturedTransport:
    """The source's end of a connection, written down in two files.

    Bytes to be sent are written before they are sent, so that a capture holds what was meant to be
    sent when the connection breaks.  A file that cannot be written ends the capture, not the
    migration; `failure` then says why.
    """

    def __init__(self, inner: Transport, folder: Path, channel: int = 0) -> None:
        self._inner = inner
        self.failure: str | None = None
        self._files: dict[str, BinaryIO] = {}
        paths = zip((FORWARD_SUFFIX, RETURN_SUFFIX), capture_paths(folder, channel), strict=True)
        try:
            for suffix, path in paths:
                self._files[suffix] = path.open("wb", buffering=0)
        except OSError as error:
            self._fail(error)

    @property
    def peer(self) -> str:
        return self._inner.peer

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._inner.bytes_received

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        for view in byte_views(buffers):
            self._note(FORWARD_SUFFIX, view)
        self._inner.send(buffers, timeout)

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        data = self._inner.recv(limit, timeout)
        self._note(RETURN_SUFFIX, memoryview(data))
        return data

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        count = self._inner.recv_into(buffer, timeout)
        self._note(RETURN_SUFFIX, memoryview(buffer)[:count])
        return count

    def poll(self, timeout: float = 0.0) -> bool:
        return self._inner.poll(timeout)

    def close(self) -> None:
        self._inner.close()
        self._close_files()

    def _note(self, suffix: str, view: memoryview) -> None:
        file = self._files.get(suffix)
        try:
            while file is not None and view.nbytes:
                view = view[file.write(view) :]
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = f"the capture is not whole: {error}"
        self._close_files()

    def _close_files(self) -> None:
        files, self._files = self._files, {}
        for file in files.values():
            file.close()
