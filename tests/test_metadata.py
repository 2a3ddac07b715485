"""Do metadata lists have the module's layout, and does every malformed list end in its status?"""

from __future__ import annotations

import csv
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxmig_model.backend.soft.fields import (
    FIELDS,
    ITEMS,
    NO_FIELD,
    ROWS,
    Field,
    cpuid_identifier,
)
from tdxmig_model.backend.soft.metadata import (
    ParseResult,
    Scope,
    Value,
    build_lists,
    initial_values,
    parse_lists,
)
from tdxmig_model.errors import UsageError

SPECS = Path(__file__).parent.parent / "specs"
SCOPES: tuple[Scope, ...] = ("immutable", "td", "vp")

with (SPECS / "errors.csv").open() as file:
    STATUS = {row["name"]: int(row["value_hex"], 16) for row in csv.DictReader(file)}
with (SPECS / "operand_ids.csv").open() as file:
    OPERAND_PAGE = next(
        int(r["id_decimal"]) for r in csv.DictReader(file) if r["operand"] == "PAGE"
    )

FIELD_ID_INCORRECT = STATUS["TDX_METADATA_FIELD_ID_INCORRECT"]
VALUE_NOT_VALID = STATUS["TDX_METADATA_FIELD_VALUE_NOT_VALID"]
LIST_OVERFLOW = STATUS["TDX_METADATA_LIST_OVERFLOW"]
INVALID_HEADER = STATUS["TDX_INVALID_METADATA_LIST_HEADER"]
FIELD_MISSING = STATUS["TDX_REQUIRED_METADATA_FIELD_MISSING"]
INVALID_PAGE = STATUS["TDX_OPERAND_INVALID"] + OPERAND_PAGE
WRITE_MASK_VALID = 1 << 51


def sample_values(scope: Scope) -> dict[str, Value]:
    """A different value in every element, CPUID leaves included."""
    values: dict[str, Value] = {}
    rows = ROWS["sys"] + ROWS["immutable"] if scope == "immutable" else ROWS[scope]
    for number, row in enumerate(rows):
        seeds = range(1000 * number + 1, 1000 * number + 1 + row.slots)
        words = tuple((seed * 0x9E3779B97F4A7C15 & row.size_mask) for seed in seeds)
        values[row.name] = words[0] if row.slots == 1 else words
    if scope == "immutable":
        values |= {"NUM_CPUID_VALUES": 64, "NUM_L2_VMS": 0}
    return values


def masked(row: Field, value: Value) -> Value:
    mask = row.export_mask & row.import_mask
    return tuple(v & mask for v in value) if isinstance(value, tuple) else value & mask


def make_page(
    sequences: list[list[int]], *, size: int | None = None, count: int | None = None
) -> bytes:
    words = [word for sequence in sequences for word in sequence]
    used = 8 + 8 * len(words) if size is None else size
    number = len(sequences) if count is None else count
    header = struct.pack("<HHI", used, number, 0)
    return (header + struct.pack(f"<{len(words)}Q", *words)).ljust(4096, b"\0")


def sequences_of(page: bytes) -> list[list[int]]:
    """Header and slots of each sequence of a well-formed page."""
    used, count = struct.unpack_from("<HH", page)
    words = list(struct.unpack_from(f"<{used // 8 - 1}Q", page, 8))
    sequences = []
    for _ in range(count):
        header = words[0]
        length = 1 + ((header >> 34 & 15) + 1) * ((header >> 38 & 511) + 1)
        sequences.append(words[:length])
        words = words[length:]
    assert not words
    return sequences


def index_of(sequences: list[list[int]], name: str) -> int:
    key = FIELDS[name].identifier & 0xFFFFFF
    cls = FIELDS[name].class_code
    return next(
        i for i, s in enumerate(sequences) if s[0] & 0xFFFFFF == key and s[0] >> 56 & 63 == cls
    )


def td_sequences() -> list[list[int]]:
    return sequences_of(build_lists("td", initial_values("td"))[0])


