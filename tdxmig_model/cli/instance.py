"""Options that choose one finite instance of one model: what ``explore`` and ``export`` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from tdxmig_model.errors import UsageError
from tdxmig_model.expr import Instance, System
from tdxmig_model.model.words import HARDENED, PROFILES

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

MODELS = ("lifecycle", "leaf")
MESSAGES = {"lifecycle": 7, "leaf": 4}
"""How many bundles or records fit into the log unless the caller says otherwise."""

# So many that a migration completes or is aborted, and so few that a search ends in
# seconds.  The name "" is every other integer that is no position.
CEILINGS = {
    "lifecycle": {"": 3},
    "leaf": {
        "": 1,
        "source_num_migs": 2,
        "destination_num_migs": 2,
        "source_td_epoch": 2,
        "source_bw_epoch": 2,
        "source_refcount": 0,
        "source_refcount_previous": 0,
        "source_total_mb_count": 4,
        "destination_total_mb_count": 4,
        "source_next_mb_counter": 3,
        "destination_expected_mb_counter": 3,
        "destination_mig_epoch": 3,
        "destination_page_epoch": 3,
        "log_counter": 3,
        "log_epoch": 3,
        "log_total": 4,
        "token_position": 4,
    },
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """One model under one profile, its sizes, and the ceilings of its integers by name."""

    system: System
    instance: Instance
    ceilings: dict[str, int]
    profile: str

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
    size = click.IntRange(min=1)
    decorators = (
        click.option("--profile", type=click.Choice(PROFILES), default=HARDENED, show_default=True),
        click.option("--pages", type=size, default=1, show_default=True),
        click.option("--vcpus", type=size, default=1, show_default=True),
        click.option("--streams", type=size, default=1, show_default=True),
        click.option("--epochs", type=size, default=4, show_default=True),
        click.option(
            "--messages", type=size, help="Room in the log [default: 7, 4 for the leaf model]."
        ),
        click.option(
            "--ceiling",
            "ceiling",
            multiple=True,
            callback=_ceiling,
            metavar="[NAME=]N",
            help="Largest magnitude of integers that are no positions: of all, or of one variable "
            "[default: chosen so that a migration can complete].",
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
    from tdxmig_model.expr.finite import ceilings

    system = _system(model).under(profile)
    sizes = {
        "Page": pages,
        "Vcpu": vcpus,
        "Stream": streams,
        "Epoch": epochs,
        "Message": messages or MESSAGES[model],
    }
    instance = Instance.small(system, sizes)
    wanted = {**({} if "" in ceiling else CEILINGS[model]), **ceiling}
    limits = ceilings(system, instance, wanted[""])
    for name, value in wanted.items():
        if name and name not in limits:
            raise UsageError(f"--ceiling: the {model} model has no integer variable {name}")
        if name:
            limits[name] = value
    return Chosen(system, instance, limits, profile)


def _system(model: str) -> System:
    if model == "leaf":
        from tdxmig_model.model.leaf import LEAF

        return LEAF
    from tdxmig_model.model.lifecycle import LIFECYCLE

    return LIFECYCLE
