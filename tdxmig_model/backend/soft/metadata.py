"""Metadata lists of migration state bundles: building them on export, parsing them on import.

Format and checks are facts of the Intel TDX module, public source under the MIT licence, tag
TDX_1.5.01 (metadata_generic.c and the leaves TDH.EXPORT.STATE.* and TDH.IMPORT.STATE.*).

One list per 4 KiB page: an 8-byte header (LIST_BUFF_SIZE u16 with the header included,
NUM_SEQUENCES u16, reserved u32 = 0), then sequences of an 8-byte header and one 8-byte slot per
element, then zeros.  The bytes of a page are authenticated only after all pages were parsed, so the
parser remembers the first error with two extended words; the leaf reports it when the MAC holds.

`hardened=True` parses with every bound checked.  `hardened=False` reproduces two published
weaknesses of 1.5.01 without doing harm: a LIST_BUFF_SIZE below the header wraps the remaining size
(CVE-2025-32007), and a required field under write mask 0 counts as present ("eddie", Google
security-research, tdxploits).  Reads outside the list are reported, and those outside the page are
not performed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from tdxmig_model.backend.soft.fields import (
    CONTEXT_CODES,
    FIELDS,
    ITEMS,
    MAX_CPUID_VALUES,
    MAX_L2_VMS,
    NO_FIELD,
    ROWS,
    Field,
    Item,
    identifier_key,
)
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import PAGE_SIZE, ByteBuffer

Scope: TypeAlias = Literal["immutable", "td", "vp"]
Value: TypeAlias = int | tuple[int, ...]
"""An element, or all elements of a field array in order."""

Validate: TypeAlias = Callable[[Field, int, tuple[int, ...]], int]
"""(row, index of the field in the row, its elements) -> 0, or the status that refuses the value."""

Store: TypeAlias = Callable[[Field, int, tuple[int, ...], int], int]
"""The same with the write mask of the sequence; it also writes the field."""

LIST_HEADER_SIZE: Final = 8
SLOT_SIZE: Final = 8

OPERAND_INVALID: Final = 0xC000_0100_0000_0000
FIELD_ID_INCORRECT: Final = 0xC000_0C00_0000_0000
FIELD_VALUE_NOT_VALID: Final = 0xC000_0C03_0000_0000
LIST_OVERFLOW: Final = 0xC000_0C04_0000_0000
INVALID_LIST_HEADER: Final = 0xC000_0C05_0000_0000
REQUIRED_FIELD_MISSING: Final = 0xC000_0C06_0000_0000
OPERAND_PAGE: Final = 95
_LIST_DETAILS: Final = 0xFFFF_0000
"""High details half of errors that concern a sequence; the low half is the sequence's number."""

_RESERVED_BITS: Final = 0x4083_8000_FF00_0000
_WRITE_MASK_VALID: Final = 1 << 51
_ALL_ONES: Final = NO_FIELD
_PAGES_AT_MOST: Final = 512
_LIST_HEADER: Final = struct.Struct("<HHI")
_SLOT: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class ParseError:
    """The first error of a bundle: status (FATAL bit not set), extended words for RCX and RDX."""

    status: int
    extended: tuple[int, int] = (0, 0)
    page: int = 0


@dataclass(frozen=True, slots=True)
class OutOfRangeRead:
    """A read past LIST_BUFF_SIZE that 1.5.01 performs; offset, length and list size in bytes."""

    page: int
    offset: int
    length: int
    list_size: int

    @property
    def beyond_page(self) -> bool:
        """Whether the read leaves the page buffer; such a read is never performed here."""
        return self.offset + self.length > PAGE_SIZE


@dataclass(frozen=True, slots=True)
class ParseResult:
    """What an import took from a bundle.

    `values` are the fields that were written in full, under their import masks.  `ignored` are
    those present but not written: SYS fields, fields that the importer computes, and in 1.5.01
    fields under write mask 0.  `error` is None when every page parsed.
    """

    values: Mapping[str, Value]
    error: ParseError | None
    ignored: frozenset[str] = frozenset()
    out_of_range_reads: tuple[OutOfRangeRead, ...] = ()

    @property
    def not_written(self) -> frozenset[str]:
        """Required fields that are present and were not written in full."""
        return frozenset(
            name
            for name in self.ignored
            if FIELDS[name].required and FIELDS[name].import_mask and FIELDS[name].scope != "sys"
        )

    def integer(self, name: str) -> int:
        """The value of a one-element field; KeyError if it was not written."""
        value = self.values[name]
        if isinstance(value, tuple):
            raise UsageError(f"{name} has {len(value)} elements; read it from `values`")
        return value


