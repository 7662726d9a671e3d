"""Loss and perplexity against the same sums written out, in blocks of every length."""

import math

import pytest
import tiny_models
import torch
from oracles import generator

from qat.text.corpus import Blocks
from qat.training.evaluate import Evaluation, evaluate, evaluation_mode, perplexity, perplexity_of
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
