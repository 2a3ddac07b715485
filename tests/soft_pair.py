"""Two hosts with their software TDX modules, and the steps that tests of migrations share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tdxmig_model.backend.soft.backend import SoftBackend
from tdxmig_model.backend.soft.host import Host
from tdxmig_model.backend.soft.sept import DIRTY_STATES, EXPORTED_STATES
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import GpaOperation
from tdxmig_model.wire.mbmd import Mbmd, iv_bytes
from tdxmig_model.wire.records import Bundle

MIGRATE, CANCEL = GpaOperation.MIGRATE, GpaOperation.CANCEL


def deterministic(name: str) -> Callable[[int], bytes]:
    """Key material that differs at each call and between names, the same in each run."""
    calls = iter(range(1 << 30))

    def random(length: int) -> bytes:
        text = f"{name} {next(calls)}".encode()
        return hashlib.shake_256(text).digest(length)

    return random


class Pair:
    """A source TD and a destination TD with exchanged keys."""

    def __init__(
        self,
        pages=24,
        *,
        vcpus=1,
        streams=1,
        guest="sequential",
        profile="hardened",
        source_profile=None,
        pending_pages=0,
        seed=1,
    ):
        self.iv_pairs = []

        def observe(key, iv):
            self.iv_pairs.append((key, iv))

        hosts = [
            Host(
                profile=of_side,
                memory_bytes=pages * PAGE_SIZE,
                shared_bytes=(streams + 3) * 528 * PAGE_SIZE,
                random=deterministic(side),
                iv_observer=observe,
            )
            for side, of_side in (("source", source_profile or profile), ("destination", profile))
        ]
        source, destination = hosts
        self.source_host, self.destination_host = hosts
        td = source.create_td(
            pages,
            vcpus=vcpus,
            streams=streams,
            guest=guest,
            pending_pages=pending_pages,
            seed=seed,
        )
        self.source = SoftBackend(source, td)
        waiting = destination.create_destination_td(vcpus=vcpus, streams=streams)
        self.destination = SoftBackend(destination, waiting)
        self.vcpus = vcpus
        self.gpas = self.source.page_gpas()
        self.exchange_keys()

    def exchange_keys(self):
        """What premigration does: each side reads its own key before the peer's is written."""
        forward = self.source.read_migration_encryption_key()
        backward = self.destination.read_migration_encryption_key()
        self.source.write_migration_decryption_key(backward)
        self.destination.write_migration_decryption_key(forward)

    # --- commands that must succeed ------------------------------------------------------------

    def do(self, backend, command):
        result = backend.execute(command)
        assert result.ok, (command.name, result.status_name, hex(result.status))
        return result

    def on_source(self, command):
        return self.do(self.source, command)

    def on_destination(self, command):
        return self.do(self.destination, command)

    # --- steps ---------------------------------------------------------------------------------

    def start(self):
        bundle = self.on_source(c.ExportStateImmutable()).bundle
        self.on_destination(c.ImportStateImmutable(bundle))

    def block(self, gpas):
        result = self.on_source(c.ExportBlockw(np.asarray(gpas, dtype=np.uint64)))
        assert not result.statuses.any()
        self.on_source(c.MemTrack())

    def export(self, gpas, *, stream=0, operation=MIGRATE):
        command = c.ExportMem(stream, np.asarray(gpas, dtype=np.uint64), operation)
        result = self.on_source(command)
        assert not result.statuses.any(), result.statuses
        return result.bundle

    def move(self, gpas, *, stream=0, operation=MIGRATE):
        bundle = self.export(gpas, stream=stream, operation=operation)
        result = self.on_destination(c.ImportMem(stream, bundle))
        assert not result.statuses.any(), result.statuses

    def epoch(self):
        bundle = self.on_source(c.ExportTrack()).bundle
        self.on_destination(c.ImportTrack(bundle))

    def run(self, vcpu=0, budget=1):
        """Run a vCPU of the source; a page that stops it is unblocked.  The page, or None."""
        ended = self.on_source(c.VpEnter(vcpu, budget)).exit
        if ended.reason != "ept_violation":
            return None
        self.on_source(c.ExportUnblockw(ended.gpa))
        return ended.gpa

    def pause(self):
        self.on_source(c.ExportPause())

    def states(self):
        self.on_destination(c.ImportStateTd(self.on_source(c.ExportStateTd()).bundle))
        for vcpu in range(self.vcpus):
            bundle = self.on_source(c.ExportStateVp(vcpu)).bundle
            self.on_destination(c.ImportStateVp(bundle, vcpu))

    def start_token(self):
        bundle = self.on_source(c.ExportTrack(True)).bundle
        self.on_destination(c.ImportTrack(bundle))

    def finish_in_pause(self):
        """All memory and all state in one pause, up to the start token."""
        self.pause()
        self.move(self.gpas)
        self.states()
        self.start_token()

    def abort_with_token(self):
        token = self.on_destination(c.ImportAbort()).bundle.mbmd.pack()
        self.on_source(c.ExportAbort(token))

    def restore_all(self):
        """RESTORE what was exported, UNBLOCKW what was only write-blocked."""
        result = self.on_source(c.ExportRestore(self.gpas))
        for gpa in self.gpas[result.statuses != 0].tolist():
            self.source.execute(c.ExportUnblockw(gpa))

    def new_destination(self, streams=1):
        """The old destination TD is taken down; another one waits."""
        self.destination.close()
        host = self.destination_host
        waiting = host.create_destination_td(vcpus=self.vcpus, streams=streams)
        self.destination = SoftBackend(host, waiting)

    # --- judgements ----------------------------------------------------------------------------

    def assert_equal(self):
        assert self.source.memory_digest() == self.destination.memory_digest()
        assert self.source.vcpu_digest() == self.destination.vcpu_digest()

    def assert_counts(self):
        """MIG_COUNT and DIRTY_COUNT are what the Secure EPT says."""
        seen = self.source.observe()
        states = self.source.page_states(self.gpas).tolist()
        assert seen["mig_count"] == sum(state in EXPORTED_STATES for state in states)
        if seen["op_state"] in ("LIVE_EXPORT", "PAUSED_EXPORT", "POST_EXPORT"):
            assert seen["dirty_count"] == sum(state in DIRTY_STATES for state in states)

    def state(self, backend):
        return backend.observe()["op_state"]


