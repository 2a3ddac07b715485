"""The arithmetic of metadata lists in its machine widths: no subtraction wraps, no read is outside.

A list is parsed by two nested loops, over its sequences and over the fields of a sequence.  Each
lemma is about one iteration from any state that satisfies the loop's invariant; the lemmas named
*_begins and *_goes_on say that the invariant holds at first and again, so that together they hold
for lists of any length.  The size of a list and what is left of it have 16 bits, what is left for
a sequence has 32, as in the TDX module 1.5.01; tests hold the terms against the parser of the
software module.

The profile decides which checks stand.  tdx-1.5.01 does not compare LIST_BUFF_SIZE with the size
of the header (CVE-2025-32007) and takes write masks; what it lacks is repair R2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.widths import Checks, Lemma, Result, at_least, decide
from tdxmig_model.smt.z3api import Term

PAGE = 4096
HEADER = 8
SLOT = 8
WIDE = 32
SIZE_BITS = 16
"""Bits of LIST_BUFF_SIZE, and of what the module counts as left of a list."""

SENTENCES = {
    "P24": "The list parser reads nothing outside its list, and no subtraction of it wraps.",
    "P26": "Every byte of an exported metadata page has been written: "
    "its header, its sequences and zeros.",
}
"""What the lemmas of each kind say together, by the id of the threat model."""

CHECKS: dict[str, str | None] = {
    "list_size_at_most_page": None,
    "list_size_at_least_header": "R2",
    "sequence_fits_before_read": "R2",
    "sequence_fits": None,
    "no_write_mask": "R2",
    "field_fits": None,
    "room_in_page": None,
    "tail_zeroed": None,
}
"""Every check of the parser and of the exporter, with the repair that adds it (None: published)."""


def _number(value: int, width: int = WIDE) -> Term:
    return z.bits_value(value, width)


def _wide(term: Term) -> Term:
    return z.bits_widened(term, WIDE)


def _minus(term: Term, value: int) -> Term:
    return z.bits_subtract(term, _number(value, z.bits_width(term)))


def _aligned(offset: Term) -> Term:
    """Whether an offset is that of a slot."""
    return z.equal(z.bits_narrowed(offset, 3), _number(0, 3))


def _inside(offset: Term, length: Term, size: Term) -> Term:
    """A read within a list that is within its page; the sum itself does not wrap."""
    end = z.add(offset, length)
    return z.both(
        [
            z.bits_at_most(offset, end),
            z.bits_at_most(end, _wide(size)),
            z.bits_at_most(_wide(size), _number(PAGE)),
        ]
    )


def _between_sequences(offset: Term, remaining: Term, size: Term) -> Term:
    """The invariant of the outer loop: the offset and what is left make the size."""
    return z.both(
        [
            at_least(offset, HEADER),
            _aligned(offset),
            z.bits_at_most(offset, _number(PAGE)),
            z.equal(z.add(offset, _wide(remaining)), _wide(size)),
            z.bits_at_most(_wide(size), _number(PAGE)),
        ]
    )


def _between_fields(first: Term, offset: Term, left: Term, size: Term, has_mask: Term) -> Term:
    """The invariant of the inner loop; `first` is the slot behind the sequence's header.

    Behind it is nothing yet, or a field at least, of one slot and that of its write mask.
    """
    one_field = z.choose(has_mask, _number(2 * SLOT), _number(SLOT))
    return z.both(
        [
            at_least(first, HEADER + SLOT),
            z.bits_at_most(first, offset),
            _aligned(first),
            _aligned(offset),
            z.either([z.equal(offset, first), z.bits_at_most(z.add(first, one_field), offset)]),
            z.bits_at_most(offset, _number(PAGE)),
            z.bits_at_most(left, _number(PAGE)),
            z.equal(z.add(offset, left), _wide(size)),
            z.bits_at_most(z.add(first, _number(SLOT)), _wide(size)),
            z.bits_at_most(_wide(size), _number(PAGE)),
        ]
    )


def _opening(checks: Checks) -> Iterator[Lemma]:
    """The list header."""
    size = z.bits_const("list_size", SIZE_BITS)
    given = (
        checks.need("list_size_at_most_page", z.bits_at_most(size, _number(PAGE, SIZE_BITS))),
        checks.need("list_size_at_least_header", at_least(size, HEADER)),
    )
    shown = {"list_size": size, "remaining": _minus(size, HEADER)}
    yield Lemma(
        "parser_list_size",
        "P24",
        "subtraction",
        "What is left of a list behind its header is not negative (16 bits).",
        given,
        at_least(size, HEADER),
        shown,
    )
    yield Lemma(
        "parser_list_begins",
        "P24",
        "invariant",
        "Behind the header of a list, the offset and what is left make its size.",
        given,
        _between_sequences(_number(HEADER), _minus(size, HEADER), size),
        shown,
    )


def _sequences(checks: Checks) -> Iterator[Lemma]:
    """One sequence header, from any state between two sequences."""
    size = z.bits_const("list_size", SIZE_BITS)
    remaining = z.bits_const("remaining", SIZE_BITS)
    offset = z.bits_const("offset", WIDE)
    shown = {"list_size": size, "remaining": remaining, "offset": offset}
    state = _between_sequences(offset, remaining, size)
    enough = at_least(remaining, 2 * SLOT)
    before = checks.need("sequence_fits_before_read", enough)
    checked = (state, before, checks.need("sequence_fits", enough))
    yield Lemma(
        "parser_sequence_header",
        "P24",
        "read",
        "The header of a sequence is read inside the list.",
        (state, before),
        _inside(offset, _number(SLOT), size),
        shown,
    )
    yield Lemma(
        "parser_sequence_size",
        "P24",
        "subtraction",
        "What is left for a sequence behind its header is not negative (32 bits).",
        checked,
        at_least(_wide(remaining), SLOT),
        shown,
    )
    first = z.add(offset, _number(SLOT))
    has_mask = z.bool_const("has_mask")
    yield Lemma(
        "parser_sequence_begins",
        "P24",
        "invariant",
        "Behind the header of a sequence, the offset and what is left make the size.",
        checked,
        _between_fields(first, first, _minus(_wide(remaining), SLOT), size, has_mask),
        shown,
    )
    yield from _sequence_end(size, remaining, offset, state, shown)


def _sequence_end(
    size: Term, remaining: Term, offset: Term, state: Term, shown: Mapping[str, Term]
) -> Iterator[Lemma]:
    """The end of a sequence that began at `offset`, from any state between two fields."""
    end = z.bits_const("end", WIDE)
    first = z.add(offset, _number(SLOT))
    left = z.bits_const("left", WIDE)
    taken = z.bits_subtract(end, offset)
    given = (state, _between_fields(first, end, left, size, z.bool_const("has_mask")))
    shown = {**shown, "end": end, "left": left}
    yield Lemma(
        "parser_sequence_taken",
        "P24",
        "subtraction",
        "A sequence takes no more than was left of the list (16 bits).",
        given,
        z.bits_at_most(taken, _wide(remaining)),
        shown,
    )
    after = z.bits_subtract(remaining, z.bits_narrowed(taken, SIZE_BITS))
    yield Lemma(
        "parser_list_goes_on",
        "P24",
        "invariant",
        "Behind a sequence, the offset and what is left make the size again.",
        given,
        _between_sequences(end, after, size),
        shown,
    )


def _fields(checks: Checks) -> Iterator[Lemma]:
    """One field, from any state between two fields of a sequence."""
    size = z.bits_const("list_size", SIZE_BITS)
    first = z.bits_const("first_slot", WIDE)
    offset = z.bits_const("offset", WIDE)
    left = z.bits_const("left", WIDE)
    elements = z.bits_const("last_element", 4)
    masked = z.bits_const("write_mask_valid", 1)
    has_mask = z.equal(masked, _number(1, 1))
    # 8 * (last_element + 1) in 32 bits.
    count = z.add(_wide(elements), _number(1))
    length = count
    for _ in range(3):
        length = z.add(length, length)
    shown = {
        "list_size": size,
        "first_slot": first,
        "offset": offset,
        "left": left,
        "last_element": elements,
        "write_mask_valid": masked,
    }
    state = _between_fields(first, offset, left, size, has_mask)
    header_checked = (state, checks.need("no_write_mask", z.negate(has_mask)))
    left_now = z.choose(has_mask, _minus(left, SLOT), left)
    here = z.choose(has_mask, z.add(offset, _number(SLOT)), offset)
    checked = (*header_checked, checks.need("field_fits", z.bits_at_most(length, left_now)))
    yield Lemma(
        "parser_mask_read",
        "P24",
        "read",
        "The write mask of a sequence is read inside the list.",
        header_checked,
        z.when(has_mask, _inside(first, _number(SLOT), size)),
        shown,
    )
    yield Lemma(
        "parser_mask_size",
        "P24",
        "subtraction",
        "What is left for a sequence behind its write mask is not negative (32 bits).",
        header_checked,
        z.when(has_mask, at_least(left, SLOT)),
        shown,
    )
    yield Lemma(
        "parser_field_read",
        "P24",
        "read",
        "The elements of a field are read inside the list.",
        checked,
        _inside(here, length, size),
        shown,
    )
    yield Lemma(
        "parser_field_size",
        "P24",
        "subtraction",
        "What is left for a sequence behind a field is not negative (32 bits).",
        checked,
        z.bits_at_most(length, left_now),
        shown,
    )
    yield Lemma(
        "parser_sequence_goes_on",
        "P24",
        "invariant",
        "Behind a field, the offset and what is left make the size again.",
        checked,
        _between_fields(
            first, z.add(here, length), z.bits_subtract(left_now, length), size, has_mask
        ),
        shown,
    )


def _export(checks: Checks) -> Iterator[Lemma]:
    """A page of an export: `byte` is any of its bytes, and all below `offset` have been written."""
    offset = z.bits_const("offset", WIDE)
    byte = z.bits_const("byte", WIDE)
    slots = z.bits_const("slots", 9)
    defined = z.bits_const("defined", 1)
    is_defined = z.equal(defined, _number(1, 1))
    shown = {"offset": offset, "byte": byte, "slots": slots, "defined": defined}
    below = z.when(z.bits_below(byte, offset), is_defined)
    state = z.both([at_least(offset, HEADER), z.bits_at_most(offset, _number(PAGE)), below])
    room = z.bits_subtract(_number(PAGE), offset)
    length = z.add(_wide(slots), _number(1))
    for _ in range(3):
        length = z.add(length, length)
    fits = checks.need("room_in_page", z.bits_at_most(length, room))
    end = z.add(offset, length)
    written = z.both([z.bits_at_most(offset, byte), z.bits_below(byte, end)])
    yield Lemma(
        "export_room",
        "P26",
        "subtraction",
        "The room that is left in a page is not negative.",
        (state,),
        z.bits_at_most(offset, _number(PAGE)),
        shown,
    )
    yield Lemma(
        "export_goes_on",
        "P26",
        "definedness",
        "A sequence ends in the page, and every byte before its end has been written.",
        (state, fits),
        z.both(
            [
                z.bits_at_most(end, _number(PAGE)),
                z.when(z.bits_below(byte, end), z.either([is_defined, written])),
            ]
        ),
        shown,
    )
    yield Lemma(
        "export_list_size",
        "P26",
        "check",
        "LIST_BUFF_SIZE holds the size of the list (16 bits).",
        (state,),
        z.equal(_wide(z.bits_narrowed(offset, SIZE_BITS)), offset),
        shown,
    )
    zeroed = z.both([z.bits_at_most(offset, byte), z.bits_below(byte, z.add(offset, room))])
    filled = zeroed if checks.stands("tail_zeroed") else z.FALSE
    yield Lemma(
        "export_ends",
        "P26",
        "definedness",
        "Every byte of the page is in its list or in the zeros behind it.",
        (state,),
        z.when(z.bits_below(byte, _number(PAGE)), z.either([is_defined, filled])),
        shown,
    )


_PARTS: tuple[Callable[[Checks], Iterator[Lemma]], ...] = (_opening, _sequences, _fields, _export)


def lemmas(profile: str, without: frozenset[str] = frozenset()) -> list[Lemma]:
    """Every lemma under a profile, without some checks."""
    checks = Checks(CHECKS, profile, without)
    return [lemma for part in _PARTS for lemma in part(checks)]


def parser_lemmas(
    profile: str, *, seed: int = 0, without: frozenset[str] = frozenset()
) -> list[Result]:
    """The verdicts on all lemmas of a profile."""
    return [decide(lemma, seed) for lemma in lemmas(profile, without)]
