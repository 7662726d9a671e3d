"""What a loss function may look like, what a model may return, and what is refused in a line."""

import collections
import copy
import dataclasses
import functools

import pytest
import torch
from oracles import dense_gradient, normal
from torch import nn
from torch.nn import functional

import spectra
from spectra import InputError
from spectra.operators.hessian.losses import (
    BatchLoss,
    _refuse_probabilities,
    _same,
    counted,
    counts_for_certain,
    default_loss,
    logits_of,
)

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(0, 3, (7,), generator=torch.Generator().manual_seed(1))
T = torch.randn(7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
CROSS_ENTROPY = functional.cross_entropy


def network(outputs=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


class Returning(nn.Module):
    """A network whose outputs are wrapped by a function of (network, inputs ...)."""

    def __init__(self, wrap, outputs=3):
        super().__init__()
        self.net, self.wrap = network(outputs), wrap

    def forward(self, *inputs):
        return self.wrap(self.net, *inputs)


class Own(nn.Module):
    """A model that returns its own loss."""

    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = network(), wrap

    def forward(self, x, labels=None):
        outputs = self.net(x)
        return self.wrap(CROSS_ENTROPY(outputs, labels), outputs)


def check(model, batch, loss, want):
    """Value and gradient against a scalar computed from the model's network by hand."""
    got = BatchLoss(model, loss)(batch)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    parameters = list(model.parameters())
    assert torch.allclose(dense_gradient(got, parameters), dense_gradient(want, parameters), rtol=1e-10, atol=1e-14)


class Callable:
    scale = 2.0

    def __call__(self, outputs, targets):
        return CROSS_ENTROPY(outputs, targets)

    def scaled(self, outputs, targets):
        return self.scale * CROSS_ENTROPY(outputs, targets)


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.mix = nn.Linear(3, 3).double()

    def forward(self, outputs, targets):
        return CROSS_ENTROPY(self.mix(outputs), targets)


MODULE = Module()


def three(outputs, targets, scale):
    return scale * CROSS_ENTROPY(outputs, targets)


@torch.jit.script
def scripted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        (lambda outputs, targets: CROSS_ENTROPY(outputs, targets), CROSS_ENTROPY),
        (lambda a, b: CROSS_ENTROPY(a, b), CROSS_ENTROPY),
        (lambda *arguments: CROSS_ENTROPY(*arguments), CROSS_ENTROPY),
        (lambda *arguments, **options: CROSS_ENTROPY(*arguments, **options), CROSS_ENTROPY),
        (
            lambda o, t, s=0.1: CROSS_ENTROPY(o, t, label_smoothing=s),
            functools.partial(CROSS_ENTROPY, label_smoothing=0.1),
        ),
        (lambda o, t, *, s=2.0: s * CROSS_ENTROPY(o, t), functools.partial(three, scale=2.0)),
        (functools.partial(three, scale=2.0), functools.partial(three, scale=2.0)),
        (functools.partial(CROSS_ENTROPY, label_smoothing=0.1), functools.partial(CROSS_ENTROPY, label_smoothing=0.1)),
        (Callable(), CROSS_ENTROPY),
        (Callable().scaled, functools.partial(three, scale=2.0)),
        (nn.CrossEntropyLoss(), CROSS_ENTROPY),
        (MODULE, MODULE),
        (scripted, CROSS_ENTROPY),
        (lambda model, batch: CROSS_ENTROPY(model(batch[0]), batch[1]), CROSS_ENTROPY),
        (lambda a, b: CROSS_ENTROPY(a(b[0]), b[1]), CROSS_ENTROPY),
        (lambda model, x, y: CROSS_ENTROPY(model(x), y), CROSS_ENTROPY),
        (lambda o, t: (CROSS_ENTROPY(o, t), {"accuracy": (o.argmax(1) == t).double().mean()}), CROSS_ENTROPY),
        (lambda o, t: {"loss": CROSS_ENTROPY(o, t), "outputs": o}, CROSS_ENTROPY),
        (lambda o, t: CROSS_ENTROPY(o, t)[None], CROSS_ENTROPY),
    ],
)
def test_forms_of_a_loss_of_a_pair(loss, want):
    model = network()
    check(model, (X, Y), loss, want(model(X), Y))


def test_a_loss_of_the_batch_alone():
    model = network()
    check(model, (X, Y), lambda batch: CROSS_ENTROPY(model(batch[0]), batch[1]), CROSS_ENTROPY(model(X), Y))


