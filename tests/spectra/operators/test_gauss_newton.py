"""Gauss-Newton and Fisher operators against dense Jacobians in float64 and against curvlinops."""

import importlib.util
import os
import sys

import numpy as np
import pytest
import tiny_models
import torch
from oracles import dense_hessian, flat, normal, relative_error
from torch import nn
from torch.nn import functional

import spectra


def jacobian(outputs, parameters):
    """dz / d theta, (entries of z, n)."""
    options = {"retain_graph": True, "materialize_grads": True}
    units = torch.eye(outputs.numel(), dtype=outputs.dtype).view(-1, *outputs.shape)
    return torch.stack([flat(torch.autograd.grad(outputs, parameters, unit, **options)) for unit in units])


def dense_gauss_newton(outputs, loss, parameters):
    """J^T H J with H the dense Hessian of loss(z) in the outputs z."""
    z = outputs.detach().requires_grad_()
    j = jacobian(outputs, parameters)
    return j.T @ dense_hessian(loss(z), [z]) @ j


def outer_products(outputs, gradients, weight, parameters):
    """sum_t weight J_t^T g_t g_t^T J_t for terms in the rows of the outputs (terms, entries)."""
    j = jacobian(outputs, parameters).view(*outputs.shape, -1)
    pulled = torch.einsum("tc,tcn->tn", gradients, j)
    return weight * pulled.T @ pulled


def huber(outputs, targets):
    return functional.huber_loss(outputs, targets, delta=0.7)


class Weighted(nn.Module):
    """A loss that is neither a likelihood nor separable over the entries of a row."""

    def forward(self, outputs, targets):
        return ((outputs - targets).square().sum(1) + 0.1).sqrt().mean()


CASES = {
    "default squares": (tiny_models.regression, None, functional.mse_loss),
    "cross-entropy": (tiny_models.classification, functional.cross_entropy, functional.cross_entropy),
    "class weights": (
        tiny_models.classification,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)),
    ),
    "sum": (tiny_models.classification, nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum")),
    "huber": (tiny_models.regression, huber, huber),
    "root": (tiny_models.regression, Weighted(), Weighted()),
    "model and batch": (
        tiny_models.regression,
        lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
        functional.mse_loss,
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [{}, {"engine": "batched"}, {"microbatch": 3}, {"graph": "rebuild"}], ids=str)
def test_agrees_with_dense_jacobians(case, options):
    batches_of, loss, plain = CASES[case]
    model, batches = tiny_models.mlp(), batches_of((9, 4))
    inputs, targets = tiny_models.whole(batches)
    dense = dense_gauss_newton(model(inputs), lambda z: plain(z, targets), list(model.parameters()))
    op = spectra.GaussNewtonOperator(model, batches, loss=loss, **options)
    v = normal(len(dense), 3, seed=0)
    assert relative_error(op @ v, dense @ v) < 1e-10
    assert relative_error(op @ v[:, 0].contiguous(), dense @ v[:, 0]) < 1e-10
    hessian = spectra.HessianOperator(model, batches, loss=loss)
    assert op.loss() == pytest.approx(hessian.loss())
    assert relative_error(op.gradient(), hessian.gradient()) < 1e-12
    assert {"symmetry_gap", "product_error", "slope_error", "gradient_error"} <= set(op.checks)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_language_models_with_padding(architecture):
    """The model's own loss: the logits of counted tokens, each of the same weight."""
    model, batches = tiny_models.causal_lm(architecture).eval(), tiny_models.token_batches()
    parameters, total, count = list(model.parameters()), 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        counted = batch["labels"][:, 1:] != -100
        labels = batch["labels"][:, 1:][counted]
        total = total + dense_gauss_newton(
            logits[counted], lambda z, y=labels: functional.cross_entropy(z, y, reduction="sum"), parameters
        )
        count += len(labels)
    for operator in (spectra.GaussNewtonOperator, spectra.FisherOperator):
        op = operator(model, batches)
        v = normal(op.shape[0], 2, seed=1)
        assert relative_error(op @ v, total @ v / count) < 1e-6  # transformers computes parts in float32


def test_of_one_linear_layer_it_is_the_hessian():
    torch.manual_seed(0)
    model, batches = nn.Linear(4, 3).double(), tiny_models.classification((9, 4))
    hessian = spectra.HessianOperator(model, batches).to_dense()
    assert relative_error(spectra.GaussNewtonOperator(model, batches).to_dense(), hessian) < 1e-12


def test_the_residual_is_the_rest_of_the_hessian():
    model, batches = tiny_models.mlp(), tiny_models.classification((9, 4))
    inputs, targets = tiny_models.whole(batches)
    parameters = list(model.parameters())
    gauss_newton = dense_gauss_newton(model(inputs), lambda z: functional.cross_entropy(z, targets), parameters)
    rest = dense_hessian(functional.cross_entropy(model(inputs), targets), parameters) - gauss_newton
    operators = [kind(model, batches) for kind in (spectra.HessianOperator, spectra.GaussNewtonOperator)]
    residual = spectra.DifferenceOperator(*operators)
    assert relative_error(residual.to_dense(), rest) < 1e-10
    density = spectra.slq(residual, steps=len(rest))
    share = density.negative_share()
    assert share.low <= float((torch.linalg.eigvalsh(rest) < -1e-9).double().mean()) <= share.high
    assert density.origin.mode == "full - gauss-newton"
    assert operators[1].mode == "gauss-newton"
    with pytest.raises(spectra.InputError, match="same parameters"):
        spectra.DifferenceOperator(
            spectra.HessianOperator(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), _pair(2), params="0.*"),
            spectra.GaussNewtonOperator(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), _pair(2), params="1.*"),
        )


