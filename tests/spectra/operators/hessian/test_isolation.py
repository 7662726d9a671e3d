"""What measuring leaves as it was, and how it stops where something is not finite."""

import random

import numpy as np
import pytest
import tiny_models
import torch
from oracles import dense_gradient, dense_hessian, normal, random_state, relative_error, same_random_state
from torch import nn
from torch.nn import functional

import spectra


@pytest.mark.parametrize("guard", [torch.no_grad, torch.enable_grad])
def test_grad_mode_of_the_caller_does_not_matter(guard):
    model, batches = tiny_models.mlp(), tiny_models.regression((9,))
    with guard():
        op = spectra.HessianOperator(model, batches)
        product, gradient, loss = op @ normal(51, seed=0), op.gradient(), op.loss()
        enabled = torch.is_grad_enabled()
    assert enabled == (guard is torch.enable_grad)
    truth = functional.mse_loss(model(batches[0][0]), batches[0][1])
    dense = dense_hessian(truth, list(model.parameters()))
    assert relative_error(product, dense @ normal(51, seed=0)) < 1e-10
    assert relative_error(gradient, dense_gradient(truth, list(model.parameters()))) < 1e-10
    assert loss == pytest.approx(truth.item())
    assert not gradient.requires_grad


def snapshot(model):
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": gradients,
        "gradient objects": [id(p.grad) for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "pointers": [p.data_ptr() for p in model.parameters()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "random": random_state(),
    }


def unchanged(one, other):
    assert one["modes"] == other["modes"]
    assert all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])
    for a, b in zip(one["gradients"], other["gradients"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for name in ("gradient objects", "requires", "pointers", "hooks"):
        assert one[name] == other[name], name
    assert same_random_state(one["random"], other["random"])


def networks():
    conv = tiny_models.conv_net(dropout=0.3).train()
    conv.norm.eval()  # mixed modes
    conv.head.bias.requires_grad_(False)
    language = tiny_models.causal_lm("gpt2").train()
    yield conv, tiny_models.images((4, 3)), "conv"
    yield language, tiny_models.token_batches(), "gpt2"


@pytest.mark.parametrize("kept_gradients", [False, True])
@pytest.mark.parametrize("which", [0, 1], ids=["conv", "gpt2"])
def test_the_model_is_left_as_it_was(which, kept_gradients):
    model, batches, _ = list(networks())[which]
    if kept_gradients:
        for parameter in list(model.parameters())[::2]:
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.5)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global state is what is checked
    torch.manual_seed(3)
    before = snapshot(model)
    op = spectra.HessianOperator(model, batches)
    unchanged(before, snapshot(model))
    op @ torch.zeros(op.shape[1], dtype=torch.float64)
    op @ normal(op.shape[1], 2, seed=0)
    op.gradient()
    op.loss()
    op.symmetry_gap()
    unchanged(before, snapshot(model))
    op.close()
    unchanged(before, snapshot(model))
    inputs = batches[0][0] if which == 0 else batches[0]["input_ids"]
    model.train()
    output = model(inputs)  # and it still trains
    (output if which == 0 else output.logits).sum().backward()


def test_a_failed_measurement_leaves_the_model_as_it_was():
    model, batches = tiny_models.conv_net(dropout=0.3).train(), tiny_models.images((4, 3))
    batches[1][0][0, 0, 0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(spectra.NonFiniteError):
        spectra.HessianOperator(model, batches) @ normal(48, seed=0)
    unchanged(before, snapshot(model))


def test_dropout_does_not_make_it_random():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double().train()
    op = spectra.HessianOperator(model, tiny_models.regression((9,)))
    v = normal(51, seed=0)
    first = op @ v
    torch.manual_seed(99)
    assert torch.equal(op @ v, first)
    assert torch.equal(spectra.HessianOperator(model, tiny_models.regression((9,))) @ v, first)


# not finite


def failure(model, batches, **options):
    n = sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(spectra.NonFiniteError) as caught:
        spectra.HessianOperator(model, batches, **options) @ normal(n, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, spectra.InputError)
    assert isinstance(caught.value, ValueError)
    return message


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_name_the_batch(value):
    messages = []
    for bad in (0, 2):
        batches = tiny_models.regression((4, 3, 2))
        batches[bad][0][1, 1] = value
        messages.append(failure(tiny_models.mlp(), batches, loss=functional.mse_loss))
    if value != value:  # tanh tames an infinite input in the loss; the gradient then names it
        assert all("batch" in message for message in messages)
        assert messages[0] != messages[1]


def test_weights_that_are_not_finite_name_the_parameter():
    for name in ("0.bias", "2.weight"):
        model = tiny_models.mlp()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[1] = torch.nan
        message = failure(model, tiny_models.regression((4, 3)))
        assert name in message
        assert "batch" in message


def test_weights_that_become_not_finite_are_detected():
    model = tiny_models.mlp()
    op = spectra.HessianOperator(model, tiny_models.regression((4, 3)))
    op @ normal(51, seed=0)
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(spectra.NonFiniteError):
        op @ normal(51, seed=0)


def test_a_gradient_that_is_not_finite_names_batch_and_parameter():
    """sqrt at zero: a finite loss with an infinite derivative, in the second batch only."""

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.outer = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x):
            return self.outer * torch.sqrt((x * self.inner) ** 2).sum(1, keepdim=True)

    batches = [
        (torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)),
        (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64) + 5),
    ]
    message = failure(Root(), batches, loss=functional.mse_loss)
    assert "inner" in message
    assert "batch" in message


