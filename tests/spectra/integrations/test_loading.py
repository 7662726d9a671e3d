import json
import re
import time

import pytest
import saved_models
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file

from spectra.backend.errors import InputError
from spectra.integrations.loading import (
    cut_sequences,
    load_causal_lm,
    load_model,
    load_tokenizer,
    longest_sequence,
    quiet_transformers,
    sequence_batches,
    tokenize,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_models.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_causal_lm(folder)


@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2", "opt"])
def test_a_model_comes_back_from_its_folder(tmp_path, architecture):
    saved_models.save(tmp_path, architecture)
    model, tokenizer = load_causal_lm(tmp_path, dtype=torch.float64, device="cpu")
    assert model.dtype == torch.float64
    assert not model.training
    want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, got), (_, other) in zip(model.named_parameters(), want.named_parameters(), strict=True):
        assert torch.equal(got, other.double()), name
    assert longest_sequence(model) == 16
    assert tokenizer.eos_token == "<end>"


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_a_folder_of_any_architecture_loads_as_saved(architecture, tmp_path):
    folder = saved_models.save(tmp_path / "model", architecture)
    loaded = load_model(str(folder))
    assert not loaded.training
    want = tiny_models.causal_lm(architecture, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), want.parameters(), strict=True))
    tokenizer = load_tokenizer(str(folder))
    assert loaded.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer("abc").input_ids