def _pair(width):
    return [(torch.randn(5, width), torch.randn(5, width))]


# Fisher


def test_the_empirical_fisher_of_a_cross_entropy():
    model, batches = tiny_models.mlp(), tiny_models.classification((9, 4))
    inputs, targets = tiny_models.whole(batches)
    outputs = model(inputs)
    gradients = (outputs.softmax(-1) - functional.one_hot(targets, 3)).detach()
    dense = outer_products(outputs, gradients, 1 / 13, list(model.parameters()))
    for options in ({}, {"microbatch": 2}, {"engine": "batched"}):
        op = spectra.FisherOperator(model, batches, kind="empirical", **options)
        assert relative_error(op.to_dense(), dense) < 1e-10
    summed = spectra.FisherOperator(model, batches, loss=nn.CrossEntropyLoss(reduction="sum"), kind="empirical")
    assert relative_error(summed.to_dense(), 13 * dense) < 1e-10


def test_the_empirical_fisher_of_a_loss_that_is_no_likelihood():
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))
    inputs, targets = tiny_models.whole(batches)
    outputs = model(inputs)
    gradient = torch.autograd.grad(Weighted()(outputs, targets), outputs, retain_graph=True)[0]
    op = spectra.FisherOperator(model, batches, loss=Weighted(), kind="empirical", weight=lambda batch: len(batch[0]))
    terms = targets.numel()  # as the objective counts targets of this kind
    dense = outer_products(outputs, terms * gradient, 1 / terms, list(model.parameters()))
    assert relative_error(op.to_dense(), dense) < 1e-10


LIKELIHOODS = {
    "classes": (tiny_models.classification, functional.cross_entropy),
    "squares": (tiny_models.regression, functional.mse_loss),
    "bits": (
        lambda rows: [(x, (y > 0).double()) for x, y in tiny_models.regression(rows)],
        nn.BCEWithLogitsLoss(),
    ),
}


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_exact_is_gauss_newton_and_sampled_tends_to_it(case):
    batches_of, loss = LIKELIHOODS[case]
    model, batches = tiny_models.mlp(), batches_of((9, 4))
    exact = spectra.FisherOperator(model, batches, loss=loss, kind="exact").to_dense()
    assert relative_error(exact, spectra.GaussNewtonOperator(model, batches, loss=loss).to_dense()) < 1e-12
    few, many = (
        spectra.FisherOperator(model, batches, loss=loss, kind="sampled", samples=samples, seed=1).to_dense()
        for samples in (5, 300)
    )
    assert relative_error(many, exact) < 0.15
    assert relative_error(many, exact) < relative_error(few, exact)


