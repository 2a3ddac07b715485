"""KVM as this host offers it: what can be asked without starting a trust domain (TD).

``probe`` asks KVM for the stream device of both dialects with the test flag, on a virtual machine
that is thrown away at once, and reads what the processor and the kernel say about TDX.  Nothing is
changed on the host.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tdxmig_model.backend.kvm.abi import (
    CREATE_DEVICE,
    KVM_API_VERSION,
    KVM_CAP_DEVICE_CTRL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_VM_TYPES,
    KVM_CHECK_EXTENSION,
    KVM_CREATE_DEVICE,
    KVM_CREATE_DEVICE_TEST,
    KVM_CREATE_VM,
    KVM_DEVICE_PATH,
    KVM_GET_API_VERSION,
    KVM_X86_DEFAULT_VM,
    STREAM_DEVICE_TYPES,
    TDX_VM_TYPE_MAINLINE,
    TDX_VM_TYPES_OUT_OF_TREE,
)


class Kernel(Protocol):
    """The system calls the probe makes; every failure is an OSError with its errno."""

    def open(self, path: str) -> int: ...

    def ioctl(self, descriptor: int, request: int, argument: int | bytearray) -> int: ...

    def close(self, descriptor: int) -> None: ...


class LinuxKernel:
    """The kernel of this host."""

    def open(self, path: str) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, descriptor: int, request: int, argument: int | bytearray) -> int:
        import fcntl

        # With a bytearray the answer is the return value and the buffer is changed in place.
        return int(fcntl.ioctl(descriptor, request, argument))

    def close(self, descriptor: int) -> None:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer: ``status`` is ok, missing or unknown; ``detail`` says what was seen."""

    name: str
    status: str
    detail: str


def probe(kernel: Kernel | None = None, root: Path = Path("/")) -> list[Finding]:
    """Everything this host says about TDX live migration, in a fixed order.

    ``root`` is the folder that holds ``proc`` and ``sys``.  Works without privileges: what may not
    be asked is unknown, never an exception.
    """
    return [
        *_processor(root),
        _kvm_intel_parameter(root),
        _tdx_module(root),
        *_kvm_device(LinuxKernel() if kernel is None else kernel),
    ]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _processor(root: Path) -> list[Finding]:
    """The flags that Linux shows for a TDX host (tdx_host_platform) and inside a TD (tdx_guest)."""
    text = _read(root / "proc/cpuinfo")
    lines = [line for line in (text or "").splitlines() if line.split(":")[0].strip() == "flags"]
    if not lines:
        seen = "/proc/cpuinfo cannot be read" if text is None else "/proc/cpuinfo has no flags"
        return [Finding(name, "unknown", seen) for name in ("cpu-tdx-host", "cpu-tdx-guest")]
    flags = set(lines[0].split(":", 1)[1].split())
    return [
        _flag("cpu-tdx-host", "tdx_host_platform", flags),
        _flag("cpu-tdx-guest", "tdx_guest", flags),
    ]


def _flag(name: str, flag: str, flags: set[str]) -> Finding:
    if flag in flags:
        return Finding(name, "ok", f"processor flag {flag}")
    return Finding(name, "missing", f"no processor flag {flag}")


def _kvm_intel_parameter(root: Path) -> Finding:
    name, path = "kvm-intel-tdx", "/sys/module/kvm_intel/parameters/tdx"
    value = _read(root / path.lstrip("/"))
    if value is not None:
        on = value in {"Y", "y", "1"}
        return Finding(name, "ok" if on else "missing", f"{path} is {value or 'empty'}")
    if (root / path.lstrip("/")).exists():
        return Finding(name, "unknown", f"{path} cannot be read")
    if (root / "sys/module/kvm_intel").is_dir():
        return Finding(name, "missing", "kvm_intel has no parameter tdx: a kernel without TDX")
    return Finding(name, "missing", "the kernel module kvm_intel is not loaded")


def _tdx_module(root: Path) -> Finding:
    """Out-of-tree kernels describe the TDX module in sysfs; mainline only in the kernel log."""
    name, folder = "tdx-module", root / "sys/firmware/tdx"
    if not folder.is_dir():
        return Finding(name, "unknown", "no /sys/firmware/tdx; mainline kernels have none")
    described = folder / "tdx_module"
    names = ("status", "major_version", "minor_version", "build_num")
    values = {key: _read(described / key) for key in names}
    seen = ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
    status = values["status"]
    if status is None:
        return Finding(name, "unknown", seen or "/sys/firmware/tdx tells no module status")
    return Finding(name, "ok" if status in {"initialized", "loaded"} else "missing", seen)


def _why(error: OSError) -> str:
    code = errno.errorcode.get(error.errno or 0, str(error.errno))
    return f"{code}: {os.strerror(error.errno)}" if error.errno else str(error)


