"""Are counts over limits and prefixes proved exactly, and no more than is true?"""

from __future__ import annotations

from dataclasses import replace

from toy_handover import CELL, c, claim, dirty, dirty_cells, dirty_count, host_row, proved, toy

from tdxmig_model.expr import (
    BOOL,
    INT,
    Size,
    System,
    all_of,
    any_of,
    choose,
    count,
    forall,
    implies,
    index,
    mapping,
    need,
    not_,
    param,
    scalar,
)
from tdxmig_model.smt.unbounded import Unbounded


def _limited_marks():
    """Marked cells below a limit: a count that a scalar changes at several elements at once."""
    limit = scalar("limit", INT, 0, "host")
    mark = mapping("mark", (CELL,), BOOL, False, "host")
    marked = count("marked below", CELL, lambda i: all_of(mark[i], i.lt(limit)))
    return limit, mark, marked


def test_a_limit_that_moves_may_change_more_than_the_written_element():
    limit, mark, marked = _limited_marks()
    put = host_row("put", (c,), (need("low", limit.eq(0)),), (mark[c].to(True),))
    lift = host_row("lift", (c,), (), (mark[c].to(mark[c]), limit.to(choose(limit.eq(0), 2, 0))))
    range_of = claim("range", any_of(limit.eq(0), limit.eq(2)), "lemma")
    one = claim("one", marked.lt(2))
    system = System("marks", (limit, mark), (put, lift), (one, range_of))
    assert not proved(system, "one")
    assert proved(system, "range")


def test_a_count_of_a_prefix_grows_by_the_appended_element():
    """An append moves the limit and writes the element there: the count grows by exactly one."""
    limit, mark, marked = _limited_marks()
    room = need("room", limit.lt(Size(CELL)))
    append = host_row("append", (), (room,), (mark[limit].to(True), limit.to(limit + 1)))
    exact = claim("exact", marked.eq(limit))
    start = claim("start", limit.ge(0), "lemma")
    system = System("marks", (limit, mark), (append,), (exact, start))
    assert proved(system, "exact")
    assert not proved(replace(system, properties=(claim("exact", marked.lt(limit)),)), "exact")


def test_as_many_marks_as_places_leave_no_gap():
    """The pigeonhole, for an index without a size: n marks below n are all of them."""
    place = index("Place")
    mark = mapping("mark", (place,), BOOL, False, "host")
    marked = count("marks", place, lambda i: mark[i])
    at = param("at", place)
    put = host_row(
        "put",
        (at,),
        (need("new", not_(mark[at])),),
        (mark[at].to(True),),
    )
    no_gap = claim(
        "no_gap",
        forall(
            {"j": place, "n": place},
            lambda j, n: implies(all_of(j.lt(n), marked.below(n).eq(n)), mark[j]),
        ),
    )
    some = claim("some", forall({"n": place}, lambda n: marked.below(n).lt(n + 1)))
    wrong = claim("wrong", forall({"n": place}, lambda n: marked.below(n).lt(n)))
    system = System("marks", (mark,), (put,), (no_gap, some, wrong))
    assert Unbounded(system).sized == frozenset()
    assert proved(system, "no_gap")
    assert proved(system, "some")
    assert not proved(system, "wrong")


def test_a_count_whose_predicate_reads_a_scalar():
    """`last` moves, so the number of cells below it changes at more than one element."""
    below = count("dirty below last", CELL, lambda i: all_of(dirty[i], i.lt(dirty_count)))
    assert proved(toy(claim("bounded", below.le(dirty_cells))), "bounded")
    assert not proved(toy(claim("none", below.eq(0))), "none")