def failure(result: ParseResult) -> tuple[int, tuple[int, int]]:
    assert result.error is not None
    return result.error.status, result.error.extended


# --- facts ------------------------------------------------------------------------------------


def test_field_table_equals_the_specification() -> None:
    with (SPECS / "fields.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [
        Field(
            name=row["name"],
            identifier=int(row["identifier"], 16),
            scope=row["scope"],
            element_size_bytes=int(row["element_size_bytes"]),
            elements=int(row["elements"]),
            fields=int(row["fields"]),
            export_class=row["export_class"],
            migration_class=row["import_class"],
            export_mask=int(row["export_mask"], 16),
            import_mask=int(row["import_mask"], 16),
            required=row["required"] == "1",
        )
        for row in rows
    ]
    assert len(expected) == len(FIELDS)
    for scope, carried in ROWS.items():
        assert carried == tuple(row for row in expected if row.scope == scope)


def test_identifiers_agree_with_their_scope_and_size() -> None:
    context = {"sys": 0, "immutable": 1, "td": 1, "vp": 2}
    for row in FIELDS.values():
        assert row.identifier >> 52 & 7 == context[row.scope]
        assert 1 << (row.identifier >> 32 & 3) == row.element_size_bytes
        assert row.elements <= 16
        assert row.identifier & 0x40807FFCFF000000 == 0
    for items in ITEMS.values():
        assert len({item.key for item in items}) == len(items)


def test_cpuid_identifiers() -> None:
    # leaf 7 in 15:9, sub-leaf 1 in 7:1; leaf 0x80000008 sets bit 16, no sub-leaf is 0x1FE.
    assert cpuid_identifier(7, 1) == 0x9410000300000E02 == FIELDS["CPUID_7_1"].identifier
    assert cpuid_identifier(0x80000008, None) == 0x94100003000111FE


# --- layout -----------------------------------------------------------------------------------


def test_mutable_td_page_byte_for_byte() -> None:
    values = initial_values("td")
    del values["TD_CTLS"], values["SERVTD_BINDINGS_TABLE"]
    values |= {"VIRTUAL_TSC": 0x1122334455667788, "NOTIFY_ENABLES": 1, "IMPORT_COUNT": 7}
    values |= {"HP_LOCK_TIMEOUT": 0x2710, "VM_CTLS": (0, 1, 0, 1), "RTMR": tuple(range(24))}
    expected = bytes.fromhex("2801 0400 00000000")  # 296 bytes in 4 sequences
    expected += bytes.fromhex("0d00000003001011 8877665544332211")
    # Field codes 0x10 to 0x15 are neighbours: 6 fields, so LAST_FIELD_IN_SEQUENCE = 5.
    expected += bytes.fromhex("1000000043011091")
    expected += struct.pack("<6Q", 1, 0x2710, 0, 1, 0, 1)
    # RTMR: LAST_ELEMENT_IN_FIELD = 5, LAST_FIELD_IN_SEQUENCE = 3.
    expected += bytes.fromhex("40000000d7001013")
    expected += struct.pack("<24Q", *range(24))
    expected += bytes.fromhex("0300000002001098 0700000000000000")
    assert build_lists("td", values) == [expected.ljust(4096, b"\0")]


def test_sys_page_comes_first() -> None:
    pages = build_lists("immutable", initial_values("immutable"))
    assert len(pages) == 2
    assert pages[0][8:16] == bytes.fromhex("01000000c2010000")  # PKG_FMS, eight fields
    assert pages[1][8:16] == bytes.fromhex("200000000f001080")  # TD_UUID, four elements


def test_vmcs_fields_step_by_two() -> None:
    first = sequences_of(build_lists("vp", initial_values("vp"))[0])[0]
    # Ten 16-bit guest fields, encodings 0x800 to 0x810: nine in a row, then UINV at 0x814.
    assert first[0] == 0x0024000100000800 | 8 << 38
    assert len(first) == 10


