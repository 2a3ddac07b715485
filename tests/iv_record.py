"""Whether any (key, IV) pair encrypted twice, over every software TDX module of a test run.

Each module has a record of its own, for tests draw key material from repeatable sources and build
the same pair of hosts again and again.  Modules with real randomness share one record for the whole
process.  Going back to a snapshot of a module takes its record back too.
"""

import functools
import secrets

from tdxmig_model.backend.soft.module import Module
from tdxmig_model.backend.soft.snapshot import Snapshot


class IvRecord:
    """Pairs seen so far, and those seen again since they were last asked for."""

    def __init__(self):
        self.total = 0
        self.shared = {}
        self._repeated = []

    def take_repeated(self):
        """(key, iv) pairs that were used again; the next call begins anew."""
        repeated, self._repeated = self._repeated, []
        return repeated

    def observer(self, pairs, then=None):
        """An IvObserver that keeps IVs by key in `pairs`, and tells `then` as well."""

        def observe(key, iv):
            used = pairs.get(key)
            if used is None:
                used = pairs[key] = set()
            if iv in used:
                self._repeated.append((key, iv))
            used.add(iv)
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
