"""Faults of one direction of a stream, at chosen bytes: what a line that misbehaves does to it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """``count`` bytes (1 or more) from byte ``first`` on."""

    first: int
    count: int

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.first + self.count


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong in one direction; byte numbers count from 0 over the whole stream as sent.

    ``cut_at``: the connection breaks in both directions once that many bytes were delivered.
    ``flip_at``: that byte arrives changed by ``flip_mask``.  ``truncate_at``: bytes from there on
    vanish and the receiver sees the end of the stream, while the sender notices nothing.
    ``lost``: those bytes vanish and what follows arrives.  ``repeated``: they arrive twice.
    ``late``: they arrive after as many bytes that were sent after them.
    """

    cut_at: int | None = None
    flip_at: int | None = None
    flip_mask: int = 0x01
    truncate_at: int | None = None
    lost: Span | None = None
    repeated: Span | None = None
    late: Span | None = None

    @classmethod
    def drawn(cls, dice: random.Random, length: int) -> Faults:
        """One fault of a kind and at a byte below ``length`` that ``dice`` choose."""
        at = dice.randrange(length)
        span = Span(at, dice.randint(1, 1 << dice.randrange(14)))
        match dice.randrange(6):
            case 0:
                return cls(cut_at=at)
            case 1:
                return cls(flip_at=at, flip_mask=1 << dice.randrange(8))
            case 2:
                return cls(truncate_at=at)
            case 3:
                return cls(lost=span)
            case 4:
                return cls(repeated=span)
            case _:
                return cls(late=span)


NO_FAULTS = Faults()


class FaultyLine:
    """Applies `Faults` to a stream that passes through piece by piece.

    Bytes that are held back for ``late`` or ``repeated`` are at most as many as those spans have.
    """

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._passed = 0
        self._held = bytearray()
        self.ended = False
        """Nothing arrives any more, and the sender does not know."""
        self.broke = False
        """The connection is broken in both directions."""

    def carry(self, data: bytes) -> bytes:
        """What arrives now because ``data`` was sent."""
        if self._faults is NO_FAULTS:
            return data
        arriving = bytearray()
        for first, piece in self._pieces(data):
            if self.ended or self.broke:
                break
            arriving += self._one(first, piece)
        return bytes(arriving)

    def _pieces(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """``data`` split where a fault begins or ends, each piece with its first byte's number."""
        first, self._passed = self._passed, self._passed + len(data)
        borders = sorted({first, *(b for b in self._borders() if first < b < self._passed)})
        for begin, end in zip(borders, [*borders[1:], self._passed], strict=True):
            yield begin, data[begin - first : end - first]

    def _borders(self) -> Iterator[int]:
        faults = self._faults
        yield from (at for at in (faults.cut_at, faults.truncate_at) if at is not None)
        if faults.flip_at is not None:
            yield from (faults.flip_at, faults.flip_at + 1)
        for span in (faults.lost, faults.repeated, faults.late):
            if span is not None:
                yield from (span.first, span.end, span.end + span.count)

    def _one(self, first: int, piece: bytes) -> bytes:
        """A piece lies in each fault wholly or not at all."""
        faults = self._faults
        if not piece:
            return b""
        if faults.cut_at is not None and first >= faults.cut_at:
            self.broke = True
            return b""
        if faults.truncate_at is not None and first >= faults.truncate_at:
            self.ended = True
            return b""
        if first == faults.flip_at:
            piece = bytes((piece[0] ^ faults.flip_mask,))
        if faults.lost is not None and faults.lost.first <= first < faults.lost.end:
            return b""
        return self._moved(first, piece)

    def _moved(self, first: int, piece: bytes) -> bytes:
        late, repeated = self._faults.late, self._faults.repeated
        end = first + len(piece)
        if late is not None and late.first <= first < late.end:
            self._held += piece
            return b""
        if repeated is not None and repeated.first <= first < repeated.end:
            self._held += piece
            return piece + self._release() if end == repeated.end else piece
        if late is not None and end == late.end + late.count:
            return piece + self._release()
        return piece

    def _release(self) -> bytes:
        held = bytes(self._held)
        self._held.clear()
        return held
