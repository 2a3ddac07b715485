"""The metadata fields of migration state bundles: names, identifiers, sizes, migration classes.

Facts of the Intel TDX module, public source under the MIT licence, tag TDX_1.5.01: the tables
global_sys_fields_lookup.c, tdr_tdcs_fields_lookup.c, td_vmcs_fields_lookup.c and
tdvps_fields_lookup.c, and the leaf numbers of cpuid_configurations.c.

Carried here: every field that a state bundle of a TD without L2 virtual machines exports, that is,
all 11 SYS fields, the immutable and the mutable TD fields, and the vCPU fields (TD VMCS guest state
and controls, virtual APIC page, #VE information, general-purpose registers, debug registers, XBUFF,
MSRs, vCPU management, CPUID control); of CPUID values the 56 leaves that do not fault in the guest.
Not carried: fields that never travel (key material, counters, Secure EPT, host state) and the L2
VMCS and bitmaps, since migration of partitioned TDs is outside this project.

Field identifier (64 bits): 23:0 field code, 33:32 element size code (bytes are 1 << code), 37:34
LAST_ELEMENT_IN_FIELD, 46:38 LAST_FIELD_IN_SEQUENCE, 50 INC_SIZE (field codes step by two, as VMCS
encodings do), 51 WRITE_MASK_VALID, 54:52 CONTEXT_CODE (0 SYS, 1 TD, 2 VP), 61:56 CLASS_CODE, 63
NON_ARCH; 31:24, 49:47, 55 and 62 are reserved.

Migration classes.  Export: MB travels with immutable state, ME with mutable state.  Import: MB and
ME are required, CB is required and only checked, MBO, MEO and CBO are optional, IESME is required
and initialised before it is written, IES and IBS are computed by the importer, NONE is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

MAX_CPUID_VALUES: Final = 64
"""What NUM_CPUID_VALUES must hold: entries of the CPUID table of the TDX module 1.5.01."""

MAX_L2_VMS: Final = 3
"""Largest NUM_L2_VMS that an import accepts (TDX module 1.5.01)."""

NO_FIELD: Final = 0xFFFF_FFFF_FFFF_FFFF
"""The identifier that stands for "no field": past the last one, or not yet begun."""

CONTEXT_CODES: Final[Mapping[str, int]] = MappingProxyType(
    {"sys": 0, "immutable": 1, "td": 1, "vp": 2}
)
"""CONTEXT_CODE of each scope."""

REQUIRED_CLASSES: Final = frozenset({"MB", "CB", "ME", "IESME"})
WRITABLE_CLASSES: Final = REQUIRED_CLASSES | {"MBO", "MEO", "CBO"}


@dataclass(frozen=True, slots=True)
class Field:
    """One row of the field table: an array of `fields` fields of `elements` elements each.

    `migration_class` is the import class.  Masks have the width of one element; bits outside
    `import_mask` keep the importer's own value.
    """

    name: str
    identifier: int
    scope: str
    element_size_bytes: int
    elements: int
    fields: int
    export_class: str
    migration_class: str
    export_mask: int
    import_mask: int
    required: bool

    @property
    def code(self) -> int:
        """Field code of the first element."""
        return self.identifier & 0xFFFFFF

    @property
    def class_code(self) -> int:
        return self.identifier >> 56 & 0x3F

    @property
    def stride(self) -> int:
        """Difference of the field codes of neighbouring elements."""
        return 2 if self.identifier >> 50 & 1 else 1

    @property
    def size_mask(self) -> int:
        """All ones in one element."""
        return (1 << 8 * self.element_size_bytes) - 1

    @property
    def slots(self) -> int:
        """8-byte slots that the whole row takes in metadata lists."""
        return self.elements * self.fields

    @property
    def considered(self) -> bool:
        """Whether an import looks at the value at all (required or optional)."""
        return self.migration_class in WRITABLE_CLASSES


@dataclass(frozen=True, slots=True)
class Item:
    """One field of a row, the unit that metadata lists carry and never split over pages."""

    field: Field
    index: int
    identifier: int
    """Identifier of the item's first element, in the form of the field table."""
    key: int
    """Context code, class code and field code alone: what identifiers are compared by."""
    adjacent: int
    """`key` of the item that can follow in the same sequence."""


