"""The lifecycle of one side as a `transitions.Machine` (the only file that imports that library).

The machine is a view of the model's rows: its states are the phases, its transitions the projection
of the events, its conditions the compiled guards.  Three things are made strict.  A guard that does
not hold raises `Refused` and is never a silent False.  An event without a row is refused.  The
phase moves only after the work of the event has been done: if that raises, nothing moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transitions import EventData, Machine, MachineError

from tdxmig_model.errors import ModelError, Refused, Unmet
from tdxmig_model.expr import EnumType, Instance, System, Value, Variable
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.monitor import Monitor
from tdxmig_model.project import edges

Perform = Callable[[str, Mapping[str, Value]], None]
"""Does the work of an accepted event; an exception leaves the lifecycle where it was."""

SIDES = ("source", "destination")


def event_name(side: str, step: str) -> str:
    """The event's name on its side: rows of the destination that share a name carry a prefix."""
    return step.removeprefix("destination_") if side == "destination" else step


class LifecycleMachine:
    """One side's lifecycle.  `fire` is the only way to move it, and `perform` the only thing it
    calls.
    """

    def __init__(
        self,
        side: str,
        perform: Perform,
        *,
        vcpus: int,
        profile: str = "hardened",
        system: System = LIFECYCLE,
    ) -> None:
        if side not in SIDES:
            raise ModelError(f"a lifecycle is that of {' or '.join(SIDES)}, not of {side}")
        self.side = side
        self._perform = perform
        self._phase = f"{side}_phase"
        instance = Instance({"Message": None, "Epoch": None, "Vcpu": vcpus})
        self.monitor = Monitor(
            system.under(profile), instance, (self._phase, f"{side}_epoch"), actor=side
        )
        self._steps = {event_name(side, s.name): s.name for s in system.of_actor(side)}
        self._performing: str | None = None
        self._machine = self._build()

    def _members(self) -> tuple[str, ...]:
        kind = self.monitor.system.variable(self._phase).kind
        assert isinstance(kind, EnumType)
        return kind.members

    def _build(self) -> Machine:
        variable = self.monitor.system.variable(self._phase)
        assert isinstance(variable, Variable)
        machine = Machine(
            model=None,
            states=list(self._members()),
            initial=self.monitor.text(self._phase),
            auto_transitions=False,
            send_event=True,
        )
        machine.add_model(self, initial=self.monitor.text(self._phase))
        for edge in edges(self.monitor.system, variable, self.side):
            machine.add_transition(
                trigger=f"on_{event_name(self.side, edge.step.name)}",
                source=edge.origin,
                dest=edge.target,
                conditions=self._holds,
                before=self._work,
                after=self._moved,
            )
        return machine

    # --- what transitions calls ------------------------------------------------------------------

    def _holds(self, event: EventData) -> bool:
        self.monitor.check(event.kwargs["step"], **event.kwargs["params"])
        return True

    def _work(self, event: EventData) -> None:
        self._perform(event_name(self.side, event.kwargs["step"]), event.kwargs["params"])

    def _moved(self, event: EventData) -> None:
        self.monitor.take(event.kwargs["step"], **event.kwargs["params"])

    # --- what the session calls ------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """The phase by name."""
        return self.monitor.text(self._phase)

    def fire(self, event: str, **params: Value) -> None:
        """Do one lifecycle event: refused, or performed and then recorded.

        While an event is performed no other can be fired: its guard was checked in this phase.
        """
        step = self._steps.get(event)
        if step is None:
            raise self._refused(event, "row", f"an event {event} of the {self.side}")
        if self._performing is not None:
            raise self._refused(event, "one_event", f"{self._performing} to have ended")
        self.monitor.check(step, **params)
        self._performing = event
        try:
            self.trigger(f"on_{event}", step=step, params=params)  # type: ignore[attr-defined]
        except MachineError as problem:
            raise ModelError(f"{event}: the machine and the model disagree: {problem}") from problem
        finally:
            self._performing = None

    def _refused(self, event: str, label: str, needed: str) -> Refused:
        return Refused(event, self.monitor.shown(), [Unmet(label, needed, {})], self.legal())

    def legal(self) -> list[str]:
        """The events that can be fired now, with some parameters at least, by name."""
        return [event_name(self.side, step) for step in self.monitor.legal()]

    def assume(self, **network: Value) -> None:
        """Set variables that the network decides: `confirmation`, `abort_token`."""
        for name, value in network.items():
            if self.monitor.system.variable(name).owner != "network":
                raise ModelError(f"{name} is not decided by the network")
            self.monitor[name] = value

    def deliver(self, record: str, epoch: int) -> None:
        """Tell the destination's lifecycle that a record of this kind and epoch arrived next."""
        kind = self.monitor.system.variable("record_kind").kind
        assert isinstance(kind, EnumType)
        position = self.monitor["sent"]
        self.monitor["record_kind"][position] = kind.position(record)
        self.monitor["record_epoch"][position] = epoch
        self.monitor["sent"] = position + 1
