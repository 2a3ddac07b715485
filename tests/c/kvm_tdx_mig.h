/* SPDX-License-Identifier: Apache-2.0
 *
 * KVM's out-of-tree interface to TDX live migration, written down from its numbers and layouts
 * (specs/kvm_abi.toml).  Dialect Gen-1a, or Gen-1b with -DTDX_GEN_1B.
 */
#ifndef KVM_TDX_MIG_H
#define KVM_TDX_MIG_H

#include <stdint.h>

#define KVM_MEMORY_ENCRYPT_OP 0xC008AEBAul
#define KVM_SET_DEVICE_ATTR 0x4018AEE1ul
#define KVM_GET_DEVICE_ATTR 0x4018AEE2ul

#ifdef TDX_GEN_1B
#define KVM_DEV_TYPE_TDX_MIG_STREAM 12
#else
#define KVM_DEV_TYPE_TDX_MIG_STREAM 11
#endif

#define KVM_DEV_TDX_MIG_ATTR 1

enum map_page { MAP_MBMD = 0, MAP_GPA_LIST = 1, MAP_MAC_LIST = 2, MAP_BUFFERS = 4 };

enum tdx_command {
    EXPORT_STATE_IMMUTABLE = 9,
    IMPORT_STATE_IMMUTABLE = 10,
    EXPORT_MEM = 11,
    IMPORT_MEM = 12,
    EXPORT_TRACK = 13,
    IMPORT_TRACK = 14,
    EXPORT_PAUSE = 15,
    EXPORT_STATE_TD = 16,
    IMPORT_STATE_TD = 17,
    EXPORT_STATE_VP = 18,
    IMPORT_STATE_VP = 19,
    EXPORT_ABORT = 20,
    IMPORT_END = 21
};

struct kvm_device_attr {
    uint32_t flags;
    uint32_t group;
    uint64_t attr;
    uint64_t addr;
};

struct kvm_dev_tdx_mig_attr {
    uint32_t version;
    uint32_t buf_list_pages;
    uint32_t max_migs;
};

struct kvm_tdx_cmd {
    uint32_t id;
    uint32_t flags;
    uint64_t data;
    uint64_t error;
#ifndef TDX_GEN_1B
    uint64_t unused;
#endif
};

#ifdef TDX_GEN_1B
_Static_assert(sizeof(struct kvm_tdx_cmd) == 24, "kvm_tdx_cmd");
#else
_Static_assert(sizeof(struct kvm_tdx_cmd) == 32, "kvm_tdx_cmd");
#endif
_Static_assert(sizeof(struct kvm_device_attr) == 24, "kvm_device_attr");
_Static_assert(sizeof(struct kvm_dev_tdx_mig_attr) == 12, "kvm_dev_tdx_mig_attr");

#endif
