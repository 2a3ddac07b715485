"""The two ends of a migration, each over the software module itself or over KVM's interface to it.

A test that needs what an end cannot express is skipped, with the name of what is missing there.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tdxmig_model.backend.kvm.backend import MISSING, KvmBackend
from tdxmig_model.backend.soft.backend import SoftBackend, soft_destination, soft_source
from tdxmig_model.backend.softkvm import SoftKvm
from tdxmig_model.engine.commands import Backend, Command, Gpas, Result, VcpuExit, VpEnter
from tdxmig_model.engine.pages import NO_PAGES


@dataclass
class End:
    """A backend under test; `truth` is the module below it, `kvm` the kernel between them."""

    backend: Backend
    truth: SoftBackend
    kvm: SoftKvm | None = None

    def has(self, capability: str) -> bool:
        """Whether the backend can express it; a soft backend can do what KVM lacks."""
        assert capability in MISSING
        return self.kvm is None

    def do(self, command: Command) -> Result:
        """A command that must succeed."""
        result = self.backend.execute(command)
        assert result.ok, (command.name, result.status_name)
        return result

    @property
    def state(self) -> object:
        return self.truth.observe()["op_state"]

    def need(self, *capabilities: str) -> None:
        for capability in capabilities:
            if not self.has(capability):
                pytest.skip(f"KVM would need {MISSING[capability]}")

    def run(self, vcpu: int, budget: int) -> VcpuExit:
        if self.kvm is not None:
            return self.kvm.run_vcpu(vcpu, budget)
        result = self.truth.execute(VpEnter(vcpu, budget))
        assert result.ok, result.status_name
        assert result.exit is not None
        return result.exit

    def dirty_pages(self) -> Gpas:
        """What KVM has in its dirty log; without KVM the caller notices writes itself."""
        return self.backend.dirty_pages() if isinstance(self.backend, KvmBackend) else NO_PAGES

    def close(self) -> None:
        if self.kvm is not None:
            self.backend.close()
            self.kvm.shut_down()


def exchange_keys(source: End, destination: End) -> None:
    forward = source.truth.read_migration_encryption_key()
    backward = destination.truth.read_migration_encryption_key()
    source.truth.write_migration_decryption_key(backward)
    destination.truth.write_migration_decryption_key(forward)


class Ends:
    """Makes ends of the kinds of one pair, and closes them."""

    def __init__(self, source_kind: str, destination_kind: str) -> None:
        self.kinds = source_kind, destination_kind
        self.made: list[End] = []

    def source(self, pages: int, *, vcpus: int, streams: int) -> End:
        truth = soft_source(pages, vcpus=vcpus, streams=streams)
        return self._end(self.kinds[0], truth, streams)

    def destination(self, pages: int, *, vcpus: int, streams: int) -> End:
        truth = soft_destination(pages, vcpus=vcpus, streams=streams)
        return self._end(self.kinds[1], truth, streams)

    def pair(self, pages: int, *, vcpus: int = 1, streams: int = 1) -> tuple[End, End]:
        """Both ends, with the keys of a pre-migration."""
        source = self.source(pages, vcpus=vcpus, streams=streams)
        destination = self.destination(pages, vcpus=vcpus, streams=streams)
        exchange_keys(source, destination)
        return source, destination

    def _end(self, kind: str, truth: SoftBackend, streams: int) -> End:
        if kind == "soft":
            end = End(truth, truth)
        else:
            kvm = SoftKvm(truth.host, truth.td, kind, clear_dirty_log=False)
            backend = KvmBackend(
                kvm, kvm.vm_fd, slot_pages=kvm.slot_pages, dialect=kind, streams=streams
            )
            end = End(backend, truth, kvm)
        self.made.append(end)
        return end

    def close(self) -> None:
        for end in self.made:
            end.close()
