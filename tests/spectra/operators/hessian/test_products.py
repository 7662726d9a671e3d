"""Products with the Hessian of a network against its dense Hessian."""

import copy
import re

import pytest
import tiny_models
import torch
from oracles import agree, dense_hessian, normal, relative_error
from torch import nn
from torch.nn import functional

import spectra

# networks that compute in float64 throughout


@pytest.mark.parametrize("graph", ["auto", "keep", "rebuild"])
@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("rows", [(9,), (60, 4)])
def test_mlp_regression(rows, microbatch, graph):
    model, batches = tiny_models.mlp(), tiny_models.regression(rows)
    inputs, targets = tiny_models.whole(batches)
    op = spectra.HessianOperator(model, batches, loss=functional.mse_loss, microbatch=microbatch, graph=graph)
    agree(op, model, functional.mse_loss(model(inputs), targets))


@pytest.mark.parametrize("microbatch", [None, 3])
def test_mlp_classification(microbatch):
    model, batches = tiny_models.mlp(), tiny_models.classification((60, 4))
    batches[0][1][5:20] = -100  # microbatches of three in which nothing is counted
    inputs, targets = tiny_models.whole(batches)
    op = spectra.HessianOperator(model, batches, microbatch=microbatch)
    agree(op, model, functional.cross_entropy(model(inputs), targets))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.Identity])
def test_activations(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    batches = tiny_models.classification((10,))
    agree(spectra.HessianOperator(model, batches), model, functional.cross_entropy(model(batches[0][0]), batches[0][1]))


def test_convolution_with_batch_norm():
    model, batches = tiny_models.conv_net(), tiny_models.images((5, 2))
    inputs, targets = tiny_models.whole(batches)
    agree(spectra.HessianOperator(model, batches), model, functional.cross_entropy(model(inputs), targets))


def test_the_loss_is_that_of_evaluation_mode():
    """A model left in training mode is measured without dropout and with the running statistics."""
    model, batches = tiny_models.conv_net(dropout=0.5).train(), tiny_models.images((5, 2))
    evaluated = copy.deepcopy(model).eval()
    inputs, targets = tiny_models.whole(batches)
    op = spectra.HessianOperator(model, batches)
    agree(op, evaluated, functional.cross_entropy(evaluated(inputs), targets))
    assert model.training


def test_a_linear_model_has_its_closed_form():
    """L = mean (x w - y)^2 has the Hessian 2 X^T X / rows, whatever w."""
    model = nn.Linear(5, 1, bias=False).double()
    inputs, targets = normal(30, 5, seed=0), normal(30, 1, seed=1)
    op = spectra.HessianOperator(model, [(inputs, targets)], loss=functional.mse_loss)
    v = normal(5, 2, seed=2)
    torch.testing.assert_close(op @ v, 2 * inputs.T @ (inputs @ v) / 30, rtol=1e-12, atol=1e-12)


def test_parameters_that_the_loss_does_not_use_have_zero_rows():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return torch.tanh(self.used(x))

    torch.manual_seed(0)
    model, batches = Half().double(), tiny_models.regression((8,))
    inputs, targets = batches[0]
    op = spectra.HessianOperator(model, batches)
    agree(op, model, functional.mse_loss(model(inputs), targets))
    assert not (op @ normal(30, seed=0))[15:].any()


def test_a_last_layer_that_enters_linearly():
    """Only the bias before a linear loss: the Hessian is zero, and its graph does not even reach the parameter."""
    model, batches = nn.Linear(4, 1).double(), [(normal(6, 4, seed=0), normal(6, 1, seed=1))]
    op = spectra.HessianOperator(model, batches, loss=lambda outputs, targets: (outputs * targets).mean())
    assert not (op @ normal(5, seed=2)).any()
    assert op.gradient().any()


# which parameters


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ("0.*", ["0.weight", "0.bias"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        (re.compile("weight$"), ["0.weight", "2.weight"]),
        (nn.Linear, ["0.weight", "0.bias", "2.weight", "2.bias"]),
        (lambda name, parameter: parameter.ndim == 1, ["0.bias", "2.bias"]),
    ],
)
def test_chosen_parameters(params, names):
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 2))
    inputs, targets = tiny_models.whole(batches)
    chosen = [model.get_parameter(name) for name in names]
    op = spectra.HessianOperator(model, batches, params=params)
    agree(op, model, functional.mse_loss(model(inputs), targets), chosen)


