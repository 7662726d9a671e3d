"""The small Llama is trained once and kept; models and tokenizers of others load, or are refused in one line."""

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


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_a_folder_of_any_architecture_loads_as_saved(architecture, tmp_path):
    folder = saved_models.save(tmp_path / "model", architecture)
    loaded = models.load_model(str(folder))
    want = tiny_models.causal_lm(architecture, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), want.parameters(), strict=True))
    tokenizer = models.load_tokenizer(str(folder))
    assert models.vocabulary_size(loaded) == len(tokenizer)
    assert tokenizer("abc").input_ids


def test_a_folder_in_half_precision_is_loaded_in_single(tmp_path):
    tiny_models.causal_lm("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    assert {p.dtype for p in models.load_model(str(tmp_path / "model")).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing/here", "a/b/c"])
def test_a_path_to_nothing_is_refused(name):
    with pytest.raises(InputError, match="there is no model folder"):
        models.load_model(name)


def test_a_file_and_a_folder_without_a_model_are_refused(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(InputError, match="is a file"):
        models.load_model(str(tmp_path / "model.bin"))
    with pytest.raises(InputError, match=r"no config\.json"):
        models.load_model(str(tmp_path))


def test_a_hub_name_without_network_is_refused_in_one_line():
    for load in (models.load_model, models.load_tokenizer):
        with pytest.raises(InputError, match=r"nobody/nothing.*no network to fetch it.*give a folder") as refused:
            load("nobody/nothing")
        assert "\n" not in str(refused.value)


def test_a_checkpoint_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    folder = saved_models.save(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="could not be loaded") as refused:
        models.load_model(str(folder))
    assert "\n" not in str(refused.value)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = saved_models.save(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the model's weights, model\.norm\.weight"):
        models.load_model(str(folder))


@pytest.mark.parametrize("architecture", ["llama", "opt"])  # transformers makes an empty tokenizer for the second
def test_a_folder_without_a_tokenizer_says_how_to_give_one(architecture, tmp_path):
    folder = saved_models.save(tmp_path / "model", architecture, with_tokenizer=False)
    with pytest.raises(InputError, match=r"holds no tokenizer: give --tokenizer NAME_OR_FOLDER, or --tokenizer train"):
        models.load_tokenizer(str(folder))


def test_a_tokenizer_is_the_models_own_or_another_or_trained(tmp_path):
    folder = saved_models.save(tmp_path / "model")
    bare = saved_models.save(tmp_path / "bare", with_tokenizer=False)
    model = models.load_model(str(bare))
    own = models.tokenizer_for(model, str(folder), prose(), tokenizer=None)
    other = models.tokenizer_for(model, str(bare), prose(), tokenizer=str(folder))
    assert own.get_vocab() == other.get_vocab()
    with pytest.raises(InputError, match="257 tokens or more, got 24"):  # the model knows too few for the bytes
        models.tokenizer_for(model, str(bare), prose(), tokenizer="train")
    large = models.small_llama(290, SMALL)
    assert len(models.tokenizer_for(large, str(bare), prose(), tokenizer="train")) == 290


def test_tokens_and_lengths_that_a_model_does_not_know_are_refused():
    model = tiny_models.causal_lm("llama")  # 24 tokens, 16 positions
    models.check_fit(model, Blocks(torch.arange(24) % 24, 8))
    with pytest.raises(InputError, match="gives token 24 and the model knows 24 tokens"):
        models.check_fit(model, Blocks(torch.arange(25), 5))
    with pytest.raises(InputError, match="at most 16 tokens, got --length 17"):
        models.check_fit(model, Blocks(torch.zeros(34, dtype=torch.int64), 17))
