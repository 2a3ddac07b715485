"""A toy in the model's language: one variable of each kind, for tests of the language itself."""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Constant,
    Step,
    enum,
    index,
    mapping,
    members,
    need,
    param,
    scalar,
    sort,
    step,
)

STATE = enum("State", "IDLE", "EXPORT", "IMPORT")
IDLE, EXPORT, IMPORT = members(STATE)
OTHER = enum("Other", "IDLE")
PAGE = index("Page")
VCPU = sort("Vcpu")
TOP = Constant("TOP", value=1000, small=3, least=2)

state = scalar("state", STATE, IDLE, "host")
epoch = scalar("epoch", INT, 0, "host")
total = scalar("total", INT, 0, "host")
open_ = scalar("open", BOOL, False, "host")
page = mapping("page", (PAGE,), STATE, IDLE, "host")
version = mapping("version", (PAGE,), INT, 0, "host")
seen = mapping("seen", (VCPU, PAGE), BOOL, False, "host")
ghost = scalar("ghost", INT, 0, "host", ghost=True)
past = mapping("past", (PAGE,), INT, 0, "host", ghost=True)
foreign = scalar("foreign", INT, 0, "guest")
channel = scalar("channel", INT, 0, "network")
VARIABLES = (state, epoch, total, open_, page, version, seen, ghost, past, foreign, channel)

p = param("p", PAGE)
v = param("v", VCPU)


def row(**parts: object) -> Step:
    given: dict[str, object] = {"when": (), "then": (), "why": "a reason", "cite": "a source"}
    return step("row", "host", (p, v), **{**given, **parts})  # type: ignore[arg-type]


def guarded(formula: object) -> Step:
    return row(when=(need("wanted", formula),))  # type: ignore[arg-type]