def test_an_unknown_pattern_is_refused_with_the_names_there_are():
    with pytest.raises(spectra.InputError) as caught:
        spectra.HessianOperator(tiny_models.mlp(), tiny_models.regression((4,)), params="*attention*")
    message = str(caught.value)
    assert "*attention*" in message
    assert "0.weight" in message
    assert "\n" not in message


def test_frozen_parameters_stay_frozen():
    model, batches = tiny_models.mlp(), tiny_models.regression((9,))
    model[0].requires_grad_(False)
    chosen = list(model[2].parameters())
    op = spectra.HessianOperator(model, batches)
    agree(op, model, functional.mse_loss(model(batches[0][0]), batches[0][1]), chosen)
    assert not model[0].weight.requires_grad


def test_a_frozen_parameter_asked_for_by_name():
    model, batches = tiny_models.mlp(), tiny_models.regression((9,))
    oracle = copy.deepcopy(model)
    model.requires_grad_(False)
    op = spectra.HessianOperator(model, batches, params="0.weight")
    agree(op, oracle, functional.mse_loss(oracle(batches[0][0]), batches[0][1]), [oracle[0].weight])
    op.close()
    assert not any(parameter.requires_grad for parameter in model.parameters())


# transformers' models: their normalisation, softmax and loss drop to float32 inside


def language_oracle(model, batches):
    oracle = copy.deepcopy(model).eval()
    oracle.set_attn_implementation("eager")
    return oracle, tiny_models.language_loss(oracle, batches)


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_causal_language_models(architecture):
    """All parameters of a model as it comes (fused attention, training mode) on padded and unequal batches."""
    model, batches = tiny_models.causal_lm(architecture).train(), tiny_models.token_batches()
    attention = model.config._attn_implementation
    oracle, loss = language_oracle(model, batches)
    agree(spectra.HessianOperator(model, batches), oracle, loss, tolerance=1e-6)
    assert model.config._attn_implementation == attention
    assert model.training


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("microbatch", [1, 2])
def test_microbatches_some_of_which_count_nothing(architecture, microbatch):
    model = tiny_models.causal_lm(architecture)
    batches = tiny_models.token_batches(((8, 1, 1, 3), (1,), (6, 2)))
    oracle, loss = language_oracle(model, batches)
    op = spectra.HessianOperator(model, batches, params="*mlp*", microbatch=microbatch)
    chosen = [parameter for name, parameter in oracle.named_parameters() if "mlp" in name]
    agree(op, oracle, loss, chosen, tolerance=1e-6)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "*"])
def test_tied_embeddings_under_either_name(name):
    model, batches = tiny_models.causal_lm("llama-tied"), tiny_models.token_batches()
    oracle, loss = language_oracle(model, batches)
    chosen = list(oracle.parameters()) if name == "*" else [oracle.lm_head.weight]
    agree(spectra.HessianOperator(model, batches, params=name), oracle, loss, chosen, tolerance=1e-6)


