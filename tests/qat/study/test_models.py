"""The small Llama is trained once and kept; a tokenizer and a length that do not fit a model are refused."""

import pytest
import saved_models
import texts
import tiny_models
import torch

from qat.study import models
from qat.study.config import SmallLlamaConfig
from qat.text.corpus import Blocks, Text, make_blocks, trained_tokenizer
from qat.training.evaluate import evaluate
from spectra.backend.errors import InputError
from spectra.integrations.loading import load_model

SMALL = SmallLlamaConfig(
    vocabulary_size=300, hidden_size=16, intermediate_size=24, layers=1, heads=2, steps=25, batch_size=4, length=16
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))


def prose(seed=0):
    return Text((texts.prose(8000, seed=seed),), (texts.prose(1000, seed=9),), "a test")


def test_the_small_llama_learns_is_kept_and_is_loaded_again(monkeypatch):
    text, said = prose(), []
    tokenizer = trained_tokenizer(text, SMALL.vocabulary_size)
    first = models.trained_small_llama(text, tokenizer, SMALL, say=said.append)
    assert len(said) == 1
    assert "25 steps" in said[0]
    _, validation = make_blocks(text, tokenizer, length=16)
    untrained = models.small_llama(len(tokenizer), SMALL)
    assert evaluate(first, validation).loss < evaluate(untrained, validation).loss - 0.3

    monkeypatch.setattr("qat.training.train.train", None)  # training again would fail
    again = models.trained_small_llama(text, tokenizer, SMALL, say=said.append)
    assert len(said) == 1
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.float32
    with pytest.raises(TypeError):
        models.trained_small_llama(prose(seed=1), tokenizer, SMALL)


def test_a_small_text_is_not_passed_over_more_often_than_asked():
    config = SmallLlamaConfig(steps=400, batch_size=16, epochs=12)
    assert config.steps_for(10_000) == 400
    assert config.steps_for(160) == 120
    assert config.steps_for(1) == 1


def test_the_same_seed_gives_the_same_untrained_weights():
    one, other = models.small_llama(300, SMALL), models.small_llama(300, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_tokenizer_is_the_models_own_or_another_or_trained(tmp_path):
    folder = saved_models.save(tmp_path / "model")
    bare = saved_models.save(tmp_path / "bare", with_tokenizer=False)
    model = load_model(str(bare))
    own = models.tokenizer_for(model, str(folder), prose(), tokenizer=None)
    other = models.tokenizer_for(model, str(bare), prose(), tokenizer=str(folder))
    assert own.get_vocab() == other.get_vocab()
    with pytest.raises(InputError, match="257 tokens or more, got 24"):  # the model knows too few for the bytes
        models.tokenizer_for(model, str(bare), prose(), tokenizer="train")
    large = models.small_llama(290, SMALL)
    assert len(models.tokenizer_for(large, str(bare), prose(), tokenizer="train")) == 290


def test_a_model_folder_without_a_tokenizer_says_how_to_give_one(tmp_path):
    folder = saved_models.save(tmp_path / "model", with_tokenizer=False)
    model = load_model(folder)
    with pytest.raises(InputError, match=r"give --tokenizer NAME_OR_FOLDER, or --tokenizer train for one trained"):
        models.tokenizer_for(model, str(folder), prose(), tokenizer=None)


def test_tokens_and_lengths_that_a_model_does_not_know_are_refused():
    model = tiny_models.causal_lm("llama")  # 24 tokens, 16 positions
    models.check_fit(model, Blocks(torch.arange(24) % 24, 8))
    with pytest.raises(InputError, match="gives token 24 and the model knows 24 tokens"):
        models.check_fit(model, Blocks(torch.arange(25), 5))
    with pytest.raises(InputError, match="at most 16 tokens, got --length 17"):
        models.check_fit(model, Blocks(torch.zeros(34, dtype=torch.int64), 17))
