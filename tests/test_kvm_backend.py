"""Does the backend over KVM's interface give back what it takes, and say what went wrong?"""

from __future__ import annotations

import ctypes
import errno
import os
import tomllib
from pathlib import Path

import numpy as np
import pytest
from soft_pair import Pair

from tdxmig_model import names
from tdxmig_model.backend.kvm import abi
from tdxmig_model.backend.kvm.backend import CAPABILITIES, MISSING, KvmBackend
from tdxmig_model.backend.kvm.calls import LinuxCalls
from tdxmig_model.backend.softkvm import SoftKvm
from tdxmig_model.backend.softkvm.stream import MBMD_ROOM, STATE_PAGES
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import BackendError, UsageError
from tdxmig_model.wire.constants import MAX_STREAMS
from tdxmig_model.wire.gpa_list import GpaOperation
from tdxmig_model.wire.mbmd import Mbmd

FACTS = tomllib.loads((Path(__file__).resolve().parent.parent / "specs/kvm_abi.toml").read_text())
PAGES = 12


class Refusing:
    """System calls of a SoftKvm; the one with a given number answers -errno instead."""

    def __init__(self, kvm: SoftKvm, refuse: int = -1, code: int = errno.ENOMEM) -> None:
        self.kvm, self.refuse, self.code = kvm, refuse, code
        self.calls = 0
        self.open: set[int] = set()
        self.mapped: set[int] = set()

    def _refused(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self.refuse

    def ioctl(self, fd: int, request: int, address: int) -> int:
        if self._refused():
            return -self.code
        result = self.kvm.ioctl(fd, request, address)
        if request == abi.KVM_CREATE_DEVICE:
            self.open.add(ctypes.c_uint32.from_address(address + 4).value)
        return result

    def mmap(self, fd: int, length: int, offset: int) -> int:
        if self._refused():
            return -self.code
        address = self.kvm.mmap(fd, length, offset)
        self.mapped.add(address)
        return address

    def munmap(self, address: int, length: int) -> int:
        self.mapped.discard(address)
        return self.kvm.munmap(address, length)

    def close(self, fd: int) -> int:
        self.open.discard(fd)
        return self.kvm.close(fd)


@pytest.fixture
def kvms():
    """A source and a destination behind KVM's interface, of a dialect."""
    made = []

    def make(dialect="Gen-1b", **options):
        pair = Pair(PAGES, streams=0, **options)
        hosts = (pair.source_host, pair.source.td), (pair.destination_host, pair.destination.td)
        made.extend(SoftKvm(host, td, dialect, clear_dirty_log=False) for host, td in hosts)
        return pair, *made[-2:]

    yield make
    for kvm in made:
        kvm.shut_down()


def backend(kvm, calls=None, **options):
    options.setdefault("buffer_pages", 16)
    dialect = kvm.dialect.name
    return KvmBackend(
        calls or kvm, kvm.vm_fd, slot_pages=kvm.slot_pages, dialect=dialect, **options
    )


def do(side, command):
    result = side.execute(command)
    assert result.ok, (command.name, result.status_name)
    return result


# --- the interface as a table --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "number"), FACTS["ioctl"].items())
def test_ioctl_numbers_are_those_of_the_headers(name, number):
    assert getattr(abi, name) == number


def test_layouts_and_commands_are_those_of_the_headers():
    structs = {
        "kvm_create_device": abi.CREATE_DEVICE,
        "kvm_device_attr": abi.DEVICE_ATTR,
        "kvm_dirty_log": abi.DIRTY_LOG,
        "kvm_clear_dirty_log": abi.CLEAR_DIRTY_LOG,
        "kvm_dev_tdx_mig_attr": abi.STREAM_ATTR,
        "kvm_tdx_get_migration_info": abi.GET_MIGRATION_INFO,
        "kvm_tdx_set_migration_info": abi.SET_MIGRATION_INFO,
    }
    assert {name: layout.size for name, layout in structs.items()} == FACTS["size"]
    assert {command.name: int(command) for command in abi.TdxCommand} == FACTS["command"]
    for name, facts in FACTS["dialect"].items():
        dialect = abi.dialect_named(name)
        assert dialect.device_type == facts["device_type"]
        assert dialect.command.size == facts["kvm_tdx_cmd"]
        assert dialect.abort_takes_end is (facts["export_abort"] != "0")
    assert FACTS["stream"] == {
        "attribute_group": abi.STREAM_ATTR_GROUP,
        "attribute_version": abi.STREAM_ATTR_VERSION,
        "buffer_pages_max": abi.MAX_BUFFER_PAGES,
        "mbmd_page": abi.MBMD_OFFSET,
        "gpa_list_page": abi.GPA_LIST_OFFSET,
        "mac_list_page": abi.MAC_LIST_OFFSET,
        "buffers_page": abi.BUFFERS_OFFSET,
        "max_migs": MAX_STREAMS,
    }
    assert (STATE_PAGES, MBMD_ROOM) == (5, 0xFFF << 52)


def test_commands_have_the_numbers_of_the_name_table():
    for row in names.NAMES:
        for command in (row.kvm, row.kvm_inside):
            if command is not None:
                short = command.name.removeprefix("KVM_TDX_")
                assert abi.TdxCommand[short] == command.id


# --- set-up and close ----------------------------------------------------------------------------


def test_setting_up_two_streams_takes_what_it_says_and_closing_gives_it_back(kvms):
    _, kvm, _ = kvms()
    calls = Refusing(kvm)
    side = backend(kvm, calls, streams=2)
    device = side._streams[0]
    assert (len(calls.open), len(calls.mapped)) == (2, 8)
    assert (device.pages, device.max_streams, device.buffers.size) == (16, 512, 16 * 4096)
    side.close()
    assert device.buffers.size == device.mbmd.size == 0
    side.close()
    assert not calls.open | calls.mapped
    with pytest.raises(UsageError, match="streams that are closed"):
        side.execute(c.ExportPause())


@pytest.mark.parametrize("refuse", range(14))
def test_a_refusal_at_any_step_of_the_set_up_leaves_nothing_behind(kvms, refuse):
    _, kvm, _ = kvms()
    calls = Refusing(kvm, refuse)
    with pytest.raises(BackendError, match="ENOMEM: Cannot allocate memory"):
        backend(kvm, calls, streams=2)
    assert calls.calls == refuse + 1
    assert not calls.open | calls.mapped
    backend(kvm, streams=2).close()


def test_a_kernel_without_the_device_is_told_with_its_dialect(kvms):
    _, kvm, _ = kvms("Gen-1a")
    with pytest.raises(BackendError, match=r"type 12 \(Gen-1b\) failed with ENODEV: No such dev"):
        KvmBackend(kvm, kvm.vm_fd, slot_pages=1, dialect="gen-1b")
    with pytest.raises(UsageError, match="at least one"):
        KvmBackend(kvm, kvm.vm_fd, slot_pages=1, streams=0)


def test_the_calls_of_linux_answer_as_the_kernel_does(tmp_path):
    """On an ordinary file: no KVM is needed to see mappings and errors come through."""
    calls = LinuxCalls()
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    fd = os.open(path, os.O_RDWR)
    address = calls.mmap(fd, 4096, 4096)
    view = (ctypes.c_uint8 * 4096).from_address(address)
    view[0] = ord("y")
    assert path.read_bytes()[4096:4098] == b"yx"
    assert calls.mmap(fd, 4096, 1) == -errno.EINVAL
    assert calls.ioctl(fd, abi.KVM_CREATE_DEVICE, address) == -errno.ENOTTY
    assert calls.munmap(address, 4096) == 0
    assert calls.munmap(address + 1, 4096) == -errno.EINVAL
    assert calls.close(fd) == 0
    assert calls.close(fd) == -errno.EBADF
    with pytest.raises(BackendError, match="EBADF: Bad file descriptor"):
        KvmBackend(calls, fd, slot_pages=1)


def test_a_real_kvm_without_the_device_is_told():
    try:
        kvm = os.open(abi.KVM_DEVICE_PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"no {abi.KVM_DEVICE_PATH} here: {error.strerror}")
    calls = LinuxCalls()
    vm = calls.ioctl(kvm, abi.KVM_CREATE_VM, abi.KVM_X86_DEFAULT_VM)
    os.close(kvm)
    if vm < 0:
        pytest.skip(f"KVM makes no virtual machine here: {os.strerror(-vm)}")
    try:
        for dialect in abi.DIALECTS:
            assert trouble_with(calls, vm, dialect) in ("", "KVM_CREATE_DEVICE of type")
    finally:
        calls.close(vm)


def trouble_with(calls, vm, dialect):
    """How the first call that a kernel refuses begins; empty if there is none."""
    try:
        KvmBackend(calls, vm, slot_pages=1, dialect=dialect).close()
    except BackendError as error:
        return str(error)[: len("KVM_CREATE_DEVICE of type")]
    return ""


def test_ready_is_what_the_kernel_says_and_silence_is_an_error(kvms):
    pair, kvm, _ = kvms()
    assert backend(kvm).is_ready()
    pair.new_destination(0)
    fresh = SoftKvm(pair.destination_host, pair.destination.td)
    assert not backend(fresh).is_ready()
    fresh.shut_down()
    calls = Refusing(kvm, refuse=7, code=errno.EINVAL)
    with pytest.raises(BackendError, match="GET_MIGRATION_INFO failed with EINVAL"):
        backend(kvm, calls).is_ready()


# --- what it says --------------------------------------------------------------------------------


def test_a_refusal_names_the_errno_and_what_it_means(kvms):
    pair, kvm, _ = kvms()
    side = backend(kvm)
    refused = side.execute(c.ExportPause())
    assert not refused.ok
    assert refused.status == 1 << 63 | errno.EIO
    assert refused.status_name.startswith("EIO: ")
    assert "kernel log" in refused.status_name
    too_many = c.ExportMem(0, np.arange(17, dtype=np.uint64) << 12, GpaOperation.MIGRATE)
    assert "17 pages; stream has 16 buffers" in side.execute(too_many).status_name
    do(side, c.ExportStateImmutable())
    pair.source_host.module.shut_down = True
    side.execute(c.ExportBlockw(np.array([0x1000], dtype=np.uint64)))
    pair.source_host.module.shut_down = False
    one = c.ExportMem(0, np.array([0x1000], dtype=np.uint64), GpaOperation.MIGRATE)
    assert side.execute(one).status_name.startswith("EBADF: ")
    with pytest.raises(UsageError, match="stream 1 of a backend with 1"):
        side.execute(c.ExportStateVp(0, 1))


def test_a_kernel_that_tells_the_status_of_the_module_is_believed(kvms):
    _, kvm, _ = kvms("Gen-1a")

    class Telling(Refusing):
        def ioctl(self, fd, request, address):
            result = super().ioctl(fd, request, address)
            if request == abi.KVM_MEMORY_ENCRYPT_OP and result:
                ctypes.c_uint64.from_address(address + 16).value = kvm.last_status
            return result

    refused = backend(kvm, Telling(kvm)).execute(c.ExportPause())
    assert refused.status_name == "TDX_OP_STATE_INCORRECT"
    assert refused.status == kvm.last_status


WITHOUT_COMMAND = {
    "abort_token": c.ImportAbort(),
    "commit": c.ImportCommit(),
    "unblock": c.ExportUnblockw(0x1000),
    "vp_enter": c.VpEnter(0, 1),
}


@pytest.mark.parametrize(("capability", "command"), WITHOUT_COMMAND.items())
def test_what_the_interface_lacks_is_named(kvms, capability, command):
    _, kvm, _ = kvms()
    side = backend(kvm)
    assert capability not in side.capabilities
    refused = side.execute(command)
    assert refused.status == 1 << 63 | errno.EOPNOTSUPP
    assert MISSING[capability] in refused.status_name
    assert "TDH." in refused.status_name


def test_capabilities_are_there_or_missing_for_a_reason(kvms):
    pair, kvm, _ = kvms()
    side = backend(kvm)
    assert side.capabilities == CAPABILITIES
    assert not CAPABILITIES & MISSING.keys()
    # Whatever the module itself can do, KVM can do or lacks by name.
    assert pair.source.capabilities <= CAPABILITIES | MISSING.keys()
    assert side.observe() == {}
    with pytest.raises(BackendError, match=r"TDH\.MEM\.SEPT\.RD"):
        side.page_states(pair.gpas)


# --- what the interface would hide ---------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["Gen-1a", "Gen-1b"])
def test_an_abort_restores_the_last_page_too(kvms, dialect):
    pair, kvm, _ = kvms(dialect)
    side = backend(kvm)
    do(side, c.ExportStateImmutable())
    do(side, c.ExportPause())
    do(side, c.ExportMem(0, pair.gpas, GpaOperation.MIGRATE))
    assert side.execute(c.ExportRestore(pair.gpas)).status_name.startswith("EOPNOTSUPP")
    do(side, c.ExportAbort())
    assert not do(side, c.ExportRestore(pair.gpas)).statuses.any()
    assert pair.source.observe()["mig_count"] == 0
    assert pair.state(pair.source) == "RUNNABLE"


def test_an_abort_after_the_start_token_is_not_believed(kvms):
    pair, kvm, _ = kvms()
    side = backend(kvm)
    do(side, c.ExportStateImmutable())
    do(side, c.ExportPause())
    do(side, c.ExportStateTd())
    do(side, c.ExportStateVp(0))
    do(side, c.ExportTrack(True))
    for token in (None, bytes(48)):
        assert MISSING["abort_token"] in side.execute(c.ExportAbort(token)).status_name
    assert pair.state(pair.source) == "POST_EXPORT"


def test_another_vcpu_than_the_one_asked_for_is_noticed(kvms):
    _, kvm, _ = kvms(vcpus=2)
    side = backend(kvm)
    do(side, c.ExportStateImmutable())
    do(side, c.ExportPause())
    with pytest.raises(BackendError, match="vCPU 0 was exported where vCPU 1 was asked for"):
        side.execute(c.ExportStateVp(1))


def test_a_vcpu_state_on_another_stream_is_refused_before_it_fails_the_import(kvms):
    pair, here, there = kvms()
    source, destination = backend(here, streams=2), backend(there, streams=2)
    do(destination, c.ImportStateImmutable(do(source, c.ExportStateImmutable()).bundle))
    do(source, c.ExportPause())
    do(destination, c.ImportStateTd(do(source, c.ExportStateTd()).bundle))
    refused = destination.execute(c.ImportStateVp(do(source, c.ExportStateVp(0, 1)).bundle, 0))
    assert MISSING["vcpu_streams"] in refused.status_name
    assert pair.state(pair.destination) == "STATE_IMPORT"


def test_a_bundle_that_does_not_fit_is_refused_before_it_is_copied(kvms):
    pair, here, there = kvms()
    source, destination = backend(here), backend(there, buffer_pages=5)
    do(destination, c.ImportStateImmutable(do(source, c.ExportStateImmutable()).bundle))
    do(source, c.ExportPause())
    bundle = do(source, c.ExportMem(0, pair.gpas, GpaOperation.MIGRATE)).bundle
    refused = destination.execute(c.ImportMem(0, bundle))
    assert "12 pages; the stream has 5 buffers" in refused.status_name
    cut = type(bundle).of(bundle.mbmd, bundle.pages[:-1], bundle.gpa_list, bundle.macs)
    with pytest.raises(UsageError, match="12 entries, 11 pages"):
        destination.execute(c.ImportMem(0, cut))
    assert pair.state(pair.destination) == "MEMORY_IMPORT"


def test_the_dirty_log_is_read_and_cleared_page_by_page(kvms):
    pair, kvm, _ = kvms()
    side = backend(kvm)
    do(side, c.ExportStateImmutable())
    assert side.dirty_pages().tolist() == pair.gpas.tolist()
    do(side, c.ExportBlockw(pair.gpas[[3, 7, 7, 11]]))
    assert side.dirty_pages().tolist() == np.delete(pair.gpas, [3, 7, 11]).tolist()
    states = pair.source.page_states(pair.gpas)
    assert len(set(states[[3, 7, 11]])) == 1
    assert states[3] != states[0]
    beyond = np.array([PAGES << 12], dtype=np.uint64)
    assert do(side, c.ExportBlockw(beyond)).statuses.tolist() == [0]


def test_a_bundle_is_a_copy_and_not_the_mapping(kvms):
    pair, kvm, _ = kvms()
    side = backend(kvm)
    first = do(side, c.ExportStateImmutable()).bundle
    pages = [bytes(page) for page in first.pages]
    do(side, c.ExportPause())
    do(side, c.ExportMem(0, pair.gpas, GpaOperation.MIGRATE))
    assert [bytes(page) for page in first.pages] == pages
    assert first.mbmd == Mbmd.unpack(first.mbmd.pack())