def identifier_key(identifier: int) -> int:
    """The bits by which the module compares two identifiers: context, class and field code."""
    return identifier & 0x3F70_0000_00FF_FFFF


def cpuid_identifier(leaf: int, subleaf: int | None) -> int:
    """Identifier of the two-element CPUID_VALUES field of a leaf; `subleaf` None means it has none.

    Field code: 0 element, 7:1 sub-leaf, 8 no sub-leaf, 15:9 leaf, 16 bit 31 of the leaf.
    """
    no_subleaf = subleaf is None
    code = (0x7F if subleaf is None else subleaf) << 1 | no_subleaf << 8
    return 0x9410000300000000 | code | (leaf & 0x7F) << 9 | (leaf >> 31) << 16


def _field(
    scope: str,
    export_class: str,
    migration_class: str,
    name: str,
    identifier: int,
    *,
    elements: int = 1,
    fields: int = 1,
    export_mask: int | None = None,
    import_mask: int | None = None,
) -> Field:
    size = 1 << (identifier >> 32 & 3)
    full = (1 << 8 * size) - 1
    return Field(
        name=name,
        identifier=identifier,
        scope=scope,
        element_size_bytes=size,
        elements=elements,
        fields=fields,
        export_class=export_class,
        migration_class=migration_class,
        export_mask=full if export_mask is None else export_mask,
        import_mask=full if import_mask is None else import_mask,
        required=migration_class in REQUIRED_CLASSES,
    )


# fmt: off
_CPUID_LEAVES: Final = (
    (0x1, None), (0x4, 0x0), (0x4, 0x1), (0x4, 0x2), (0x4, 0x3), (0x7, 0x0), (0x7, 0x1),
    (0xA, None), (0x1C, None), (0x80000008, None), (0x0, None), (0x3, None), (0x4, 0x4),
    (0x7, 0x2), (0x8, None), (0xD, 0x0), (0xD, 0x1), (0xD, 0x2), (0xD, 0x3), (0xD, 0x4),
    (0xD, 0x5), (0xD, 0x6), (0xD, 0x7), (0xD, 0x8), (0xD, 0x9), (0xD, 0xA), (0xD, 0xB),
    (0xD, 0xC), (0xD, 0xD), (0xD, 0xE), (0xD, 0xF), (0xD, 0x10), (0xD, 0x11), (0xD, 0x12),
    (0xE, None), (0x11, None), (0x12, None), (0x13, None), (0x14, 0x0), (0x14, 0x1),
    (0x15, None), (0x19, None), (0x1D, 0x0), (0x1D, 0x1), (0x1E, None), (0x20, None),
    (0x21, 0x0), (0x80000000, None), (0x80000001, None), (0x80000007, None), (0x22, None),
    (0x23, 0x0), (0x23, 0x1), (0x23, 0x2), (0x23, 0x3), (0x5, None),
)
# fmt: on
"""(leaf, sub-leaf) of CPUID values in the module's own order, configurable ones first."""


def _cpuid_field(leaf: int, subleaf: int | None) -> Field:
    name = f"CPUID_{leaf:X}" if subleaf is None else f"CPUID_{leaf:X}_{subleaf:X}"
    return _field("immutable", "MB", "MBO", name, cpuid_identifier(leaf, subleaf), elements=2)


