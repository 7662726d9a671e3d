"""The weighted sum over batches and microbatches is the loss over all of them, or the record or a refusal says so."""

import contextlib
import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from oracles import dense_hessian, relative_error
from torch import nn
from torch.nn import functional

import spectra
from spectra import InputError
from spectra.backend import ranks
from spectra.operators.hessian import pieces
from spectra.operators.hessian.graphs import GraphStore
from spectra.operators.hessian.objective import Piece

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([1, 2, 0, 1, 1, 1, 2, 0, 2, 0, 2, 0])  # whose class weights are not proportional to rows
WEIGHTS = torch.tensor([1.0, 10.0, 0.2])
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def network(*, norm=False, outputs=3):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.Tanh(), nn.Linear(5, outputs)
    ).eval()


def dense(model, loss, *, training=False):
    """The Hessian in float64 of loss(model), written by hand."""
    model = copy.deepcopy(model).double().train(training)
    return dense_hessian(loss(model), list(model.parameters()))


def matrix(op):
    return (op @ torch.eye(op.shape[0], dtype=op.dtype)).double()


def weighted(outputs, targets, weights=WEIGHTS):
    return functional.cross_entropy(outputs, targets, weight=weights.to(outputs.dtype))


def halves(loss, batches=BATCHES):
    """The mean over batches of a loss."""
    return lambda model: sum(loss(model(x.double()), y) for x, y in batches) / len(batches)


class WeightedModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weights", WEIGHTS)

    def forward(self, outputs, targets):
        return functional.cross_entropy(outputs, targets, weight=self.weights)


def contrastive(outputs, targets):
    z = functional.normalize(outputs, dim=1)
    others = torch.eye(len(z), dtype=z.dtype) * 1e3
    return functional.cross_entropy(2 * z @ z.T - others, torch.arange(len(z)).roll(1))


# -- shares


@pytest.mark.parametrize("microbatch", [None, 1, 3])
@pytest.mark.parametrize(
    "loss",
    [
        weighted,
        WeightedModule(),
        nn.CrossEntropyLoss(weight=WEIGHTS),
        functools.partial(functional.cross_entropy, weight=WEIGHTS),
    ],
    ids=["closure", "own module", "module", "partial"],
)
def test_class_weights_count(loss, microbatch):
    model = network()
    op = spectra.HessianOperator(model, BATCHES, loss=loss, microbatch=microbatch)
    assert relative_error(matrix(op), dense(model, lambda m: weighted(m(X.double()), Y))) < 1e-5


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: functional.cross_entropy(o, t, reduction="sum"),
        lambda o, t: functional.cross_entropy(o, t, reduction="none").sum(),
        functools.partial(functional.cross_entropy, reduction="sum"),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
    ids=["reduction in a closure", "sum in a closure", "partial", "module"],
)
def test_a_sum_adds_up_over_batches(loss, microbatch):
    model = network()
    op = spectra.HessianOperator(model, BATCHES, loss=loss, microbatch=microbatch)
    want = dense(model, lambda m: functional.cross_entropy(m(X.double()), Y, reduction="sum"))
    assert relative_error(matrix(op), want) < 1e-5
    assert (pieces.SUMMED in op.notes) is not isinstance(loss, nn.Module)  # whose reduction says so
    assert pieces.BY_THE_LOSS not in op.notes or microbatch is not None


def test_a_sum_over_the_same_batch_twice():
    model = network()
    loss = nn.functional.mse_loss
    y = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    op = spectra.HessianOperator(model, [(X, y)] * 2, loss=lambda o, t: loss(o, t, reduction="sum"))
    want = dense(model, lambda m: 2 * loss(m(X.double()), y.double(), reduction="sum"))
    assert relative_error(matrix(op), want) < 1e-5


def test_an_ignored_class_in_a_closure_counts_nothing():
    model, loss = network(), lambda o, t: functional.cross_entropy(o, t, ignore_index=1)
    op = spectra.HessianOperator(model, BATCHES, loss=loss)
    assert relative_error(matrix(op), dense(model, lambda m: loss(m(X.double()), Y))) < 1e-5
    assert pieces.BY_THE_LOSS in op.notes


