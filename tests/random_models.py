"""Random well-typed terms, rows and states, for tests of whatever evaluates the language."""

from __future__ import annotations

import random
from typing import Any

from tdxmig_model.expr import (
    BOOL,
    INT,
    Assign,
    Constant,
    Instance,
    MapVariable,
    Node,
    Size,
    Step,
    System,
    Variable,
    all_of,
    any_of,
    choose,
    count,
    enum,
    index,
    initial_state,
    lookup,
    mapping,
    member,
    members,
    need,
    not_,
    param,
    scalar,
    sort,
    step,
)

COLOUR = enum("Colour", "RED", "GREEN", "BLUE")
CELL = index("Cell")
WORKER = sort("Worker")
SIZES = {"Cell": 5, "Worker": 3}
LIMIT = Constant("LIMIT", value=1000, small=3, least=2)

colour = scalar("colour", COLOUR, member(COLOUR, "RED"), "host")
flag = scalar("flag", BOOL, False, "host")
number = scalar("number", INT, 0, "host")
total = scalar("total", INT, 0, "host")
last = scalar("last", INT, 0, "host")
paint = mapping("paint", (CELL,), COLOUR, member(COLOUR, "RED"), "host")
level = mapping("level", (CELL,), INT, 0, "host")
wet = mapping("wet", (WORKER, CELL), BOOL, False, "host")
VARIABLES = (colour, flag, number, total, last, paint, level, wet)

cell = param("cell", CELL)
worker = param("worker", WORKER)
shade = param("shade", COLOUR)
switch = param("switch", BOOL)
PARAMS = (cell, worker, shade, switch)


class Terms:
    """Random well-typed terms over the variables and parameters above.

    With `wander`, positions in maps are computed and may lie outside; what guards them is random.
    """

    def __init__(self, seed: int, *, wander: bool = False) -> None:
        self.random = random.Random(seed)
        self.wander = wander

    def pick(self, *makers: Any) -> Any:
        return self.random.choice(makers)()

    def position(self) -> Node:
        if not self.wander or self.random.random() < 0.6:
            return cell
        return self.pick(lambda: cell + 1, lambda: number, lambda: level[cell], lambda: number - 1)

    def integer(self, depth: int) -> Node:
        leaves = (
            lambda: number,
            lambda: total,
            lambda: cell,
            lambda: LIMIT,
            lambda: Size(CELL),
            lambda: level[self.position()],
        )
        if depth == 0:
            return self.pick(*leaves)
        return self.pick(
            *leaves,
            lambda: self.integer(depth - 1) + self.random.randint(-2, 2),
            lambda: self.integer(depth - 1) + choose(self.formula(depth - 1), 1, -1),
            lambda: choose(
                self.formula(depth - 1), self.integer(depth - 1), self.integer(depth - 1)
            ),
            lambda: count("painted", CELL, lambda i: paint[i].eq(self.colour(0))),
            lambda: count("painted", CELL, lambda i: paint[i].eq(self.colour(0))).below(
                self.integer(0)
            ),
        )

    def colour(self, depth: int) -> Node:
        leaves = (
            lambda: colour,
            lambda: shade,
            lambda: paint[self.position()],
            lambda: self.random.choice(members(COLOUR)),
        )
        if depth == 0:
            return self.pick(*leaves)
        red, green, blue = members(COLOUR)
        return self.pick(
            *leaves,
            lambda: lookup(self.colour(depth - 1), {red: green, green: blue}),
            lambda: choose(self.formula(depth - 1), self.colour(depth - 1), self.colour(depth - 1)),
        )

    def formula(self, depth: int) -> Node:
        leaves = (lambda: flag, lambda: switch, lambda: wet[worker, self.position()])
        if depth == 0:
            return self.pick(*leaves)
        some = self.random.sample(members(COLOUR), self.random.randint(0, 3))
        smaller = depth - 1
        return self.pick(
            *leaves,
            lambda: self.integer(smaller).eq(self.integer(smaller)),
            lambda: self.integer(smaller).lt(self.integer(smaller)),
            lambda: self.integer(smaller).ge(self.integer(smaller)),
            lambda: self.colour(smaller).ne(self.colour(smaller)),
            lambda: self.colour(smaller).in_(*some),
            lambda: self.formula(smaller).eq(self.formula(smaller)),
            lambda: not_(self.formula(smaller)),
            lambda: all_of(*(self.formula(smaller) for _ in range(self.random.randint(0, 3)))),
            lambda: any_of(*(self.formula(smaller) for _ in range(self.random.randint(0, 3)))),
            lambda: choose(self.formula(smaller), self.formula(smaller), self.formula(smaller)),
        )

    def update(self) -> list[Assign]:
        every = [
            colour.to(self.colour(2)),
            flag.to(self.formula(3)),
            number.to(self.integer(3)),
            total.to(total + choose(self.formula(2), 2, 0)),
            last.to(cell),
            paint[self.position()].to(self.colour(3)),
            self.random.choice(
                [
                    level.fill(lambda i: choose(paint[i].eq(self.colour(1)), level[i] + 1, number)),
                    level.fill(lambda i: 7),
                    level[self.position()].to(self.integer(2)),
                ]
            ),
            wet[worker, cell].to(self.formula(2)),
        ]
        return self.random.sample(every, self.random.randint(1, len(every)))

    def step(self, name: str) -> Step:
        return step(
            name,
            "host",
            PARAMS,
            when=[need(f"n{k}", self.formula(3)) for k in range(self.random.randint(0, 3))],
            then=self.update(),
            why="random",
            cite="none",
        )


def random_state(system: System, instance: Instance, chance: random.Random) -> list[Any]:
    def value(variable: Variable | MapVariable) -> int | bool:
        kind = variable.kind
        if kind == BOOL:
            return chance.random() < 0.5
        if hasattr(kind, "members"):
            return chance.randrange(len(kind.members))
        return chance.randint(0, 3)

    state = initial_state(system, instance)
    for slot, variable in enumerate(system.variables):
        if isinstance(variable, MapVariable):
            state[slot][:] = [value(variable) for _ in state[slot]]
        else:
            state[slot] = value(variable)
    return state
