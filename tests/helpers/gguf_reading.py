"""A reader of Q1_0, which the `gguf` package has no dequantization of."""

import numpy as np


class Q1_0:
    """Blocks of a float16 scale and 128 signs, least significant bit first (llama.cpp, ggml-quants.c)."""

    @staticmethod
    def dequantize(blocks):
        rows = np.ascontiguousarray(blocks).reshape(-1, 18)
        scale = rows[:, :2].copy().view("<f2").astype(np.float32)
        bits = np.unpackbits(rows[:, 2:], axis=1, bitorder="little").astype(np.float32)
        return ((2 * bits - 1) * scale).reshape(*blocks.shape[:-1], -1)
