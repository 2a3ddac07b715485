"""Every exception the package raises, as one tree, sorted by whose fault it is.

Each message says what happened, where, in which state, and what to do about it.  Anything else that
escapes from the package is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class TdxmigError(Exception):
    """Root of everything the package raises on purpose."""


class ModelError(TdxmigError):
    """A row, variable or property of the model is wrong.  Raised while the model is imported."""


class UsageError(TdxmigError):
    """The caller's arguments or environment are unusable; nothing was started."""


@dataclass(frozen=True, slots=True)
class Unmet:
    """One guard conjunct that does not hold: its label, its text, and the values it read."""

    label: str
    text: str
    values: Mapping[str, object]

    def __str__(self) -> str:
        shown = ", ".join(f"{name} = {value}" for name, value in self.values.items())
        return f"{self.label}: needs {self.text}" + (f" ({shown})" if shown else "")


class Refused(TdxmigError):
    """The caller asked for a step that the model forbids in this state.  Nothing was changed."""

    def __init__(
        self,
        step: str,
        state: Mapping[str, object],
        unmet: Sequence[Unmet],
        legal: Sequence[str] = (),
        why: str = "",
    ) -> None:
        self.step = step
        self.state = dict(state)
        self.unmet = tuple(unmet)
        self.legal = tuple(legal)
        self.why = why
        super().__init__(self._text())

    def _text(self) -> str:
        where = ", ".join(f"{name} = {value}" for name, value in self.state.items())
        lines = [f"{self.step} is refused" + (f" in state {where}" if where else "")]
        lines += [f"  unmet {unmet}" for unmet in self.unmet]
        if self.why:
            lines.append(f"  because: {self.why}")
        if self.legal:
            lines.append("  legal now: " + ", ".join(self.legal))
        return "\n".join(lines)


class PeerError(TdxmigError):
    """The other side broke the protocol, or went away."""


class PeerLost(PeerError):
    """The connection ended before the migration did."""


class WireError(TdxmigError):
    """Bytes that cannot be decoded: where they are, which field, what it held, what it may hold."""

    def __init__(self, message: str, *, offset: int, field: str, value: object, bound: str) -> None:
        self.offset = offset
        self.field = field
        self.value = value
        self.bound = bound
        super().__init__(
            f"{message}: byte {offset}, field {field}, value {value!r}, expected {bound}"
        )


class BackendError(TdxmigError):
    """A module status or an errno that ends the operation, decoded by name."""

    def __init__(self, command: str, status: int, name: str, detail: str = "") -> None:
        self.command = command
        self.status = status
        self.name = name
        super().__init__(
            f"{command} failed with {name} (0x{status & 0xFFFFFFFFFFFFFFFF:016X})"
            + (f": {detail}" if detail else "")
        )


class ModuleHalted(TdxmigError):
    """A software module found its own state impossible, where hardware shuts the module down."""

    def __init__(self, leaf: str, op_state: str, finding: str) -> None:
        self.leaf = leaf
        self.op_state = op_state
        self.finding = finding
        super().__init__(
            f"{leaf} in {op_state} halts the TDX module: {finding}; no call leads there, so report "
            "the calls that did"
        )


class ModelMismatch(TdxmigError):
    """After a step the backend is not in the state that the model computed."""

    def __init__(
        self, step: str, differences: Mapping[str, tuple[object, object]], detail: str = ""
    ) -> None:
        self.step = step
        self.differences = dict(differences)
        lines = [
            f"after {step} the backend differs from the model" + (f": {detail}" if detail else "")
        ]
        lines += [
            f"  {name}: model {model}, backend {backend}"
            for name, (model, backend) in self.differences.items()
        ]
        super().__init__("\n".join(lines))