@pytest.mark.parametrize("scope", SCOPES)
def test_pages_are_fully_defined_and_hold_whole_fields(scope: Scope) -> None:
    for page in build_lists(scope, sample_values(scope)):
        assert len(page) == 4096
        used = int.from_bytes(page[:2], "little")
        assert not any(page[used:])
        assert sum(len(sequence) for sequence in sequences_of(page)) == used // 8 - 1


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("hardened", [True, False])
def test_round_trip(scope: Scope, hardened: bool) -> None:
    values = sample_values(scope)
    result = parse_lists(scope, build_lists(scope, values), hardened=hardened)
    assert result.error is None
    assert result.out_of_range_reads == ()
    written = {
        name: masked(FIELDS[name], value)
        for name, value in values.items()
        if FIELDS[name].considered and FIELDS[name].scope != "sys" and FIELDS[name].import_mask
    }
    assert result.values == written
    assert result.ignored == values.keys() - written.keys()


def test_vcpu_state_takes_the_pages_that_the_module_needs() -> None:
    pages = build_lists("vp", initial_values("vp"))
    assert len(pages) == 4
    with pytest.raises(UsageError, match="needs 4 pages"):
        build_lists("vp", initial_values("vp"), max_pages=3)


def test_state_can_be_spread_over_smaller_lists() -> None:
    values = initial_values("immutable") | {"ATTRIBUTES": 1 << 29, "SERVTD_NUM": 1}
    pages = build_lists("immutable", values, list_size=240)
    assert len(pages) > 3
    assert max(int.from_bytes(page[:2], "little") for page in pages) <= 240
    result = parse_lists("immutable", pages)
    assert result.error is None
    assert result.integer("ATTRIBUTES") == 1 << 29
    for size in (143, 4097):
        with pytest.raises(UsageError, match=f"list of {size} bytes"):
            build_lists("immutable", values, list_size=size)


def test_optional_fields_may_be_absent() -> None:
    values = initial_values("immutable")
    for name in list(values):
        if not FIELDS[name].required:
            del values[name]
    values["VENDOR_ID"] = 0x8086
    result = parse_lists("immutable", build_lists("immutable", values))
    assert result.error is None
    assert "CONFIG_FLAGS" not in result.values
    assert result.integer("NUM_CPUID_VALUES") == 64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RTMR": (0,) * 23}, "takes 24 elements"),
        ({"IMPORT_COUNT": 1 << 32}, "4-byte elements"),
        ({"IMPORT_COUNT": -1}, "4-byte elements"),
        ({"MRTD": (0,) * 6}, "not a field of td state"),
    ],
)
def test_values_that_cannot_be_exported(changed: dict[str, Value], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_lists("td", initial_values("td") | changed)


def test_a_required_field_cannot_be_left_out() -> None:
    values = initial_values("td")
    del values["VIRTUAL_TSC"]
    with pytest.raises(UsageError, match="VIRTUAL_TSC is required"):
        build_lists("td", values)


# --- parser errors ----------------------------------------------------------------------------


def test_list_header_errors() -> None:
    good = build_lists("td", initial_values("td"))[0]
    no_sequences = good[:2] + b"\0\0" + good[4:]
    assert failure(parse_lists("td", [no_sequences])) == (INVALID_HEADER, (0, 0))
    for byte in range(4, 8):
        reserved = good[:byte] + b"\x01" + good[byte + 1 :]
        assert failure(parse_lists("td", [reserved])) == (INVALID_HEADER, (0, 0))
    for size in (4097, 4104, 0xFFFF):
        too_long = struct.pack("<H", size) + good[2:]
        for hardened in (True, False):
            result = parse_lists("td", [too_long], hardened=hardened)
            assert failure(result) == (INVALID_PAGE, (0, 0))
    for size in range(8):
        too_short = struct.pack("<H", size) + good[2:]
        assert failure(parse_lists("td", [too_short])) == (INVALID_HEADER, (0, 0))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 4095, 4097])
@pytest.mark.parametrize("scope", SCOPES)
def test_pages_of_the_wrong_length(scope: Scope, length: int) -> None:
    assert failure(parse_lists(scope, [bytes(length)])) == (INVALID_PAGE, (0, 0))