_ROWS: Final[tuple[Field, ...]] = (
    # Module version and platform: written by export, checked for structure, never compared.
    *(
        _field("sys", "MB", "CBO", name, identifier)
        for name, identifier in (
            ("VENDOR_ID", 0x0800000200000000),
            ("BUILD_DATE", 0x8800000200000001),
            ("BUILD_NUM", 0x8800000100000002),
            ("MINOR_VERSION", 0x0800000100000003),
            ("MAJOR_VERSION", 0x0800000100000004),
            ("UPDATE_VERSION", 0x0800000100000005),
            ("INTERNAL_VERSION", 0x0800000100000006),
            ("SYS_ATTRIBUTES", 0x0A00000200000000),
            ("NUM_TDX_FEATURES", 0x0A00000000000001),
            ("TDX_FEATURES0", 0x0A00000300000008),
        )
    ),
    _field("sys", "MB", "CBO", "PKG_FMS", 0x0000000200000001, fields=8),
    # TD identity, execution controls, measurements, virtual MSRs, counts.
    *(
        _field("immutable", "MB", "MB", name, identifier)
        for name, identifier in (
            ("NUM_VCPUS", 0x9010000200000001),
            ("NUM_L2_VMS", 0x9010000100000005),
            ("ATTRIBUTES", 0x1110000300000000),
            ("XFAM", 0x1110000300000001),
            ("MAX_VCPUS", 0x1110000200000002),
            ("GPAW", 0x1110000000000003),
            ("TSC_FREQUENCY", 0x111000010000000C),
            ("VIRTUAL_IA32_ARCH_CAPABILITIES", 0x961000030000010A),
            ("VIRTUAL_IA32_VMX_BASIC", 0x9610000300000480),
            ("VIRTUAL_IA32_VMX_MISC", 0x9610000300000485),
            ("VIRTUAL_IA32_VMX_CR0_FIXED0", 0x9610000300000486),
            ("VIRTUAL_IA32_VMX_CR0_FIXED1", 0x9610000300000487),
            ("VIRTUAL_IA32_VMX_CR4_FIXED0", 0x9610000300000488),
            ("VIRTUAL_IA32_VMX_CR4_FIXED1", 0x9610000300000489),
            ("VIRTUAL_IA32_VMX_PROCBASED_CTLS2", 0x961000030000048B),
            ("VIRTUAL_IA32_VMX_EPT_VPID_CAP", 0x961000030000048C),
            ("VIRTUAL_IA32_VMX_TRUE_PINBASED_CTLS", 0x961000030000048D),
            ("VIRTUAL_IA32_VMX_TRUE_PROCBASED_CTLS", 0x961000030000048E),
            ("VIRTUAL_IA32_VMX_TRUE_EXIT_CTLS", 0x961000030000048F),
            ("VIRTUAL_IA32_VMX_TRUE_ENTRY_CTLS", 0x9610000300000490),
            ("VIRTUAL_IA32_VMX_VMFUNC", 0x9610000300000491),
            ("VIRTUAL_IA32_VMX_PROCBASED_CTLS3", 0x9610000300000492),
            ("VIRTUAL_IA32_VMX_EXIT_CTLS2", 0x9610000300000493),
            ("EXPORT_COUNT", 0x9810000200000002),
            ("SERVTD_NUM", 0x9910000100000006),
        )
    ),
    _field("immutable", "MB", "MB", "TD_UUID", 0x8010000300000020, elements=4),
    _field(
        "immutable",
        "MB",
        "MB",
        "EPTP",
        0x1110000300000004,
        export_mask=0xFFF0000000000FFF,
        import_mask=0xFFF0000000000FFF,
    ),
    _field("immutable", "MB", "MB", "MRTD", 0x1310000300000000, elements=6),
    _field("immutable", "MB", "MB", "MRCONFIGID", 0x1310000300000010, elements=6),
    _field("immutable", "MB", "MB", "MROWNER", 0x1310000300000018, elements=6),
    _field("immutable", "MB", "MB", "MROWNERCONFIG", 0x1310000300000020, elements=6),
    _field("immutable", "MB", "MB", "SERVTD_HASH", 0x9910000300000000, elements=6),
    # Values that the importer only checks, does not keep, or may do without.
    *(
        _field("immutable", "MB", "CB", name, identifier)
        for name, identifier in (("NUM_CPUID_VALUES", 0x911000010000000E),)
    ),
    _field("immutable", "MB", "IBS", "XBUFF_SIZE", 0x911000020000000F, import_mask=0),
    # Optional on import.
    *(
        _field("immutable", "MB", "MBO", name, identifier)
        for name, identifier in (("CONFIG_FLAGS", 0x1110000300000016),)
    ),
    # Mutable TD state.
    *(
        _field("td", "ME", "ME", name, identifier)
        for name, identifier in (
            ("VIRTUAL_TSC", 0x111000030000000D),
            ("HP_LOCK_TIMEOUT", 0x9110000300000011),
            ("IMPORT_COUNT", 0x9810000200000003),
        )
    ),
    _field("td", "ME", "ME", "NOTIFY_ENABLES", 0x9110000300000010, import_mask=0x1),
    _field("td", "ME", "ME", "VM_CTLS", 0x9110000300000012, fields=4, import_mask=0x1),
    _field("td", "ME", "ME", "RTMR", 0x1310000300000040, elements=6, fields=4),
    _field("td", "ME", "MEO", "TD_CTLS", 0x1110000300000017, import_mask=0x1),
    _field("td", "ME", "MEO", "SERVTD_BINDINGS_TABLE", 0x9910000300000080, elements=16),
    # TD VMCS guest state (field codes are the VMCS encodings).
    *(
        _field("vp", "ME", "ME", name, identifier)
        for name, identifier in (
            ("GUEST_ES_SELECTOR", 0x0024000100000800),
            ("GUEST_CS_SELECTOR", 0x0024000100000802),
            ("GUEST_SS_SELECTOR", 0x0024000100000804),
            ("GUEST_DS_SELECTOR", 0x0024000100000806),
            ("GUEST_FS_SELECTOR", 0x0024000100000808),
            ("GUEST_GS_SELECTOR", 0x002400010000080A),
            ("GUEST_LDTR_SELECTOR", 0x002400010000080C),
            ("GUEST_TR_SELECTOR", 0x002400010000080E),
            ("GUEST_INTERRUPT_STATUS", 0x0024000100000810),
            ("GUEST_UINV", 0x0024000100000814),
            ("IA32_PAT", 0x0024000300002804),
            ("IA32_EFER", 0x0024000300002806),
            ("IA32_PERF_GLOBAL_CTRL", 0x0024000300002808),
            ("IA32_RTIT_CTL", 0x0024000300002814),
            ("IA32_LBR_CTL", 0x0024000300002816),
            ("IA32_GUEST_PKRS", 0x0024000300002818),
            ("VM_ENTRY_INTERRUPTION_INFORMATION", 0x0024000200004016),
            ("VM_ENTRY_EXCEPTION_ERROR_CODE", 0x0024000200004018),
            ("VM_ENTRY_INSTRUCTION_LENGTH", 0x002400020000401A),
            ("PLE_GAP", 0x0024000200004020),
            ("PLE_WINDOW", 0x0024000200004022),
            ("INSTRUCTION_TIMEOUT_CONTROL", 0x0024000200004024),
            ("GUEST_ES_LIMIT", 0x0024000200004800),
            ("GUEST_CS_LIMIT", 0x0024000200004802),
            ("GUEST_SS_LIMIT", 0x0024000200004804),
            ("GUEST_DS_LIMIT", 0x0024000200004806),
            ("GUEST_FS_LIMIT", 0x0024000200004808),
            ("GUEST_GS_LIMIT", 0x002400020000480A),
            ("GUEST_LDTR_LIMIT", 0x002400020000480C),
            ("GUEST_TR_LIMIT", 0x002400020000480E),
            ("GUEST_GDTR_LIMIT", 0x0024000200004810),
            ("GUEST_IDTR_LIMIT", 0x0024000200004812),
            ("GUEST_ES_ACCESS_RIGHTS", 0x0024000200004814),
            ("GUEST_CS_ACCESS_RIGHTS", 0x0024000200004816),
            ("GUEST_SS_ACCESS_RIGHTS", 0x0024000200004818),
            ("GUEST_DS_ACCESS_RIGHTS", 0x002400020000481A),
            ("GUEST_FS_ACCESS_RIGHTS", 0x002400020000481C),
            ("GUEST_GS_ACCESS_RIGHTS", 0x002400020000481E),
            ("GUEST_LDTR_ACCESS_RIGHTS", 0x0024000200004820),
            ("GUEST_TR_ACCESS_RIGHTS", 0x0024000200004822),
            ("INTERRUPTIBILITY_STATE", 0x0024000200004824),
            ("ACTIVITY_STATE", 0x0024000200004826),
            ("IA32_SYSENTER_CS", 0x002400020000482A),
            ("VMX_PREEMPTION_TIMER_VALUE", 0x002400020000482E),
            ("GUEST_CR3", 0x0024000300006802),
            ("GUEST_ES_BASE", 0x0024000300006806),
            ("GUEST_CS_BASE", 0x0024000300006808),
            ("GUEST_SS_BASE", 0x002400030000680A),
            ("GUEST_DS_BASE", 0x002400030000680C),
            ("GUEST_FS_BASE", 0x002400030000680E),
            ("GUEST_GS_BASE", 0x0024000300006810),
            ("GUEST_LDTR_BASE", 0x0024000300006812),
            ("GUEST_TR_BASE", 0x0024000300006814),
            ("GUEST_GDTR_BASE", 0x0024000300006816),
            ("GUEST_IDTR_BASE", 0x0024000300006818),
            ("GUEST_DR7", 0x002400030000681A),
            ("GUEST_RSP", 0x002400030000681C),
            ("GUEST_RIP", 0x002400030000681E),
            ("GUEST_RFLAGS", 0x0024000300006820),
            ("PENDING_DEBUG_EXCEPTIONS", 0x0024000300006822),
            ("IA32_SYSENTER_ESP", 0x0024000300006824),
            ("IA32_SYSENTER_EIP", 0x0024000300006826),
            ("GUEST_IA32_S_CET", 0x0024000300006828),
            ("GUEST_SSP", 0x002400030000682A),
            ("GUEST_IA32_INTERRUPT_SSP_TABLE_ADDR", 0x002400030000682C),
        )
    ),
    _field(
        "vp",
        "ME",
        "ME",
        "IA32_DEBUGCTL",
        0x0024000300002802,
        export_mask=0xFFFFFFFFFFFFDFFF,
        import_mask=0xFFC7,
    ),
    # TD VMCS state initialised by import and then overwritten under its mask.
    *(
        _field("vp", "ME", "IESME", name, identifier)
        for name, identifier in (
            ("GUEST_CR0", 0x0024000300006800),
            ("GUEST_CR4", 0x0024000300006804),
        )
    ),
    _field("vp", "ME", "IESME", "VM_ENTRY_CONTROLS", 0x0024000200004012, import_mask=0x200),
    _field(
        "vp",
        "ME",
        "IESME",
        "SECONDARY_PROCESSOR_BASED_VM_EXECUTION_CONTROLS",
        0x002400020000401E,
        import_mask=0,
    ),
    _field(
        "vp",
        "ME",
        "IES",
        "TERTIARY_PROCESSOR_BASED_VM_EXECUTION_CONTROLS",
        0x0024000300002034,
        import_mask=0,
    ),
    _field("vp", "ME", "IES", "IA32_SPEC_CTRL_MASK", 0x002400030000204A, import_mask=0),
    _field("vp", "ME", "IES", "PDPTE", 0x002400030000280A, fields=4, import_mask=0),
    _field("vp", "ME", "IES", "PIN_BASED_VM_EXECUTION_CONTROLS", 0x0024000200004000, import_mask=0),
    _field(
        "vp",
        "ME",
        "IES",
        "PRIMARY_PROCESSOR_BASED_VM_EXECUTION_CONTROLS",
        0x0024000200004002,
        import_mask=0,
    ),
    _field("vp", "ME", "IES", "EXCEPTION_BITMAP", 0x0024000200004004, import_mask=0),
    _field("vp", "ME", "IES", "PAGE_FAULT_ERROR_CODE_MASK", 0x0024000200004006, import_mask=0),
    _field("vp", "ME", "IES", "PAGE_FAULT_ERROR_CODE_MATCH", 0x0024000200004008, import_mask=0),
    _field("vp", "ME", "IES", "VM_EXIT_CONTROLS", 0x002400020000400C, import_mask=0),
    _field("vp", "ME", "IES", "CR4_READ_SHADOW", 0x0024000300006006, import_mask=0),
    _field("vp", "ME", "NONE", "IA32_SPEC_CTRL_SHADOW", 0x002400030000204C, import_mask=0),
    _field("vp", "ME", "ME", "VAPIC", 0x0120000300000000, fields=128),
    # #VE information area.
    *(
        _field("vp", "ME", "ME", name, identifier)
        for name, identifier in (
            ("VE_EXIT_REASON", 0x0220000200000000),
            ("VE_VALID", 0x0220000200000001),
            ("VE_EXIT_QUALIFICATION", 0x0220000300000002),
            ("VE_GLA", 0x0220000300000003),
            ("VE_GPA", 0x0220000300000004),
            ("VE_EPTP_INDEX", 0x0220000100000005),
            ("VE_INSTRUCTION_LENGTH", 0x8220000200000010),
            ("VE_INSTRUCTION_INFORMATION", 0x8220000200000011),
        )
    ),
    # General-purpose registers.
    *(
        _field("vp", "ME", "ME", name, identifier)
        for name, identifier in (
            ("RAX", 0x1020000300000000),
            ("RCX", 0x1020000300000001),
            ("RDX", 0x1020000300000002),
            ("RBX", 0x1020000300000003),
            ("RSP_PLACEHOLDER", 0x1020000300000004),
            ("RBP", 0x1020000300000005),
            ("RSI", 0x1020000300000006),
            ("RDI", 0x1020000300000007),
            ("R8", 0x1020000300000008),
            ("R9", 0x1020000300000009),
            ("R10", 0x102000030000000A),
            ("R11", 0x102000030000000B),
            ("R12", 0x102000030000000C),
            ("R13", 0x102000030000000D),
            ("R14", 0x102000030000000E),
            ("R15", 0x102000030000000F),
        )
    ),
    # Debug registers, XCR0, CR2.
    *(
        _field("vp", "ME", "ME", name, identifier)
        for name, identifier in (
            ("DR0", 0x1120000300000000),
            ("DR1", 0x1120000300000001),
            ("DR2", 0x1120000300000002),
            ("DR3", 0x1120000300000003),
            ("XCR0", 0x1120000300000020),
            ("CR2", 0x1120000300000028),
        )
    ),
    _field("vp", "ME", "ME", "DR6", 0x1120000300000006, import_mask=0xFFFFFFFF),
    _field("vp", "ME", "ME", "XBUFF", 0x1220000300000000, fields=1536),
    # Guest MSRs (field codes are the MSR numbers, high MSRs folded).
    *(
        _field("vp", "ME", "ME", name, identifier)
        for name, identifier in (
            ("IA32_SPEC_CTRL", 0x1320000300000048),
            ("IA32_UMWAIT_CONTROL", 0x13200003000000E1),
            ("IA32_TSX_CTRL", 0x1320000300000122),
            ("IA32_XFD", 0x13200003000001C4),
            ("IA32_XFD_ERR", 0x13200003000001C5),
            ("IA32_PERF_METRICS", 0x1320000300000329),
            ("IA32_FIXED_CTR_CTRL", 0x132000030000038D),
            ("IA32_PERF_GLOBAL_STATUS", 0x132000030000038E),
            ("IA32_PEBS_ENABLE", 0x13200003000003F1),
            ("MSR_PEBS_DATA_CFG", 0x13200003000003F2),
            ("MSR_PEBS_LD_LAT", 0x13200003000003F6),
            ("MSR_PEBS_FRONTEND", 0x13200003000003F7),
            ("IA32_DS_AREA", 0x1320000300000600),
            ("IA32_XSS", 0x1320000300000DA0),
            ("IA32_LBR_DEPTH", 0x13200003000014CF),
            ("IA32_STAR", 0x1320000300002081),
            ("IA32_LSTAR", 0x1320000300002082),
            ("IA32_FMASK", 0x1320000300002084),
            ("IA32_KERNEL_GS_BASE", 0x1320000300002102),
            ("IA32_TSC_AUX", 0x1320000300002103),
        )
    ),
    _field("vp", "ME", "ME", "IA32_PERFEVTSEL", 0x1320000300000186, fields=8),
    _field("vp", "ME", "ME", "MSR_OFFCORE_RSP", 0x13200003000001A6, fields=2),
    _field("vp", "ME", "ME", "IA32_FIXED_CTR", 0x1320000300000309, fields=7),
    _field("vp", "ME", "ME", "IA32_A_PMC", 0x13200003000004C1, fields=8),
    _field("vp", "ME", "ME", "IA32_UARCH_MISC_CTL", 0x1320000300001B01, import_mask=0x1),
    # vCPU management.
    *(
        _field("vp", "ME", "ME", name, identifier)
        for name, identifier in (
            ("VCPU_STATE", 0xA020000000000000),
            ("VCPU_INDEX", 0xA020000200000002),
            ("CPUID_SUPERVISOR_VE", 0xA020000000000007),
            ("CPUID_USER_VE", 0xA020000000000008),
            ("PEND_NMI", 0x202000000000000B),
            ("LAST_TD_EXIT", 0xA02000000000000F),
            ("NMI_UNBLOCKING_DUE_TO_IRET", 0xA020000000000040),
            ("CURR_VM", 0xA020000100000041),
            ("L2_EXIT_HOST_ROUTING", 0xA020000000000042),
        )
    ),
    _field("vp", "ME", "ME", "L2_CTLS", 0xA020000300000050, fields=4, import_mask=0x7),
    _field("vp", "ME", "ME", "L2_DEBUG_CTLS", 0xA020000300000054, fields=4, import_mask=0x7),
    _field("vp", "ME", "ME", "TSC_DEADLINE", 0xA020000300000058, fields=4),
    _field("vp", "ME", "ME", "CPUID_CONTROL", 0xA120000000000000, fields=128, import_mask=0x3),
    _field("vp", "ME", "IES", "VCPU_XFAM", 0x202000030000000C, import_mask=0),
    # CPUID values: low element EAX and EBX, high element ECX and EDX.
    *(_cpuid_field(leaf, subleaf) for leaf, subleaf in _CPUID_LEAVES),
)


