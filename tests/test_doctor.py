"""Does doctor tell what the host offers, on this host and on the ones we cannot have here?"""

from __future__ import annotations

import errno
import os
import struct
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from tdxmig_model.backend.kvm import abi
from tdxmig_model.backend.kvm import probe as kvm
from tdxmig_model.cli import doctor

REPOSITORY = Path(__file__).resolve().parent.parent

TDX_HOST = "processor\t: 0\nflags\t\t: fpu vmx tdx_host_platform avx512f\n"
TDX_GUEST = "processor\t: 0\nflags\t\t: fpu tdx_guest\n"


class AnsweringKernel:
    """Answers as a kernel would whose KVM has these devices; counts what is left open."""

    def __init__(
        self,
        device_types: frozenset[int] = frozenset(),
        vm_types: int = 1,
        refuse: Mapping[int | str, int] | None = None,
    ) -> None:
        self.device_types = device_types
        self.vm_types = vm_types
        self.refuse = dict(refuse or {})
        self.opened: set[int] = set()
        self.created: list[tuple[int, int]] = []

    def _maybe_refuse(self, what: int | str) -> None:
        if what in self.refuse:
            code = self.refuse[what]
            raise OSError(code, os.strerror(code))

    def _new_descriptor(self) -> int:
        descriptor = 100 + len(self.opened)
        self.opened.add(descriptor)
        return descriptor

    def open(self, path: str) -> int:
        assert path == "/dev/kvm"
        self._maybe_refuse(path)
        return self._new_descriptor()

    def ioctl(self, descriptor: int, request: int, argument: int | bytearray) -> int:
        assert descriptor in self.opened
        self._maybe_refuse(request)
        if request == abi.KVM_GET_API_VERSION:
            return 12
        if request == abi.KVM_CHECK_EXTENSION:
            assert isinstance(argument, int)
            return {
                abi.KVM_CAP_DEVICE_CTRL: 1,
                abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 3,
                abi.KVM_CAP_VM_TYPES: self.vm_types,
            }[argument]
        if request == abi.KVM_CREATE_VM:
            return self._new_descriptor()
        assert request == abi.KVM_CREATE_DEVICE
        device_type, _, flags = struct.unpack("=III", argument)  # type: ignore[arg-type]
        self.created.append((device_type, flags))
        if device_type not in self.device_types:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return 0

    def close(self, descriptor: int) -> None:
        self.opened.remove(descriptor)


def host(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def statuses(kernel: kvm.Kernel, root: Path) -> dict[str, str]:
    return {finding.name: finding.status for finding in kvm.probe(kernel, root)}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("KVM_GET_API_VERSION", 0x0000AE00),
        ("KVM_CREATE_VM", 0x0000AE01),
        ("KVM_CHECK_EXTENSION", 0x0000AE03),
        ("KVM_MEMORY_ENCRYPT_OP", 0xC008AEBA),
        ("KVM_CREATE_DEVICE", 0xC00CAEE0),
        ("KVM_SET_DEVICE_ATTR", 0x4018AEE1),
        ("KVM_GET_DEVICE_ATTR", 0x4018AEE2),
        ("KVM_HAS_DEVICE_ATTR", 0x4018AEE3),
    ],
)
def test_computed_ioctl_numbers_are_the_documented_ones(name: str, number: int) -> None:
    assert getattr(abi, name) == number


def test_ioctl_numbers_are_bounded() -> None:
    for direction, number, size in [(4, 0, 0), (0, 0x100, 0), (0, 0, 0x4000), (-1, 0, 0)]:
        with pytest.raises(ValueError, match="no ioctl number"):
            abi.ioctl_number(direction, number, size)


@pytest.mark.parametrize(
    ("device_types", "gen_1a", "gen_1b"),
    [((), "missing", "missing"), ((11,), "ok", "missing"), ((12,), "missing", "ok")],
)
def test_each_dialect_is_recognised_by_its_device_type(
    tmp_path: Path, device_types: tuple[int, ...], gen_1a: str, gen_1b: str
) -> None:
    kernel = AnsweringKernel(frozenset(device_types))
    found = statuses(kernel, tmp_path)
    assert found["stream-device-gen-1a"] == gen_1a
    assert found["stream-device-gen-1b"] == gen_1b
    assert kernel.created == [(11, 1), (12, 1)], "only ever with the test flag"
    assert kernel.opened == set()


@pytest.mark.parametrize(
    ("mask", "status", "text"),
    [
        (0x1, "missing", "no TDX type"),
        (0x23, "ok", "TDX type of mainline"),
        (0x3, "unknown", "1 (TDX in Gen-1a"),
        (0x5, "unknown", "2 (TDX in Gen-1b"),
    ],
)
def test_machine_types_are_read_with_the_doubt_between_trees(
    tmp_path: Path, mask: int, status: str, text: str
) -> None:
    findings = {f.name: f for f in kvm.probe(AnsweringKernel(vm_types=mask), tmp_path)}
    assert findings["kvm-vm-types"].status == status
    assert text in findings["kvm-vm-types"].detail


