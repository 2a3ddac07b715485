"""One short spelling of WireError for the decoders."""

from __future__ import annotations

from tdxmig_model.errors import WireError


def fault(message: str, offset: int, field: str, value: object, bound: str) -> WireError:
    """The error for `field` at byte `offset`, which holds `value` and may hold `bound`."""
    return WireError(message, offset=offset, field=field, value=value, bound=bound)