def test_bundles_without_pages() -> None:
    assert failure(parse_lists("td", [])) == (FIELD_MISSING, (FIELDS["VIRTUAL_TSC"].identifier, 0))
    sys_only = build_lists("immutable", initial_values("immutable"))[:1]
    expected = (FIELD_MISSING, (FIELDS["TD_UUID"].identifier, 0))
    assert failure(parse_lists("immutable", sys_only)) == expected


@pytest.mark.parametrize("scope", SCOPES)
def test_every_truncated_list_size_is_refused(scope: Scope) -> None:
    pages = build_lists(scope, sample_values(scope))
    used = int.from_bytes(pages[-1][:2], "little")
    # Every size of the short bundles; a step prime to 8 meets every alignment of the long one.
    for size in range(0, used, 1 if used < 2048 else 61):
        cut = struct.pack("<H", size) + pages[-1][2:size] + bytes(4096 - max(size, 2))
        result = parse_lists(scope, [*pages[:-1], cut[:4096]])
        assert result.error is not None
        assert result.error.page == len(pages) - 1


def test_sequence_past_the_end_of_the_list() -> None:
    sequences = td_sequences()
    one_more = make_page(sequences, count=len(sequences) + 1)
    status, extended = failure(parse_lists("td", [one_more]))
    assert status == LIST_OVERFLOW | 0xFFFF0000 | len(sequences)
    assert extended == (NO_FIELD, 0)
    # The last field of the second sequence does not fit: the list ends inside it.
    size = 8 + 8 * len(sequences[0]) + 8 * len(sequences[1]) - 8
    status, extended = failure(parse_lists("td", [make_page(sequences, size=size)]))
    assert status == LIST_OVERFLOW | 0xFFFF0000 | 1
    assert extended == (ITEMS["td"][6].identifier, 0)


def test_sequence_that_claims_fields_of_the_next_class() -> None:
    sequences = td_sequences()
    position = index_of(sequences, "TD_CTLS")
    header = sequences[position][0] | 1 << 38
    sequences[position] = [header, 0, *([0] * 6)]
    status, extended = failure(parse_lists("td", [make_page(sequences)]))
    assert (status, extended) == (FIELD_ID_INCORRECT + position, (header, 0))


def test_sequence_behind_the_last_field() -> None:
    sequences = td_sequences()
    sequences.append([0x9910000300000090, 0])
    status, extended = failure(parse_lists("td", [make_page(sequences)]))
    assert status == FIELD_ID_INCORRECT | 0xFFFF0000 | len(sequences) - 1
    assert extended == (0x9910000300000090, 0)


@pytest.mark.parametrize("bit", [*range(24, 32), *range(47, 50), 55, 62])
@pytest.mark.parametrize("hardened", [True, False])
def test_reserved_header_bits(bit: int, hardened: bool) -> None:
    sequences = td_sequences()
    sequences[1][0] |= 1 << bit
    result = parse_lists("td", [make_page(sequences)], hardened=hardened)
    assert failure(result) == (FIELD_ID_INCORRECT | 0xFFFF0001, (sequences[1][0], 0))


@pytest.mark.parametrize("context", [0, 2, 3, 7])
def test_wrong_context_code(context: int) -> None:
    sequences = td_sequences()
    sequences[0][0] = sequences[0][0] & ~(7 << 52) | context << 52
    result = parse_lists("td", [make_page(sequences)])
    assert failure(result) == (FIELD_ID_INCORRECT | 0xFFFF0000, (sequences[0][0], 0))


def test_wrong_element_size_code() -> None:
    sequences = td_sequences()
    sequences[0][0] ^= 1 << 32
    result = parse_lists("td", [make_page(sequences)])
    assert failure(result) == (FIELD_ID_INCORRECT, (sequences[0][0], 0))


