"""The loss of a list of batches is the mean over all that is counted, however it is cut up."""

import copy

import pytest
import tiny_models
import torch
from oracles import dense_gradient, relative_error
from torch import nn
from torch.nn import functional

import spectra
from spectra.backend import ranks
from spectra.operators.hessian import pieces


def measure(model, batches, loss=None, **options):
    op = spectra.HessianOperator(model, batches, loss=loss, **options)
    return op.loss(), op.gradient()


def check(model, batches, want, loss=None, tolerance=1e-12, **options):
    """Value and gradient against `want`, a scalar with a graph on the same model."""
    value, gradient = measure(model, batches, loss, **options)
    assert isinstance(value, float)
    assert value == pytest.approx(want.item(), rel=tolerance)
    oracle = dense_gradient(want, [p for p in model.parameters() if p.requires_grad])
    assert relative_error(gradient, oracle) < tolerance


@pytest.mark.parametrize("rows", [(8,), (60, 4), (5, 1, 9)])
@pytest.mark.parametrize("microbatch", [None, 1, 7, 100])
def test_regression_batches_weigh_by_rows(rows, microbatch):
    model, batches = tiny_models.mlp(), tiny_models.regression(rows)
    inputs, targets = tiny_models.whole(batches)
    want = functional.mse_loss(model(inputs), targets)
    check(model, batches, want, microbatch=microbatch)
    check(model, batches, want, functional.mse_loss, microbatch=microbatch)
    check(model, batches, want, nn.MSELoss(), microbatch=microbatch)


@pytest.mark.parametrize("rows", [(8,), (60, 4), (5, 1, 9)])
@pytest.mark.parametrize("microbatch", [None, 1, 7, 100])
def test_classification_batches_weigh_by_rows(rows, microbatch):
    model, batches = tiny_models.mlp(), tiny_models.classification(rows)
    inputs, targets = tiny_models.whole(batches)
    want = functional.cross_entropy(model(inputs), targets)
    check(model, batches, want, microbatch=microbatch)
    check(model, batches, want, nn.CrossEntropyLoss(), microbatch=microbatch)


def test_the_unweighted_mean_would_be_another_number():
    """Guards the tests above: 60 rows and 4 do not happen to agree."""
    model, batches = tiny_models.mlp(), tiny_models.regression((60, 4))
    losses = [functional.mse_loss(model(x), y).item() for x, y in batches]
    value, _ = measure(model, batches)
    assert value == pytest.approx((60 * losses[0] + 4 * losses[1]) / 64)
    assert abs(value / (sum(losses) / 2) - 1) > 0.1


def test_a_custom_loss_takes_outputs_and_targets():
    model, batches = tiny_models.mlp(), tiny_models.regression((6, 3))

    def quartic(outputs, targets):
        return ((outputs - targets) ** 4).mean()

    inputs, targets = tiny_models.whole(batches)
    check(model, batches, quartic(model(inputs), targets), quartic, microbatch=2)


def test_a_sum_is_a_sum():
    model, batches = tiny_models.mlp(), tiny_models.regression((6, 3))
    inputs, targets = tiny_models.whole(batches)
    check(model, batches, functional.mse_loss(model(inputs), targets, reduction="sum"), nn.MSELoss(reduction="sum"))


@pytest.mark.parametrize("microbatch", [None, 1, 3])
@pytest.mark.parametrize("ignored", [-100, 0])
def test_ignored_targets_are_not_counted(microbatch, ignored):
    """Also where a microbatch, or a whole batch, has nothing to count: the mean of nothing is NaN, and is left out."""
    model, batches = tiny_models.mlp(), tiny_models.classification((9, 4, 2))
    batches[0][1][:5] = ignored
    batches[2][1][:] = ignored
    inputs, targets = tiny_models.whole(batches)
    assert 0 < (targets != ignored).sum() < 15
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    check(model, batches, loss(model(inputs), targets), loss, microbatch=microbatch)
    if ignored == -100:
        check(model, batches, loss(model(inputs), targets), microbatch=microbatch)


