"""Legal calls that are about to be made, one for each leaf and branch, and ways to spoil them.

A `Scene` is a leaf with operands that succeed, on a TD brought there by leaves alone.  A `Spoil`
changes one thing about it: an operand, a list, or by injection a field or a lock that no single
host call could set that way.  `Scene.attempt` makes the call and tells everything that changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from soft_pair import Forger, Pair
from soft_state import PAGE, Shared, changes, snapshot

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.sept import LOCK_BIT, STATE_BITS, STATE_MASK
from tdxmig_model.wire.constants import MBMD_SIZE
from tdxmig_model.wire.gpa_list import GpaListInfo, GpaOperation, build_entries
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import Bundle

RESUME = 1 << 63
MIGRATE = GpaOperation.MIGRATE
BUFFER_NAMES = ("mbmd", "gpas", "list", "macs_low", "macs_high", "new_pages")
TDR_IN_RDX = frozenset(
    {
        Leaf.MIG_STREAM_CREATE,
        Leaf.EXPORT_BLOCKW,
        Leaf.EXPORT_RESTORE,
        Leaf.EXPORT_UNBLOCKW,
        Leaf.EXPORT_MEM,
        Leaf.IMPORT_MEM,
    }
)
VCPU_LEAVES = frozenset({Leaf.EXPORT_STATE_VP, Leaf.IMPORT_STATE_VP, Leaf.VP_ENTER})
"""Migration leaves whose RCX is a TDVPR instead of a TDR."""


def always():
    """An interrupt is pending."""
    return True


class Outcome(NamedTuple):
    """Status, registers, what changed in the module, and which buffers of the VMM were written."""

    status: int
    registers: Registers
    changed: dict
    written: frozenset


@dataclass
class Scene:
    """A leaf and its operands, on the TD of one side of a pair."""

    pair: Pair
    side: str
    leaf: Leaf
    registers: dict
    lp: int = 0
    interrupt: Callable[[], bool] | None = None
    bundle: Bundle | None = None
    forger: Forger | None = None
    wrong_mac: bool = False

    @property
    def host(self):
        return self.pair.source_host if self.side == "source" else self.pair.destination_host

    @property
    def module(self):
        return self.host.module

    @property
    def memory(self):
        return self.host.memory

    @property
    def td(self):
        return (self.pair.source if self.side == "source" else self.pair.destination).td

    @property
    def tdr(self):
        return self.module.tdrs[self.td.tdr]

    @property
    def tdcs(self):
        return self.tdr.tdcs

    @property
    def vcpu(self):
        return self.module.tdvps[self.td.vcpus[0]]

    @property
    def stream(self):
        return self.registers.get("r10", 0) & 0xFFFF

    @property
    def link(self):
        return self.tdcs.links[1 + self.stream]

    @property
    def buffers(self):
        return self.host.stream_buffers(0)

    @property
    def td_register(self):
        """The register that names the TD, or the vCPU."""
        return "rdx" if self.leaf in TDR_IN_RDX else "rcx"

    def word(self, index):
        """Entry `index` of the GPA list."""
        return int(self.memory.page_words(self.buffers.gpas)[index])

    def status(self):
        """The call, and its completion status alone."""
        registers = Registers(**self.registers)
        return self.module.call(self.leaf, registers, lp=self.lp, interrupt=self.interrupt)

    def attempt(self):
        """The call, with everything that it changed."""
        before, shared = snapshot(self.module), Shared(self.memory, self.host._shared._next)
        registers = Registers(**self.registers)
        self.module.call(self.leaf, registers, lp=self.lp, interrupt=self.interrupt)
        found = changes(before, snapshot(self.module))
        named = {self._name(path): values for path, values in found.items()}
        written = frozenset(self._buffer(hpa) for hpa in shared.written())
        return Outcome(registers.rax, registers, named, written)

    def _name(self, path):
        """The path in terms of this TD: tdcs., tdr., vcpu., sept[gpa], content[gpa], pamt[gpa]."""
        for prefix, short in (
            (f"tdrs[{self.td.tdr:#x}].tdcs.", "tdcs."),
            (f"tdrs[{self.td.tdr:#x}].", "tdr."),
            *((f"tdvps[{hpa:#x}].", "vcpu.") for hpa in self.td.vcpus),
        ):
            if path.startswith(prefix):
                return short + path[len(prefix) :]
        kind, _, rest = path.partition("[")
        if kind in ("word", "page", "pamt"):
            hpa, _, tail = rest.partition("]")
            return self._place(kind, int(hpa, 16), tail)
        return path

    def _place(self, kind, hpa, tail):
        gpas = {page: gpa for gpa, page in self.td.page_hpas.items()}
        if kind == "word":
            slots = {self.tdcs.sept.slot(int(gpa)): int(gpa) for gpa in self.pair.gpas}
            gpa = slots.get(hpa >> 3)
            return f"sept[{gpa:#x}]" if gpa is not None else f"word[{hpa:#x}]"
        where = f"{gpas[hpa]:#x}" if hpa in gpas else "other"
        return f"{'content' if kind == 'page' else 'pamt'}[{where}]{tail}"

    def _buffer(self, hpa):
        buffers = self.buffers
        named = {getattr(buffers, name): name for name in BUFFER_NAMES}
        return named.get(hpa, "pages" if hpa >= buffers.buffers else f"staging {hpa:#x}")

    # --- the MBMD of an import -----------------------------------------------------------------

    def load(self, bundle):
        """Write a bundle into the buffers of this side; it is the one to import."""
        self.bundle = bundle
        self.buffers.write_mbmd(bundle.mbmd.pack())
        if bundle.pages:
            self.buffers.write_pages(bundle.pages)
        if bundle.macs:
            self.buffers.write_macs(bundle.macs)
        return self

    def change_mbmd(self, raw=None, **fields):
        """Another MBMD, with the MAC that a sender with the key would put there."""
        if fields:
            mbmd = replace(Mbmd.unpack(self.buffers.read_mbmd()), **fields)
            if mbmd.bundle_type.is_state:
                self.load(self.forger.state(mbmd, self.plain))
            else:
                key = self.forger.aead
                mbmd = mbmd.with_mac(key.encrypt(mbmd.iv(), b"", mbmd.aad()))
                self.buffers.write_mbmd(mbmd.pack())
            if self.wrong_mac:
                self.flip_mac()
        if raw is not None:
            offset, value = raw
            at = self.buffers.mbmd + offset
            self.memory.bytes[at : at + len(value)] = value

    @property
    def plain(self):
        """The metadata pages of the state bundle, decrypted."""
        return self.forger.open_state(self.bundle)

    def change_pages(self, edit):
        """Other metadata pages under the same MBMD, with the right MAC; `edit` changes the list."""
        pages = [bytearray(page) for page in self.plain]
        edit(pages)
        mbmd = Mbmd.unpack(self.buffers.read_mbmd())
        self.load(self.forger.state(mbmd, [bytes(page) for page in pages]))
        if self.wrong_mac:
            self.flip_mac()

    def flip_mac(self):
        self.memory.bytes[self.buffers.mbmd + MBMD_SIZE - 1] ^= 1

    # --- Secure EPT ----------------------------------------------------------------------------

    def slot(self, gpa):
        return self.tdcs.sept.slot(gpa)

    def inject_state(self, gpa, state, **bits):
        """Set the state bits of an entry by hand; HPA and permissions stay unless given."""
        words, slot = self.memory.words, self.slot(gpa)
        words[slot] = words[slot] & ~STATE_MASK | STATE_BITS[state] | bits.get("more", 0)

    def lock_entry(self, gpa):
        self.memory.words[self.slot(gpa)] |= LOCK_BIT


# --- spoils --------------------------------------------------------------------------------------


class Spoil(NamedTuple):
    """One change to a scene; two spoils with a common thing in `touches` exclude each other."""

    touches: frozenset
    apply: Callable[[Scene], None]


def spoil(*touches):
    """A decorator: this function spoils a scene."""

    def wrap(function):
        return Spoil(frozenset(touches), function)

    return wrap


def reg(name, value):
    """Another value in a register; `value` is a number, or a function of the present value."""

    def apply(scene):
        old = scene.registers.get(name, 0)
        scene.registers[name] = value(old) if callable(value) else value

    return Spoil(frozenset({name}), apply)


def bit(name, position):
    """One bit set in a register."""
    return Spoil(frozenset({name}), reg(name, lambda old: old | 1 << position).apply)


def field(path, value):
    """Injected: a field of the TDCS, dotted; `value` may be a function of the scene."""

    def apply(scene):
        target = scene.tdcs
        *above, last = path.split(".")
        for name in above:
            target = getattr(target, name)
        setattr(target, last, value(scene) if callable(value) else value)

    return Spoil(frozenset({path}), apply)


def held(name, mode=Mode.EXCLUSIVE):
    """Injected: another logical processor holds this lock of the TDCS."""

    def apply(scene):
        assert getattr(scene.tdcs, name).acquire(mode)

    return Spoil(frozenset({name}), apply)


def link_held(number=None):
    """Injected: another logical processor holds a MIGSC link, by default that of the call."""

    def apply(scene):
        link = scene.link if number is None else scene.tdcs.links[number]
        assert link.lock.acquire(Mode.EXCLUSIVE)

    return Spoil(frozenset({"link lock"}), apply)


def page_held(hpa_of, mode=Mode.EXCLUSIVE):
    """Injected: another logical processor holds the PAMT entry of a page."""

    def apply(scene):
        assert scene.memory.try_lock(hpa_of(scene), mode)

    return Spoil(frozenset({"pamt lock"}), apply)


def entry(index, value):
    """Another GPA list entry; `value` is a number or a function of the present entry."""

    def apply(scene):
        words = scene.memory.page_words(scene.buffers.gpas)
        words[index] = np.uint64(value(int(words[index])) if callable(value) else value)

    return Spoil(frozenset({f"entry {index}"}), apply)


def list_entry(index, value):
    """Another buffer list (or page list) entry."""

    def apply(scene):
        words = scene.memory.page_words(scene.buffers.list)
        words[index] = np.uint64(value(scene) if callable(value) else value)

    return Spoil(frozenset({f"list entry {index}"}), apply)


def mbmd(**fields):
    """Another field in the MBMD, MAC right."""
    return Spoil(frozenset(f"mbmd {name}" for name in fields), lambda s: s.change_mbmd(**fields))


def mbmd_raw(offset, value):
    """Other bytes in the MBMD, MAC as it was."""
    name = f"mbmd byte {offset}"
    return Spoil(frozenset({name}), lambda s: s.change_mbmd(raw=(offset, value)))


@spoil("mac")
def wrong_mac(scene):
    """The MBMD's MAC has one bit changed, whatever else is done to it."""
    scene.wrong_mac = True
    scene.flip_mac()


