"""Products of float32 matrices are made in float32, and the caller's settings come back, whichever they were."""

import pytest
import torch
from oracles import normal

import spectra
from spectra.backend.float32 import float32_products

BACKENDS = torch.backends
PLACES = (
    BACKENDS,
    BACKENDS.cuda.matmul,
    BACKENDS.mkldnn.matmul,
    BACKENDS.cudnn,
    BACKENDS.cudnn.conv,
    BACKENDS.cudnn.rnn,
    BACKENDS.mkldnn,
)
SETTINGS = {
    "as torch starts": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allowed, as older scripts do": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "allowed everywhere, as the Trainer does": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "the two places differ": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "no convolutions": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
}


def seen():
    """Every setting, those that torch refuses to read among them."""
    older = []
    for read in (torch.get_float32_matmul_precision, lambda: BACKENDS.cudnn.allow_tf32):
        try:
            older.append(read())
        except RuntimeError:
            older.append("refused")
    return [place.fp32_precision for place in PLACES] + older


@pytest.fixture(params=list(SETTINGS))
def setting(request):
    before = seen()
    SETTINGS[request.param]()
    yield request.param
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for place, value in zip(PLACES, before, strict=False):
        place.fp32_precision = value
    assert seen() == before


def exact(device):
    place = BACKENDS.mkldnn if device == "cpu" else BACKENDS.cuda
    return place.matmul.fp32_precision in ("none", "ieee")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inside_products_are_exact_and_outside_as_before(setting, device):
    before = seen()
    with float32_products(torch.device(device)):
        assert exact(device)
    assert seen() == before
    with float32_products(torch.device(device), convolutions=True):
        assert exact(device)
        assert device == "cpu" or BACKENDS.cudnn.conv.fp32_precision in ("none", "ieee")
    assert seen() == before
    with float32_products(torch.device(device), tf32=True, convolutions=True):
        assert BACKENDS.cuda.matmul.fp32_precision == "tf32"
    assert seen() == before


def test_an_error_inside_leaves_the_settings_too(setting):
    before = seen()
    with pytest.raises(KeyError), float32_products(torch.device("cuda"), convolutions=True):
        raise KeyError
    assert seen() == before


class Watched(spectra.DiagonalOperator):
    """Notes whether it is multiplied in exact arithmetic."""

    def _multiply_rows(self, vectors):
        self.exact = [*getattr(self, "exact", []), exact("cpu")]
        return super()._multiply_rows(vectors)


@pytest.mark.parametrize(
    "measure",
    [
        lambda op: spectra.slq(op, probes=2, steps=5, deflate=2),
        lambda op: spectra.topk(op, 2),
        lambda op: spectra.trace(op, method="hutch++", probes=12),
        lambda op: spectra.resolve(op, budget=60),
        lambda op: spectra.lanczos(op, torch.ones(op.shape[0]), 3),
    ],
    ids=["slq", "topk", "trace", "resolve", "lanczos"],
)
def test_recurrences_are_exact(setting, measure):
    op = Watched(normal(300, seed=1, dtype=torch.float32))
    before = seen()
    measure(op)
    assert len(op.exact) > 1
    assert all(op.exact)
    assert seen() == before


@pytest.mark.parametrize("precision", [None, "float32", "tf32", "bfloat16"])
def test_a_hessian_is_measured_in_the_precision_asked_for(setting, precision):
    before, inside = seen(), []

    class Noting(torch.nn.Tanh):
        def forward(self, x):
            inside.append((BACKENDS.mkldnn.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
            return super().forward(x)

    model = torch.nn.Sequential(torch.nn.Linear(4, 6), Noting(), torch.nn.Linear(6, 3))
    batches = [(normal(3, 4, seed=1, dtype=torch.float32), torch.tensor([0, 1, 2]))]
    op = spectra.HessianOperator(model, batches, precision=precision)
    op.preflight()  # some of its checks are in float32
    op.refresh()
    inside.clear()
    op @ torch.ones(op.shape[0])
    assert inside
    for matmul, autocast in inside:
        assert matmul in (("tf32",) if precision == "tf32" else ("none", "ieee"))
        assert autocast == (precision == "bfloat16")
    assert seen() == before
