"""What specs/expect.json says, and how it is made anew: ``python tests/expectations.py``.

Sizes, ceilings and limits of the file are kept; everything else in it is computed.  That takes
about five minutes.  Whoever runs it reads the difference before it is committed: a count that moved
means that the model moved.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from tdxmig_model import cli
from tdxmig_model.explore import Exploration, explore
from tdxmig_model.expr import Instance, System
from tdxmig_model.expr.finite import ceilings
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import PUBLIC_REPAIRS, TDX_1_5_01

FILE = Path(__file__).resolve().parent.parent / "specs" / "expect.json"
MODELS = {system.name: system for system in SYSTEMS}
Entry = dict[str, Any]


def instance_of(entry: Entry) -> tuple[System, Instance, dict[str, int]]:
    """The system, the sizes and the ceilings of an entry; the ceiling "" is that of the rest."""
    system = MODELS[entry["model"]].under(entry["profile"])
    instance = Instance.small(system, entry["sizes"])
    given = dict(entry["ceilings"])
    limits = ceilings(system, instance, given.pop("", None))
    return system, instance, limits | given


def searched(entry: Entry) -> Exploration:
    """The search that an entry speaks of."""
    system, instance, limits = instance_of(entry)
    claims = {p.identifier: p.formula for p in system.properties if p.level != "lemma"}
    return explore(
        system,
        instance,
        ceiling=limits,
        limit=entry["limit"],
        goals=system.goals,
        invariants=claims,
    )


def seen(found: Exploration) -> Entry:
    """What an entry says of its search."""
    return {
        "complete": not found.truncated,
        "states": found.states,
        "transitions": found.transitions,
        "depth": found.depth,
        "clipped": found.clipped,
        "violated": sorted(found.violations),
        "reached": sorted(found.reached),
        "digest": found.digest,
    }


def verdicts(*options: str) -> list[Entry]:
    """The properties as ``tdxmig verify --json`` judges them in the release without repairs."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(["verify", "--profile", TDX_1_5_01, "--json", *options])
    properties: list[Entry] = json.loads(printed.getvalue())["properties"]
    return properties


def classified(properties: list[Entry]) -> dict[str, Entry]:
    """Of each violated property of these its kind, and the public repairs that are a reference.

    One that two models have is public only if it is so in both.
    """
    found: dict[str, Entry] = {}
    for row in properties:
        if row["kind"] == "public":
            repairs = [r for r in row["removed_by"] if r in PUBLIC_REPAIRS]
            found.setdefault(row["id"], {"kind": "public", "repairs": repairs})
        elif row["kind"]:
            found[row["id"]] = {"kind": row["kind"]}
    return found


def load() -> Entry:
    """The file."""
    data: Entry = json.loads(FILE.read_text())
    return data


def update() -> None:
    """Write the file anew."""
    data = load()
    data["searches"] = [entry | seen(searched(entry)) for entry in data["searches"]]
    found = classified(verdicts())
    data["violations"] = {name: found[name] for name in sorted(found, key=_by_number)}
    FILE.write_text(written(data))


def written(data: Entry) -> str:
    """The file's text: one line for each search, and one for each violation."""
    searches = ",\n".join(f"  {json.dumps(entry)}" for entry in data["searches"])
    violations = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(kind)}" for name, kind in data["violations"].items()
    )
    return f'{{\n "searches": [\n{searches}\n ],\n "violations": {{\n{violations}\n }}\n}}\n'


def _by_number(identifier: str) -> tuple[str, int]:
    return identifier[0], int(identifier[1:])


if __name__ == "__main__":
    update()
