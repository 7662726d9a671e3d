"""The loss of a list of batches is the mean over all that is counted, however it is cut up."""

import copy

import pytest
import tiny_models
import torch
from oracles import dense_gradient, relative_error
from torch import nn
from torch.nn import functional

import spectra


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
