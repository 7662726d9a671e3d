"""Packed codes: each width against its definition, and back."""

import pytest
import torch
from oracles import generator

from qat.export.pack import bits_per_code, pack, unpack
from spectra.backend.errors import InputError


@pytest.mark.parametrize(
    ("levels", "bits"), [(2, 1), (3, 1.6), (4, 2), (5, 3), (8, 3), (9, 4), (16, 4), (17, 8), (256, 8)]
)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 40, 119])
def test_codes_come_back_and_take_their_bits(levels, bits, count):
    codes = torch.randint(0, levels, (count,), generator=generator(levels + count), dtype=torch.uint8)
    packed = pack(codes, levels)
    assert torch.equal(unpack(packed, count, levels), codes)
    assert bits_per_code(levels) == bits
    step = {1: 8, 1.6: 5, 2: 4, 3: 8, 4: 2, 8: 1}[bits]  # codes that are padded to
    assert packed.numel() * 8 == pytest.approx(-(-count // step) * step * bits)


def test_the_layout_is_the_documented_one():
    assert pack(torch.tensor([1, 0, 0, 1, 1]), 2).tolist() == [0b11001]
    assert pack(torch.tensor([2, 1, 0, 2, 1]), 3).tolist() == [2 + 1 * 3 + 0 * 9 + 2 * 27 + 1 * 81]
    assert pack(torch.tensor([3, 0, 1, 2, 1]), 4).tolist() == [0b10010011, 1]
    codes = [7, 0, 1, 2, 3, 4, 5, 6]
    assert pack(torch.tensor(codes), 8).tolist() == list(
        sum(code << 3 * place for place, code in enumerate(codes)).to_bytes(3, "little")
    )
    assert pack(torch.tensor([15, 2, 9]), 16).tolist() == [0x2F, 9]
    assert pack(torch.tensor([255, 0]), 256).tolist() == [255, 0]


def test_more_levels_than_a_byte_has_are_refused():
    with pytest.raises(InputError, match="2 to 256 levels"):
        pack(torch.zeros(1), 257)
