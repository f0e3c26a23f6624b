import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchlathe.ir import OptionError
from torchlathe.kernels import packing

extents = st.integers(1, 300)


@given(extents, extents, st.sampled_from(packing.GROUPS), st.integers(0, 2**31))
def test_qs4_comes_back(rows: int, columns: int, group: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=draw)
    words = packing.pack_qs4(values, group)
    assert words.dtype == torch.int16
    assert words.shape == (packing.padded(rows, 128), packing.padded(columns, 128) // 4)
    back = packing.unpack_qs4(words, group)
    assert torch.equal(back[:rows, :columns], values.to(torch.int16))
    assert not back[rows:].any()
    assert not back[:, columns:].any()


@given(extents, extents, st.integers(0, 2**31))
def test_halves_come_back(rows: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    bytes_ = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=draw)
    back = packing.unpack_hs8(packing.pack_hs8(bytes_))
    assert torch.equal(back[:rows, :columns], bytes_.to(torch.int16))
    nibbles = torch.randint(-8, 8, (rows, columns), dtype=torch.int8, generator=draw)
    back = packing.unpack_hs4(packing.pack_hs4(nibbles))
    assert torch.equal(back[:rows, :columns], nibbles)
    assert not back[rows:].any()


@pytest.mark.parametrize("group", packing.GROUPS)
@pytest.mark.parametrize("columns", [128, 256, 384, 4096])
def test_a_quarter_lies_in_one_group(columns: int, group: int) -> None:
    quarter = packing.quarter_of(columns, group)
    assert columns % (4 * quarter) == 0
    assert group % quarter == 0


def test_words_hold_what_the_page_says() -> None:
    """Word r of a span has the columns r, r + q, r + 2q and r + 3q, lowest bits first."""
    values = torch.zeros(1, 512, dtype=torch.uint8)
    values[0, [256 + 5, 256 + 69, 256 + 133, 256 + 197]] = torch.tensor([1, 2, 3, 9]).byte()
    words = packing.pack_qs4(values, 128)
    assert int(words[0, 64 + 5]) & 0xFFFF == 0x9321
    assert words[0].count_nonzero() == 1


@pytest.mark.parametrize(
    ("values", "group", "text"),
    [
        (torch.zeros(4, 8, dtype=torch.uint8), 16, "no layout for groups of 16"),
        (torch.zeros(4, 8), 32, "weights must be uint8 of two axes, not float32 (4, 8)"),
        (torch.full((4, 8), 16, dtype=torch.uint8), 32, "below 16, the largest is 16"),
    ],
    ids=["group", "dtype", "range"],
)
def test_what_cannot_be_packed_is_refused(values, group: int, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        packing.pack_qs4(values, group)
    assert text in str(caught.value)


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(OptionError, match="2 groups, not float32"):
        packing.pack_scales(torch.ones(3, 8), 200, 128)
