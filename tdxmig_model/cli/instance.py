"""Options that choose one finite instance of one model: what ``explore`` and ``export`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import click

from tdxmig_model.errors import UsageError
from tdxmig_model.expr import Instance, MapVariable, System
from tdxmig_model.model.words import HARDENED, PROFILES

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

MODELS = ("lifecycle", "leaf")
COMPLETION = {"lifecycle": "migrated", "leaf": "cold"}
"""The goal that says that a migration completed."""
LARGEST = 16
"""Of each index: more would not be searched, and only its formulas would fill the memory."""


def least_messages(vcpus: int) -> int:
    """Bundles of a shortest migration: immutable state, TD state, each vCPU, start token."""
    return 3 + vcpus


def default_messages(model: str, vcpus: int) -> int:
    """Room in the log: in the lifecycle model also for some epochs and memory."""
    return least_messages(vcpus) + (3 if model == "lifecycle" else 0)


def default_ceilings(model: str, *, pages: int, vcpus: int, streams: int) -> dict[str, int]:
    """Ceilings that let a migration of these sizes complete, and a small search end in seconds.

    The name "" is every other integer that is no position.
    """
    bundles = least_messages(vcpus)
    if model == "lifecycle":
        return {"": bundles - 1}
    return {
        "": max(1, pages, vcpus, streams - 1),
        "source_num_migs": streams + 1,
        "destination_num_migs": streams + 1,
        "source_td_epoch": 2,
        "source_bw_epoch": 2,
        "source_refcount": 0,
        "source_refcount_previous": 0,
        "source_total_mb_count": bundles,
        "destination_total_mb_count": bundles,
        "source_next_mb_counter": bundles - 1,
        "destination_expected_mb_counter": bundles - 1,
        "destination_mig_epoch": 3,
        "destination_page_epoch": 3,
        "log_counter": bundles - 1,
        "log_epoch": 3,
        "log_total": bundles,
        "token_position": bundles,
    }


@dataclass(frozen=True, slots=True)
class Chosen:
    """One model under one profile, its sizes, and the ceilings of its integers by name."""

    system: System
    instance: Instance
    ceilings: dict[str, int]
    profile: str
    warnings: tuple[str, ...] = ()
    """What the given options leave no room for."""

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


def _ceiling(_ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> Any:
    """Parse ``N`` and ``NAME=N``."""
    found: dict[str, int] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise click.BadParameter(f"{text} is neither N nor NAME=N")
        found[name] = int(number)
    return found


def options(function: Decorated) -> Decorated:
    """Give a command the options that ``choose`` takes, under the same names."""
    size = click.IntRange(1, LARGEST)
    decorators = (
        click.option("--profile", type=click.Choice(PROFILES), default=HARDENED, show_default=True),
        click.option("--pages", type=size, default=1, show_default=True),
        click.option("--vcpus", type=size, default=1, show_default=True),
        click.option("--streams", type=size, default=1, show_default=True),
        click.option("--epochs", type=size, default=4, show_default=True),
        click.option(
            "--messages",
            type=size,
            help="Room in the log [default: 6 and one for each vCPU; 3 in the leaf model].",
        ),
        click.option(
            "--ceiling",
            "ceiling",
            multiple=True,
            callback=_ceiling,
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
    pages: int,
    vcpus: int,
    streams: int,
    epochs: int,
    messages: int | None,
    ceiling: dict[str, int],
) -> Chosen:
    """The instance that the options describe; UsageError for a name that is no integer variable."""
    system = _system(model).under(profile)
    room = messages or min(LARGEST, default_messages(model, vcpus))
    sizes = {"Page": pages, "Vcpu": vcpus, "Stream": streams, "Epoch": epochs, "Message": room}
    instance = Instance.small(system, sizes)
    defaults = default_ceilings(model, pages=pages, vcpus=vcpus, streams=streams)
    roomy = _limits(model, system, instance, defaults)
    limits = _limits(model, system, instance, {**({} if "" in ceiling else defaults), **ceiling})
    return Chosen(system, instance, limits, profile, tuple(_doubts(room, vcpus, limits, roomy)))


def _limits(
    model: str, system: System, instance: Instance, wanted: dict[str, int]
) -> dict[str, int]:
    from tdxmig_model.expr.finite import ceilings

    limits = ceilings(system, instance, wanted[""])
    for name, value in wanted.items():
        if name and name not in limits:
            raise UsageError(f"--ceiling: the {model} model has no integer variable {name}")
        if name:
            limits[name] = value
    return limits


def _doubts(room: int, vcpus: int, limits: dict[str, int], roomy: dict[str, int]) -> Iterator[str]:
    """Why a migration may have no room to complete, one sentence each."""
    least = least_messages(vcpus)
    if room < least:
        yield f"--messages {room}: a migration of {vcpus} vCPUs makes {least}, so none completes"
    low = [f"{name}={limits[name]} ({roomy[name]})" for name in roomy if limits[name] < roomy[name]]
    if low:
        yield (
            "--ceiling: lower than the defaults (in brackets), so perhaps no migration completes: "
            + ", ".join(low)
        )


def _system(model: str) -> System:
    if model == "leaf":
        from tdxmig_model.model.leaf import LEAF

        return LEAF
    from tdxmig_model.model.lifecycle import LIFECYCLE

    return LIFECYCLE
