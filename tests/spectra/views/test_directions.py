"""Losses along vectors against closed forms, and the layers of vectors against their entries."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

import spectra
from spectra import plots
from spectra.backend.errors import InputError
from spectra.views.directions import MOST_LAYERS, _layers, directions_of, weights_by_layer


@pytest.fixture(autouse=True)
def nothing_is_left_open():
    yield
    plt.close("all")


@pytest.fixture
def op():
    loss = nn.functional.mse_loss
    return spectra.HessianOperator(tiny_models.mlp(), tiny_models.regression([5, 3]), loss=loss)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def lines(ax, *, dashed):
    return [line for line in ax.lines if len(line.get_xdata()) > 2 and line.is_dashed() == dashed]


def test_the_loss_is_that_of_the_model_with_moved_weights_and_the_weights_stay(op):
    before, pairs = state_of(op.model), spectra.topk(op, 4, which="BE", seed=0)
    ax = plots.loss_along(op, pairs, radius=0.3, points=7)
    assert all(torch.equal(value, before[name]) for name, value in op.model.state_dict().items())
    assert op.loss_at(torch.zeros(op.shape[0])) == pytest.approx(op.loss(), rel=1e-12)
    drawn = lines(ax, dashed=False)
    assert len(drawn) == 2
    batches = tiny_models.regression([5, 3])
    inputs, targets = tiny_models.whole(batches)
    for line, column in zip(drawn, (0, 3), strict=True):
        unit = pairs.vectors[:, column]
        for distance, found in zip(*line.get_data(), strict=True):
            moved = tiny_models.mlp()
            for parameter, piece in zip(moved.parameters(), op.space.unflatten(distance * unit), strict=True):
                parameter.data += piece
            assert found == pytest.approx(nn.functional.mse_loss(moved(inputs), targets).item(), rel=1e-9)
    texts = [text.get_text().split(":")[0] for text in ax.get_legend().get_texts()]
    assert texts == ["most negative eigenvalue", "largest eigenvalue", "quadratic model"]


def test_the_loss_of_a_linear_model_is_its_quadratic_model():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    batches = [(torch.randn(6, 3).double(), torch.randn(6, 1).double())]
    op = spectra.HessianOperator(model, batches, loss=nn.functional.mse_loss)
    vectors = torch.randn(4, 2, dtype=torch.float64)
    ax = plots.loss_along(op, vectors, labels=["one", "two"])
    for real, predicted in zip(lines(ax, dashed=False), lines(ax, dashed=True), strict=True):
        np.testing.assert_allclose(real.get_ydata(), predicted.get_ydata(), rtol=1e-9)
        assert np.ptp(real.get_ydata()) > 1e-3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two", "quadratic model"]


def test_what_cannot_be_drawn_is_refused(op):
    with pytest.raises(InputError, match="a HessianOperator is expected"):
        plots.loss_along(spectra.DiagonalOperator(np.ones(4)), np.ones(4))
    n = op.shape[0]
    with pytest.raises(InputError, match=rf"columns \({n}, k\) are expected, got \(3,\)"):
        plots.weight_by_layer(op, np.ones(3))
    with pytest.raises(InputError, match="a vector other than zero"):
        plots.loss_along(op, torch.zeros(n))
    with pytest.raises(InputError, match="two points or more"):
        plots.loss_along(op, torch.ones(n), points=1)
    with pytest.raises(InputError, match="the radius must be positive and finite, got -1"):
        plots.loss_along(op, torch.ones(n), radius=-1)
    with pytest.raises(InputError, match="one label for each of the 1 vectors, got 2"):
        plots.loss_along(op, torch.ones(n), labels=["a", "b"])
    with pytest.raises(InputError, match=rf"an offset \({n},\) is expected"):
        op.loss_at(torch.zeros(2))
    assert not plt.get_fignums()


def test_the_parts_of_layers_are_those_of_the_entries(op):
    vectors = torch.zeros(op.shape[0], 2, dtype=torch.float64)
    vectors[0, 0] = 3.0  # in the first layer's weight
    vectors[-1, 1], vectors[0, 1] = 2.0, 1.0
    names, parts, sizes = weights_by_layer(op, directions_of(op, vectors))
    assert names == ["0", "2"]
    np.testing.assert_allclose(parts, [[1, 0.2], [0, 0.8]])
    np.testing.assert_allclose(sizes, [30 / 51, 21 / 51])
    ax = plots.weight_by_layer(op, vectors, labels=["one", "two"])
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_allclose(widths, [1, 0, 0.2, 0.8])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "2"]


def test_many_layers_are_merged_by_their_outer_names():
    names = [f"model.layers.{i}.{part}.{kind}.weight" for i in range(12) for part in ("a", "b") for kind in "qkv"]
    merged = _layers([*names, "model.norm.weight"])
    assert len(set(merged)) <= MOST_LAYERS
    assert merged[0] == "model.layers.0.a"
    assert _layers(["weight", "bias"]) == ["weight", "bias"]
