"""Traces against the model: is what was recorded a run of it, on one side or on both together?

The traces of both sides are merged into one run.  A destination can only import what the source has
made: bundles are matched by (stream, IV), lifecycle records by their order.  Otherwise the clocks
decide, and a step that cannot be taken yet waits for the other side.  If neither side can go on,
the trace is not a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from tdxmig_model.attribution import misattributed
from tdxmig_model.compile import Compiled
from tdxmig_model.errors import ModelError, Refused, Unmet, UsageError
from tdxmig_model.expr import EnumType, ForAll, Instance, System, subterms
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.words import SEPT
from tdxmig_model.monitor import Monitor
from tdxmig_model.observation import MAPS, SCALARS, adopt
from tdxmig_model.rows import CANCEL, IMPORT_OPERATIONS, Call, Pages, Row, rows_of
from tdxmig_model.trace import Message, Record, expand_ranges, read_trace
from tdxmig_model.wire.constants import MAX_FORWARD_STREAMS, PAGE_SIZE

_PAIRS_UP_TO: Final = 400
"""Properties over pairs of bundles are evaluated up to this many bundles; they are proved for all.
"""


@dataclass(frozen=True)
class Verdict:
    """What the model says of a trace, or of the traces of both sides together."""

    ok: bool
    steps: int
    """Steps of the model that were taken."""
    records: int
    refused_at: str | None = None
    """Side and number of the record that the model does not allow."""
    reason: str = ""
    properties: tuple[str, ...] = ()
    """Ids of the properties that were evaluated on the run, and held."""
    not_evaluated: tuple[str, ...] = ()
    final: Mapping[str, object] = field(default_factory=dict)


_RECORDS: Final = {
    "import_immutable": "IMMUTABLE",
    "import_epoch": "EPOCH",
    "import_memory": "MEMORY",
    "import_td_state": "TD_STATE",
    "import_vcpu_state": "VCPU_STATE",
    "import_start_token": "START_TOKEN",
}


_MAKES_A_BUNDLE: Final = (
    "export_state_immutable",
    "export_mem",
    "export_track",
    "export_track_start",
    "export_state_td",
    "export_state_vp",
)
_TAKES_A_BUNDLE: Final = (
    "import_state_immutable",
    "import_mem",
    "import_track",
    "import_track_start",
    "import_state_td",
    "import_state_vp",
)
_TAKES_PAGES: Final = ("export_blockw", "export_unblockw", "export_restore", "export_mem")
_PARAMETERS: Final = {
    "export_mem": ("stream", "operation"),
    "export_state_vp": ("stream", "vcpu"),
    "import_mem": ("stream",),
    "import_state_vp": ("vcpu",),
    "vp_enter": ("vcpu",),
}
_PENDING: Final = np.array([name.startswith("PENDING") for name in SEPT.members])

LARGEST_TD: Final = 1 << 24
"""4 KiB pages of the largest TD whose trace is judged (64 GiB): the model has a word for each."""
_WORD: Final = 1 << 63
_BEGINS: Final = {"source": "RUNNABLE", "destination": "UNINITIALIZED"}
"""OP_STATE in which a session begins on each side."""

Entries = Mapping[str, Pages]
"""Pages of a GPA list by kind of entry, in the order of the page numbers."""

_FROM_THE_OTHER_SIDE: Final = ("mbmd_mac", "record_arrived", "confirmation", "abort_token")


class _NotARun(Exception):
    """A record that cannot be a step, whatever the other side does."""


class Replay:
    """The joint state of both models while records are taken one by one."""

    def __init__(
        self, attached: Mapping[str, Record], bundles: int, events: int, profile: str
    ) -> None:
        sizes = [_sizes(record) for record in attached.values()]
        for record in attached.values():
            _check_attached(record, profile)
        pages, vcpus, streams = (max(s[k] for s in sizes) for k in range(3))
        self.leaf = Monitor(
            LEAF.under(profile),
            Instance(
                {
                    "Page": pages,
                    "Vcpu": vcpus,
                    "Stream": streams,
                    "Message": max(bundles, 1),
                    "Epoch": None,
                }
            ),
            [f"{side}_{name}" for side in attached for name in ("op_state", "mig_epoch")],
            ghosts=True,
        )
        self.lifecycle = Monitor(
            LIFECYCLE.under(profile),
            Instance({"Message": max(events, 1), "Epoch": None, "Vcpu": vcpus}),
            [f"{side}_phase" for side in attached],
            ghosts=True,
        )
        self.both = len(attached) == 2
        self.steps = 0
        self._pages, self._vcpus = pages, vcpus
        self._positions: dict[tuple[int, int], int] = {}
        self._bundles: dict[tuple[int, int], tuple[Message, Entries | None]] = {}
        for side, record in attached.items():
            adopt(self.leaf, side, record.state)

    def take(self, record: Record) -> None:
        """Take one record, or raise Refused (it may become legal) or _NotARun."""
        try:
            if record.kind == "lifecycle":
                self._take_event(record)
            elif record.kind == "leaf":
                self._take_leaf(record)
        except (ModelError, UsageError) as problem:
            raise _NotARun(str(problem)) from problem

    # --- lifecycle -------------------------------------------------------------------------------

    def _take_event(self, record: Record) -> None:
        name = record.step
        if (record.side == "destination" and not self.lifecycle.system.has_step(name)) or (
            record.side == "destination" and self.lifecycle.system.step(name).actor == "source"
        ):
            name = f"destination_{name}"
        params = {k: _number(f"parameter {k}", v) for k, v in record.params.items()}
        if self.lifecycle.system.has_step(name):
            _belongs(record, self.lifecycle.system.step(name).actor)
        if not self.both:
            self._assume(record.step)
        self.lifecycle.take(name, **params)
        self.steps += 1
        ours, seen = self.lifecycle.text(f"{record.side}_phase"), record.state.get("lifecycle")
        if seen != ours:
            raise _NotARun(f"the trace shows lifecycle {seen}, the model has {ours}")
        gives_up = record.side == "destination" and record.step == "abort"
        if gives_up and self.lifecycle["abort_token"] and not self.leaf["abort_token"]:
            raise _NotARun("abort in a session calls import_abort, and the trace does not")

    def _assume(self, event: str) -> None:
        """With one trace only, what came from the other side is taken as said."""
        if event == "confirm_import":
            self.lifecycle["confirmation"] = True
        elif event == "abort_with_token":
            self.lifecycle["abort_token"] = True
        elif event in _RECORDS:
            kind = self.lifecycle.system.variable("record_kind").kind
            assert isinstance(kind, EnumType)
            position = int(self.lifecycle["sent"])
            self.lifecycle["record_kind"][position] = kind.position(_RECORDS[event])
            self.lifecycle["record_epoch"][position] = int(self.leaf["destination_mig_epoch"])
            self.lifecycle["sent"] = position + 1

    # --- leaves ----------------------------------------------------------------------------------

    def _take_leaf(self, record: Record) -> None:
        name = f"{record.side}_op_state"
        if record.status is None:
            raise _NotARun("the record of a call has no status")
        if record.status >> 63:
            self._take_failure(record, name)
            return
        _check_message(record)
        call = self._call(record)
        if record.step == "export_abort_with_token" and not self.both:
            self.leaf["abort_token"] = True
        taken: list[Row] = []
        self.leaf.begin()
        try:
            for row in rows_of(self.leaf, call):
                if self.leaf.system.has_step(row.step):
                    _belongs(record, self.leaf.system.step(row.step).actor)
                row.take(self.leaf)
                taken.append(row)
        except BaseException:
            self.leaf.rollback()
            raise
        self.leaf.commit()
        self.steps += sum(row.count for row in taken)
        self._made(record, self._exported(taken) if call.step == "export_mem" else None)
        for seen in ("op_state", "mig_epoch"):
            self._compare(record, seen)

    def _take_failure(self, record: Record, name: str) -> None:
        """A call that the module refused: nothing moves, or the import fails for good."""
        if record.side == "destination" and record.state.get("op_state") != self.leaf.text(name):
            live = self.leaf.text(name) == "LIVE_IMPORT"
            self.leaf.take("import_failure_live" if live else "import_failure")
            self.steps += 1
        self._compare(record, "op_state")

    def _compare(self, record: Record, name: str) -> None:
        seen, ours = record.state.get(name), self.leaf.text(f"{record.side}_{name}")
        if str(seen) != ours:
            raise _NotARun(f"the trace shows {name} {seen}, the model has {ours}")

    def _call(self, record: Record) -> Call:
        params = record.params
        message = record.message
        entries = {k: self._list(params[k]) for k in IMPORT_OPERATIONS if k in params}
        if record.step in _TAKES_PAGES and "gpas" not in params:
            raise _NotARun(f"{record.step} has a GPA list, and the record has none")
        for name in _PARAMETERS.get(record.step, ()):
            if name not in params:
                raise _NotARun(f"{record.step} has a {name}, and the record has none")
        vcpu = _number("parameter vcpu", params.get("vcpu", 0))
        if vcpu >= self._vcpus:
            raise _NotARun(f"vCPU {vcpu} of a TD with {self._vcpus} vCPUs")
        operation = _number("parameter operation", params.get("operation", 1))
        if operation not in (1, CANCEL):
            raise _NotARun(f"no call has operation {operation}: it is 1 (migrate) or 2 (cancel)")
        pages = self._list(params["gpas"]) if "gpas" in params else None
        listed = sum(map(len, entries.values())) if pages is None else len(pages)
        if message is not None and message.kind == "MEM" and message.n < listed:
            raise _NotARun(f"a bundle of {message.n} pages cannot hold {listed} entries")
        position = self._position(record, entries) if record.step in _TAKES_A_BUNDLE else None
        stream = params.get("stream", message.stream if message is not None else 0)
        return Call(
            record.side,
            record.step,
            stream=_number("parameter stream", stream),
            vcpu=vcpu,
            operation=operation,
            pages=pages,
            entries=entries or None,
            message=position,
        )

    def _list(self, ranges: object) -> Pages:
        """Page numbers of a list, each once and of this TD."""
        gpas = expand_ranges(ranges, self._pages)
        pages = (gpas // np.uint64(PAGE_SIZE)).astype(np.int64)
        if len(np.unique(pages)) != len(pages):
            raise _NotARun("a GPA list names a page twice")
        return pages

    def _exported(self, rows: Sequence[Row]) -> Entries:
        """The entries that the rows of EXPORT.MEM made, as IMPORT.MEM has to find them."""
        found: dict[str, Pages] = {}
        for row in rows:
            if row.pages is None:
                continue
            kind = row.step.removeprefix("export_mem_")
            kind = "migrate" if kind == "out_of_order" else kind  # an import knows no other
            waits = _PENDING[self.leaf["source_page"][row.pages]] & (kind != "cancel")
            found[kind] = np.sort(row.pages[~waits])
            found[f"{kind}_pending"] = np.sort(row.pages[waits])
        return {kind: pages for kind, pages in found.items() if len(pages)}

    def _position(self, record: Record, entries: Entries) -> int:
        """Where in the joint log the bundle is that the destination imports."""
        message = record.message
        assert message is not None
        key = message.stream, message.iv
        if key not in self._positions:
            if self.both:
                text = f"a bundle of stream {message.stream} with IV {message.iv} from the source"
                raise Refused(record.step, self.leaf.shown(), [Unmet("mbmd_mac", text, {})])
            self._positions[key] = int(self.leaf["log_length"])
            self._write_log(record)
            self.leaf["log_length"] += 1
        elif self.both:
            self._equals(record, self._positions[key])
            self._same_bundle(record, entries)
        return self._positions[key]

    def _same_bundle(self, record: Record, entries: Entries) -> None:
        """What the destination says that it took must be what the source says that it made."""
        message = record.message
        assert message is not None
        made, exported = self._bundles[message.stream, message.iv]
        for name in Message.__slots__:
            if getattr(made, name) != getattr(message, name):
                ours, theirs = getattr(made, name), getattr(message, name)
                raise _NotARun(f"the bundle has {name} {theirs}, the source made {name} {ours}")
        if exported is None:
            return
        taken = {kind: np.sort(pages) for kind, pages in entries.items() if len(pages)}
        for kind in sorted(exported.keys() | taken.keys()):
            none = np.zeros(0, dtype=np.int64)
            ours, theirs = exported.get(kind, none), taken.get(kind, none)
            if not np.array_equal(ours, theirs):
                raise _NotARun(
                    f"the import takes {len(theirs)} {kind} entries, the source made "
                    f"{len(ours)}, and they are not the same pages"
                )

    def _write_log(self, record: Record) -> None:
        message = record.message
        assert message is not None
        position = int(self.leaf["log_length"])
        kind = self.leaf.system.variable("log_kind").kind
        assert isinstance(kind, EnumType)
        self.leaf["log_kind"][position] = kind.position(message.kind)
        self.leaf["log_epoch"][position] = message.epoch
        self.leaf["log_counter"][position] = message.mb_counter
        self.leaf["log_stream"][position] = message.stream
        self.leaf["log_total"][position] = message.total_mb or 0
        self.leaf["log_complete"][position] = True

    def _made(self, record: Record, entries: Entries | None) -> None:
        """Remember the bundle that a step of the source made, and compare it with the model's."""
        message = record.message
        if message is None or record.step not in _MAKES_A_BUNDLE:
            return
        key = message.stream, message.iv
        if key in self._positions:
            raise _NotARun(f"stream {message.stream} has used IV {message.iv} before")
        self._positions[key] = int(self.leaf["log_length"]) - 1
        self._bundles[key] = message, entries
        self._equals(record, self._positions[key])

    def _equals(self, record: Record, position: int) -> None:
        """Compare what a record says of a bundle with the bundle in the joint log."""
        message = record.message
        assert message is not None
        kind = self.leaf.system.variable("log_kind").kind
        assert isinstance(kind, EnumType)
        made: dict[str, object] = {
            "kind": kind.members[int(self.leaf["log_kind"][position])],
            "epoch": int(self.leaf["log_epoch"][position]),
            "mb_counter": int(self.leaf["log_counter"][position]),
            "stream": int(self.leaf["log_stream"][position]),
        }
        if made["kind"] == "EPOCH_TOKEN":
            made["total_mb"] = int(self.leaf["log_total"][position])
        for name, value in made.items():
            seen = getattr(message, name)
            if seen != value:
                raise _NotARun(f"the bundle has {name} {seen}, the model makes {name} {value}")


