"""``tdxmig verify``: verdicts on all models, and what each guard is for."""

from __future__ import annotations

import difflib
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from tdxmig_model.cli import output
from tdxmig_model.cli.notice import classified
from tdxmig_model.cli.replayed import Replay, replays
from tdxmig_model.conformance.contract import Contract
from tdxmig_model.errors import UsageError
from tdxmig_model.expr import System
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import HARDENED, PROFILES
from tdxmig_model.smt.induction import Query
from tdxmig_model.verify import Mutant, Report, Row, every, listed, mutants, verify, verify_widths
from tdxmig_model.verify.liveness import identifiers, liveness
from tdxmig_model.verify.mutants import Deletion
from tdxmig_model.verify.scope import NOT_STATED
from tdxmig_model.verify.widths import SENTENCES

if TYPE_CHECKING:
    from rich.console import Console

VERDICTS = ("proved", "exhausted", "bounded", "violated", "vacuous", "unknown")
COLOURS = {
    "proved": "green",
    "exhausted": "green",
    "reachable": "green",
    "equivalent": "yellow",
    "contract-only": "green",
    "killed": "green",
    "bounded": "yellow",
}


@click.command(
    name="verify", epilog="Example: tdxmig verify --mutant export_track_start:dirty_count"
)
@click.option(
    "--profile",
    type=click.Choice(PROFILES),
    default=HARDENED,
    show_default=True,
    help="Which guards stand.",
)
@click.option("--property", "properties", multiple=True, metavar="ID", help="Judge only these.")
@click.option(
    "--mutant",
    "deletions",
    multiple=True,
    metavar="STEP:LABEL",
    help="Delete this conjunct of a guard and show the run that it forbids.",
)
@click.option(
    "--mutants",
    "campaign",
    is_flag=True,
    help="Do so for the guards that the properties list, or only those of --property ID.",
)
@click.option(
    "--replay",
    "replaying",
    is_flag=True,
    help="Replay each counterexample on the interpreter and on the software module.",
)
@click.option("--all", "everything", is_flag=True, help="With --mutants: every conjunct there is.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    help="Processes; by default as many as there are cores.",
)
@click.option("--lemmas", is_flag=True, help="List the lemmas too, which carry the proofs.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of z3.")
@output.json_option
@click.pass_context
def command(
    ctx: click.Context,
    profile: str,
    properties: tuple[str, ...],
    deletions: tuple[str, ...],
    campaign: bool,
    replaying: bool,
    everything: bool,
    jobs: int,
    lemmas: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Prove the properties of a profile, for every size, and reach every goal.

    Verdicts: proved (for all sizes), exhausted (all states of the stated sizes), bounded (no
    counterexample up to a depth), violated (with a run), reachable (a goal, with a run), vacuous
    (never says anything), unknown.  Exits 0 if everything is proved, exhausted or reachable, else
    1.  With --mutant a violated property exits 1 as well; with --mutants only a survivor does.

    A deleted guard is killed (by a run), equivalent (everything is proved without it),
    contract-only (equivalent, but the software module refuses a call because of it: a status code
    depends on it) or a survivor (neither a run nor a proof was found).

    A deleted guard is judged in every model that has it.  With --property it is judged by those
    properties; without, by the ones that list it among their guards, or by any if none does.

    A lemma claims nothing: one that is not inductive under a profile is of no help there, and no
    proof rests on it.

    With --replay the counterexample of each violated property is replayed on the interpreter, and
    its calls are made on the software module: that of the profile, and the hardened one, which
    should refuse them or come to no harm.
    """
    if deletions and campaign:
        raise UsageError("--mutant names guards and --mutants takes all: give one of them")
    if everything and not campaign:
        raise UsageError("--all is for --mutants: it deletes every conjunct of every guard")
    if replaying and (deletions or campaign):
        raise UsageError("--replay is for properties, not for guards that are deleted")
    _known_properties(profile, properties)
    if deletions or campaign:
        chosen = _chosen(profile, properties, deletions, everything=everything)
        rows = None if as_json else _MutantRows(profile, chosen)
        found = _mutants(profile, chosen, jobs, seed, rows)
        if rows is None:
            output.emit_json(mutants_as_json(profile, found, named=bool(deletions)))
        else:
            rows.end(found, stories=bool(deletions))
        ctx.exit(1 if _amiss(found, named=bool(deletions)) else 0)
    reports = _reports(profile, properties, jobs, seed)
    again = replays(profile, reports) if replaying else None
    if as_json:
        output.emit_json(reports_as_json(profile, reports, again))
    else:
        _print_reports(profile, reports, named=bool(properties), lemmas=lemmas)
        _print_replays(again)
    ctx.exit(0 if all(r.holds for r in reports) else 1)


def _claimed(profile: str) -> dict[str, list[str]]:
    """The identifiers of the properties of each model under a profile."""
    return {s.name: [p.identifier for p in s.under(profile).properties] for s in SYSTEMS}


def _known_properties(profile: str, properties: Sequence[str]) -> None:
    """UsageError with the nearest name for a property that no model has under the profile."""
    known = [name for names in _claimed(profile).values() for name in names]
    known += [*SENTENCES, *identifiers()]
    for name in properties:
        if name not in known:
            raise UsageError(f"no property {name} under {profile}{_hint(name, known)}")


def _reports(profile: str, properties: Sequence[str], jobs: int, seed: int) -> list[Report]:
    """Judge each model that has one of the properties (all models and properties by default)."""
    claimed = _claimed(profile)
    reports = []
    with output.progress_console().status("verify") as status:
        done: Counter[str] = Counter()

        def tick(model: str, news: Query | Row) -> None:
            if isinstance(news, Query):
                done[model] += 1
                status.update(f"{model}: {done[model]} queries, {news.step}")

        for system in SYSTEMS:
            chosen = [name for name in properties if name in claimed[system.name]]
            if chosen or not properties:
                reports.append(
                    verify(system, profile, chosen or None, seed=seed, jobs=jobs, progress=tick)
                )
        by_lemmas = [name for name in properties if name in SENTENCES]
        if by_lemmas or not properties:
            reports.append(verify_widths(profile, by_lemmas or None, seed=seed, progress=tick))
        paths = [name for name in properties if name in identifiers()]
        if paths or not properties:
            status.update("liveness")
            reports.append(liveness(profile, paths or None))
    return reports


Chosen = list[tuple[Deletion, str | None]]
"""Conjuncts to delete from one model, each with the property that is to break, None for any."""


def _chosen(
    profile: str, properties: Sequence[str], deletions: Sequence[str], *, everything: bool
) -> dict[str, Chosen]:
    """What to delete from each model, by its name.  UsageError if nothing is left to judge."""
    named = [_deletion(text, profile, properties) for text in deletions]
    claimed = _claimed(profile)
    chosen: dict[str, Chosen] = {}
    for system in SYSTEMS:
        wanted = [name for name in properties if name in claimed[system.name]]
        if properties and not wanted:
            continue
        pairs: Chosen = [*listed(system, profile)]
        if deletions or everything:
            mine = [d for d, models in named if system.name in models]
            guards = mine if deletions else [d for d, _ in every(system, profile)]
            pairs = [(d, t) for d in guards for t in (wanted or _first(d, pairs))]
        elif wanted:
            pairs = [(d, t) for d, t in pairs if t in wanted]
        chosen[system.name] = pairs
    judged = {d for pairs in chosen.values() for d, _ in pairs}
    for deletion, models in named:
        if deletion not in judged:
            of = ", ".join(properties)
            raise UsageError(
                f"{':'.join(deletion)} is of the {', '.join(models)} model, which has no {of}"
            )
    if not judged:
        raise UsageError(
            f"{', '.join(properties)} list no guards to delete; name one with --mutant STEP:LABEL, "
            "or add --all"
        )
    return chosen


def _first(deletion: Deletion, pairs: Chosen) -> list[str | None]:
    """The first property that lists a conjunct, or any property if none does."""
    return [target for one, target in pairs if one == deletion][:1] or [None]


def _mutants(
    profile: str,
    chosen: Mapping[str, Chosen],
    jobs: int,
    seed: int,
    rows: _MutantRows | None,
) -> list[Mutant]:
    """Judge the chosen deletions; each is told as soon as it is known."""
    found: list[Mutant] = []
    total = sum(map(len, chosen.values()))
    contract = Contract(profile, total)
    with output.progress_console().status(f"delete guards: 0 of {total}") as status:
        done = 0

        def tick(mutant: Mutant) -> None:
            nonlocal done
            done += 1
            status.update(f"delete guards: {done} of {total}")
            if rows is not None:
                rows.row(mutant)

        for system in SYSTEMS:
            wanted = chosen.get(system.name, [])
            pairs = _undecided(system, wanted, found)
            total -= len(wanted) - len(pairs)
            if pairs:
                found += mutants(
                    system,
                    profile,
                    pairs,
                    seed=seed,
                    jobs=jobs,
                    progress=tick,
                    contract=contract,
                )
    return found


def _amiss(found: Sequence[Mutant], *, named: bool) -> bool:
    """Whether a guard survived in every model that it was deleted from; if named, or was killed."""
    killed = {m.deletion for m in found if m.outcome == "killed"}
    survived = [m for m in found if m.outcome == "survivor"]
    return (named and bool(killed)) or any(m.target or m.deletion not in killed for m in survived)


def _undecided(system: System, pairs: Chosen, found: Sequence[Mutant]) -> Chosen:
    """What is left to judge: not what the smaller model has shown to be needed already.

    A run of the smaller model is one of the larger.  That a property lists the conjunct is judged
    for that property.
    """
    if system.base is None:
        return pairs
    killed = {m.deletion for m in found if m.model == system.base.name and m.outcome == "killed"}
    return [(d, target) for d, target in pairs if target is not None or d not in killed]


def _deletion(
    text: str, profile: str, properties: Sequence[str] = ()
) -> tuple[Deletion, list[str]]:
    """What STEP:LABEL names, and the models to judge it in; UsageError with the nearest name.

    A model has the rows of the one that it is superposed on.  If no property is named these are the
    models whose properties list the conjunct, or else the first one that has it.
    """
    step, _, label = text.partition(":")
    having = _models_by_guard(profile)
    if text not in having:
        raise UsageError(f"no guard conjunct {text} under {profile}{_hint(text, list(having))}")
    models = having[text]
    if not properties:
        listing = [m for m in models if (step, label) in [d for d, _ in listed(m, profile)]]
        models = listing or models[:1]
    return (step, label), [m.name for m in models]


def _models_by_guard(profile: str) -> dict[str, list[System]]:
    """The models that have each guard conjunct, smaller ones first."""
    having: dict[str, list[System]] = {}
    for model in SYSTEMS:
        for step, label in (d for d, _ in every(model, profile)):
            having.setdefault(f"{step}:{label}", []).append(model)
    return having


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# What is printed.


def reports_as_json(
    profile: str, reports: Sequence[Report], again: Sequence[Replay] | None = None
) -> dict[str, object]:
    """The object of ``verify --json``; with ``--replay`` it has "replays".

    An id stands once for each model.  Lemmas are apart from what is claimed, and not counted.
    """
    rows = [(r.system, row) for r in reports for row in r.rows]
    claimed = [(model, row) for model, row in rows if row.level != "lemma"]
    verdicts: Counter[str] = Counter(row.verdict for _, row in claimed)
    return {
        "ok": all(r.holds for r in reports),
        "profile": profile,
        "properties": [{"model": model, **row.as_json()} for model, row in claimed],
        "lemmas": [{"model": m, **row.as_json()} for m, row in rows if row.level == "lemma"],
        "goals": [{"model": r.system, **row.as_json()} for r in reports for row in r.goals],
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        "dead_steps": [{"model": r.system, "step": step} for r in reports for step in r.dead_steps],
        "queries": sum(r.queries for r in reports),
        "ms": round(sum(r.ms for r in reports), 1),
        "assumptions": [
            {"text": text, "models": models} for text, models in _assumptions(reports).items()
        ],
        "not_stated": [p.as_json() for p in NOT_STATED],
        **({} if again is None else {"replays": [r.as_json() for r in again]}),
    }


def _assumptions(reports: Sequence[Report]) -> dict[str, list[str]]:
    """Each assumption, with the models whose verdicts rest on it."""
    found: dict[str, list[str]] = {}
    for report in reports:
        for text in report.assumptions:
            found.setdefault(text, []).append(report.system)
    return found


def mutants_as_json(profile: str, found: Sequence[Mutant], *, named: bool) -> dict[str, object]:
    """The object of ``verify --mutant --json`` and ``verify --mutants --json``."""
    outcomes = Counter(m.outcome for m in found)
    verdicts: Counter[str] = Counter(verdict for m in found for _, verdict in m.verdicts)
    bad = ("killed", "survivor") if named else ("survivor",)
    return {
        "ok": not any(m.outcome in bad for m in found),
        "profile": profile,
        "properties": [row for m in found for row in m.properties_as_json()],
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        "mutants": [m.as_json() for m in found],
        "killed": outcomes["killed"],
        "equivalent": outcomes["equivalent"],
        "contract_only": outcomes["contract-only"],
        "survivors": outcomes["survivor"],
    }


def _coloured(word: str) -> str:
    return f"[{COLOURS.get(word, 'red')}]{word}[/]"


def _print_reports(profile: str, reports: Sequence[Report], *, named: bool, lemmas: bool) -> None:
    console = output.console()
    for report in reports:
        _print_table(console, profile, report, lemmas=lemmas)
        carried = [r for r in report.rows if r.level == "lemma"]
        proved = f"{sum(r.holds for r in carried)} of {len(carried)} lemmas proved; "
        console.print(
            f"{proved if carried else ''}{report.queries} queries, "
            f"{report.fallbacks} by model-based instantiation; {report.ms / 1000:.1f} s"
        )
        idle = [r.identifier for r in carried if not r.claims]
        if idle:
            console.print(f"not inductive under {profile}, and of no use to it: {', '.join(idle)}")
        for step in report.dead_steps:
            console.print(f"[red]never possible:[/] {step}")
        for row in (*report.rows, *report.goals):
            if row.story is not None:
                console.print(f"\n{row.identifier} is violated:", style="red")
                click.echo(row.story.text(console.width))
            if row.kind:
                click.echo(classified(row.identifier, row.removed_by))
        console.print("Assumed:", *(f"\n  {text}" for text in report.assumptions))
    if not named:
        console.print(_not_stated_text())


def _print_table(console: Console, profile: str, report: Report, *, lemmas: bool) -> None:
    """The verdicts on one model; of its lemmas those that were asked for, or that are amiss."""
    from rich.table import Table

    title = f"{report.system} model, profile {profile}"
    table = Table("id", "verdict", "method", "depth", "ms", "what it says", title=title)
    shown = [r for r in report.rows if r.level != "lemma" or lemmas or (r.claims and not r.holds)]
    for row in (*shown, *report.goals):
        says = row.sentence + (f" ({row.detail})" if row.detail else "")
        word = _coloured(row.verdict) if row.claims else "[yellow]no verdict[/]"
        depth = "" if row.depth is None else str(row.depth)
        table.add_row(row.identifier, word, row.method, depth, f"{row.ms:.0f}", says)
    console.print(table)


def _print_replays(again: Sequence[Replay] | None) -> None:
    if again is None:
        return
    for one in again:
        click.echo(f"\n{one.text()}")
    if not again:
        click.echo("\nNothing is violated, so there is nothing to replay.")


def _not_stated_text() -> str:
    """One line for each reason, with the properties that are not stated because of it."""
    by_reason: dict[str, list[str]] = {}
    for claim in NOT_STATED:
        by_reason.setdefault(claim.reason, []).append(claim.identifier)
    lines = (f"  {', '.join(names)}: {reason}" for reason, names in by_reason.items())
    return "\n".join(["Neither proved nor refuted, because the models do not state it:", *lines])


class _MutantRows:
    """The table of `verify --mutants`, a row at a time: a campaign takes minutes."""

    def __init__(self, profile: str, chosen: Mapping[str, Chosen]) -> None:
        guards = [f"{step}:{label}" for pairs in chosen.values() for (step, label), _ in pairs]
        self._width = max(map(len, guards))
        self._models = max(map(len, ("model", *chosen)))
        self._told: list[Mutant] = []
        click.echo(f"up to {len(guards)} deletions under profile {profile}")
        self._line("model", "guard", "of", "outcome", "breaks", "depth", "ms")

    def _line(
        self, model: str, guard: str, of: str, outcome: str, breaks: str, depth: str, ms: str
    ) -> None:
        colour = COLOURS.get(outcome, None if outcome == "outcome" else "red")
        padded = click.style(f"{outcome:13}", fg=colour)
        row = f"{model:{self._models}}  {guard:{self._width}}  {of:6} {padded} {breaks:6}"
        click.echo(f"{row} {depth:>5} {ms:>8}".rstrip())

    def row(self, m: Mutant) -> None:
        """Print one row."""
        self._told.append(m)
        depth = "" if m.depth is None else str(m.depth)
        guard, ms = f"{m.step}:{m.label}", f"{m.ms:.0f}"
        self._line(m.model, guard, m.target or "", m.outcome, m.broken or "", depth, ms)

    def end(self, found: Sequence[Mutant], *, stories: bool) -> None:
        """Print what is known only after the last row, and with `stories` each counterexample."""
        for told, m in zip(self._told, found, strict=True):
            if told.outcome != m.outcome:
                click.echo(f"{m.step}:{m.label} is {m.outcome} after all: {m.method}")
        width = shutil.get_terminal_size().columns
        for m in found:
            if stories and m.story is not None:
                click.echo(f"\nWithout {m.label}, {m.step} leads to:")
                click.echo(m.story.text(width))
            elif stories:
                click.echo(f"\n{m.step}:{m.label}: {m.outcome}, {m.method}")
