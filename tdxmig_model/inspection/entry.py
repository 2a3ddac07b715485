"""One record as it was found: where it is, what its fields hold, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.errors import WireError
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import (
    Column,
    GpaOperation,
    GpaStatus,
    entry_gpas,
    entry_operations,
    entry_pending,
    entry_statuses,
)
from tdxmig_model.wire.layout import Value

_STATUSES: Final = {status.value: status.name for status in GpaStatus}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong, at byte `offset` of the file."""

    offset: int
    text: str

    @classmethod
    def of(cls, error: WireError, at: int = 0) -> Problem:
        """What a decoder found in bytes that begin at byte `at`."""
        message = str(error).partition(": byte ")[0]
        text = f"{message}: {error.field} is {error.value!r}, expected {error.bound}"
        return cls(error.offset + at, text)


@dataclass(frozen=True, slots=True)
class GpaRange:
    """`count` pages one after the other from `first` on (bytes) that say the same."""

    first: int
    count: int
    operation: str
    status: str
    pending: bool

    def __str__(self) -> str:
        past = self.first + self.count * PAGE_SIZE
        marks = "".join(
            [
                f" {self.operation}" if self.operation != "MIGRATE" else "",
                f" {self.status}" if self.status != "SUCCESS" else "",
                " pending" if self.pending else "",
            ]
        )
        return f"{self.first:#x}..{past:#x}{marks}"


@dataclass(slots=True)
class Entry:
    """One record of a file: `length` bytes from `offset` on.

    `fields` are those of its framing, `mbmd` those of its bundle if it has one, by the names of
    `wire.layout`; `gpas` is its GPA list as ranges.
    """

    record: str
    offset: int
    length: int = 0
    fields: dict[str, Value] = field(default_factory=dict)
    mbmd: dict[str, Value] | None = None
    gpas: list[GpaRange] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def blame(self, offset: int, text: str) -> None:
        """Note that something is wrong."""
        self.problems.append(Problem(offset, text))

    def as_json(self) -> dict[str, object]:
        """JSON types only: bytes as hexadecimal text."""
        found: dict[str, object] = {
            "record": self.record,
            "offset": self.offset,
            "length": self.length,
        }
        found |= {"fields": _plain(self.fields)}
        if self.mbmd is not None:
            found["mbmd"] = _plain(self.mbmd)
        if self.gpas:
            found["gpas"] = [
                {
                    "first": one.first,
                    "count": one.count,
                    "operation": one.operation,
                    "status": one.status,
                    "pending": one.pending,
                }
                for one in self.gpas
            ]
        found["problems"] = [{"offset": one.offset, "text": one.text} for one in self.problems]
        return found


def ranges(entries: Column) -> list[GpaRange]:
    """A GPA list as runs of neighbouring pages with the same operation, status and pending bit."""
    if not entries.size:
        return []
    gpas, operations = entry_gpas(entries), entry_operations(entries)
    statuses, pending = entry_statuses(entries), entry_pending(entries)
    # A page that wraps below its neighbour is no continuation either: the difference is unsigned.
    breaks: NDArray[np.bool_] = gpas[1:] - gpas[:-1] != np.uint64(PAGE_SIZE)
    for column in (operations, statuses, pending):
        breaks |= column[1:] != column[:-1]
    starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    return [
        GpaRange(
            int(gpas[start]),
            past - start,
            GpaOperation(int(operations[start])).name,
            _STATUSES.get(int(statuses[start]), str(int(statuses[start]))),
            bool(pending[start]),
        )
        for start, past in zip(starts, [*starts[1:], entries.size], strict=True)
    ]


def _plain(fields: dict[str, Value]) -> dict[str, object]:
    return {
        name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()
    }
