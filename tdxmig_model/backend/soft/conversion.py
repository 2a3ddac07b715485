"""The VMM's answer to a guest that wants pages shared or private (MapGPA), by leaves alone.

To shared: TDH.MEM.RANGE.BLOCK, TRACK and PAGE.REMOVE, since the guest may have run with the page.
To private: TDH.MEM.PAGE.AUG, and the guest accepts.  What a shared page holds is the VMM's own
memory, outside of the module and of its migration (TDX module 1.5.01).
"""

from __future__ import annotations

from tdxmig_model.backend.soft.guest import (
    MAP_GPA_INVALID,
    MAP_GPA_RETRY,
    MAP_GPA_SUCCESS,
    SHARED_BIT,
)
from tdxmig_model.backend.soft.host import Host, HostTd
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.status import is_error
from tdxmig_model.errors import BackendError
from tdxmig_model.wire.constants import PAGE_SIZE


def map_gpa(host: Host, td: HostTd, start: int, size: int) -> tuple[int, int]:
    """Answer MapGPA for [start, start + size): R10 and R11.

    A page that cannot be converted now, because it was exported or a vCPU still runs with its old
    translations, is answered with "retry".
    """
    shared = start & SHARED_BIT
    first = start & ~SHARED_BIT
    if (first | size) % PAGE_SIZE or not size or first + size > SHARED_BIT:
        return MAP_GPA_INVALID, start
    for gpa in range(first, first + size, PAGE_SIZE):
        if not (_take_back if shared else _give)(host, td, gpa):
            return MAP_GPA_RETRY, gpa | shared
    return MAP_GPA_SUCCESS, 0


def _take_back(host: Host, td: HostTd, gpa: int) -> bool:
    """A private page to the VMM.  Blocked before and not tracked yet, it is tried again later."""
    if gpa not in td.page_hpas:
        return True
    for leaf, rcx, rdx in (
        (Leaf.MEM_RANGE_BLOCK, gpa, td.tdr),
        (Leaf.MEM_TRACK, td.tdr, 0),
        (Leaf.MEM_PAGE_REMOVE, gpa, td.tdr),
    ):
        if is_error(host.seamcall(leaf, rcx=rcx, rdx=rdx).rax):
            return False
    host.give_back_private_pages([td.page_hpas.pop(gpa)])
    return True


def _give(host: Host, td: HostTd, gpa: int) -> bool:
    """An empty private page to the guest, which has to accept it."""
    if gpa in td.page_hpas:
        return True
    try:
        host.add_pending_page(td, gpa)
    except BackendError as refused:
        if not refused.status:
            raise
        return False
    return True
