"""What a backend may let one see, and the model's variables for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tdxmig_model.expr import EnumType
from tdxmig_model.monitor import Monitor

# Keys of `Backend.observe`; the model's variable has the side before the name.
SCALARS: Final = {
    "source": (
        "op_state",
        "mig_dec_key_set",
        "num_migs",
        "mig_epoch",
        "total_mb_count",
        "export_count",
        "mig_count",
        "dirty_count",
        "td_epoch",
        "bw_epoch",
    ),
    "destination": (
        "op_state",
        "mig_dec_key_set",
        "num_migs",
        "mig_epoch",
        "total_mb_count",
        "num_migrated_vcpus",
    ),
}
MAPS: Final = {"source": ("next_mb_counter",), "destination": ("expected_mb_counter",)}


def adopt(monitor: Monitor, side: str, seen: Mapping[str, Any]) -> None:
    """Set one side's variables to what a backend showed, by the names of `Backend.observe`."""
    for key in SCALARS[side]:
        if key in seen:
            name = f"{side}_{key}"
            kind = monitor.system.variable(name).kind
            value = seen[key]
            monitor[name] = kind.position(str(value)) if isinstance(kind, EnumType) else value
    for key in MAPS[side]:
        if key in seen:
            values = monitor[f"{side}_{key}"]
            values[:] = seen[key][: len(values)]
