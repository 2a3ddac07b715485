"""Who runs next: schedulers over leaves that several logical processors have in progress.

A leaf is a generator that stops at each lock, list entry and page.  `Straight` runs one call after
the other; `Threads` has a thread per logical processor, so that the operating system decides;
`Seeded` decides every interleaving and every host interrupt by one seed; `Scripted` repeats the
decisions of an earlier history; `explore` takes every decision there is.  Locks never wait: a
conflict is the BUSY of the leaf that came second (TDX module 1.5.01).

    history = Seeded(module, 7).run([LeafCall(Leaf.EXPORT_MEM, first, lp=0), ...])
    assert Scripted(module, history.choices).run([...]).events == history.events
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from tdxmig_model.backend.soft.call import STREAM_COMMAND_BIT, Point, Registers
from tdxmig_model.backend.soft.guest import EptViolation
from tdxmig_model.backend.soft.leaves_run import EXIT_EPT_VIOLATION
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf
from tdxmig_model.backend.soft.snapshot import Snapshot
from tdxmig_model.backend.soft.status import LOW_32, Status, describe_status
from tdxmig_model.errors import UsageError

if TYPE_CHECKING:
    from tdxmig_model.backend.soft.module import Module
    from tdxmig_model.backend.soft.state import Interrupt

ALL_POINTS = frozenset(Point)
STATELESS_LEAVES: frozenset[Leaf | GuestLeaf] = frozenset({Leaf.EXPORT_BLOCKW, Leaf.EXPORT_RESTORE})
"""Interruptible, but called again rather than resumed."""
LIST_LEAVES: frozenset[Leaf | GuestLeaf] = STATELESS_LEAVES | {Leaf.EXPORT_MEM, Leaf.IMPORT_MEM}
"""Leaves that give back in RCX where in their GPA list they stopped."""


@dataclass(frozen=True, slots=True)
class LeafCall:
    """A leaf with its operands, on one logical processor.

    `interruptible`: host interrupts can come.  `resume`: an interrupted call is continued, as by a
    VMM that wants it done.  `retries`: how often it is called again after BUSY.  A guest's leaf is
    called by the vCPU whose TDVPR is at `vcpu`, and is not interrupted.
    """

    leaf: Leaf | GuestLeaf
    operands: Registers
    lp: int = 0
    interruptible: bool = True
    resume: bool = True
    retries: int = 0
    vcpu: int = 0

    def start(
        self, module: Module, registers: Registers, interrupt: Interrupt | None
    ) -> Generator[Point, None, None]:
        """The call as steps, with these registers."""
        if isinstance(self.leaf, GuestLeaf):
            return self._guest_steps(self.leaf, module, registers)
        return module.start(self.leaf, registers, lp=self.lp, interrupt=interrupt)

    def _guest_steps(
        self, leaf: GuestLeaf, module: Module, registers: Registers
    ) -> Generator[Point, None, None]:
        """An exit to the VMM ends the call with what TDH.VP.ENTER would report in RAX and R8."""
        try:
            yield from module.start_tdcall(leaf, registers, self.vcpu, lp=self.lp)
        except EptViolation as fault:
            registers.rax, registers.r8 = EXIT_EPT_VIOLATION, fault.gpa


@dataclass(frozen=True, slots=True)
class Event:
    """One step: call number `call` of the run, on `lp`, reached `point` or ended with `status`."""

    lp: int
    call: int
    point: Point | None
    status: int | None = None

    def __str__(self) -> str:
        reached = self.point.value if self.point else describe_status(self.status or 0)
        return f"lp {self.lp}, call {self.call}: {reached}"


@dataclass(slots=True)
class History:
    """What happened.

    `statuses[i]` are the statuses of call i, one per attempt; `registers[i]` is what its last
    attempt left; `choices` is every decision taken, for `Scripted`.
    """

    events: list[Event] = field(default_factory=list)
    statuses: list[list[int]] = field(default_factory=list)
    registers: list[Registers] = field(default_factory=list)
    choices: tuple[int, ...] = ()

    @property
    def final(self) -> list[int]:
        """The last status of each call, in the order in which the calls were given."""
        return [attempts[-1] for attempts in self.statuses]


class Chooser(Protocol):
    """Takes the decisions of a run."""

    def processor(self, ready: int) -> int:
        """Which of `ready` logical processors, in ascending order, takes the next step."""
        ...

    def interrupt(self) -> bool:
        """Is a host interrupt pending now?"""
        ...


def resume_operands(leaf: Leaf | GuestLeaf, operands: Registers, left: Registers) -> Registers:
    """Operands that continue a call that `operands` began and that ended with `left`."""
    again = replace(operands)
    if leaf in LIST_LEAVES:
        again.rcx = left.rcx
    if leaf not in STATELESS_LEAVES:
        again.r10 |= STREAM_COMMAND_BIT
    return again


def _again(call: LeafCall, operands: Registers, left: Registers, tried: int) -> Registers | None:
    """What the VMM calls next for a call that ended like this; None if it is done."""
    if left.rax == Status.TDX_INTERRUPTED_RESUMABLE and call.resume:
        return resume_operands(call.leaf, operands, left)
    if left.rax & ~LOW_32 == Status.TDX_OPERAND_BUSY and tried < call.retries:
        return operands
    return None


class _Run:
    """One run: what each logical processor still has to do, and what happened so far."""

    def __init__(self, module: Module, calls: Sequence[LeafCall], interrupt: Interrupt) -> None:
        for call in calls:
            if not 0 <= call.lp < len(module.processors):
                raise UsageError(
                    f"logical processor {call.lp} of a module with {len(module.processors)}"
                )
        self.module, self.calls, self.interrupt = module, calls, interrupt
        self.history = History(
            statuses=[[] for _ in calls], registers=[replace(call.operands) for call in calls]
        )
        self.waiting: dict[int, deque[tuple[int, Registers]]] = {}
        for number, call in enumerate(calls):
            self.waiting.setdefault(call.lp, deque()).append((number, call.operands))
        self.running: dict[int, Generator[Point, None, None]] = {}
        self.busy = [0] * len(calls)

    def ready(self) -> list[int]:
        """Logical processors that have something to do, ascending."""
        return sorted(lp for lp, queue in self.waiting.items() if queue)

    def step(self, lp: int, points: frozenset[Point]) -> None:
        """Let `lp` go on to the next of `points`, or to the end of its call."""
        number, operands = self.waiting[lp][0]
        call = self.calls[number]
        if lp not in self.running:
            left = self.history.registers[number] = replace(operands)
            interrupt = self.interrupt if call.interruptible else None
            self.running[lp] = call.start(self.module, left, interrupt)
        for point in self.running[lp]:
            self.history.events.append(Event(lp, number, point))
            if point in points:
                return
        del self.running[lp]
        self._ended(lp, number, operands)

    def _ended(self, lp: int, number: int, operands: Registers) -> None:
        left, call = self.history.registers[number], self.calls[number]
        self.history.events.append(Event(lp, number, None, left.rax))
        self.history.statuses[number].append(left.rax)
        again = _again(call, operands, left, self.busy[number])
        if again is None:
            self.waiting[lp].popleft()
            return
        self.busy[number] += left.rax != Status.TDX_INTERRUPTED_RESUMABLE
        self.waiting[lp][0] = (number, again)

    def close(self) -> None:
        """Give back the locks of what is still in progress."""
        for steps in self.running.values():
            steps.close()


class _Deciding:
    """A scheduler whose decisions come from a chooser.  One step at a time, in one thread."""

    def __init__(self, module: Module, points: Iterable[Point] = ALL_POINTS) -> None:
        self.module = module
        self.points = frozenset(points)

    def _play(self, calls: Sequence[LeafCall], chooser: Chooser) -> History:
        run = _Run(self.module, calls, chooser.interrupt)
        try:
            while ready := run.ready():
                lp = ready[chooser.processor(len(ready)) if len(ready) > 1 else 0]
                run.step(lp, self.points)
        finally:
            run.close()
        return run.history


class _First:
    """Always the first: one call after the other, and no interrupt."""

    def processor(self, ready: int) -> int:
        return 0

    def interrupt(self) -> bool:
        return False


class Straight(_Deciding):
    """One call after the other, by logical processor, without an interrupt."""

    def __init__(self, module: Module) -> None:
        super().__init__(module, ())

    def run(self, calls: Sequence[LeafCall]) -> History:
        """Run the calls; what happened."""
        return self._play(calls, _First())


class _Choices:
    """Decisions by `prefix`, then by `draw`; remembers what was taken and out of how many."""

    def __init__(
        self,
        prefix: Sequence[int],
        processor: Callable[[int], int],
        interrupt: Callable[[], int],
    ) -> None:
        self._prefix = prefix
        self._processor, self._interrupt = processor, interrupt
        self.taken: list[int] = []
        self.options: list[int] = []

    def _choose(self, options: int, draw: Callable[[], int]) -> int:
        at = len(self.taken)
        choice = self._prefix[at] if at < len(self._prefix) else draw()
        if not 0 <= choice < options:
            raise UsageError(
                f"decision {at} is {choice}, but {options} are possible: the choices belong to "
                "other calls, or to another state of the module"
            )
        self.taken.append(choice)
        self.options.append(options)
        return choice

    def processor(self, ready: int) -> int:
        return self._choose(ready, lambda: self._processor(ready))

    def interrupt(self) -> bool:
        return bool(self._choose(2, self._interrupt))


class Seeded(_Deciding):
    """Every decision by one seed: the same seed, calls and module state give the same history.

    `interrupt_rate` is how likely an interrupt is each time a leaf asks for one; `points` are where
    a logical processor can be left for another one.
    """

    def __init__(
        self,
        module: Module,
        seed: int,
        *,
        interrupt_rate: float = 0.25,
        points: Iterable[Point] = ALL_POINTS,
    ) -> None:
        super().__init__(module, points)
        self._dice = random.Random(seed)
        self._rate = interrupt_rate

    def run(self, calls: Sequence[LeafCall]) -> History:
        """Run the calls; what happened, with the choices that repeat it."""
        dice = self._dice
        choices = _Choices((), dice.randrange, lambda: dice.random() < self._rate)
        history = self._play(calls, choices)
        history.choices = tuple(choices.taken)
        return history


class Scripted(_Deciding):
    """Repeats recorded decisions; where they end, the first processor goes on uninterrupted."""

    def __init__(
        self, module: Module, choices: Sequence[int], *, points: Iterable[Point] = ALL_POINTS
    ) -> None:
        super().__init__(module, points)
        self._script = tuple(choices)

    def run(self, calls: Sequence[LeafCall]) -> History:
        """Run the calls.  UsageError if a recorded decision is not possible."""
        choices = _Choices(self._script, lambda _: 0, lambda: 0)
        history = self._play(calls, choices)
        history.choices = tuple(choices.taken)
        return history


def explore(
    module: Module,
    prepare: Callable[[], Sequence[LeafCall]],
    *,
    points: Iterable[Point] = ALL_POINTS,
) -> Iterator[History]:
    """Every history of the calls from the state that the module is in now, each exactly once.

    `prepare` writes the lists of the calls into shared memory and gives the calls; it is asked
    before each run, after the module was put back.  While the caller looks at a history the module
    is in the state in which that history ended.
    """
    snapshot = Snapshot(module)
    scheduler = _Deciding(module, points)
    script: list[int] = []
    while True:
        snapshot.restore()
        choices = _Choices(script, lambda _: 0, lambda: 0)
        history = scheduler._play(prepare(), choices)
        history.choices = tuple(choices.taken)
        yield history
        script, options = choices.taken, choices.options
        while script and script[-1] + 1 == options[-1]:
            script.pop()
            options.pop()
        if not script:
            return
        script[-1] += 1


class Threads:
    """A thread per logical processor; the operating system decides who runs next.

    Steps exclude each other, calls do not: locks of the module are real, and so is BUSY.  `call`
    has the form of `Module.call` and may be used by any number of threads, each on a logical
    processor of its own.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self._one_step = threading.Lock()
        self._entered: set[int] = set()

    def call(
        self, leaf: int, registers: Registers, *, lp: int = 0, interrupt: Interrupt | None = None
    ) -> int:
        """Run one leaf on the calling thread, other threads' leaves between its steps."""
        steps = self.module.start(leaf, registers, lp=lp, interrupt=interrupt)
        for _ in self._steps(steps, lp):
            pass
        return registers.rax

    def _steps(self, steps: Generator[Point, None, None], lp: int) -> Iterator[Point]:
        with self._one_step:
            if lp in self._entered:
                raise UsageError(f"logical processor {lp} is in a leaf already; give each its own")
            self._entered.add(lp)
        try:
            while True:
                with self._one_step:
                    point = next(steps, None)
                if point is None:
                    return
                yield point
                # Give the interpreter to another thread; a lock alone would rarely change hands.
                time.sleep(0)
        finally:
            with self._one_step:
                steps.close()
                self._entered.discard(lp)

    def run(self, calls: Sequence[LeafCall], *, interrupt: Interrupt | None = None) -> History:
        """Run the calls, those of one logical processor in order; what happened."""
        history = History(
            statuses=[[] for _ in calls], registers=[replace(call.operands) for call in calls]
        )
        failures: list[BaseException] = []

        processors = {call.lp for call in calls}
        together = threading.Barrier(len(processors) or 1)

        def work(lp: int) -> None:
            together.wait()
            try:
                for number, call in enumerate(calls):
                    if call.lp == lp:
                        self._finish(history, number, call, interrupt)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(lp,)) for lp in processors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return history

    def _finish(
        self, history: History, number: int, call: LeafCall, interrupt: Interrupt | None
    ) -> None:
        operands, tried = call.operands, 0
        pending = interrupt if call.interruptible else None
        while True:
            left = history.registers[number] = replace(operands)
            for point in self._steps(call.start(self.module, left, pending), call.lp):
                history.events.append(Event(call.lp, number, point))
            history.events.append(Event(call.lp, number, None, left.rax))
            history.statuses[number].append(left.rax)
            again = _again(call, operands, left, tried)
            if again is None:
                return
            tried += left.rax != Status.TDX_INTERRUPTED_RESUMABLE
            operands = again