def test_the_names_of_the_parameters_say_that_targets_come_first():
    model, targets = network(), T.softmax(1)

    def keras(y_true, y_pred):
        return -(y_true * y_pred.log_softmax(1)).sum(1).mean()

    check(model, (X, targets), keras, keras(targets, model(X)))
    check(
        model,
        {"input": X, "labels": Y},
        lambda outputs, labels: CROSS_ENTROPY(outputs, labels),
        CROSS_ENTROPY(model(X), Y),
    )


def test_a_loss_of_three_members():
    model, weights = network(), torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(outputs, targets, weights):
        return (CROSS_ENTROPY(outputs, targets, reduction="none") * weights).sum() / weights.sum()

    check(model, (X, Y, weights), loss, loss(model(X), Y, weights))
    pair = Returning(lambda net, a, b: (net(a), net(b)))
    signs = torch.where(weights > 0.5, 1.0, -1.0).double()
    want = functional.cosine_embedding_loss(pair.net(X), pair.net(X + 1), signs)
    check(pair, (X, X + 1, signs), lambda o, t: functional.cosine_embedding_loss(*o, t), want)


def test_a_tensor_alone_is_its_own_target():
    model = network(outputs=4)
    for batch in (X, (X,)):
        check(model, batch, nn.MSELoss(), functional.mse_loss(model(X), X))


def test_one_tensor_in_a_tuple_stays_one_where_the_loss_takes_it_so():
    model = network(outputs=4)
    check(model, (X,), lambda o, b: ((o - b[0]) ** 2).mean(), functional.mse_loss(model(X), X))


@dataclasses.dataclass
class Logits:
    logits: torch.Tensor


@dataclasses.dataclass
class Scores:
    scores: torch.Tensor
    depth: int = 3


Named = collections.namedtuple("Named", "logits extra")


@pytest.mark.parametrize("loss", [None, CROSS_ENTROPY, lambda o, t: CROSS_ENTROPY(o, t)])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda net, x: (net(x), x),
        lambda net, x: (x, net(x)),
        lambda net, x: [net(x)],
        lambda net, x: (net[0](x)[:, :, None].expand(-1, -1, 2), net(x)),
        lambda net, x: {"logits": net(x), "features": net[0](x)},
        lambda net, x: {"scores": net(x)},
        lambda net, x: {"values": net(x), "x": x},
        lambda net, x: Logits(net(x)),
        lambda net, x: Scores(net(x)),
        lambda net, x: Named(net(x), x),
    ],
)
def test_outputs_of_a_model(wrap, loss):
    model = Returning(wrap)
    check(model, (X, Y), loss, CROSS_ENTROPY(model.net(X), Y))


@pytest.mark.parametrize(
    "wrap", [lambda loss, o: loss, lambda loss, o: {"loss": loss, "logits": o}, lambda loss, o: (loss, o)]
)
def test_a_model_that_returns_its_own_loss(wrap):
    model = Own(wrap)
    check(model, {"x": X, "labels": Y}, None, CROSS_ENTROPY(model.net(X), Y))


def test_members_that_the_model_does_not_take_are_left_out_and_noted():
    model = Own(lambda loss, o: loss)
    loss = BatchLoss(model, None)
    loss({"x": X, "labels": Y, "idx": torch.arange(7), "name": ["a"] * 7})
    assert loss.notes == ["members of the batches that the model does not take were left out: idx, name"]


@pytest.mark.parametrize("compile", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_compiled_models_are_called_by_position(compile):
    model = network()
    check(compile(model), (X, Y), None, CROSS_ENTROPY(model(X), Y))


class Custom(Exception):
    pass


def raising(error):
    def loss(outputs, targets):
        raise error

    return loss


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (lambda o, t: CROSS_ENTROPY(o, t, reduction="none"), "reduce it to a mean"),
        (lambda o, t: CROSS_ENTROPY(o, t).item(), "got a float"),
        (lambda o, t: None, "NoneType"),
        (lambda o, t: (CROSS_ENTROPY(o, t), o.square().mean()), "got a tuple"),
        (lambda o, t: CROSS_ENTROPY(o, t) * 1j, "complex"),
        (lambda o, t: functional.mse_loss(o, t[:, None].double()), "broadcast"),
        (raising(ZeroDivisionError("division by zero")), "division by zero"),
        (raising(Custom("first\nsecond")), "first"),
        (raising(NotImplementedError()), "NotImplementedError"),
        (lambda a, b, c, d: 0, "number of arguments"),
        (lambda: 0, "number of arguments"),
        (lambda a, b: CROSS_ENTROPY(a(b[0]), b[1]) if callable(a) else 2 * CROSS_ENTROPY(a, b), "different values"),
    ],
)
def test_what_is_no_loss_is_refused_in_a_line(loss, cause):
    with pytest.raises(InputError, match=cause) as error:
        BatchLoss(network(), loss)((X, Y))
    assert "\n" not in str(error.value)


