"""Wire records that are ours: HELLO, the return path, and the abort of the source.

QEMU's TDX framing has no session id, no negotiation, and no way to tell the other side that an
import or an export failed.  These messages add that.  All numbers are big-endian::

    return path    be16 type, be16 length, payload               (QEMU's return-path framing)
    forward path   0x54, be16 type, be16 length, payload

HELLO opens both directions; nothing else here is sent to a peer that did not send one.  CHANNEL
opens each further connection of a source that was told to use several.
specs/extensions.md has the layout tables and says what a peer without them does.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, TypeAlias, cast

from tdxmig_model.wire.constants import ADDRESS_BITS, MAX_FORWARD_STREAMS, MBMD_SIZE
from tdxmig_model.wire.fault import fault
from tdxmig_model.wire.incremental import IncrementalParser, Needs
from tdxmig_model.wire.mbmd import BundleType, Mbmd

EXTENSION_MARK: Final = 0x54
"""First byte of a forward-path message: no section byte, RAM record or TDX header begins so."""

HELLO_VERSION: Final = 1
SESSION_ID_SIZE: Final = 16
DIGEST_SIZE: Final = 32
MAX_REASON_SIZE: Final = 1024
"""Bytes of UTF-8 in the reason of FAILED and SOURCE_ABORT."""

MAX_REQUESTED_PAGES: Final = 512
"""GPAs in one PAGE_REQUEST."""

MAX_PAGES: Final = 1 << (ADDRESS_BITS - 12)
MAX_VCPUS: Final = 0xFFFF

_FRAME: Final = struct.Struct(">HH")
_HELLO: Final = struct.Struct(">HHIQII16s")
_CHANNEL: Final = struct.Struct(">H16s")
_GPA_SIZE: Final = 8
_UNUSABLE_GPA: Final = 0xFFF | ((1 << 64) - (1 << ADDRESS_BITS))


class MessageType(IntEnum):
    """Type field of a message; outside the range of QEMU's own return-path messages."""

    HELLO = 0x5401
    SESSION_STARTED = 0x5402
    ABORT_TOKEN = 0x5403
    COMMITTED = 0x5404
    FAILED = 0x5405
    SOURCE_ABORT = 0x5406
    IN_ORDER_DONE = 0x5407
    CHANNEL = 0x5408
    PAGE_REQUEST = 0x5409


class Capability(IntFlag):
    """What a side can do.  Both sides use what both named; unknown bits are kept and ignored."""

    BATCH = 1
    """Memory bundles of more than one page."""
    CANCEL = 2
    """Memory records whose GPA list entries say CANCEL."""
    RETURN_PATH = 4
    """SESSION_STARTED, ABORT_TOKEN, COMMITTED and FAILED on the return path."""
    SOURCE_ABORT = 8
    """SOURCE_ABORT on the forward path."""
    POST_COPY = 16
    """Memory records after the start token, and PAGE_REQUEST on the return path."""
    IN_ORDER_DONE = 32
    """IN_ORDER_DONE on the return path, before the start token."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of both directions.

    `session_id` is 16 bytes of the source's choice, returned by the destination; `page_count`
    counts private 4 KiB pages of the TD, `streams` forward streams (1 to 511).
    """

    session_id: bytes
    capabilities: Capability
    page_count: int
    vcpu_count: int
    streams: int
    version: int = HELLO_VERSION


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """The destination has imported the immutable state: its keys now belong to this session."""


@dataclass(frozen=True, slots=True)
class AbortToken:
    """The abort token of TDH.IMPORT.ABORT; the TDX module of the source checks it."""

    mbmd: Mbmd


@dataclass(frozen=True, slots=True)
class InOrderDone:
    """The destination has imported the last vCPU state: it lives, and only the start token is
    missing."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The destination has committed.  `digest` is empty or 32 bytes (SHA-256 of its memory)."""

    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Failed:
    """The destination failed before it committed; `reason` is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class SourceAbort:
    """The source ended the migration session; `reason` is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class ChannelOpen:
    """First message of each connection after the first: the session, and which channel it is
    (1 to 510; the first connection is channel 0)."""

    channel: int
    session_id: bytes


