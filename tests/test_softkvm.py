"""Is KVM's interface to TDX migration served as the kernels serve it, odd parts included?"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from kvm_caller import (
    ABORT,
    CHECK_EXTENSION,
    CLEAR_LOG,
    COMMAND,
    CREATE,
    EXPORT_IMMUTABLE,
    EXPORT_MEM,
    EXPORT_TRACK,
    EXPORT_VP,
    GET_ATTR,
    GET_LOG,
    HAS_ATTR,
    IMPORT_END,
    IMPORT_IMMUTABLE,
    IMPORT_MEM,
    IMPORT_VP,
    MIGRATE,
    PAUSE,
    SET_ATTR,
    TYPES,
    Caller,
    begin,
    clear_log,
    dirty_log,
    gpas_of,
)
from soft_pair import Pair

from tdxmig_model.backend.softkvm import SoftKvm
from tdxmig_model.errors import UsageError

DIALECTS = pytest.mark.parametrize("dialect", ["Gen-1a", "Gen-1b"])
PAGES = 24


@DIALECTS
@pytest.mark.parametrize("streams", [1, 3])
def test_a_running_td_moves_through_descriptors_and_addresses(callers, dialect, streams):
    ends = callers(dialect, vcpus=2)
    here, there = begin(ends, streams, pages=8)
    for number, gpa in enumerate(gpas_of(ends)):
        ends.memory(here[number % streams], there[number % streams], [gpa])
    assert ends.source.kvm.run_vcpu(0, 60).reason == "budget"
    ends.source.ok(here[0], PAUSE, None)
    ends.token(here[0], there[0])
    written = [int(gfn) << 12 for gfn in np.flatnonzero(dirty_log(ends.source))]
    assert written
    for start in range(0, len(written), 8):
        ends.memory(here[0], there[0], written[start : start + 8])
    ends.end(here[0], there[0], 2)
    assert ends.pair.state(ends.pair.destination) == "LIVE_IMPORT"
    ends.destination.ok(there[0], IMPORT_END, None)
    ends.pair.assert_equal()
    assert ends.pair.state(ends.pair.destination) == "RUNNABLE"
    assert ends.destination.kvm.run_vcpu(1, 20).reason == "budget"


# --- devices and attributes ----------------------------------------------------------------------


@DIALECTS
def test_a_device_is_created_by_the_type_of_its_dialect(callers, dialect):
    kvm = callers(dialect).source.kvm
    other = TYPES["Gen-1b" if dialect == "Gen-1a" else "Gen-1a"]
    assert kvm.create_device(TYPES[dialect], True) == 0
    assert kvm.create_device(other, False) == -errno.ENODEV
    assert kvm.create_device(other, True) == -errno.ENODEV
    fd = kvm.create_device(TYPES[dialect], False)
    assert fd > 2
    os.fstat(fd)  # the number is taken in this process, so that nobody else gets it
    assert kvm.close(fd) == 0
    assert kvm.close(fd) == -errno.EBADF
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.mark.parametrize(("flags", "made"), [(0, True), (1, False)])
def test_a_device_is_created_through_the_vm_descriptor(callers, flags, made):
    kvm = callers().source.kvm
    argument = ctypes.create_string_buffer(struct.pack("<III", 11, 99, flags), 12)
    assert kvm.ioctl(kvm.vm_fd, CREATE, ctypes.addressof(argument)) == 0
    _, fd, _ = struct.unpack("<III", argument.raw)
    assert (fd != 99) is made
    assert kvm.close(fd) == (0 if made else -errno.EBADF)
    assert kvm.ioctl(kvm.vm_fd, CHECK_EXTENSION, 89) == 1
    assert kvm.ioctl(kvm.vm_fd, CHECK_EXTENSION, 12345) == 0
    assert kvm.ioctl(kvm.vm_fd, 0xAE80, 0) == -errno.ENOTTY


@pytest.mark.parametrize(
    ("asked", "given"), [(0, 5), (1, 5), (5, 5), (6, 6), (512, 512), (513, 512), (1 << 31, 512)]
)
def test_the_number_of_buffers_is_clamped(callers, asked, given):
    caller = callers().source
    fd = caller.stream(asked)
    assert caller.attributes(fd, GET_ATTR, 3, version=9) == (0, (0, given, 512))


def test_attributes_are_checked_as_the_driver_does(callers):
    caller = callers().source
    fd = caller.stream()
    assert caller.attributes(fd, SET_ATTR, 8, version=1)[0] == -errno.EINVAL
    assert caller.attributes(fd, HAS_ATTR)[0] == -errno.EPERM
    data = ctypes.create_string_buffer(12)
    for request, group, attribute, code in (
        (GET_ATTR, 1, 11, -errno.EINVAL),
        (SET_ATTR, 1, 11, 0),  # SET does not look at it
        (GET_ATTR, 2, 12, -errno.EINVAL),
        (SET_ATTR, 0, 12, -errno.EINVAL),
    ):
        raw = struct.pack("<IIQQ", 0, group, attribute, ctypes.addressof(data))
        argument = ctypes.create_string_buffer(raw, 24)
        assert caller.kvm.ioctl(fd, request, ctypes.addressof(argument)) == code


def test_whatever_is_no_request_about_attributes_is_a_command(callers):
    caller = callers().source
    fd = caller.stream()
    raw = ctypes.create_string_buffer(struct.pack("<IIQQQ", PAUSE, 0, 0, 0, 0), 32)
    # PAUSE without a session: the module refuses, so it did come that far.
    for request in (COMMAND, 0x1234, -1):
        assert caller.kvm.ioctl(fd, request, ctypes.addressof(raw)) == -errno.EIO
    for number in (0, 8, 22, 23, 1 << 31):
        assert caller.call(fd, number) == -errno.EINVAL


def test_a_command_before_the_attributes_is_refused(callers):
    caller = callers().source
    fd = caller.kvm.create_device(11, False)
    for number in range(9, 22):
        assert caller.call(fd, number) == -errno.EINVAL


def test_the_pre_migration_is_done_when_the_key_is_there(callers):
    kvm = callers().source.kvm

    def info(number, *values):
        data = ctypes.create_string_buffer(struct.pack("<BBHI", *values), 8)
        raw = struct.pack("<IIQQQ", number, 0, ctypes.addressof(data), 0, 0)
        command = ctypes.create_string_buffer(raw, 32)
        return kvm.ioctl(kvm.vm_fd, COMMAND, ctypes.addressof(command)), data.raw[1]

    assert info(8, 0, 0, 0, 0) == (0, 1)
    assert info(8, 1, 0, 0, 0)[0] == -errno.EINVAL
    assert info(7, 0, 1, 0, 1234)[0] == 0
    assert info(7, 1, 1, 0, 1234)[0] == -errno.EINVAL
    assert info(1, 0, 0, 0, 0)[0] == -errno.EINVAL  # INIT_VM: there is one


def test_without_the_key_the_pre_migration_is_not_done(callers):
    ends = callers()
    ends.pair.new_destination(0)
    kvm = SoftKvm(ends.pair.destination_host, ends.pair.destination.td)
    data = ctypes.create_string_buffer(b"\0\7", 8)
    raw = struct.pack("<IIQQQ", 8, 0, ctypes.addressof(data), 0, 0)
    command = ctypes.create_string_buffer(raw, 32)
    assert kvm.ioctl(kvm.vm_fd, COMMAND, ctypes.addressof(command)) == 0
    assert data.raw == bytes(8)
    kvm.shut_down()


def test_without_memory_for_its_buffers_a_stream_is_refused(callers):
    caller = callers().source
    streams = [caller.stream(512) for _ in range(2)]
    fd = caller.kvm.create_device(11, False)
    assert caller.attributes(fd, SET_ATTR, 512)[0] == -errno.ENOMEM
    assert caller.kvm.close(streams.pop()) == 0
    assert caller.attributes(fd, SET_ATTR, 512)[0] == 0
    caller.ok(streams[0], EXPORT_IMMUTABLE)


def test_after_the_td_is_gone_every_command_is_eio_and_cleaning_up_works(callers):
    ends = callers()
    here, there = begin(ends)
    ends.pair.source.close()
    ends.pair.destination.close()
    for caller, fd in ((ends.source, here[0]), (ends.destination, there[0])):
        view = caller.view(fd, 0)
        assert {caller.call(fd, number, 1) for number in range(9, 22)} == {-errno.EIO}
        assert caller.call(caller.kvm.vm_fd, 8) == -errno.EIO
        assert clear_log(caller, 0, 0) == 0
        assert caller.attributes(fd, GET_ATTR)[0] == 0
        assert caller.kvm.munmap(ctypes.addressof(view), 4096) == 0
        assert caller.kvm.close(fd) == 0


# --- mappings ------------------------------------------------------------------------------------


def test_two_mappings_show_the_same_pages_and_the_module_works_on_them(callers):
    ends = callers()
    fd = ends.source.stream()
    first, second = ends.source.view(fd, 0), ends.source.view(fd, 0)
    whole = ends.source.view(fd, 0, 6)
    assert not any(whole)
    ends.source.ok(fd, EXPORT_IMMUTABLE)
    assert bytes(first) == bytes(second) == bytes(whole[:4096])
    size, _, _, kind = struct.unpack_from("<HHHB", first)
    assert (size, kind) == (48, 0)
    whole[4096 + 5] = 77
    assert ends.source.get(fd, 1, 8)[5] == 77


@pytest.mark.parametrize(
    ("length", "offset", "code"),
    [
        (0, 0, errno.EINVAL),
        (-1, 0, errno.EINVAL),
        (1 << 62, 0, errno.ENOMEM),
        ((1 << 64) - 1, 0, errno.ENOMEM),
        (4096, 1, errno.EINVAL),
        (4096, -4096, errno.EINVAL),
    ],
)
def test_impossible_mappings_are_refused(callers, length, offset, code):
    caller = callers().source
    fd = caller.stream()
    assert caller.kvm.mmap(fd, length, offset) == -code


def test_only_what_was_mapped_is_unmapped(callers):
    caller = callers().source
    fd = caller.stream()
    kvm, page = caller.kvm, 4096
    at = kvm.mmap(fd, 10 * page, 0)
    ours = ctypes.create_string_buffer(3 * page)
    inside = (ctypes.addressof(ours) + page) & -page
    for address, length in (
        (inside, page),
        (0, page),
        (at + 1, page),
        (at, 0),
        (at, -page),
        (at, 11 * page),
        (at - page, 2 * page),
        (1 << 63, page),
    ):
        assert kvm.munmap(address, length) == -errno.EINVAL
    assert kvm.munmap(at + 4 * page, 2 * page) == 0
    assert kvm.munmap(at + 4 * page, page) == -errno.EINVAL
    assert kvm.munmap(at, 4 * page) == 0
    assert kvm.munmap(at + 6 * page, 4 * page) == 0
    assert kvm.mmap(fd + 100, page, 0) == -errno.EBADF
    assert kvm.mmap(kvm.vm_fd, page, 0) == -errno.ENODEV


@pytest.mark.parametrize(("pages", "touched", "dies"), [(256, 3, True), (257, 3, False),
                                                        (5, 9, True), (5, 8, False)])  # fmt: skip
def test_a_page_that_the_stream_has_not_is_a_bus_error(pages, touched, dies):
    script = f"""