def test_draws_depend_on_the_seed_alone():
    model, batches = tiny_models.mlp(), tiny_models.classification((9, 4))
    v = normal(51, seed=2)
    one, again, other = (spectra.FisherOperator(model, batches, kind="sampled", seed=seed) @ v for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert relative_error(other, one) > 1e-2


@pytest.mark.parametrize(
    ("loss", "batches_of"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), tiny_models.classification),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)), tiny_models.classification),
        (huber, tiny_models.regression),
    ],
)
@pytest.mark.parametrize("kind", ["sampled", "exact"])
def test_a_loss_of_unknown_distribution_is_refused(loss, batches_of, kind):
    op = spectra.FisherOperator(tiny_models.mlp(), batches_of((9, 4)), loss=loss, kind=kind)
    with pytest.raises(spectra.InputError, match="use kind='empirical' or GaussNewtonOperator"):
        op.loss()


# what is refused


def test_a_penalty_on_the_weights_is_refused():
    model = tiny_models.mlp()

    def penalized(outputs, targets):
        return functional.mse_loss(outputs, targets) + sum(p.square().sum() for p in model.parameters())

    op = spectra.GaussNewtonOperator(model, tiny_models.regression((9,)), loss=penalized)
    with pytest.raises(spectra.InputError, match="another way than through the model's outputs"):
        op.loss()


class OnlyLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tiny_models.mlp()

    def forward(self, x, y):
        return functional.mse_loss(self.inner(x), y)


class TwoOutputs(nn.Module):
    def __init__(self, chained):
        super().__init__()
        self.first, self.second, self.chained = nn.Linear(4, 3).double(), nn.Linear(3, 3).double(), chained

    def forward(self, x):
        y = torch.tanh(self.first(x))
        return y, self.second(y if self.chained else y.detach() + 0 * y)


def test_a_model_that_returns_its_loss_alone_is_refused():
    x, y = tiny_models.regression((9,))[0]
    op = spectra.GaussNewtonOperator(OnlyLoss(), [{"x": x, "y": y}])
    with pytest.raises(spectra.InputError, match="returns nothing but its loss"):
        op.loss()


def both(outputs, targets):
    return functional.mse_loss(outputs[0], targets) + functional.mse_loss(outputs[1], targets)


def test_an_output_that_is_computed_from_another_is_refused():
    torch.manual_seed(0)
    op = spectra.GaussNewtonOperator(TwoOutputs(True), tiny_models.regression((9,)), loss=both)
    with pytest.raises(spectra.InputError, match="computed from another one"):
        op.loss()


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = tiny_models.mlp(0), tiny_models.mlp(1)

    def forward(self, x):
        return self.first(x), self.second(x)


def test_two_outputs():
    model, batches = TwoHeads(), tiny_models.regression((9,))
    op = spectra.GaussNewtonOperator(model, batches, loss=both)
    inputs, targets = batches[0]
    outputs = torch.stack(model(inputs))
    dense = dense_gauss_newton(outputs, lambda z: both(z, targets), list(model.parameters()))
    assert relative_error(op.to_dense(), dense) < 1e-10
    fisher = spectra.FisherOperator(model, batches, loss=both)
    with pytest.raises(spectra.InputError, match="needs one tensor of outputs"):
        fisher.loss()


