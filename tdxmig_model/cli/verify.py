"""``tdxmig verify``: verdicts on both models, and what each guard is for."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence

import click

from tdxmig_model.cli import output
from tdxmig_model.errors import UsageError
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import HARDENED, PROFILES
from tdxmig_model.smt.induction import Query
from tdxmig_model.verify import Mutant, Report, Row, every, listed, mutants, verify
from tdxmig_model.verify.mutants import Deletion
from tdxmig_model.verify.scope import not_stated

VERDICTS = ("proved", "exhausted", "bounded", "violated", "vacuous", "unknown")
COLOURS = {
    "proved": "green",
    "exhausted": "green",
    "reachable": "green",
    "equivalent": "yellow",
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
    help="Do so for every conjunct, or for those that --property ID names.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    help="Processes; by default as many as there are cores.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of z3.")
@output.json_option
@click.pass_context
def command(
    ctx: click.Context,
    profile: str,
    properties: tuple[str, ...],
    deletions: tuple[str, ...],
    campaign: bool,
    jobs: int,
    seed: int,
    as_json: bool,
) -> None:
    """Prove the properties of a profile, for every size, and reach every goal.

    Verdicts: proved (for all sizes), exhausted (all states of the stated sizes), bounded (no
    counterexample up to a depth), violated (with a run), reachable (a goal, with a run), vacuous
    (never says anything), unknown.  Exits 0 if everything is proved, exhausted or reachable, else
    1.  With --mutant a violated property exits 1 as well; with --mutants only a survivor does, that
    is, a guard for which neither a run nor a proof of its redundance was found.
    """
    if deletions and campaign:
        raise UsageError("--mutant names guards and --mutants takes all: give one of them")
    if deletions or campaign:
        found = _mutants(profile, properties, deletions, jobs, seed)
        if as_json:
            output.emit_json(mutants_as_json(profile, found, named=bool(deletions)))
        else:
            _print_mutants(profile, found, stories=bool(deletions))
        bad = ("killed", "survivor") if deletions else ("survivor",)
        ctx.exit(1 if any(m.outcome in bad for m in found) else 0)
    reports = _reports(profile, properties, jobs, seed)
    if as_json:
        output.emit_json(reports_as_json(profile, reports))
    else:
        _print_reports(profile, reports)
    ctx.exit(0 if all(r.holds for r in reports) else 1)


def _reports(profile: str, properties: Sequence[str], jobs: int, seed: int) -> list[Report]:
    """Judge each model that has one of the properties (all models and properties by default)."""
    claimed = {s.name: [p.identifier for p in s.under(profile).properties] for s in SYSTEMS}
    for name in properties:
        if not any(name in known for known in claimed.values()):
            every = [p for known in claimed.values() for p in known]
            raise UsageError(f"no property {name} under {profile}{_hint(name, every)}")
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
    return reports


def _mutants(
    profile: str,
    properties: Sequence[str],
    deletions: Sequence[str],
    jobs: int,
    seed: int,
) -> list[Mutant]:
    """Judge the named deletions, or those that (chosen) properties list as their guards."""
    named = [_deletion(text, profile) for text in deletions]
    found: list[Mutant] = []
    with output.progress_console().status("delete guards") as status:

        def tick(mutant: Mutant) -> None:
            status.update(f"{mutant.step}:{mutant.label} {mutant.outcome}")

        for system in SYSTEMS:
            named_guards = listed(system, profile)
            chosen: list[tuple[Deletion, str | None]]
            if deletions:
                targets = dict(reversed(named_guards))
                mine = [d for model, d in named if model == system.name]
                chosen = [(d, targets.get(d)) for d in mine]
            else:
                targets = dict(reversed(named_guards))
                everything = [(d, targets.get(d)) for d, _ in every(system, profile)]
                chosen = [(d, t) for d, t in named_guards if t in properties]
                chosen = chosen if properties else everything
            if chosen:
                found += mutants(system, profile, chosen, seed=seed, jobs=jobs, progress=tick)
    return found


def _deletion(text: str, profile: str) -> tuple[str, Deletion]:
    """The model, step and label that STEP:LABEL names; UsageError with the nearest name."""
    step, _, label = text.partition(":")
    known = {
        f"{s.name}:{n.label}": model.name
        for model in SYSTEMS
        for s in model.under(profile).steps
        for n in s.when
    }
    if text not in known:
        raise UsageError(f"no guard conjunct {text} under {profile}{_hint(text, list(known))}")
    return known[text], (step, label)


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# What is printed.


def reports_as_json(profile: str, reports: Sequence[Report]) -> dict[str, object]:
    """The object of ``verify --json``."""
    rows = [(r.system, row) for r in reports for row in r.rows]
    verdicts: Counter[str] = Counter(row.verdict for _, row in rows)
    return {
        "ok": all(r.holds for r in reports),
        "profile": profile,
        "properties": [{"model": model, **row.as_json()} for model, row in rows],
        "goals": [{"model": r.system, **row.as_json()} for r in reports for row in r.goals],
        **{verdict: verdicts[verdict] for verdict in VERDICTS},
        "dead_steps": [step for r in reports for step in r.dead_steps],
        "queries": sum(r.queries for r in reports),
        "ms": round(sum(r.ms for r in reports), 1),
        "assumptions": [text for r in reports for text in r.assumptions],
        "not_stated": [p.as_json() for p in not_stated(_stated())],
    }


def mutants_as_json(profile: str, found: Sequence[Mutant], *, named: bool) -> dict[str, object]:
    """The object of ``verify --mutant --json`` and ``verify --mutants --json``."""
    outcomes = Counter(m.outcome for m in found)
    bad = ("killed", "survivor") if named else ("survivor",)
    return {
        "ok": not any(m.outcome in bad for m in found),
        "profile": profile,
        "mutants": [m.as_json() for m in found],
        "killed": outcomes["killed"],
        "equivalent": outcomes["equivalent"],
        "survivors": outcomes["survivor"],
    }


def _stated() -> list[str]:
    return [p.identifier for s in SYSTEMS for p in s.properties]


def _coloured(word: str) -> str:
    return f"[{COLOURS.get(word, 'red')}]{word}[/]"


def _print_reports(profile: str, reports: Sequence[Report]) -> None:
    from rich.table import Table

    console = output.console()
    for report in reports:
        table = Table(
            "id",
            "verdict",
            "depth",
            "ms",
            "what it says",
            title=f"{report.system} model, profile {profile}",
        )
        lemmas = [r for r in report.rows if r.level == "lemma"]
        shown = [r for r in report.rows if r.level != "lemma" or not r.holds]
        for row in (*shown, *report.goals):
            depth = "" if row.depth is None else str(row.depth)
            says = row.sentence + (f" ({row.detail})" if row.detail else "")
            if not row.holds:
                says += f" [dim]{row.method}[/]"
            table.add_row(row.identifier, _coloured(row.verdict), depth, f"{row.ms:.0f}", says)
        console.print(table)
        good = sum(r.holds for r in lemmas)
        console.print(
            f"{good} of {len(lemmas)} lemmas proved; {report.queries} queries, "
            f"{report.fallbacks} by model-based instantiation; {report.ms / 1000:.1f} s"
        )
        for step in report.dead_steps:
            console.print(f"[red]never possible:[/] {step}")
        for row in (*report.rows, *report.goals):
            if row.story is not None:
                console.print(f"\n{row.identifier} is violated:", style="red")
                click.echo(row.story.text(console.width))
        console.print("Assumed:", *(f"\n  {text}" for text in report.assumptions))


def _print_mutants(profile: str, found: Sequence[Mutant], *, stories: bool) -> None:
    from rich.table import Table

    console = output.console()
    table = Table(
        "guard", "of", "outcome", "breaks", "depth", "ms", title=f"guards of profile {profile}"
    )
    for m in found:
        table.add_row(
            f"{m.step}:{m.label}",
            m.target or "",
            _coloured(m.outcome),
            m.broken or "",
            "" if m.depth is None else str(m.depth),
            f"{m.ms:.0f}",
        )
    console.print(table)
    for m in found:
        if stories and m.story is not None:
            console.print(f"\nWithout {m.label}, {m.step} leads to:")
            click.echo(m.story.text(console.width))
        elif stories:
            console.print(f"\n{m.step}:{m.label}: {m.outcome}, {m.method}")