@pytest.mark.parametrize(("rows", "count"), [(1, 24), (5, 40)])
def test_shares_are_not_guessed_where_there_are_more_batches_than_parameters(rows, count):
    torch.manual_seed(1)
    model = nn.Linear(4, 3, bias=False) if rows == 1 else network()
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(rows * count, 4, generator=g), torch.randint(0, 3, (rows * count,), generator=g)
    batches = [(x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows)]
    assert count >= sum(p.numel() for p in model.parameters()) - 3
    op = spectra.HessianOperator(model, batches, loss=weighted)
    assert relative_error(matrix(op), dense(model, lambda m: weighted(m(x.double()), y))) < 1e-5


def test_one_batch_of_sixty_that_weighs_otherwise_is_found():
    """Its class is in no other batch, and its group is compared by losses alone."""
    model, g = network(), torch.Generator().manual_seed(5)
    x, y = torch.randn(960, 4, generator=g), torch.randint(0, 2, (960,), generator=g)
    y[16 * 37 + 3] = 2
    loss = functools.partial(weighted, weights=torch.tensor([1.0, 1.0, 50.0]))
    op = spectra.HessianOperator(model, list(zip(x.split(16), y.split(16), strict=True)), loss=lambda o, t: loss(o, t))
    assert relative_error(matrix(op), dense(model, lambda m: loss(m(x.double()), y))) < 1e-5


def test_a_penalty_on_the_weights_counts_once_beside_class_weights():
    model = network()

    def loss(model, batch):
        return weighted(model(batch[0]), batch[1]) + 0.1 * sum((p**2).sum() for p in model.parameters())

    op = spectra.HessianOperator(model, BATCHES, loss=loss, microbatch=3)
    assert relative_error(matrix(op), dense(model, lambda m: loss(m, (X.double(), Y)))) < 1e-5


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def test_dataclasses_are_joined():
    model = network()
    batches = [Pair(*batch) for batch in BATCHES]
    op = spectra.HessianOperator(model, batches, loss=lambda model, batch: weighted(model(batch.x), batch.y))
    assert relative_error(matrix(op), dense(model, lambda m: weighted(m(X.double()), Y))) < 1e-5


def test_given_weights_hold_and_their_microbatches_add_up():
    model = network()
    op = spectra.HessianOperator(model, BATCHES, weight=lambda batch: 1.0, microbatch=3)
    assert relative_error(matrix(op), dense(model, halves(functional.cross_entropy))) < 1e-5


# -- no mean over rows


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("loss", [contrastive, functional.cross_entropy])
def test_the_mean_over_batches_is_measured_and_said(loss, training):
    model = network(norm=True)
    op = spectra.HessianOperator(model, BATCHES, loss=loss, training=training)
    ordinary = loss is functional.cross_entropy and not training
    want = (lambda m: loss(m(X.double()), Y)) if ordinary else halves(loss)
    assert relative_error(matrix(op), dense(model, want, training=training)) < 1e-5
    assert any("plain mean over the 2 batches" in note for note in op.notes) is not ordinary


def test_one_batch_beside_others_that_count_nothing_is_measured_as_it_is():
    model, empty = network(), (X[:0], Y[:0])
    for batches in ([BATCHES[0]], [empty, BATCHES[0]], [BATCHES[0], empty]):
        op = spectra.HessianOperator(model, batches, loss=contrastive)
        assert relative_error(matrix(op), dense(model, lambda m: contrastive(m(X[:4].double()), Y[:4]))) < 1e-5
        assert not op.notes


@pytest.mark.parametrize(("loss", "training"), [(contrastive, False), (None, True)])
def test_microbatches_that_change_the_loss_are_refused(loss, training):
    op = spectra.HessianOperator(network(norm=True), (X, Y), loss=loss, training=training, microbatch=4)
    with pytest.raises(InputError, match=r"not the mean over its microbatches.*leave out microbatch=") as error:
        op @ torch.ones(op.shape[0])
    assert "\n" not in str(error.value)


