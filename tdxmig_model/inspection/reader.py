"""Bytes of a file in order, with one record in memory at most."""

from __future__ import annotations

from typing import BinaryIO, Final

_CHUNK: Final = 1 << 20


class Ended(Exception):
    """The file has fewer bytes than the record needs: `found` of `wanted` from `offset` on."""

    def __init__(self, offset: int, found: int, wanted: int) -> None:
        self.offset, self.found, self.wanted = offset, found, wanted
        super().__init__(f"{found} of {wanted} bytes at byte {offset}")


class Reader:
    """Reads a file from its current position to its end; the first byte is byte 0.

    Works on pipes as well: nothing is read twice but what `peek` asked for.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ahead = b""
        self.offset = 0

    def peek(self, count: int) -> bytes:
        """The next bytes without taking them; fewer at the end of the file."""
        while len(self._ahead) < count:
            more = self._file.read(count - len(self._ahead))
            if not more:
                break
            self._ahead += more
        return self._ahead[:count]

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes.  Raises Ended when there are not as many; they are gone then."""
        data = self.peek(count)
        self._ahead = self._ahead[len(data) :]
        self.offset += len(data)
        if len(data) < count:
            raise Ended(self.offset - len(data), len(data), count)
        return data

    def skip(self, count: int) -> None:
        """Pass over `count` bytes, in pieces.  Raises Ended as `take`."""
        at, left = self.offset, count
        while left:
            piece = self.peek(min(left, _CHUNK))
            if not piece:
                raise Ended(at, count - left, count)
            self.take(len(piece))
            left -= len(piece)
