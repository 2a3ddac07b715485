"""Options that choose one finite instance of one model: what ``explore`` and ``export`` share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import click

from tdxmig_model.cli.sizes import (
    COMPLETION,
    LARGEST,
    default_ceilings,
    default_sizes,
    least_messages,
)
from tdxmig_model.errors import UsageError
from tdxmig_model.expr import Goal, Instance, MapVariable, System
from tdxmig_model.model import systems
from tdxmig_model.model.words import HARDENED, PROFILES

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

SHORT = {
    "pages": "Page",
    "vcpus": "Vcpu",
    "streams": "Stream",
    "epochs": "Epoch",
    "messages": "Message",
}
"""The options with a name of their own, and the index that each sizes."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """One model under one profile, its sizes, and the ceilings of its integers by name."""

    system: System
    instance: Instance
    ceilings: dict[str, int]
    profile: str
    warnings: tuple[str, ...] = ()
    """What the given options leave no room for."""

    @property
    def completion(self) -> str | None:
        """The goal that says that a migration completed; None if the model has no such goal."""
        return COMPLETION.get(self.system.name)

    def goals(self) -> tuple[Goal, ...]:
        """The goals of the model, or of the one that it is superposed on if it has none itself."""
        system = self.system
        while not system.goals and system.base is not None:
            system = system.base
        return system.goals

    def cells(self) -> int:
        """Integers that one state holds."""
        sizes = [
            [self.instance.bounded(k) for k in v.indexes] if isinstance(v, MapVariable) else []
            for v in self.system.variables
        ]
        return sum(map(prod, sizes))

    def sizes(self) -> dict[str, int]:
        """The size of each index that the model has, by name."""
        return {k.name: self.instance.bounded(k) for k in self.system.indexes()}


def _word(name: str) -> str:
    """The name of a model as one word of a command line."""
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def _model(ctx: click.Context, argument: click.Parameter, given: str) -> str:
    """The name as the model has it; spaces, hyphens and underscores are all the same."""
    for system in systems.SYSTEMS:
        if _word(system.name) == _word(given):
            return system.name
    known = [_word(s.name) for s in systems.SYSTEMS]
    close = difflib.get_close_matches(_word(given), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise click.BadParameter(f"{given!r} is none of {', '.join(known)}{hint}", ctx, argument)


def model_argument(function: Decorated) -> Decorated:
    """Give a command the argument MODEL, under the name ``model``."""
    return click.argument("model", default="lifecycle", callback=_model, metavar="[MODEL]")(
        function
    )


def _numbers(*, bare: bool) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], Any]:
    """A callback that parses each NAME=N, and with `bare` a mere N, as that of the name ""."""

    def parse(
        _ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]
    ) -> dict[str, int]:
        found: dict[str, int] = {}
        for text in given:
            name, equals, number = text.rpartition("=")
            if not number.isdecimal() or not (name or (bare and not equals)):
                wrong = "neither N nor NAME=N" if bare else "not NAME=N"
                raise click.BadParameter(f"{text} is {wrong}")
            found[name] = int(number)
        return found

    return parse


def options(function: Decorated) -> Decorated:
    """Give a command the options that ``choose`` takes, under the same names."""
    size = click.IntRange(1, LARGEST)
    decorators = (
        click.option("--profile", type=click.Choice(PROFILES), default=HARDENED, show_default=True),
        click.option("--pages", type=size, help="[default: 1; 3 in guest-pages]"),
        click.option("--vcpus", type=size, help="[default: 1]"),
        click.option("--streams", type=size, help="[default: 1]"),
        click.option("--epochs", type=size, help="[default: 4]"),
        click.option(
            "--messages",
            type=size,
            help="Room in the log [default: 3 and one for each vCPU; 3 more in the lifecycle "
            "model].",
        ),
        click.option(
            "--size",
            "size",
            multiple=True,
            callback=_numbers(bare=False),
            metavar="NAME=N",
            help="Elements of any index, as of Key in the keys model; the answer names them all "
            "[default: small ones].",
        ),
        click.option(
            "--ceiling",
            "ceiling",
            multiple=True,
            callback=_numbers(bare=True),
            metavar="[NAME=]N",
            help="Largest magnitude of integers that are no positions: of all, or of one variable "
            "[default: grows with the sizes, so that a migration can complete].",
        ),
    )
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def choose(
    model: str,
    *,
    profile: str,
    size: Mapping[str, int],
    ceiling: Mapping[str, int],
    **short: int | None,
) -> Chosen:
    """The instance that the options describe.

    UsageError for an index or an integer variable that the model does not have, and for a size
    that is out of range.
    """
    system = next(s for s in systems.SYSTEMS if s.name == model).under(profile)
    given = {SHORT[name]: number for name, number in short.items() if number is not None}
    given |= _sizes(system, size)
    _all_known(system, given)
    sizes = default_sizes(model, given) | given
    instance = Instance.small(system, sizes)
    defaults = default_ceilings(model, sizes)
    roomy = _limits(system, instance, defaults)
    limits = _limits(system, instance, {**({} if "" in ceiling else defaults), **ceiling})
    return Chosen(system, instance, limits, profile, tuple(_doubts(model, sizes, limits, roomy)))


def _sizes(system: System, given: Mapping[str, int]) -> dict[str, int]:
    """The sizes of ``--size``, by the names of the indexes as the model writes them."""
    names = {k.name.lower(): k.name for k in system.indexes()}
    for name, number in given.items():
        if not 1 <= number <= LARGEST:
            raise UsageError(f"--size: {name}={number} is not in the range 1 to {LARGEST}")
    return {names.get(name.lower(), name): number for name, number in given.items()}


def _all_known(system: System, given: Mapping[str, int]) -> None:
    """UsageError for a size of an index that the model does not have."""
    known = [k.name for k in system.indexes()]
    for name in given:
        if name not in known:
            options = {index: f"--{option}" for option, index in SHORT.items()}
            raise UsageError(
                f"{options.get(name, '--size')}: the {system.name} model has no {name}; it has "
                f"{', '.join(known)}"
            )


def _limits(system: System, instance: Instance, wanted: Mapping[str, int]) -> dict[str, int]:
    from tdxmig_model.expr.finite import ceilings

    limits = ceilings(system, instance, wanted[""])
    for name, value in wanted.items():
        if name and name not in limits:
            raise UsageError(f"--ceiling: the {system.name} model has no integer variable {name}")
        if name:
            limits[name] = value
    return limits


def _doubts(
    model: str, sizes: Mapping[str, int], limits: Mapping[str, int], roomy: Mapping[str, int]
) -> Iterator[str]:
    """Why a migration may have no room to complete, one sentence each."""
    if model in COMPLETION:
        room, vcpus = sizes["Message"], sizes["Vcpu"]
        least = least_messages(vcpus)
        if room < least:
            yield (
                f"--messages {room}: a migration of {vcpus} vCPUs makes {least}, so none completes"
            )
    low = [f"{name}={limits[name]} ({roomy[name]})" for name in roomy if limits[name] < roomy[name]]
    if low:
        end = "no migration completes" if model in COMPLETION else "little happens"
        yield f"--ceiling: lower than the defaults (in brackets), so perhaps {end}: " + ", ".join(
            low
        )
