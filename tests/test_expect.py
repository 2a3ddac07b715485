"""Do the models still have the states, and the violations, that specs/expect.json says?"""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from expectations import FILE, MODELS, classified, load, searched, seen, verdicts, written

from tdxmig_model.model.words import HARDENED, PROFILES

DATA = load()
SEARCHES = DATA["searches"]
VIOLATIONS = DATA["violations"]
REPAIRS = {
    repair["id"]: repair
    for repair in tomllib.loads((FILE.parent / "repairs.toml").read_text())["repair"]
}
MANY = 150_000
"""States that take more than five seconds."""


def case(entry: dict[str, Any]) -> Any:
    marks = [pytest.mark.slow] if entry["states"] > MANY else []
    return pytest.param(entry, id=f"{entry['model']}-{entry['profile']}", marks=marks)


@pytest.mark.parametrize("entry", [case(entry) for entry in SEARCHES])
def test_a_search_sees_what_is_expected(entry: dict[str, Any]) -> None:
    found = seen(searched(entry))
    assert found == {key: entry[key] for key in found}


def test_every_model_is_searched_under_every_profile() -> None:
    pairs = [(entry["model"], entry["profile"]) for entry in SEARCHES]
    assert pairs == [(model, profile) for model in MODELS for profile in PROFILES]


def test_a_search_is_complete_or_has_a_limit() -> None:
    for entry in SEARCHES:
        assert entry["complete"] == (entry["limit"] is None)


def test_only_the_published_module_is_violated_and_each_violation_is_classified() -> None:
    for entry in SEARCHES:
        assert not entry["violated"] or entry["profile"] != HARDENED
        assert set(entry["violated"]) <= VIOLATIONS.keys()


def test_a_violation_is_public_with_a_reference_or_said_by_its_id_alone() -> None:
    for identifier, violation in VIOLATIONS.items():
        if violation["kind"] == "public":
            assert violation["repairs"], identifier
            assert all(REPAIRS[repair]["references"] for repair in violation["repairs"])
        else:
            assert violation == {"kind": "unreported"}, identifier


# One or two of each kind, in models that are judged in a second or so.
SAMPLE = ("P4", "P9", "P24", "P31", "P48", "L43", "L44")


def test_verify_classifies_a_sample_as_the_file_does() -> None:
    options = [word for name in SAMPLE for word in ("--property", name)]
    found = classified(verdicts("--jobs", "1", *options))
    assert found == {name: VIOLATIONS[name] for name in SAMPLE}
    assert {violation["kind"] for violation in found.values()} == {"public", "unreported"}


@pytest.mark.slow
def test_verify_finds_and_classifies_just_the_violations_of_the_file() -> None:
    assert classified(verdicts()) == VIOLATIONS


def test_a_property_of_two_models_is_public_only_if_it_is_so_in_both() -> None:
    public = {"id": "P1", "kind": "public", "removed_by": ["R1", "R6"]}
    other = {"id": "P1", "kind": "unreported", "removed_by": ["R6"]}
    held = {"id": "P2", "kind": "", "removed_by": []}
    assert classified([public, held]) == {"P1": {"kind": "public", "repairs": ["R1"]}}
    assert classified([public, other]) == classified([other, public])
    assert classified([public, other]) == {"P1": {"kind": "unreported"}}


def test_the_file_is_written_as_it_is_made() -> None:
    assert FILE.read_text() == written(DATA)