def _check_message(record: Record) -> None:
    """A call that makes or takes a bundle has one, and no other call has; its fields are words."""
    message = record.message
    wanted = record.step in (*_MAKES_A_BUNDLE, *_TAKES_A_BUNDLE, "import_abort")
    if (message is not None) != wanted:
        raise _NotARun(
            f"{record.step} {'has a' if wanted else 'has no'} bundle; the record differs"
        )
    if message is None:
        return
    for name in ("stream", "iv", "epoch", "mb_counter", "n"):
        _number(name, getattr(message, name))
    stream = record.params.get("stream", message.stream)
    alone = message.kind not in ("MEM", "MUTABLE_VCPU_STATE")
    if stream != message.stream or (alone and message.stream):
        raise _NotARun(f"a bundle of type {message.kind} on stream {message.stream}")
    if (message.total_mb is not None) != (message.kind == "EPOCH_TOKEN"):
        raise _NotARun(f"total_mb {message.total_mb} in a bundle of type {message.kind}")
    if record.step == "import_abort":
        token = Message(0, message.iv, "ABORT_TOKEN", 0, 0, None, 0)
        if message != token or not message.iv:
            raise _NotARun("the bundle of import_abort is no abort token of the backward stream")


def _belongs(record: Record, actor: str) -> None:
    if actor != record.side:
        raise _NotARun(f"{record.step} is a step of the {actor}, not of the {record.side}")


