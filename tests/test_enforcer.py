"""Does the enforcer stop a forbidden command before the module sees it, and notice a difference?"""

from __future__ import annotations

import numpy as np
import pytest
from soft_pair import MIGRATE, Pair

from tdxmig_model.enforcer import Enforcer
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import ModelMismatch, Refused
from tdxmig_model.model.words import SEPT
from tdxmig_model.wire.mbmd import Mbmd

PAGES = 24


class Watched:
    """A backend that counts what reaches it; `lie` changes what it lets one see."""

    def __init__(self, backend, lie=None):
        self.backend = backend
        self.commands = []
        self.lie = lie or (lambda seen: seen)

    capabilities = frozenset()

    def execute(self, command):
        self.commands.append(command.name)
        return self.backend.execute(command)

    def observe(self):
        return self.lie(dict(self.backend.observe()))

    def page_states(self, gpas):
        return self.backend.page_states(gpas)

    def close(self):
        self.backend.close()


def source(pair: Pair, **more):
    watched = Watched(pair.source, **more)
    return watched, Enforcer(watched, "source", pages=PAGES, vcpus=1)


def destination(pair: Pair):
    watched = Watched(pair.destination)
    return watched, Enforcer(watched, "destination", pages=PAGES, vcpus=1)


def test_a_forbidden_command_never_reaches_the_backend() -> None:
    pair = Pair(PAGES)
    watched, enforcer = source(pair)
    enforcer.execute(c.ExportStateImmutable())
    for command in (
        c.ExportTrack(in_order_done=True),
        c.ExportStateTd(),
        c.ExportMem(0, pair.gpas[:4], MIGRATE),
        c.ExportAbort(token=bytes(48)),
        c.ExportStateImmutable(),
    ):
        with pytest.raises(Refused) as caught:
            enforcer.execute(command)
        assert caught.value.unmet
        assert caught.value.legal
    assert watched.commands == ["export_state_immutable"]
    enforcer.execute(c.ExportPause())  # nothing was half applied
    assert enforcer.state()["source_op_state"] == "PAUSED_EXPORT"


def test_a_whole_cold_migration_is_checked_step_by_step() -> None:
    pair = Pair(PAGES)
    sent, ours = source(pair)
    taken, theirs = destination(pair)

    def hand_over(command, take):
        result = ours.execute(command)
        assert result.ok, result.status_name
        answer = theirs.execute(take(result.bundle))
        assert answer.ok, answer.status_name

    hand_over(c.ExportStateImmutable(), c.ImportStateImmutable)
    assert ours.execute(c.ExportPause()).ok
    hand_over(c.ExportMem(0, pair.gpas, MIGRATE), lambda b: c.ImportMem(0, b))
    hand_over(c.ExportTrack(), c.ImportTrack)
    hand_over(c.ExportStateTd(), c.ImportStateTd)
    hand_over(c.ExportStateVp(0), lambda b: c.ImportStateVp(b, 0))
    hand_over(c.ExportTrack(in_order_done=True), c.ImportTrack)
    assert theirs.execute(c.ImportEnd()).ok
    assert theirs.state()["destination_op_state"] == "RUNNABLE"
    assert ours.steps_checked >= PAGES + 7
    assert pair.source.memory_digest() == pair.destination.memory_digest()
    for enforcer, command in ((ours, c.VpEnter(0, 1)), (ours, c.ExportAbort())):
        with pytest.raises(Refused, match="POST_EXPORT"):
            enforcer.execute(command)
    assert theirs.execute(c.VpEnter(0, 8)).ok
    assert "import_end" in taken.commands
    assert "export_track_start" in sent.commands


def test_an_import_that_the_model_forbids_is_refused_before_the_module_sees_it() -> None:
    pair = Pair(PAGES)
    _, ours = source(pair)
    taken, theirs = destination(pair)
    first = ours.execute(c.ExportStateImmutable()).bundle
    token = ours.execute(c.ExportTrack()).bundle
    with pytest.raises(Refused, match="op_state"):
        theirs.execute(c.ImportTrack(token))
    assert theirs.execute(c.ImportStateImmutable(first)).ok
    assert theirs.execute(c.ImportTrack(token)).ok
    with pytest.raises(Refused, match="mig_epoch"):  # a replay
        theirs.execute(c.ImportTrack(token))
    assert taken.commands == ["import_state_immutable", "import_track"]


