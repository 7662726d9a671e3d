"""The Hessian as an operator: shapes and types, counts, contexts, and weights that move between products."""

import numpy as np
import pytest
import scipy.sparse.linalg
import tiny_models
import torch
from oracles import agree, dense_hessian, normal, relative_error
from torch.nn import functional

import spectra


@pytest.fixture
def mlp_case():
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))
    inputs, targets = tiny_models.whole(batches)
    dense = dense_hessian(functional.mse_loss(model(inputs), targets), list(model.parameters()))
    return spectra.HessianOperator(model, batches), dense


@pytest.mark.parametrize("shape", [(51,), (51, 1), (51, 5)])
def test_vectors_and_columns_numpy_and_torch(mlp_case, shape):
    op, dense = mlp_case
    v = normal(*shape, seed=0)
    product, as_numpy = op @ v, op @ v.numpy()
    assert isinstance(product, torch.Tensor)
    assert not product.requires_grad
    assert isinstance(as_numpy, np.ndarray)
    assert product.shape == as_numpy.shape == v.shape
    assert relative_error(product, dense @ v) < 1e-10
    np.testing.assert_allclose(as_numpy, product.numpy(), atol=1e-12)


def test_attributes_and_count(mlp_case):
    op, _ = mlp_case
    assert op.dtype == torch.float64
    assert torch.device(op.device).type == "cpu"
    before = op.products
    op @ normal(51, seed=0)
    op @ normal(51, 4, seed=0)
    assert op.products - before == 5


def test_scipy_eigenvalues(mlp_case):
    op, dense = mlp_case
    values = scipy.sparse.linalg.eigsh(op.to_scipy(), k=4, which="BE", return_eigenvectors=False, v0=np.ones(51))
    want = torch.linalg.eigvalsh(dense)[[0, 1, -2, -1]]
    np.testing.assert_allclose(np.sort(values), want.numpy(), atol=1e-8)


def test_a_vector_of_another_size_is_refused(mlp_case):
    op, _ = mlp_case
    with pytest.raises(spectra.InputError, match="51"):
        op @ torch.zeros(50, dtype=torch.float64)


def test_the_engines_above_it_agree_with_the_dense_hessian(mlp_case):
    op, dense = mlp_case
    values = torch.linalg.eigvalsh(dense).numpy()
    density = spectra.slq(op, probes=2, steps=51, seed=0)
    assert density.trace().value == pytest.approx(values.sum(), abs=1e-8)
    assert density.lambda_min().value == pytest.approx(values[0], abs=1e-8)
    np.testing.assert_allclose(spectra.topk(op, 3, which="LM", tol=1e-9).values, np.sort(values[-3:]), atol=1e-6)


def test_the_mean_over_operators_of_one_model():
    model, batches = tiny_models.mlp(), tiny_models.regression((6, 6))
    both = spectra.HessianOperator(model, batches)
    mean = spectra.MeanOperator([spectra.HessianOperator(model, [batch]) for batch in batches])
    v = normal(51, 2, seed=0)
    assert mean.shape == both.shape
    assert relative_error(mean @ v, both @ v) < 1e-12


def test_a_context_is_entered_around_the_forward():
    """Under a context that doubles the first layer's output the operator is that of the doubled network."""
    model, batches = tiny_models.mlp(), tiny_models.regression((9,))

    class Doubled:
        def __enter__(self):
            self.handle = model[0].register_forward_hook(lambda module, arguments, output: 2 * output)

        def __exit__(self, *error):
            self.handle.remove()

    op = spectra.HessianOperator(model, batches, context=Doubled)
    inputs, targets = batches[0]
    hidden = torch.tanh(2 * model[0](inputs))
    agree(op, model, functional.mse_loss(model[2](hidden), targets))
    assert not model[0]._forward_hooks


# weights that move


MOVES = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
}