_KVM_QUESTIONS = (
    "kvm-api",
    "kvm-device-ctrl",
    "kvm-dirty-log",
    "kvm-vm-types",
    *(f"stream-device-{dialect.lower()}" for dialect in STREAM_DEVICE_TYPES),
)


def _kvm_device(kernel: Kernel) -> list[Finding]:
    try:
        kvm = kernel.open(KVM_DEVICE_PATH)
    except OSError as error:
        # A device that is there but may not be opened is not a missing one.
        absent = error.errno in {errno.ENOENT, errno.ENODEV, errno.ENXIO}
        status, detail = ("missing" if absent else "unknown"), _why(error)
        return [
            Finding("kvm", status, f"{KVM_DEVICE_PATH}: {detail}"),
            *(Finding(name, status, f"{KVM_DEVICE_PATH} is not open") for name in _KVM_QUESTIONS),
        ]
    try:
        return [
            Finding("kvm", "ok", f"{KVM_DEVICE_PATH} is open"),
            _asked("kvm-api", lambda: _api_version(kernel, kvm)),
            _asked("kvm-device-ctrl", lambda: _device_control(kernel, kvm)),
            _asked("kvm-dirty-log", lambda: _dirty_log(kernel, kvm)),
            _asked("kvm-vm-types", lambda: _vm_types(kernel, kvm)),
            *_stream_devices(kernel, kvm),
        ]
    finally:
        kernel.close(kvm)


def _asked(name: str, question: Callable[[], tuple[str, str]]) -> Finding:
    try:
        return Finding(name, *question())
    except OSError as error:
        return Finding(name, "unknown", _why(error))


def _api_version(kernel: Kernel, kvm: int) -> tuple[str, str]:
    version = kernel.ioctl(kvm, KVM_GET_API_VERSION, 0)
    status = "ok" if version == KVM_API_VERSION else "missing"
    return status, f"KVM_GET_API_VERSION = {version}, needed {KVM_API_VERSION}"


def _device_control(kernel: Kernel, kvm: int) -> tuple[str, str]:
    answer = kernel.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_DEVICE_CTRL)
    return ("ok" if answer > 0 else "missing"), f"KVM_CAP_DEVICE_CTRL = {answer}"


def _dirty_log(kernel: Kernel, kvm: int) -> tuple[str, str]:
    answer = kernel.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
    return ("ok" if answer > 0 else "missing"), f"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = {answer}"


def _vm_types(kernel: Kernel, kvm: int) -> tuple[str, str]:
    mask = kernel.ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES)
    detail = f"KVM_CAP_VM_TYPES = 0x{mask:x}"
    if mask & 1 << TDX_VM_TYPE_MAINLINE:
        return "ok", f"{detail}, with the TDX type of mainline ({TDX_VM_TYPE_MAINLINE})"
    maybe = [
        f"{number} (TDX in {dialect}, another type in mainline)"
        for number, dialect in TDX_VM_TYPES_OUT_OF_TREE.items()
        if mask & 1 << number
    ]
    if maybe:
        return "unknown", f"{detail}: type {' and '.join(maybe)}"
    return "missing", f"{detail}, no TDX type"


@contextmanager
def _throw_away_vm(kernel: Kernel, kvm: int) -> Iterator[int]:
    machine = kernel.ioctl(kvm, KVM_CREATE_VM, KVM_X86_DEFAULT_VM)
    try:
        yield machine
    finally:
        kernel.close(machine)


def _stream_devices(kernel: Kernel, kvm: int) -> list[Finding]:
    names = {dialect: f"stream-device-{dialect.lower()}" for dialect in STREAM_DEVICE_TYPES}
    try:
        with _throw_away_vm(kernel, kvm) as machine:
            return [
                _stream_device(kernel, machine, name, STREAM_DEVICE_TYPES[dialect])
                for dialect, name in names.items()
            ]
    except OSError as error:
        detail = f"no virtual machine to ask: {_why(error)}"
        return [Finding(name, "unknown", detail) for name in names.values()]


def _stream_device(kernel: Kernel, machine: int, name: str, device_type: int) -> Finding:
    """Ask with the test flag: the kernel creates nothing and answers ENODEV for an unknown type."""
    argument = bytearray(CREATE_DEVICE.pack(device_type, 0, KVM_CREATE_DEVICE_TEST))
    try:
        kernel.ioctl(machine, KVM_CREATE_DEVICE, argument)
    except OSError as error:
        status = "missing" if error.errno == errno.ENODEV else "unknown"
        return Finding(name, status, f"device type {device_type}: {_why(error)}")
    return Finding(name, "ok", f"device type {device_type} is registered")
