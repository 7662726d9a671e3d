"""What an operator assumes of a model: the right matrix comes out, or one line says why not."""

import copy
import random

import pytest
import tiny_models
import torch
from oracles import dense_hessian, normal, relative_error
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import spectra
from spectra import InputError
from spectra.operators.hessian import checks

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between=torch.tanh):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.between = nn.Linear(4, 5), nn.Linear(5, 3), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def dense(model, loss=functional.cross_entropy):
    model = copy.deepcopy(model).double()
    return dense_hessian(loss(model(X.double()), Y), [p for p in model.parameters() if p.requires_grad])


def matrix(op):
    return (op @ torch.eye(op.shape[0], dtype=op.dtype)).double()


def by_differences(model, step=1e-5):
    """Central differences of the gradient in float64, where autograd's second derivative is wrong."""
    parameters = list(model.parameters())

    def gradient(offset):
        with torch.no_grad():
            for p, o in zip(parameters, offset.split([p.numel() for p in parameters]), strict=True):
                p.add_(o.view_as(p))
        found = torch.autograd.grad(functional.cross_entropy(model(X.double()), Y), parameters)
        with torch.no_grad():
            for p, o in zip(parameters, offset.split([p.numel() for p in parameters]), strict=True):
                p.sub_(o.view_as(p))
        return torch.cat([g.reshape(-1) for g in found])

    units = torch.eye(sum(p.numel() for p in parameters), dtype=torch.float64) * step
    return torch.stack([(gradient(u) - gradient(-u)) / (2 * step) for u in units])


