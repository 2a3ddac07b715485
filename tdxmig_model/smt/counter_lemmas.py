"""P49: no counter that orders a migration wraps: each has a check, or a bound by what it counts.

Every lemma is about counting up (or down) once, from any state that satisfies what is known of the
counter.  The models count in unbounded integers and say what the counters count (P14); here are the
bits that the TDX module 1.5.01 gives them.  No step of a migration depends on IMPORT_COUNT.
"""

from __future__ import annotations

from collections.abc import Iterator

from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.widths import Checks, Lemma, Result, at_least, at_most, decide, number
from tdxmig_model.smt.z3api import Term

SENTENCES = {"P49": "No counter that orders a migration wraps: each has a check or a bound."}

EXPORTS = 0x7FFF_FFFF
LAST_EPOCH = 0xFFFF_FFFE
STREAMS = 512
PAGES = 1 << 40
"""Pages of 4 KiB in 52 bits of address."""
BUNDLES = (1 << 32) - 1
"""Bundles of one stream in one session, at most; assumed."""
IVS = 1 + 512
"""IVs that one bundle takes at most: its header, and the entries of a full list."""

CHECKS: dict[str, str | None] = {
    "max_exports": None,
    "epoch_overflow": None,
    "max_migs": None,
    "vcpus_left": None,
}
"""What the module compares before it counts up."""

ASSUMPTIONS = ("a stream carries fewer than 2^32 bundles in a session, tokens included",)


def _up(counter: Term) -> Term:
    return z.add(counter, number(1, z.bits_width(counter)))


def _no_wrap(counter: Term) -> Term:
    return z.bits_below(counter, _up(counter))


def _lemma(name: str, sentence: str, given: list[Term], claim: list[Term], **shown: Term) -> Lemma:
    return Lemma(f"counter_{name}", "P49", "check", sentence, tuple(given), z.both(claim), shown)


def _checked(checks: Checks) -> Iterator[Lemma]:
    """Counters that the module compares with their last value."""
    exports = z.bits_const("EXPORT_COUNT", 32)
    yield _lemma(
        "export_count",
        "EXPORT_COUNT, which may come from a bundle, is below its maximum before a session (32).",
        [checks.need("max_exports", z.bits_below(exports, number(EXPORTS, 32)))],
        [_no_wrap(exports), at_most(_up(exports), EXPORTS)],
        EXPORT_COUNT=exports,
    )
    epoch = z.bits_const("MIG_EPOCH", 32)
    last = z.equal(epoch, number(LAST_EPOCH, 32))
    yield _lemma(
        "mig_epoch",
        "MIG_EPOCH does not count up to the start token's epoch (32 bits).",
        [at_most(epoch, LAST_EPOCH), checks.need("epoch_overflow", z.negate(last))],
        [_no_wrap(epoch), at_most(_up(epoch), LAST_EPOCH)],
        MIG_EPOCH=epoch,
    )
    streams = z.bits_const("NUM_MIGS", 16)
    yield _lemma(
        "num_migs",
        "NUM_MIGS does not exceed the streams that a TD can have (16 bits).",
        [
            at_most(streams, STREAMS),
            checks.need("max_migs", z.bits_below(streams, number(STREAMS, 16))),
        ],
        [_no_wrap(streams), at_most(_up(streams), STREAMS)],
        NUM_MIGS=streams,
    )
    imported = z.bits_const("NUM_MIGRATED_VCPUS", 32)
    vcpus = z.bits_const("NUM_VCPUS", 32)
    yield _lemma(
        "num_migrated_vcpus",
        "NUM_MIGRATED_VCPUS does not exceed NUM_VCPUS (32 bits).",
        [
            z.bits_at_most(imported, vcpus),
            checks.need("vcpus_left", z.bits_below(imported, vcpus)),
        ],
        [_no_wrap(imported), z.bits_at_most(_up(imported), vcpus)],
        NUM_MIGRATED_VCPUS=imported,
        NUM_VCPUS=vcpus,
    )


def _of_bundles(_checks: Checks) -> Iterator[Lemma]:
    """Counters that are bounded by the bundles of a session."""
    made = z.bits_const("bundles", 64)
    another = z.bits_below(made, number(BUNDLES, 64))
    counter = z.bits_const("MB_COUNTER", 32)
    yield _lemma(
        "mb_counter",
        "MB_COUNTER is at most the bundles of its stream (32 bits).",
        [another, z.bits_at_most(z.bits_widened(counter, 64), made)],
        [_no_wrap(counter), z.bits_at_most(z.bits_widened(_up(counter), 64), _up(made))],
        MB_COUNTER=counter,
        bundles=made,
    )
    total = z.bits_const("TOTAL_MB_COUNT", 64)
    on_all = z.bits_const("bundles_of_all_streams", 64)
    yield _lemma(
        "total_mb_count",
        "TOTAL_MB_COUNT is at most the bundles of all streams (64 bits).",
        [z.bits_below(on_all, number(STREAMS * BUNDLES, 64)), z.bits_at_most(total, on_all)],
        [_no_wrap(total), z.bits_at_most(_up(total), _up(on_all))],
        TOTAL_MB_COUNT=total,
        bundles_of_all_streams=on_all,
    )
    iv = z.bits_const("IV_COUNTER", 64)
    # The IVs of a stream are counted with it: a bound by a product would need a multiplication.
    bound = z.bits_const("most_ivs", 64)
    more = z.bits_const("ivs_of_bundle", 64)
    yield _lemma(
        "iv_counter",
        "IV_COUNTER is at most 513 for each bundle of its stream (64 bits).",
        [
            z.bits_at_most(bound, number((BUNDLES - 1) * IVS, 64)),
            z.bits_at_most(iv, bound),
            at_least(more, 1),
            at_most(more, IVS),
        ],
        [
            z.bits_below(iv, z.add(iv, more)),
            z.bits_at_most(z.add(iv, more), z.add(bound, number(IVS, 64))),
        ],
        IV_COUNTER=iv,
        most_ivs=bound,
        ivs_of_bundle=more,
    )


def _of_pages(_checks: Checks) -> Iterator[Lemma]:
    """Counters that are bounded by pages, since they count pages (P14)."""
    for name, field in (("mig_count", "MIG_COUNT"), ("dirty_count", "DIRTY_COUNT")):
        count = z.bits_const(field, 64)
        yield _lemma(
            f"{name}_up",
            f"{field} counts pages, and there is one that it does not count yet (64 bits).",
            [z.bits_below(count, number(PAGES, 64))],
            [_no_wrap(count), at_most(_up(count), PAGES)],
            **{field: count},
        )
        less = z.bits_subtract(count, number(1, 64))
        yield _lemma(
            f"{name}_down",
            f"{field} counts the page that is no longer to be counted (64 bits).",
            [at_least(count, 1), at_most(count, PAGES)],
            [z.bits_below(less, count)],
            **{field: count},
        )


def lemmas(profile: str, without: frozenset[str] = frozenset()) -> list[Lemma]:
    """Every lemma under a profile, without some checks."""
    checks = Checks(CHECKS, profile, without)
    return [lemma for part in (_checked, _of_bundles, _of_pages) for lemma in part(checks)]


def counter_lemmas(
    profile: str, *, seed: int = 0, without: frozenset[str] = frozenset()
) -> list[Result]:
    """The verdicts on all lemmas of a profile."""
    return [decide(lemma, seed) for lemma in lemmas(profile, without)]