import ctypes, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from kvm_caller import Caller
from soft_pair import Pair
from tdxmig_model.backend.softkvm import SoftKvm
pair = Pair(4, streams=0)
caller = Caller(SoftKvm(pair.source_host, pair.source.td))
view = caller.view(caller.stream({pages}), 0, 600)
view[{touched} * 4096]
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == (-signal.SIGBUS if dies else 0)


def test_a_stream_lives_as_long_as_its_mappings(callers):
    """Index 0 is free again only when the last mapping of the first stream is gone."""
    ends = callers()
    caller = ends.source
    fd = caller.stream()
    view = caller.view(fd, 4)
    assert caller.kvm.close(fd) == 0
    assert caller.call(fd, PAUSE) == -errno.EBADF
    view[0] = 5
    second = caller.stream()
    assert ends.pair.source.observe()["num_migs"] == 3
    assert caller.kvm.munmap(ctypes.addressof(view), 4096) == 0
    third = caller.stream(5)
    assert second != third
    assert ends.pair.source.observe()["num_migs"] == 3  # an index that there was before


def test_the_buffers_of_a_new_stream_are_empty(callers):
    caller = callers().source
    first = caller.stream(512)
    for page, count in ((0, 4), (4, 512)):
        caller.put(first, page, b"\x5a" * 4096 * count)
    assert caller.kvm.close(first) == 0
    second = caller.stream(300)
    assert not any(caller.get(second, 0, 4096 * 304))