class Function(torch.autograd.Function):
    """x -> x with a derivative of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -0.3 * gradient


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.sign(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def hooked(x):
    y = torch.tanh(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: 0.5 * gradient)
    return y


def fake_quantized(x):
    return torch.fake_quantize_per_tensor_affine(torch.tanh(x), 0.05, 0, -128, 127)


@pytest.mark.parametrize(
    ("between", "cause"),
    [
        (Function.apply, "custom autograd.Function Function"),
        (Sign.apply, "custom autograd.Function Sign"),
        (Square.apply, "custom autograd.Function Square"),
        (hooked, "a hook on a tensor"),
        (fake_quantized, "fake quantization"),
        (lambda x: x + (torch.round(4 * x) / 4 - x).detach(), "straight-through"),
        (lambda x: torch.tanh(x) + 0.5 * x.detach(), "detach"),
        (lambda x: checkpoint(torch.tanh, x, use_reentrant=True), "use_reentrant=False"),
        (lambda x: torch.cdist(x, 2 * x + 1)[:, :5], "_cdist_backward"),
        (lambda x: torch.sqrt(torch.relu(x)), "is not finite in parameter"),
    ],
)
def test_what_autograd_gets_wrong_is_refused_with_the_cause(between, cause):
    op = spectra.HessianOperator(Net(between), [(X, Y)])
    with pytest.raises(InputError, match=cause) as error:
        op @ torch.ones(op.shape[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "between",
    [
        functional.relu,
        lambda x: functional.max_pool1d(x[:, None], 3, stride=1, padding=1)[:, 0],
        functional.gelu,
        lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
        torch.vmap(lambda row: torch.tanh(row) * row.sum()),
        lambda x: x.clone().mul_(x).add_(1),
    ],
)
def test_ordinary_models_pass_and_are_right(between):
    op = spectra.HessianOperator(Net(between), [(X, Y)])
    assert relative_error(matrix(op), dense(Net(between))) < 1e-5
    assert op.checks["product_error"] < checks.QUICK_TOLERANCE
    assert op.checks["slope_error"] < checks.SLOPE_TOLERANCE
    assert not op.notes


def test_a_large_piecewise_linear_network_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 3))
    x, y = torch.randn(256, 64), torch.randint(0, 3, (256,))
    op = spectra.HessianOperator(model, [(x, y)])
    op.preflight()
    assert op.checks["product_error"] < 1e-4


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_is_computed_by_operations_with_a_right_second_derivative(old):
    def network():
        torch.manual_seed(1)
        normed = torch.nn.utils.weight_norm if old else torch.nn.utils.parametrizations.weight_norm
        return nn.Sequential(normed(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))

    got = matrix(spectra.HessianOperator(network(), [(X, Y)]))
    assert relative_error(got, by_differences(network().double())) < 1e-5


def test_spectral_norm_is_right_in_evaluation_mode_and_refused_while_it_iterates():
    torch.manual_seed(1)
    model = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    assert relative_error(matrix(spectra.HessianOperator(model, [(X, Y)])), dense(model.eval())) < 1e-5
    with pytest.raises(InputError, match="products of this model are wrong"):
        spectra.HessianOperator(model, [(X, Y)], training=True).preflight()


def test_backward_hooks_of_modules_and_parameters_are_left_out_and_noted():
    model, calls = Net(), []
    model.a.register_full_backward_hook(lambda module, inputs, outputs: calls.append(1) or (inputs[0],))
    model.b.weight.register_hook(lambda gradient: calls.append(2) or 0.1 * gradient)
    op = spectra.HessianOperator(model, [(X, Y)])
    assert relative_error(matrix(op), dense(Net())) < 1e-5
    assert not calls
    assert any("gradient hooks" in note and "b.weight, a" in note for note in op.notes)
    model(X).sum().backward()
    assert sorted(calls) == [1, 2]  # they run again


class Drawing(Net):
    """Adds numbers drawn from a source to its outputs."""

    def __init__(self, source):
        super().__init__()
        self.generator = {"torch": torch.Generator().manual_seed(3), "python": random.Random(3)}.get(source)
        self.source = source

    def forward(self, x):
        if self.source == "global":
            return super().forward(x) * (1 + torch.rand(()))
        if self.source == "torch":
            return super().forward(x) * (1 + torch.rand((), generator=self.generator))
        return super().forward(x) * (1 + self.generator.random())


@pytest.mark.parametrize("source", ["global", "torch", "python"])
def test_a_loss_that_draws_in_evaluation_mode_is_refused_and_its_generator_put_back(source):
    model = Drawing(source)
    state = {"torch": "get_state", "python": "getstate"}.get(source)
    before = getattr(model.generator, state)() if state else None
    with pytest.raises(InputError, match="not a deterministic function"):
        spectra.HessianOperator(model, [(X, Y)]).preflight()
    if source == "torch":
        assert torch.equal(before, model.generator.get_state())
    if source == "python":
        assert before == model.generator.getstate()


@pytest.mark.parametrize("graph", ["keep", "rebuild"])
def test_dropout_in_training_mode_has_one_mask_for_all_products(graph):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    op = spectra.HessianOperator(model, [(X, Y)], training=True, graph=graph)
    v = normal(op.shape[0], seed=0).float()
    first = op @ v
    torch.randn(7)
    assert torch.equal(first, op @ v)


class Detached(Net):
    def forward(self, x):
        with torch.no_grad():
            inner = torch.tanh(self.a(x))
        return self.b(inner)


def test_parameters_used_under_no_grad_are_refused():
    with pytest.raises(InputError, match=r"depends on 'a.weight', and autograd does not see it"):
        spectra.HessianOperator(Detached(), [(X, Y)]).preflight()
    op = spectra.HessianOperator(Detached(), [(X, Y)], params="b.*")
    assert relative_error(matrix(op), dense(Net())[25:, 25:]) < 1e-5


def test_parameters_that_the_loss_does_not_use_are_named():
    model = Net()
    model.idle = nn.Linear(2, 2)
    op = spectra.HessianOperator(model, [(X, Y)])
    assert not matrix(op)[43:].any()
    assert op.notes == ["parameters that the loss does not use, whose rows are zero: idle.weight, idle.bias"]


@pytest.mark.parametrize("precision", [None, "float64"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_penalty_on_a_list_of_parameters_counts_also_where_its_gradient_is_zero(precision, frozen):
    model = Net().requires_grad_(not frozen)
    held = list(model.parameters())
    anchor = [p.detach().clone() for p in held]

    def loss(outputs, targets):
        penalty = sum((p - a).square().sum() for p, a in zip(held, anchor, strict=True))
        return functional.cross_entropy(outputs, targets) + 0.3 * penalty

    op = spectra.HessianOperator(model, [(X, Y)], params="*", loss=loss, precision=precision)
    assert relative_error(matrix(op), dense(Net()) + 0.6 * torch.eye(43)) < 1e-5
    assert all(p.requires_grad is not frozen for p in held)


def test_a_loss_that_holds_a_tensor_made_from_a_parameter_is_refused():
    model = Net()
    view = model.a.weight.view(-1)
    op = spectra.HessianOperator(
        model, [(X, Y)], loss=lambda o, t: functional.cross_entropy(o, t) + view.square().sum()
    )
    with pytest.raises(InputError, match="made from the model's parameters before"):
        op.preflight()


@pytest.mark.parametrize("precision", [None, "float64"])
def test_constants_of_a_loss_follow_a_copy_in_another_precision(precision):
    weight = torch.tensor([1.0, 5.0, 0.2])
    truth = dense(Net(), lambda outputs, y: functional.cross_entropy(outputs, y, weight=weight.to(outputs.dtype)))
    for loss in (nn.CrossEntropyLoss(weight=weight), lambda o, t: functional.cross_entropy(o, t, weight=weight)):
        op = spectra.HessianOperator(Net(), [(X, Y)], loss=loss, precision=precision)
        assert relative_error(matrix(op), truth) < 1e-5
    assert weight.dtype == torch.float32


def fused_step(model):
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def assigned(model):
    model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "write",
    [fused_step, assigned, lambda m: m.a.weight.data.mul_(2), lambda m: m.a.weight.data.neg_()],
    ids=["fused optimizer", "load_state_dict(assign=True)", ".data", ".data, same norm"],
)
def test_new_weights_are_noticed_however_they_were_written(write):
    model = Net()
    op = spectra.HessianOperator(model, [(X, Y)])
    op @ torch.ones(43)
    write(model)
    assert relative_error(matrix(op), dense(model)) < 1e-5


def tie(model):
    model["b"].weight = model["a"].weight


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16, tie])
def test_a_model_that_became_another_one_is_refused(change):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.forward = lambda x: model["b"](torch.tanh(model["a"](x)))
    op = spectra.HessianOperator(model, [(X, Y)])
    op.preflight()
    change(model)
    with pytest.raises(InputError, match="make a new operator"):
        op @ torch.ones(40)


class Stateful(Net):
    """Keeps counters, lists, tensors without a name and its last output, as models with telemetry do."""

    def __init__(self):
        super().__init__()
        self.calls, self.history, self.mean, self.last = 0, [], torch.zeros(3), None

    def forward(self, x):
        out = super().forward(x)
        self.calls += 1
        self.history.append(self.calls)
        self.mean.mul_(0.9).add_(out.detach().mean(dim=0))
        self.last = out
        return out


def test_what_a_forward_pass_leaves_on_modules_is_put_back():
    model = Stateful()
    spectra.HessianOperator(model, [(X, Y)]).preflight()
    assert (model.calls, model.history, model.last) == (0, [], None)
    assert not model.mean.any()


def test_an_embedding_with_max_norm_is_measured_at_its_renormalised_weights():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.table, self.head = nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 3)

        def forward(self, tokens):
            return self.head(torch.tanh(self.table(tokens)).mean(dim=1))

    tokens = torch.randint(0, 5, (12, 4), generator=torch.Generator().manual_seed(0))
    model, other = Bag(), Bag()
    op = spectra.HessianOperator(model, [(tokens, Y)])
    other(tokens)
    other = other.double()
    truth = dense_hessian(functional.cross_entropy(other(tokens), Y), list(other.parameters()))
    assert relative_error(matrix(op), truth) < 1e-5
    assert op.checks["product_error"] < 1e-4
    assert torch.equal(model.table.weight, Bag().table.weight)


@pytest.mark.parametrize("steps", [300, 3000])
def test_a_trained_network_with_a_vanishing_gradient_is_not_refused(steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    targets = torch.randn(12, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.mse_loss(model(X), targets).backward()
        optimizer.step()
    spectra.HessianOperator(model, [(X, targets)]).preflight()


def test_a_saturated_model_has_a_hessian_of_zeros():
    """Its gradient is zero in every entry, so no entry can be left out of the direction of the differences."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e6, 0.0], [-1e6, 0.0]]))
    batches = [(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1]))]
    with spectra.HessianOperator(model, batches) as op:
        assert not (op @ torch.ones(6)).any()
        assert op.checks["product_error"] == 0