class Embedder(nn.Module):
    """Token classification without transformers: logits (rows, classes, tokens)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, ids):
        return self.head(torch.tanh(self.embedding(ids))).transpose(1, 2)


def test_targets_with_more_than_one_dimension_count_each_entry():
    torch.manual_seed(0)
    model = Embedder().double()
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rows, width in ((3, 6), (2, 2)):
        ids = torch.randint(0, 7, (rows, width), generator=generator)
        batches.append((ids, torch.randint(0, 5, (rows, width), generator=generator)))
    batches[0][1][1, 2:] = -100
    losses = [functional.cross_entropy(model(x), y, reduction="sum") for x, y in batches]
    check(model, batches, sum(losses) / (18 - 4 + 4))
    check(model, batches, sum(losses) / (18 - 4 + 4), microbatch=1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("lengths", [((8, 8),), ((8, 5, 3), (7,)), ((9, 2), (1, 4), (1,)), ((6,), (1, 1, 3))])
def test_language_models_count_shifted_labels(architecture, lengths):
    model = tiny_models.causal_lm(architecture).eval()
    model.set_attn_implementation("eager")
    batches = tiny_models.token_batches(lengths)
    want = tiny_models.language_loss(model, batches)
    for microbatch in (None, 1, 2):
        check(model, batches, want, microbatch=microbatch, tolerance=1e-6)


def test_labels_count_rather_than_the_mask():
    """Labels may leave out more than the padding (a prompt), and nothing need be padded."""
    model = tiny_models.causal_lm("llama").eval()
    batches = tiny_models.token_batches(((8, 8), (5, 5, 5)))
    batches[0]["labels"][0, :6] = -100
    batches[1]["labels"][2, :] = -100
    check(model, batches, tiny_models.language_loss(model, batches), microbatch=1, tolerance=1e-6)


def test_a_batch_without_labels_predicts_its_input():
    model = tiny_models.causal_lm("llama").eval()
    batches = tiny_models.token_batches(((6, 6), (4,)))
    want = tiny_models.language_loss(model, batches)
    for batch in batches:
        del batch["labels"]
    check(model, batches, want, tolerance=1e-6)


def test_batches_are_not_changed():
    model = tiny_models.causal_lm("llama")
    batches = tiny_models.token_batches(((8, 5, 3), (7,)))
    kept = copy.deepcopy(batches)
    measure(model, batches, microbatch=2)
    for batch, copied in zip(batches, kept, strict=True):
        assert batch.keys() == copied.keys()
        assert all(torch.equal(batch[key], copied[key]) for key in batch)


def test_a_data_loader_and_a_single_batch_are_batches():
    model, batches = tiny_models.mlp(), tiny_models.classification((12,))
    inputs, targets = batches[0]
    want = functional.cross_entropy(model(inputs), targets)
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    check(model, torch.utils.data.DataLoader(dataset, batch_size=5), want)
    check(model, batches[0], want)


@pytest.mark.parametrize("microbatch", [0, -1, 2.5])
def test_a_microbatch_of_nothing_is_refused(microbatch):
    with pytest.raises(spectra.InputError, match="microbatch"):
        spectra.HessianOperator(tiny_models.mlp(), tiny_models.regression((4,)), microbatch=microbatch)


@pytest.mark.parametrize(
    "batches",
    [[], ["text"], [(torch.zeros(2, 4, dtype=torch.float64), torch.full((2,), -100))], [3.0]],
    ids=["none", "text", "nothing counted", "a number"],
)
def test_what_is_no_batch_is_refused_in_one_line(batches):
    with pytest.raises(spectra.InputError) as caught:
        spectra.HessianOperator(tiny_models.mlp(), batches).loss()
    assert "\n" not in str(caught.value)


def test_cutting_pieces_in_two_keeps_their_share_whatever_the_weight_says():
    batches = tiny_models.classification((6, 3))
    objective = spectra.Objective(tiny_models.mlp(), batches, weight=lambda batch: 1.0)  # not a sum over rows
    halved = objective.halved()
    assert max(halved.rows) == 3
    assert [piece.share for piece in halved.pieces] == pytest.approx([0.25, 0.25, 0.5])
    assert [piece.within for piece in halved.pieces] == pytest.approx([0.5, 0.5, 1])
    again = halved.halved()
    assert [piece.within for piece in again.pieces] == pytest.approx([0.25] * 4 + [0.5] * 2)
    assert [piece.batch_share for piece in again.pieces] == pytest.approx([0.5] * 6)


def test_parts_of_a_piece_share_its_weight_by_what_they_count():
    objective = spectra.Objective(tiny_models.mlp(), tiny_models.classification((7, 3))).halved()
    assert objective.rows == [4, 3, 3]
    assert [piece.share for piece in objective.pieces] == pytest.approx([0.4, 0.3, 0.3])
    assert [piece.within for piece in objective.pieces] == pytest.approx([4 / 7, 3 / 7, 1])


def test_a_batch_that_counts_nothing_is_left_out():
    model, batches = tiny_models.mlp(), tiny_models.classification((6, 3))
    inputs, targets = tiny_models.whole(batches)
    empty = (inputs[:0], targets[:0])
    ignored = (inputs[:2], torch.full((2,), -100))
    check(model, [*batches, empty, ignored], functional.cross_entropy(model(inputs), targets))


def test_packed_sequences_weigh_their_rows():
    from torch.nn.utils.rnn import pack_sequence

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.recurrent, self.head = nn.GRU(2, 3), nn.Linear(3, 3)

        def forward(self, packed):
            return self.head(self.recurrent(packed)[1][0])

    model, generator = Reader().double(), torch.Generator().manual_seed(0)
    sequences = [torch.randn(n, 2, dtype=torch.float64, generator=generator) for n in (5, 3, 2, 6, 4)]
    targets = torch.tensor([0, 1, 2, 2, 0])
    want = functional.cross_entropy(model(pack_sequence(sequences, enforce_sorted=False)), targets)
    batches = [(pack_sequence(sequences[:3]), targets[:3]), (pack_sequence(sequences[3:]), targets[3:])]
    for microbatch in (None, 1):
        check(model, batches, want, microbatch=microbatch)


LENGTHS = ((7, 7, 7), (4,))  # unequal batches without padding


def llama():
    return tiny_models.causal_lm("llama").eval()


def every_label(model, batches):
    """The mean cross-entropy of logits and labels at the same positions, over all of them."""
    logits = torch.cat([model(input_ids=batch["input_ids"]).logits.flatten(0, 1) for batch in batches])
    return functional.cross_entropy(logits, torch.cat([batch["labels"].flatten() for batch in batches]))


@pytest.mark.parametrize(
    "form",
    [
        lambda batch: batch["input_ids"],
        lambda batch: (batch["input_ids"], batch["labels"]),
        lambda batch: [batch["input_ids"], batch["attention_mask"], batch["labels"]],
        lambda batch: {"input_ids": batch["input_ids"], "labels": None},
    ],
    ids=["ids", "ids and labels", "ids, mask and labels", "no labels"],
)
def test_tensors_for_a_language_model_are_its_input_and_its_labels(form):
    model, batches = llama(), tiny_models.token_batches(LENGTHS)
    check(model, [form(batch) for batch in batches], tiny_models.language_loss(model, batches), tolerance=1e-6)


def test_labels_that_leave_out_a_part_are_still_labels_of_their_input():
    model, batches = llama(), tiny_models.token_batches(LENGTHS)
    batches[0]["labels"][1, :4] = -100
    pairs = [(batch["input_ids"], batch["labels"]) for batch in batches]
    check(model, pairs, tiny_models.language_loss(model, batches), tolerance=1e-6)


def test_labels_that_are_shifted_already_are_not_shifted_again():
    model, batches = llama(), tiny_models.token_batches(LENGTHS)
    pairs = []
    for batch in batches:
        ids = batch["input_ids"]
        pairs.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    pairs[0][1][1, :2] = -100
    shifted = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    check(model, pairs, every_label(model, shifted), tolerance=1e-6)


def test_sequences_that_are_neither_labels_nor_shifted_are_refused():
    ids = torch.arange(2, 14).view(2, 6)
    for labels in (ids.flip(1), torch.where(ids == 5, 6, ids)):
        with pytest.raises(
            spectra.InputError, match=r"batch 1 is a sequence of tensors.*'input_ids' and 'labels'"
        ) as e:
            spectra.Objective(llama(), [ids, (ids, labels)])
        assert "\n" not in str(e.value)


def test_a_row_that_was_not_collated_is_a_batch_of_one():
    model, batches = llama(), tiny_models.token_batches(((6,), (4,)))
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches]
    check(model, rows, tiny_models.language_loss(model, batches), tolerance=1e-6)


def test_padding_is_no_label_where_labels_are_left_out():
    model, batches = llama(), tiny_models.token_batches(((6, 3), (4,)))
    bare = [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]} for batch in batches]
    check(model, bare, tiny_models.language_loss(model, batches), tolerance=1e-6)
    odd = {**bare[0], "attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()}
    assert torch.equal(spectra.Objective(model, [odd]).batches[0]["labels"], odd["input_ids"])


@pytest.mark.parametrize("microbatch", [None, 1])
def test_shifted_labels_count_themselves(microbatch):
    """`shift_labels`, which transformers' losses take in place of labels."""
    model, batches = llama(), tiny_models.token_batches(LENGTHS)
    given = []
    for batch in batches:
        following = functional.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
        following[0, :2] = -100
        given.append({"input_ids": batch["input_ids"], "shift_labels": following})
    want = every_label(model, [{"input_ids": b["input_ids"], "labels": b["shift_labels"]} for b in given])
    check(model, given, want, microbatch=microbatch, tolerance=1e-6)


