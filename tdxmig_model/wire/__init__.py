"""Bytes and records of TDX live migration; no policy and no I/O.

Decoding raises WireError and nothing else, whatever the bytes.
"""

from tdxmig_model.wire.constants import (
    GPA_ENTRY_SIZE,
    MAC_SIZE,
    MAX_ENTRIES,
    MAX_STREAMS,
    MBMD_SIZE,
    PAGE_SIZE,
    START_EPOCH,
)
from tdxmig_model.wire.extensions import (
    AbortToken,
    Capability,
    Committed,
    Failed,
    Hello,
    InOrderDone,
    ReturnMessage,
    ReturnPathParser,
    SessionStarted,
    SourceAbort,
    encode_return,
)
from tdxmig_model.wire.gpa_list import (
    GpaEntry,
    GpaListInfo,
    GpaOperation,
    GpaStatus,
    PageListInfo,
)
from tdxmig_model.wire.mbmd import BundleType, Mbmd, iv_bytes
from tdxmig_model.wire.records import (
    Bundle,
    EndSection,
    EpochRecord,
    Footer,
    MemoryRecord,
    MigrationHeader,
    RamFlags,
    Record,
    RecordParser,
    StartSection,
    encode,
)

__all__ = [
    "GPA_ENTRY_SIZE",
    "MAC_SIZE",
    "MAX_ENTRIES",
    "MAX_STREAMS",
    "MBMD_SIZE",
    "PAGE_SIZE",
    "START_EPOCH",
    "AbortToken",
    "Bundle",
    "BundleType",
    "Capability",
    "Committed",
    "EndSection",
    "EpochRecord",
    "Failed",
    "Footer",
    "GpaEntry",
    "GpaListInfo",
    "GpaOperation",
    "GpaStatus",
    "Hello",
    "InOrderDone",
    "Mbmd",
    "MemoryRecord",
    "MigrationHeader",
    "PageListInfo",
    "RamFlags",
    "Record",
    "RecordParser",
    "ReturnMessage",
    "ReturnPathParser",
    "SessionStarted",
    "SourceAbort",
    "StartSection",
    "encode",
    "encode_return",
    "iv_bytes",
]
