"""The enforcer: every command passes the model before it is issued and is compared afterwards.

Before: the command's rows are taken in the model.  If one of them does not hold, the model is put
back, the backend is never asked, and `Refused` says what is missing.  After: what the backend lets
one see must equal what the model computed; a difference is a `ModelMismatch` that shows both.  A
command that the backend refuses is taken back in the model; what a failing import does to the TD is
a row of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.engine import commands as c
from tdxmig_model.errors import ModelError, ModelMismatch, Refused, TdxmigError, Unmet
from tdxmig_model.expr import EnumType, Instance
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.words import SEPT
from tdxmig_model.monitor import Monitor
from tdxmig_model.observation import MAPS, SCALARS, adopt
from tdxmig_model.rows import CANCEL, IMPORT_OPERATIONS, Call, Pages, Row, rows_of
from tdxmig_model.trace import TraceWriter, message_of
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import (
    entries_from_bytes,
    entry_gpas,
    entry_operations,
    entry_pending,
)
from tdxmig_model.wire.mbmd import BundleType, Mbmd

_SHOWN_DIFFERENCES: Final = 8

_ACCEPTABLE: Final = np.array([SEPT.position("PENDING"), SEPT.position("PENDING_EXPORTED_DIRTY")])
_ACCEPTED: Final = np.array([SEPT.position("MAPPED"), SEPT.position("EXPORTED_DIRTY")])

# Leaves of the source whose refusal may leave traces: a session start consumes the key first, and
# as published EXPORT.MEM commits entries before it looks at the next.
_REFUSED_WITH_EFFECT: Final = {
    "hardened": ("export_state_immutable",),
    "tdx-1.5.01": ("export_state_immutable", "export_mem"),
}

_LOG: Final = (
    "log_kind",
    "log_epoch",
    "log_counter",
    "log_stream",
    "log_total",
    "log_complete",
    "destination_accepted",
)
_LOG_KEPT: Final = 64


class Enforcer:
    """Drive one side's backend under the model.

    `pages` is the number of 4 KiB pages of the guest physical space that the TD uses, from GPA 0;
    `streams` the number of forward streams.  What the backend shows is taken over once, here.
    """

    def __init__(
        self,
        backend: c.Backend,
        side: str,
        profile: str = "hardened",
        *,
        pages: int,
        vcpus: int,
        streams: int = 1,
        trace: TraceWriter | None = None,
    ) -> None:
        if side not in SCALARS:
            raise ModelError(f"an enforcer is for the source or the destination, not for {side}")
        self.backend = backend
        self.side = side
        self.profile = profile
        self.trace = trace
        self.steps_checked = 0
        sizes = {"Page": pages, "Vcpu": vcpus, "Stream": streams, "Message": None, "Epoch": None}
        self.monitor = Monitor(
            LEAF.under(profile),
            Instance(sizes),
            (f"{side}_op_state", f"{side}_mig_epoch"),
            actor=side,
        )
        self.adopt()
        if trace is not None:
            attached = {"pages": pages, "vcpus": vcpus, "streams": streams, "profile": profile}
            trace.record("attach", attached, self.backend.observe(), kind="note")

    # --- the one entry ---------------------------------------------------------------------------

    def execute(self, command: c.Command) -> c.Result:
        """Check, issue, compare and record one command.

        Raises Refused (nothing was issued) or ModelMismatch; a refusing module is a Result, as it
        is for the backend itself.
        """
        call, rows = self._begin(command)
        try:
            result = self.backend.execute(command)
        except BaseException:
            self.monitor.rollback()
            with suppress(TdxmigError, OSError):
                self.adopt()  # it may have acted before it raised
            raise
        try:
            if result.ok:
                call, rows = self._settle(command, call, result, rows)
                self._compare(call, rows)
        finally:
            self.monitor.rollback()  # nothing is left to take back once it was compared
        if not result.ok:
            self._compare_refused(call, result)
        self._forget_old_bundles()
        self.steps_checked += sum(row.count for row in rows)
        self._record(command, call, result)
        return result

    def check(self, command: c.Command) -> None:
        """Raise Refused if the model does not allow the command now; nothing is changed."""
        self._begin(command)
        self.monitor.rollback()

    def state(self) -> dict[str, object]:
        """The headline of this side's state: OP_STATE and MIG_EPOCH."""
        return self.monitor.shown()

    def legal(self) -> list[str]:
        """The steps of this side that are legal now, with some parameters at least."""
        return self.monitor.legal()

    # --- before ----------------------------------------------------------------------------------

    def _begin(self, command: c.Command) -> tuple[Call, list[Row]]:
        """Take a command in the model so that it can be taken back, or take it back and raise."""
        self.monitor.begin()
        try:
            call = self._call(command)
            return call, self._take(call)
        except BaseException:
            self.monitor.rollback()
            raise

    def _take(self, call: Call) -> list[Row]:
        """Take the call's rows in the model; Refused under the name of the call."""
        taken: list[Row] = []
        try:
            for row in rows_of(self.monitor, call):
                row.take(self.monitor)
                taken.append(row)
        except Refused as refused:
            if refused.step != call.step:
                raise _under_name(refused, call.step) from None
            raise
        return taken

    def _call(self, command: c.Command) -> Call:
        """A command in the model's terms; what it brings along is put into the model's network."""
        call = Call(self.side, command.name)
        match command:
            case c.ExportBlockw() | c.ExportRestore():
                return replace(call, pages=self._pages(call.step, command.gpas))
            case c.ExportUnblockw():
                return replace(call, pages=self._pages(call.step, [command.gpa]))
            case c.ExportMem():
                pages = self._pages(call.step, command.gpas)
                operation = int(command.operation)
                return replace(call, pages=pages, stream=command.stream, operation=operation)
            case c.ExportStateVp():
                return replace(call, stream=command.stream, vcpu=command.vcpu)
            case c.ExportAbort() if command.token is not None:
                self.monitor.put("abort_token", True)
                return call
            case c.ImportMem():
                message = self._deliver(call.step, command.bundle.mbmd)
                entries = self._entries(command.bundle.gpa_list)
                return replace(call, stream=command.stream, message=message, entries=entries)
            case c.ImportStateImmutable() | c.ImportTrack() | c.ImportStateTd():
                return replace(call, message=self._deliver(call.step, command.bundle.mbmd))
            case c.ImportStateVp():
                mbmd = command.bundle.mbmd
                message = self._deliver(call.step, mbmd)
                return replace(call, stream=mbmd.migs_index, vcpu=command.vcpu, message=message)
            case _:
                return call

    def _entries(self, gpa_list: bytes, done: NDArray[np.bool_] | None = None) -> dict[str, Pages]:
        """The pages of a GPA list by kind of entry; with `done`, of the entries that were done."""
        entries = entries_from_bytes(gpa_list)
        entries = entries if done is None else entries[done]
        operations, pages = (
            entry_operations(entries),
            self._pages("import_mem", entry_gpas(entries)),
        )
        # A CANCEL entry has no content, whatever its pending bit says.
        pending = entry_pending(entries) & (operations != CANCEL)
        return {
            name: pages[(operations == code) & (pending == waits)]
            for name, (code, waits) in IMPORT_OPERATIONS.items()
        }

    def _pages(self, step: str, gpas: NDArray[np.uint64] | list[int]) -> Pages:
        limit = len(self.monitor[f"{self.side}_page"])
        text = f"GPAs below 0x{limit * PAGE_SIZE:x}, the end of this TD"
        try:
            pages = (np.asarray(gpas, dtype=np.uint64) // np.uint64(PAGE_SIZE)).astype(np.int64)
        except (OverflowError, ValueError, TypeError):
            raise self._refused(step, "page", text, {"gpa": gpas}) from None
        if len(pages) and int(pages.max()) >= limit:
            raise self._refused(step, "page", text, {"gpa": hex(int(pages.max()) * PAGE_SIZE)})
        return pages

    def _refused(self, step: str, label: str, text: str, values: Mapping[str, object]) -> Refused:
        return Refused(step, self.state(), [Unmet(label, text, values)], self.legal())

    def _deliver(self, step: str, mbmd: Mbmd) -> int:
        """Put a bundle that arrived into the model's log; the module says if it is authentic."""
        model = self.monitor
        kind = model.system.variable("log_kind").kind
        assert isinstance(kind, EnumType)
        if mbmd.bundle_type.name not in kind.members:
            text = f"a bundle of type {', '.join(kind.members)}"
            raise self._refused(step, "kind", text, {"type": mbmd.bundle_type.name})
        position = int(model["log_length"])
        token = mbmd.bundle_type is BundleType.EPOCH_TOKEN
        bundle = {
            "log_kind": kind.position(mbmd.bundle_type.name),
            "log_epoch": mbmd.mig_epoch,
            "log_counter": mbmd.mb_counter,
            "log_stream": mbmd.migs_index,
            "log_total": mbmd.total_mb if token else 0,
            "log_complete": True,
        }
        for name, value in bundle.items():
            model.put(name, value, at=position)
        model.put("log_length", position + 1)
        return position

    # --- after -----------------------------------------------------------------------------------

    def _settle(
        self, command: c.Command, call: Call, result: c.Result, rows: list[Row]
    ) -> tuple[Call, list[Row]]:
        """Take the call again as it turned out, where that is not what was asked for.

        Entries that the module did not do are left out; pages that the guest accepted while it ran
        are put in.
        """
        done = None if result.statuses is None else result.statuses == 0
        if isinstance(command, c.VpEnter) and self.side == "source":
            accepted = self._accepted()
            if not len(accepted):
                return call, rows
            settled = replace(call, pages=accepted)
        elif done is None or done.all():
            return call, rows
        elif isinstance(command, c.ImportMem):
            settled = replace(call, entries=self._entries(command.bundle.gpa_list, done))
        elif call.pages is not None:
            settled = replace(call, pages=call.pages[done])
        else:
            return call, rows
        self.monitor.rollback()
        self.monitor.begin()
        self._call(command)  # brings along again what was taken back
        return settled, self._take(settled)

    def _accepted(self) -> Pages:
        """Pages that the model holds as pending and the guest has accepted since."""
        pending = np.flatnonzero(np.isin(self.monitor["source_page"], _ACCEPTABLE))
        if not len(pending):
            return pending
        seen = self.backend.page_states(pending.astype(np.uint64) * np.uint64(PAGE_SIZE))
        return pending[np.isin(seen, _ACCEPTED)]

    def _compare(self, call: Call, rows: list[Row]) -> None:
        self.monitor.commit()
        differences = self._differences(self.backend.observe())
        touched = [row.touched for row in rows if len(row.touched)]
        if touched:
            differences.update(self._page_differences(np.concatenate(touched)))
        if differences:
            raise ModelMismatch(call.step, differences)

    def _compare_refused(self, call: Call, result: c.Result) -> None:
        """After a refusal by the module: nothing moved, or the import failed for good."""
        seen = self.backend.observe()
        name = f"{self.side}_op_state"
        model = self.monitor.text(name)
        if self.side == "destination" and seen["op_state"] != model:
            failing = "import_failure_live" if model == "LIVE_IMPORT" else "import_failure"
            self.monitor.take(failing)
            model = self.monitor.text(name)
        if seen["op_state"] != model:
            detail = f"the module answered {result.status_name}"
            raise ModelMismatch(call.step, {name: (model, seen["op_state"])}, detail)
        if self.side == "source" and call.step not in _REFUSED_WITH_EFFECT[self.profile]:
            differences = self._differences(seen)
            if differences:
                detail = f"the module answered {result.status_name}, and yet something moved"
                raise ModelMismatch(call.step, differences, detail)
        self.adopt()

    def _differences(self, seen: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
        found: dict[str, tuple[object, object]] = {}
        for key in SCALARS[self.side]:
            if key not in seen:
                continue
            name = f"{self.side}_{key}"
            model = self.monitor.text(name) if key == "op_state" else int(self.monitor[name])
            backend = seen[key] if key == "op_state" else int(seen[key])
            if model != backend:
                found[name] = (model, backend)
        for key in MAPS[self.side]:
            if key in seen:
                name = f"{self.side}_{key}"
                values, used = self.monitor[name].tolist(), _used(seen, key)
                if any(
                    there != model
                    for model, there, used_now in zip(values, seen[key], used, strict=False)
                    if used_now
                ):
                    found[name] = (values, seen[key])
        if self.side == "source" and "refcount" in seen:
            counts = self._refcounts()
            if counts != list(seen["refcount"]):
                found["source_refcount"] = (counts, seen["refcount"])
        return found

    def _refcounts(self) -> list[int]:
        """REFCOUNT by the parity of TD_EPOCH, as the module keeps it."""
        current, previous = (
            self.monitor["source_refcount"],
            self.monitor["source_refcount_previous"],
        )
        odd = int(self.monitor["source_td_epoch"]) & 1
        return [int(previous), int(current)] if odd else [int(current), int(previous)]

    def _page_differences(self, pages: Pages) -> dict[str, tuple[object, object]]:
        backend = self.backend.page_states(pages.astype(np.uint64) * np.uint64(PAGE_SIZE))
        model = self.monitor[f"{self.side}_page"][pages]
        wrong = np.flatnonzero(model != backend)[:_SHOWN_DIFFERENCES]
        return {
            f"{self.side}_page[{int(pages[k])}]": (
                SEPT.members[int(model[k])],
                SEPT.members[int(backend[k])],
            )
            for k in wrong
        }

    # --- housekeeping ----------------------------------------------------------------------------

    def adopt(self) -> None:
        """Take over what the backend lets one see: at the start, and after the module refused."""
        seen: dict[str, Any] = dict(self.backend.observe())
        for key in MAPS[self.side]:
            if key in seen:
                pairs = zip(seen[key], _used(seen, key), strict=True)
                seen[key] = [value if used else 0 for value, used in pairs]
        adopt(self.monitor, self.side, seen)
        states = self.monitor[f"{self.side}_page"]
        gpas = np.arange(len(states), dtype=np.uint64) * np.uint64(PAGE_SIZE)
        states[:] = self.backend.page_states(gpas)

    def _forget_old_bundles(self) -> None:
        """Only the newest bundle is still referred to: the log does not grow with the migration."""
        newest = int(self.monitor["log_length"]) - 1
        for name in _LOG:
            log = self.monitor[name]
            if len(log) > _LOG_KEPT:
                for position in [p for p in log if p < newest]:
                    del log[position]

    def _record(self, command: c.Command, call: Call, result: c.Result) -> None:
        if self.trace is None:
            return
        params: dict[str, object] = {}
        if call.pages is not None:
            params["gpas"] = call.pages.astype(np.uint64) * np.uint64(PAGE_SIZE)
        for name, pages in (call.entries or {}).items():
            if len(pages):
                params[name] = pages.astype(np.uint64) * np.uint64(PAGE_SIZE)
        for name in ("stream", "vcpu", "operation"):
            if hasattr(command, name):
                params[name] = int(getattr(command, name))
        bundle = result.bundle or getattr(command, "bundle", None)
        shown = {k: self.monitor.text(f"{self.side}_{k}") for k in ("op_state", "mig_epoch")}
        message = message_of(bundle.mbmd, len(bundle.pages)) if bundle is not None else None
        self.trace.record(
            call.step, params, shown, message, status=result.status, status_name=result.status_name
        )


def _used(seen: Mapping[str, Any], key: str) -> list[bool]:
    """Which streams a session has used: what a counter was in the session before is no state."""
    flags = seen.get("initialized")
    return [True] * len(seen[key]) if flags is None else [bool(flag) for flag in flags]


def _under_name(refused: Refused, step: str) -> Refused:
    """The same refusal under the name of the command whose row it is."""
    name = f"{step} ({refused.step})"
    return Refused(name, refused.state, refused.unmet, refused.legal, refused.why)
