"""Several files of one capture, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from tdxmig_model.errors import UsageError
from tdxmig_model.inspection import qemu_file
from tdxmig_model.inspection.channels import (
    QEMU_MESSAGES,
    MultifdWalker,
    RecordWalker,
    ReturnPathWalker,
)
from tdxmig_model.inspection.entry import Entry
from tdxmig_model.inspection.judge import Judge, Totals, final_problems
from tdxmig_model.inspection.reader import Reader
from tdxmig_model.inspection.walker import Walker
from tdxmig_model.wire.extensions import MessageType
from tdxmig_model.wire.multifd import MAGIC as MULTIFD_MAGIC

MOST_ERRORS: Final = 100
"""Problems that a summary keeps; the rest is counted, so that memory does not grow."""


class Framing(StrEnum):
    """What the bytes of a file are."""

    RECORDS = "single-channel records"
    MULTIFD = "multifd packets"
    RETURN_PATH = "return path"
    QEMU_FILE = "QEMU main channel"


_FRAMINGS: Final[dict[type[Walker], Framing]] = {
    RecordWalker: Framing.RECORDS,
    MultifdWalker: Framing.MULTIFD,
    ReturnPathWalker: Framing.RETURN_PATH,
    qemu_file.QemuFileWalker: Framing.QEMU_FILE,
}


_ABORTS: Final = (MessageType.SOURCE_ABORT.name, MessageType.FAILED.name)
"""Records that say that the migration was given up: then nothing has to follow."""


@dataclass(slots=True)
class Summary:
    """What was found in all files.

    `errors` are the first problems as (file, offset, text); what no single record shows has no
    offset, and what no single file shows has no file.
    """

    records: int = 0
    bundles: int = 0
    pages: int = 0
    bytes: int = 0
    problems: int = 0
    errors: list[tuple[str | None, int | None, str]] = field(default_factory=list)

    def add(self, file: str, entry: Entry) -> None:
        """Count a record."""
        self.records += 1
        self.bundles += entry.mbmd is not None
        self.pages += sum(one.count for one in entry.gpas)
        self.bytes += entry.length
        for problem in entry.problems:
            self.blame(file, problem.offset, problem.text)

    def blame(self, file: str | None, offset: int | None, text: str) -> None:
        """Count a problem, and keep it while there are few."""
        self.problems += 1
        if len(self.errors) < MOST_ERRORS:
            self.errors.append((file, offset, text))


class CapturedFile:
    """The records of one open file."""

    def __init__(self, name: str, reader: Reader) -> None:
        self.name = name
        self._reader = reader
        self._walker = _guess(reader)

    @property
    def framing(self) -> Framing:
        """What the first bytes say that the file is."""
        return _FRAMINGS[self._walker]

    def entries(self, judge: Judge) -> Iterator[Entry]:
        """Every record, judged after those before."""
        walker: Walker = self._walker(self._reader, judge)
        return walker.entries()


def inspect(paths: Sequence[Path], summary: Summary) -> Iterator[tuple[CapturedFile, Entry]]:
    """Every record of the files in order, with the file it is in; `summary` counts along.

    All files are opened before this returns.  UsageError: one cannot be.
    """
    with ExitStack() as stack:
        files = [_open(path, stack) for path in paths]
        return _inspect(files, summary, stack.pop_all())


def _inspect(
    files: Sequence[CapturedFile], summary: Summary, opened: ExitStack
) -> Iterator[tuple[CapturedFile, Entry]]:
    forward = [file for file in files if file.framing is not Framing.RETURN_PATH]
    totals, alone, aborted = Totals(), len(forward) <= 1, False
    with opened:
        for file in files:
            entries = file.entries(Judge(alone, totals))
            while (entry := _next(file, entries, summary)) is not None:
                summary.add(file.name, entry)
                aborted = aborted or entry.record in _ABORTS
                yield file, entry
    # After other problems what is missing at the end is no news.
    if not summary.problems and not aborted:
        for text in final_problems(totals, alone=alone):
            summary.blame(None, None, text)


def _next(file: CapturedFile, entries: Iterator[Entry], summary: Summary) -> Entry | None:
    try:
        return next(entries, None)
    except OSError as error:
        summary.blame(file.name, None, f"cannot be read to its end: {error.strerror or error}")
        return None


def _open(path: Path, stack: ExitStack) -> CapturedFile:
    try:
        file = stack.enter_context(path.open("rb"))
        return CapturedFile(str(path), Reader(file))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _guess(reader: Reader) -> type[Walker]:
    """The framing of a file, by its first bytes."""
    head = reader.peek(4)
    if head == MULTIFD_MAGIC.to_bytes(4, "big"):
        return MultifdWalker
    if head == qemu_file.MAGIC:
        return qemu_file.QemuFileWalker
    # HELLO opens the return path too, there without the mark.
    if head[:1] == b"\x54" and head[1:2] != b"\x54":
        return ReturnPathWalker
    if len(head) == 4 and int.from_bytes(head[:2], "big") in QEMU_MESSAGES:
        return ReturnPathWalker
    return RecordWalker
