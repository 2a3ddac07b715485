"""One host of the pair: its TD, pages set aside for it, and how its leaves are called."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from tdxmig_model.backend.soft.buffers import StreamBuffers
from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.guest import GuestImage, Program
from tdxmig_model.backend.soft.host import Host, HostTd
from tdxmig_model.backend.soft.module import Profile
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.sept import HPA_MASK, STATE_MASK, STATE_OF, SeptState
from tdxmig_model.backend.soft.snapshot import Snapshot
from tdxmig_model.backend.soft.state import MIN_TDVPS_PAGES, Interrupt, Tdcs, Tdvps
from tdxmig_model.backend.soft.status import is_error
from tdxmig_model.errors import BackendError, UsageError
from tdxmig_model.wire.constants import PAGE_SIZE

HOST_LP: Final = 3
"""The logical processor of all calls that are not a vCPU's; vCPU i runs on number i."""

STATE_BUFFERS: Final = 3
"""Behind the buffers of this many streams are those of calls that are not about memory."""

MAX_VCPUS: Final = HOST_LP
SPARE_PAGES: Final = 48
NO_REGISTERS: Final[Mapping[str, int]] = MappingProxyType({})


def gpa_of(page: int) -> int:
    """Where page `page` of the model is: GPA 0 is the guest's program, which stays at home."""
    return (page + 1) * PAGE_SIZE


def always() -> bool:
    """A host interrupt is pending at every entry: the call does one and stops."""
    return True


def keys(name: str) -> Callable[[int], bytes]:
    """Key material that differs at each draw and between names, the same in each run."""
    draws = iter(range(1 << 30))

    def random(length: int) -> bytes:
        return hashlib.shake_256(f"{name} {next(draws)}".encode()).digest(length)

    return random


class Side:
    """A host with one TD.  `pages` of the model follow the page of the guest's program."""

    def __init__(
        self, name: str, profile: Profile, pages: int, vcpus: int, streams: int, pending: int
    ) -> None:
        if vcpus > MAX_VCPUS or streams > STATE_BUFFERS:
            raise UsageError(
                f"{vcpus} vCPUs and {streams} streams; here at most {MAX_VCPUS} and {STATE_BUFFERS}"
            )
        self.name = name
        self.vcpus = vcpus
        self.host = Host(
            profile=profile,
            memory_bytes=(pages + SPARE_PAGES) * PAGE_SIZE,
            shared_bytes=(STATE_BUFFERS + 2) * 528 * PAGE_SIZE,
            processors=HOST_LP + 1,
            random=keys(name),
        )
        if name == "source":
            self.td: HostTd = self.host.create_td(
                pages + 1,
                vcpus=vcpus,
                guest=GuestImage(Program.SEQUENTIAL, PAGE_SIZE, 1),
                pending_pages=pending,
            )
            for vcpu in range(vcpus):
                self._boot(vcpu)
        else:
            self.td = self.host.create_destination_td(vcpus=vcpus)
        self._spare = self.host.take_private_pages(SPARE_PAGES)
        self._taken = 0
        self.page_hpas = self.host.take_private_pages(pages)

    def _boot(self, vcpu: int) -> None:
        """The first instruction of a vCPU loads its parameters; it is no step of the model."""
        self.host.module.processors[vcpu].timer = 1
        self.host.require(Leaf.VP_ENTER, lp=vcpu, rcx=self.td.vcpus[vcpu])

    # --- what there is -------------------------------------------------------------------------

    @property
    def tdcs(self) -> Tdcs:
        """The control structure of the TD."""
        tdcs = self.host.module.tdrs[self.td.tdr].tdcs
        if tdcs is None:
            raise UsageError("the TD has no TDCS yet")
        return tdcs

    def tdvps(self, vcpu: int) -> Tdvps | None:
        """A vCPU's control structure; None before the vCPU was created."""
        if vcpu >= len(self.td.vcpus):
            return None
        return self.host.module.tdvps[self.td.vcpus[vcpu]]

    def entry(self, page: int) -> int:
        """The Secure EPT entry of a page of the model; 0 if there is no table for it."""
        slot = self.tdcs.sept.slot(gpa_of(page))
        return self.host.memory.words[slot] if slot >= 0 else 0

    def buffers(self, stream: int | None = None) -> StreamBuffers:
        """Lists and buffers of a stream's memory calls, or of all other calls."""
        return self.host.stream_buffers(STATE_BUFFERS if stream is None else stream)

    # --- calls ---------------------------------------------------------------------------------

    def call(
        self,
        leaf: Leaf,
        registers: Mapping[str, int] = NO_REGISTERS,
        *,
        lp: int = HOST_LP,
        interrupt: Interrupt | None = None,
        **operands: int,
    ) -> Registers:
        """One leaf; its status is in RAX.  Operands are registers by name, in either way."""
        both = {**registers, **operands}
        after = Registers(**both)
        self.host.module.call(leaf, after, lp=lp, interrupt=interrupt)
        return after

    def spare_page(self) -> int:
        """A free page for a control structure."""
        self._taken += 1
        return self._spare[self._taken - 1]

    def create_stream(self) -> int:
        """TDH.MIG.STREAM.CREATE; its status."""
        page = self.spare_page()
        status = self.call(Leaf.MIG_STREAM_CREATE, rcx=page, rdx=self.td.tdr).rax
        if is_error(status):
            self._taken -= 1
        return status

    def add_tables(self, pages: int) -> None:
        """Secure EPT tables for the pages that will be imported."""
        for level in (3, 2, 1):
            page = self.spare_page()
            self.host.require(Leaf.MEM_SEPT_ADD, rcx=level, rdx=self.td.tdr, r8=page)
        assert gpa_of(pages) < 1 << 21

    def create_vcpus(self) -> int:
        """All vCPUs, if the module creates them now; the status of what it refuses, or 0."""
        while len(self.td.vcpus) < self.vcpus:
            page = self.spare_page()
            status = self.call(Leaf.VP_CREATE, rcx=page, rdx=self.td.tdr).rax
            if is_error(status):
                self._taken -= 1
                return status
            for _ in range(MIN_TDVPS_PAGES - 1):
                self.host.require(Leaf.VP_ADDCX, rcx=self.spare_page(), rdx=page)
            self.td.vcpus.append(page)
        return 0

    def write_key(self, key: bytes) -> int:
        """The Migration TD writes the decryption key; the status."""
        try:
            self.host.write_migration_decryption_key(self.td, key)
        except BackendError as refused:
            return refused.status
        return 0

    def read_page(self, page: int) -> bytes:
        """What a private page holds, 4096 bytes."""
        hpa = self.entry(page) & HPA_MASK
        return bytes(self.host.memory.page(hpa))

    def states(self, pages: int) -> list[int]:
        """Secure EPT state of the pages of the model."""
        return [int(self.state_of(page)) for page in range(pages)]

    def state_of(self, page: int) -> SeptState:
        """Secure EPT state of a page of the model; FREE too if there is no table for it."""
        entry = self.entry(page)
        return STATE_OF[entry & STATE_MASK] if entry else SeptState.FREE

    # --- to go back to ---------------------------------------------------------------------------

    def save(self) -> Callable[[], None]:
        """What puts the host back to this moment.  No leaf may be in progress."""
        snapshot = Snapshot(self.host.module)
        taken, vcpus, uuid = self._taken, list(self.td.vcpus), self.td.uuid

        def restore() -> None:
            snapshot.restore()
            self._taken, self.td.vcpus, self.td.uuid = taken, list(vcpus), uuid

        return restore