@pytest.mark.parametrize("options", [{}, {"precision": "float64"}, {"graph": "rebuild"}], ids=str)
def test_the_autocast_of_a_model_that_accelerate_prepared_is_not_measured(options):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # of other tests in this process
    plain, prepared = (tiny_models.mlp().float() for _ in range(2))
    batches = [tuple(t.float() for t in batch) for batch in tiny_models.regression((9,))]
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(prepared)
    inputs, targets = batches[0]
    assert functional.mse_loss(prepared(inputs), targets).item() != functional.mse_loss(plain(inputs), targets).item()
    forward = prepared.forward
    one, other = (spectra.HessianOperator(model, batches, **options) for model in (plain, prepared))
    vector = normal(51, seed=0).to(one.dtype)
    assert torch.equal(one @ vector, other @ vector)
    assert one.loss() == other.loss()
    assert prepared.forward == forward


def calls_backward(model, batch):
    loss = functional.mse_loss(model(batch[0]), batch[1])
    loss.backward(retain_graph=True)
    return loss


def test_a_loss_that_calls_backward_adds_to_no_gradient_of_the_caller():
    model, batches = tiny_models.mlp(), tiny_models.regression((9,))
    functional.mse_loss(model(batches[0][0]), batches[0][1]).backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    op = spectra.HessianOperator(model, batches, loss=calls_backward)
    dense = dense_hessian(functional.mse_loss(model(batches[0][0]), batches[0][1]), list(model.parameters()))
    assert relative_error(op @ normal(51, seed=0), dense @ normal(51, seed=0)) < 1e-10
    for parameter, (gradient, values) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, values)


def test_a_loss_that_frees_its_graph_is_refused():
    def loss(model, batch):
        value = functional.mse_loss(model(batch[0]), batch[1])
        value.backward()
        return value

    model, batches = tiny_models.mlp(), tiny_models.regression((9,))
    with pytest.raises(spectra.InputError, match=r"calls \.backward\(\)"):
        spectra.HessianOperator(model, batches, loss=loss).preflight()
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_steps_an_optimizer_is_refused_and_trains_nothing():
    model, batches = tiny_models.mlp(), tiny_models.regression((9,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss(model, batch):
        optimizer.zero_grad()
        value = calls_backward(model, batch)
        optimizer.step()
        return value

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(spectra.InputError, match="writes to the model's weights"):
        spectra.HessianOperator(model, batches, loss=loss).preflight()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class Thawing(nn.Module):
    """Sets requires_grad of all of its parameters in the forward pass, as GANs do."""

    def __init__(self):
        super().__init__()
        self.net = tiny_models.mlp()
        self.net[0].requires_grad_(False)

    def forward(self, x):
        self.net.requires_grad_(True)
        return self.net(x)


def test_a_forward_pass_that_sets_requires_grad_leaves_it_as_it_was():
    model = Thawing()
    before = [p.requires_grad for p in model.parameters()]
    spectra.HessianOperator(model, tiny_models.regression((9,))).preflight()
    assert [p.requires_grad for p in model.parameters()] == before
    assert not all(before)


def test_gradients_that_an_embedding_scales_are_left_out_and_noted():
    tokens = torch.randint(0, 7, (8, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 3
    torch.manual_seed(1)
    embedding = nn.Embedding(7, 3, scale_grad_by_freq=True, dtype=torch.float64)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Tanh(), nn.Linear(12, 3, dtype=torch.float64))
    op = spectra.HessianOperator(model, [(tokens, labels)])
    got = op @ torch.eye(op.shape[0], dtype=op.dtype)
    assert embedding.scale_grad_by_freq
    assert any("scale_grad_by_freq" in note and note.endswith(": 0") for note in op.notes)
    embedding.scale_grad_by_freq = False
    dense = dense_hessian(functional.cross_entropy(model(tokens), labels), list(model.parameters()))
    assert relative_error(got, dense) < 1e-10


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (lambda x: x, "got a function: put its parameters"),
        (nn.Linear, r"got a class: make one, such as Linear\(...\)"),
        ([torch.zeros(3)], "got a list"),
        (type("Trainer", (), {"model": nn.Linear(4, 3)})(), r"got a Trainer: give its \.model"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(model, cause):
    with pytest.raises(spectra.InputError, match=cause):
        spectra.HessianOperator(model, tiny_models.regression((9,)))
    with pytest.raises(spectra.InputError, match="context= must be a function"):
        spectra.HessianOperator(tiny_models.mlp(), tiny_models.regression((9,)), context=3)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "float64"), (torch.float64, None)])
def test_experts_are_measured_in_float64(dtype, precision):
    """torch has no grouped product in float64: the experts are computed one by one, and then as before."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).to(dtype).eval()
    before = model.config._experts_implementation
    ids = torch.arange(12).view(2, 6)
    op = spectra.HessianOperator(model, [{"input_ids": ids, "labels": ids}], precision=precision)
    vector = normal(op.shape[0], seed=0)
    got = op @ vector
    assert model.config._experts_implementation == before
    model.double().set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    parameters = list(model.parameters())
    loss = model(input_ids=ids, labels=ids).loss
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    along = sum((g * v.view_as(g)).sum() for g, v in zip(gradient, vector.split([p.numel() for p in parameters])))  # noqa: B905
    want = torch.cat([part.reshape(-1) for part in torch.autograd.grad(along, parameters)])
    assert relative_error(got, want) < 1e-5