@spoil("interrupt")
def interrupted(scene):
    """A host interrupt is pending."""
    scene.interrupt = always


@spoil("entropy")
def no_entropy(scene):
    """The source of randomness fails."""
    scene.module.random = lambda _length: None


def uninitialized(number=None):
    """Injected: the stream is not initialised."""

    def apply(scene):
        link = scene.link if number is None else scene.tdcs.links[number]
        link.initialized = False

    return Spoil(frozenset({"initialized"}), apply)


@spoil("interrupted")
def not_interrupted(scene):
    """Injected: nothing of this stream is interrupted."""
    scene.link.migsc.interrupted = None


def other_leaf(leaf):
    """Injected: what is interrupted on this stream is another leaf."""

    def apply(scene):
        scene.link.migsc.interrupted.leaf = leaf

    return Spoil(frozenset({"interrupted leaf"}), apply)


def both(*spoils):
    """Several spoils as one."""

    def apply(scene):
        for one in spoils:
            one.apply(scene)

    return Spoil(frozenset().union(*(one.touches for one in spoils)), apply)


# --- TDs on their way ----------------------------------------------------------------------------


def at_source(stage, profile="tdx-1.5.01", pages=4, **more):
    """A pair whose source is in this OP_STATE, by leaves alone."""
    pair = Pair(pages, profile=profile, streams=2, **more)
    if stage == "RUNNABLE":
        return pair
    pair.start()
    if stage == "LIVE_EXPORT":
        return pair
    pair.pause()
    if stage == "PAUSED_EXPORT":
        return pair
    assert stage == "POST_EXPORT"
    pair.move(pair.gpas[:2])
    pair.states()
    pair.start_token()
    return pair