def judge(source: str | Path, destination: str | Path, profile: str = "hardened") -> Verdict:
    """Judge the traces of both sides of one migration session as one run of the models."""
    return judge_records([list(read_trace(source)), list(read_trace(destination))], profile)


def judge_one(trace: str | Path, profile: str = "hardened") -> Verdict:
    """Judge the trace of one side alone."""
    return judge_records([list(read_trace(trace))], profile)


def judge_records(traces: Sequence[Sequence[Record]], profile: str = "hardened") -> Verdict:
    """Judge one or two traces, already read."""
    attached = {trace[0].side: trace[0] for trace in traces if trace and trace[0].step == "attach"}
    if len(attached) != len(traces):
        raise UsageError("each trace begins with an attach record, and the two are of two sides")
    for trace in traces:
        for record in trace[1:]:
            if record.step == "attach" or record.side != trace[0].side:
                raise UsageError(
                    f"{trace[0].side} record {record.seq} is a second beginning, or of the "
                    "other side: one trace is of one side of one session"
                )
    sessions = {r.session for trace in traces for r in trace}
    if len(sessions) > 1:
        raise UsageError(f"the traces are of different sessions: {', '.join(sorted(sessions))}")
    made = [r for t in traces for r in t if r.message is not None]
    events = sum(r.kind == "lifecycle" for trace in traces for r in trace)
    replay = Replay(attached, len(made), events, profile)
    queues = [deque(trace) for trace in traces]
    total = sum(len(q) for q in queues)
    stuck = _merge(replay, queues)
    if stuck is not None:
        record, problem = stuck
        where = f"{record.side} record {record.seq} ({record.step})"
        return Verdict(False, replay.steps, total, where, str(problem))
    for trace in traces:
        wrong = misattributed(trace)
        if wrong is not None:
            where = f"{wrong[0].side} record {wrong[0].seq} ({wrong[0].step})"
            return Verdict(False, replay.steps, total, where, wrong[1])
    return _properties(replay, total)


