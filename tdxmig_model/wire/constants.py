"""Sizes and limits of migration data, as the TDX module 1.5.01 and QEMU's TDX framing define them.

The numbers from the TDX module are facts of its published source.
"""

from __future__ import annotations

from typing import Final, TypeAlias

ByteBuffer: TypeAlias = bytes | bytearray | memoryview
"""Anything that holds plain bytes; multi-dimensional views are not accepted."""

PAGE_SIZE: Final = 4096
"""Bytes of a private page, of a metadata page, and of one buffer of a bundle."""

MBMD_SIZE: Final = 48
"""Bytes of migration bundle metadata (MBMD), the same for every bundle type."""

MAC_SIZE: Final = 16
"""Bytes of an AES-256-GCM tag."""

IV_SIZE: Final = 12
"""Bytes of an AES-GCM initialisation vector."""

GPA_ENTRY_SIZE: Final = 8
"""Bytes of one GPA list entry."""

MAX_ENTRIES: Final = 512
"""Entries of a GPA list or page list; also the most pages that a bundle can have."""

START_EPOCH: Final = 0xFFFFFFFF
"""MIG_EPOCH of the start token and of every bundle of the out-of-order phase."""

MAX_STREAMS: Final = 512
"""Migration streams of a TD: one backward stream and up to 511 forward streams."""

MAX_FORWARD_STREAMS: Final = MAX_STREAMS - 1
"""Forward streams of a TD; their indexes are 0 to 510."""

ADDRESS_BITS: Final = 52
"""Width of the address field of every operand and list entry (GPA and HPA bits 51:12)."""