def initial_values(scope: Scope) -> dict[str, Value]:
    """Zeros for every field that an export of this scope writes, and NUM_CPUID_VALUES as fixed.

    CPUID leaves are left out: a TD exports those that are valid for it.
    """
    values: dict[str, Value] = {}
    for row in _rows(scope):
        if row.name.startswith("CPUID_") and row.scope == "immutable":
            continue
        values[row.name] = 0 if row.slots == 1 else (0,) * row.slots
    if "NUM_CPUID_VALUES" in values:
        values["NUM_CPUID_VALUES"] = MAX_CPUID_VALUES
    return values


def _rows(scope: Scope) -> tuple[Field, ...]:
    return ROWS["sys"] + ROWS["immutable"] if scope == "immutable" else ROWS[scope]


# --- export ---------------------------------------------------------------------------------


def build_lists(
    scope: Scope,
    values: Mapping[str, Value],
    *,
    max_pages: int = _PAGES_AT_MOST,
    list_size: int = PAGE_SIZE,
) -> list[bytes]:
    """The metadata pages of a bundle, 4096 bytes each; for "immutable" one SYS page comes first.

    A field absent from `values` is left out, which only optional ones may be.  Raises UsageError
    for a name of no such field, a missing required field, a value of the wrong shape or width, or
    when more than `max_pages` pages are needed (the module says TDX_OPERAND_INVALID|R9 there).

    `list_size` is the largest LIST_BUFF_SIZE in bytes.  The module fills pages; a smaller size puts
    the state on more pages, as an importer must also expect from a sender of its own making.  A
    page cannot begin with an optional field: the importer has stepped over it by then.
    """
    longest = max(row.elements for row in FIELDS.values())
    if not LIST_HEADER_SIZE + SLOT_SIZE * (1 + longest) <= list_size <= PAGE_SIZE:
        raise UsageError(f"a list of {list_size} bytes cannot hold every field of a page")
    known = {row.name for row in _rows(scope)}
    for name in values:
        if name not in known:
            raise UsageError(f"{name!r} is not a field of {scope} state")
    contexts = ("sys", "immutable") if scope == "immutable" else (scope,)
    pages: list[bytes] = []
    for context in contexts:
        pages += _dump(_present_items(context, values), list_size)
    if len(pages) > max_pages:
        raise UsageError(f"{scope} state needs {len(pages)} pages, {max_pages} are offered")
    return pages


def _present_items(context: str, values: Mapping[str, Value]) -> list[tuple[Item, bytes]]:
    words = {row.name: _words(row, values) for row in ROWS[context]}
    present: list[tuple[Item, bytes]] = []
    for item in ITEMS[context]:
        row = item.field
        row_words = words[row.name]
        if row_words:
            start = item.index * row.elements
            chunk = row_words[start : start + row.elements]
            present.append((item, struct.pack(f"<{row.elements}Q", *chunk)))
    return present


def _words(row: Field, values: Mapping[str, Value]) -> tuple[int, ...]:
    if row.name not in values:
        if row.required:
            raise UsageError(f"{row.name} is required in {row.scope} state and has no value")
        return ()
    value = values[row.name]
    words = value if isinstance(value, tuple) else (value,)
    if len(words) != row.slots:
        raise UsageError(f"{row.name} takes {row.slots} elements, not {len(words)}")
    for word in words:
        if not 0 <= word <= row.size_mask:
            raise UsageError(
                f"{row.name} takes {row.element_size_bytes}-byte elements, not {word:#x}"
            )
    return tuple(word & row.export_mask for word in words)


