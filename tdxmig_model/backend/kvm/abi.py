"""Numbers and layouts of KVM's interface to a TDX migration stream device.

Live migration of TDs is not in mainline Linux.  Two out-of-tree dialects have a stream device:
Gen-1a (kernel 6.2 and the QEMU of the same time) and Gen-1b (kernel 6.6).  They differ in the
number of the device type, in the size of a command, and in what EXPORT_ABORT takes.  Everything
is little-endian; numbers are facts of the kernel headers of those trees, and those of the generic
calls of mainline Linux.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tdxmig_model.errors import UsageError

KVM_DEVICE_PATH = "/dev/kvm"
KVM_MAGIC = 0xAE
KVM_API_VERSION = 12

DIRECTION_NONE, DIRECTION_WRITE, DIRECTION_READ = 0, 1, 2


def ioctl_number(direction: int, number: int, size: int) -> int:
    """The ioctl request of KVM command ``number`` with an argument of ``size`` bytes.

    Linux encoding: direction at bit 30, size at bit 16 (14 bits), magic at bit 8, number at bit 0.
    """
    if not (0 <= direction < 4 and 0 <= number < 0x100 and 0 <= size < 0x4000):
        raise ValueError(f"no ioctl number for {direction=}, {number=}, {size=}")
    return direction << 30 | size << 16 | KVM_MAGIC << 8 | number


# struct kvm_create_device: type, fd (out), flags.
CREATE_DEVICE = struct.Struct("=III")
# struct kvm_device_attr: flags, group, attr, addr.
DEVICE_ATTR = struct.Struct("=IIQQ")
# struct kvm_dirty_log: slot, padding, address of the bitmap.
DIRTY_LOG = struct.Struct("=IIQ")
# struct kvm_clear_dirty_log: slot, number of pages, first page, address of the bitmap.
CLEAR_DIRTY_LOG = struct.Struct("=IIQQ")
# struct kvm_dev_tdx_mig_attr: version, buf_list_pages, max_migs.
STREAM_ATTR = struct.Struct("=III")
# struct kvm_tdx_get_migration_info: version, premig_done (out).
GET_MIGRATION_INFO = struct.Struct("=BB6x")
# struct kvm_tdx_set_migration_info: version, is_src, vsock_port.
SET_MIGRATION_INFO = struct.Struct("=BB2xI")

KVM_GET_API_VERSION = ioctl_number(DIRECTION_NONE, 0x00, 0)
KVM_CREATE_VM = ioctl_number(DIRECTION_NONE, 0x01, 0)
KVM_CHECK_EXTENSION = ioctl_number(DIRECTION_NONE, 0x03, 0)
KVM_GET_DIRTY_LOG = ioctl_number(DIRECTION_WRITE, 0x42, DIRTY_LOG.size)
# The size encoded here is that of an unsigned long; the argument points to struct kvm_tdx_cmd.
KVM_MEMORY_ENCRYPT_OP = ioctl_number(DIRECTION_READ | DIRECTION_WRITE, 0xBA, 8)
KVM_CLEAR_DIRTY_LOG = ioctl_number(DIRECTION_READ | DIRECTION_WRITE, 0xC0, CLEAR_DIRTY_LOG.size)
KVM_CREATE_DEVICE = ioctl_number(DIRECTION_READ | DIRECTION_WRITE, 0xE0, CREATE_DEVICE.size)
KVM_SET_DEVICE_ATTR = ioctl_number(DIRECTION_WRITE, 0xE1, DEVICE_ATTR.size)
KVM_GET_DEVICE_ATTR = ioctl_number(DIRECTION_WRITE, 0xE2, DEVICE_ATTR.size)
KVM_HAS_DEVICE_ATTR = ioctl_number(DIRECTION_WRITE, 0xE3, DEVICE_ATTR.size)

KVM_CREATE_DEVICE_TEST = 1 << 0
KVM_CAP_DEVICE_CTRL = 89
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
# Mainline number.  The trees of both stream-device dialects moved it about, so its answer there
# is a hint at most.
KVM_CAP_VM_TYPES = 235

KVM_X86_DEFAULT_VM = 0
# KVM_X86_TDX_VM: 1 in kernel 6.2 trees and 2 in 6.6 trees; in mainline these are other types.
TDX_VM_TYPE_MAINLINE = 5
TDX_VM_TYPES_OUT_OF_TREE = {1: "Gen-1a", 2: "Gen-1b"}

# KVM_DEV_TYPE_TDX_MIG_STREAM by dialect: another architecture took the first one in between.
STREAM_DEVICE_TYPES = {"Gen-1a": 11, "Gen-1b": 12}
STREAM_ATTR_GROUP = 1
STREAM_ATTR_VERSION = 0
MAX_BUFFER_PAGES = 512
DIRTY_LOG_ALIGNMENT = 64
"""KVM_CLEAR_DIRTY_LOG takes pages from a multiple of this on."""

MBMD_OFFSET: Final = 0
GPA_LIST_OFFSET: Final = 1
MAC_LIST_OFFSET: Final = 2
BUFFERS_OFFSET: Final = 4
"""Where the parts of a stream are mapped, in pages of 4096 bytes."""
MACS_PER_PAGE: Final = 256

IN_ORDER_DONE: Final = 1 << 63
"""What EXPORT_TRACK takes for the start token; the driver looks for any value but 0."""


class TdxCommand(IntEnum):
    """``id`` of struct kvm_tdx_cmd.  Up to GET_MIGRATION_INFO for the VM, the rest for streams."""

    CAPABILITIES = 0
    INIT_VM = 1
    INIT_VCPU = 2
    INIT_MEM_REGION = 3
    FINALIZE_VM = 4
    SERVTD_PREBIND = 5
    SERVTD_BIND = 6
    SET_MIGRATION_INFO = 7
    GET_MIGRATION_INFO = 8
    MIG_EXPORT_STATE_IMMUTABLE = 9
    MIG_IMPORT_STATE_IMMUTABLE = 10
    MIG_EXPORT_MEM = 11
    MIG_IMPORT_MEM = 12
    MIG_EXPORT_TRACK = 13
    MIG_IMPORT_TRACK = 14
    MIG_EXPORT_PAUSE = 15
    MIG_EXPORT_STATE_TD = 16
    MIG_IMPORT_STATE_TD = 17
    MIG_EXPORT_STATE_VP = 18
    MIG_IMPORT_STATE_VP = 19
    MIG_EXPORT_ABORT = 20
    MIG_IMPORT_END = 21


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs between the two generations of the interface.

    ``command`` is struct kvm_tdx_cmd: id, flags, data, error and, in the older header, a word that
    is not used.  ``abort_takes_end`` says that EXPORT_ABORT takes the address of the first gfn
    that is not restored.
    """

    name: str
    device_type: int
    command: struct.Struct
    abort_takes_end: bool

    def pack(self, command: TdxCommand, data: int) -> bytes:
        """A struct kvm_tdx_cmd without flags."""
        return self.command.pack(command, 0, data, 0)

    def unpack(self, raw: bytes) -> tuple[int, int, int]:
        """``id``, ``data`` and ``error`` of a struct kvm_tdx_cmd."""
        number, _, data, error = self.command.unpack(raw)
        return number, data, error


GEN_1A = Dialect("Gen-1a", STREAM_DEVICE_TYPES["Gen-1a"], struct.Struct("=IIQQ8x"), True)
GEN_1B = Dialect("Gen-1b", STREAM_DEVICE_TYPES["Gen-1b"], struct.Struct("=IIQQ"), False)
DIALECTS: Final = {dialect.name: dialect for dialect in (GEN_1A, GEN_1B)}


def dialect_named(name: str) -> Dialect:
    """The dialect of that name, in any case.  UsageError names those that there are."""
    for dialect in DIALECTS.values():
        if dialect.name.casefold() == name.casefold():
            return dialect
    raise UsageError(f"unknown KVM dialect {name!r}; known: {', '.join(DIALECTS)}")