def _table_order(field: Field) -> tuple[int, int]:
    """Class, then field code; CPUID leaves stay in the module's own order."""
    return field.class_code, 0 if field.class_code == 0x14 else field.code


def _items(field: Field, context: int) -> Iterator[Item]:
    step = field.elements * field.stride
    for index in range(field.fields):
        identifier = field.identifier + index * step
        key = identifier_key(identifier)
        # CPUID fields are never put into one sequence, whatever their codes are.
        adjacent = -1 if field.class_code == 0x14 and context == 1 else key + step
        yield Item(field, index, identifier, key, adjacent)


def _scope_rows(scope: str) -> tuple[Field, ...]:
    return tuple(sorted((row for row in _ROWS if row.scope == scope), key=_table_order))


FIELDS: Final[Mapping[str, Field]] = MappingProxyType({row.name: row for row in _ROWS})
"""Every carried field by name."""

ROWS: Final[Mapping[str, tuple[Field, ...]]] = MappingProxyType(
    {scope: _scope_rows(scope) for scope in CONTEXT_CODES}
)
"""Rows of each scope in the order of the module's table, which is the order of export."""

ITEMS: Final[Mapping[str, tuple[Item, ...]]] = MappingProxyType(
    {
        scope: tuple(item for row in rows for item in _items(row, CONTEXT_CODES[scope]))
        for scope, rows in ROWS.items()
    }
)
"""The same, field by field."""
