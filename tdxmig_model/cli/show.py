"""``tdxmig show``: one thing of the model by its name, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from tdxmig_model.cli import output
from tdxmig_model.cli.catalogue import SYSTEMS, Item, find, listing
from tdxmig_model.errors import UsageError
from tdxmig_model.expr import Instance
from tdxmig_model.model.words import HARDENED, PROFILES

WIDTH = 98
# The sizes for which --python compiles: those that a formula may count over need one.
SIZES = {"Page": None, "Message": None, "Epoch": None, "Vcpu": 2, "Stream": 2}


@click.command(name="show", epilog="Example: tdxmig show export_track_start P14 LIVE_EXPORT")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--python", is_flag=True, help="Print the Python that a step is compiled to.")
@click.option(
    "--profile",
    type=click.Choice(PROFILES),
    default=HARDENED,
    show_default=True,
    help="For states, leaves and --python.",
)
@output.json_option
def command(names: tuple[str, ...], python: bool, profile: str, as_json: bool) -> None:
    """Show a step, property, goal, state, leaf, profile or status code.

    A leaf is found by its name, with or without TDH., and by its number; a status code by its name
    and by its value.  Without NAME, list all names.
    """
    if not names:
        if python:
            raise UsageError("--python needs the name of a step")
        _show_listing(as_json)
        return
    found = [item for name in names for item in find(name, profile)]
    if python:
        found = [_with_python(item, profile) for item in found if item["kind"] == "step"]
        if not found:
            raise UsageError(f"--python is for steps, and {' '.join(names)} names none")
    if as_json:
        output.emit_json({"ok": True, "found": found})
        return
    for number, item in enumerate(found):
        if number:
            click.echo()
        lines = [item["python"]] if python else _TEXT[item["kind"]](item)
        for line in lines:
            click.echo(line)


def _show_listing(as_json: bool) -> None:
    lists = listing()
    if as_json:
        output.emit_json({"ok": True, "names": lists})
        return
    for title, words in lists.items():
        click.echo(f"{title}:")
        click.echo(textwrap.fill(", ".join(words), WIDTH, **_indents(2)))


def _with_python(item: Item, profile: str) -> Item:
    from tdxmig_model.compile import Compiled

    system = next(s for s in SYSTEMS if s.name == item["model"]).under(profile)
    if not system.has_step(item["name"]):
        raise UsageError(f"profile {profile} has no step {item['name']}")
    sizes = {kind.name: SIZES.get(kind.name, 2) for kind in system.indexes()}
    return {**item, "python": Compiled(system, Instance(sizes)).source(item["name"])}


# --- text ----------------------------------------------------------------------------------------


def _indents(first: int, rest: int | None = None) -> dict[str, Any]:
    later = first if rest is None else rest
    return {
        "initial_indent": " " * first,
        "subsequent_indent": " " * later,
        "break_long_words": False,
        "break_on_hyphens": False,
    }


def _field(name: str, text: str) -> str:
    return textwrap.fill(f"  {name:<9} {text}", WIDTH, **_indents(0, 12))


def _profiles(item: Mapping[str, Any]) -> str:
    return f"  [only {', '.join(item['profiles'])}]" if item["profiles"] else ""


def _listed(title: str, lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    yield f"  {title}" + ("" if lines else " nothing")
    for line in lines:
        yield textwrap.fill(line, WIDTH, **_indents(4, 8))


def _step(item: Item) -> Iterator[str]:
    params = ", ".join(f"{p['name']}: {p['type']}" for p in item["params"])
    yield f"step {item['name']}({params}){_profiles(item)}"
    yield _field("model", f"{item['model']}, taken by {item['actor']}")
    yield _field("why", item["why"])
    yield _field("cite", item["cite"])
    if item["leaf"]:
        yield _field("leaf", f"{item['leaf']['name']}, {_call(item['leaf'])}")
    for name in ("kvm", "bundle"):
        if item[name]:
            yield _field(name, item[name])
    if item["seed"]:
        yield _field("QEMU", ", ".join(item["seed"]))
    yield from _listed("when", (_need_line(n) for n in item["when"]))
    updates = (
        f"{a['update']}{'  [ghost]' if a['ghost'] else ''}{_profiles(a)}" for a in item["then"]
    )
    yield from _listed("then", updates)


def _call(leaf: Item) -> str:
    return f"{leaf['call']} leaf {leaf['number']}"


def _need_line(need: Item) -> str:
    return f"{need['label']}: {need['formula']}{_profiles(need)}"


def _property(item: Item) -> Iterator[str]:
    yield f"property {item['name']}{_profiles(item)}"
    yield _field("model", f"{item['model']}, level {item['level']}")
    yield _field("claims", item["sentence"])
    yield _field("formula", item["formula"])
    if item["cite"]:
        yield _field("cite", item["cite"])
    if item["witness"]:
        yield _field("witness", item["witness"])
    if item["guards"]:
        yield from _listed("guards", (f"{g['step']}, {_need_line(g)}" for g in item["guards"]))


def _not_stated(item: Item) -> Iterator[str]:
    yield f"property {item['name']}"
    yield _field("says", item["sentence"])
    yield _field("formula", f"not stated because {item['reason']}")


def _goal(item: Item) -> Iterator[str]:
    yield f"goal {item['name']}"
    yield _field("model", item["model"])
    yield _field("says", item["sentence"])
    yield _field("formula", item["formula"])


def _state(item: Item) -> Iterator[str]:
    first = ", the first" if item["initial"] else ""
    yield f"state {item['name']} ({item['variable']} = {item['number']}{first})"
    yield _field("model", f"{item['model']}, {item['side']}")
    yield from _listed("legal and stays", (_edge_line(e) for e in item["stays"]))
    out = (f"to {e['to']} by {_edge_line(e)}" for e in item["leads_out"])
    yield from _listed("leads out", out)
    into = (f"from {e['from']} by {_edge_line(e)}" for e in item["leads_in"])
    yield from _listed("leads in", into)


def _edge_line(edge: Item) -> str:
    leaf = f" ({edge['leaf']})" if edge["leaf"] else ""
    needs = ", ".join(need["label"] for need in edge["needs"])
    return f"{edge['step']}{leaf}" + (f" when {needs}" if needs else "")


def _leaf(item: Item) -> Iterator[str]:
    yield f"leaf {item['name']} ({_call(item)})"
    for side, states in item["op_states"].items():
        yield _field(side, f"in {', '.join(states)}")
    for name in ("kvm", "bundles", "seed"):
        if item[name]:
            yield _field({"seed": "QEMU"}.get(name, name), ", ".join(item[name]))
    steps = (f"{s['step']} ({s['model']}, {s['actor']})" for s in item["steps"])
    yield from _listed("steps", steps)


def _profile(item: Item) -> Iterator[str]:
    yield f"profile {item['name']}"
    lines = (
        f"{part['what']} of {part['step'] or part['model']}: {part['text']}"
        for part in item["only_here"]
    )
    yield from _listed("only here", lines)


def _status(item: Item) -> Iterator[str]:
    yield f"status {item['text']} ({item['value']})"
    bits = [name for name in ("error", "non_recoverable", "fatal") if item[name]]
    yield _field("bits", ", ".join(bits) or "none: success or a remark")
    yield _field("class", f"{item['class']}, details {item['details']}")


_TEXT = {
    "step": _step,
    "property": _property,
    "not stated": _not_stated,
    "goal": _goal,
    "state": _state,
    "leaf": _leaf,
    "profile": _profile,
    "status": _status,
}