def test_left_padding():
    """Against the rows one by one without padding: rotary positions are relative, so nothing else may change.

    In float32, because transformers' mask for float64 overflows in its own float32 softmax.
    """
    model, (padded,) = tiny_models.causal_lm("llama"), tiny_models.token_batches(((8, 5, 3),))
    rows = [{key: value[i : i + 1, :length] for key, value in padded.items()} for i, length in enumerate((8, 5, 3))]
    oracle, loss = language_oracle(model, rows)
    dense = dense_hessian(loss, [p for name, p in oracle.named_parameters() if "self_attn" in name])
    left = {
        key: torch.stack([value.roll(8 - length) for value, length in zip(values, (8, 5, 3), strict=True)])
        for key, values in padded.items()
    }
    assert left["attention_mask"][2].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    for i, length in enumerate((8, 5, 3)):
        left["labels"][i, 8 - length] = -100  # the first token follows nothing
    op = spectra.HessianOperator(model.float(), [left], params="*self_attn*")
    v = normal(len(dense), 2, seed=0)
    assert relative_error((op @ v.float()).double(), dense @ v) < 1e-4


def test_float32_models_are_measured_in_float32():
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches()
    oracle, loss = language_oracle(model, batches)
    dense = dense_hessian(loss, [oracle.lm_head.weight])
    op = spectra.HessianOperator(model.float(), batches, params="lm_head.weight")
    assert op.dtype == torch.float32
    v = normal(len(dense), seed=0, dtype=torch.float32)
    product = op @ v
    assert product.dtype == torch.float32
    assert relative_error(product.double(), dense @ v.double()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    model = tiny_models.causal_lm("llama", dtype=dtype)
    with pytest.raises(spectra.InputError) as caught:
        spectra.HessianOperator(model, tiny_models.token_batches())
    message = str(caught.value)
    assert str(dtype).removeprefix("torch.") in message or "bf16" in message or "fp16" in message
    assert "float32" in message or ".float()" in message  # what to do
    assert "\n" not in message


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_half_precision_can_be_measured_in_a_copy(precision):
    model, batches = tiny_models.causal_lm("llama", dtype=torch.bfloat16), tiny_models.token_batches()
    oracle, loss = language_oracle(copy.deepcopy(model).double(), batches)
    dense = dense_hessian(loss, [oracle.lm_head.weight])
    op = spectra.HessianOperator(model, batches, params="lm_head.weight", precision=precision)
    v = normal(len(dense), seed=0)
    assert str(op.dtype) == f"torch.{precision}"
    assert relative_error((op @ v.to(op.dtype)).double(), dense @ v) < (1e-6 if precision == "float64" else 1e-4)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_the_copy_takes_the_inputs_of_the_original():
    model, ((inputs, targets),) = tiny_models.mlp(dtype=torch.float32), tiny_models.regression((9,))
    inputs, targets = inputs.float(), targets.float()
    oracle = copy.deepcopy(model).double()
    op = spectra.HessianOperator(model, [(inputs, targets)], precision="float64")
    agree(op, oracle, functional.mse_loss(oracle(inputs.double()), targets.double()))


class Filter(nn.Module):
    """A filter of frequencies whose complex numbers are pairs of real ones, behind a bias of odd length."""

    def __init__(self, view):
        super().__init__()
        torch.manual_seed(1)
        self.view = view
        self.a_bias = nn.Parameter(torch.randn(1, 3))
        self.filter = nn.Parameter(torch.randn(3, 2))
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        spectrum = torch.fft.rfft(x) * self.view(self.filter)
        return self.out(torch.tanh(torch.fft.irfft(spectrum, n=4))) + self.a_bias


@pytest.mark.parametrize("engine", ["reverse", "batched", "forward"])
def test_pairs_that_are_viewed_as_complex_numbers(engine):
    model, plain = Filter(torch.view_as_complex).double(), Filter(lambda pairs: torch.complex(*pairs.T)).double()
    x, y = normal(9, 4, seed=0), torch.arange(9) % 3
    op = spectra.HessianOperator(model, [(x, y)], engine=engine)
    dense = dense_hessian(functional.cross_entropy(plain(x), y), list(plain.parameters()))
    vectors = normal(op.shape[0], 3, seed=1)
    assert relative_error(op @ vectors, dense @ vectors) < 1e-10
