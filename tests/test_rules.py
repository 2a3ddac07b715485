"""Is what the model claims what was agreed on, and is each repair just where it is said to be?"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tdxmig_model.backend.soft.module import PROFILES as MODULE_PROFILES
from tdxmig_model.expr import Instance, Interpreter, Property, System, initial_state
from tdxmig_model.model.paths import PATHS
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import (
    HARDENED,
    PROFILES,
    PUBLIC_REPAIRS,
    TDX_1_5_01,
    repaired,
    unrepaired,
    with_only,
)
from tdxmig_model.model.words import (
    REPAIRS as NAMES,
)
from tdxmig_model.smt.bounded import inside
from tdxmig_model.verify import widths
from tdxmig_model.verify.scope import NOT_STATED

REPOSITORY = Path(__file__).resolve().parent.parent
SOFT = REPOSITORY / "tdxmig_model" / "backend" / "soft"
_RULES_FILE = tomllib.loads((REPOSITORY / "specs" / "rules.toml").read_text())
RULES = _RULES_FILE["rule"]
_REPAIRS_FILE = tomllib.loads((REPOSITORY / "specs" / "repairs.toml").read_text())
REPAIRS = _REPAIRS_FILE["repair"]
DEMONSTRATIONS = _REPAIRS_FILE["demonstration"]
CLAIMED: dict[str, tuple[System, Property]] = {
    claimed.identifier: (system, claimed)
    for system in SYSTEMS
    for claimed in system.properties
    if claimed.level != "lemma"
}
SENTENCES = {
    **{identifier: claimed.sentence for identifier, (_, claimed) in CLAIMED.items()},
    **widths.SENTENCES,
}
"""Of everything that is stated: by a model, or by lemmas about machine widths."""


# --- rules ---------------------------------------------------------------------------------------


def test_every_rule_is_a_property_and_every_property_a_rule() -> None:
    ids = [rule["id"] for rule in RULES]
    assert len(set(ids)) == len(ids)
    assert set(ids) == set(CLAIMED)


def test_every_property_of_the_threat_model_is_stated_or_listed_with_the_reason() -> None:
    listed_ids = [entry["id"] for entry in _RULES_FILE["not_stated"]]
    stated = [*CLAIMED, *widths.SENTENCES, *(path.identifier for path in PATHS)]
    assert not set(listed_ids) & set(stated)
    numbered = {name for name in (*listed_ids, *stated) if name.startswith("P")}
    assert numbered == {f"P{number}" for number in range(1, 51)}


def test_what_is_not_stated_is_told_as_it_is_listed() -> None:
    told = [claim.as_json() for claim in NOT_STATED]
    assert told == _RULES_FILE["not_stated"]
    for claim in told:
        assert claim["sentence"].endswith(".")
        assert len(claim["reason"]) > 40


def test_widths_state_what_no_model_does() -> None:
    assert set(widths.SENTENCES) - CLAIMED.keys() == {"P24", "P26", "P49"}


def test_lemmas_and_rules_are_told_apart_by_their_level() -> None:
    levels = {claimed.level for system in SYSTEMS for claimed in system.properties}
    assert levels == {"lemma", "leaf", "lifecycle"}
    for system, claimed in CLAIMED.values():
        assert (claimed.level == "lifecycle") == (system.name == "lifecycle")
    assert sum(len(system.properties) for system in SYSTEMS) > len(CLAIMED)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["id"]))
def test_a_rule_is_claimed_as_it_was_frozen(rule: dict[str, str]) -> None:
    _, claimed = CLAIMED[rule["id"]]
    assert claimed.level == rule["level"]
    assert claimed.sentence == rule["sentence"]
    assert str(claimed.formula) == rule["formula"]


@pytest.mark.parametrize("identifier", CLAIMED)
def test_a_rule_names_the_guards_that_enforce_it(identifier: str) -> None:
    system, claimed = CLAIMED[identifier]
    assert claimed.guards
    for step, label in claimed.guards:
        assert system.step(step).needs(label).label == label


@pytest.mark.parametrize("identifier", CLAIMED)
def test_a_rule_has_a_witness_that_does_not_hold_at_the_start(identifier: str) -> None:
    system, claimed = CLAIMED[identifier]
    assert claimed.witness is not None
    instance = Instance.small(system, {i.name: 4 for i in system.indexes()})
    start = initial_state(system, instance)
    witness = inside(claimed.witness, instance)
    assert not Interpreter(system, instance).value(witness, start, {})


def test_ids_say_where_a_rule_comes_from() -> None:
    for identifier, (system, _) in CLAIMED.items():
        assert identifier[0] in ("O" if system.name == "lifecycle" else "PL")
        assert identifier[1:].isdecimal()


# --- repairs -------------------------------------------------------------------------------------


Places = set[tuple[str, str]]


def only_in(*profiles: str) -> tuple[Places, Places, Places]:
    """The conjuncts, the updates and the rows that these profiles have and no other."""
    conjuncts, updates, rows = set(), set(), set()
    wanted = frozenset(profiles)
    for system in SYSTEMS:
        for step in system.steps:
            conjuncts |= {(step.name, n.label) for n in step.when if n.profiles == wanted}
            updates |= {(step.name, a.target.name) for a in step.then if a.profiles == wanted}
            rows |= {(system.name, step.name) for _ in (1,) if step.profiles == wanted}
    return conjuncts, updates, rows


def listed(repair: dict[str, Any], key: str) -> Places:
    return {(step, name) for step, name in repair.get(key, ())}


def test_repairs_are_numbered_from_1() -> None:
    assert [repair["id"] for repair in REPAIRS] == [f"R{n + 1}" for n in range(len(REPAIRS))]


def test_the_model_knows_which_repairs_are_public() -> None:
    assert {repair["id"] for repair in REPAIRS if repair["references"]} == PUBLIC_REPAIRS


def test_each_repair_has_a_profile_of_its_own() -> None:
    for name in NAMES:
        having = [r for r in NAMES if with_only(name) in repaired(r)]
        assert having == [name]


def test_the_profiles_differ_in_the_listed_places_and_nowhere_else() -> None:
    for repair in REPAIRS:
        conjuncts, updates, rows = only_in(*repaired(repair["id"]))
        assert listed(repair, "conjuncts") == conjuncts
        assert listed(repair, "updates") == updates
        assert listed(repair, "rows") == rows
        conjuncts, updates, rows = only_in(*unrepaired(repair["id"]))
        assert not conjuncts
        assert listed(repair, "replaces") == updates
        assert listed(repair, "removes") == rows


def test_whatever_depends_on_the_profile_is_a_repair() -> None:
    assert set(PROFILES) == {HARDENED, TDX_1_5_01}
    ids = [repair["id"] for repair in REPAIRS]
    known = {frozenset(f(i)) for i in ids for f in (repaired, unrepaired)} | {None}
    for system in SYSTEMS:
        for claimed in system.properties:
            # A lemma may rest on a repair; what is claimed stands in every profile.
            assert claimed.profiles in (known if claimed.level == "lemma" else {None})
        for step in system.steps:
            assert {step.profiles, *(n.profiles for n in step.when)} <= known
            assert {a.profiles for a in step.then} <= known


def test_a_repair_restores_properties_and_says_which_the_model_states() -> None:
    for repair in REPAIRS:
        assert repair["what"].endswith(".")
        assert repair["restores"]
        for restored in repair["restores"]:
            stated = restored["id"] in SENTENCES
            assert restored["stated"] == stated, f"{repair['id']} restores {restored['id']}"
            if stated:
                assert restored["sentence"] == SENTENCES[restored["id"]]


def functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a module and the methods of its classes, by qualified name."""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield f"{prefix}.{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{prefix}.{node.name}")