@pytest.mark.parametrize("graph", ["auto", "keep", "rebuild"])
@pytest.mark.parametrize("optimizer", MOVES)
def test_after_an_optimizer_step_the_new_weights_count(optimizer, graph):
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))
    inputs, targets = tiny_models.whole(batches)
    op = spectra.HessianOperator(model, batches, graph=graph)
    stepper = MOVES[optimizer](model.parameters())
    v = normal(51, seed=0)
    before = op @ v
    for _ in range(2):
        stepper.zero_grad()
        functional.mse_loss(model(inputs), targets).backward()
        stepper.step()
        agree(op, model, functional.mse_loss(model(inputs), targets))
    assert relative_error(op @ v, before) > 1e-2


@pytest.mark.parametrize("graph", ["keep", "rebuild"])
def test_a_gradient_is_the_callers_own(graph):
    model, batches = tiny_models.mlp(), tiny_models.regression((20, 7))
    op = spectra.HessianOperator(model, batches, loss=functional.mse_loss, graph=graph)
    first = op.gradient()
    kept = first.clone()
    first.zero_()
    assert torch.equal(op.gradient(), kept)
    v = normal(op.shape[0], seed=1)
    before = op @ v
    op.gradient().zero_()
    assert torch.equal(op @ v, before)


def test_loaded_or_written_weights_are_used():
    model, batches = tiny_models.mlp(0), tiny_models.regression((9,))
    op = spectra.HessianOperator(model, batches)
    op @ normal(51, seed=0)
    model.load_state_dict(tiny_models.mlp(1).state_dict())
    agree(op, model, functional.mse_loss(model(batches[0][0]), batches[0][1]))
    with torch.no_grad():
        model[2].bias.mul_(3)
    agree(op, model, functional.mse_loss(model(batches[0][0]), batches[0][1]))


def test_frozen_weights_and_buffers_that_move_count_too():
    """A weight outside `params`, and running statistics, are part of the point the Hessian is taken at."""
    model, batches = tiny_models.conv_net(), tiny_models.images((5,))
    inputs, targets = batches[0]
    op = spectra.HessianOperator(model, batches, params="convolution.*")
    chosen = list(model.convolution.parameters())
    agree(op, model, functional.cross_entropy(model(inputs), targets), chosen)
    with torch.no_grad():
        model.head.weight.mul_(2)
    agree(op, model, functional.cross_entropy(model(inputs), targets), chosen)
    model.norm.running_var.mul_(4)
    agree(op, model, functional.cross_entropy(model(inputs), targets), chosen)


def test_writing_through_data_counts_after_a_refresh():
    model, batches = tiny_models.mlp(), tiny_models.regression((9,))
    op = spectra.HessianOperator(model, batches)
    op @ normal(51, seed=0)
    model[0].weight.data.mul_(2)
    op.refresh()
    agree(op, model, functional.mse_loss(model(batches[0][0]), batches[0][1]))


def test_an_operator_stays_usable_after_close():
    model, batches = tiny_models.mlp(), tiny_models.regression((9,))
    op = spectra.HessianOperator(model, batches)
    v = normal(51, seed=0)
    before = op @ v
    op.close()
    op.close()
    assert torch.equal(op @ v, before)


def test_the_same_hessian_in_float64():
    model = tiny_models.mlp(dtype=torch.float32)
    batch = [(inputs.float(), targets) for inputs, targets in tiny_models.classification((9, 5))]
    op = spectra.HessianOperator(model, batch)
    precise = op.in_float64()
    assert precise.dtype == torch.float64
    assert precise.checks == op.checks
    exact = spectra.HessianOperator(model, batch, precision="float64").to_dense()
    assert relative_error(precise.to_dense(), exact) < 1e-14
    assert relative_error(op.to_dense().double(), exact) > 1e-9
    mean = spectra.MeanOperator([op, spectra.HessianOperator(model, batch)]).in_float64()
    assert relative_error(mean.to_dense(), exact) < 1e-14
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert relative_error(precise.to_dense(), exact) > 1e-3  # it follows the weights
    assert precise.in_float64() is None
    assert spectra.HessianOperator(model, batch, precision="float32").in_float64() is None
    assert spectra.MeanOperator([op, precise]).in_float64() is None
    assert spectra.DiagonalOperator(np.arange(3.0)).in_float64() is None