def test_strict_false_measures_all_the_same_and_says_so():
    op = spectra.HessianOperator(Net(Function.apply), [(X, Y)], strict=False)
    assert (op @ torch.ones(op.shape[0])).any()
    assert "products of this model are wrong" in op.unverified
    assert any("strict=False" in note for note in op.notes)


def test_an_engine_that_cannot_multiply_says_so():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    op = spectra.HessianOperator(model, [(X, Y)], training=True, engine="forward")
    with pytest.raises(InputError, match="engine='forward' cannot multiply"), pytest.warns(match="cannot be compiled"):
        op.preflight()


def test_a_block_that_disagrees_with_a_checked_product_is_refused(monkeypatch):
    op = spectra.HessianOperator(Net(), [(X, Y)], engine="batched")
    op.preflight()
    run = op._engine._run
    monkeypatch.setattr(op._engine, "_run", lambda engine, v: run(engine, v) * (1 if len(v) == 1 else 1.1))
    with pytest.raises(InputError, match="other products for 3 vectors at once"):
        op @ torch.ones(43, 3)


def test_reentrant_checkpointing_of_a_language_model_is_switched_off():
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches()
    op = spectra.HessianOperator(model, batches)
    v = normal(op.shape[0], seed=0)
    want = op @ v
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    for training in (False, True):
        assert relative_error(spectra.HessianOperator(model, batches, training=training) @ v, want) < 1e-6
