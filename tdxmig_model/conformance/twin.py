"""One run on the model and on a pair of software modules, call by call.

After each call both must have accepted it or both refused it, a refusal for a reason that the model
has, and everything that both have must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tdxmig_model.backend.soft.module import Profile
from tdxmig_model.compile import Compiled
from tdxmig_model.conformance import observe
from tdxmig_model.conformance.answers import Answer, Sent
from tdxmig_model.conformance.destination_calls import DestinationCalls
from tdxmig_model.conformance.labels import NARROWER, NO_CALL, UNOBSERVED, expected
from tdxmig_model.conformance.side import Side
from tdxmig_model.conformance.source_calls import SourceCalls
from tdxmig_model.errors import ModelMismatch
from tdxmig_model.expr import Instance, Interpreter, Property, System, initial_state
from tdxmig_model.model.words import SEPT

Values = Mapping[str, int]

_EFFECTS: Final = (
    "export_mem_failed_entry",
    "export_mem_dropped",
    "import_failure",
    "import_failure_live",
    "import_mem_nop",
    "import_mem_refused",
    "vp_exit",
    "vp_exit_previous",
)
"""Rows that say what a refused call may leave behind."""
_FAILED_IMPORT: Final = "FAILED_IMPORT"
_IMPORTING: Final = ("MEMORY_IMPORT", "STATE_IMPORT", "POST_IMPORT", "LIVE_IMPORT")


class Disagreement(ModelMismatch):
    """Model and module differ: whether a call is accepted, why not, or what it does."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call, and the rows of the model that it can be; all have the same parameters."""

    rows: tuple[str, ...]
    values: Values

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value}" for name, value in self.values.items())
        return " or ".join(self.rows) + (f" ({shown})" if shown else "")


