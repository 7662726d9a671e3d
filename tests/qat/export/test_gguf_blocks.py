"""Every block type against the dequantization of the `gguf` package, and Q1_0, which it lacks, by its definition."""

import gguf_reading
import numpy as np
import pytest

from qat.export.gguf_blocks import BLOCK_TYPES, choose_type, encode

gguf = pytest.importorskip("gguf")
LEVELS = {
    "1": [-1, 1],
    "1.58": [-1, 0, 1],
    "seq 2": [-3, -1, 1, 3],
    "rtn 2": [-2, -1, 0, 1],
    "3": list(range(-4, 4)),
    "4": list(range(-8, 8)),
    "8": list(range(-128, 128)),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, id=f"{kind.name}-{name}")
        for kind in BLOCK_TYPES
        for name, levels in LEVELS.items()
        if kind.holds(frozenset(levels))
    ],
)
def test_what_is_encoded_is_decoded(kind, name):
    levels = LEVELS[name]
    rng = np.random.default_rng(len(levels))
    integers = rng.choice(levels, size=(3, 512)).astype(np.int8)
    scales = np.repeat(rng.random((3, 512 // kind.block)).astype(np.float16).astype(np.float32), kind.block, axis=1)
    blocks = encode(kind, integers, scales)
    found = (
        gguf_reading.Q1_0.dequantize(blocks)
        if kind.name == "Q1_0"
        else gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    )
    assert np.array_equal(found, integers * scales)
    size, each = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    assert (kind.block, blocks.nbytes) == (size, integers.size // size * each)


@pytest.mark.parametrize(
    ("levels", "columns", "group", "name"),
    [
        ("1", 256, 256, "Q1_0"),
        ("1", 128, 64, "Q4_0"),
        ("1.58", 512, 512, "TQ1_0"),
        ("1.58", 576, 576, "Q4_0"),
        ("seq 2", 256, 256, "Q2_K"),
        ("rtn 2", 256, 64, "Q4_0"),
        ("3", 512, 256, "Q3_K"),
        ("3", 64, 64, "Q4_0"),
        ("4", 32, 32, "Q4_0"),
        ("8", 96, 96, "Q8_0"),
        ("8", 40, 40, None),
        ("4", 64, 16, None),
    ],
)
def test_the_smallest_type_with_one_scale_a_block_is_chosen(levels, columns, group, name):
    kind = choose_type(frozenset(LEVELS[levels]), columns, group)
    assert (kind and kind.name) == name


def test_levels_beyond_a_type_are_not_held():
    assert choose_type(frozenset({-15, 15}), 256, 256).name == "Q8_0"
    assert choose_type(frozenset({-200, 15}), 256, 256) is None
