"""What is wrong between bundles: counters, epochs, initialisation vectors, the order of records.

A capture may begin in the middle of a session, so what was not seen is not missed.  In one file the
order of all bundles is known and the counters are compared exactly as the TDX module compares them
(TDX module 1.5.01); of several files only the order within each is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from tdxmig_model.inspection.entry import Entry
from tdxmig_model.wire.constants import START_EPOCH
from tdxmig_model.wire.gpa_list import Column, entry_gpas
from tdxmig_model.wire.mbmd import BundleType, Mbmd

_FOUR_GIB: Final = 1 << 32


@dataclass(slots=True)
class _Stream:
    """A forward stream as one file shows it."""

    last_iv: int = 0
    last_at: int = 0
    next_counter: int | None = None
    epoch: int = -1


@dataclass(slots=True)
class Totals:
    """Of all files: `in_order` bundles before the start token, itself included."""

    in_order: int = 0
    immutable_seen: bool = False
    start_token_total: int | None = None


@dataclass(slots=True)
class Judge:
    """Follows the bundles of one file; `alone` says that no other file has bundles of the session.

    `totals` is shared by the judges of all files.
    """

    alone: bool
    totals: Totals
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _epoch: int | None = None
    _forward_streams: int | None = None
    _td_seen: bool = False
    _end_seen: bool = False
    _vcpus: set[int] = field(default_factory=set)
    _hole: int | None = None

    def bundle(self, entry: Entry, mbmd: Mbmd) -> None:
        """Take the bundle of a record, and note in it what does not follow from those before."""
        self._check_order(entry, mbmd)
        self._check_epoch(entry, mbmd)
        self._check_stream(entry, mbmd)
        self._check_total(entry, mbmd)

    def offsets(self, entry: Entry, offsets: list[int], entries: Column) -> None:
        """Compare offsets in the RAM block with the GPAs of the list, page by page.

        Guest memory may have one hole below 4 GiB, whose size is learnt from the first page above.
        """
        for offset, gpa in zip(offsets, entry_gpas(entries).tolist(), strict=False):
            if gpa >= _FOUR_GIB and self._hole is None and 0 <= gpa - offset <= _FOUR_GIB:
                self._hole = gpa - offset
            expected = gpa - self._hole if gpa >= _FOUR_GIB and self._hole else gpa
            if offset != expected:
                entry.blame(
                    entry.offset, f"offset {offset:#x} of the block stands for GPA {gpa:#x}"
                )
                return

    def _check_order(self, entry: Entry, mbmd: Mbmd) -> None:
        kind = mbmd.bundle_type
        if kind is BundleType.IMMUTABLE_TD_STATE:
            if self.totals.immutable_seen:
                entry.blame(entry.offset, "a second immutable state")
            elif self._streams:
                entry.blame(entry.offset, "the immutable state comes after other bundles")
            self._forward_streams = mbmd.num_forward_streams
        elif kind is BundleType.MUTABLE_TD_STATE:
            if self._td_seen:
                entry.blame(entry.offset, "a second TD state")
            self._td_seen = True
        elif kind is BundleType.MUTABLE_VCPU_STATE:
            if not self._td_seen:
                entry.blame(entry.offset, "vCPU state before the TD state")
            if mbmd.vp_index in self._vcpus:
                entry.blame(entry.offset, f"the state of vCPU {mbmd.vp_index} a second time")
            self._vcpus.add(mbmd.vp_index)
        if self._end_seen and not (kind is BundleType.MEM and mbmd.mig_epoch == START_EPOCH):
            entry.blame(entry.offset, f"{kind.name} after the start token")
        self._end_seen = self._end_seen or mbmd.is_start_token

    def _check_epoch(self, entry: Entry, mbmd: Mbmd) -> None:
        epoch, now = mbmd.mig_epoch, self._epoch
        if mbmd.bundle_type is BundleType.EPOCH_TOKEN:
            if now is not None and epoch <= now:
                entry.blame(entry.offset, f"epoch {_epoch(epoch)} after epoch {_epoch(now)}")
            self._epoch = epoch
        elif self.alone:
            if now is not None and epoch != now:
                entry.blame(entry.offset, f"epoch {_epoch(epoch)} inside epoch {_epoch(now)}")
            self._epoch = epoch if now is None else now
        else:
            if now is not None and epoch < now:
                entry.blame(entry.offset, f"epoch {_epoch(epoch)} after epoch {_epoch(now)}")
            self._epoch = max(epoch, now or 0)

    def _check_stream(self, entry: Entry, mbmd: Mbmd) -> None:
        index = mbmd.migs_index
        if self._forward_streams is not None and index >= self._forward_streams:
            there = f"the immutable state names {self._forward_streams} forward streams"
            entry.blame(entry.offset, f"stream {index}, and {there}")
        if index not in self._streams:
            # A stream that begins after the immutable state begins at 0.
            begun = self.alone and self.totals.immutable_seen
            self._streams[index] = _Stream(next_counter=0 if begun else None)
        stream = self._streams[index]
        self._check_iv(entry, mbmd, stream)
        token = mbmd.bundle_type is BundleType.EPOCH_TOKEN
        if token or mbmd.bundle_type is BundleType.IMMUTABLE_TD_STATE:
            if mbmd.mb_counter:
                entry.blame(entry.offset, f"MB_COUNTER {mbmd.mb_counter}, expected 0")
            stream.next_counter = 1
        elif mbmd.mig_epoch != START_EPOCH or mbmd.bundle_type is not BundleType.MEM:
            self._check_counter(entry, mbmd, stream)
            stream.next_counter = mbmd.mb_counter + 1
        stream.epoch = mbmd.mig_epoch

    def _check_counter(self, entry: Entry, mbmd: Mbmd, stream: _Stream) -> None:
        expected = stream.next_counter
        if expected is None:
            return
        if self.alone:
            if mbmd.mb_counter != expected:
                entry.blame(entry.offset, f"MB_COUNTER {mbmd.mb_counter}, expected {expected}")
        elif mbmd.mb_counter < expected and mbmd.mig_epoch == stream.epoch:
            # Stream 0 begins again with each epoch, at a token that another file holds.
            entry.blame(
                entry.offset, f"MB_COUNTER {mbmd.mb_counter} after {expected - 1} in one epoch"
            )

    def _check_iv(self, entry: Entry, mbmd: Mbmd, stream: _Stream) -> None:
        """An IV that is used twice under one key gives the plaintext away (AES-GCM)."""
        pages = mbmd.num_gpas if mbmd.bundle_type is BundleType.MEM else 0
        if mbmd.iv_counter <= stream.last_iv:
            entry.blame(
                entry.offset,
                f"IV_COUNTER {mbmd.iv_counter} of stream {mbmd.migs_index}: the IVs up to "
                f"{stream.last_iv} are used (record at byte {stream.last_at})",
            )
        stream.last_iv = max(stream.last_iv, mbmd.iv_counter + pages)
        stream.last_at = entry.offset

    def _check_total(self, entry: Entry, mbmd: Mbmd) -> None:
        totals = self.totals
        if mbmd.mig_epoch == START_EPOCH and mbmd.bundle_type is BundleType.MEM:
            return
        totals.in_order += 1
        totals.immutable_seen |= mbmd.bundle_type is BundleType.IMMUTABLE_TD_STATE
        if mbmd.bundle_type is not BundleType.EPOCH_TOKEN:
            return
        if mbmd.is_start_token:
            totals.start_token_total = mbmd.total_mb
        if self.alone and totals.immutable_seen and mbmd.total_mb != totals.in_order:
            entry.blame(
                entry.offset, f"TOTAL_MB {mbmd.total_mb}, and {totals.in_order} bundles were seen"
            )


def final_problems(totals: Totals, *, alone: bool) -> list[str]:
    """What shows only when all files were read."""
    found = []
    expected = totals.start_token_total
    if not alone and totals.immutable_seen and expected not in (None, totals.in_order):
        found.append(
            f"the start token counts {expected} bundles, and {totals.in_order} are in these files"
        )
    if totals.immutable_seen and expected is None:
        found.append("the stream has no start token: the migration did not come to its end")
    return found


def _epoch(epoch: int) -> str:
    return "of the start token" if epoch == START_EPOCH else str(epoch)
