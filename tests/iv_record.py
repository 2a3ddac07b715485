"""Whether any (key, IV) pair encrypted twice, over every software TDX module of a test run.

Modules that are given the same observer, as both sides of a `Pair` are, share a record; any other
module with repeatable key material has one of its own, for tests build the same pair of hosts again
and again.  Modules with real randomness share one record for the whole process.  Going back to a
snapshot of a module takes back what this module did.

Processes of `tdxmig run` are watched by child_hook/sitecustomize.py, and report at their exit.
"""

import atexit
import functools
import hashlib
import os
import secrets
import weakref
from collections import Counter
from pathlib import Path

from tdxmig_model.backend.soft.module import Module
from tdxmig_model.backend.soft.snapshot import Snapshot

HOOK = Path(__file__).resolve().parent / "child_hook"


class IvRecord:
    """Pairs seen so far, and those seen again since they were last asked for."""

    def __init__(self):
        self.total = 0
        self.shared = {}
        self._groups = weakref.WeakKeyDictionary()
        self._repeated = []

    def take_repeated(self):
        """(key, iv) pairs that were used again; the next call begins anew."""
        repeated, self._repeated = self._repeated, []
        return repeated

    def observer(self, pairs, then=None):
        """An IvObserver that keeps IVs by key in `pairs`, and tells `then` as well.

        A pair is used again if it is in the `pairs` of any observer with the same `then`.
        """
        together = [] if then is None else self._groups.setdefault(then, [])
        together.append(pairs)

        def observe(key, iv):
            if any(iv in member.get(key, ()) for member in together):
                self._repeated.append((key, iv))
            pairs.setdefault(key, set()).add(iv)
            self.total += 1
            if then is not None:
                then(key, iv)

        observe.pairs = pairs
        return observe

    def install(self):
        """Have every module that is made from now on observed."""
        make, take, restore = Module.__init__, Snapshot.__init__, Snapshot.restore

        @functools.wraps(make)
        def observed_make(module, memory, **options):
            given = options.pop("iv_observer", None)
            real = options.get("random", secrets.token_bytes) is secrets.token_bytes
            observer = self.observer(self.shared if real else {}, given)
            make(module, memory, iv_observer=observer, **options)

        @functools.wraps(take)
        def observed_take(snapshot, module):
            take(snapshot, module)
            snapshot.iv_pairs = _copy(module.iv_observer.pairs)

        @functools.wraps(restore)
        def observed_restore(snapshot):
            restore(snapshot)
            pairs = snapshot._module.iv_observer.pairs
            pairs.clear()
            pairs.update(_copy(snapshot.iv_pairs))

        Module.__init__ = observed_make
        Snapshot.__init__, Snapshot.restore = observed_take, observed_restore


def _copy(pairs):
    return {key: set(ivs) for key, ivs in pairs.items()}


RECORD = IvRecord()


# --- other processes -----------------------------------------------------------------------------


def report_at_exit(directory):
    """Watch this process; leave `<pid>.began` now, and `<pid>.pairs` when it ends by itself.

    A report has a line per encryption: a digest of key and IV, for no key belongs in a file.
    """
    RECORD.install()
    digests = []
    RECORD.observer = functools.partial(_tell_digests, RECORD.observer, digests.append)
    (directory / f"{os.getpid()}.began").touch()

    def report():
        written = directory / f"{os.getpid()}.writing"
        written.write_text("".join(f"{digest}\n" for digest in digests))
        written.rename(directory / f"{os.getpid()}.pairs")

    atexit.register(report)


def _tell_digests(make, tell, pairs, then=None):
    observe = make(pairs, then)

    def observe_and_tell(key, iv):
        observe(key, iv)
        tell(hashlib.sha256(key + iv).hexdigest())

    observe_and_tell.pairs = pairs
    return observe_and_tell


class Children:
    """Processes of `tdxmig run` that ended since they were last asked for."""

    def __init__(self):
        self.directory = None
        self.lost = 0
        """How many the test kills; they cannot report."""

    def watch(self, directory, monkeypatch):
        """Watch processes that are started from now on; `directory` is for their reports."""
        self.directory = directory
        path = [str(HOOK), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        monkeypatch.setenv("TDXMIG_TEST_IV_REPORTS", str(directory))

    def take(self):
        """(began, reports): how many began, and the digests of each that reported."""
        began = len(list(self.directory.glob("*.began")))
        reports = [file.read_text().split() for file in self.directory.glob("*.pairs")]
        for file in self.directory.iterdir():
            file.unlink()
        return began, reports

    def judge(self):
        """Every process reported, but those that a test killed, and no two uses are the same."""
        lost, self.lost = self.lost, 0
        began, reports = self.take()
        assert began - len(reports) == lost, f"{began} processes began, {len(reports)} reported"
        uses = Counter(digest for report in reports for digest in report)
        repeated = [digest for digest, count in uses.items() if count > 1]
        assert not repeated, f"{len(repeated)} (key, IV) pairs encrypted more than once by a run"


CHILDREN = Children()
