"""Is the arithmetic of metadata lists safe in its machine widths, and are the terms the parser's?

The lemmas and the parser of the software module were written from the same facts; here each
counterexample of a lemma is given to that parser as a list.
"""

from __future__ import annotations

import json
import struct

import pytest

from tdxmig_model.backend.soft.metadata import (
    INVALID_LIST_HEADER,
    OutOfRangeRead,
    Scope,
    build_lists,
    initial_values,
    parse_lists,
)
from tdxmig_model.cli import main
from tdxmig_model.model.words import ALL_PROFILES, HARDENED, TDX_1_5_01, repaired
from tdxmig_model.smt import parser_lemmas as lemmas
from tdxmig_model.smt import widths
from tdxmig_model.smt import z3api as z
from tdxmig_model.verify import Report, verify_widths

ABOUT_LISTS = ("P24", "P26")
PAGE = 4096
WRITE_MASK_VALID = 1 << 51

LIST_SHORTER_THAN_ITS_HEADER = {"list_size": 0, "remaining": 0xFFF8}
LIST_AT_ITS_END = {"list_size": 8, "remaining": 0, "offset": 8}
MASK_BEHIND_THE_LAST_FIELD = {
    "list_size": 32,
    "first_slot": 16,
    "offset": 32,
    "left": 0,
    "last_element": 0,
    "write_mask_valid": 1,
}
COUNTEREXAMPLES = {
    "parser_list_size": LIST_SHORTER_THAN_ITS_HEADER,
    "parser_list_begins": LIST_SHORTER_THAN_ITS_HEADER,
    "parser_sequence_header": LIST_AT_ITS_END,
    "parser_mask_size": MASK_BEHIND_THE_LAST_FIELD,
    "parser_field_read": MASK_BEHIND_THE_LAST_FIELD,
    "parser_sequence_goes_on": MASK_BEHIND_THE_LAST_FIELD,
}
"""What repair R2 removes, with the smallest values."""

# What falls when one check of the hardened profile is deleted.
DELETIONS = {
    "list_size_at_most_page": {"parser_list_begins"},
    "list_size_at_least_header": {"parser_list_size", "parser_list_begins"},
    "sequence_fits_before_read": {"parser_sequence_header"},
    # The check before the header is read is the same, and comes first.
    "sequence_fits": set[str](),
    "no_write_mask": {"parser_mask_size", "parser_field_read", "parser_sequence_goes_on"},
    "field_fits": {"parser_field_read", "parser_field_size", "parser_sequence_goes_on"},
    "room_in_page": {"export_goes_on"},
    "tail_zeroed": {"export_ends"},
}


def verdicts(report: Report) -> dict[str, str]:
    return {row.identifier: row.verdict for row in report.rows}


# --- verdicts -------------------------------------------------------------------------------------


def test_hardened_reads_nothing_outside_a_list() -> None:
    report = verify_widths(HARDENED, ABOUT_LISTS)
    assert report.holds
    assert set(verdicts(report).values()) == {"proved"}
    assert [row.identifier for row in report.rows if row.level == "leaf"] == ["P24", "P26"]
    assert {row.method for row in report.rows} == {"bit-vector lemma"}


def test_the_published_module_reads_outside_a_list_that_is_too_short() -> None:
    """CVE-2025-32007 (melllvar): the first counterexample is a list shorter than its header."""
    report = verify_widths(TDX_1_5_01, ABOUT_LISTS)
    found = verdicts(report)
    assert (found.pop("P24"), found.pop("P26")) == ("violated", "proved")
    assert {name for name, verdict in found.items() if verdict != "proved"} == set(COUNTEREXAMPLES)
    row = report.rows[0]
    assert row.detail == "parser_list_size: list_size = 0, remaining = 65528"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("profile", [HARDENED, TDX_1_5_01])
def test_the_answers_do_not_depend_on_the_seed(profile: str, seed: int) -> None:
    found = {r.identifier: r.values for r in lemmas.parser_lemmas(profile, seed=seed) if r.values}
    assert found == ({} if profile == HARDENED else COUNTEREXAMPLES)


@pytest.mark.parametrize("profile", ALL_PROFILES)
def test_only_one_repair_is_about_lists(profile: str) -> None:
    wanted = "proved" if profile in repaired("R2") else "violated"
    assert verdicts(verify_widths(profile, ABOUT_LISTS))["P24"] == wanted


@pytest.mark.parametrize("check", lemmas.CHECKS)
def test_each_check_is_needed(check: str) -> None:
    found = lemmas.parser_lemmas(HARDENED, without=frozenset({check}))
    assert {r.identifier for r in found if r.verdict != "proved"} == DELETIONS[check]