def tampered(bundle: Bundle, **changes) -> Bundle:
    """The bundle with parts replaced."""
    parts = {"pages": bundle.pages, "gpa_list": bundle.gpa_list, "macs": bundle.macs}
    mbmd = changes.pop("mbmd", bundle.mbmd)
    parts.update(changes)
    return Bundle.of(mbmd, **parts)


def flip(data: bytes, position: int = 0) -> bytes:
    """One bit changed."""
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


class Forger:
    """Someone who has the session key and makes authenticated bundles of any content."""

    def __init__(self, pair: Pair, counter=1000):
        self.pair = pair
        self.aead = AESGCM(pair.source._tdcs.mig_enc_working_key)
        self.counter = counter

    def seal(self, mbmd):
        """The MBMD with a fresh IV and the right MAC."""
        self.counter += 1
        mbmd = replace(mbmd, iv_counter=self.counter)
        return mbmd.with_mac(self.aead.encrypt(mbmd.iv(), b"", mbmd.aad()))

    def memory(self, entries, *, content=b"\x5a" * PAGE_SIZE, mac=None, **fields):
        """A memory bundle of these raw 64-bit entries, every MAC right unless `mac` is given."""
        seen = self.pair.destination.observe()
        values = {
            "num_gpas": len(entries),
            "mb_counter": seen["expected_mb_counter"][fields.get("migs_index", 0)],
            "mig_epoch": seen["mig_epoch"],
            "iv_counter": 0,
            **fields,
        }
        mbmd = self.seal(Mbmd.memory(**values))
        pages, macs = [], []
        for entry in entries:
            self.counter += 1
            aad = int(entry).to_bytes(8, "little")
            carried = content if int(entry) >> 52 & 1 and not int(entry) & 4 else b""
            sealed = self.aead.encrypt(iv_bytes(self.counter, mbmd.migs_index), carried, aad)
            pages.append(sealed[:-16].ljust(PAGE_SIZE, b"\0"))
            macs.append(mac or sealed[-16:])
        raw = b"".join(int(entry).to_bytes(8, "little") for entry in entries)
        return Bundle.of(mbmd, pages, raw, b"".join(macs))

    def state(self, mbmd, pages):
        """A state bundle with these plaintext pages."""
        self.counter += 1
        mbmd = replace(mbmd, iv_counter=self.counter)
        sealed = self.aead.encrypt(mbmd.iv(), b"".join(pages), mbmd.aad())
        cut = [sealed[at : at + PAGE_SIZE] for at in range(0, len(sealed) - 16, PAGE_SIZE)]
        return Bundle.of(mbmd.with_mac(sealed[-16:]), cut)

    def open_state(self, bundle):
        """The plaintext pages of a real state bundle."""
        sealed = b"".join(bytes(page) for page in bundle.pages) + bundle.mbmd.mac
        plain = self.aead.decrypt(bundle.mbmd.iv(), sealed, bundle.mbmd.aad())
        return [plain[at : at + PAGE_SIZE] for at in range(0, len(plain), PAGE_SIZE)]