@dataclass(frozen=True, slots=True)
class PageRequest:
    """Pages that the guest waits for at the destination: 1 to 512 GPAs."""

    gpas: tuple[int, ...]


ReturnMessage: TypeAlias = (
    Hello | SessionStarted | InOrderDone | AbortToken | Committed | Failed | PageRequest
)
Message: TypeAlias = ReturnMessage | SourceAbort
ForwardMessage: TypeAlias = Hello | SourceAbort

FORWARD_TYPES: Final = frozenset({MessageType.HELLO, MessageType.SOURCE_ABORT})
RETURN_TYPES: Final = frozenset(MessageType) - {MessageType.SOURCE_ABORT, MessageType.CHANNEL}
CHANNEL_OPEN_SIZE: Final = 1 + _FRAME.size + _CHANNEL.size
"""Bytes of a `ChannelOpen` with its mark."""

_LENGTHS: Final = {
    MessageType.HELLO: (_HELLO.size, _HELLO.size),
    MessageType.SESSION_STARTED: (0, 0),
    MessageType.ABORT_TOKEN: (MBMD_SIZE, MBMD_SIZE),
    MessageType.COMMITTED: (0, DIGEST_SIZE),
    MessageType.FAILED: (0, MAX_REASON_SIZE),
    MessageType.SOURCE_ABORT: (0, MAX_REASON_SIZE),
    MessageType.IN_ORDER_DONE: (0, 0),
    MessageType.PAGE_REQUEST: (_GPA_SIZE, MAX_REQUESTED_PAGES * _GPA_SIZE),
}


def printable_reason(text: str) -> str:
    """`text` as a reason may be: one line, printable, at most 1024 bytes of UTF-8.

    White space becomes single spaces, other characters that do not print become "?", and what is
    too long is cut.  A reason from a peer ends up on a terminal.
    """
    line = " ".join(text.split())
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line.encode()[:MAX_REASON_SIZE].decode(errors="ignore")


def encode_forward(message: ForwardMessage) -> bytes:
    """A message for the forward path.  Raises WireError when it does not belong there."""
    return bytes((EXTENSION_MARK,)) + _encode(message, FORWARD_TYPES)


def encode_return(message: ReturnMessage) -> bytes:
    """A message for the return path.  Raises WireError when it does not belong there."""
    return _encode(message, RETURN_TYPES)


def encode_channel(opening: ChannelOpen) -> bytes:
    """How a further connection begins.  Raises WireError on another number or session id."""
    _check_channel(opening, 0)
    payload = _CHANNEL.pack(opening.channel, opening.session_id)
    return bytes((EXTENSION_MARK,)) + _FRAME.pack(MessageType.CHANNEL, len(payload)) + payload


def decode_channel(data: bytes) -> ChannelOpen:
    """Decode the first `CHANNEL_OPEN_SIZE` bytes of a further connection.  Raises WireError."""
    if len(data) != CHANNEL_OPEN_SIZE:
        raise fault("CHANNEL", 0, "length", f"{len(data)} bytes", f"{CHANNEL_OPEN_SIZE} bytes")
    head = bytes((EXTENSION_MARK,)) + _FRAME.pack(MessageType.CHANNEL, _CHANNEL.size)
    if data[: len(head)] != head:
        raise fault("CHANNEL", 0, "head", data[: len(head)].hex(), head.hex())
    opening = ChannelOpen(*_CHANNEL.unpack(data[len(head) :]))
    _check_channel(opening, len(head))
    return opening


