"""Does the pre-copy send every page in its newest content, once an epoch, and stop in time?"""

from __future__ import annotations

import random

import numpy as np
import pytest
from engine_play import gpas
from hypothesis import given
from hypothesis import strategies as st

from tdxmig_model.engine import Decision, PageSet, PreCopy, PreCopyLimits
from tdxmig_model.engine.pages import NO_PAGES
from tdxmig_model.errors import UsageError

CHUNK = 1 << 15
numbers = st.lists(
    st.sampled_from([0, 1, 2, CHUNK - 1, CHUNK, 5 * CHUNK + 3, (1 << 40) - 1]), max_size=6
)


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "take", "update"]), numbers)))
def test_a_page_set_is_a_set(operations: list[tuple[str, list[int]]]) -> None:
    ours, reference = PageSet(), set[int]()
    for operation, pages in operations:
        column = gpas(*pages)
        match operation:
            case "add":
                ours.add(column)
                reference.update(pages)
            case "discard":
                ours.discard(column)
                reference.difference_update(pages)
            case "update":
                ours.update(PageSet(column))
                reference.update(pages)
            case _:
                taken = ours.take(len(pages)).tolist()
                assert taken == gpas(*sorted(reference)[: len(pages)]).tolist()
                reference.difference_update(page // 4096 for page in taken)
        assert len(ours) == len(reference)
        assert ours.gpas().tolist() == gpas(*sorted(reference)).tolist()
        assert ours.contains(column).tolist() == [page in reference for page in pages]
    ours.clear()
    assert not ours


def test_one_page_can_be_asked_for() -> None:
    pages = PageSet(gpas(3))
    assert 0x3000 in pages
    assert 0x4000 not in pages
    with pytest.raises(UsageError, match="0x3001"):
        pages.add(0x3001)


def run_epoch(precopy: PreCopy) -> list[int]:
    precopy.next_epoch()
    sent: list[int] = []
    while (batch := precopy.next_batch()) is not None:
        assert 1 <= batch.size <= precopy.limits.batch
        sent += batch.tolist()
        precopy.sent(batch, NO_PAGES)
    return sent


def test_the_first_epoch_has_every_page_lowest_first() -> None:
    precopy = PreCopy(gpas(9, 3, 70000, 4), PreCopyLimits(batch=3))
    assert precopy.total == 4
    assert run_epoch(precopy) == gpas(3, 4, 9, 70000).tolist()
    assert precopy.epoch == 1
    assert precopy.exports == 4
    assert precopy.done


def test_written_and_unsent_pages_wait_for_the_next_epoch() -> None:
    precopy = PreCopy(gpas(*range(10)), PreCopyLimits(batch=4))
    precopy.next_epoch()
    first = precopy.next_batch()
    assert first is not None
    precopy.sent(first, gpas(1))
    precopy.dirty(0x2000)
    precopy.dirty(gpas(9))  # not sent yet in this epoch: it goes with what it holds then
    assert (precopy.remaining, precopy.later) == (6, 2)
    seen = []
    while (batch := precopy.next_batch()) is not None:
        precopy.sent(batch, NO_PAGES)
        seen += batch.tolist()
    assert seen == gpas(*range(4, 10)).tolist()
    assert not precopy.done
    assert run_epoch(precopy) == gpas(1, 2).tolist()
    assert precopy.done
    assert precopy.exports == 11


def test_a_page_is_sent_at_most_once_an_epoch_and_never_forgotten() -> None:
    dice = random.Random(5)
    precopy = PreCopy(gpas(*range(500)), PreCopyLimits(batch=64, epochs=10, remaining=20))
    content, copied = [0] * 500, [-1] * 500
    while True:
        precopy.next_epoch()
        this_epoch: set[int] = set()
        while (batch := precopy.next_batch()) is not None:
            unsent = batch[[dice.random() < 0.05 for _ in range(batch.size)]]
            precopy.sent(batch, unsent)
            for page in (int(gpa) // 4096 for gpa in np.setdiff1d(batch, unsent)):
                assert page not in this_epoch
                this_epoch.add(page)
                copied[page] = content[page]
            for page in dice.choices(range(500), k=2):
                content[page] += 1
                precopy.dirty(page * 4096)
        if precopy.decide() is not Decision.NEXT_EPOCH:
            break
    while not precopy.done:
        for gpa in run_epoch(precopy):
            copied[gpa // 4096] = content[gpa // 4096]
    assert copied == content


def test_it_stops_when_few_pages_are_left_or_the_epochs_are_used_up() -> None:
    precopy = PreCopy(gpas(*range(100)), PreCopyLimits(epochs=2, remaining=5))
    run_epoch(precopy)
    precopy.dirty(gpas(*range(6)))
    assert precopy.decide() is Decision.NEXT_EPOCH
    run_epoch(precopy)
    precopy.dirty(gpas(*range(6)))
    assert precopy.decide() is Decision.EPOCH_LIMIT
    run_epoch(precopy)
    precopy.dirty(gpas(*range(5)))
    assert precopy.decide() is Decision.CONVERGED


def test_an_epoch_that_sent_nothing_is_stalled() -> None:
    precopy = PreCopy(gpas(1, 2))
    assert not precopy.stalled
    precopy.next_epoch()
    batch = precopy.next_batch()
    assert batch is not None
    precopy.sent(batch, batch)
    assert precopy.stalled
    precopy.next_epoch()
    batch = precopy.next_batch()
    assert batch is not None
    precopy.sent(batch, batch[:1])
    assert not precopy.stalled


@pytest.mark.parametrize("limits", [{"batch": 0}, {"batch": 513}, {"epochs": 0}, {"remaining": -1}])
def test_impossible_limits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        PreCopyLimits(**limits)
