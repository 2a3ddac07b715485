"""What a bundle made the module do that hardware would do with memory it must not touch.

In the profile "tdx-1.5.01" published weaknesses of the metadata parser are reached as published;
the read or the use that would do harm is not performed, and a finding says what it would have been.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One harmful act that was not performed: which, in which leaf (TDH.*), and its particulars."""

    kind: Literal["out_of_range_read", "required_field_not_written"]
    leaf: str
    detail: str