@pytest.mark.parametrize(
    ("code", "status"),
    [(errno.ENOENT, "missing"), (errno.EACCES, "unknown"), (errno.EPERM, "unknown")],
)
def test_a_device_that_may_not_be_opened_is_not_called_missing(
    tmp_path: Path, code: int, status: str
) -> None:
    kernel = AnsweringKernel(refuse={"/dev/kvm": code})
    findings = {f.name: f for f in kvm.probe(kernel, tmp_path)}
    assert errno.errorcode[code] in findings["kvm"].detail
    for name in (
        "kvm",
        "kvm-api",
        "kvm-dirty-log",
        "kvm-vm-types",
        "stream-device-gen-1a",
        "stream-device-gen-1b",
    ):
        assert findings[name].status == status


@pytest.mark.parametrize(
    ("request_number", "unknown"),
    [
        (abi.KVM_GET_API_VERSION, {"kvm-api"}),
        (abi.KVM_CHECK_EXTENSION, {"kvm-device-ctrl", "kvm-dirty-log", "kvm-vm-types"}),
        (abi.KVM_CREATE_VM, {"stream-device-gen-1a", "stream-device-gen-1b"}),
        (abi.KVM_CREATE_DEVICE, {"stream-device-gen-1a", "stream-device-gen-1b"}),
    ],
)
def test_a_question_that_fails_is_unknown_and_nothing_stays_open(
    tmp_path: Path, request_number: int, unknown: set[str]
) -> None:
    kernel = AnsweringKernel(refuse={request_number: errno.EPERM})
    found = statuses(kernel, tmp_path)
    asked = {name for name in found if name.startswith(("kvm-", "stream-"))} - {"kvm-intel-tdx"}
    assert {name for name in asked if found[name] == "unknown"} == unknown
    assert kernel.opened == set()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ("unknown", "unknown", "missing", "unknown")),
        ({"proc/cpuinfo": TDX_GUEST}, ("missing", "ok", "missing", "unknown")),
        (
            {"proc/cpuinfo": TDX_HOST, "sys/module/kvm_intel/parameters/tdx": "Y\n"},
            ("ok", "missing", "ok", "unknown"),
        ),
        (
            {
                "proc/cpuinfo": TDX_HOST,
                "sys/module/kvm_intel/parameters/tdx": "N\n",
                "sys/firmware/tdx/tdx_module/status": "initialized\n",
                "sys/firmware/tdx/tdx_module/major_version": "1\n",
            },
            ("ok", "missing", "missing", "ok"),
        ),
        (
            {"proc/cpuinfo": "model name : x\n", "sys/firmware/tdx/tdx_module/status": "none\n"},
            ("unknown", "unknown", "missing", "missing"),
        ),
    ],
)
def test_what_the_host_says_about_tdx(
    tmp_path: Path, files: Mapping[str, str], expected: tuple[str, ...]
) -> None:
    found = statuses(AnsweringKernel(), host(tmp_path, files))
    names = ("cpu-tdx-host", "cpu-tdx-guest", "kvm-intel-tdx", "tdx-module")
    assert tuple(found[name] for name in names) == expected


def test_this_host_is_probed_without_an_error_and_without_a_leak() -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    findings = kvm.probe()
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    assert after == before
    assert [finding.name for finding in findings] == list(doctor.HARDWARE)
    assert {finding.status for finding in findings} <= {"ok", "missing", "unknown"}
    assert all(finding.detail for finding in findings)


def test_absent_hardware_is_no_failure_and_an_absent_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = AnsweringKernel(refuse={"/dev/kvm": errno.ENOENT})
    assert doctor.usable(doctor.checks(kernel, tmp_path))
    monkeypatch.setitem(doctor.PACKAGES, "tdxmig_absent", ("tdxmig-absent", "this test", True))
    results = doctor.checks(kernel, tmp_path)
    absent = next(check for check in results if check.name == "package-tdxmig-absent")
    assert (absent.status, absent.action) == ("missing", "pip install tdxmig-absent")
    assert not doctor.usable(results)


def test_every_check_says_what_it_is_for_and_what_to_do(tmp_path: Path) -> None:
    results = doctor.checks(AnsweringKernel(), tmp_path)
    assert len({check.name for check in results}) == len(results)
    assert all(check.needed_for and check.action and check.detail for check in results)


def test_the_checked_packages_are_the_declared_dependencies() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {text.split(">")[0].split("<")[0].strip() for text in project["dependencies"]}
    assert {distribution for distribution, _, _ in doctor.PACKAGES.values()} == declared
    oldest = ".".join(map(str, doctor.OLDEST_PYTHON))
    assert project["requires-python"] == f">={oldest}"