def test_a_failing_import_is_a_step_of_the_model() -> None:
    pair = Pair(PAGES)
    _, ours = source(pair)
    _, theirs = destination(pair)
    bundle = ours.execute(c.ExportStateImmutable()).bundle
    damaged = bytearray(bundle.pages[0])
    damaged[100] ^= 1
    broken = type(bundle).of(bundle.mbmd, [bytes(damaged), *bundle.pages[1:]])
    result = theirs.execute(c.ImportStateImmutable(broken))
    assert not result.ok
    assert theirs.state()["destination_op_state"] == "FAILED_IMPORT"
    assert theirs.execute(c.ImportAbort()).ok
    with pytest.raises(Refused):
        theirs.execute(c.ImportEnd())


def test_a_backend_that_differs_is_a_mismatch_that_shows_both() -> None:
    pair = Pair(PAGES)

    def lie(seen):
        if seen["op_state"] == "LIVE_EXPORT":
            seen["total_mb_count"] = 7
        return seen

    _, enforcer = source(pair, lie=lie)
    with pytest.raises(ModelMismatch) as caught:
        enforcer.execute(c.ExportStateImmutable())
    assert caught.value.differences == {"source_total_mb_count": (1, 7)}
    assert str(caught.value) == (
        "after export_state_immutable the backend differs from the model\n"
        "  source_total_mb_count: model 1, backend 7"
    )


def test_a_page_that_differs_is_named() -> None:
    pair = Pair(PAGES)
    watched, enforcer = source(pair)
    enforcer.execute(c.ExportStateImmutable())
    states = pair.source.page_states
    wrong = int(pair.gpas[3])

    def page_states(gpas):
        seen = states(gpas).copy()
        seen[np.asarray(gpas) == wrong] = 4
        return seen

    watched.page_states = page_states
    with pytest.raises(ModelMismatch, match=r"source_page\[\d+\]: model BLOCKEDW, backend MAPPED"):
        enforcer.execute(c.ExportBlockw(pair.gpas[:8]))


def test_what_the_module_refuses_is_taken_back() -> None:
    pair = Pair(PAGES)
    _, enforcer = source(pair)
    enforcer.execute(c.ExportStateImmutable())
    enforcer.execute(c.ExportPause())
    enforcer.execute(c.ExportMem(0, pair.gpas, MIGRATE))
    enforcer.execute(c.ExportTrack(in_order_done=True))
    result = enforcer.execute(c.ExportAbort(token=bytes(48)))  # no token at all
    assert not result.ok
    assert enforcer.state()["source_op_state"] == "POST_EXPORT"
    with pytest.raises(Refused):
        enforcer.execute(c.ExportAbort())


def test_check_asks_without_doing() -> None:
    pair = Pair(PAGES)
    watched, enforcer = source(pair)
    enforcer.check(c.ExportStateImmutable())
    with pytest.raises(Refused):
        enforcer.check(c.ExportPause())
    assert watched.commands == []
    assert enforcer.state()["source_op_state"] == "RUNNABLE"


def test_pages_that_wait_for_the_guest_are_followed_on_both_sides() -> None:
    pair = Pair(4, pending_pages=2, guest="sequential")
    watched = Watched(pair.source)
    ours = Enforcer(watched, "source", pages=4, vcpus=1)
    theirs = Enforcer(Watched(pair.destination), "destination", pages=4, vcpus=1)
    assert ours.monitor.text("source_op_state") == "RUNNABLE"

    def states(enforcer):
        return [SEPT.members[int(s)] for s in enforcer.monitor[f"{enforcer.side}_page"]]

    def live(gpas):
        assert ours.execute(c.ExportBlockw(gpas)).ok
        assert ours.execute(c.MemTrack()).ok
        result = theirs.execute(c.ImportMem(0, ours.execute(c.ExportMem(0, gpas, MIGRATE)).bundle))
        assert result.ok, result.status_name

    assert states(ours)[2:] == ["PENDING", "PENDING"]
    theirs.execute(c.ImportStateImmutable(ours.execute(c.ExportStateImmutable()).bundle))
    live(pair.gpas)
    assert states(ours)[2:] == ["PENDING_EXPORTED_BLOCKEDW"] * 2
    assert states(theirs) == ["MAPPED", "MAPPED", "PENDING", "PENDING"]
    accepted = set()
    for _ in range(20):  # the guest writes, and accepts what it may not use yet
        ended = ours.execute(c.VpEnter(0, 4)).exit
        if ended.reason == "ept_violation":
            accepted.add(ended.gpa)
            assert ours.execute(c.ExportUnblockw(ended.gpa)).ok
    assert states(ours)[1:] == ["EXPORTED_DIRTY"] * 3
    assert accepted == set(pair.gpas[1:].tolist())
    theirs.execute(c.ImportTrack(ours.execute(c.ExportTrack()).bundle))
    live(pair.gpas[1:])
    assert states(theirs) == ["MAPPED"] * 4