def _check_channel(opening: ChannelOpen, at: int) -> None:
    if not 1 <= opening.channel < MAX_FORWARD_STREAMS:
        bound = f"1 to {MAX_FORWARD_STREAMS - 1}"
        raise fault("CHANNEL", at, "channel", opening.channel, bound)
    if len(opening.session_id) != SESSION_ID_SIZE:
        length = f"{len(opening.session_id)} bytes"
        raise fault("CHANNEL", at + 2, "session_id", length, f"{SESSION_ID_SIZE} bytes")


class ReturnPathParser(IncrementalParser[ReturnMessage]):
    """Decodes the return path, from the destination to the source."""

    def _parse(self) -> Generator[int | ReturnMessage, memoryview, None]:
        while True:
            frame = yield _FRAME.size
            message = yield from _parse_payload(frame, self.offset, RETURN_TYPES)
            yield cast(ReturnMessage, message)


def parse_forward(offset: int, *types: MessageType) -> Needs[ForwardMessage]:
    """Decode one forward-path message of `types`, of which the mark at `offset` has been read."""
    allowed = FORWARD_TYPES.intersection(types or FORWARD_TYPES)
    frame = yield _FRAME.size
    return cast(ForwardMessage, (yield from _parse_payload(frame, offset + 1, allowed)))


def _parse_payload(
    frame: memoryview, offset: int, allowed: frozenset[MessageType]
) -> Needs[Message]:
    """Decode the message whose type and length, at `offset`, are `frame`."""
    number, length = _FRAME.unpack(frame)
    if number not in allowed:
        known = ", ".join(f"{member:#06x} {member.name}" for member in sorted(allowed))
        raise fault("message", offset, "type", hex(number), f"one of {known}")
    message_type = MessageType(number)
    least, most = _LENGTHS[message_type]
    if not least <= length <= most:
        raise fault(message_type.name, offset + 2, "length", length, f"{least} to {most}")
    payload = bytes((yield length)) if length else b""
    return _decode(message_type, payload, offset + _FRAME.size)


def _encode(message: Message, allowed: frozenset[MessageType]) -> bytes:
    message_type, payload = _payload(message)
    if message_type not in allowed:
        bound = " or ".join(member.name for member in sorted(allowed))
        raise fault("message on the wrong path", 0, "type", message_type.name, bound)
    return _FRAME.pack(message_type, len(payload)) + payload


def _payload(message: Message) -> tuple[MessageType, bytes]:
    match message:
        case Hello():
            return MessageType.HELLO, _hello_payload(message)
        case SessionStarted():
            return MessageType.SESSION_STARTED, b""
        case InOrderDone():
            return MessageType.IN_ORDER_DONE, b""
        case AbortToken(mbmd):
            payload = mbmd.pack()
            _decode(MessageType.ABORT_TOKEN, payload, 0)
            return MessageType.ABORT_TOKEN, payload
        case Committed(digest):
            _check_digest(digest, 0)
            return MessageType.COMMITTED, bytes(digest)
        case Failed(reason):
            return MessageType.FAILED, printable_reason(reason).encode()
        case SourceAbort(reason):
            return MessageType.SOURCE_ABORT, printable_reason(reason).encode()
        case PageRequest(gpas):
            _check_request(gpas, 0)
            return MessageType.PAGE_REQUEST, struct.pack(f">{len(gpas)}Q", *gpas)
    raise fault("message", 0, "type", type(message).__name__, "a message of this module")


def _hello_payload(hello: Hello) -> bytes:
    _check_hello(hello, 0)
    capabilities = int(hello.capabilities)
    if not 0 <= capabilities <= 0xFFFFFFFF:
        raise fault("HELLO", 4, "capabilities", capabilities, "u32")
    return _HELLO.pack(
        hello.version,
        hello.streams,
        capabilities,
        hello.page_count,
        hello.vcpu_count,
        0,
        hello.session_id,
    )


