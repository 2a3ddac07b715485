"""What source and destination share: running a command, the RAM block, batches of a GPA list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.engine.commands import Command, Operation, Result, Send
from tdxmig_model.errors import BackendError, PeerError, UsageError
from tdxmig_model.wire.extensions import Capability, Hello
from tdxmig_model.wire.gpa_list import GpaStatus
from tdxmig_model.wire.mbmd import BundleType
from tdxmig_model.wire.records import RAM_BLOCK, Bundle

T = TypeVar("T")

BUSY_ATTEMPTS: Final = 64
"""How often a command is issued while the module answers that something is locked."""

ALL_CAPABILITIES: Final = (
    Capability.BATCH
    | Capability.CANCEL
    | Capability.RETURN_PATH
    | Capability.SOURCE_ABORT
    | Capability.POST_COPY
    | Capability.IN_ORDER_DONE
)

_BUSY_CLASS: Final = 2
_FOUR_GIB: Final = 1 << 32


def is_busy(status: int) -> bool:
    """True for the status class (bits 47:40) that means: nothing done, try again."""
    return (status >> 40) & 0xFF == _BUSY_CLASS


def attempt(command: Command) -> Operation[Result]:
    """Run a command, again while the module is busy; returns whatever it says at last."""
    attempts = 0
    while True:
        attempts += 1
        result = yield command
        if result is None:
            raise UsageError(f"{command.name} was answered without a result")
        if result.ok or not is_busy(result.status) or attempts >= BUSY_ATTEMPTS:
            return result


def perform(command: Command, *, hint: str = "") -> Operation[Result]:
    """Run a command that has to succeed.  BackendError: the module refused it."""
    result = yield from attempt(command)
    if not result.ok:
        raise BackendError(command.name, result.status, result.status_name, hint)
    return result


def bundle_of(command: Command, result: Result, expected: BundleType) -> Bundle:
    """The bundle that a command produced.  BackendError: none, or one of another type."""
    bundle = result.bundle
    if bundle is None or bundle.mbmd.bundle_type is not expected:
        found = "no bundle" if bundle is None else bundle.mbmd.bundle_type.name
        raise BackendError(
            command.name, result.status, result.status_name, f"gave {found}, not {expected.name}"
        )
    return bundle


def entry_results(command: Command, result: Result, count: int) -> NDArray[np.uint8]:
    """GpaStatus per entry, shape (count,); a backend that gives none had no problem to report."""
    if result.statuses is None:
        return np.zeros(count, dtype=np.uint8)
    if result.statuses.shape != (count,):
        detail = f"gave {result.statuses.size} entry statuses for {count} pages"
        raise BackendError(command.name, result.status, result.status_name, detail)
    return result.statuses


def status_names(statuses: NDArray[np.uint8]) -> str:
    """How many entries have which status, for a message."""
    values, counts = np.unique(statuses, return_counts=True)
    known = set(GpaStatus)
    return ", ".join(
        f"{count} x {GpaStatus(value).name if value in known else value}"
        for value, count in zip(values.tolist(), counts.tolist(), strict=True)
    )


@dataclass(frozen=True, slots=True)
class RamBlock:
    """The RAM block of the records: QEMU's "pc.ram" and where its offsets lie in guest memory.

    Offsets from ``below_4g`` on are at 4 GiB (the hole below it holds devices); None: offset = GPA.
    """

    name: str = RAM_BLOCK
    below_4g: int | None = None

    def offset(self, gpa: int) -> int:
        """Offset in the block of the page at ``gpa``."""
        if self.below_4g is None or gpa < self.below_4g:
            return gpa
        return gpa - _FOUR_GIB + self.below_4g

    def gpa(self, offset: int) -> int:
        """GPA of the page at ``offset`` of the block."""
        if self.below_4g is None or offset < self.below_4g:
            return offset
        return offset - self.below_4g + _FOUR_GIB


def check_sizes(ours: Hello, peer: Hello, who: str) -> None:
    """Refuse a destination TD that is smaller than the source TD.  PeerError names the sizes."""
    source, destination = (peer, ours) if who == "source" else (ours, peer)
    for name, needed, there in (
        ("private pages", source.page_count, destination.page_count),
        ("vCPUs", source.vcpu_count, destination.vcpu_count),
        ("forward streams", source.streams, destination.streams),
    ):
        if there < needed:
            raise PeerError(
                f"the source TD has {needed} {name} and the destination has room for {there}; "
                "prepare a destination TD of the same size"
            )


def drive(
    operation: Operation[T],
    execute: Callable[[Command], Result],
    send: Callable[[Send], None],
) -> T:
    """Run one lifecycle event to its end with somebody who executes and somebody who sends."""
    answer: Result | None = None
    while True:
        try:
            item = operation.send(answer)
        except StopIteration as done:
            value: T = done.value
            return value
        answer = None
        if isinstance(item, Send):
            send(item)
        else:
            answer = execute(item)