def _merge(replay: Replay, queues: Sequence[deque[Record]]) -> tuple[Record, Exception] | None:
    """Take every record; None at the end, or the earliest record that can never be taken."""
    while True:
        heads = sorted((q for q in queues if q), key=lambda q: q[0].t)
        if not heads:
            return None
        refusals: list[tuple[Record, Refused]] = []
        for queue in heads:
            try:
                replay.take(queue[0])
            except _NotARun as problem:
                return queue[0], problem
            except Refused as refused:
                refusals.append((queue[0], refused))
            else:
                queue.popleft()
                break
        else:
            return min(refusals, key=lambda r: _waits(r[1]))


def _waits(refused: Refused) -> bool:
    """Whether what is missing is the other side's to bring: then the fault is there."""
    return any(unmet.label in _FROM_THE_OTHER_SIDE for unmet in refused.unmet)


def _properties(replay: Replay, records: int) -> Verdict:
    """Evaluate what is claimed of both models on the state at the end of the run."""
    held: list[str] = []
    skipped: list[str] = []
    broken: list[str] = []
    for monitor in (replay.leaf, replay.lifecycle):
        term = _terms(monitor)
        for claimed in monitor.system.properties:
            if claimed.level == "lemma":
                continue
            if not replay.both or not _finite(claimed.formula, monitor):
                skipped.append(claimed.identifier)
            elif term(claimed.formula):
                held.append(claimed.identifier)
            else:
                broken.append(f"{claimed.identifier}: {claimed.sentence}")
    final = {**replay.leaf.shown(), **replay.lifecycle.shown()}
    return Verdict(
        not broken,
        replay.steps,
        records,
        "the end" if broken else None,
        "; ".join(broken),
        tuple(held),
        tuple(skipped),
        final,
    )


