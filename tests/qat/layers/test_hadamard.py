"""The fast Hadamard transform against dense matrices."""

import pytest
import torch
from oracles import normal
from scipy.linalg import block_diag
from scipy.linalg import hadamard as dense_hadamard
from torch.func import vmap

from qat.layers.quantizers.hadamard import block_sizes, hadamard


@pytest.mark.parametrize(
    ("width", "sizes"),
    [
        (0, ()),
        (1, (1,)),
        (7, (4, 2, 1)),
        (64, (64,)),
        (100, (64, 32, 4)),
        (128, (128,)),
        (255, (128, 64, 32, 16, 8, 4, 2, 1)),
        (576, (128, 128, 128, 128, 64)),
    ],
)
def test_it_is_the_dense_transform_and_its_own_inverse(width, sizes):
    assert block_sizes(width) == sizes
    x = normal(5, width, seed=1)
    blocks = [torch.as_tensor(dense_hadamard(size) / size**0.5) for size in sizes]
    dense = torch.as_tensor(block_diag(*blocks)) if blocks else torch.empty(0, 0, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), x @ dense.T, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-13, atol=1e-13)
    assert torch.equal(vmap(hadamard)(x.reshape(5, 1, width)).reshape(5, width), hadamard(x))


def test_autocast_leaves_its_precision_alone():
    x = normal(3, 576, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        transformed = hadamard(x)
    assert transformed.dtype == torch.float32
    torch.testing.assert_close(transformed.double(), hadamard(x.double()), rtol=1e-5, atol=1e-6)