def test_the_router_loss_of_a_mixture_of_experts_is_no_mean_over_rows():
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(
        vocab_size=20, **shape, **heads, output_router_logits=True, router_aux_loss_coef=0.5
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part, "labels": part} for part in ids.split([1, 3])]
    op = spectra.HessianOperator(model, batches, params="*gate.weight")
    gate = next(p for name, p in model.named_parameters() if name.endswith("gate.weight"))
    want = dense_hessian(sum(model(**batch).loss for batch in batches) / 2, [gate], chunk=1)
    assert relative_error(matrix(op), want.double()) < 1e-4
    assert any("plain mean over the 2 batches" in note for note in op.notes)
    op = spectra.HessianOperator(model, batches[1:], params="*gate.weight", microbatch=1)
    with pytest.raises(InputError, match="microbatch"):
        op @ torch.ones(op.shape[0])


# -- batches that are joined otherwise, or not at all


class Recurrent(nn.Module):
    """(time, batch, 3) -> (time, batch, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x).cumsum(0)))


@pytest.mark.parametrize("sizes", [(3, 3), (2, 4)])
def test_batches_along_the_second_axis_weigh_their_tokens(sizes):
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(5, 6, 3, generator=g), torch.randint(0, 3, (5, 6), generator=g)
    model = Recurrent()
    batches = list(zip(x.split(sizes, dim=1), y.split(sizes, dim=1), strict=True))
    loss = lambda o, t: functional.cross_entropy(o.reshape(-1, 3), t.reshape(-1))  # noqa: E731
    op = spectra.HessianOperator(model, batches, loss=loss)
    assert relative_error(matrix(op), dense(model, lambda m: loss(m(x.double()), y))) < 1e-5
    assert not op.notes


@pytest.mark.parametrize(
    ("loss", "noted"), [(None, False), (nn.MSELoss(), False), (lambda o, t: ((o - t) ** 2).mean(), True)]
)
def test_ragged_regression_weighs_entries_and_says_where_that_is_not_known(loss, noted):
    torch.manual_seed(1)
    model, g = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), torch.Generator().manual_seed(3)
    shapes = ((2, 3), (3, 7))
    batches = [(torch.randn(*s, 2, generator=g), torch.randn(*s, 1, generator=g)) for s in shapes]
    op = spectra.HessianOperator(model, batches, loss=loss)
    squares = lambda m: sum(((m(x.double()) - y.double()) ** 2).sum() for x, y in batches) / 27  # noqa: E731
    assert relative_error(matrix(op), dense(model, squares)) < 1e-5
    assert (pieces.NOT_TOGETHER in op.notes) is noted


class Graph:
    """A batch that is no container of tensors."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return Graph(self.x.to(device), self.y.to(device))


def test_objects_have_equal_weights_and_the_record_says_so():
    model = network()
    loss = lambda model, batch: functional.cross_entropy(model(batch.x), batch.y)  # noqa: E731
    op = spectra.HessianOperator(model, [Graph(*batch) for batch in BATCHES], loss=loss)
    assert relative_error(matrix(op), dense(model, halves(functional.cross_entropy))) < 1e-5
    assert pieces.NOT_TOGETHER in op.notes


# -- memory


class Limited(nn.Module):
    """Runs out of memory above so many rows."""

    def __init__(self, rows):
        super().__init__()
        self.net, self.rows = network(), rows

    def forward(self, x):
        if len(x) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")
        return self.net(x)


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize("options", [{}, {"microbatch": 2}, {"loss": lambda o, t: functional.cross_entropy(o, t)}])
@pytest.mark.parametrize("rows", [4, 8])
def test_comparisons_that_run_out_of_memory_step_down(rows, options):
    model = Limited(rows)
    op = spectra.HessianOperator(model, BATCHES, **options)
    want = dense(model.net, lambda m: functional.cross_entropy(m(X.double()), Y))
    assert relative_error(matrix(op), want) < 1e-5


