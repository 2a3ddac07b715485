"""A good migration as calls: where walks, short runs and the search for refusals begin."""

from __future__ import annotations

from typing import Final

from tdxmig_model.backend.soft.module import Profile
from tdxmig_model.conformance.twin import Call, Twin
from tdxmig_model.errors import ModelError
from tdxmig_model.expr import System
from tdxmig_model.model.memory import MEMORY


def _row(name: str, **values: int) -> Call:
    return Call((name,), values)


_S0: Final = {"stream": 0}
_S1: Final = {"stream": 1}
MIGRATION: Final = (
    _row("source_mig_stream_create"),
    _row("destination_mig_stream_create"),
    _row("source_set_migration_key"),
    _row("destination_set_migration_key"),
    _row("vp_enter"),
    _row("guest_write", p=0),
    _row("export_state_immutable"),
    _row("import_state_immutable", m=0),
    _row("export_blockw", p=0),
    _row("export_blockw", p=1),
    _row("mem_track"),
    _row("vp_exit_previous"),
    _row("export_mem_begin", **_S0),
    _row("export_mem_migrate", **_S0, p=0),
    _row("export_mem_migrate", **_S0, p=1),
    _row("export_mem_end", **_S0),
    _row("import_mem_begin", **_S0, m=1),
    _row("import_mem_migrate", **_S0, p=0),
    _row("import_mem_migrate_pending", **_S0, p=1),
    _row("import_mem_end", **_S0),
    _row("export_unblockw", p=0),
    _row("vp_enter"),
    _row("guest_write", p=0),
    _row("vp_exit"),
    _row("export_track"),
    _row("import_track", m=2),
    _row("export_blockw", p=0),
    _row("mem_track"),
    _row("export_mem_begin", **_S1),
    _row("export_mem_remigrate", **_S1, p=0),
    _row("export_mem_failed_entry", **_S1),
    _row("export_mem_end", **_S1),
    _row("import_mem_begin", **_S1, m=3),
    _row("import_mem_remigrate", **_S1, p=0),
    _row("import_mem_nop", **_S1),
    _row("import_mem_end", **_S1),
    _row("export_pause"),
    _row("export_track"),
    _row("import_track", m=4),
    _row("export_mem_begin", **_S0),
    _row("export_mem_cancel", **_S0, p=0),
    _row("export_mem_end", **_S0),
    _row("import_mem_begin", **_S0, m=5),
    _row("import_mem_cancel", **_S0, p=0),
    _row("import_mem_end", **_S0),
    _row("export_state_td"),
    _row("import_state_td", m=6),
    _row("export_state_vp", **_S1, v=0),
    _row("import_state_vp", **_S1, m=7, v=0),
    _row("export_track_start"),
    _row("import_track_start", m=8),
    _row("export_mem_begin", **_S1),
    _row("export_mem_out_of_order", **_S1, p=0),
    _row("export_mem_out_of_order", **_S1, p=1),
    _row("export_mem_end", **_S1),
    _row("import_mem_begin", **_S1, m=9),
    _row("import_commit"),
    _row("import_mem_migrate", **_S1, p=0),
    _row("import_mem_nop", **_S1),
    _row("import_mem_end", **_S1),
    _row("destination_vp_enter"),
    _row("import_end"),
)
"""A migration with two streams, a page that is not accepted, a cancelled one, and post-copy."""

MILESTONES: Final = {
    "fresh": 0,
    "live": 9,
    "a vCPU inside": 11,
    "export under way": 14,
    "import under way": 18,
    "dirty": 24,
    "paused": 37,
    "cancelled": 45,
    "state": 48,
    "start token": 50,
    "post-copy": 56,
    "committed": 58,
    "over": 62,
}
"""How far the migration is, in calls."""


def _export(stream: int, kind: str, page: int) -> tuple[Call, ...]:
    """A bundle of one entry."""
    return (
        _row("export_mem_begin", stream=stream),
        _row(f"export_mem_{kind}", stream=stream, p=page),
        _row("export_mem_end", stream=stream),
    )


def _import(stream: int, m: int, kind: str, page: int) -> tuple[Call, ...]:
    return (
        _row("import_mem_begin", stream=stream, m=m),
        _row(f"import_mem_{kind}", stream=stream, p=page),
        _row("import_mem_end", stream=stream),
    )


