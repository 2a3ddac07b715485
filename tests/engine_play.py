"""Plays engine generators against prepared results, and builds bundles as a TDX module would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdxmig_model.engine import Command, Operation, Result
from tdxmig_model.engine.commands import Gpas, Send
from tdxmig_model.wire import Bundle, GpaOperation, GpaStatus, Mbmd
from tdxmig_model.wire.constants import MAC_SIZE, PAGE_SIZE
from tdxmig_model.wire.gpa_list import build_entries, entries_to_bytes, set_operation, set_status

OK = Result(0, "TDX_SUCCESS")
BUSY = Result(0x8000020000000092, "TDX_OPERAND_BUSY")
REFUSED = Result(0xC000060800000000, "TDX_OP_STATE_INCORRECT")
FATAL = Result(0xE0000E0500000000, "TDX_INCORRECT_MBMD_MAC")

Answer = Result | Callable[[Any], Result]


@dataclass
class Played:
    value: Any
    commands: list[Command]
    records: list[Any]
    order: list[str]


def play(operation: Operation[Any], *answers: Answer) -> Played:
    """Run an operation to its end; every command takes the next answer, and all are needed."""
    played = Played(None, [], [], [])
    waiting = list(answers)
    reply: Result | None = None
    while True:
        try:
            item = operation.send(reply)
        except StopIteration as done:
            played.value = done.value
            assert not waiting, f"answers left over after {played.order}"
            return played
        reply = None
        if isinstance(item, Send):
            played.records.append(item.record)
            played.order.append(type(item.record).__name__)
        else:
            played.commands.append(item)
            played.order.append(item.name)
            assert waiting, f"no answer prepared for {item.name} after {played.order}"
            answer = waiting.pop(0)
            reply = answer if isinstance(answer, Result) else answer(item)


def gpas(*numbers: int) -> Gpas:
    """GPAs of page numbers."""
    return np.array(numbers, dtype=np.uint64) * np.uint64(PAGE_SIZE)


def page_bytes(count: int) -> list[bytes]:
    return [bytes([index % 256]) * PAGE_SIZE for index in range(count)]


def memory_bundle(
    pages: Gpas,
    operation: GpaOperation = GpaOperation.MIGRATE,
    statuses: Sequence[int] | None = None,
    *,
    stream: int = 0,
    epoch: int = 1,
) -> Bundle:
    """What TDH.EXPORT.MEM makes of the pages; entries with a status became NOP."""
    entries = build_entries(pages, operation)
    if statuses is not None:
        column = np.array(statuses, dtype=np.uint8)
        failed = column != GpaStatus.SUCCESS
        set_operation(entries, GpaOperation.NOP, failed)
        set_status(entries, column)
    mbmd = Mbmd.memory(
        num_gpas=pages.size, mb_counter=3, mig_epoch=epoch, iv_counter=9, migs_index=stream
    )
    macs = bytes(range(MAC_SIZE)) * int(pages.size)
    return Bundle.of(mbmd, page_bytes(pages.size), entries_to_bytes(entries), macs)


def exported(
    statuses: Sequence[int] | None = None, *, told: bool = True
) -> Callable[[Any], Result]:
    """The result of an ExportMem: ``told`` says whether the backend gives statuses besides."""

    def answer(command: Any) -> Result:
        bundle = memory_bundle(command.gpas, command.operation, statuses, stream=command.stream)
        column = None
        if told:
            column = np.array(statuses or [0] * command.gpas.size, dtype=np.uint8)
        return Result(0, "TDX_SUCCESS", bundle=bundle, statuses=column)

    return answer


def listed(*statuses: int) -> Result:
    """The result of a leaf that only marks the entries of a list."""
    return Result(0, "TDX_SUCCESS", statuses=np.array(statuses, dtype=np.uint8))


def immutable(streams: int = 1) -> Bundle:
    mbmd = Mbmd.immutable_state(iv_counter=1, num_forward_streams=streams)
    return Bundle.of(mbmd, page_bytes(3))


def epoch_token(epoch: int = 1) -> Bundle:
    return Bundle.of(Mbmd.epoch_token(total_mb=2, mig_epoch=epoch, iv_counter=2))


def start_token() -> Bundle:
    return epoch_token(0xFFFFFFFF)


def td_state(*, link: bool = False) -> Bundle:
    mbmd = Mbmd.td_state(mb_counter=1, mig_epoch=1, iv_counter=5)
    return Bundle.of(mbmd, page_bytes(2), another_follows=link)


def vcpu_state(vcpu: int = 0, *, stream: int = 0, link: bool = False) -> Bundle:
    mbmd = Mbmd.vcpu_state(
        vp_index=vcpu, mb_counter=2, mig_epoch=1, iv_counter=6, migs_index=stream
    )
    return Bundle.of(mbmd, page_bytes(5), another_follows=link)


def abort_token() -> Bundle:
    return Bundle.of(Mbmd.abort_token(mb_counter=0, iv_counter=1, mac=bytes(range(16))))


def with_bundle(bundle: Bundle, status: int = 0) -> Result:
    return Result(status, "TDX_SUCCESS", bundle=bundle)
