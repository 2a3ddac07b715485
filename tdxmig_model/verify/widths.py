"""Verdicts on what depends on machine widths: metadata lists and counters, lemma by lemma."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from tdxmig_model.smt import counter_lemmas, parser_lemmas
from tdxmig_model.smt.widths import Lemma, Result, decide
from tdxmig_model.verify.judge import Report, Row, Verdict

WIDTHS = "widths"
SENTENCES = {**parser_lemmas.SENTENCES, **counter_lemmas.SENTENCES}
"""The properties that are stated by lemmas, by the id of the threat model."""
METHOD = "bit-vector lemma"
REPAIRED_BY = {"P24": ("R2",)}
ASSUMPTIONS = (
    "a list is in a page of 4096 bytes, and a field of it has at most 16 elements of 8 bytes",
    "a list, its sequences and their fields are parsed in the order in which they stand",
    *counter_lemmas.ASSUMPTIONS,
)


def stated_lemmas(identifier: str, profile: str) -> list[Lemma]:
    """The lemmas that say a property together; none for a property that is stated otherwise."""
    every = parser_lemmas.lemmas(profile) + counter_lemmas.lemmas(profile)
    return [lemma for lemma in every if lemma.claims == identifier]


def verify_widths(
    profile: str,
    properties: Iterable[str] | None = None,
    *,
    seed: int = 0,
    progress: Callable[[str, Row], None] | None = None,
) -> Report:
    """Judge the lemmas of a profile, and what they say together (all of it by default)."""
    begun = time.perf_counter()
    wanted = tuple(SENTENCES) if properties is None else tuple(properties)
    judged = [_judged(x, seed) for name in wanted for x in stated_lemmas(name, profile)]
    rows = [_together(name, [j for j in judged if j[0].claims == name]) for name in wanted]
    rows += [_row(result, ms) for result, ms in judged]
    if progress is not None:
        for row in rows:
            progress(WIDTHS, row)
    elapsed = (time.perf_counter() - begun) * 1000
    return Report(WIDTHS, profile, tuple(rows), (), (), ASSUMPTIONS, len(judged), 0, elapsed)


def _judged(lemma: Lemma, seed: int) -> tuple[Result, float]:
    begun = time.perf_counter()
    result = decide(lemma, seed)
    return result, (time.perf_counter() - begun) * 1000


def _row(result: Result, ms: float) -> Row:
    return Row(
        result.identifier,
        result.sentence,
        "lemma",
        result.verdict,
        METHOD,
        None,
        ms,
        detail=_values(result),
    )


def _values(result: Result) -> str:
    return ", ".join(f"{name} = {value}" for name, value in result.values.items())


def _together(identifier: str, judged: list[tuple[Result, float]]) -> Row:
    """A property is proved if each of its lemmas is; else the first one that is not tells why."""
    ms = sum(spent for _, spent in judged)
    verdict: Verdict = "proved"
    detail = ""
    for result, _ in judged:
        if result.verdict != "proved":
            verdict = result.verdict
            detail = f"{result.identifier}: {_values(result)}".removesuffix(": ")
            break
    row = Row(identifier, SENTENCES[identifier], "leaf", verdict, METHOD, None, ms, detail=detail)
    return replace(row, removed_by=REPAIRED_BY.get(identifier, ()))