_SESSION: Final = (*MIGRATION[:4], _row("export_state_immutable"))
_PAUSED: Final = (*_SESSION, _row("import_state_immutable", m=0), _row("export_pause"))
_EPOCH_1: Final = (*_PAUSED, _row("export_track"), _row("import_track", m=1))
_CANCELLED_AND_SENT: Final = (
    *_EPOCH_1,
    *_export(0, "migrate", 0),
    *_import(0, 2, "migrate", 0),
    _row("export_track"),
    _row("import_track", m=3),
    *_export(0, "cancel", 0),
    *_export(1, "migrate", 0),
)
_STATE: Final = (_row("export_state_td"), _row("export_state_vp", **_S0, v=0))

SCENES: Final[dict[str, tuple[Call, ...]]] = {
    "aborted": (
        *_PAUSED,
        *_export(0, "migrate", 0),
        _row("export_abort"),
        _row("source_set_migration_key"),
    ),
    "again in one epoch": (
        *_PAUSED,
        *_export(0, "migrate", 0),
        _row("export_unblockw", p=0),
        *_export(0, "remigrate", 0),
        *_import(0, 1, "migrate", 0),
        _row("import_mem_begin", **_S0, m=2),
    ),
    "taken back in one epoch": (
        *_PAUSED,
        *_export(0, "migrate", 0),
        *_export(0, "cancel", 0),
        *_import(0, 1, "migrate", 0),
        _row("import_mem_begin", **_S0, m=2),
    ),
    "newer before older": (
        *_EPOCH_1,
        *_export(0, "migrate", 0),
        _row("export_unblockw", p=0),
        *_export(1, "remigrate", 0),
        _row("import_mem_begin", **_S1, m=3),
    ),
    "taken back before it came": (
        *_EPOCH_1,
        *_export(0, "migrate", 0),
        *_export(1, "cancel", 0),
        _row("import_mem_begin", **_S1, m=3),
    ),
    "a copy is still there": (*_CANCELLED_AND_SENT, _row("import_mem_begin", **_S1, m=5)),
    "taken back just now": (
        *_CANCELLED_AND_SENT,
        *_import(0, 4, "cancel", 0),
        _row("import_mem_begin", **_S1, m=5),
    ),
    "a bundle is missing": (
        *_PAUSED,
        *_export(1, "migrate", 0),
        *_STATE,
        _row("import_state_td", m=2),
        _row("import_state_vp", **_S0, m=3, v=0),
        _row("export_track_start"),
    ),
    "not accepted yet": (
        *_PAUSED,
        *_export(0, "migrate", 1),
        *_import(0, 1, "migrate_pending", 1),
        _row("export_unblockw", p=1),
        _row("export_track"),
        _row("import_track", m=2),
        *_export(0, "remigrate", 1),
        _row("import_mem_begin", **_S0, m=3),
    ),
    "another session": (*_SESSION, _row("export_abort"), _row("source_set_migration_key")),
    "two vCPUs": (
        *_PAUSED,
        *_STATE,
        _row("export_state_vp", **_S0, v=1),
        _row("import_state_td", m=1),
        _row("import_state_vp", **_S0, m=2, v=0),
    ),
}
"""What a host may do otherwise, each up to the call that a module refuses for one reason."""

PUBLISHED_SCENES: Final[dict[str, tuple[Call, ...]]] = {
    "an epoch later": (*_SESSION, _row("export_mem_begin", **_S1), _row("export_track")),
}
"""The same, where hardened refuses a call on the way."""


def begin(profile: Profile, system: System | None = None, vcpus: int = 1) -> Twin:
    """A pair of two pages, one of them not accepted, before the migration.

    `system` is the memory model under the profile, or a mutant of it.  Of three streams one is
    there, and one is never created.
    """
    part = system or MEMORY.under(profile)
    return Twin(part, profile, streams=3, pending=1, vcpus=vcpus)


def scene(name: str, profile: Profile, system: System | None = None) -> Twin:
    """A pair at the end of a scene.  ModelError if it does not get there."""
    twin = begin(profile, system, vcpus=2 if name == "two vCPUs" else 1)
    for call in scenes(profile)[name]:
        go_on(twin, call)
    return twin


def scenes(profile: Profile) -> dict[str, tuple[Call, ...]]:
    """The scenes of a profile."""
    return SCENES if profile == "hardened" else {**SCENES, **PUBLISHED_SCENES}


def at(milestone: str, profile: Profile, system: System | None = None) -> Twin:
    """A pair at a milestone of the migration.  ModelError if it does not get there."""
    twin = begin(profile, system)
    for call in MIGRATION[: MILESTONES[milestone]]:
        go_on(twin, call)
    return twin


def go_on(twin: Twin, call: Call) -> None:
    """A call that both must accept; ModelError otherwise."""
    outcome = twin.attempt(call)
    if outcome.kind != "accepted":
        raise ModelError(f"the migration does not go on: {call} is refused, {outcome.answer}")