@pytest.mark.parametrize("microbatch", [None, 1])
def test_a_loss_that_does_not_shift_counts_every_label(microbatch):
    """The first labels of the rows too, of which one batch has four and the other has one."""
    model, (batch,) = llama(), tiny_models.token_batches(((9, 2, 2, 2, 2),))
    batches = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 5))]

    def loss(outputs, batch):
        return functional.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())

    want = every_label(model, batches)
    op = spectra.HessianOperator(model, batches, loss=loss, microbatch=microbatch)
    assert op.loss() == pytest.approx(want.item(), rel=1e-6)
    assert relative_error(op.gradient(), dense_gradient(want, list(model.parameters()))) < 1e-6
    assert pieces.UNSHIFTED in op.notes
    graphs = spectra.HessianOperator(model, batches, loss=loss, microbatch=microbatch)._graphs
    graphs.prepare()
    _, error, note = pieces.settle_shares(graphs)
    assert note == pieces.UNSHIFTED
    assert pieces.SUM_TOLERANCE < error < 1  # that of counts after a shift


def test_counting_unshifted_is_for_losses_of_language_models_alone():
    batches = tiny_models.token_batches(LENGTHS)
    assert spectra.Objective(llama(), batches).counting_unshifted() is None
    pairs = tiny_models.classification((3,))
    assert spectra.Objective(tiny_models.mlp(), pairs, functional.cross_entropy).counting_unshifted() is None
    found = spectra.Objective(llama(), batches, lambda outputs, batch: 0.0, microbatch=2).counting_unshifted()
    assert [piece.share for piece in found.pieces] == pytest.approx([14 / 25, 7 / 25, 4 / 25])
    assert [piece.within for piece in found.pieces] == pytest.approx([2 / 3, 1 / 3, 1])
    assert found.of_all_ranks().pieces == found.pieces


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": 3.0}, "loss= must be a function, got float"),
        ({"weight": 3.0}, "weight= must be a function, got float"),
        ({"weight": lambda batch: -1.0}, "at least 0, got -1"),
        ({"weight": lambda batch: float("inf")}, "at least 0, got inf"),
        ({"weight": lambda batch: batch["rows"]}, "weight= failed on a batch"),
        ({"weight": lambda batch: 0.0}, "weight= gives 0"),
    ],
)
def test_a_loss_or_weight_that_is_none_is_refused(options, words):
    with pytest.raises(spectra.InputError, match=words) as caught:
        spectra.Objective(tiny_models.mlp(), tiny_models.classification((3, 2)), **options)
    assert "\n" not in str(caught.value)