def test_a_folder_in_half_precision_is_loaded_in_single(tmp_path):
    tiny_models.causal_lm("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    assert {p.dtype for p in load_model(tmp_path / "model").parameters()} == {torch.float32}


def test_a_folder_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved_models.save(tmp_path / "model")
    assert load_model("~/model").config.model_type == "llama"
    assert len(load_tokenizer("~/model")) == 24


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with pytest.raises(InputError, match=r"model\.bin is a file: give the folder it is in"):
        load_model(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", ""])
def test_a_path_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(InputError, match="there is no folder"):
        load_causal_lm(name)


def test_a_hub_name_without_a_network_fails_at_once(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"expected a folder or a cached model, got nobody/no-such-model: .* reached"):
        load_causal_lm("nobody/no-such-model")
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_name_without_a_network_is_refused_in_one_line(load):
    with pytest.raises(InputError, match=r"nobody/nothing.*no network to fetch it.*give a folder") as refused:
        load("nobody/nothing")
    assert "\n" not in str(refused.value)


def test_a_name_in_the_cache_is_found_without_a_network(tmp_path, monkeypatch, folder):
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--nobody--kept" / "snapshots" / "1234"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    references = cache / "models--nobody--kept" / "refs"
    references.mkdir()
    (references / "main").write_text("1234")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model, _ = load_causal_lm("nobody/kept")
    assert model.config.model_type == "llama"


def test_folders_that_hold_no_usable_model_are_refused_in_one_line(tmp_path, folder):
    cases = {}
    (tmp_path / "empty").mkdir()
    cases["empty"] = r"holds no config\.json"
    saved_models.save(tmp_path / "mute", with_tokenizer=False)
    cases["mute"] = "expected a tokenizer in"
    model, tokenizer = load_causal_lm(folder)
    model.model.save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    cases["headless"] = r"lacks 1 of the model's weights, lm_head\.weight among them"
    saved_models.save(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"1234")
    cases["damaged"] = "expected a causal language model in .* cannot be loaded"
    saved_models.save(tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    cases["weightless"] = "expected a causal language model in .* cannot be loaded"
    weights = load_file(saved_models.save(tmp_path / "partial") / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    cases["partial"] = r"lacks 1 of the model's weights, model\.norm\.weight among them"
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_causal_lm(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "opt"])  # transformers makes an empty tokenizer for the second
def test_a_folder_without_a_tokenizer_is_refused_with_the_callers_advice(architecture, tmp_path):
    folder = saved_models.save(tmp_path / "model", architecture, with_tokenizer=False)
    with pytest.raises(
        InputError, match=r"expected a tokenizer in .*, but the folder holds none of its files: ask Ada"
    ):
        load_tokenizer(str(folder), remedy="ask Ada")


def test_a_tokenizer_that_makes_no_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    empty = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    empty.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="makes no tokens of a text: ask Ada"):
        load_tokenizer(tmp_path, remedy="ask Ada")


def test_code_that_a_model_brings_is_not_run(tmp_path):
    saved_models.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="comes with code of its own"):
        load_causal_lm(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_device_that_is_not_there_is_named(folder):
    with pytest.raises(InputError, match="expected a device that PyTorch can use here, got 'abacus'"):
        load_causal_lm(folder, device="abacus")


def test_sequences_are_cut_end_to_end_and_spread_evenly(loaded):
    model, tokenizer = loaded
    texts = ["abcdefgh" * 10, "ihgfedcb" * 10]
    batches = sequence_batches(model, tokenizer, texts, sequences=5, length=16, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    tokens = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    blocks = [tokens[at : at + 16] for at in range(0, len(tokens) - 15, 16)]
    assert len(blocks) == 10
    got = [row.tolist() for batch in batches for row in batch["input_ids"]]
    assert got == [blocks[at] for at in (0, 2, 4, 6, 8)]
    for batch in batches:
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


def test_tokens_of_texts_stand_end_to_end(loaded):
    _, tokenizer = loaded
    ids = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert tokenize(tokenizer, ["abc", "abc"]).tolist() == 2 * [*ids, tokenizer.eos_token_id]
    assert tokenize(tokenizer, []).dtype == tokenize(tokenizer, ["abc"]).dtype == torch.int64


def test_the_length_is_the_models_longest_unless_asked(loaded):
    model, tokenizer = loaded
    (batch,) = sequence_batches(model, tokenizer, [saved_models.TEXT], sequences=3)
    assert batch["input_ids"].shape == (3, 16)
    for length in (1, 17):
        with pytest.raises(InputError, match=f"a length of 2 to 16 tokens for this model, got {length}"):
            sequence_batches(model, tokenizer, [saved_models.TEXT], length=length)
    with pytest.raises(InputError, match="one sequence or more, got 0"):
        sequence_batches(model, tokenizer, [saved_models.TEXT], sequences=0)


def test_too_little_text_is_answered_with_how_much_it_takes(loaded):
    model, tokenizer = loaded
    with pytest.raises(InputError, match="8 sequences of 16 tokens need 128 tokens and it has 6"):
        sequence_batches(model, tokenizer, ["hello"])


def test_another_models_tokenizer_is_refused(loaded):
    model, _ = loaded
    with pytest.raises(InputError, match="gives token 27, but the model knows 24 tokens"):
        sequence_batches(model, saved_models.tokenizer(28), ["xyz" * 100])


def test_of_a_large_text_only_excerpts_become_tokens(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr("spectra.integrations.loading.EXCERPTS_FROM", 1000)
    lines = [saved_models.TEXT.replace("\n", " ")[shift:][:40] + "\n" for shift in range(26)]
    text = "".join(lines) * 40
    seen = []

    def counting(part, **options):
        seen.append(len(part))
        return tokenizer(part, **options)

    counting.eos_token_id = tokenizer.eos_token_id
    rows = cut_sequences(model, counting, [text], sequences=2, length=8)
    assert rows.shape == (2, 8)
    assert sum(seen) < len(text) / 10
    for row, start in zip(rows, (0, len(text) // 2), strict=True):
        line = text.rfind("\n", 0, start) + 1
        assert row.tolist() == tokenizer(text[line:], add_special_tokens=False)["input_ids"][:8]
    spaces = [("a" + " " * 999) * 10]  # an excerpt that is too short in tokens: all of the text is taken
    assert cut_sequences(model, tokenizer, spaces, sequences=2, length=4).shape == (2, 4)


@pytest.mark.parametrize("made", ["adapter", "run"])
def test_a_folder_whose_model_is_elsewhere_says_where(made, tmp_path):
    if made == "adapter":
        (tmp_path / "adapter_config.json").write_text("{}")
        expected = "holds a PEFT adapter, not a whole model: merge it"
    else:
        (tmp_path / "model").mkdir()
        for name in ("config.json", "records.jsonl", "model/config.json"):
            (tmp_path / name).write_text("{}")
        expected = f"is a run, and its model lies in {tmp_path / 'model'}: give that folder"
    with pytest.raises(InputError, match=re.escape(expected)):
        load_causal_lm(tmp_path)


def test_transformers_is_quiet_and_then_as_before():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