def test_a_wide_stream_does_not_take_the_place_of_a_narrow_one(callers):
    caller = callers().source
    narrow, neighbour = caller.stream(5), caller.stream(5)
    assert caller.kvm.close(narrow) == 0
    wide = caller.stream(512)
    caller.put(wide, 4, b"\x5a" * 4096 * 512)
    assert not any(caller.get(neighbour, 0, 3 * 4096))
    assert not any(caller.get(neighbour, 4, 5 * 4096))


# --- addresses -----------------------------------------------------------------------------------


def unusable_addresses():
    """Not mapped, beyond the user's half, and mapped for reading alone."""
    code = ctypes.cast(ctypes.pythonapi.Py_GetVersion, ctypes.c_void_p).value
    return [0, 8, 0xFFFF_8000_0000_0000, (1 << 64) - 4, -8, 1 << 80, code]


def test_bad_addresses_are_faults(callers):
    ends = callers()
    here, there = begin(ends)
    *nowhere, read_only = unusable_addresses()
    for address in nowhere:
        for request in (COMMAND, SET_ATTR, GET_ATTR):
            assert ends.source.kvm.ioctl(here[0], request, address) == -errno.EFAULT
        for request in (COMMAND, CREATE, GET_LOG, CLEAR_LOG):
            kvm = ends.source.kvm
            assert kvm.ioctl(kvm.vm_fd, request, address) == -errno.EFAULT
        for number in (EXPORT_MEM, EXPORT_TRACK, ABORT):
            data = address & (1 << 64) - 1
            assert ends.source.call(here[0], number, None, data) == -errno.EFAULT
        for number in (IMPORT_IMMUTABLE, IMPORT_MEM, IMPORT_VP):
            data = address & (1 << 64) - 1
            assert ends.destination.call(there[0], number, None, data) == -errno.EFAULT
    ends.source.ok(here[0], PAUSE, None)
    # What the driver writes back it writes when the module is done.
    assert ends.source.call(here[0], EXPORT_VP, None, read_only) == -errno.EFAULT
    assert ends.source.call(here[0], EXPORT_VP, 0) == -errno.EINVAL


