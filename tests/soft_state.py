"""All protocol state of a software module as one flat table, and what changed between two of them.

Keys are paths such as ``tdrs[0x..].tdcs.mig_epoch``.  Nothing is left out but caches that leaves
rebuild (the walk cache of the Secure EPT, the scratch slot of a cipher) and what is no state of the
module: its source of randomness, its observer, and the content of pages that no TD owns.
"""

import dataclasses
import types
from collections import deque
from enum import Enum

import numpy as np

from tdxmig_model.backend.soft.crypto import StreamCipher
from tdxmig_model.backend.soft.memory import Memory, PageType
from tdxmig_model.backend.soft.sept import SeptTree

PLAIN = (int, str, bytes, bool, float, type(None), Enum)
IGNORED = ("random", "iv_observer", "memory", "_memory", "_observer")
PAGE = 4096


class Opaque:
    """An object whose inside cannot be seen; the same only if it is the same object."""

    def __init__(self, thing):
        self.thing = thing

    def __eq__(self, other):
        return isinstance(other, Opaque) and other.thing is self.thing

    __hash__ = None

    def __repr__(self):
        return f"<{type(self.thing).__name__}>"


def snapshot(module):
    """Path -> value of everything that leaves of this module can change."""
    found = {}
    for name, value in vars(module).items():
        if name not in IGNORED:
            _walk(name, value, found)
    _memory(module.memory, found)
    return found


def changes(before, after):
    """Path -> (value before, value after) where they differ; absent is None."""
    paths = before.keys() | after.keys()
    return {
        path: (before.get(path), after.get(path))
        for path in paths
        if before.get(path) != after.get(path)
    }


def _walk(path, value, found):
    if isinstance(value, PLAIN):
        found[path] = value
    elif isinstance(value, dict):
        for key, member in value.items():
            shown = hex(key) if isinstance(key, int) and not isinstance(key, Enum) else str(key)
            _walk(f"{path}[{shown}]", member, found)
    elif isinstance(value, (set, frozenset)):
        found[path] = frozenset(value)
    elif isinstance(value, (list, tuple, deque)):
        _walk_sequence(path, value, found)
    elif isinstance(value, StreamCipher):
        found[f"{path}.key"], found[f"{path}.suffix"] = value._key, value.suffix
    elif isinstance(value, SeptTree):
        found[f"{path}.root_hpa"] = value.root_hpa
    elif hasattr(value, "hexdigest"):
        found[path] = value.hexdigest()
    else:
        _walk_object(path, value, found)


def _walk_sequence(path, value, found):
    if all(isinstance(member, PLAIN) for member in value):
        found[path] = tuple(value)
        return
    for index, member in enumerate(value):
        _walk(f"{path}[{index}]", member, found)


def _walk_object(path, value, found):
    ours = type(value).__module__.startswith("tdxmig_model.")
    if not ours or isinstance(value, (types.FunctionType, types.MethodType, Memory)):
        found[path] = Opaque(value)
        return
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        names = [*getattr(type(value), "__slots__", ()), *getattr(value, "__dict__", ())]
    for name in names:
        if name not in IGNORED:
            _walk(f"{path}.{name}", getattr(value, name), found)


def _memory(memory, found):
    """PAMT columns and locks, and the words of every page that is not the VMM's."""
    for hpa, lock in memory._locks.items():
        _walk(f"pamt[{hpa:#x}].lock", lock, found)
    kinds = np.frombuffer(memory.page_type, dtype=np.uint8)
    for number in np.flatnonzero(kinds != PageType.NDA).tolist():
        hpa = number * PAGE
        pamt = f"pamt[{hpa:#x}]"
        found[f"{pamt}.page_type"] = PageType(int(kinds[number]))
        found[f"{pamt}.owner"] = memory.owner[number]
        found[f"{pamt}.bepoch"] = memory.bepoch[number]
        if kinds[number] == PageType.EPT:
            for index, word in enumerate(memory.page_words(hpa).tolist()):
                found[f"word[{hpa + 8 * index:#x}]"] = word
        else:
            found[f"page[{hpa:#x}]"] = bytes(memory.page(hpa))


class Shared:
    """A copy of the VMM's memory as far as `past`, to see which pages of it a leaf wrote."""

    def __init__(self, memory, past):
        self._memory = memory
        self._words = memory.array[: past >> 3].copy()

    def written(self):
        """HPAs of the pages that are not as they were, ascending."""
        now = self._memory.array[: self._words.size]
        differs = (now != self._words).reshape(-1, PAGE // 8).any(axis=1)
        return [number * PAGE for number in np.flatnonzero(differs).tolist()]
