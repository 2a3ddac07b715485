"""The state of a software module at one moment, to go back to as often as wanted.

An exhaustive search over interleavings runs the same calls from the same state thousands of times;
building a TD each time would take a hundred times longer than the calls.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdxmig_model.backend.soft.memory import PageType
from tdxmig_model.backend.soft.state import Interrupted
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import PAGE_SIZE

if TYPE_CHECKING:
    from tdxmig_model.backend.soft.module import Module


class Snapshot:
    """Everything of `module` that leaves can change: TDR, TDCS, TDVPS, MIGSC, PAMT, owned pages.

    Shared memory is the VMM's and is not kept: whoever calls leaves again writes its lists again.
    Key material already drawn is not put back.  UsageError while a leaf is in progress, or while a
    state bundle is interrupted: its AES-GCM message can go on once only.
    """

    def __init__(self, module: Module) -> None:
        memory = module.memory
        if memory.any_locked:
            raise UsageError("a leaf is in progress; take the snapshot before or after it")
        self._module = module
        self._objects: list[tuple[Any, dict[str, Any]]] = []
        self._tables = (dict(module.tdrs), dict(module.tdvps), dict(module.hkids))
        for member in (*module.tdrs.values(), *module.tdvps.values(), *module.processors):
            self._keep(member)
        kinds = np.frombuffer(memory.page_type, dtype=np.uint8)
        self._owned = np.flatnonzero(kinds != PageType.NDA)
        self._content = self._pages()[self._owned].copy()
        self._pamt = (bytes(memory.page_type), bytes(memory.owner), bytes(memory.bepoch))

    def _pages(self) -> Any:
        """All memory as rows of one page."""
        return self._module.memory.array.reshape(-1, PAGE_SIZE // 8)

    def _keep(self, member: Any) -> None:
        if isinstance(member, Interrupted) and member.context is not None:
            raise UsageError("a state bundle is interrupted; resume it before the snapshot")
        values: dict[str, Any] = {}
        for field in fields(member):
            value = getattr(member, field.name)
            values[field.name] = _copy(value)
            for part in value if isinstance(value, list) else (value,):
                if is_dataclass(part):
                    self._keep(part)
        self._objects.append((member, values))

    def restore(self) -> None:
        """Put the module back.  No leaf may be in progress."""
        module, memory = self._module, self._module.memory
        if memory.any_locked:
            raise UsageError("a leaf is in progress; end it before the module is put back")
        tdrs, tdvps, hkids = self._tables
        module.tdrs, module.tdvps, module.hkids = dict(tdrs), dict(tdvps), dict(hkids)
        for member, values in self._objects:
            for name, value in values.items():
                setattr(member, name, _copy(value))
        pages = self._pages()
        kinds = np.frombuffer(memory.page_type, dtype=np.uint8)
        pages[np.flatnonzero(kinds != PageType.NDA)] = 0
        pages[self._owned] = self._content
        memory.page_type[:], memory.owner.cast("B")[:], memory.bepoch.cast("B")[:] = self._pamt
        for tdr in module.tdrs.values():
            if tdr.tdcs is not None:
                tdr.tdcs.sept.forget()


def _copy(value: Any) -> Any:
    """A copy of what leaves change in place: lists, dictionaries, sets, hashes in progress."""
    changes = isinstance(value, list | dict | set) or hasattr(value, "hexdigest")
    return value.copy() if changes else value
