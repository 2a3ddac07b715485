"""What ``tdxmig show`` can look up: everything that has a name, as plain JSON values.

Names are those of the model, of the TDX module's leaves and of its status codes.  One name may
stand for several things, such as a phase of both sides; all of them are found.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from tdxmig_model import names
from tdxmig_model.backend.soft import status
from tdxmig_model.errors import UsageError
from tdxmig_model.expr import Assign, EnumType, Goal, Need, Property, Step, System, Variable
from tdxmig_model.model.control_properties import CONTROL
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.paths import PATHS, Path
from tdxmig_model.model.systems import SYSTEMS as ALL_SYSTEMS
from tdxmig_model.model.words import HARDENED, PROFILES
from tdxmig_model.project import Edge, edges
from tdxmig_model.verify import widths
from tdxmig_model.verify.scope import NOT_STATED

Item = dict[str, Any]

SYSTEMS = (LEAF, LIFECYCLE, *(s for s in ALL_SYSTEMS if s not in (LEAF, LIFECYCLE)))
# Model, the variable that holds the state of a side, and the side.
STATES = (
    (LEAF, "source_op_state", "source"),
    (LEAF, "destination_op_state", "destination"),
    (LIFECYCLE, "source_phase", "source"),
    (LIFECYCLE, "destination_phase", "destination"),
)
_KINDS = {
    LEAF.name: names.Kind.LEAF,
    LIFECYCLE.name: names.Kind.LIFECYCLE,
    CONTROL.name: names.Kind.LEAF,
}


def find(name: str, profile: str = HARDENED) -> list[Item]:
    """Everything of that name; UsageError with the nearest names if there is nothing.

    States are shown under one profile; the rest shows in which profiles its parts stand.
    """
    lookups = (_steps, _properties, _goals, _states, _leaves, _profiles, _statuses)
    found = [item for look in lookups for item in look(name, profile)]
    if found:
        return found
    known = [word for words in listing().values() for word in words]
    by_lower = {word.lower(): word for word in known}
    inside = [word for word in by_lower if name.lower() in word]
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    near = list(dict.fromkeys([*inside, *close]))[:3]
    hint = f"did you mean {' or '.join(by_lower[word] for word in near)}? " if near else ""
    raise UsageError(f"nothing is called {name!r}; {hint}tdxmig show lists all names")


def listing() -> dict[str, list[str]]:
    """Every name there is, by what it names."""
    lists = {f"{s.name} steps": [step.name for step in s.steps] for s in SYSTEMS}
    for system in SYSTEMS:
        claimed = system.properties
        lists[f"{system.name} properties"] = [p.identifier for p in claimed if p.level != "lemma"]
        lists[f"{system.name} lemmas"] = [p.identifier for p in claimed if p.level == "lemma"]
        lists[f"{system.name} goals"] = [g.identifier for g in system.goals]
    lists[f"{widths.WIDTHS} properties"] = list(widths.SENTENCES)
    lists["liveness properties"] = [path.identifier for path in PATHS]
    lists["properties that are not stated"] = [claim.identifier for claim in NOT_STATED]
    lists["OP_STATEs"] = list(_members(*STATES[0][:2]))
    lists["source phases"] = list(_members(*STATES[2][:2]))
    lists["destination phases"] = list(_members(*STATES[3][:2]))
    lists["leaves"] = list(dict.fromkeys(row.leaf.name for row in names.NAMES if row.leaf))
    lists["profiles"] = list(PROFILES)
    lists["status codes"] = [code.name for code in status.Status]
    return lists


# --- steps ---------------------------------------------------------------------------------------


def name_row(system: System, step: Step) -> names.Name | None:
    """The row of the name table that a step belongs to.

    A step is in the table by its own name or by that of the call that it is a part of, or it is a
    variant of a step that is (export_state_immutable_other of export_state_immutable).  The models
    of one concern each have steps of their own.
    """
    if system.name not in _KINDS:
        return None
    own = step.part_of or step.name.removeprefix(f"{step.actor}_")
    rows = names.rows(names.Side(step.actor), _KINDS[system.name])
    fitting = [row for row in rows if own == row.step or own.startswith(f"{row.step}_")]
    return max(fitting, key=lambda row: len(row.step), default=None)


def _steps(name: str, _profile: str) -> Iterator[Item]:
    for system in SYSTEMS:
        for step in system.steps:
            if system.base is not None and system.base.has_step(step.name):
                continue  # the smaller model shows it
            row = name_row(system, step)
            own = step.name.removeprefix(f"{step.actor}_")
            called = {step.name, own} | ({row.step} if row is not None else set())
            if name in called or name in {f"{step.actor}:{word}" for word in called}:
                yield step_item(system, step)


def step_item(system: System, step: Step) -> Item:
    """One row of the model with everything about it."""
    row = name_row(system, step)
    return {
        "kind": "step",
        "name": step.name,
        "model": system.name,
        "actor": step.actor,
        "params": [{"name": p.name, "type": p.kind.name} for p in step.params],
        "when": [_need(n) for n in step.when],
        "then": [_assign(a) for a in step.then],
        "why": step.why,
        "cite": step.cite,
        "profiles": _in(step.profiles),
        "part_of": step.part_of or None,
        "leaf": _leaf(row.leaf) if row and row.leaf else None,
        "kvm": row.kvm.name if row and row.kvm else None,
        "bundle": row.bundle if row else None,
        "seed": list(row.seed) if row else [],
    }


def _need(need: Need) -> Item:
    return {"label": need.label, "formula": str(need.formula), "profiles": _in(need.profiles)}


def _assign(assign: Assign) -> Item:
    shown = {"update": str(assign), "profiles": _in(assign.profiles)}
    return {**shown, "ghost": assign.target.ghost}


def _in(profiles: frozenset[str] | None) -> list[str] | None:
    return None if profiles is None else sorted(profiles & set(PROFILES))


def _leaf(leaf: names.Leaf) -> Item:
    return {"name": leaf.name, "number": leaf.number, "call": leaf.call.value}


# --- properties and goals ------------------------------------------------------------------------


def _properties(name: str, _profile: str) -> Iterator[Item]:
    for system in SYSTEMS:
        for claimed in system.properties:
            if claimed.identifier.lower() == name.lower():
                yield _property(system, claimed)
    for identifier, sentence in widths.SENTENCES.items():
        if identifier.lower() == name.lower():
            yield _property_by_lemmas(identifier, sentence)
    for path in PATHS:
        if path.identifier.lower() == name.lower():
            yield _property_of_paths(path)
    for claim in NOT_STATED:
        if claim.identifier.lower() == name.lower():
            yield {
                "kind": "not stated",
                "name": claim.identifier,
                "sentence": claim.sentence,
                "reason": claim.reason,
            }


def _property_of_paths(path: Path) -> Item:
    """What can or must follow a state: the formula says from where, and what is to be reached."""
    word = "must" if path.must else "can"
    return {
        "kind": "property",
        "name": path.identifier,
        "model": "liveness",
        "level": path.level,
        "sentence": path.sentence,
        "formula": f"from ({path.premise}) a state {word} be reached with ({path.goal})",
        "guards": [],
        "witness": None,
        "cite": "",
        "profiles": None,
    }


def _property_by_lemmas(identifier: str, sentence: str) -> Item:
    """A property of machine widths: what its lemmas say is its formula."""
    parts = [f"{x.identifier}: {x.sentence}" for x in widths.stated_lemmas(identifier, HARDENED)]
    return {
        "kind": "property",
        "name": identifier,
        "model": widths.WIDTHS,
        "level": "leaf",
        "sentence": sentence,
        "formula": " ".join(parts),
        "guards": [],
        "witness": None,
        "cite": "",
        "profiles": None,
    }


def _property(system: System, claimed: Property) -> Item:
    return {
        "kind": "property",
        "name": claimed.identifier,
        "model": system.name,
        "level": claimed.level,
        "sentence": claimed.sentence,
        "formula": str(claimed.formula),
        "guards": [
            {"step": step, **_need(system.step(step).needs(label))}
            for step, label in claimed.guards
        ],
        "witness": None if claimed.witness is None else str(claimed.witness),
        "cite": claimed.cite,
        "profiles": _in(claimed.profiles),
    }


def _goals(name: str, _profile: str) -> Iterator[Item]:
    for system in SYSTEMS:
        for goal in system.goals:
            if goal.identifier.lower() == name.lower():
                yield _goal(system, goal)


def _goal(system: System, goal: Goal) -> Item:
    shown = {"kind": "goal", "name": goal.identifier, "model": system.name}
    return {**shown, "sentence": goal.sentence, "formula": str(goal.formula)}


# --- states --------------------------------------------------------------------------------------


def _variable(system: System, name: str) -> Variable:
    variable = system.variable(name)
    assert isinstance(variable, Variable)
    return variable


def _members(system: System, variable: str) -> tuple[str, ...]:
    kind = _variable(system, variable).kind
    assert isinstance(kind, EnumType)
    return kind.members


def _states(name: str, profile: str) -> Iterator[Item]:
    for system, variable, side in STATES:
        if name.upper() in _members(system, variable):
            yield _state(system.under(profile), variable, side, name.upper())


def _state(system: System, variable: str, side: str, name: str) -> Item:
    every = edges(system, _variable(system, variable), side)
    here = [edge for edge in every if edge.origin == name]
    into = [edge for edge in every if edge.target == name and edge.origin != name]
    return {
        "kind": "state",
        "name": name,
        "model": system.name,
        "side": side,
        "variable": variable,
        "number": _members(system, variable).index(name),
        "initial": str(_variable(system, variable).init) == name,
        "stays": [_edge(system, e) for e in here if e.target in (None, name)],
        "leads_out": [_edge(system, e) for e in here if e.target not in (None, name)],
        "leads_in": [{**_edge(system, e), "from": e.origin} for e in into],
    }


def _edge(system: System, edge: Edge) -> Item:
    row = name_row(system, edge.step)
    return {
        "step": edge.step.name,
        "leaf": row.leaf.name if row and row.leaf and system.name == LEAF.name else None,
        "to": edge.target or edge.origin,
        "needs": [{"label": n.label, "formula": str(n.formula)} for n in edge.guard],
    }


# --- leaves --------------------------------------------------------------------------------------


def _leaves(name: str, profile: str) -> Iterator[Item]:
    known = dict.fromkeys(row.leaf for row in names.NAMES if row.leaf)
    for leaf in known:
        short = leaf.name.removeprefix("TDH.").removeprefix("TDG.")
        if name.upper() in (leaf.name, short) or _number(name) == leaf.number:
            yield _leaf_item(leaf, profile)


def _leaf_item(leaf: names.Leaf, profile: str) -> Item:
    rows = [row for row in names.NAMES if row.leaf == leaf]
    states: dict[str, list[str]] = {}
    for system, variable, side in STATES[:2]:
        under = system.under(profile)
        for edge in edges(under, _variable(under, variable), side):
            row = name_row(under, edge.step)
            if row and row.leaf == leaf and edge.origin not in states.setdefault(side, []):
                states[side].append(edge.origin)
    order = _members(*STATES[0][:2]).index
    steps = [
        {"step": step.name, "model": system.name, "actor": step.actor}
        for system in SYSTEMS
        for step in system.steps
        if (row := name_row(system, step)) and row.leaf == leaf
    ]
    return {
        "kind": "leaf",
        **_leaf(leaf),
        "steps": steps,
        "op_states": {side: sorted(found, key=order) for side, found in states.items()},
        "kvm": sorted({row.kvm.name for row in rows if row.kvm}),
        "bundles": sorted({row.bundle for row in rows if row.bundle}),
        "seed": sorted({function for row in rows for function in row.seed}),
    }


def _number(text: str) -> int | None:
    if not re.fullmatch(r"0[xX][0-9a-fA-F_]+|[0-9]+", text):
        return None
    return int(text, 16 if text[:2].lower() == "0x" else 10)


# --- profiles ------------------------------------------------------------------------------------


def _profiles(name: str, _profile: str) -> Iterator[Item]:
    if name in PROFILES:
        yield {"kind": "profile", "name": name, "only_here": list(_only_in(name))}


def _only_in(profile: str) -> Iterator[Item]:
    """Rows, conjuncts, updates and properties that the other profiles do not have."""

    def has(profiles: frozenset[str] | None) -> bool:
        return profiles is not None and profile in profiles

    for system in SYSTEMS:
        for step in system.steps:
            where = {"model": system.name, "step": step.name}
            if has(step.profiles):
                yield {**where, "what": "row", "text": step.why}
            for need in step.when:
                if has(need.profiles):
                    text = f"{need.label}: {need.formula}"
                    yield {**where, "what": "conjunct", "text": text}
            for assign in step.then:
                if has(assign.profiles):
                    yield {**where, "what": "update", "text": str(assign)}
        for claimed in system.properties:
            if claimed.level != "lemma" and has(claimed.profiles):
                text = f"{claimed.identifier}: {claimed.sentence}"
                yield {"model": system.name, "step": None, "what": "property", "text": text}


# --- status codes --------------------------------------------------------------------------------


def _statuses(name: str, _profile: str) -> Iterator[Item]:
    value = _number(name)
    by_name = {code.name: int(code) for code in status.Status}
    upper = name.upper()
    if upper in by_name or f"TDX_{upper}" in by_name:
        yield _status(by_name.get(upper, by_name.get(f"TDX_{upper}", 0)))
    elif value is not None and value > status.LOW_32:
        if value >= 1 << 64:
            raise UsageError(f"{name} has more than 64 bits; a status code has 64")
        if status.status_name(value) not in by_name:
            raise UsageError(f"{name} is no status code that is known here")
        yield _status(value)


def _status(code: int) -> Item:
    return {
        "kind": "status",
        "name": status.status_name(code),
        "text": status.describe_status(code),
        "value": f"0x{code:016X}",
        "error": bool(code & status.ERROR_BIT),
        "non_recoverable": bool(code & status.NON_RECOVERABLE_BIT),
        "fatal": bool(code & status.FATAL_BIT),
        "class": code >> 40 & 0xFF,
        "details": code >> 32 & 0xFF,
        "low_32_bits": code & status.LOW_32,
    }
