"""Are MBMDs, GPA lists, operands and our own messages the bytes that they are specified to be?"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxmig_model.errors import WireError
from tdxmig_model.wire import (
    AbortToken,
    BundleType,
    Capability,
    Committed,
    Failed,
    GpaEntry,
    GpaListInfo,
    GpaOperation,
    GpaStatus,
    Hello,
    InOrderDone,
    Mbmd,
    PageListInfo,
    PageRequest,
    RecordParser,
    ReturnMessage,
    ReturnPathParser,
    SessionStarted,
    SourceAbort,
    encode,
    encode_return,
    iv_bytes,
)
from tdxmig_model.wire import gpa_list as lists
from tdxmig_model.wire.extensions import (
    CHANNEL_OPEN_SIZE,
    ChannelOpen,
    decode_channel,
    encode_channel,
    encode_forward,
    printable_reason,
)

VECTORS = json.loads((Path(__file__).parent.parent / "specs" / "crypto_vectors.json").read_text())
CIPHER = AESGCM(bytes.fromhex(VECTORS["key_hex"]))
PAGE = bytes(range(256)) * 16
CONTENTS = {"": b"", "bytes 00..ff repeated 16 times": PAGE}
SESSION = bytes(range(16))

# MBMD.

MBMDS = {
    "start token (EPOCH_TOKEN)": Mbmd.epoch_token(total_mb=12, mig_epoch=0xFFFFFFFF, iv_counter=7),
    "abort token": Mbmd.abort_token(mb_counter=0, iv_counter=1),
    "MEM MBMD, forward stream 1, 2 entries": Mbmd.memory(
        num_gpas=2, mb_counter=2, mig_epoch=3, iv_counter=5, migs_index=1
    ),
    "state bundle": Mbmd.td_state(mb_counter=9, mig_epoch=1, iv_counter=20),
    "immutable": Mbmd.immutable_state(iv_counter=1, num_forward_streams=2),
    "vCPU": Mbmd.vcpu_state(vp_index=3, mb_counter=1, mig_epoch=4, iv_counter=6, migs_index=510),
}


@pytest.mark.parametrize("vector", VECTORS["mbmd"], ids=lambda vector: vector["name"])
def test_an_mbmd_is_built_and_authenticated_as_in_the_vectors(vector: dict[str, str]) -> None:
    mbmd = MBMDS[vector["name"]]
    assert mbmd.iv().hex() == vector["iv"]
    assert mbmd.aad().hex() == vector["aad"]
    mac = CIPHER.encrypt(mbmd.iv(), b"", mbmd.aad())
    assert mac.hex() == vector["mac"]
    whole = mbmd.with_mac(mac)
    assert whole.pack().hex() == vector["mbmd_bytes"]
    assert Mbmd.unpack(whole.pack()) == whole


def test_a_state_bundle_is_one_message_as_in_the_vector() -> None:
    vector = VECTORS["state_bundle_td"]
    mbmd = MBMDS["state bundle"]
    sealed = CIPHER.encrypt(mbmd.iv(), PAGE + bytes(4096), mbmd.aad())
    assert (mbmd.iv().hex(), mbmd.aad().hex()) == (vector["iv"], vector["aad"])
    assert hashlib.sha256(sealed[:-16]).hexdigest() == vector["ciphertext_sha256"]
    assert mbmd.with_mac(sealed[-16:]).pack().hex() == vector["mbmd_bytes"]


@pytest.mark.parametrize("vector", VECTORS["mem_bundle_pages"], ids=lambda v: v["operation"])
def test_a_page_is_sealed_as_in_the_vectors(vector: dict[str, Any]) -> None:
    entry = GpaEntry(
        int(vector["gpa"], 16),
        GpaOperation[vector["operation"]],
        GpaStatus(vector.get("status", 0)),
        bool(vector["pending"]),
    )
    bundle = MBMDS["MEM MBMD, forward stream 1, 2 entries"]
    iv = iv_bytes(bundle.iv_counter + 1 + vector["entry"], bundle.migs_index)
    assert (iv.hex(), entry.pack().hex()) == (vector["iv"], vector["aad"])
    plaintext = CONTENTS[vector["plaintext"]]
    assert entry.carries_content == bool(plaintext)
    sealed = CIPHER.encrypt(iv, plaintext, entry.pack())
    assert sealed[-16:].hex() == vector["mac"]
    if plaintext:
        assert sealed[:16].hex() == vector["ciphertext_first16"]
        assert hashlib.sha256(sealed[:-16]).hexdigest() == vector["ciphertext_sha256"]


@pytest.mark.parametrize("mbmd", MBMDS.values(), ids=MBMDS)
def test_each_flipped_bit_of_an_mbmd_is_refused_or_kept(mbmd: Mbmd) -> None:
    wire = mbmd.with_mac(bytes(range(16))).pack()
    for bit in range(48 * 8):
        changed = bytearray(wire)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            seen = Mbmd.unpack(changed)
        except WireError:
            continue
        assert seen.pack() == bytes(changed), bit
        assert bit >= 16, "SIZE is always 48"
        assert bit // 8 != 7, "byte 7 is reserved"


RESERVED = {
    BundleType.IMMUTABLE_TD_STATE: {26, 27, 29, 30, 31},
    BundleType.MUTABLE_TD_STATE: set(range(24, 32)),
    BundleType.MUTABLE_VCPU_STATE: set(range(26, 32)),
    BundleType.MEM: set(range(26, 32)),
    BundleType.EPOCH_TOKEN: set(),
    BundleType.ABORT_TOKEN: set(range(24, 32)),
}


@pytest.mark.parametrize("mbmd", MBMDS.values(), ids=MBMDS)
def test_the_reserved_bytes_of_each_type_must_be_zero(mbmd: Mbmd) -> None:
    refused = set()
    for at in range(24, 32):
        changed = bytearray(mbmd.pack())
        changed[at] ^= 0x80
        with contextlib.suppress(WireError):
            Mbmd.unpack(changed)
            continue
        refused.add(at)
    if mbmd.bundle_type is BundleType.MEM:
        refused.remove(25)  # NUM_GPAS above 512, and not reserved.
    assert refused == RESERVED[mbmd.bundle_type]


@pytest.mark.parametrize("length", range(48))
def test_a_short_mbmd_is_refused(length: int) -> None:
    wire = MBMDS["abort token"].pack()[:length]
    with pytest.raises(WireError) as caught:
        Mbmd.unpack(wire, stream_offset=100)
    assert (caught.value.offset, caught.value.value) == (100, f"{length} bytes")
    with pytest.raises(WireError):
        Mbmd.unpack(bytes(10) + wire, offset=10)


def test_an_mbmd_is_found_at_its_offset() -> None:
    mbmd = MBMDS["vCPU"]
    assert Mbmd.unpack(memoryview(b"xxx" + mbmd.pack() + b"y"), offset=3) == mbmd
    with pytest.raises(WireError):
        Mbmd.unpack(mbmd.pack(), offset=-48)


def test_type_specific_fields_belong_to_their_type() -> None:
    token, immutable = MBMDS["start token (EPOCH_TOKEN)"], MBMDS["immutable"]
    assert (token.total_mb, token.is_start_token) == (12, True)
    assert not Mbmd.epoch_token(total_mb=1, mig_epoch=1, iv_counter=1).is_start_token
    assert (immutable.num_forward_streams, immutable.num_sys_md_pages) == (2, 1)
    assert MBMDS["vCPU"].vp_index == 3
    assert MBMDS["MEM MBMD, forward stream 1, 2 entries"].num_gpas == 2
    assert not MBMDS["abort token"].is_start_token
    with pytest.raises(WireError, match="field num_gpas, value 'ABORT_TOKEN', expected MEM"):
        _ = MBMDS["abort token"].num_gpas


@pytest.mark.parametrize(("count", "fits"), [(0, False), (1, True), (512, True), (513, False)])
def test_a_memory_mbmd_names_1_to_512_entries(count: int, fits: bool) -> None:
    mbmd = Mbmd.memory(num_gpas=count, mb_counter=0, mig_epoch=0, iv_counter=0)
    if fits:
        assert Mbmd.unpack(mbmd.pack()).num_gpas == count
        return
    with pytest.raises(WireError, match="num_gpas"):
        Mbmd.unpack(mbmd.pack())


def test_values_that_do_not_fit_an_mbmd_or_iv_are_refused() -> None:
    with pytest.raises(WireError, match="iv_counter"):
        Mbmd.abort_token(mb_counter=0, iv_counter=1 << 64).pack()
    with pytest.raises(WireError, match="type_specific"):
        Mbmd.memory(num_gpas=65536, mb_counter=0, mig_epoch=0, iv_counter=0)
    assert iv_bytes(0xFFFFFFFFFFFFFFFF, 0xFFFF) == b"\xff" * 10 + b"\0\0"
    assert iv_bytes(0, 0) == bytes(12)
    with pytest.raises(WireError, match="field migs_index, value 511, expected 0 to 510"):
        Mbmd.unpack(replace(MBMDS["vCPU"], migs_index=511).pack())
    for counter, stream in ((-1, 0), (1 << 64, 0), (0, -1), (0, 65536)):
        with pytest.raises(WireError):
            iv_bytes(counter, stream)


U32 = st.integers(0, 0xFFFFFFFF)


@settings(max_examples=50)
@given(U32, U32, st.integers(0, 2**64 - 1), st.integers(0, 510), st.integers(1, 512))
def test_any_memory_mbmd_survives_the_round_trip(
    counter: int, epoch: int, iv_counter: int, stream: int, count: int
) -> None:
    mbmd = Mbmd.memory(
        num_gpas=count,
        mb_counter=counter,
        mig_epoch=epoch,
        iv_counter=iv_counter,
        migs_index=stream,
        mac=bytes(range(16)),
        mig_version=0xFFFF,
    )
    assert Mbmd.unpack(mbmd.pack()) == mbmd


# GPA lists.

PAGE_NUMBERS = st.integers(0, 2**40 - 1)
ENTRIES = st.builds(
    GpaEntry,
    gpa=PAGE_NUMBERS.map(lambda number: number << 12),
    operation=st.sampled_from(GpaOperation),
    status=st.sampled_from(GpaStatus),
    pending=st.booleans(),
    l2_map=st.integers(0, 7),
    mig_type=st.integers(0, 3),
)


@settings(max_examples=60)
@given(st.lists(ENTRIES, max_size=20))
def test_columns_say_what_entries_say(entries: list[GpaEntry]) -> None:
    wire = b"".join(entry.pack() for entry in entries)
    column = lists.entries_from_bytes(wire)
    assert lists.entries_to_bytes(column) == wire
    assert [GpaEntry.unpack(wire, offset=8 * index) for index in range(len(entries))] == entries
    assert lists.entry_gpas(column).tolist() == [entry.gpa for entry in entries]
    assert lists.entry_operations(column).tolist() == [entry.operation for entry in entries]
    assert lists.entry_statuses(column).tolist() == [entry.status for entry in entries]
    assert lists.entry_pending(column).tolist() == [entry.pending for entry in entries]
    carries = [entry.carries_content for entry in entries]
    assert lists.entry_carries_content(column).tolist() == carries
    assert lists.valid_entries(column).all()
    lists.check_entries(column)


@settings(max_examples=60)
@given(st.integers(0, 2**64 - 1), st.integers(0, 63))
def test_a_column_refuses_what_an_entry_refuses(value: int, bit: int) -> None:
    for number in (value, value & 0x1F3FFFFFFFFFFF84 | 1 << bit):
        column = np.array([0x1000, number], dtype=np.uint64)
        refusal = None
        try:
            assert GpaEntry.from_int(number, offset=8).to_int() == number
        except WireError as error:
            refusal = str(error)
        if refusal is None:
            lists.check_entries(column)
            continue
        with pytest.raises(WireError) as caught:
            lists.check_entries(column)
        assert str(caught.value) == refusal


def test_each_bit_of_an_entry_is_where_it_belongs() -> None:
    assert GpaEntry(0xFFFFFFFFFF000).to_int() == 0x000FFFFFFFFFF000
    assert GpaEntry(0, GpaOperation.REMIGRATE).to_int() == 3 << 52
    assert GpaEntry(0, status=GpaStatus.GPA_LIST_ENTRY_INVALID).to_int() == 15 << 56
    assert GpaEntry(0, pending=True, l2_map=7, mig_type=3).to_int() == 0b1111_1000_0100
    for bit in (0, 1, 3, 4, 5, 6, 54, 55, 60, 61, 62, 63):
        with pytest.raises(WireError):
            GpaEntry.from_int(1 << bit)
        # An undefined status is no question of validity for the module.
        assert lists.valid_entries(np.array([1 << bit], dtype=np.uint64)).all() == (bit == 60)


def test_a_list_is_built_from_gpas() -> None:
    entries = lists.build_entries([0x1000, 0xFFFFFFFFFF000], GpaOperation.CANCEL)
    assert [hex(entry) for entry in entries] == ["0x20000000001000", "0x2ffffffffff000"]
    assert lists.build_entries(np.zeros(512, dtype=np.uint64)).size == 512
    assert lists.build_entries([]).size == 0


@pytest.mark.parametrize(
    ("gpas", "field"),
    [
        ([0x1000, 0x1001], "gpa"),
        ([1 << 52], "gpa"),
        ([-4096], "gpa"),
        ([1 << 64], "gpa"),
        ([0.5], "gpa"),
        ([[0x1000]], "shape"),
        ([0] * 513, "entries"),
    ],
)
def test_a_list_of_unusable_gpas_is_refused(gpas: Any, field: str) -> None:
    with pytest.raises(WireError) as caught:
        lists.build_entries(gpas)
    assert caught.value.field == field


def test_fields_of_a_column_are_written_in_place() -> None:
    entries = lists.build_entries([0x1000, 0x2000, 0x3000])
    lists.set_operation(entries, GpaOperation.REMIGRATE, 1)
    lists.set_status(entries, GpaStatus.TLB_TRACKING_NOT_DONE, np.array([True, False, True]))
    lists.set_pending(entries, True, slice(2, 3))
    assert lists.entry_operations(entries).tolist() == [1, 3, 1]
    assert lists.entry_statuses(entries).tolist() == [5, 0, 5]
    assert lists.entry_pending(entries).tolist() == [False, False, True]
    lists.set_status(entries, np.array([0, 31, 1], dtype=np.uint8))
    lists.set_operation(entries, np.array([0, 1, 2], dtype=np.uint8))
    lists.set_pending(entries, np.array([True, False, False]))
    assert lists.entry_statuses(entries).tolist() == [0, 31, 1]
    assert lists.entry_operations(entries).tolist() == [0, 1, 2]
    assert lists.entry_gpas(entries).tolist() == [0x1000, 0x2000, 0x3000]


@pytest.mark.parametrize("length", [1, 7, 9, 4104])
def test_a_list_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(WireError, match="field length"):
        lists.entries_from_bytes(bytes(length))


def test_entries_that_cannot_be_written_are_refused() -> None:
    for entry in (GpaEntry(0x1001), GpaEntry(1 << 52), GpaEntry(0, level=4), GpaEntry(0, l2_map=8)):
        with pytest.raises(WireError):
            entry.pack()
    for wire, offset in ((bytes(7), 0), (bytes(8), 1), (bytes(8), -8)):
        with pytest.raises(WireError):
            GpaEntry.unpack(wire, offset=offset)
    with pytest.raises(WireError):
        GpaEntry.from_int(1 << 64)


def test_list_operands_have_their_bits_in_place() -> None:
    info = GpaListInfo(hpa=0x123456000, first_entry=3, last_entry=511)
    assert info.to_register() == 511 << 55 | 0x123456000 | 3 << 3
    assert GpaListInfo.from_register(info.to_register()) == info
    assert info.count == 509
    assert GpaListInfo.from_register(info.next_register(100)).first_entry == 103
    assert info.next_register(509) & 0xFF8 == 0
    pages = PageListInfo(hpa=0xFFFFFFFFFF000, last_entry=4)
    assert pages.to_register() == 4 << 55 | 0xFFFFFFFFFF000
    assert PageListInfo.from_register(pages.to_register()) == pages
    assert pages.count == 5
    assert GpaListInfo.from_register(0) == GpaListInfo(hpa=0, last_entry=0)
    assert PageListInfo.from_register(0) == PageListInfo(hpa=0, last_entry=0)
    assert GpaListInfo(0, 0).to_register() == PageListInfo(0, 0).to_register() == 0
    assert GpaListInfo.from_register(2 << 55 | 2 << 3).count == 1


@pytest.mark.parametrize("value", [1, 4, 1 << 3, 1 << 52, 1 << 54, 1 << 64, -1])
def test_an_unusable_gpa_list_info_is_refused(value: int) -> None:
    with pytest.raises(WireError):
        GpaListInfo.from_register(value)


@pytest.mark.parametrize("value", [1, 1 << 11, 1 << 52, 1 << 54, 1 << 64, -1])
def test_an_unusable_page_list_info_is_refused(value: int) -> None:
    with pytest.raises(WireError):
        PageListInfo.from_register(value)


def test_operands_that_do_not_fit_are_refused() -> None:
    for info in (
        GpaListInfo(0x1001, 0),
        GpaListInfo(1 << 52, 0),
        GpaListInfo(0, 512),
        GpaListInfo(0, 0, 1),
        PageListInfo(0x1001, 0),
        PageListInfo(0, 512),
        PageListInfo(0, -1),
    ):
        with pytest.raises(WireError):
            info.to_register()


# Our own messages.

HELLO = Hello(SESSION, Capability.BATCH | Capability.CANCEL, 0x40, vcpu_count=2, streams=3)
RETURN_MESSAGES: list[ReturnMessage] = [
    HELLO,
    SessionStarted(),
    InOrderDone(),
    AbortToken(MBMDS["abort token"]),
    Committed(),
    Committed(bytes(range(32))),
    Failed("TDX_INVALID_MBMD in epoch 3, vCPU état"),
    Failed(""),
    PageRequest((0x1000,)),
    PageRequest((0x7000, 0xFFFFFFFFFF000)),
]


def test_a_hello_is_the_documented_bytes() -> None:
    layout = "0001" + "0003" + "00000003" + "0000000000000040" + "00000002" + "00000000"
    assert encode_return(HELLO).hex() == "5401" + "0028" + layout + SESSION.hex()
    assert encode(HELLO) == [b"\x54" + encode_return(HELLO)]
    assert encode_forward(SourceAbort("no")).hex() == "54" + "5406" + "0002" + b"no".hex()
    assert encode_return(SessionStarted()).hex() == "54020000"
    assert encode_return(InOrderDone()).hex() == "54070000"
    assert encode_return(Committed()).hex() == "54040000"
    assert encode_return(PageRequest((0x3000,))).hex() == "54090008" + "0000000000003000"
    opening = "54" + "54080012" + "0002" + SESSION.hex()
    assert encode_channel(ChannelOpen(2, SESSION)).hex() == opening


def test_the_return_path_survives_the_round_trip_however_it_is_cut() -> None:
    wire = b"".join(encode_return(message) for message in RETURN_MESSAGES)
    assert list(ReturnPathParser().records(wire)) == RETURN_MESSAGES
    parser = ReturnPathParser()
    seen: list[ReturnMessage] = []
    for at in range(len(wire)):
        seen += parser.records(wire[at : at + 1])
    parser.end_of_stream()
    assert seen == RETURN_MESSAGES


def test_truncation_of_the_return_path_is_noticed_at_each_byte() -> None:
    wire = encode_return(AbortToken(MBMDS["abort token"]))
    for length in range(1, len(wire)):
        parser = ReturnPathParser()
        assert list(parser.records(wire[:length])) == []
        assert not parser.at_boundary
        with pytest.raises(WireError) as caught:
            parser.end_of_stream()
        assert caught.value.offset == length


@pytest.mark.parametrize("message", RETURN_MESSAGES, ids=lambda message: type(message).__name__)
def test_each_flipped_bit_of_a_message_is_refused_or_seen(message: ReturnMessage) -> None:
    wire = encode_return(message)
    for bit in range(len(wire) * 8):
        changed = bytearray(wire)
        changed[bit // 8] ^= 1 << bit % 8
        parser = ReturnPathParser()
        try:
            seen = list(parser.records(bytes(changed)))
        except WireError:
            continue
        assert seen != [message], bit
        assert b"".join(map(encode_return, seen)) == changed[: parser.offset], bit


@settings(max_examples=100)
@given(st.binary(max_size=80), st.integers(0x5401, 0x5409), st.integers(0, 1100))
def test_random_messages_give_messages_or_wire_errors(data: bytes, kind: int, length: int) -> None:
    frame = kind.to_bytes(2, "big") + length.to_bytes(2, "big")
    for wire in (data, frame + data * 14):
        for parser in (ReturnPathParser(), RecordParser()):
            mark = b"\x54" if isinstance(parser, RecordParser) else b""
            with contextlib.suppress(WireError):
                list(parser.records(mark + wire))


@pytest.mark.parametrize(
    ("wire", "field", "offset"),
    [
        ("0001" + "0000", "type", 0),
        ("5406" + "0000", "type", 0),
        ("5401" + "0027", "length", 2),
        ("5401" + "0029", "length", 2),
        ("5402" + "0001", "length", 2),
        ("5403" + "0031", "length", 2),
        ("5404" + "0021", "length", 2),
        ("5404" + "0001" + "00", "digest", 4),
        ("5405" + "0401", "length", 2),
        ("5408" + "0012", "type", 0),
        ("5409" + "0000", "length", 2),
        ("5409" + "1001", "length", 2),
        ("5409" + "0009" + "00" * 9, "length", 2),
        ("5409" + "0010" + "00" * 8 + "00" * 6 + "1001", "gpa", 12),
        ("5409" + "0008" + "0010" + "00" * 6, "gpa", 4),
        ("5405" + "0002" + "61ff", "reason", 5),
        ("5405" + "0001" + "1b", "reason", 4),
        ("5405" + "0002" + "6120", "reason", 4),
        ("5403" + "0030" + MBMDS["vCPU"].pack().hex(), "bundle_type", 10),
    ],
)
def test_a_message_out_of_bounds_is_refused(wire: str, field: str, offset: int) -> None:
    parser = ReturnPathParser()
    with pytest.raises(WireError) as caught:
        list(parser.records(bytes.fromhex(wire)))
    assert (caught.value.field, caught.value.offset) == (field, offset)


HELLO_BOUNDS = {
    "version": (2, 1, 1),
    "streams": (2, 1, 511),
    "page_count": (8, 0, 1 << 40),
    "vcpu_count": (4, 1, 65535),
}


@pytest.mark.parametrize("field", HELLO_BOUNDS)
def test_a_hello_keeps_its_bounds(field: str) -> None:
    size, least, most = HELLO_BOUNDS[field]
    at = {"version": 4, "streams": 6, "page_count": 12, "vcpu_count": 20}[field]
    for value, fits in ((least - 1, False), (least, True), (most, True), (most + 1, False)):
        values = {"page_count": 1, "vcpu_count": 1, "streams": 1} | {field: value}
        hello = Hello(SESSION, Capability(0), **values)
        if fits:
            assert list(ReturnPathParser().records(encode_return(hello))) == [hello]
            continue
        with pytest.raises(WireError, match=field):
            encode_return(hello)
        if 0 <= value < 1 << 8 * size:
            wire = bytearray(encode_return(HELLO))
            wire[at : at + size] = value.to_bytes(size, "big")
            with pytest.raises(WireError, match=field):
                list(ReturnPathParser().records(wire))


def test_unknown_capabilities_are_kept() -> None:
    hello = Hello(SESSION, Capability(0xFFFFFFFF), 1, 1, 1)
    assert list(ReturnPathParser().records(encode_return(hello))) == [hello]
    for capabilities in (Capability(1 << 32), -1):
        with pytest.raises(WireError):
            encode_return(Hello(SESSION, capabilities, 1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(WireError, match="session_id"):
        encode_return(Hello(SESSION[:-1], Capability(0), 1, 1, 1))


def test_a_message_is_refused_on_the_wrong_path() -> None:
    with pytest.raises(WireError, match="wrong path"):
        encode_return(SourceAbort("x"))  # type: ignore[arg-type]
    with pytest.raises(WireError, match="wrong path"):
        encode_forward(SessionStarted())  # type: ignore[arg-type]
    with pytest.raises(WireError, match="a record of the forward path"):
        encode(Committed())  # type: ignore[arg-type]
    with pytest.raises(WireError, match="bundle_type"):
        encode_return(AbortToken(MBMDS["vCPU"]))
    with pytest.raises(WireError, match="digest"):
        encode_return(Committed(b"short"))


def test_a_reason_is_made_printable_and_cut() -> None:
    assert printable_reason("two\n  lines\tand \x1b[31m red\x00") == "two lines and ?[31m red?"
    assert printable_reason("é" * 600) == "é" * 512
    assert len(printable_reason("a" * 2000)) == 1024
    (message,) = ReturnPathParser().records(encode_return(Failed("a\nb" + "c" * 2000)))
    assert message == Failed("a b" + "c" * 1021)


@settings(max_examples=60)
@given(st.text(max_size=600))
def test_any_reason_can_be_sent(text: str) -> None:
    (message,) = ReturnPathParser().records(encode_return(Failed(text)))
    assert message == Failed(printable_reason(text))


@pytest.mark.parametrize("gpas", [(), (0x1001,), (1 << 52,), (-4096,), (0x1000,) * 513])
def test_a_page_request_keeps_its_bounds(gpas: tuple[int, ...]) -> None:
    with pytest.raises(WireError):
        encode_return(PageRequest(gpas))


@pytest.mark.parametrize("channel", [1, 2, 510])
def test_a_channel_says_who_it_is(channel: int) -> None:
    opening = ChannelOpen(channel, SESSION)
    wire = encode_channel(opening)
    assert len(wire) == CHANNEL_OPEN_SIZE
    assert decode_channel(wire) == opening
    for bit in range(len(wire) * 8):
        changed = bytearray(wire)
        changed[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(WireError):
            assert decode_channel(bytes(changed)) != opening, bit
    for length in range(len(wire)):
        with pytest.raises(WireError):
            decode_channel(wire[:length])


@pytest.mark.parametrize(("channel", "session"), [(0, SESSION), (511, SESSION), (1, SESSION[1:])])
def test_a_channel_that_cannot_be_is_refused(channel: int, session: bytes) -> None:
    with pytest.raises(WireError):
        encode_channel(ChannelOpen(channel, session))