def test_a_claim_about_nothing_is_vacuous() -> None:
    size = z.bits_const("size", 16)
    nothing = widths.Lemma("none", "P24", "check", "Nothing.", (z.FALSE,), z.TRUE, {"size": size})
    assert widths.decide(nothing).verdict == "vacuous"


def test_every_lemma_has_a_name_and_a_sentence() -> None:
    found = lemmas.lemmas(HARDENED)
    assert len({lemma.identifier for lemma in found}) == len(found) == 16
    assert {lemma.claims for lemma in found} == set(lemmas.SENTENCES)
    for lemma in found:
        assert lemma.sentence.endswith(".")
        assert lemma.identifier.startswith("parser_" if lemma.claims == "P24" else "export_")


# --- the same values on the parser of the software module -----------------------------------------


def first_sequence(scope: Scope) -> list[int]:
    """The header and the slots of the first sequence that the exporter writes."""
    page = build_lists(scope, initial_values(scope))[0]
    (header,) = struct.unpack_from("<Q", page, 8)
    slots = ((header >> 34 & 15) + 1) * ((header >> 38 & 511) + 1)
    return list(struct.unpack_from(f"<{1 + slots}Q", page, 8))


def page_of(words: list[int], *, size: int, sequences: int) -> bytes:
    header = struct.pack("<HHI", size, sequences, 0)
    return (header + struct.pack(f"<{len(words)}Q", *words)).ljust(PAGE, b"\0")


@pytest.mark.parametrize("size", [LIST_SHORTER_THAN_ITS_HEADER["list_size"], 3, 7])
def test_a_list_shorter_than_its_header(size: int) -> None:
    page = build_lists("vp", initial_values("vp"))[0]
    short = struct.pack("<H", size) + page[2:]
    published = parse_lists("vp", [short], hardened=False)
    assert published.out_of_range_reads[0] == OutOfRangeRead(0, 8, 8, size)
    assert any(read.offset > size for read in published.out_of_range_reads)
    hardened = parse_lists("vp", [short])
    assert hardened.out_of_range_reads == ()
    assert hardened.error is not None
    assert hardened.error.status == INVALID_LIST_HEADER


def test_one_more_sequence_than_the_list_has() -> None:
    values = LIST_AT_ITS_END
    page = page_of([], size=values["list_size"], sequences=1)
    published = parse_lists("vp", [page], hardened=False)
    assert published.out_of_range_reads[0] == OutOfRangeRead(0, values["offset"], 8, 8)
    assert parse_lists("vp", [page]).out_of_range_reads == ()


def test_a_write_mask_behind_the_last_field_of_the_list() -> None:
    values = MASK_BEHIND_THE_LAST_FIELD
    header, slot, *others = first_sequence("vp")
    assert others
    assert header >> 34 & 15 == values["last_element"]
    words = [header | WRITE_MASK_VALID, (1 << 64) - 1, slot]
    assert values["offset"] == 8 + 8 * len(words)
    page = page_of(words, size=values["list_size"], sequences=1)
    published = parse_lists("vp", [page], hardened=False)
    behind_the_mask = values["offset"] + 8
    assert published.out_of_range_reads[0] == OutOfRangeRead(0, behind_the_mask, 8, 32)
    hardened = parse_lists("vp", [page])
    assert hardened.out_of_range_reads == ()
    assert hardened.error is not None


@pytest.mark.parametrize("scope", ["immutable", "td", "vp"])
def test_exported_pages_end_in_zeros(scope: Scope) -> None:
    for page in build_lists(scope, initial_values(scope)):
        (size,) = struct.unpack_from("<H", page)
        assert 8 < size <= PAGE == len(page)
        assert not any(page[size:])


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "code"), [(HARDENED, 0), (TDX_1_5_01, 1)])
def test_verify_judges_the_lemmas_of_a_property(
    profile: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", "--property", "P24", "--profile", profile, "--json"]
    assert main(command) == code
    answer = json.loads(capsys.readouterr().out)
    row = answer["properties"][0]
    assert (row["id"], row["model"], row["method"]) == ("P24", "widths", "bit-vector lemma")
    assert row["verdict"] == ("violated" if code else "proved")
    stated = {"P24", "P26", "P49", "P20", "P21", "P22", "P23", "P25"}
    assert not stated & {p["id"] for p in answer["not_stated"]}


def test_show_finds_a_property_of_lemmas(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "p24"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert lemmas.SENTENCES["P24"] in text
    for lemma in lemmas.lemmas(HARDENED):
        assert (f"{lemma.identifier}: {lemma.sentence}" in text) == (lemma.claims == "P24")