def test_fields_out_of_order_or_missing() -> None:
    sequences = td_sequences()
    swapped = [sequences[1], sequences[0], *sequences[2:]]
    first = FIELDS["VIRTUAL_TSC"].identifier
    assert failure(parse_lists("td", [make_page(swapped)])) == (FIELD_MISSING, (first, 0))
    assert failure(parse_lists("td", [make_page(sequences[1:])])) == (FIELD_MISSING, (first, 0))
    repeated = [sequences[0], *sequences]
    second = FIELDS["NOTIFY_ENABLES"].identifier
    assert failure(parse_lists("td", [make_page(repeated)])) == (FIELD_MISSING, (second, 0))


def test_last_page_must_hold_the_remaining_required_fields() -> None:
    pages = build_lists("vp", initial_values("vp"))
    status, extended = failure(parse_lists("vp", pages[:-1]))
    assert status == FIELD_MISSING
    assert extended[0] >> 56 & 63 == FIELDS["XBUFF"].class_code


def test_page_that_exhausts_the_table_must_be_the_last() -> None:
    page = build_lists("td", initial_values("td"))[0]
    result = parse_lists("td", [page, page])
    assert failure(result) == (FIELD_MISSING, (NO_FIELD, 0))
    assert result.error is not None
    assert result.error.page == 0


def test_first_error_wins() -> None:
    pages = build_lists("vp", initial_values("vp"))
    pages[1] = pages[1][:4] + b"\x01" + pages[1][5:]
    pages[2] = b"\xff\xff" + pages[2][2:]
    result = parse_lists("vp", pages)
    assert failure(result) == (INVALID_HEADER, (0, 0))
    assert result.error is not None
    assert result.error.page == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("NUM_CPUID_VALUES", 63), ("NUM_L2_VMS", 4), ("GPAW", 0x100), ("MAX_VCPUS", 1 << 32)],
)
def test_values_out_of_fixed_bounds(name: str, value: int) -> None:
    pages = build_lists("immutable", initial_values("immutable"))
    sequences = sequences_of(pages[1])
    position = index_of(sequences, name)
    sequences[position][1] = value
    result = parse_lists("immutable", [pages[0], make_page(sequences)])
    assert failure(result) == (VALUE_NOT_VALID + position, (FIELDS[name].identifier, 0))


def test_the_importing_td_can_refuse_a_value() -> None:
    def below_two(row: Field, index: int, words: tuple[int, ...]) -> int:
        return VALUE_NOT_VALID if row.name == "VCPU_INDEX" and words[0] >= 2 else 0

    pages = build_lists("vp", initial_values("vp") | {"VCPU_INDEX": 1})
    assert parse_lists("vp", pages, validate=below_two).integer("VCPU_INDEX") == 1
    pages = build_lists("vp", initial_values("vp") | {"VCPU_INDEX": 2})
    result = parse_lists("vp", pages, validate=below_two)
    assert failure(result)[1] == (FIELDS["VCPU_INDEX"].identifier, 0)
    assert "VCPU_INDEX" not in result.values


# --- published weaknesses -----------------------------------------------------------------------


@pytest.mark.parametrize("size", range(8))
def test_list_size_below_the_header_reads_past_the_list_in_1_5_01(size: int) -> None:
    """CVE-2025-32007: the remaining size wraps, so a list of no bytes is parsed to its end."""
    page = struct.pack("<H", size) + build_lists("td", initial_values("td"))[0][2:]
    published = parse_lists("td", [page], hardened=False)
    assert published.error is None
    assert published.out_of_range_reads[0].offset == 8
    assert not any(read.beyond_page for read in published.out_of_range_reads)
    repaired = parse_lists("td", [page])
    assert failure(repaired) == (INVALID_HEADER, (0, 0))
    assert repaired.out_of_range_reads == ()
    assert not repaired.values


