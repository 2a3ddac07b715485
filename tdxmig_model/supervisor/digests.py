"""Digests of a TD, to compare both sides; page by page where the guest runs in post-copy."""

from __future__ import annotations

import hashlib

from tdxmig_model.backend.soft.backend import SoftBackend
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.engine.commands import Gpas


class Digests:
    """Memory and vCPUs of a TD as they were at `begin`; empty before."""

    def __init__(self, backend: SoftBackend) -> None:
        self._backend = backend
        self.begun = False
        self.memory = ""
        self.vcpus: tuple[str, ...] = ()

    def begin(self) -> None:
        """Take them."""
        self.begun = True
        self.memory = self._backend.memory_digest()
        self.vcpus = tuple(self._backend.vcpu_digest())


class PageDigests:
    """What each page of a TD was when it was last added; and the vCPUs, when they were."""

    def __init__(self, backend: SoftBackend) -> None:
        self._backend = backend
        self._pages: dict[int, bytes] = {}
        self.begun = False
        self.vcpus: tuple[str, ...] = ()

    def begin(self) -> None:
        """Add all pages that there are, and the vCPUs."""
        self.begun = True
        self.add(self._backend.page_gpas())
        self.vcpus = tuple(self._backend.vcpu_digest())

    def add(self, gpas: Gpas) -> None:
        """Add pages as they are now."""
        states = self._backend.page_states(gpas).tolist()
        for gpa, state in zip(gpas.tolist(), states, strict=True):
            pending = SeptState(state).name.startswith("PENDING")
            content = b"" if pending else self._backend.read_page(gpa)
            self._pages[gpa] = hashlib.sha256(bytes([pending]) + content).digest()

    @property
    def memory(self) -> str:
        """SHA-256 over GPA and digest of all pages, in GPA order; empty before `begin`."""
        if not self.begun:
            return ""
        total = hashlib.sha256()
        for gpa, digest in sorted(self._pages.items()):
            total.update(gpa.to_bytes(8, "little") + digest)
        return total.hexdigest()
