"""What a supervised run came to, as one object, and in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from tdxmig_model.supervisor.child import Probe, SideReport


@dataclass(frozen=True, slots=True)
class TraceVerdict:
    """What the model says about the merged traces of both sides."""

    judged: bool
    accepted: bool
    steps: int = 0
    reason: str = ""

    def as_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class End:
    """How one side ended, from its report, or from what is known of a process that left none."""

    side: str
    report: SideReport | None
    gone: str = ""
    migrated: bool = False
    """Its session ended with the TD at the destination, whatever became of its process then."""

    @property
    def runnable(self) -> bool:
        """Whether this side can run the TD."""
        return self.report is not None and self.report.outcome.runnable

    @property
    def op_state(self) -> str | None:
        """OP_STATE at the end; None if the TD is gone with its process."""
        return None if self.report is None else self.report.outcome.op_state

    @property
    def text(self) -> str:
        """As part of a sentence."""
        if self.report is None:
            return f"the {self.side} is gone ({self.gone})"
        return f"the {self.side} is in {self.op_state}"


def explain(source: End, destination: End) -> str:
    """The end of a run in one sentence: who can run the TD, who can not, and why."""
    if source.runnable and destination.runnable:
        return f"BOTH sides can run the TD, which must never be: {source.text}, {destination.text}."
    if destination.runnable:
        return f"The destination runs the TD; {source.text}, and the TD never runs there again."
    if source.runnable:
        how = ", taken back with the abort token of the destination"
        token = how if took_back_with_token(source) else ""
        return f"The source runs the TD{token}; {destination.text}, {_why_not(destination)}."
    if source.migrated or destination.migrated:
        return (
            f"No side can run the TD: the destination had taken it over, {destination.text}, and "
            f"{source.text}."
        )
    return f"No side can run the TD: {_why_none(source, destination)}."


def took_back_with_token(source: End) -> bool:
    """Whether the source had given its start token away and an abort token brought the TD back."""
    return source.report is not None and "abort_with_token" in source.report.outcome.events


def _why_not(destination: End) -> str:
    if destination.report is None:
        return "and what it had imported with it"
    if destination.op_state == "UNINITIALIZED":
        return "where nothing has been imported"
    return "which it can never leave, so what it had imported never runs"


def _why_none(source: End, destination: End) -> str:
    if source.op_state == "POST_EXPORT":
        token = destination.report is not None and destination.report.outcome.abort_token
        left = (
            "the abort token that the destination made lets the source take it back"
            if token
            else "nobody is left who could make the abort token that would let the source take it "
            "back, so what remains is to destroy it"
        )
        return (
            f"the source gave its start token away and stays in POST_EXPORT, {destination.text}, "
            f"and {left}"
        )
    if source.report is None:
        return (
            f"{source.text} and the TD with it; {destination.text}{_about_the_token(destination)}"
        )
    return f"{source.text} and {destination.text}"


def _about_the_token(destination: End) -> str:
    """Whether the destination had a start token, where its report says."""
    if destination.report is None:
        return ""
    if "import_start_token" in destination.report.outcome.events:
        return " and gave up after it had the start token"
    return " and never got a start token"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The result of one run; `as_json` is the object that ``run --json`` prints.

    `ok`: everything that was asked for holds.  Without a requested stop that is: the TD migrated,
    its memory and vCPUs are equal, the source refuses to run it, the destination runs it, and the
    model accepts both traces.  With one: the stop happened, the source alone can run the TD, and
    the model accepts both traces; a TD that migrated in spite of it is not what was asked for.

    `ending` is migrated, aborted (one side has the TD, the migration was given up), undecided (the
    start token is out and nothing came back) or lost (the TD is gone with its process).

    `iterations` has the epochs with memory one by one: pages sent, pages left for the next, and how
    long the TD would have to be paused for those at that speed.  In post-copy `pages_after_start`
    followed the start token, and the guest waited for `pages_requested` of them.
    """

    ok: bool
    ending: str
    sentence: str
    cause: str
    profile: str
    transport: str
    pages: int
    pages_sent: int
    bytes: int
    epochs: int
    bundles: int
    streams: int
    workers: int
    iterations: tuple[Mapping[str, object], ...]
    pages_after_start: int
    pages_requested: int
    vcpus: int
    downtime_ms: float | None
    total_ms: float | None
    throughput_mib_s: float | None
    memory_equal: bool | None
    vcpus_equal: bool | None
    source_state: str | None
    destination_state: str | None
    source_runnable: bool
    destination_runnable: bool
    abort_token_used: bool
    refusals: tuple[Probe, ...]
    guest_instructions: int
    steps_checked: int
    interrupted: bool
    trace: Mapping[str, object] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)