def _dump(present: Sequence[tuple[Item, bytes]], list_size: int) -> list[bytes]:
    """Lists in the module's layout: a sequence ends where the next field is not its neighbour."""
    pages: list[bytes] = []
    position = 0
    while position < len(present):
        body = bytearray()
        sequences = 0
        room = list_size - LIST_HEADER_SIZE
        while position < len(present):
            if room - len(body) < SLOT_SIZE + len(present[position][1]):
                break
            count, slots = _take_sequence(present, position, room - len(body) - SLOT_SIZE)
            body += _SLOT.pack(_sequence_header(present[position][0], count))
            body += slots
            position += count
            sequences += 1
        header = _LIST_HEADER.pack(LIST_HEADER_SIZE + len(body), sequences, 0)
        pages.append((header + body).ljust(PAGE_SIZE, b"\0"))
    return pages


def _take_sequence(
    present: Sequence[tuple[Item, bytes]], position: int, room: int
) -> tuple[int, bytes]:
    slots = bytearray()
    count = 0
    while position + count < len(present):
        item, data = present[position + count]
        if count and not _continues(present[position + count - 1][0], item):
            break
        if len(slots) + len(data) > room:
            break
        slots += data
        count += 1
    return count, bytes(slots)


def _continues(previous: Item, item: Item) -> bool:
    return (
        item.key == previous.adjacent
        and item.field.elements == previous.field.elements
        and item.field.element_size_bytes == previous.field.element_size_bytes
    )


def _sequence_header(item: Item, count: int) -> int:
    return item.identifier | (item.field.elements - 1) << 34 | (count - 1) << 38


# --- import ---------------------------------------------------------------------------------


def parse_lists(
    scope: Scope,
    pages: Sequence[ByteBuffer],
    *,
    hardened: bool = True,
    sys_pages: int = 1,
    validate: Validate | None = None,
) -> ParseResult:
    """Parse the decrypted metadata pages of a bundle as TDH.IMPORT.STATE.* does; never raises.

    For "immutable" the first `sys_pages` pages are SYS lists (NUM_SYS_MD_PAGES of the MBMD).
    `validate` judges a value against the importing TD and returns 0 or a status; fixed bounds
    (NUM_CPUID_VALUES, NUM_L2_VMS, element width) are checked before it is asked.

    Later pages are parsed after an error too, as the module does, but `error` stays the first one.
    Identifiers that no state bundle carries are not fields here, so naming one is an error.
    """

    def judge(row: Field, index: int, words: tuple[int, ...], _mask: int) -> int:
        return 0 if validate is None else validate(row, index, words)

    parser = ListParser(scope, hardened=hardened, sys_pages=sys_pages, store=judge)
    for number, page in enumerate(pages):
        parser.parse_page(page, last=number == len(pages) - 1)
    return parser.result()


class _Refusal(Exception):
    """Ends one page; carries the status and extended words, never leaves the module."""

    def __init__(self, status: int, first: int = 0, second: int = 0) -> None:
        self.status = status
        self.extended = (first, second)


@dataclass(slots=True)
class _Page:
    """One list while it is parsed: bytes left as the module counts them, and the read offset."""

    data: bytes
    number: int
    list_size: int
    remaining: int
    offset: int = LIST_HEADER_SIZE
    sequence: int = 0
    hardened: bool = True
    reads: list[OutOfRangeRead] = field(default_factory=list)

    def word(self, offset: int) -> int:
        """The slot at a byte offset; a read past the list is recorded, past the page refused."""
        if offset + SLOT_SIZE > self.list_size:
            read = OutOfRangeRead(self.number, offset, SLOT_SIZE, self.list_size)
            if self.hardened:
                raise _Refusal(LIST_OVERFLOW | _LIST_DETAILS | self.sequence)
            self.reads.append(read)
            if read.beyond_page:
                # The module goes on with whatever lies there; its outcome is not defined.
                raise _Refusal(FIELD_ID_INCORRECT | _LIST_DETAILS | self.sequence)
        word: int = _SLOT.unpack_from(self.data, offset)[0]
        return word


