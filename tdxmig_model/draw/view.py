"""What a picture shows, before Graphviz: the states of one side, and the steps in and between them.

Everything is computed from the rows through the projection that the machines use; the words of a
guard are those of the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tdxmig_model.expr import (
    BoolType,
    EnumType,
    Equal,
    Instance,
    Interpreter,
    Literal,
    Need,
    Node,
    Read,
    Step,
    System,
    Variable,
    initial_state,
    subterms,
)
from tdxmig_model.model.words import NETWORK
from tdxmig_model.project import Edge, at, edges

LONGEST_FORMULA = 40
# Variables by which the model keeps its books: a conjunct over one of them is shown by its label.
BOOKKEEPING = frozenset(
    {"log_length", "log_complete", "sent", "session_observed", "session_used"},
)
# How a word of a label is written in a sentence.
_ACRONYMS = ("MAC", "MACs", "MB", "MBMD", "MIG", "MIGS", "SEPT", "TD", "TLB", "vCPU", "vCPUs")
ACRONYMS = {word.lower(): word for word in _ACRONYMS}
LIFECYCLE_NAME = "lifecycle"


@dataclass(frozen=True, slots=True)
class Loop:
    """A step that stays in a state: its leaf, the variant of the leaf, and its guard there."""

    step: Step
    leaf: str
    variant: str
    guard: tuple[str, ...]
    messages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """One step, or several of one leaf, from some states to another."""

    steps: tuple[Step, ...]
    leaf: str
    variant: str
    origins: tuple[str, ...]
    target: str
    guard: tuple[str, ...]
    messages: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """One side of one system, projected onto its state variable."""

    system: System
    actor: str
    variable: Variable
    loops: Mapping[str, tuple[Loop, ...]] = field(default_factory=dict)
    moves: tuple[Move, ...] = ()

    @property
    def states(self) -> tuple[str, ...]:
        """The states that some step enters or leaves, and the initial one, in their order."""
        kind = self.variable.kind
        assert isinstance(kind, EnumType)
        ends = {s for m in self.moves for s in (*m.origins, m.target)} | {self.initial}
        return tuple(name for name in kind.members if name in ends)

    @property
    def initial(self) -> str:
        """The state in which the side begins."""
        return str(self.variable.init)

    def terminal(self, state: str) -> bool:
        """Whether no step leads to another state."""
        return not any(state in move.origins for move in self.moves)

    def entered(self, state: str) -> bool:
        """Whether this side ever gets there."""
        return state == self.initial or any(state == move.target for move in self.moves)


def side(system: System, actor: str, variable: str) -> Side:
    """Project one side of a system onto one of its enum variables."""
    scalar = system.variable(variable)
    assert isinstance(scalar, Variable)
    loops: dict[str, list[Loop]] = {}
    apart: dict[tuple[Step, str, tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for edge in edges(system, scalar, actor):
        guard = tuple(_guard(edge, actor))
        messages = tuple(_messages(edge, scalar))
        if edge.target in (None, edge.origin):
            leaf, variant = _title(edge.step, actor)
            loops.setdefault(edge.origin, []).append(
                Loop(edge.step, leaf, variant, guard, messages)
            )
        else:
            assert edge.target is not None
            apart.setdefault((edge.step, edge.target, guard, messages), []).append(edge.origin)
    moves = [
        Move((step,), *_title(step, actor), tuple(origins), target, guard, messages)
        for (step, target, guard, messages), origins in apart.items()
    ]
    return Side(
        system,
        actor,
        scalar,
        {state: tuple(rows) for state, rows in loops.items()},
        tuple(_merged(moves)),
    )


def _merged(moves: list[Move]) -> Iterator[Move]:
    """Moves of one leaf with the same ends are one box; its guard is what all of them ask for."""
    groups: dict[tuple[object, ...], list[Move]] = {}
    for move in moves:
        key = (move.leaf or move.variant, move.origins, move.target, move.messages)
        groups.setdefault(key, []).append(move)
    for group in groups.values():
        first = group[0]
        common = tuple(g for g in first.guard if all(g in m.guard for m in group))
        steps = tuple(step for move in group for step in move.steps)
        variant = first.variant if len(group) == 1 else ""
        yield Move(steps, first.leaf, variant, first.origins, first.target, common, first.messages)


def _title(step: Step, actor: str) -> tuple[str, str]:
    """The leaf of a row and which variant of it the row is; a row without a leaf has no first."""
    words = step.name.removeprefix(f"{actor}_").split("_")
    found = re.match(r"TD[HG]\.([A-Z.]+[A-Z])", step.cite)
    if found is None or not re.search(r"(leaf|TDCALL) \d", step.cite):
        return "", "_".join(words)
    for word in found[1].lower().split("."):
        if not words or words[0] != word:
            break
        words.pop(0)
    return found[1], " ".join(words)


def _guard(edge: Edge, actor: str) -> Iterator[str]:
    for need in edge.guard:
        if _taken(need) is None and not _waits(need) and not _signal(need.formula):
            yield readable(need, actor)


def readable(need: Need, actor: str) -> str:
    """A conjunct in words: its formula where that is short, else its label."""
    names = {n.name for n in subterms(need.formula) if isinstance(n, Variable)}
    names |= {n.map.name for n in subterms(need.formula) if isinstance(n, Read)}
    text = re.sub(rf"\b{actor}_", "", str(need.formula))
    text = re.sub(r"\blog_(\w+)\[m\]", r"bundle \1", text)
    text = re.sub(r"\brecord_(\w+)\[received\]", r"record \1", text)
    text = re.sub(r"\[(p|v|stream|vcpu)\]", "", text)
    text = re.sub(r"not \(([\w\[\]]+)\)", r"not \1", text).replace("Vcpu", "vCPU")
    if names & BOOKKEEPING or len(text) > LONGEST_FORMULA:
        words = need.label.split("_")
        text = " ".join(ACRONYMS.get(word, word) for word in words)
    return text


# --- records and what comes back -----------------------------------------------------------------


def _waits(need: Need) -> bool:
    """Whether a conjunct only says that a record has arrived."""
    return str(need.formula) == "received < sent"


def _taken(need: Need) -> str | None:
    """The kind of record that a conjunct asks for."""
    match need.formula:
        case Equal(left=Read(map=read), right=Literal() as kind) if read.name == "record_kind":
            return str(kind)
    return None


def _messages(edge: Edge, variable: Variable) -> Iterator[str]:
    """What an edge sends or takes: `+NAME` and `-NAME`, in upper case for a record."""
    kind = variable.kind
    assert isinstance(kind, EnumType)
    here = Literal(kind.position(edge.origin), kind)
    for need in edge.guard:
        record = _taken(need)
        if record is not None:
            yield f"-{record}"
        elif _signal(need.formula):
            yield f"-{need.formula}"
    for assign in edge.step.then:
        sent = assign.target.name == "record_kind" or _signal(assign.target)
        if sent and at(assign.value, variable, here) != assign.target:
            yield f"+{assign.value if assign.keys else assign.target.name}"


def _signal(term: object) -> bool:
    """Whether a term is a Boolean of the network that both sides see in the lifecycle."""
    match term:
        case Variable(kind=BoolType(), owner=owner, ghost=False, name=name):
            return owner == NETWORK and not name.startswith("session_")
    return False


# --- who may run ---------------------------------------------------------------------------------


def meaning(view: Side) -> dict[str, str]:
    """For each state: runs, sometimes, stopped (owned, guest stopped) or still (not owned).

    On the leaf level the guest runs where VP.ENTER can be called.  In the lifecycle it runs where
    the side's half of O6 (never may both sides run the TD) holds.
    """
    if view.system.name != LIFECYCLE_NAME:
        entering = {
            edge.origin
            for edge in edges(view.system, view.variable, view.actor)
            if edge.step.name.removeprefix(f"{view.actor}_") == "vp_enter"
        }
        return {state: "runs" if state in entering else "still" for state in view.states}
    owned = _ownership(view)
    return {state: _meaning_of(view, state, owned[state]) for state in view.states}


def _meaning_of(view: Side, state: str, owned: set[bool]) -> str:
    half = _half_of_o6(view)
    instance = Instance.small(view.system, {i.name: 1 for i in view.system.indexes()})
    interpreter = Interpreter(view.system, instance)
    values = initial_state(view.system, instance)
    kind = view.variable.kind
    assert isinstance(kind, EnumType)
    values[interpreter.slots[view.variable.name]] = kind.position(state)
    answers = set()
    for owns in owned:
        values[interpreter.slots[f"{view.actor}_owns"]] = owns
        answers.add(bool(interpreter.value(half, values, {})))
    if len(answers) > 1:
        return "sometimes"
    return "runs" if answers == {True} else "stopped" if owned == {True} else "still"


def _half_of_o6(view: Side) -> Node:
    """The part of O6 that speaks of one side's variables."""
    both = view.system.property("O6").formula.children()[0]
    own = {v.name for v in view.system.variables if v.owner == view.actor}
    for part in both.children():
        if {n.name for n in subterms(part) if isinstance(n, Variable)} <= own:
            return part
    raise AssertionError(f"O6 does not speak of the {view.actor}")


def _ownership(view: Side) -> dict[str, set[bool]]:
    """For each state, whether the side can own the TD there: the rows followed over both."""
    owns = view.system.variable(f"{view.actor}_owns")
    todo = [(view.initial, bool(owns.init.value))]
    seen = set(todo)
    for state, owned in todo:
        for edge in edges(view.system, view.variable, view.actor):
            if edge.origin != state:
                continue
            after = owned
            for assign in edge.step.then:
                if assign.target == owns and isinstance(assign.value, Literal):
                    after = bool(assign.value.value)
            new = (edge.target or state, after)
            if new not in seen:
                seen.add(new)
                todo.append(new)
    return {state: {owned for name, owned in seen if name == state} for state in view.states}