def asks_for(node: ast.AST, names: frozenset[str]) -> bool:
    match node:
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in names:
            return True
    return any(asks_for(child, names) for child in ast.iter_child_nodes(node))


def asking_for(*names: str) -> set[str]:
    """Functions of the software module that read an attribute of one of these names."""
    return {
        name
        for path in SOFT.rglob("*.py")
        for name, node in functions(ast.parse(path.read_text()).body, path.stem)
        if asks_for(node, frozenset(names))
    }


def test_the_software_module_asks_for_the_profile_where_a_repair_is() -> None:
    for repair in REPAIRS:
        assert sorted(set(repair["software_module"])) == sorted(repair["software_module"])
    places = {place for repair in REPAIRS for place in repair["software_module"]}
    assert places == asking_for("hardened", "profile", "allowed")


def test_a_repair_says_whether_the_model_has_it() -> None:
    for repair in REPAIRS:
        keys = ("conjuncts", "updates", "replaces", "rows", "removes")
        places = [place for key in keys for place in repair.get(key, ())]
        assert repair["model"] == bool(places), repair["id"]
        assert places or repair["software_module"]


def test_a_demonstration_is_a_profile_of_the_software_module_alone() -> None:
    profiles = {demonstration["profile"] for demonstration in DEMONSTRATIONS}
    assert profiles == set(MODULE_PROFILES) - set(PROFILES)
    places = {place for shown in DEMONSTRATIONS for place in shown["software_module"]}
    assert places == asking_for("demonstration")