def test_the_ranks_share_the_pieces_with_the_largest_first(monkeypatch):
    objective = spectra.Objective(tiny_models.mlp(), tiny_models.classification((1, 5, 2, 7, 3)))
    monkeypatch.setattr(ranks, "rank_count", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(ranks, "items_of_rank", lambda items, rank=rank: items[rank::2])
        part = objective.of_this_rank()
        parts.append([round(18 * piece.share) for piece in part.pieces])
        assert part.of_all_ranks().pieces == objective.pieces
    assert parts == [[7, 3, 1], [5, 2]]
    monkeypatch.setattr(ranks, "rank_count", lambda: 6)
    with pytest.raises(spectra.InputError, match="got 5 for 6 ranks"):
        objective.of_this_rank()
    monkeypatch.setattr(ranks, "rank_count", lambda: 5)
    objective.of_this_rank()


def test_weights_of_batches_are_those_given_and_none_is_left_out():
    objective = spectra.Objective(tiny_models.mlp(), tiny_models.classification((4, 2, 3)), microbatch=3)
    found = objective.with_batch_shares({0: 0.5, 1: 0.0, 2: 2.0})
    assert [(piece.index, piece.share) for piece in found.pieces] == [(0, 0.375), (0, 0.125), (2, 2.0)]
    assert [piece.batch_share for piece in found.pieces] == [0.5, 0.5, 2.0]


def test_rows_of_the_largest_piece():
    batches = tiny_models.classification((2, 6, 3))
    objective = spectra.Objective(tiny_models.mlp(), batches)
    some = objective.some_rows(4)
    assert torch.equal(some.batch[0], batches[1][0][:4])
    assert some.name == "batch 1, 4 rows"
    assert torch.equal(objective.some_rows(9).batch[1], batches[1][1])


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("place", ["weights", "batch"])
def test_a_loss_that_is_not_finite_is_put_down_to_weights_or_batch(place, microbatch):
    model, batches = tiny_models.mlp(), tiny_models.regression((3, 4))
    if place == "weights":
        with torch.no_grad():
            model[2].weight[0, 0] = float("nan")
    else:
        batches[1][1][3, 0] = float("nan")
    objective = spectra.Objective(model, batches, functional.mse_loss, microbatch=microbatch)
    broken = objective.pieces[0 if place == "weights" else -1]
    with pytest.raises(spectra.NonFiniteError) as caught:
        objective.forward(broken, torch.device("cpu"))
    message = str(caught.value)
    where = "batch 0" if place == "weights" else "batch 1"
    assert f"the loss of {where}" in message
    assert ("parameter '2.weight' holds NaN" in message) == (place == "weights")
    assert ("every weight is finite: check that batch" in message) == (place == "batch")
    assert ("leave out microbatch=" in message) == (place == "batch" and microbatch is not None)


@pytest.mark.parametrize(
    ("batches", "cause"),
    [
        (
            {"train": object(), "test": None},
            r"mapping without tensors, of test, train: .* give one, such as batches\['train'",
        ),
        ([(torch.zeros(3, 4, device="meta"), torch.zeros(3, dtype=torch.long))], "batch 0 holds tensors on the meta"),
    ],
)
def test_batches_without_values_are_refused(batches, cause):
    with pytest.raises(spectra.InputError, match=cause):
        spectra.HessianOperator(torch.nn.Linear(4, 3), batches)