def test_an_error_in_a_later_batch_names_it():
    loss = BatchLoss(network(), lambda o, t: raising(Custom("odd"))(o, t) if len(o) == 3 else CROSS_ENTROPY(o, t))
    loss((X, Y))
    with pytest.raises(InputError, match=r"batch 5 .*odd"):
        loss((X[:3], Y[:3]), "batch 5")


def test_memory_errors_pass():
    with pytest.raises(torch.OutOfMemoryError):
        BatchLoss(network(), raising(torch.OutOfMemoryError("CUDA out of memory")))((X, Y))


def test_two_members_that_fit_are_refused():
    with pytest.raises(InputError, match="picks one"):
        BatchLoss(Returning(lambda net, x: {"a": net(x), "b": net(2 * x)}), CROSS_ENTROPY)((X, Y))


@pytest.mark.parametrize(
    ("shape", "targets", "cause"),
    [
        ((6, 4, 4), torch.zeros(6, 4, dtype=torch.long), "second axis and on the last"),
        ((6, 1), torch.zeros(6, dtype=torch.long), "one class"),
        ((6, 3), torch.zeros(6, 1, dtype=torch.long), "do not fit"),
        ((6, 1), torch.zeros(6), "broadcast"),
        ((6, 3), torch.zeros(6, 3, dtype=torch.bool), "bool"),
        ((6, 3), [0] * 6, "tensor"),
    ],
)
def test_a_default_loss_that_does_not_fit_is_refused(shape, targets, cause):
    with pytest.raises(InputError, match=cause):
        default_loss(torch.zeros(shape), targets)


def test_default_losses():
    g = torch.Generator().manual_seed(0)
    maps, labels = torch.randn(2, 3, 4, 5, generator=g), torch.randint(0, 3, (2, 4, 5), generator=g)
    assert default_loss(maps, labels) == CROSS_ENTROPY(maps, labels)
    last = maps.permute(0, 2, 3, 1)
    assert default_loss(last, labels).item() == pytest.approx(CROSS_ENTROPY(maps, labels).item(), rel=1e-6)
    assert default_loss(X, X.flip(0)) == functional.mse_loss(X, X.flip(0))
    for dtype in (torch.uint8, torch.int32):
        assert default_loss(T, Y.to(dtype)) == CROSS_ENTROPY(T, Y)


@pytest.mark.parametrize("targets", [(T > 0).double(), T.softmax(1)])
def test_targets_with_two_usual_losses_are_refused(targets):
    with pytest.raises(InputError, match="loss="):
        spectra.HessianOperator(network(), [(X, targets)])


def test_probabilities_with_integer_targets_are_refused():
    with pytest.raises(InputError, match="probabilities"):
        BatchLoss(nn.Sequential(network(), nn.Softmax(1)), None)((X, Y))


def test_logits_of():
    assert logits_of(T) is T
    assert logits_of({"logits": T, "other": X}) is T
    with pytest.raises(InputError, match="pass loss="):
        logits_of({"loss": 3})


def test_counted():
    weight = torch.tensor([1.0, 2.0, 4.0])
    targets = torch.tensor([0, 1, 2, 2, -100])
    assert counted(None, targets, rows=5) == 4
    assert counted(nn.CrossEntropyLoss(ignore_index=2), targets, rows=5) == 3  # -100 is refused by the loss then
    assert counted(nn.CrossEntropyLoss(weight=weight), targets, rows=5) == 11
    assert counted(functools.partial(functional.nll_loss, weight=weight), targets, rows=5) == 11
    assert counted(nn.CrossEntropyLoss(weight=weight), torch.tensor([0, 7, -1]), rows=3) == 1  # not of any class
    assert counted(nn.MultiMarginLoss(weight=weight), targets, rows=5) == 4  # a mean over rows
    assert counted(nn.MSELoss(), T, rows=7) == 21
    assert counted(nn.CrossEntropyLoss(), T.softmax(1), rows=7) == 7
    assert counted(None, {"a": T}, rows=7) == 7
    assert counted(None, torch.tensor(1.5), rows=1) == 1


