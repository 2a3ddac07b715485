"""A VMM on one host: builds, runs and takes down TDs through leaves of its TDX module alone.

The host keeps what a VMM keeps: which page of its memory it gave to whom, and one Migration TD that
is bound to every TD and reads and writes their migration keys.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.backend.soft.buffers import PageAllocator, StreamBuffers
from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.crypto import IvObserver
from tdxmig_model.backend.soft.guest import PROGRAM_NAMES, GuestImage, Program
from tdxmig_model.backend.soft.leaves_build import (
    ATTR_MIGRATABLE,
    EPTP_WRITE_BACK_FOUR_LEVELS,
    TD_PARAMS,
    TD_PARAMS_SIZE,
)
from tdxmig_model.backend.soft.leaves_servtd import (
    KEY_ELEMENTS,
    MIG_DEC_KEY,
    MIG_ENC_KEY,
    MIG_VERSION,
)
from tdxmig_model.backend.soft.memory import FIRST_PRIVATE_HKID, LAST_PRIVATE_HKID, Memory
from tdxmig_model.backend.soft.module import Entropy, Module, Profile
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf
from tdxmig_model.backend.soft.servtd import SERVTD_TYPE_MIGTD
from tdxmig_model.backend.soft.state import MIN_TDCS_PAGES, MIN_TDVPS_PAGES, NO_LP, Interrupt, Uuid
from tdxmig_model.backend.soft.status import Status, describe_status, is_error, status_name
from tdxmig_model.backend.soft.workers import Workers
from tdxmig_model.errors import BackendError, UsageError
from tdxmig_model.wire.constants import PAGE_SIZE

U64 = 0xFFFF_FFFF_FFFF_FFFF
STAGING_PAGES = 256
DEFAULT_SHARED_BYTES = 128 << 20
OVERHEAD_PAGES = 4096
"""Control structures and Secure EPT pages, on top of one table per 512 pages."""
XFAM_X87_SSE_AVX = 0x7
TSC_FREQUENCY_25_MHZ = 100


@dataclass(slots=True)
class HostTd:
    """What the VMM knows of one TD.

    `page_hpas` maps the GPA of a private page to its HPA; `tables` holds GPA and level of each
    Secure EPT entry that has a table below it.
    """

    tdr: int
    hkid: int
    vcpus: list[int] = field(default_factory=list)
    processors: list[int] = field(default_factory=list)
    control_pages: list[int] = field(default_factory=list)
    page_hpas: dict[int, int] = field(default_factory=dict)
    tables: set[int] = field(default_factory=set)
    forward_streams: int = 0
    max_vcpus: int = 1
    binding_handle: int = 0
    uuid: Uuid = (0, 0, 0, 0)
    destroyed: bool = False


class Host:
    """One machine: memory of `memory_bytes` for TDs, `shared_bytes` for buffers, one module.

    `workers` processes encrypt and decrypt the pages of large bundles; 0: this process does.
    """

    def __init__(
        self,
        *,
        profile: Profile = "hardened",
        memory_bytes: int = 64 << 20,
        shared_bytes: int = DEFAULT_SHARED_BYTES,
        processors: int = 4,
        random: Entropy = secrets.token_bytes,
        iv_observer: IvObserver | None = None,
        workers: int = 0,
    ) -> None:
        tdmr_pages = memory_bytes // PAGE_SIZE * 513 // 512 + OVERHEAD_PAGES
        self.memory = Memory(shared_bytes // PAGE_SIZE, tdmr_pages)
        self.module = Module(
            self.memory,
            profile=profile,
            processors=processors,
            random=random,
            iv_observer=iv_observer,
        )
        memory = self.memory
        self._shared = PageAllocator("shared memory", PAGE_SIZE, memory.tdmr_base)
        self._private = PageAllocator("the TDMR", memory.tdmr_base, memory.size)
        self._staging = self._shared.take_run(STAGING_PAGES)
        self._streams: list[StreamBuffers] = []
        self._migration_td: HostTd | None = None
        if workers:
            self.module.workers = Workers(memory, workers)

    # --- calls ---------------------------------------------------------------------------------

    def seamcall(
        self,
        leaf: Leaf,
        *,
        lp: int = 0,
        interrupt: Interrupt | None = None,
        **operands: int,
    ) -> Registers:
        """One leaf; `operands` are register names.  The status is in RAX, whatever it is."""
        registers = Registers(**operands)
        self.module.call(leaf, registers, lp=lp, interrupt=interrupt)
        return registers

    def require(self, leaf: Leaf, *, lp: int = 0, **operands: int) -> Registers:
        """One leaf that must succeed; BackendError otherwise."""
        registers = Registers(**operands)
        self.module.call(leaf, registers, lp=lp)
        if is_error(registers.rax):
            raise BackendError(
                f"TDH.{leaf.name.replace('_', '.')}",
                registers.rax,
                status_name(registers.rax),
                describe_status(registers.rax),
            )
        return registers

    def stream_buffers(self, stream: int) -> StreamBuffers:
        """Buffers of a forward stream; made when first used."""
        while len(self._streams) <= stream:
            self._streams.append(StreamBuffers(self.memory, self._shared))
        return self._streams[stream]

    def new_stream_buffers(self, count: int) -> StreamBuffers:
        """Lists and `count` buffers that nobody else has, such as those of a stream device."""
        return StreamBuffers(self.memory, self._shared, count)

    # --- building ------------------------------------------------------------------------------

    def create_td(
        self,
        pages: int,
        *,
        vcpus: int = 1,
        streams: int = 1,
        guest: GuestImage | str = "hot-set",
        seed: int = 1,
        pending_pages: int = 0,
        write_rate: float = 1.0,
        migratable: bool = True,
        bind: bool = True,
    ) -> HostTd:
        """A RUNNABLE TD with private pages at GPA 0 to `pages` * 4096.

        Page 0 is the guest image, the rest random data from `seed`; the last `pending_pages` are
        added but not accepted.  `streams` counts forward streams; 0 makes none.  `write_rate` is
        the share of guest instructions that write, for a guest given by name.
        """
        if not 1 <= pages - pending_pages <= pages:
            raise UsageError(
                f"{pages} pages, {pending_pages} of them pending: page 0 must be there"
            )
        image = guest
        if not isinstance(image, GuestImage):
            image = guest_image(image, pages, seed, write_rate)
        td = self._new_td(vcpus)
        if bind:
            self._bind(td)
        self._initialize(td, migratable)
        for _ in range(vcpus):
            self._add_vcpu(td)
            self.require(Leaf.VP_INIT, lp=td.processors[-1], rcx=td.vcpus[-1], rdx=0)
        gpas = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        self.add_tables(td, gpas)
        self._add_pages(td, pages - pending_pages, image.page(), seed)
        for gpa in gpas[pages - pending_pages :].tolist():
            self.add_pending_page(td, gpa)
        self.require(Leaf.MR_FINALIZE, rcx=td.tdr)
        self.create_streams(td, streams)
        return td

    def create_destination_td(self, *, vcpus: int = 1, streams: int = 1) -> HostTd:
        """An UNINITIALIZED TD with a bound Migration TD and `streams` forward streams.

        `vcpus` is how many the VMM is ready to create when their state arrives.
        """
        td = self._new_td(vcpus)
        self._bind(td)
        self.create_streams(td, streams)
        return td

    def _new_td(self, max_vcpus: int) -> HostTd:
        used = self.module.hkids
        free = [
            hkid for hkid in range(FIRST_PRIVATE_HKID, LAST_PRIVATE_HKID + 1) if hkid not in used
        ]
        if not free:
            raise BackendError("TDH.MNG.CREATE", 0, "NO_FREE_HKID", "destroy a TD first")
        tdr = self._private.take()
        self.require(Leaf.MNG_CREATE, rcx=tdr, rdx=free[0])
        td = HostTd(tdr, free[0], max_vcpus=max_vcpus)
        self.require(Leaf.MNG_KEY_CONFIG, rcx=tdr)
        for _ in range(MIN_TDCS_PAGES):
            self._give_page(td, Leaf.MNG_ADDCX, rdx=tdr)
        return td

    def _give_page(self, td: HostTd, leaf: Leaf, *, register: str = "rcx", **operands: int) -> int:
        """A leaf that takes a free page, named in `register`, for the TD; returns its HPA."""
        hpa = self._private.take()
        try:
            self.require(leaf, **{register: hpa}, **operands)
        except BackendError:
            self._private.give_back(hpa)
            raise
        td.control_pages.append(hpa)
        return hpa

    def _initialize(self, td: HostTd, migratable: bool) -> None:
        params = TD_PARAMS.pack(
            ATTR_MIGRATABLE if migratable else 0,
            XFAM_X87_SSE_AVX,
            td.max_vcpus,
            0,
            0,
            b"",
            EPTP_WRITE_BACK_FOUR_LEVELS,
            0,
            TSC_FREQUENCY_25_MHZ,
            b"",
            b"",
            b"",
            b"",
        )
        staging = self._staging
        self.memory.bytes[staging : staging + TD_PARAMS_SIZE] = params.ljust(TD_PARAMS_SIZE, b"\0")
        self.require(Leaf.MNG_INIT, rcx=td.tdr, rdx=staging)

    def _add_vcpu(self, td: HostTd) -> None:
        vcpu = self._give_page(td, Leaf.VP_CREATE, rdx=td.tdr)
        for _ in range(MIN_TDVPS_PAGES - 1):
            self._give_page(td, Leaf.VP_ADDCX, rdx=vcpu)
        td.processors.append(len(td.vcpus) % len(self.module.processors))
        td.vcpus.append(vcpu)

    def ensure_vcpus(self, td: HostTd, count: int) -> None:
        """Create vCPUs of a destination TD, up to `count`, for their state to be imported."""
        while len(td.vcpus) < count:
            self._add_vcpu(td)

    def create_streams(self, td: HostTd, forward: int) -> None:
        """One backward stream and `forward` forward streams; none if `forward` is 0."""
        if forward == 0:
            return
        for _ in range(forward + (td.forward_streams == 0)):
            self._give_page(td, Leaf.MIG_STREAM_CREATE, rdx=td.tdr)
        td.forward_streams += forward

    def add_tables(self, td: HostTd, gpas: NDArray[np.uint64]) -> None:
        """Secure EPT pages for the walks to these GPAs, where they are missing."""
        for region in np.unique(gpas >> np.uint64(21)).tolist():
            for level in (3, 2, 1):
                span = 12 + 9 * level
                entry = region << 21 >> span << span | level
                if entry not in td.tables:
                    self._give_page(td, Leaf.MEM_SEPT_ADD, register="r8", rcx=entry, rdx=td.tdr)
                    td.tables.add(entry)

    def _add_pages(self, td: HostTd, count: int, first_page: bytes, seed: int) -> None:
        generator = np.random.default_rng(seed)
        call, registers, tdr = self.module.call, Registers(), td.tdr
        staging, hpas = self._staging, td.page_hpas
        for start in range(0, count, STAGING_PAGES):
            batch = min(STAGING_PAGES, count - start)
            content = generator.bytes(batch * PAGE_SIZE)
            self.memory.bytes[staging : staging + len(content)] = content
            if start == 0:
                self.memory.bytes[staging : staging + PAGE_SIZE] = first_page
            for index, page in enumerate(self._private.take_many(batch)):
                gpa = (start + index) * PAGE_SIZE
                registers.rcx, registers.rdx = gpa, tdr
                registers.r8, registers.r9 = page, staging + index * PAGE_SIZE
                if call(Leaf.MEM_PAGE_ADD, registers) != Status.TDX_SUCCESS:
                    name = status_name(registers.rax)
                    raise BackendError("TDH.MEM.PAGE.ADD", registers.rax, name, f"GPA 0x{gpa:X}")
                hpas[gpa] = page

    def add_pending_page(self, td: HostTd, gpa: int) -> None:
        """TDH.MEM.PAGE.AUG: a page that the guest has to accept."""
        self.add_tables(td, np.array([gpa], dtype=np.uint64))
        td.page_hpas[gpa] = self._give_page(
            td, Leaf.MEM_PAGE_AUG, register="r8", rcx=gpa, rdx=td.tdr
        )
        td.control_pages.pop()

    def take_private_pages(self, count: int) -> list[int]:
        """Free pages for an import."""
        return self._private.take_many(count)

    def give_back_private_pages(self, hpas: Iterable[int]) -> None:
        """Pages that an import did not take, or gave back."""
        for hpa in hpas:
            self._private.give_back(hpa)

    # --- Migration TD --------------------------------------------------------------------------

    def _bind(self, td: HostTd) -> None:
        if self._migration_td is None:
            image = GuestImage(Program.IDLE, 0, 0)
            self._migration_td = self.create_td(
                1, streams=0, guest=image, migratable=False, bind=False
            )
        service = self._migration_td.tdr
        bound = self.require(
            Leaf.SERVTD_BIND, rcx=td.tdr, rdx=service, r8=0, r9=SERVTD_TYPE_MIGTD, r10=0
        )
        td.binding_handle = bound.rcx
        td.uuid = (bound.r10, bound.r11, bound.r12, bound.r13)

    def _servtd(self, leaf: GuestLeaf, td: HostTd, field_id: int, value: int = 0) -> int:
        """One access of the Migration TD to a field of `td`; follows a UUID that import changed."""
        if self._migration_td is None:
            raise UsageError("no Migration TD is bound; create the TD with bind=True")
        vcpu = self._migration_td.vcpus[0]
        for _ in range(2):
            r10, r11, r12, r13 = td.uuid
            registers = Registers(rcx=td.binding_handle, rdx=field_id, r8=value, r9=U64)
            registers.r10, registers.r11, registers.r12, registers.r13 = r10, r11, r12, r13
            status = self.module.tdcall(leaf, registers, vcpu)
            if status != Status.TDX_TARGET_UUID_UPDATED:
                break
            td.uuid = (registers.r10, registers.r11, registers.r12, registers.r13)
        if is_error(status):
            name = f"TDG.{leaf.name.replace('_', '.')}"
            raise BackendError(name, status, status_name(status), describe_status(status))
        return registers.r8

    def read_migration_encryption_key(self, td: HostTd) -> bytes:
        """A fresh MIG_ENC_KEY of this TD, 32 bytes: what the peer needs as its decryption key.

        Read it before the peer's key is written: in the profile hardened a new key begins a new
        exchange, and the decryption key of the one before is forgotten.
        """
        words = [
            self._servtd(GuestLeaf.SERVTD_RD, td, MIG_ENC_KEY + element)
            for element in range(KEY_ELEMENTS)
        ]
        return struct.pack("<4Q", *words)

    def write_migration_decryption_key(self, td: HostTd, key: bytes) -> None:
        """Set MIG_DEC_KEY of this TD to the peer's encryption key, 32 bytes."""
        if len(key) != 32:
            raise UsageError(f"a migration key has 32 bytes, not {len(key)}")
        for element, word in enumerate(struct.unpack("<4Q", key)):
            self._servtd(GuestLeaf.SERVTD_WR, td, MIG_DEC_KEY + element, word)

    def write_migration_version(self, td: HostTd, version: int) -> None:
        """Set MIG_VERSION of this TD; 0 is the only one of TDX module 1.5.01."""
        self._servtd(GuestLeaf.SERVTD_WR, td, MIG_VERSION, version)

    # --- taking down ---------------------------------------------------------------------------

    def destroy_td(self, td: HostTd) -> None:
        """Flush, free the key id, reclaim every page.  Idempotent."""
        if td.destroyed:
            return
        for vcpu in td.vcpus:
            associated = self.module.tdvps[vcpu].assoc_lp
            if associated != NO_LP:
                self.require(Leaf.VP_FLUSH, lp=associated, rcx=vcpu)
        self.require(Leaf.MNG_VPFLUSHDONE, rcx=td.tdr)
        self.require(Leaf.PHYMEM_CACHE_WB)
        self.require(Leaf.MNG_KEY_FREEID, rcx=td.tdr)
        pages = [*td.page_hpas.values(), *td.control_pages, td.tdr]
        for hpa in pages:
            self.require(Leaf.PHYMEM_PAGE_RECLAIM, rcx=hpa)
            self._private.give_back(hpa)
        td.page_hpas.clear()
        td.control_pages.clear()
        td.destroyed = True

    def close(self) -> None:
        """End the workers and drop the memory.  Nothing of the host can be used afterwards."""
        if self.module.workers is not None:
            self.module.workers.close()
        self.memory.close()


def guest_image(name: str, pages: int, seed: int, write_rate: float = 1.0) -> GuestImage:
    """The image of a named program that works on all pages but the first."""
    if name not in PROGRAM_NAMES:
        known = ", ".join(PROGRAM_NAMES)
        raise UsageError(f"unknown guest program {name!r}; known: {known}")
    work = max(pages - 1, 0)
    hot = max(1, work // 16)
    return GuestImage(PROGRAM_NAMES[name], PAGE_SIZE, work, seed, hot, write_rate)
