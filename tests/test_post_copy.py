"""Post-copy and the limits of the pre-copy: does a session hand over when and how it was told?"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from test_channels import channels
from test_session import PAGES, VCPUS, Migration, backends, migrate

from tdxmig_model.backend.soft.backend import SoftBackend, soft_destination, soft_source
from tdxmig_model.engine import WhenNotConverging
from tdxmig_model.engine.commands import Gpas
from tdxmig_model.errors import UsageError
from tdxmig_model.session import (
    DestinationSession,
    Ending,
    Hooks,
    SessionOptions,
    SourceSession,
)
from tdxmig_model.supervisor.digests import PageDigests
from tdxmig_model.trace import read_trace
from tdxmig_model.transport import Faults

AFTER_ONE_EPOCH = SessionOptions(
    batch=16,
    guest_budget=4000,
    converged_pages=0,
    max_epochs=1,
    not_converging=WhenNotConverging.POST_COPY,
    peer_timeout=1.0,
)
AT_ONCE = SessionOptions(
    batch=4,
    guest_budget=50,
    max_epochs=0,
    not_converging=WhenNotConverging.POST_COPY,
    peer_timeout=1.0,
)


class Compare(Hooks):
    """What memory and vCPUs of the destination are before the guest sees them."""

    def __init__(self, backend: SoftBackend) -> None:
        self.digests = PageDigests(backend)
        self.late: list[int] = []

    def committing(self) -> None:
        self.digests.begin()

    def arrived(self, gpas: Gpas) -> None:
        self.digests.add(gpas)
        self.late += gpas.tolist()


def post_copy(
    path: Path,
    options: SessionOptions,
    *,
    guest: str = "random-writer",
    count: int = 1,
    forward: Faults | None = None,
    stop: tuple[str, str] = ("", ""),
) -> tuple[Migration, Compare]:
    theirs = soft_destination(PAGES, vcpus=VCPUS, streams=count)
    compare = Compare(theirs)
    done = migrate(
        path,
        ours=soft_source(PAGES, vcpus=VCPUS, streams=count, guest=guest),
        theirs=theirs,
        options=options,
        more_channels=channels(count),
        destination_hooks=compare,
        forward=forward,
        stop=stop,
    )
    return done, compare


def assert_handed_over(done: Migration, compare: Compare) -> None:
    """What arrived is what the source had at its pause, and the guest has gone on since."""
    ours, theirs = backends(done)
    here = PageDigests(ours)
    here.begin()
    assert [outcome.ending for outcome in done.outcomes] == [Ending.MIGRATED] * 2
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    assert compare.digests.memory == here.memory
    assert compare.digests.vcpus == here.vcpus
    assert theirs.memory_digest() != ours.memory_digest(), "the guest did not run in post-copy"
    done.assert_accepted()


@pytest.mark.parametrize("count", [1, 3])
def test_what_was_written_is_cancelled_and_follows_the_start_token(
    count: int, tmp_path: Path
) -> None:
    done, compare = post_copy(tmp_path, AFTER_ONE_EPOCH, count=count)
    assert_handed_over(done, compare)
    source, destination = done.outcomes
    assert 0 < len(compare.late) < PAGES
    assert source.pages_after_start == destination.pages_after_start == len(compare.late)
    imports = [record for record in read_trace(done.traces[1]) if record.step == "import_mem"]
    cancelled = [record for record in imports if "cancel" in record.params]
    assert cancelled, "the destination kept old versions of pages that were to follow"
    assert source.events.count("cancel_page") == len(cancelled)


@pytest.mark.parametrize("count", [1, 2])
def test_all_memory_can_follow_and_the_guest_gets_first_what_it_waits_for(
    count: int, tmp_path: Path
) -> None:
    done, compare = post_copy(tmp_path, AT_ONCE, count=count)
    assert_handed_over(done, compare)
    source, destination = done.outcomes
    assert sorted(compare.late) == backends(done)[0].page_gpas().tolist()
    assert source.iterations == []
    assert 0 < source.pages_requested <= destination.pages_requested
    assert compare.late != sorted(compare.late), "requested pages did not come first"


def test_a_guest_that_converges_needs_no_post_copy(tmp_path: Path) -> None:
    done, compare = post_copy(tmp_path, AFTER_ONE_EPOCH, guest="idle")
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    assert "commit" not in done.destination.outcome.events
    assert compare.late == []


def test_a_source_that_is_lost_in_post_copy_is_told_as_it_is(tmp_path: Path) -> None:
    """The TD runs at the destination with pages missing; nobody pretends that it can go back."""
    whole, _ = post_copy(tmp_path, AT_ONCE)
    cut = whole.source.outcome.bytes - 100_000
    done, _ = post_copy(tmp_path, AT_ONCE, forward=Faults(cut_at=cut))
    source, destination = done.outcomes
    assert done.states == ("POST_EXPORT", "LIVE_IMPORT")
    assert done.runnable == (False, True)
    assert source.ending is Ending.UNDECIDED
    missing = PAGES - done.destination.engine.pages_imported
    assert missing > 0
    assert f"{missing} of its pages never arrived" in destination.sentence
    assert done.destination.channels[0]._closed  # type: ignore[attr-defined]
    done.assert_accepted()


class StopOnce(Compare):
    """Asks for a stop once a page has come after the commit, and then for ever."""

    def __init__(self, backend: SoftBackend) -> None:
        super().__init__(backend)
        self.asked = 0

    def stop_requested(self, event: str | None) -> str | None:
        self.asked += bool(self.late)
        return "too late" if self.late else None


def test_a_stop_after_the_commit_does_not_take_the_guest_its_memory(tmp_path: Path) -> None:
    theirs = soft_destination(PAGES, vcpus=VCPUS)
    hooks = StopOnce(theirs)

    def stop_the_source_too(source: SourceSession, _destination: DestinationSession) -> None:
        source.hooks = hooks

    done = migrate(
        tmp_path,
        ours=soft_source(PAGES, vcpus=VCPUS, guest="random-writer"),
        theirs=theirs,
        options=AT_ONCE,
        destination_hooks=hooks,
        prepare=stop_the_source_too,
    )
    assert_handed_over(done, hooks)
    assert hooks.asked > 2


def test_a_stop_before_the_commit_still_brings_the_td_back(tmp_path: Path) -> None:
    done = migrate(
        tmp_path,
        ours=soft_source(PAGES, vcpus=VCPUS, guest="random-writer"),
        options=AFTER_ONE_EPOCH,
        stop=("destination", "commit"),
    )
    assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert "abort_with_token" in done.source.outcome.events
    done.assert_accepted()


def test_pages_that_are_already_here_or_unknown_are_not_sent_again(tmp_path: Path) -> None:
    done, _ = post_copy(tmp_path, AT_ONCE)
    source = done.source
    exports = source.precopy.exports
    assert source.precopy.requested(backends(done)[0].page_gpas()) == 0
    assert (source.precopy.next_batch(), source.precopy.exports) == (None, exports)


# --- the limits of the pre-copy ------------------------------------------------------------------


def test_each_epoch_is_accounted_for(tmp_path: Path) -> None:
    options = SessionOptions(batch=16, guest_budget=2000, converged_pages=0, max_epochs=3)
    done = migrate(tmp_path, options=options)
    iterations = done.source.outcome.iterations
    assert [one.epoch for one in iterations] == [1, 2, 3, 4]
    assert [one.live for one in iterations] == [True, True, True, False]
    assert iterations[0].sent == PAGES
    for before, after in pairwise(iterations):
        assert after.sent == before.left > 0
    assert iterations[-1].left == 0
    assert sum(one.sent for one in iterations) == done.source.outcome.pages_moved
    assert all(one.bytes > one.sent * 4096 and one.seconds > 0 for one in iterations)


def test_a_downtime_that_is_long_enough_ends_the_pre_copy_early(tmp_path: Path) -> None:
    def epochs(limit: float | None) -> int:
        options = SessionOptions(
            batch=16, guest_budget=2000, converged_pages=0, max_epochs=4, downtime_limit=limit
        )
        return migrate(tmp_path, options=options).source.outcome.epochs

    assert epochs(None) == epochs(1e-9) == 5
    assert epochs(1e9) == 2


def test_a_guest_that_never_converges_can_keep_its_source(tmp_path: Path) -> None:
    options = SessionOptions(
        batch=16,
        guest_budget=20_000,
        converged_pages=0,
        max_epochs=2,
        not_converging=WhenNotConverging.ABORT,
        peer_timeout=1.0,
    )
    done = migrate(tmp_path, options=options)
    assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert "did not converge" in done.source.outcome.cause
    assert "pause" not in done.source.outcome.events
    done.assert_accepted()


def test_the_bandwidth_limit_slows_the_live_part_only(tmp_path: Path) -> None:
    limit = 2 << 20
    options = SessionOptions(batch=8, converged_pages=8, bandwidth_limit=limit, peer_timeout=2.0)
    done = migrate(tmp_path, options=options)
    first = done.source.outcome.iterations[0]
    assert first.bytes / first.seconds <= limit
    assert first.seconds < 4 * first.bytes / limit, "it waits without need"
    done.assert_accepted()


@pytest.mark.parametrize(
    "options", [{"bandwidth_limit": 0}, {"max_epochs": 0}, {"bandwidth_limit": -1.0}]
)
def test_limits_that_cannot_be_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        SessionOptions(**options)  # type: ignore[arg-type]