@pytest.mark.parametrize("name", ["gradient_at", "loss_at", "footprint"])
@pytest.mark.parametrize("loss", [None, weighted, contrastive])
@pytest.mark.parametrize("microbatch", [None, 4])
@pytest.mark.parametrize("allowed", range(0, 12, 3))
def test_out_of_memory_at_any_moment_does_not_escape(monkeypatch, name, loss, microbatch, allowed):
    objective = spectra.HessianOperator(network(), BATCHES, loss=loss, microbatch=microbatch)
    objective._graphs.prepare()
    calls, original = [], getattr(GraphStore, name)

    def failing(self, *arguments, **options):
        calls.append(name)
        if len(calls) > allowed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *arguments, **options)

    monkeypatch.setattr(GraphStore, name, failing)
    refused = microbatch is not None and loss is not None
    with contextlib.suppress(InputError) if refused else contextlib.nullcontext():
        settled, error, note = pieces.settle_shares(objective._graphs)
        assert sum(piece.share for piece in settled.pieces) == pytest.approx(1)
        assert error <= pieces.SUM_TOLERANCE or note
    pieces.may_be_cut(objective._graphs)


# -- what it costs


class Counting(nn.Module):
    rows = passes = 0

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        Counting.rows, Counting.passes = Counting.rows + len(x), Counting.passes + 1
        return self.net(x)


@pytest.mark.parametrize("count", [1, 4, 50, 500])
@pytest.mark.parametrize(
    ("loss", "microbatch", "most_rows", "most_gradients"),
    [
        (None, None, 2.3, 1.4),
        (None, 4, 2.3, 1.4),
        (weighted, None, 3.2, 2.8),
        (contrastive, None, 3.0, 2.6),
    ],
    ids=["mean", "microbatches", "class weights", "contrastive"],
)
def test_batches_are_not_evaluated_many_times(monkeypatch, count, loss, microbatch, most_rows, most_gradients):
    """In evaluations of all rows. A product costs about two gradients, a loss a third of a gradient."""
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 4, generator=g), torch.randint(0, 3, (16,), generator=g)) for _ in range(count)]
    graphs = spectra.HessianOperator(Counting(), batches, loss=loss, microbatch=microbatch)._graphs
    graphs.prepare()
    gradients, original = [], GraphStore.gradient_at

    def gradient_at(self, *arguments, **options):
        before = Counting.rows
        found = original(self, *arguments, **options)
        gradients.append(Counting.rows - before)
        return found

    monkeypatch.setattr(GraphStore, "gradient_at", gradient_at)
    Counting.rows = 0
    pieces.settle_shares(graphs)
    rows = 16 * count
    if count == 1 and microbatch is None:
        assert Counting.rows == 0
    if count >= 50:
        assert Counting.rows <= most_rows * rows
        assert sum(gradients) <= most_gradients * rows
    else:  # every batch is compared by gradients, at moved weights too where that fails
        assert Counting.rows <= 8 * rows


def test_sketches_keep_norms_and_differences():
    graphs = spectra.HessianOperator(network(), BATCHES)._graphs
    comparison = pieces._Comparison(graphs)
    for size in (5, 512, 3000, pieces.PERIOD + 7):
        comparison._signs = None
        g = torch.Generator().manual_seed(size)
        one, other = torch.randn(size, generator=g), torch.ones(size)
        first, second = comparison._sketched(0.0, one)[1], comparison._sketched(0.0, other)[1]
        assert np.linalg.norm(first) == pytest.approx(one.norm().item(), rel=0.2)
        assert np.linalg.norm(first - second) == pytest.approx((one - other).norm().item(), rel=0.2)