class ListParser:
    """The parser of one bundle, page by page as pages are decrypted, before the tag is known.

    `store` takes each field that passed the fixed checks and returns 0 or a status.  For
    "immutable" the first `sys_pages` pages are SYS lists (NUM_SYS_MD_PAGES of the MBMD).
    """

    def __init__(
        self, scope: Scope, *, hardened: bool = True, sys_pages: int = 1, store: Store | None = None
    ) -> None:
        self.hardened = hardened
        self._scope: str = scope
        self._sys_pages = sys_pages if scope == "immutable" else 0
        self._store = store
        self._pages = 0
        self._cursor: int | None = 0
        self._error: ParseError | None = None
        self._reads: list[OutOfRangeRead] = []
        self._written: dict[str, dict[int, tuple[int, ...]]] = {}
        self._seen: set[str] = set()

    def result(self) -> ParseResult:
        """What the pages so far have written, and the first error; a missing context is one."""
        values: dict[str, Value] = {}
        for name, parts in self._written.items():
            row = FIELDS[name]
            if len(parts) == row.fields:
                words = tuple(word for index in range(row.fields) for word in parts[index])
                values[name] = words[0] if row.slots == 1 else words
        ignored = frozenset(self._seen - values.keys())
        if self._pages <= self._sys_pages:
            first = ITEMS[self._scope][0].identifier
            self._remember(ParseError(REQUIRED_FIELD_MISSING, (first, 0), self._pages))
        return ParseResult(values, self._error, ignored, tuple(self._reads))

    def _remember(self, error: ParseError) -> None:
        """Sticky-error rule: the first error wins."""
        if self._error is None:
            self._error = error

    def parse_page(self, page: ByteBuffer, *, last: bool) -> None:
        """Parse the next page, 4096 bytes; `last` if no other page of the bundle follows.

        After an error the module begins the next page at the first field again, and so does this.
        """
        number = self._pages
        self._pages += 1
        context, final = self._scope, last
        if number < self._sys_pages:
            context, final = "sys", number == self._sys_pages - 1
        self._cursor = self._parse_in(context, page, number, final)

    def _parse_in(self, context: str, page: ByteBuffer, number: int, last: bool) -> int | None:
        """One list from the current field of the context on; the next cursor, None at the end.

        At the end of a context another one begins at its first field.
        """
        try:
            state = self._open(page, number)
        except _Refusal as refusal:
            self._remember(ParseError(refusal.status, refusal.extended, number))
            return 0
        try:
            return self._parse_list(context, state, self._cursor or 0, last)
        except _Refusal as refusal:
            self._remember(ParseError(refusal.status, refusal.extended, number))
            return 0
        finally:
            self._reads += state.reads

    def _open(self, page: ByteBuffer, number: int) -> _Page:
        data = bytes(page)
        if len(data) != PAGE_SIZE:
            raise _Refusal(OPERAND_INVALID | OPERAND_PAGE)
        list_size, sequences, reserved = _LIST_HEADER.unpack_from(data)
        if list_size > PAGE_SIZE:
            if self.hardened:
                raise _Refusal(OPERAND_INVALID | OPERAND_PAGE)
            self._remember(ParseError(OPERAND_INVALID | OPERAND_PAGE, (0, 0), number))
            list_size = PAGE_SIZE
        if sequences == 0 or reserved != 0:
            raise _Refusal(INVALID_LIST_HEADER)
        if list_size < LIST_HEADER_SIZE and self.hardened:
            raise _Refusal(INVALID_LIST_HEADER)
        # 16-bit arithmetic as in 1.5.01: a size below the header wraps to about 64 KiB.
        remaining = (list_size - LIST_HEADER_SIZE) & 0xFFFF
        return _Page(data, number, list_size, remaining, hardened=self.hardened)

    def _parse_list(self, context: str, state: _Page, cursor: int, last: bool) -> int | None:
        items = ITEMS[context]
        sequences = _LIST_HEADER.unpack_from(state.data)[1]
        for number in range(sequences):
            state.sequence = number
            cursor = self._parse_sequence(context, state, cursor)
        while cursor < len(items) and not items[cursor].field.required:
            cursor += 1
        at_end = cursor == len(items)
        if last and not at_end:
            raise _Refusal(REQUIRED_FIELD_MISSING, items[cursor].identifier)
        if at_end and not last:
            raise _Refusal(REQUIRED_FIELD_MISSING, NO_FIELD)
        return None if at_end else cursor

    def _parse_sequence(self, context: str, state: _Page, cursor: int) -> int:
        """One sequence: find its first field, take its fields; the cursor behind the last one."""
        items = ITEMS[context]
        details = _LIST_DETAILS | state.sequence
        if self.hardened and state.remaining < 2 * SLOT_SIZE:
            raise _Refusal(LIST_OVERFLOW | details, _identifier_at(items, cursor))
        header = state.word(state.offset)
        if cursor == len(items) or header >> 52 & 7 != CONTEXT_CODES[context]:
            raise _Refusal(FIELD_ID_INCORRECT | details, header)
        cursor = _find_field(items, cursor, header)
        if state.remaining < 2 * SLOT_SIZE:
            raise _Refusal(LIST_OVERFLOW | details, items[cursor].identifier)
        forbidden = _RESERVED_BITS | (_WRITE_MASK_VALID if self.hardened else 0)
        if header & forbidden:
            raise _Refusal(FIELD_ID_INCORRECT | details, header)
        if (header ^ items[cursor].identifier) >> 32 & 3:
            raise _Refusal(FIELD_ID_INCORRECT + state.sequence, header)
        return self._parse_fields(items, state, cursor, header)

    def _parse_fields(self, items: Sequence[Item], state: _Page, cursor: int, header: int) -> int:
        # The module counts what is left for the sequence in 32 bits, and for the list in 16.
        left = state.remaining - SLOT_SIZE
        first_slot = state.offset + SLOT_SIZE
        slots = 0
        count = (header >> 38 & 0x1FF) + 1
        for number in range(count):
            item = items[cursor]
            write_mask = _ALL_ONES
            if header & _WRITE_MASK_VALID:
                write_mask = state.word(first_slot)
                slots += 1
                left = (left - SLOT_SIZE) & 0xFFFF_FFFF
            size = item.field.elements * SLOT_SIZE
            if left < size:
                status = LIST_OVERFLOW | _LIST_DETAILS | state.sequence
                raise _Refusal(status, item.identifier)
            start = first_slot + slots * SLOT_SIZE
            words = tuple(state.word(start + i * SLOT_SIZE) for i in range(item.field.elements))
            self._take(item, words, write_mask, state.sequence)
            left -= size
            slots += item.field.elements
            cursor += 1
            if number < count - 1 and (
                cursor == len(items) or items[cursor].field.class_code != item.field.class_code
            ):
                raise _Refusal(FIELD_ID_INCORRECT + state.sequence, header)
        state.remaining = (state.remaining - SLOT_SIZE - slots * SLOT_SIZE) & 0xFFFF
        state.offset = first_slot + slots * SLOT_SIZE
        return cursor

    def _take(self, item: Item, words: tuple[int, ...], write_mask: int, sequence: int) -> None:
        """Write a field, or skip it silently where the importer does not write it."""
        row = item.field
        self._seen.add(row.name)
        mask = row.import_mask & write_mask
        if not row.considered or row.scope == "sys" or mask == 0:
            return
        status = _fixed_bounds(row, words, write_mask)
        if status == 0 and self._store is not None:
            status = self._store(row, item.index, words, write_mask)
        if status:
            raise _Refusal(status + sequence, item.identifier)
        self._written.setdefault(row.name, {})[item.index] = tuple(word & mask for word in words)


def _identifier_at(items: Sequence[Item], cursor: int) -> int:
    return items[cursor].identifier if cursor < len(items) else NO_FIELD


def _find_field(items: Sequence[Item], cursor: int, header: int) -> int:
    """The cursor at the field that a header names, stepping over fields that are not required."""
    key = identifier_key(header)
    while cursor < len(items) and items[cursor].key != key and not items[cursor].field.required:
        cursor += 1
    if cursor == len(items) or items[cursor].key != key:
        raise _Refusal(REQUIRED_FIELD_MISSING, _identifier_at(items, cursor))
    return cursor


def _fixed_bounds(row: Field, words: tuple[int, ...], write_mask: int) -> int:
    """Checks that depend on nothing but the value: its width, and the module's constants."""
    if any(word & write_mask & ~row.size_mask for word in words):
        return FIELD_VALUE_NOT_VALID
    if row.name == "NUM_CPUID_VALUES" and words[0] != MAX_CPUID_VALUES:
        return FIELD_VALUE_NOT_VALID
    if row.name == "NUM_L2_VMS" and words[0] > MAX_L2_VMS:
        return FIELD_VALUE_NOT_VALID
    return 0
