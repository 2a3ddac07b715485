"""Is each guard of the threat model somewhere, and does what is said of it fall without it?"""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
from deletions import (
    BY_NAME,
    DELETIONS,
    PLACES,
    REPOSITORY,
    WIDTHS,
    Place,
    judged,
    without_repair,
    without_update,
)

from tdxmig_model.model.words import HARDENED
from tdxmig_model.smt import counter_lemmas, parser_lemmas
from tdxmig_model.verify.widths import SENTENCES

COUNT = 66
every = pytest.mark.parametrize("entry", DELETIONS, ids=lambda e: e["id"])
everywhere = pytest.mark.parametrize("place", PLACES, ids=lambda p: p.name)

SLOW = ("leaf", "order", "memory")
"""Models whose searches are long; of them only a sample is judged each time."""
SAMPLE = {
    ("M22", "leaf"),
    ("M24", "leaf"),
    ("M33", "leaf"),
    ("M25", "memory"),
}


def long(place: Place) -> bool:
    return place.system in SLOW and (place.deletion, place.system) not in SAMPLE


def test_every_deletion_is_there() -> None:
    assert [entry["id"] for entry in DELETIONS] == [f"M{n + 1}" for n in range(COUNT)]


@every
def test_a_deletion_is_placed_tested_or_has_a_reason(entry: dict[str, Any]) -> None:
    assert re.fullmatch(r"[A-Z].*\.", entry["what"])
    assert all(re.fullmatch(r"P\d+", name) for name in entry["breaks"])
    somewhere = bool(entry.get("places") or entry.get("tests"))
    assert somewhere != bool(entry.get("not_expressible"))


@every
def test_a_deletion_is_shown_by_something(entry: dict[str, Any]) -> None:
    """A run, a proof or a test that fails: to be open everywhere is not enough."""
    known = [p for p in PLACES if p.deletion == entry["id"] and not p.open]
    assert known or entry.get("tests") or entry.get("not_expressible")


@everywhere
def test_a_place_is_there(place: Place) -> None:
    if place.system == WIDTHS:
        assert place.check in {**parser_lemmas.CHECKS, **counter_lemmas.CHECKS}
        assert place.property in SENTENCES
        return
    part = BY_NAME[place.system].under(HARDENED)
    assert part.property(place.property).level != "lemma"
    if place.label:
        assert part.step(place.step).needs(place.label)
    elif place.update:
        assert without_update(place) != part
    else:
        assert without_repair(place) != part
        assert not place.step or without_repair(place).has_step(place.step)
    assert not (place.equivalent and place.open)


def test_no_place_stands_twice() -> None:
    names = [place.name for place in PLACES]
    assert len(set(names)) == len(names)


@every
def test_the_named_tests_exist(entry: dict[str, Any]) -> None:
    for test in entry.get("tests", ()):
        path, _, name = test.partition("::")
        body = ast.parse((REPOSITORY / path).read_text()).body
        assert name in [node.name for node in body if isinstance(node, ast.FunctionDef)], test


@pytest.mark.parametrize(
    "place",
    [pytest.param(p, marks=pytest.mark.slow if long(p) else (), id=p.name) for p in PLACES],
)
def test_a_place_is_judged_as_it_stands(place: Place) -> None:
    assert judged(place) == place.expected
