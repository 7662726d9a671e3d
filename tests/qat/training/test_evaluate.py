"""Loss and perplexity against the same sums written out, in blocks of every length."""

import math

import pytest
import tiny_models
import torch
from oracles import generator

from qat.text.corpus import Blocks
from qat.training.evaluate import Evaluation, evaluate, evaluation_mode, fitting_batch, perplexity, perplexity_of
from spectra.backend import memory
from spectra.backend.errors import InputError


def tokens(count, seed=3):
    return torch.randint(0, tiny_models.VOCABULARY, (count,), generator=generator(seed))


def written_out(model, blocks):
    """The mean over every predicted token, one block at a time."""
    model.eval()
    losses = []
    for row in blocks:
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0].double()
        losses += [torch.logsumexp(logits[i], -1).item() - logits[i, row[i + 1]].item() for i in range(len(row) - 1)]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_loss_is_the_mean_over_all_predicted_tokens(batch_size):
    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    blocks = Blocks(tokens(7 * 9), 9)
    got = evaluate(model, blocks, batch_size=batch_size)
    want, count = written_out(model, blocks.blocks)
    assert got.loss == pytest.approx(want, rel=1e-6)
    assert (got.tokens, got.block) == (count, 9)
    assert got.perplexity == pytest.approx(math.exp(want), rel=1e-6)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary():
    model = tiny_models.causal_lm("gpt2", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert perplexity(model, tokens(100), block=10).perplexity == pytest.approx(tiny_models.VOCABULARY, rel=1e-6)


@pytest.mark.parametrize(("count", "block", "length", "predicted"), [(50, 8, 8, 42), (50, None, 16, 45), (9, 12, 9, 8)])
def test_blocks_are_no_longer_than_asked_than_the_model_allows_and_than_the_text(count, block, length, predicted):
    model = tiny_models.causal_lm("llama", dtype=torch.float32)  # takes 16 tokens
    got = perplexity(model, tokens(count), block=block)
    assert (got.block, got.tokens) == (length, predicted)
    want, _ = written_out(model, Blocks(tokens(count), length).blocks)
    assert got.loss == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("count", "block"), [(1, 8), (0, 8), (10, 1)])
def test_nothing_to_predict_is_refused(count, block):
    with pytest.raises(InputError, match="two tokens or more"):
        perplexity(tiny_models.causal_lm("llama"), tokens(count), block=block)


def test_a_block_that_the_model_does_not_take_is_refused():
    with pytest.raises(InputError, match="blocks of at most 16 tokens, got --block 17"):
        perplexity(tiny_models.causal_lm("llama"), tokens(50), block=17)


def test_every_module_is_back_in_its_mode_and_dropout_is_off():
    model = tiny_models.causal_lm("opt", dtype=torch.float32)  # dropout 0.1
    model.train()
    model.model.decoder.layers[0].eval()
    before = [module.training for module in model.modules()]
    blocks = Blocks(tokens(40), 8)
    assert evaluate(model, blocks) == evaluate(model, blocks)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        1 / 0  # noqa: B018
    assert [module.training for module in model.modules()] == before


def test_perplexity_where_the_exponential_overflows_or_there_is_no_loss():
    assert perplexity_of(1e4) == math.inf
    assert math.isnan(Evaluation(math.nan, 1, 2).perplexity)
    assert perplexity_of(math.log(7)) == pytest.approx(7)


def strided(model, ids, block, stride):
    """Each token once, given the tokens of the first block that holds it and does not begin with it."""
    losses, start, done = [], 0, 1
    while done < len(ids):
        end = min(start + block, len(ids))
        with torch.no_grad():
            logits = model(input_ids=ids[None, start:end]).logits[0].double()
        for position in range(max(done, start + 1), end):
            row = logits[position - start - 1]
            losses.append(torch.logsumexp(row, -1).item() - row[ids[position]].item())
        start, done = start + stride, end
    return losses


@pytest.mark.parametrize(("count", "block", "stride"), [(50, 8, 3), (41, 16, 5), (33, 8, 8), (10, 16, 4), (17, 16, 1)])
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_with_a_stride_every_token_counts_once(count, block, stride, batch_size):
    model = tiny_models.causal_lm("llama", dtype=torch.float32).eval()
    got = perplexity(model, tokens(count), block=block, stride=stride, batch_size=batch_size)
    want = strided(model, tokens(count), block, stride)
    assert got.tokens == len(want)
    assert len(want) == (count - 1 if stride < block else count - -(-count // block))
    assert got.loss == pytest.approx(sum(want) / len(want), rel=1e-6)
    assert got.stride == stride


def test_a_limit_takes_the_first_blocks_and_progress_counts_them():
    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    seen = []
    got = perplexity(model, tokens(80), block=8, limit=3, batch_size=2, progress=lambda *at: seen.append(at))
    want, count = written_out(model, Blocks(tokens(80)[:24], 8).blocks)
    assert (got.loss, got.tokens) == (pytest.approx(want, rel=1e-6), count)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_bits_a_byte_are_of_the_bytes_that_were_predicted():
    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    ends = [3 * position + position % 2 for position in range(1, 31)]
    got = perplexity(model, tokens(30), block=8, byte_ends=ends)
    predicted = [i for start in (0, 8, 16) for i in range(start + 1, start + 8)]
    assert got.bytes == sum(ends[i] - ends[i - 1] for i in predicted)
    assert got.bits_per_byte == pytest.approx(got.loss * 21 / math.log(2) / got.bytes)
    assert perplexity(model, tokens(30), block=8).bits_per_byte is None
    whole = perplexity(model, tokens(30), block=8, stride=4, byte_ends=ends)
    assert whole.bytes == ends[-1] - ends[0]


class Tight(torch.nn.Module):
    """A model with no room for more than so many tokens at once."""

    def __init__(self, model, most, error):
        super().__init__()
        self.model, self.most, self.error, self.config, self.seen = model, most, error, model.config, []

    def forward(self, input_ids, **options):
        self.seen.append(len(input_ids))
        if input_ids.numel() > self.most:
            raise self.error
        return self.model(input_ids=input_ids, **options)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
NO_ALLOCATION = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, NO_ALLOCATION])
def test_where_memory_runs_out_fewer_blocks_are_computed_at_once(error):
    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    tight = Tight(model, 3 * 8, error)
    got = perplexity(tight, tokens(80), block=8)
    assert tight.seen == [10, 5, 2, 2, 2, 2, 2]
    assert got == perplexity(model, tokens(80), block=8, batch_size=2)
    with pytest.raises(InputError, match="a block of 8 tokens does not fit") as caught:
        perplexity(Tight(model, 7, error), tokens(80), block=8)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="another"):
        perplexity(Tight(model, 7, RuntimeError("another")), tokens(80), block=8)


def test_batches_are_as_large_as_memory_allows(monkeypatch):
    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    block = 4 * 4 * 8 * tiny_models.VOCABULARY
    for free, want in ((0, 1), (2 * block, 1), (10 * block, 5), (1000 * block, 16)):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        assert fitting_batch(model, 8, torch.device("cpu")) == want


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "--stride is one token or more"),
        ({"stride": 9, "block": 8}, "--stride is at most the 8 tokens"),
        ({"limit": 0}, "--limit is one block or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        perplexity(tiny_models.causal_lm("llama"), tokens(30), **settings)