def test_wrapped_list_size_reaches_beyond_the_page_in_1_5_01() -> None:
    """CVE-2025-32007: one sequence more than the full page holds is read behind the page."""
    pages = build_lists("vp", initial_values("vp"))
    used, count = struct.unpack_from("<HH", pages[0])
    assert used == 4096
    pages[0] = struct.pack("<HH", 4, count + 1) + pages[0][4:]
    published = parse_lists("vp", pages[:1], hardened=False)
    beyond = [read for read in published.out_of_range_reads if read.beyond_page]
    assert [(read.offset, read.length, read.list_size) for read in beyond] == [(4096, 8, 4)]
    assert published.error is not None
    assert parse_lists("vp", pages).out_of_range_reads == ()


def eptp_under_mask(mask: int) -> list[bytes]:
    pages = build_lists("immutable", initial_values("immutable") | {"EPTP": 0x1E})
    sequences = sequences_of(pages[1])
    position = index_of(sequences, "EPTP")
    header, value = sequences[position]
    sequences[position] = [header | WRITE_MASK_VALID, mask, value]
    return [pages[0], make_page(sequences)]


def test_required_field_under_write_mask_zero_counts_as_present_in_1_5_01() -> None:
    """ "eddie": the import succeeds, though EPTP was never written."""
    published = parse_lists("immutable", eptp_under_mask(0), hardened=False)
    assert published.error is None
    assert "EPTP" not in published.values
    assert "EPTP" in published.ignored
    repaired = parse_lists("immutable", eptp_under_mask(0))
    status, extended = failure(repaired)
    assert status & ~0xFFFF == FIELD_ID_INCORRECT | 0xFFFF0000
    assert extended == (FIELDS["EPTP"].identifier | WRITE_MASK_VALID, 0)


def test_write_mask_selects_bits_in_1_5_01() -> None:
    published = parse_lists("immutable", eptp_under_mask(0x6), hardened=False)
    assert published.error is None
    assert published.values["EPTP"] == 0x6


# --- garbage ------------------------------------------------------------------------------------


def with_tail(page: bytes, filler: int) -> bytes:
    """The same list with other bytes behind its end."""
    used = min(max(int.from_bytes(page[:2], "little"), 8), 4096)
    return page[:used] + bytes([filler]) * (4096 - used)


@st.composite
def damaged_bundles(draw: st.DrawFn) -> tuple[Scope, list[bytes]]:
    """Good pages with a few words replaced, often by other headers, and with other list headers."""
    scope = draw(st.sampled_from(SCOPES))
    pages = [bytearray(page) for page in build_lists(scope, initial_values(scope))]
    identifiers = [item.identifier for item in ITEMS[scope]]
    words = st.one_of(
        st.integers(0, NO_FIELD),
        st.builds(
            lambda base, bits: base | bits << 34,
            st.sampled_from(identifiers),
            st.integers(0, 0x3FFFF),
        ),
    )
    for _ in range(draw(st.integers(1, 4))):
        page = draw(st.sampled_from(pages))
        struct.pack_into("<Q", page, 8 * draw(st.integers(1, 60)), draw(words))
    if draw(st.booleans()):
        size, count = draw(st.integers(0, 4200)), draw(st.integers(0, 600))
        struct.pack_into("<HH", draw(st.sampled_from(pages)), 0, size, count)
    return scope, [bytes(page) for page in pages]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(damaged_bundles())
def test_damaged_lists_never_raise_and_never_depend_on_bytes_outside(
    bundle: tuple[Scope, list[bytes]],
) -> None:
    scope, pages = bundle
    result = parse_lists(scope, pages)
    assert result.out_of_range_reads == ()
    for filler in (0x00, 0x5A, 0xFF):
        assert parse_lists(scope, [with_tail(page, filler) for page in pages]) == result
    published = parse_lists(scope, pages, hardened=False)
    if result.error is None:
        assert published == result


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(SCOPES),
    st.lists(st.binary(max_size=64), max_size=4),
    st.integers(0, 3),
    st.booleans(),
)
def test_garbage_never_raises(
    scope: Scope, heads: list[bytes], sys_pages: int, hardened: bool
) -> None:
    pages = [head.ljust(4096, b"\xa5") for head in heads]
    result = parse_lists(scope, pages, hardened=hardened, sys_pages=sys_pages)
    assert result.error is not None