class Rows(nn.Module):
    """(rows, time, 4) -> (rows, time, 3)."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, scale=None):
        return self.net(x)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_sum_over_batches_of_several_shapes_is_told_from_a_mean(reduction):
    """They cannot be joined: what their thirds add up to tells."""
    model, g = Rows(), torch.Generator().manual_seed(6)
    batches = [
        (torch.randn(rows, time, 4, generator=g), torch.randint(0, 3, (rows, time), generator=g))
        for rows, time in ((6, 2), (4, 5), (3, 3))
    ]

    def loss(outputs, targets):
        return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)

    op = spectra.HessianOperator(model, batches, loss=lambda o, t: loss(o, t))
    counts = [1.0] * 3 if reduction == "sum" else [targets.numel() / 41 for _, targets in batches]
    pairs = list(zip(counts, batches, strict=True))
    want = dense(model, lambda m: sum(count * loss(m(x.double()), y) for count, (x, y) in pairs))
    assert relative_error(matrix(op), want) < 1e-5
    assert (pieces.SUMMED in op.notes) is (reduction == "sum")


def test_a_sum_divided_by_its_batchs_own_number_is_no_sum():
    model, g = Rows(), torch.Generator().manual_seed(7)
    batches = [
        {
            "x": torch.randn(4, time, 4, generator=g),
            "y": torch.randint(0, 3, (4, time), generator=g),
            "scale": 4.0 * time,
        }
        for time in (2, 5)
    ]

    def loss(model, batch):
        values = functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten(), reduction="sum")
        return values / batch["scale"]

    op = spectra.HessianOperator(model, batches, loss=loss)
    op @ torch.ones(op.shape[0])
    assert pieces.SUMMED not in op.notes


def test_dropout_is_switched_off_where_batches_are_compared():
    x = torch.ones(2, 3, 4, 5)
    with pieces._WithoutDropout():
        for function in (functional.dropout, functional.dropout2d, functional.alpha_dropout, torch.dropout):
            options = {"train": True} if function is torch.dropout else {"training": True}
            assert torch.equal(function(x, 0.5, **options), x)
        assert torch.equal(functional.dropout(input=x, p=0.5, training=True), x)
        q, k, v = torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(0))
        want = functional.scaled_dot_product_attention(q, k, v)
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v, dropout_p=0.9), want)
        assert torch.equal(functional.scaled_dot_product_attention(q, k, v, None, 0.9), want)
        causal = functional.scaled_dot_product_attention(q, k, v, None, 0.9, True)
    assert torch.equal(causal, functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_relative_errors_are_relative_to_what_was_added_up():
    evaluation = pieces._Evaluation
    parts = [evaluation(3.0, np.array([3.0, 4.0])), evaluation(-1.0, np.array([0.0, -2.0]))]
    whole = evaluation(1.0, np.array([3.0, 2.0]))
    exact = evaluation(0.5 * 3.0 + 2.0 * -1.0, np.array([1.5, -2.0]))
    assert pieces._disagreement(exact, parts, [0.5, 2.0]) == 0.0
    # gradients: |(3, 2) - (1.5, -2)| of 0.5 * 5 + 2 * 2; losses: |1 + 0.5| of 0.5 * 3 + 2 * 1
    assert pieces._disagreement(whole, parts, [0.5, 2.0]) == pytest.approx(np.hypot(1.5, 4) / 6.5)
    assert pieces._disagreement(evaluation(9.0, exact.sketch), parts, [0.5, 2.0]) == pytest.approx(9.5 / 9)
    assert pieces._relative(1.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("found", "meant"),
    [([1.0004, 0.9996], [1, 1]), ([0.3, 0.7004], [0.3 / 1.0004, 0.7004 / 1.0004]), ([0.3, 0.8], [0.3, 0.8])],
)
def test_shares_that_are_nearly_what_they_are_meant_to_be(found, meant):
    np.testing.assert_allclose(pieces._rounded(np.array(found)), meant, rtol=1e-12)


@pytest.mark.parametrize(
    ("length", "most", "want"),
    [(3, 5, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (100, 4, [0, 33, 66, 99])],
)
def test_some_of_many_are_spread_evenly(length, most, want):
    assert pieces._evenly_spaced(length, most) == want


def test_shares_are_found_where_no_others_fit():
    """The weights of the classes in each batch; for a batch that is given twice any split of its share fits."""
    graphs = spectra.HessianOperator(network().double(), [(x.double(), y) for x, y in BATCHES], loss=weighted)._graphs
    graphs.prepare()
    comparison = pieces._Comparison(graphs)
    whole, parts = pieces._together(graphs.objective, [0, 1]), [comparison.batch_as_piece(index) for index in (0, 1)]
    wanted = np.array([float(WEIGHTS[y].sum()) for _, y in BATCHES])
    np.testing.assert_allclose(comparison.shares(whole, parts), wanted / wanted.sum(), rtol=1e-5)
    twice = pieces._together(graphs.objective, [0, 0, 1])
    assert comparison.shares(twice, [parts[0], parts[0], parts[1]]) is None
    nearly = Piece((BATCHES[0][0].double() + 1e-6 * torch.arange(4), BATCHES[0][1]), 1.0, "nearly the first")
    three = Piece(tuple(map(torch.cat, zip(parts[0].batch, nearly.batch, parts[1].batch, strict=True))), 1.0, "all")
    assert comparison.shares(three, [parts[0], nearly, parts[1]]) is None  # rounding may have made them differ


@pytest.mark.parametrize(
    ("found", "linked"),
    [
        ([[0.25, 0.75], [0.6, 0.4]], {0: 1 / 6, 1: 1 / 2, 2: 1 / 3}),
        ([[0.25, 0.75], [1.0, 0.0]], {0: 0.25, 1: 0.75, 2: 0.0}),
        ([[0.25, 0.75], [0.0, 1.0]], None),
        ([[0.25, 0.75], [0.6, 0.5]], None),
        ([[0.25, 0.75], None], None),
        ([[1.0, 1.0], [1.0, 1.0]], {0: 1.0, 1: 1.0, 2: 1.0}),
        ([[0.4, 0.8]], {0: 0.4, 1: 0.8}),
    ],
)
def test_shares_of_groups_are_linked_by_the_batch_that_two_have(found, linked):
    graphs = spectra.HessianOperator(network(), [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)])._graphs
    comparison, answers = pieces._Comparison(graphs), iter(found)
    comparison.shares = lambda whole, parts: next(answers)
    got = pieces._shares_of_groups(comparison, [[0, 1], [1, 2]][: len(found)])
    assert got == (linked if linked is None else pytest.approx(linked))


@pytest.mark.parametrize(
    ("inputs", "most_rows", "groups"),
    [
        (1, 100, [[0, 1], [1, 2], [2, 3], [3, 4]]),  # two parameters: two batches at a time
        (12, 100, [[0, 1, 2], [2, 3, 4]]),  # twelve: a quarter of them
        (40, 100, [[0, 1, 2, 3, 4]]),
        (40, 7, [[0, 1, 2], [2, 3, 4]]),  # of two rows each
        (40, 4, [[0, 1], [1, 2], [2, 3], [3, 4]]),
        (40, 3, []),
    ],
)
def test_groups_have_few_rows_and_fewer_batches_than_parameters(inputs, most_rows, groups):
    model = nn.Linear(inputs, 1, bias=inputs == 1)
    batches = [(torch.ones(2, inputs), torch.ones(2, 1))] * 5
    comparison = pieces._Comparison(spectra.HessianOperator(model, batches)._graphs)
    comparison.most_rows = most_rows
    assert list(pieces._groups(comparison, range(5))) == groups
    assert list(pieces._groups(comparison, [2])) == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("loss", [None, weighted])
def test_each_rank_gets_its_part_of_the_shares_of_all(monkeypatch, rank, loss):
    graphs = spectra.HessianOperator(network().double(), [(x.double(), y) for x, y in BATCHES], loss=loss)._graphs
    graphs.prepare()
    monkeypatch.setattr(ranks, "rank_count", lambda: 2)
    monkeypatch.setattr(ranks, "items_of_rank", lambda items: items[rank::2])
    graphs.objective, graphs.over_ranks = graphs.objective.of_this_rank(), True
    settled, _, note = pieces.settle_shares(graphs)
    counts = [float(WEIGHTS[y].sum()) if loss else float(len(y)) for _, y in BATCHES]
    wanted = sorted(((count / sum(counts), index) for index, count in enumerate(counts)), reverse=True)[rank]
    assert [(piece.share, piece.index) for piece in settled.pieces] == [(pytest.approx(wanted[0]), wanted[1])]
    assert note == (pieces.BY_THE_LOSS if loss else "")
    assert graphs.over_ranks


@pytest.mark.parametrize(("uneven", "allowed"), [(0.0, True), (3e-3, False)])
def test_rounding_error_is_told_from_another_loss_in_float64(uneven, allowed):
    """Float32 cancels most digits of the loss; where `uneven`, it also weighs rows by their position in the batch."""
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    inputs = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))

    def loss(outputs, _):
        weights = 1 + uneven * torch.linspace(-1, 1, len(outputs), dtype=outputs.dtype)[:, None]
        return (5e3 + weights * outputs.square()).mean() - 5e3

    op = spectra.HessianOperator(model, [(inputs, inputs)], loss=loss)
    comparison = pieces._Comparison(op._graphs)
    (piece,) = comparison.samples()
    parts = list(comparison.objective.split(piece, 3))
    for where in ({}, {"moved": True}):
        assert pieces.SUM_TOLERANCE < comparison._error(piece, parts, **where) < pieces.ROUNDING_TOLERANCE
    assert pieces.may_be_cut(op._graphs) is allowed


def test_sketches_of_one_gradient_longer_than_a_period_are_the_same(monkeypatch):
    monkeypatch.setattr(pieces, "SKETCH", 2)
    monkeypatch.setattr(pieces, "PERIOD", 4)
    comparison = pieces._Comparison(spectra.HessianOperator(network(), BATCHES)._graphs)
    gradient = torch.arange(1.0, 28.0)
    first, second = (comparison._sketched(0.0, gradient)[1].tolist() for _ in range(2))
    assert first == second
    norms = [pieces._Comparison(comparison.graphs)._sketched(0.0, gradient)[1] for _ in range(2)]
    assert (norms[0] == norms[1]).all()


def test_batches_together_are_compared_with_the_gradients_of_the_kept_graphs(monkeypatch):
    op = spectra.HessianOperator(network().double(), [(x.double(), y) for x, y in BATCHES])
    gradients, own = [], []
    at, of_model = op._graphs.gradient_at, op._graphs.gradient_of_the_model_itself
    monkeypatch.setattr(op._graphs, "gradient_at", lambda *a, **k: gradients.append(1) or at(*a, **k))
    monkeypatch.setattr(op._graphs, "gradient_of_the_model_itself", lambda *a: own.append(1) or of_model(*a))
    op @ torch.ones(op.shape[0], dtype=torch.float64)
    assert (len(gradients), len(own)) == (2, 1)  # two for the difference of the gradient, one for all batches together
    assert op.checks["gradient_error"] == op.checks["pieces_error"] < 1e-12


@pytest.mark.parametrize("weight", [None, lambda batch: 1.0])
def test_of_batches_of_other_ranks_a_loss_that_is_no_mean_is_noted_unless_a_weight_is_given(weight):
    batches = [(X.double(), X.double())]
    op = spectra.HessianOperator(network().double(), batches, loss=contrastive, weight=weight)
    graphs = op._graphs
    objective, error, note = pieces._settled_among_ranks(graphs, graphs.objective)
    assert objective is graphs.objective
    with pieces._comparable(graphs):
        own = pieces._Comparison(graphs, objective).error_of_thirds(objective.pieces[0])
    assert own > pieces.SUM_TOLERANCE
    assert (error, note) == ((pytest.approx(own), pieces.NO_MEAN) if weight is None else (0.0, ""))