def test_counts_for_certain():
    model, hugging_face = network(), network()
    hugging_face.config = None
    assert counts_for_certain(nn.MSELoss(), model, (X, T))
    assert counts_for_certain(functools.partial(CROSS_ENTROPY, label_smoothing=0.1), model, (X, Y))
    assert counts_for_certain(None, model, (X, Y))
    assert counts_for_certain(None, hugging_face, {"x": X})
    assert not counts_for_certain(None, model, {"x": X})
    assert not counts_for_certain(lambda o, t: 0, model, (X, Y))
    assert not counts_for_certain(MODULE, model, (X, Y))


def test_a_loss_with_parameters_of_its_own_is_not_changed():
    module = copy.deepcopy(MODULE)
    op = spectra.HessianOperator(network(), [(X, Y)], loss=module)
    op @ torch.ones(op.shape[0], dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), MODULE.parameters(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_an_error_of_a_form_that_works_names_the_form():
    loss = BatchLoss(network(), CROSS_ENTROPY)
    loss((X, Y))
    with pytest.raises(
        InputError, match=r"the loss of b cannot be computed \(loss\(outputs, targets\): .*check that batch"
    ):
        loss((X, Y + 7), "b")
    shifted = BatchLoss(network(), lambda y_true, y_pred: raising(Custom("odd"))(y_pred, y_true))
    with pytest.raises(InputError, match=r"loss\(targets, outputs\): odd"):
        shifted((X, Y))


def test_a_loss_without_a_graph_is_left_for_the_caller_to_refuse():
    value = BatchLoss(network(), lambda o, t: CROSS_ENTROPY(o, t).detach())((X, Y))
    assert not value.requires_grad
    assert value == CROSS_ENTROPY(network()(X), Y)


@pytest.mark.parametrize(
    ("wrap", "cause"),
    [
        (lambda net, x: {"a": net(x)[:, :0], "b": net(x)[:5]}, "5|size|batch"),
        (lambda net, x: "text", "tensor of outputs is expected from the model, got str"),
        (lambda net, x: {"text": "a"}, r"got dict with \['text'\]"),
        (lambda net, x: object(), "got object"),
    ],
)
def test_outputs_for_which_no_loss_can_be_computed(wrap, cause):
    with pytest.raises(InputError, match=cause) as error:
        BatchLoss(Returning(wrap), None)((X, Y))
    assert "\n" not in str(error.value)


def test_two_members_that_fit_are_named():
    model = Returning(lambda net, x: {"a": net(x), "b": net(2 * x), "c": net(3 * x)})
    with pytest.raises(InputError, match="members 'a' and 'b'"):
        BatchLoss(model, CROSS_ENTROPY)((X, Y))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, a, b):
        return self.net(a + b)


def test_members_but_the_last_are_the_inputs_of_a_model_that_takes_them():
    model = Two()
    check(model, (X, X.flip(0), Y), None, CROSS_ENTROPY(model.net(X + X.flip(0)), Y))
    check(model, (X, X.flip(0), Y), CROSS_ENTROPY, CROSS_ENTROPY(model.net(X + X.flip(0)), Y))
    for batch, words in (((X, X, X, Y), "tuple of 4"), ((X,), "tuple of 1"), (X, "got Tensor that")):
        with pytest.raises(InputError, match=words):
            BatchLoss(model, None)(batch)


class Clip(nn.Module):
    """Returns a loss where it is asked to, as contrastive models of transformers do."""

    def __init__(self):
        super().__init__()
        self.net, self.config = network(), {}

    def forward(self, x, return_loss=None, use_cache=None, return_dict=None, **options):
        self.options = {"use_cache": use_cache, "return_dict": return_dict, **options}
        outputs = self.net(x)
        return {"logits": outputs, "loss": outputs.square().mean() if return_loss else None}


def test_a_model_that_returns_no_loss_is_told_how_it_would():
    with pytest.raises(InputError, match=r"returned no loss for a batch with \['x'\]; add 'return_loss': True"):
        BatchLoss(Clip(), None)({"x": X})
    with pytest.raises(InputError, match=r"Own returned no loss .*add 'labels'"):
        BatchLoss(Own(lambda loss, o: {"logits": o}), None)({"x": X, "labels": Y})
    with pytest.raises(InputError, match="returned no loss"):
        BatchLoss(Own(lambda loss, o: (loss, 2 * loss)), None)({"x": X, "labels": Y})