def gpa_list(pair, gpas, operation=MIGRATE, side="source"):
    """RCX of a list leaf on stream 0's list, its buffer list written too."""
    host = pair.source_host if side == "source" else pair.destination_host
    buffers = host.stream_buffers(0)
    buffers.offer_buffers(len(gpas))
    return buffers.gpa_list(build_entries(np.asarray(gpas, dtype=np.uint64), operation))


def list_registers(pair, rcx, side="source", stream=0):
    """Registers of EXPORT.MEM and, with R13, IMPORT.MEM."""
    host = pair.source_host if side == "source" else pair.destination_host
    td = (pair.source if side == "source" else pair.destination).td
    buffers = host.stream_buffers(0)
    return {
        "rcx": rcx,
        "rdx": td.tdr,
        "r8": buffers.mbmd_register,
        "r9": buffers.list,
        "r10": stream,
        "r11": buffers.macs_low,
        "r12": buffers.macs_high,
    }


def entries_of(first, last, hpa):
    """GPA_LIST_INFO of entries first to last."""
    return GpaListInfo(hpa, last, first).to_register()


def free_page(scene):
    """A page of the TDMR that no TD owns."""
    return scene.host.take_private_pages(1)[0]


def owned_page(scene):
    """A private page of the TD."""
    return next(iter(scene.td.page_hpas.values()))


NOWHERE = 1 << 51
"""A physical address above memory, 4 KiB aligned."""
SHARED = PAGE
"""A page of the VMM."""