@pytest.mark.parametrize("options", [{"kind": "other"}, {"kind": "sampled", "samples": 0}, {"engine": "forward"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(spectra.InputError):
        spectra.FisherOperator(tiny_models.mlp(), tiny_models.regression((9,)), **options)


class WrongJacobian(torch.autograd.Function):
    """Twice its input, with the derivative of the identity."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_a_wrong_derivative_is_found():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_models.mlp()

        def forward(self, x):
            return WrongJacobian.apply(self.inner(x))

    op = spectra.GaussNewtonOperator(Model(), tiny_models.regression((9,)))
    with pytest.raises(spectra.InputError, match="WrongJacobian"):
        op.loss()


# beside the Hessian


def test_the_model_is_left_as_it_was():
    model, batches = tiny_models.conv_net(dropout=0.5).train(), tiny_models.images((6,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    op = spectra.GaussNewtonOperator(model, batches)
    op @ normal(op.shape[0], seed=0)
    assert model.training
    assert not model._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_weights_that_moved_are_used():
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))
    op = spectra.GaussNewtonOperator(model, batches)
    v = normal(51, seed=0)
    op @ v
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert relative_error(op @ v, spectra.GaussNewtonOperator(model, batches) @ v) < 1e-12


@pytest.mark.parametrize("kind", ["gauss-newton", "empirical"])
def test_in_float64_it_is_the_same_matrix(kind):
    model, batches = tiny_models.mlp(dtype=torch.float32), tiny_models.classification((9, 4))
    batches = [(x.float(), y) for x, y in batches]
    op = spectra.GaussNewtonOperator(model, batches)
    if kind != "gauss-newton":
        op = spectra.FisherOperator(model, batches, kind=kind)
    precise = op.in_float64()
    v = normal(51, seed=0)
    assert precise.dtype == torch.float64
    assert 1e-9 < relative_error((op @ v).double(), precise @ v) < 1e-5
    block = spectra.blocks_of(op)["2"].in_float64()
    assert relative_error(block.to_dense(), precise.to_dense()[30:, 30:]) < 1e-12


def test_blocks_and_a_probe_measure_it(tmp_path):
    model, batches = tiny_models.causal_lm("llama", dtype=torch.float32), tiny_models.token_batches()
    modes = {"gauss-newton": spectra.GaussNewtonOperator}
    with spectra.SpectrumProbe(
        model, batches, modes=modes, blocks=["model.norm*"], out=tmp_path / "run", probes=1, steps=10, deflate=0
    ) as probe:
        records = probe.step(0)
    assert [record.mode for record in records] == ["gauss-newton", "gauss-newton: model.norm*"]
    assert all(record.is_measured for record in records)
    dense = spectra.GaussNewtonOperator(model, batches, params="model.norm*").to_dense()
    assert records[1].estimates["trace"].value == pytest.approx(dense.trace().item(), rel=1e-3)


# curvlinops, where benchmarks/peers.txt is installed


def curvlinops():
    """The library; skipped where it is not there. PEERS names the folder that it was installed to."""
    folder = os.environ.get("PEERS", os.path.join(sys.prefix, "peers"))
    if os.path.isdir(folder) and folder not in sys.path:
        sys.path.append(folder)
    if importlib.util.find_spec("curvlinops") is None:
        pytest.skip("curvlinops is not installed: make test-peers")
    import curvlinops

    return curvlinops


@pytest.mark.parametrize("case", LIKELIHOODS)
def test_agrees_with_curvlinops(case):
    library = curvlinops()
    batches_of, loss = LIKELIHOODS[case]
    modules = {"classes": nn.CrossEntropyLoss(), "squares": nn.MSELoss(), "bits": loss}
    model, batches = tiny_models.mlp(), batches_of((9, 4))
    parameters = list(model.parameters())
    v = normal(51, 2, seed=4)
    for ours, theirs in (
        (spectra.GaussNewtonOperator(model, batches, loss=loss), library.GGNLinearOperator),
        (spectra.FisherOperator(model, batches, loss=loss, kind="empirical"), library.EFLinearOperator),
    ):
        other = theirs(model, modules[case], parameters, batches)
        assert relative_error(ours @ v, torch.as_tensor(np.asarray((other @ v).detach()))) < 1e-10
