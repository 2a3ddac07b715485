"""Are the RAM records that carry no private page the bytes that QEMU writes?"""

from __future__ import annotations

import pytest

from tdxmig_model.errors import WireError
from tdxmig_model.wire import EndOfPass, MultifdFlush, Record, RecordParser, SharedPage, encode

PAGE = bytes(range(256)) * 16
ZERO_PAGE = bytes(4096)


def to_bytes(records: list[Record]) -> bytes:
    return b"".join(buffer for record in records for buffer in encode(record))


def refused(data: bytes) -> WireError:
    with pytest.raises(WireError) as caught:
        list(RecordParser().records(data))
    return caught.value


def test_shared_pages_and_marks_are_the_documented_bytes() -> None:
    wire = to_bytes(
        [
            SharedPage(0x3000, "pc.ram", PAGE),
            SharedPage(0x4000, "pc.ram", ZERO_PAGE, fill=0, same_block=True),
            MultifdFlush(),
            EndOfPass(),
        ]
    )
    assert wire.hex() == (
        "0000000000003008"
        "0670632e72616d"
        + PAGE.hex()
        # The zero page: flags 0x02 and 0x20, then the byte that fills it.
        + "0000000000004022"
        + "00"
        + "0000000000000200"
        + "0000000000000010"
    )


def test_a_shared_page_is_what_it_says_it_is_full_of() -> None:
    for fill, field in ((1, "fill"), (256, "fill"), (-1, "fill")):
        with pytest.raises(WireError) as caught:
            encode(SharedPage(0, "pc.ram", ZERO_PAGE, fill=fill))
        assert caught.value.field == field
    for page in (PAGE[:-1], memoryview(PAGE * 2)[::2]):
        with pytest.raises(WireError, match="page 0"):
            encode(SharedPage(0, "pc.ram", page))
    for word in (0x2010, 0x2200, 0x2800):
        assert refused(word.to_bytes(8, "big")).field == "offset"
    assert refused((0x28).to_bytes(8, "big")).bound == "no 0x20: no block was named yet"