# --- nothing is left behind ----------------------------------------------------------------------


def snapshot(enforcer):
    return [np.copy(v) if isinstance(v, np.ndarray) else repr(v) for v in enforcer.monitor.state]


def unchanged(enforcer, before) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(before, snapshot(enforcer), strict=True))


def test_check_and_refusals_leave_nothing_in_the_model() -> None:
    pair = Pair(PAGES)
    _, ours = source(pair)
    _, theirs = destination(pair)
    first = ours.execute(c.ExportStateImmutable()).bundle
    token = ours.execute(c.ExportTrack()).bundle
    before = snapshot(theirs)
    theirs.check(c.ImportStateImmutable(first))
    assert unchanged(theirs, before)
    with pytest.raises(Refused):
        theirs.execute(c.ImportTrack(token))
    assert unchanged(theirs, before)
    before = snapshot(ours)
    with pytest.raises(Refused):
        ours.check(c.ExportAbort(bytes(48)))
    assert unchanged(ours, before)
    assert not ours.monitor["abort_token"]


def test_lists_and_tokens_that_cannot_be_are_refused_with_state_and_legal_steps() -> None:
    pair = Pair(PAGES)
    watched, ours = source(pair)
    immutable = ours.execute(c.ExportStateImmutable()).bundle
    abort = Mbmd.abort_token(mb_counter=0, iv_counter=1)
    _, theirs = destination(pair)
    token = type(immutable).of(abort)
    twice, beyond = pair.gpas[[0, 0]], np.array([PAGES * 4096], dtype=np.uint64)
    for enforcer, command in (
        (ours, c.ExportBlockw(twice)),
        (ours, c.ExportBlockw(beyond)),
        (ours, c.ExportUnblockw(-1)),
        (ours, c.ExportUnblockw(1 << 64)),
        (theirs, c.ImportTrack(token)),
    ):
        before = snapshot(enforcer)
        for ask in (enforcer.check, enforcer.execute):
            with pytest.raises(Refused) as caught:
                ask(command)
            assert caught.value.state
            assert caught.value.legal
        assert unchanged(enforcer, before)
        assert enforcer.monitor._undo is None
    assert watched.commands == ["export_state_immutable"]


def test_a_backend_that_raises_after_it_acted_is_adopted() -> None:
    pair = Pair(PAGES)
    watched, ours = source(pair)
    execute = watched.execute

    def acts_and_raises(command):
        execute(command)
        raise RuntimeError("after the fact")

    watched.execute = acts_and_raises
    with pytest.raises(RuntimeError):
        ours.execute(c.ExportStateImmutable())
    assert ours.monitor._undo is None
    assert ours.state()["source_op_state"] == "LIVE_EXPORT"
    watched.execute = execute
    assert ours.execute(c.ExportPause()).ok


def test_an_error_of_ours_closes_the_undo_log() -> None:
    _, ours = source(Pair(PAGES))
    with pytest.raises(TypeError):
        ours.check(c.ExportStateVp("0"))  # type: ignore[arg-type]
    assert ours.monitor._undo is None


@pytest.mark.parametrize("profile", ["tdx-1.5.01", "hardened"])
def test_a_second_session_starts_with_fresh_counters(profile) -> None:
    """A stream that the session before used has its old counter until it is used again."""
    pair = Pair(PAGES, streams=2, profile=profile)
    for _ in range(2):
        enforcer = Enforcer(pair.source, "source", profile, pages=PAGES, vcpus=1, streams=2)
        commands = [
            c.ExportStateImmutable(),
            c.ExportPause(),
            c.ExportMem(1, pair.gpas[:4], MIGRATE),
            c.ExportAbort(),
            c.ExportRestore(pair.gpas[:4]),
        ]
        assert all(enforcer.execute(command).ok for command in commands)
        pair.new_destination(streams=2)
        pair.exchange_keys()
