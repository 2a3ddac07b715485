"""Guest programs: small, deterministic, with their whole state in vCPU registers and memory.

A guest image is one page at GPA 0 that says which program runs and over which pages.  On its first
instruction a vCPU loads its parameters from there; from then on it needs nothing that migration
does not carry.  Registers: GUEST_RIP 0 before start, 1 in the loop; R15 program, R14 generator
state, R13 first GPA, R12 pages, R11 hot pages, R10 instructions done, R9 write rate.

The page converter gives private pages back to the VMM and takes them again.  It asks for that by
TDG.VP.VMCALL<MapGPA> of the guest-host communication interface for TDX 1.5: R10 0, R11 0x10001, R12
first GPA (with the shared bit: make it shared), R13 bytes; the answer is R10.  A page taken again
is empty and accepted by TDG.MEM.PAGE.ACCEPT.  Registers of its own: R8 phase, RDX page being
converted, RDI conversions completed, RBX instructions done while R10 carries the call.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Protocol

from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import PAGE_SIZE

MAGIC = 0x5445_5355_4744_5854
HEADER = struct.Struct("<7Q")
U64 = 0xFFFF_FFFF_FFFF_FFFF
_VCPU_STRIDE = 0x9E37_79B9_7F4A_7C15
_MULTIPLIER = 0x2545_F491_4F6C_DD1D
HOT_OF_256 = 230
"""Of 256 writes of the hot-set program, how many go to the hot pages."""
ALWAYS_OF_256 = 256

MAP_GPA = 0x10001
SHARED_BIT = 1 << 47
"""Of a GPA in MapGPA: the page is to be shared with the VMM."""
MAP_GPA_SUCCESS, MAP_GPA_RETRY, MAP_GPA_INVALID = 0, 1, 1 << 63
"""R10 of the answer."""
VMCALL_REGISTERS = 0b1111 << 10
"""Guest RCX of the call: R10 to R13 are passed."""
OWNERS = 16
"""At most so many vCPUs convert; vCPU i has every sixteenth page from the i-th on."""


class EptViolation(Exception):
    """The access cannot be done and exits to the VMM; nothing of the instruction was done."""

    def __init__(self, gpa: int) -> None:
        super().__init__(gpa)
        self.gpa = gpa


class Retry(Exception):
    """The module answered BUSY to the guest, which runs the same instruction again."""


class Ran(Enum):
    """How an instruction ended."""

    ON = "the next one follows"
    HALTED = "HLT"
    CALLED = "TDG.VP.VMCALL: the VMM is asked for something"


class Machine(Protocol):
    """What a program can touch."""

    registers: dict[str, Any]

    def read(self, gpa: int) -> int:
        """The 64-bit word at `gpa`."""
        ...

    def write(self, gpa: int, value: int) -> None:
        """Store a 64-bit word at `gpa`."""
        ...

    def accept(self, gpa: int) -> None:
        """TDG.MEM.PAGE.ACCEPT of the page at `gpa`."""
        ...


class Program(IntEnum):
    """The programs."""

    IDLE = 0
    RANDOM_WRITER = 1
    HOT_SET = 2
    SEQUENTIAL = 3
    PAGE_CONVERTER = 4


PROGRAM_NAMES = {
    "idle": Program.IDLE,
    "random-writer": Program.RANDOM_WRITER,
    "hot-set": Program.HOT_SET,
    "sequential": Program.SEQUENTIAL,
    "page-converter": Program.PAGE_CONVERTER,
}


@dataclass(frozen=True, slots=True)
class GuestImage:
    """The page at GPA 0: `pages` pages from `first_gpa` on are used, `hot_pages` most often.

    `write_rate` is the share of instructions that write, 0 to 1; the others read.  The page
    converter takes its last `hot_pages` pages for conversions.
    """

    program: Program
    first_gpa: int
    pages: int
    seed: int = 1
    hot_pages: int = 1
    write_rate: float = 1.0

    def page(self) -> bytes:
        """The 4096 bytes.  UsageError for a write rate that is no share."""
        if not 0 <= self.write_rate <= 1:
            raise UsageError(f"a write rate of {self.write_rate}; it is a share between 0 and 1")
        header = HEADER.pack(
            MAGIC,
            self.program,
            self.first_gpa,
            self.pages,
            self.seed & U64,
            self.hot_pages,
            round(self.write_rate * ALWAYS_OF_256),
        )
        return header.ljust(PAGE_SIZE, b"\0")


def step(machine: Machine) -> Ran:
    """One guest instruction."""
    registers = machine.registers
    if not registers["GUEST_RIP"]:
        _boot(machine)
        return Ran.ON
    program = registers["R15"]
    if program == Program.PAGE_CONVERTER:
        return convert(machine)
    if program == Program.IDLE or not registers["R12"]:
        registers["R10"] += 1
        return Ran.HALTED
    state, draw = draw_next(registers)
    touch(machine, _PAGE_OF[program](registers, draw), draw)
    registers["R14"] = state
    registers["R10"] += 1
    return Ran.ON


def draw_next(registers: dict[str, Any]) -> tuple[int, int]:
    """The generator's next state and 64 bits drawn from it; the registers stay as they are."""
    state = registers["R14"]
    state ^= state >> 12
    state ^= state << 25 & U64
    state ^= state >> 27
    return state, state * _MULTIPLIER & U64


