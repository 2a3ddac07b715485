"""Is the dirty log of the software the one that a real KVM keeps, where there is one to compare?

The guest of the real one has no vCPU: its pages are dirty because they are at first
(KVM_DIRTY_LOG_INITIALLY_SET), which is how a VMM begins a migration.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

import numpy as np
import pytest
from soft_pair import Pair

from tdxmig_model.backend.kvm import abi
from tdxmig_model.backend.kvm.calls import LinuxCalls
from tdxmig_model.backend.kvm.dirty_log import DirtyLog
from tdxmig_model.backend.softkvm import SoftKvm

PAGES = 100
KVM_ENABLE_CAP, KVM_SET_USER_MEMORY_REGION = 0x4068AEA3, 0x4020AE46
MANUAL_AND_INITIALLY_SET, LOG_DIRTY_PAGES = 3, 1


@pytest.fixture
def soft():
    pair = Pair(PAGES, streams=0)
    kvm = SoftKvm(pair.source_host, pair.source.td, clear_dirty_log=False)
    yield kvm, kvm.vm_fd
    kvm.shut_down()


@pytest.fixture
def linux():
    """A VM of the real KVM with one memory slot, or a skip that says why there is none."""
    calls = LinuxCalls()
    try:
        kvm = os.open(abi.KVM_DEVICE_PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"no {abi.KVM_DEVICE_PATH} here: {error.strerror}")
    machine = calls.ioctl(kvm, abi.KVM_CREATE_VM, abi.KVM_X86_DEFAULT_VM)
    os.close(kvm)
    if machine < 0:
        pytest.skip(f"KVM makes no virtual machine here: {os.strerror(-machine)}")
    memory = mmap.mmap(-1, PAGES * 4096)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    capability = struct.pack("<II4Q64x", 168, 0, MANUAL_AND_INITIALLY_SET, 0, 0, 0)
    region = struct.pack("<IIQQQ", 0, LOG_DIRTY_PAGES, 0, PAGES * 4096, start)
    for request, argument in ((KVM_ENABLE_CAP, capability), (KVM_SET_USER_MEMORY_REGION, region)):
        buffer = ctypes.create_string_buffer(argument, len(argument))
        code = calls.ioctl(machine, request, ctypes.addressof(buffer))
        if code < 0:
            calls.close(machine)
            pytest.skip(f"KVM has no dirty log by hand here: {os.strerror(-code)}")
    yield calls, machine
    calls.close(machine)


@pytest.fixture(params=["soft", "linux"])
def kernel(request):
    return request.getfixturevalue(request.param)


def dirty(log):
    found = log.read()
    assert not isinstance(found, int)
    return (found >> np.uint64(12)).tolist()


def test_pages_are_dirty_until_they_are_cleared_and_reading_clears_nothing(kernel):
    log = DirtyLog(*kernel, PAGES)
    assert dirty(log) == dirty(log) == list(range(PAGES))
    column = np.array([3, 7, 7, 70, 99, 100, 5000], dtype=np.uint64) << np.uint64(12)
    assert log.clear(column) == 0
    assert dirty(log) == [page for page in range(PAGES) if page not in (3, 7, 70, 99)]
    assert log.clear(column) == 0
    assert log.clear(np.arange(PAGES, dtype=np.uint64) << np.uint64(12)) == 0
    assert dirty(log) == []


@pytest.mark.parametrize(
    ("first", "count", "slot", "code"),
    [
        (1, 64, 0, errno.EINVAL),
        (0, 65, 0, errno.EINVAL),
        (0, 128, 0, errno.EINVAL),
        (64, 64, 0, errno.EINVAL),
        (128, 64, 0, errno.EINVAL),
        (0, 64, 1, errno.ENOENT),
        (0, 64, 1 << 20, errno.EINVAL),
        (0, 64, 0, 0),
        (0, 0, 0, 0),
        (0, 100, 0, 0),
        (64, 36, 0, 0),
        (64, 35, 0, errno.EINVAL),
        ((1 << 64) - 64, 64, 0, errno.EINVAL),
    ],
)
def test_what_may_be_cleared(kernel, first, count, slot, code):
    calls, machine = kernel
    bits = ctypes.create_string_buffer(b"\xff" * 64, 64)
    raw = struct.pack("<IIQQ", slot, count, first, ctypes.addressof(bits))
    buffer = ctypes.create_string_buffer(raw, 24)
    assert calls.ioctl(machine, abi.KVM_CLEAR_DIRTY_LOG, ctypes.addressof(buffer)) == -code
    assert len(dirty(DirtyLog(calls, machine, PAGES))) == PAGES - (0 if code else count)


@pytest.mark.parametrize(("slot", "code"), [(1, errno.ENOENT), (1 << 20, errno.EINVAL)])
def test_the_log_of_another_slot(kernel, slot, code):
    calls, machine = kernel
    bits = ctypes.create_string_buffer(64)
    raw = struct.pack("<IIQ", slot, 0, ctypes.addressof(bits))
    buffer = ctypes.create_string_buffer(raw, 16)
    assert calls.ioctl(machine, abi.KVM_GET_DIRTY_LOG, ctypes.addressof(buffer)) == -code


@pytest.mark.parametrize("request_number", ["KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG"])
@pytest.mark.parametrize("argument", [True, False])
def test_bad_addresses(kernel, request_number, argument):
    """The structure, or the bitmap that it names."""
    calls, machine = kernel
    layouts = {"KVM_GET_DIRTY_LOG": "<IIQ", "KVM_CLEAR_DIRTY_LOG": "<IIQQ"}
    words = (0, PAGES, 8) if request_number == "KVM_GET_DIRTY_LOG" else (0, PAGES, 0, 8)
    raw = struct.pack(layouts[request_number], *words)
    buffer = ctypes.create_string_buffer(raw, len(raw))
    address = 8 if argument else ctypes.addressof(buffer)
    assert calls.ioctl(machine, getattr(abi, request_number), address) == -errno.EFAULT


@pytest.mark.parametrize(
    ("device_type", "flags"), [(13, 0), (1 << 31, 0), (13, 1)], ids=["unknown", "large", "test"]
)
def test_devices_of_unknown_types(kernel, device_type, flags):
    calls, machine = kernel
    buffer = ctypes.create_string_buffer(struct.pack("<III", device_type, 0, flags), 12)
    code = calls.ioctl(machine, abi.KVM_CREATE_DEVICE, ctypes.addressof(buffer))
    assert code == -errno.ENODEV
    assert calls.ioctl(machine, abi.KVM_CREATE_DEVICE, 8) == -errno.EFAULT


def test_requests_that_a_vm_does_not_know(kernel):
    calls, machine = kernel
    assert calls.ioctl(machine, 0xAE80, 0) == -errno.ENOTTY
    assert calls.ioctl(machine, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_DEVICE_CTRL) == 1
    assert calls.mmap(machine, 4096, 0) == -errno.ENODEV