Kind = Literal["accepted", "refused", "narrower"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call on which both agree.

    `row` is the row that was taken, `labels` are the conjuncts that did not hold, `effect` the row
    that says what the refused call left behind.
    """

    kind: Kind
    row: str | None
    answer: Answer
    labels: frozenset[str] = frozenset()
    effect: str | None = None


class Twin:
    """The memory model of one profile in step with modules of one profile.

    `system` is the model under its profile, or a mutant of it.  `pages` are those of the model,
    the last `pending` of them not accepted at first; a bundle has at most `entries` entries.
    """

    def __init__(
        self,
        system: System,
        profile: Profile,
        *,
        pages: int = 2,
        vcpus: int = 1,
        streams: int = 1,
        pending: int = 0,
        entries: int = 3,
    ) -> None:
        self.system = system
        self.pages, self.vcpus, self.streams, self.entries = pages, vcpus, streams, entries
        self._sizes = {"Page": pages, "Vcpu": vcpus, "Stream": streams, "Entry": entries}
        instance = Instance({**self._sizes, "Message": None, "Epoch": None})
        self._compiled = Compiled(system, instance)
        self._slots = self._compiled.slots
        self.state: list[Any] = initial_state(system, instance)
        for page in range(pages - pending, pages):
            self.get("source_page")[page] = SEPT.position("PENDING")
        self.log: list[Sent] = []
        self.source = SourceCalls(
            Side("source", profile, pages, vcpus, streams, pending), self.log, entries
        )
        self.destination = DestinationCalls(
            Side("destination", profile, pages, vcpus, streams, 0), self.log, self.source.slots
        )
        self._content: dict[tuple[int, int], str] = {}
        self._remember(range(pages))

    # --- the model -----------------------------------------------------------------------------

    def get(self, name: str) -> Any:
        """A variable in the model's state."""
        return self.state[self._slots[name]]

    def text(self, name: str) -> str:
        """The member's name of a scalar that is an enum."""
        kind: Any = self.system.variable(name).kind
        member: str = kind.members[self.get(name)]
        return member

    def enabled(self, row: str, values: Values) -> bool:
        """Whether the model has the row and its guard holds."""
        if not self.system.has_step(row):
            return False
        return self._compiled.guard(row)(self.state, *self._arguments(row, values))

    def unmet(self, row: str, values: Values) -> frozenset[str]:
        """Labels of the conjuncts that do not hold."""
        arguments = self._arguments(row, values)
        return frozenset(
            c.label for c in self._compiled.conjuncts(row) if not c.holds(self.state, *arguments)
        )

    def holds(self, claimed: Property) -> bool:
        """Whether a property holds in the model's state."""
        sizes = {**self._sizes, "Message": len(self.log), "Epoch": self.get("source_td_epoch")}
        interpreter = Interpreter(self.system, Instance(sizes))
        return bool(interpreter.value(claimed.formula, self.state, {}))

    def room(self, stream: int) -> bool:
        """Whether the memory bundle that a stream makes has room for one more entry."""
        known = self.source.unfinished.get(stream)
        return known is None or known.slot <= self.entries

    def _arguments(self, row: str, values: Values) -> list[int]:
        return [values[p.name] for p in self.system.step(row).params]

    def _take(self, row: str, values: Values) -> None:
        self._compiled.apply(row)(self.state, *self._arguments(row, values))

    def _remember(self, pages: Sequence[int]) -> None:
        """What the source's pages hold now belongs to the version that the model has now."""
        for page in pages:
            content = observe.digest(self.source.side.read_page(page))
            self._content[page, self.get("source_version")[page]] = content

    # --- calls ---------------------------------------------------------------------------------

    def attempt(self, call: Call) -> Outcome:
        """Make a call on both; Disagreement if they do not agree on it."""
        known = [row for row in call.rows if self.system.has_step(row)]
        open_rows = [row for row in known if self.enabled(row, call.values)]
        labels = frozenset[str]().union(*(self.unmet(row, call.values) for row in known))
        answer = self._ask((open_rows or list(call.rows))[0], call.values)
        if answer.accepted != bool(open_rows):
            return self._unequal(call, open_rows, labels, answer)
        if not open_rows:
            self._check_reason(call, labels, answer)
            return Outcome("refused", None, answer, labels, self._settle(call, answer))
        row = open_rows[0]
        self._take(row, call.values)
        if row in ("guest_write", "page_accept"):
            self._remember([call.values["p"]])
        self._must_be_equal(call, answer)
        return Outcome("accepted", row, answer)

    def _ask(self, row: str, values: Values) -> Answer:
        side = self.source if self.source.has(row) else self.destination
        answer = side.take(row, values)
        if self.destination.abort_token is not None:
            self.source.abort_token = self.destination.abort_token
        return answer

    def _unequal(
        self, call: Call, open_rows: Sequence[str], labels: frozenset[str], answer: Answer
    ) -> Outcome:
        allowed = not answer.accepted and answer.word in NARROWER.get(open_rows[0], ())
        if allowed or (open_rows and self._is_unobserved(call, answer)):
            return Outcome("narrower", None, answer, effect=self._settle(call, answer))
        model = "accepts" if open_rows else f"refuses ({', '.join(sorted(labels))})"
        found = "accepts" if answer.accepted else f"refuses ({answer})"
        raise Disagreement(str(call), {"acceptance": (model, found)})

    def _is_unobserved(self, call: Call, answer: Answer) -> bool:
        """Whether the call resumes a bundle that the model does not log."""
        memory = call.rows[0].startswith("export_mem_")
        return memory and not self.get("session_observed") and answer.word == UNOBSERVED

    def _check_reason(self, call: Call, labels: frozenset[str], answer: Answer) -> None:
        """The status is that of a conjunct that does not hold."""
        pairs = [(row, label) for row in call.rows for label in labels]
        words = frozenset[str]().union(*(expected(*pair) for pair in pairs))
        known = answer.word in words or self._is_unobserved(call, answer)
        if not known and not labels <= NO_CALL:
            reasons = f"{', '.join(sorted(labels))}: {', '.join(sorted(words))}"
            raise Disagreement(str(call), {"status class": (reasons, answer.word)})

    def _settle(self, call: Call, answer: Answer) -> str | None:
        """The row that says what a refused call left behind, taken in the model; None if nothing.

        Disagreement if something was left behind that no row says.
        """
        wrong = self.differences()
        if not wrong and not answer.violation:
            return None
        before = self._copied()
        values = {"stream": call.values.get("stream", 0)}
        for row in _EFFECTS:
            if not self.enabled(row, values):
                continue
            try:
                self._take(row, values)
            except IndexError:
                continue  # no room for one more entry, so it was not that
            if not self.differences():
                return row
            self.state = before
            before = self._copied()
        raise Disagreement(str(call), wrong, f"the module refused it ({answer}), and yet")

    def _must_be_equal(self, call: Call, answer: Answer) -> None:
        wrong = self.differences()
        if wrong:
            raise Disagreement(str(call), wrong, f"the module answered {answer}")

    # --- what both have ------------------------------------------------------------------------

    def differences(self) -> observe.Differences:
        """Where the state of the modules is not that of the model."""
        source, destination = self.source.side, self.destination.side
        fields = {**observe.scalars(source), **observe.scalars(destination)}
        maps = {
            **observe.source_maps(source, self.pages, self.streams),
            **observe.destination_maps(destination, self.pages, self.streams),
        }
        wrong = observe.compare_scalars(self.system, self.get, fields)
        wrong.update(observe.compare_maps(self.get, maps))
        if len(self.log) != self.get("log_length"):
            wrong["log_length"] = (self.get("log_length"), len(self.log))
        else:
            for at, sent in self._changing():
                wrong.update(observe.compare_bundle(self.get, at, sent, self.entries))
        wrong.update(self._wrong_calls())
        wrong.update(self._wrong_progress())
        wrong.update(self._wrong_contents())
        return wrong

    def _changing(self) -> list[tuple[int, Sent]]:
        """The newest bundle, and those that are being made; the others were compared before."""
        made = [one.sent for one in self.source.unfinished.values()]
        last = len(self.log) - 1
        return [
            (at, sent)
            for at, sent in enumerate(self.log)
            if at == last or any(sent is one for one in made)
        ]

    def _wrong_calls(self) -> observe.Differences:
        """Which imports can be resumed: those that are unfinished and of the present epoch."""
        if self.text("destination_op_state") not in _IMPORTING:
            return {}
        wrong: observe.Differences = {}
        epoch, model = self.get("destination_mig_epoch"), self.get("destination_unfinished")
        for stream, can in enumerate(observe.resumable(self.destination.side, self.streams)):
            bundle = self.get("destination_unfinished_bundle")[stream]
            now = bool(model[stream]) and self.get("log_epoch")[bundle] == epoch
            if now != can:
                wrong[f"destination_unfinished[{stream}]"] = (now, can)
        return wrong

    def _wrong_progress(self) -> observe.Differences:
        """How many entries the unfinished calls have done; the host's own first one is none."""
        wrong: observe.Differences = {}
        for made in self.source.unfinished.values():
            at = next((n for n, sent in enumerate(self.log) if sent is made.sent), None)
            if at is not None and self.get("log_entries")[at] != made.slot - 1:
                wrong[f"log_entries[{at}]"] = (self.get("log_entries")[at], made.slot - 1)
        can = observe.resumable(self.destination.side, self.streams)
        progress = self.get("destination_progress")
        for stream, taken in self.destination.importing.items():
            if can[stream] and progress[stream] != taken.slot - 1:
                wrong[f"destination_progress[{stream}]"] = (progress[stream], taken.slot - 1)
        return wrong

    def _wrong_contents(self) -> observe.Differences:
        """A version of the model is one content everywhere."""
        wrong: observe.Differences = {}
        failed = self.text("destination_op_state") == _FAILED_IMPORT
        places = [("source", self.source.side, "source_version")]
        if not failed:
            places.append(("destination", self.destination.side, "destination_version"))
        for name, side, version in places:
            states = side.states(self.pages)
            for page, state in enumerate(states):
                if state == SEPT.position("MAPPED") or (
                    name == "source" and "PENDING" not in SEPT.members[state]
                ):
                    expected = self._content.get((page, self.get(version)[page]))
                    found = observe.digest(side.read_page(page))
                    if found != expected:
                        wrong[f"content of {name} page {page}"] = (expected, found)
        return wrong

    # --- to go back to -------------------------------------------------------------------------

    def _copied(self) -> list[Any]:
        return [value.copy() if hasattr(value, "copy") else value for value in self.state]

    def save(self) -> Callable[..., None]:
        """What puts model and modules back to this moment, as often as wanted.

        Given the one call that was made since, it puts back only the side that the call is of.
        """
        state, content = self._copied(), dict(self._content)
        source, destination = self.source.save(), self.destination.save()
        log, token = list(self.log), self.source.abort_token

        def restore(call: Call | None = None) -> None:
            self.state = state
            self.state, self._content = self._copied(), dict(content)
            on_source = call is not None and self.source.has(call.rows[0])
            if call is None or on_source:
                self.log[:] = log
                source()
            if not on_source:
                destination()
            self.source.abort_token = token

        return restore