def test_a_structure_that_ends_on_no_page_is_a_fault(callers):
    caller = callers().source
    fd = caller.stream()
    at = caller.kvm.mmap(fd, 2 * 4096, 4 * 4096)
    assert caller.kvm.munmap(at + 4096, 4096) == 0
    for length in (1, 8, 23):
        assert caller.kvm.ioctl(fd, COMMAND, at + 4096 - length) == -errno.EFAULT
    # The same bytes where all of them are there: id 0, which no stream has.
    assert caller.kvm.ioctl(fd, COMMAND, at + 4096 - 32) == -errno.EINVAL


@pytest.mark.parametrize("seed", range(4))
def test_garbage_never_crashes(callers, seed):
    """Random requests, structures, lengths and counts: an answer each time, and it still works."""
    ends = callers()
    dice = np.random.default_rng(seed)
    here, there = begin(ends)
    numbers = [0, 1, 255, 256, 511, 512, 513, 1 << 31, (1 << 63) - 1, (1 << 64) - 1]
    for caller, fd in ((ends.source, here[0]), (ends.destination, there[0])):
        for page in (0, 1, 2):
            caller.put(fd, page, dice.bytes(4096))
        for _ in range(150):
            number = int(dice.integers(0, 24))
            value = numbers[dice.integers(len(numbers))]
            kind = dice.integers(4)
            if kind == 0:
                answer = caller.call(fd, number, value)
            elif kind == 1:
                answer = caller.call(fd, number, None, int(dice.integers(0, 1 << 63)))
            elif kind == 2:
                raw = ctypes.create_string_buffer(dice.bytes(64), 64)
                request = int(dice.integers(0, 1 << 32))
                answer = caller.kvm.ioctl(fd, request, ctypes.addressof(raw))
            else:
                answer = caller.kvm.munmap(int(dice.integers(0, 1 << 40)) << 12, value)
            assert -200 < answer <= 0
    fresh = callers()
    begin(fresh)


def test_streams_are_used_by_threads_at_once(callers):
    ends = callers(pages=64)
    here, _ = begin(ends, 2)
    gpas, problems = gpas_of(ends), []
    words = [Caller(ends.source.kvm), Caller(ends.source.kvm)]

    def export(number):
        try:
            for at in range(32 * number, 32 * number + 32, 4):
                batch = [gpa | MIGRATE for gpa in gpas[at : at + 4]]
                assert words[number].export(here[number], batch) == 0
                assert not any(e >> 56 & 31 for e in words[number].entries(here[number], 4))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=export, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert ends.pair.source.observe()["mig_count"] == 64


def test_nothing_stays_open(callers):
    ends = callers()
    before = len(os.listdir("/proc/self/fd"))
    maps = Path("/proc/self/maps").read_text().count("kvm-tdx-mig")
    fds = [ends.source.stream(5) for _ in range(3)]
    kept = ends.source.view(fds[0], 0, 600)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    assert Path("/proc/self/maps").read_text().count("kvm-tdx-mig") > maps
    ends.close()
    ends.close()
    del kept
    assert Path("/proc/self/maps").read_text().count("kvm-tdx-mig") == maps
    assert len(os.listdir("/proc/self/fd")) == before - 2  # both VM descriptors too


def test_an_unknown_dialect_is_told():
    pair = Pair(4, streams=0)
    with pytest.raises(UsageError, match="known: Gen-1a, Gen-1b"):
        SoftKvm(pair.source_host, pair.source.td, "Gen-2")