def test_text_is_left_out_of_what_a_model_with_a_config_takes():
    model = Clip()
    loss = BatchLoss(model, None)
    value = loss({"x": X, "return_loss": True, "name": "a", "names": ["a", "b"], "extra": T, "numbers": [1, 2]})
    assert value.item() == pytest.approx(model.net(X).square().mean().item())
    assert set(model.options) == {"use_cache", "return_dict", "extra", "numbers"}
    assert model.options["use_cache"] is False
    assert model.options["return_dict"] is True
    assert loss.notes == ["members of the batches that the model does not take were left out: name, names"]
    loss({"x": X, "return_loss": True, "use_cache": True})
    assert model.options["use_cache"] is True


def test_outputs_of_three_axes_of_hugging_face_hold_classes_last():
    model = Returning(lambda net, x: Logits(net(x)[:, None].expand(-1, 3, -1)))
    targets = Y[:, None].expand(-1, 3)
    check(model, (X, targets), None, CROSS_ENTROPY(model.net(X), Y))
    with pytest.raises(InputError, match="second axis and on the last"):
        BatchLoss(Returning(lambda net, x: net(x)[:, None].expand(-1, 3, -1)), None)((X, targets))


@pytest.mark.parametrize(
    ("outputs", "probabilities"),
    [
        (T.softmax(1), True),
        (T.softmax(1)[:, :, None].expand(-1, -1, 2), True),
        (T[:, None].softmax(2).expand(-1, 2, -1), True),
        (T, False),
        (T.softmax(0), False),
        (T.softmax(1) * 1.001, False),
        (torch.ones(7, 1), False),
        (torch.empty(0, 3), False),
    ],
)
def test_probabilities_are_told_from_logits(outputs, probabilities):
    if not probabilities:
        _refuse_probabilities(outputs, Y)
        return
    with pytest.raises(InputError, match="probabilities already"):
        _refuse_probabilities(outputs, Y)
    _refuse_probabilities(outputs, T)


def test_two_losses_are_the_same_to_six_digits():
    one = torch.tensor(2.0, dtype=torch.float64)
    assert _same(one, one * (1 + 9e-7))
    assert not _same(one, one * (1 + 2e-6))
    assert _same(torch.tensor(float("nan")), torch.tensor(float("nan")))
    assert not _same(one, torch.tensor(float("nan")))
    assert _same(torch.zeros(1), -torch.zeros(1))


def test_the_refusal_of_the_form_that_the_first_name_speaks_for_comes_alone():
    """Of a loss that is written as (model, batch), what other forms raise is of no interest."""

    def loss(model, batch):
        model.modules()
        raise spectra.InputError("this loss cannot be measured")

    op = spectra.HessianOperator(torch.nn.Linear(3, 2), [{"x": torch.ones(2, 3)}], loss=loss)
    with pytest.raises(spectra.InputError, match=r"^this loss cannot be measured$"):
        op.loss()


X32 = X.float()


class ByName(nn.Module):
    """Takes members of a batch by name."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, pixels, labels=None):
        return {"logits": self.net(pixels)}


@pytest.mark.parametrize(
    ("model", "batch", "loss", "advice"),
    [
        (ByName(), {"image": X32, "label": Y}, None, r"takes no member of a batch with image, label: it takes labels"),
        (ByName(), {"image": X32, "label": Y}, CROSS_ENTROPY, r"name the members so, or pass loss=lambda model, batch"),
        (nn.Linear(4, 3), ((3 * X32).long(), Y), None, r"bring its inputs from torch.int64 to torch.float32$"),
        (nn.Linear(4, 3), (X32, Y, ["a"]), nn.CrossEntropyLoss(), r"compute the loss of it yourself, with loss"),
        (ByName(), {"pixels": [X32, X32]}, None, r"'pixels' is a list, as torch's collate function makes of lists"),
        (nn.Linear(4, 3, dtype=torch.float64), (X32.double(), Y), lambda out, y: CROSS_ENTROPY(
            out @ torch.eye(3), y), r"bring what the loss function holds, such as another model, to torch.float64"),
    ],
)  # fmt: skip
def test_the_advice_fits_the_batch(model, batch, loss, advice):
    with pytest.raises(InputError, match=advice):
        BatchLoss(model, loss)(batch)


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 3, 4)])
def test_class_probabilities_count_without_the_axis_of_the_classes(shape):
    """The mean that PyTorch takes is the sum divided by what is counted."""
    logits, targets = (normal(*shape, seed=seed) for seed in (0, 1))
    sums, means = (nn.CrossEntropyLoss(reduction=way)(logits, targets.softmax(0)) for way in ("sum", "mean"))
    assert counted(nn.CrossEntropyLoss(), targets, rows=7) == pytest.approx(float(sums / means))