def _terms(monitor: Monitor) -> Callable[[Any], bool]:
    system: System = monitor.system
    compiled = Compiled(system, monitor.instance)
    return lambda formula: bool(compiled.term(formula)(monitor.state))


def _finite(formula: Any, monitor: Monitor) -> bool:
    for node in subterms(formula):
        if isinstance(node, ForAll):
            sizes = [monitor.instance.size(b.kind) for b in node.bound]
            if any(s is None or (len(sizes) > 1 and s > _PAIRS_UP_TO) for s in sizes):
                return False
    return True


def _sizes(record: Record) -> tuple[int, int, int]:
    bounds = {"pages": LARGEST_TD, "vcpus": 0xFFFF, "streams": MAX_FORWARD_STREAMS}
    sizes: list[int] = []
    for name, bound in bounds.items():
        value = record.params.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= bound:
            raise UsageError(
                f"the attach record of the {record.side} has {name} {value!r}: it is 1 to {bound}"
            )
        sizes.append(value)
    pages, vcpus, streams = sizes
    return pages, vcpus, streams


def _check_attached(record: Record, profile: str) -> None:
    """UsageError: recorded under another profile, or not from the beginning of a session."""
    recorded = record.params.get("profile")
    if recorded != profile:
        raise UsageError(
            f"the trace of the {record.side} was recorded under profile {recorded!r}; judge it "
            f"under that one, not under {profile}"
        )
    begins, seen = _BEGINS[record.side], record.state.get("op_state")
    if seen != begins:
        raise UsageError(
            f"the trace of the {record.side} begins in {seen!r}; a session begins in {begins}"
        )
    for name in SCALARS[record.side][1:]:
        value = record.state.get(name, 0)
        if not isinstance(value, int) or not 0 <= value < _WORD:
            raise UsageError(f"the attach record of the {record.side} shows {name} {value!r}")
    for name in MAPS[record.side]:
        values = record.state.get(name, [])
        if not (
            isinstance(values, list)
            and len(values) <= MAX_FORWARD_STREAMS
            and all(isinstance(value, int) and 0 <= value < _WORD for value in values)
        ):
            raise UsageError(f"the attach record of the {record.side} shows {name} {values!r}")


def _number(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _WORD:
        raise _NotARun(f"{name} is {value!r}, and not a number from 0 on")
    return value