def _check_hello(hello: Hello, at: int) -> None:
    if hello.version != HELLO_VERSION:
        raise fault("HELLO", at, "version", hello.version, str(HELLO_VERSION))
    for field, offset, least, most in (
        ("streams", 2, 1, MAX_FORWARD_STREAMS),
        ("page_count", 8, 0, MAX_PAGES),
        ("vcpu_count", 16, 1, MAX_VCPUS),
    ):
        value: int = getattr(hello, field)
        if not least <= value <= most:
            raise fault("HELLO", at + offset, field, value, f"{least} to {most}")
    if len(hello.session_id) != SESSION_ID_SIZE:
        length = len(hello.session_id)
        raise fault("HELLO", at + 24, "session_id", f"{length} bytes", f"{SESSION_ID_SIZE} bytes")


def _check_request(gpas: tuple[int, ...], at: int) -> None:
    if not 1 <= len(gpas) <= MAX_REQUESTED_PAGES:
        raise fault("PAGE_REQUEST", at, "pages", len(gpas), f"1 to {MAX_REQUESTED_PAGES}")
    for index, gpa in enumerate(gpas):
        if gpa & _UNUSABLE_GPA or gpa < 0:
            bound = f"4 KiB aligned, below 2**{ADDRESS_BITS}"
            raise fault("PAGE_REQUEST", at + _GPA_SIZE * index, "gpa", hex(gpa), bound)


def _decode_request(payload: bytes, at: int) -> PageRequest:
    if len(payload) % _GPA_SIZE:
        raise fault("PAGE_REQUEST", at - 2, "length", len(payload), f"a multiple of {_GPA_SIZE}")
    gpas = struct.unpack(f">{len(payload) // _GPA_SIZE}Q", payload)
    _check_request(gpas, at)
    return PageRequest(gpas)


def _check_digest(digest: bytes, at: int) -> None:
    if len(digest) not in (0, DIGEST_SIZE):
        length = f"{len(digest)} bytes"
        raise fault("COMMITTED", at, "digest", length, f"0 or {DIGEST_SIZE} bytes")


def _decode(message_type: MessageType, payload: bytes, at: int) -> Message:
    match message_type:
        case MessageType.HELLO:
            return _decode_hello(payload, at)
        case MessageType.SESSION_STARTED:
            return SessionStarted()
        case MessageType.IN_ORDER_DONE:
            return InOrderDone()
        case MessageType.ABORT_TOKEN:
            mbmd = Mbmd.unpack(payload, stream_offset=at)
            if mbmd.bundle_type is not BundleType.ABORT_TOKEN:
                name = mbmd.bundle_type.name
                raise fault("ABORT_TOKEN", at + 6, "bundle_type", name, "ABORT_TOKEN")
            return AbortToken(mbmd)
        case MessageType.COMMITTED:
            _check_digest(payload, at)
            return Committed(payload)
        case MessageType.FAILED:
            return Failed(_decode_reason("FAILED", payload, at))
        case MessageType.SOURCE_ABORT:
            return SourceAbort(_decode_reason("SOURCE_ABORT", payload, at))
        case MessageType.PAGE_REQUEST:
            return _decode_request(payload, at)
        case MessageType.CHANNEL:  # it opens a connection and is no message of a path
            raise fault("message", at, "type", hex(message_type), "a message of this path")


def _decode_hello(payload: bytes, at: int) -> Hello:
    version, streams, bits, pages, vcpus, reserved, session_id = _HELLO.unpack(payload)
    if reserved:
        raise fault("HELLO", at + 20, "reserved", reserved, "0")
    hello = Hello(session_id, Capability(bits), pages, vcpus, streams, version)
    _check_hello(hello, at)
    return hello


def _decode_reason(name: str, payload: bytes, at: int) -> str:
    try:
        reason = payload.decode()
    except UnicodeDecodeError as error:
        raise fault(name, at + error.start, "reason", payload[:16].hex(), "UTF-8") from None
    if reason != printable_reason(reason):
        raise fault(name, at, "reason", ascii(reason)[:80], "one line of printable text")
    return reason