def touch(machine: Machine, page: int, draw: int) -> None:
    """Write a word of this page of the program, or only read it, as the write rate says.

    A program calls it before it changes registers: a fault leaves the instruction undone.
    """
    registers = machine.registers
    gpa = registers["R13"] + (page << 12) + (draw >> 20 & 0xFF8)
    value = machine.read(gpa)
    if draw >> 8 & 0xFF < registers["R9"]:
        machine.write(gpa, value + draw & U64)


def load_parameters(machine: Machine) -> dict[str, int]:
    """R13, R12, R11 and R9 as the image says, 0 pages if there is no image."""
    magic, _, first, pages, _, hot, rate = (machine.read(8 * word) for word in range(7))
    pages = pages if magic == MAGIC else 0
    return {"R13": first, "R12": pages, "R11": max(1, min(hot, pages)), "R9": rate}


def _boot(machine: Machine) -> None:
    magic, program, seed = (machine.read(8 * word) for word in (0, 1, 4))
    known = magic == MAGIC and program in Program.__members__.values()
    state = (seed + _VCPU_STRIDE * (machine.registers["RSI"] + 1)) & U64
    machine.registers.update(
        load_parameters(machine),
        R15=program if known else int(Program.IDLE),
        R14=state or 1,
        R10=0,
        GUEST_RIP=1,
    )


def _uniform(registers: dict[str, Any], draw: int) -> int:
    page: int = (draw >> 32) % registers["R12"]
    return page


def _hot(registers: dict[str, Any], draw: int) -> int:
    hot = draw & 0xFF < HOT_OF_256
    page: int = (draw >> 32) % registers["R11" if hot else "R12"]
    return page


def _next(registers: dict[str, Any], _draw: int) -> int:
    page: int = registers["R10"] % registers["R12"]
    return page


_PAGE_OF: dict[int, Callable[[dict[str, Any], int], int]] = {
    Program.RANDOM_WRITER: _uniform,
    Program.HOT_SET: _hot,
    Program.SEQUENTIAL: _next,
}


# --- the page converter ---------------------------------------------------------------------------


class Phase(IntEnum):
    """What the program does next."""

    WORK = 0
    ASKED_TO_SHARE = 1
    SHARED = 2
    ASKED_FOR_PRIVATE = 3
    ACCEPT = 4
    FILL = 5


def convert(machine: Machine) -> Ran:
    """One instruction of the page converter."""
    registers = machine.registers
    phase = registers["R8"]
    if phase in (Phase.ASKED_TO_SHARE, Phase.ASKED_FOR_PRIVATE):
        _take_answer(machine)
        return Ran.ON
    state, draw = draw_next(registers)
    called = Ran.ON
    if phase == Phase.ACCEPT:
        machine.accept(_converted(registers))
        registers["R8"] = int(Phase.FILL)
    elif phase == Phase.FILL:
        gpa = _converted(registers)
        machine.write(gpa + (draw >> 20 & 0xFF8), draw)
        registers["RDI"] += 1
        registers["R8"] = int(Phase.WORK)
    elif phase == Phase.SHARED and not draw & 0x3:
        called = _ask(registers, Phase.ASKED_FOR_PRIVATE)
    elif phase == Phase.WORK and not draw & 0xF and _choose(registers, draw):
        called = _ask(registers, Phase.ASKED_TO_SHARE)
    elif registers["R12"] > registers["R11"]:
        touch(machine, (draw >> 32) % (registers["R12"] - registers["R11"]), draw)
    registers["R14"] = state
    registers["RBX" if called is Ran.CALLED else "R10"] += 1
    return called


def _converted(registers: dict[str, Any]) -> int:
    """GPA of the page that this vCPU is converting."""
    gpa: int = registers["R13"] + (registers["RDX"] << 12)
    return gpa


def _choose(registers: dict[str, Any], draw: int) -> bool:
    """Choose one of this vCPU's own pages; False if it has none."""
    pages, vcpu = registers["R11"], registers["RSI"]
    if vcpu >= min(OWNERS, pages) or pages > registers["R12"]:
        return False
    own = -(-(pages - vcpu) // OWNERS)
    registers["RDX"] = registers["R12"] - pages + vcpu + OWNERS * ((draw >> 32) % own)
    return True


def _ask(registers: dict[str, Any], phase: Phase) -> Ran:
    """TDG.VP.VMCALL<MapGPA> for the page."""
    gpa = _converted(registers) | (SHARED_BIT if phase is Phase.ASKED_TO_SHARE else 0)
    registers.update(
        RBX=registers["R10"],
        RCX=VMCALL_REGISTERS,
        R10=0,
        R11=MAP_GPA,
        R12=gpa,
        R13=PAGE_SIZE,
        R8=int(phase),
    )
    return Ran.CALLED


def _take_answer(machine: Machine) -> None:
    """Go on by the VMM's answer; who is told to try again does other work first."""
    registers = machine.registers
    done = registers["R10"] == MAP_GPA_SUCCESS
    if registers["R8"] == Phase.ASKED_TO_SHARE:
        phase = Phase.SHARED if done else Phase.WORK
    else:
        phase = Phase.ACCEPT if done else Phase.SHARED
    registers.update(load_parameters(machine), R10=registers["RBX"] + 1, R8=int(phase), RCX=0)
