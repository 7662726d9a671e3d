"""GGUF files, read back by transformers' own reader: the logits of the quantized model, and its tokens."""

import gguf_reading
import numpy as np
import pytest
import torch
from quantized_models import BITS, VOCABULARY, logits, plain, trained

import qat
from qat.export.command import export
from qat.export.gguf_file import FILE
from qat.export.grid import grid_of
from spectra.backend.errors import InputError
from spectra.integrations.loading import quiet_transformers

gguf = pytest.importorskip("gguf")
ROUNDING = 2.0**-11  # of a scale, by float16


@pytest.fixture(autouse=True)
def quiet():
    with quiet_transformers():
        yield


def exported(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return export(tmp_path / "saved", tmp_path / "out", format="gguf")


def with_float16_scales(model):
    """Scales that float16 holds, so that the file holds the model exactly."""
    with torch.no_grad():
        for name, layer in qat.quant_layers(model):
            unit = grid_of(name, layer).scale / layer.scale.reshape(len(layer.scale), -1)
            halves = (layer.scale * unit).half().float()
            layer.scale.copy_(halves / unit)
    return model


def read(tmp_path, config):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=FILE, config=config, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_transformers_reads_the_same_logits(family, bits, tmp_path, monkeypatch):
    monkeypatch.setitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q1_0, gguf_reading.Q1_0)
    which = {"quantize_head": bits == 8, "quantize_embeddings": bits == 8}
    model = with_float16_scales(trained(family, bits, **which))
    made = exported(model, tmp_path)
    assert made.facts["largest_scale_rounding"] < 1e-6
    assert torch.allclose(logits(read(tmp_path, model.config)), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("bits", "kind"), [(1.58, "TQ1_0"), (2, "Q2_K"), (3, "Q3_K")])
def test_wide_rows_have_types_of_few_bits(bits, kind, tmp_path):
    model = trained("llama", bits, options={"hidden": 256})
    made = exported(model, tmp_path)
    assert made.facts["block_types"] == {kind: 7}
    assert made.facts["largest_scale_rounding"] <= ROUNDING
    difference = logits(read(tmp_path, model.config)) - logits(model)
    assert difference.abs().max() < 10 * ROUNDING * logits(model).abs().max()


def test_a_matrix_whose_scales_float16_is_too_coarse_for_is_refused(tmp_path):
    """Read back, it would differ: float16 has 6e-8 as its smallest step, and 2^-10 of it from 6.1e-5."""
    model = trained("llama", 2, steps=0)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight.mul_(1e-5)
        layer.scale.mul_(1e-5)
    with pytest.raises(InputError, match=r"mlp\.up_proj read back .* by \d+\.\d% of its norm .*use --format packed"):
        exported(model, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantizer", ["auto", "rtn", "parq"])
def test_two_bits_read_back_in_the_order_of_the_file(quantizer, tmp_path):
    """Rows of queries and keys lie in llama.cpp's order: compared with Q(W) as it is, they correlate with nothing."""
    model = trained("llama", 2, options={"hidden": 256}, quantizer=quantizer)
    facts = exported(model, tmp_path).facts
    assert facts["block_types"] == {"Q2_K": 7}
    assert facts["read_back_difference"] <= ROUNDING
    attention, found = model.model.layers[0].self_attn, tensors(tmp_path)[0]
    values = gguf.dequantize(found["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.Q2_K)
    rows = attention.q_proj.quantized_weight().detach().numpy()
    assert np.corrcoef(values.ravel(), rows.ravel())[0, 1] < 0.5
    ordered = rows.reshape(4, 2, 32, 256).swapaxes(1, 2).reshape(256, 256)
    assert np.allclose(values, ordered, rtol=2 * ROUNDING)


def tensors(tmp_path):
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    return {tensor.name: tensor for tensor in reader.tensors}, reader.fields


def test_one_bit_is_one_bit(tmp_path):
    model = trained("llama", 1, options={"hidden": 128})
    assert exported(model, tmp_path).facts["block_types"] == {"Q1_0": 7}
    stored = tensors(tmp_path)[0]["blk.0.ffn_up.weight"].data
    assert stored.nbytes * 8 == 1.125 * 256 * 128
    values = gguf_reading.Q1_0.dequantize(stored)
    assert np.allclose(values, model.model.layers[0].mlp.up_proj.quantized_weight().detach(), rtol=ROUNDING)


def test_biases_of_queries_and_keys_have_the_order_of_their_rows(tmp_path):
    model = trained("llama", 4, options={"attention_bias": True})
    exported(model, tmp_path)
    stored = tensors(tmp_path)[0]
    attention = model.model.layers[0].self_attn
    for own, heads in (("q", 4), ("k", 2)):
        layer = getattr(attention, f"{own}_proj")
        rows = np.concatenate([layer.quantized_weight().detach().numpy(), layer.bias.detach().numpy()[:, None]], axis=1)
        halves = rows.reshape(heads, 2, -1, rows.shape[1])
        ordered = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows.shape)  # neighbours rotate together
        weight = stored[f"blk.0.attn_{own}.weight"]
        values = gguf.dequantize(weight.data, weight.tensor_type)
        assert np.allclose(values, ordered[:, :-1], rtol=2 * ROUNDING, atol=1e-6)
        assert np.array_equal(stored[f"blk.0.attn_{own}.bias"].data, ordered[:, -1])


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_scaled_rotary_frequencies_are_stored_as_their_factors(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    model = trained("llama", 4, options={"rope_parameters": rope})
    exported(model, tmp_path)
    factors = torch.from_numpy(tensors(tmp_path)[0]["rope_freqs.weight"].data.copy())
    plain_frequencies = 1e4 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain_frequencies / factors, model.model.rotary_emb.inv_freq, rtol=1e-5)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    import tiny_models

    def refused(model, message):
        folder = tmp_path / message[:8].strip()
        model.save_pretrained(folder)
        with pytest.raises(InputError, match=message) as caught:
            export(folder, tmp_path / "out", format="gguf")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    neox = tiny_models.causal_lm("gpt-neox", dtype=torch.float32)
    qat.quantize_model(neox)
    refused(neox, "families llama, qwen2, qwen3, gpt2; this one is GPTNeoXForCausalLM")
    refused(trained("llama", options={"hidden_act": "gelu"}), "no llama model with the activation gelu")
    refused(trained("llama", 2, steps=0, quantizer="quest"), "no integers times a scale")
    refused(trained("llama", 2, group_size=16), "in groups of 16")
    refused(trained("llama", 8, quantizer="parq"), "integers from -255 to 255 times a scale")
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    refused(trained("llama", options={"rope_parameters": dynamic}), "of the type dynamic")


def byte_level(folder, *, digits=False):
    """A byte-level BPE tokenizer of a few tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), *steps]) if digits else steps[0]
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox, the lazy dog, 2024"] * 5, trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<end>", eos_token="<end>").save_pretrained(folder)


@pytest.mark.parametrize(("digits", "name"), [(False, "gpt-2"), (True, "smollm")])
def test_the_tokenizer_is_in_the_file(digits, name, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = plain("llama").config.to_dict() | {"vocab_size": 320}
    model = LlamaForCausalLM(LlamaConfig(**config))
    qat.quantize_model(model)
    byte_level(tmp_path / "saved", digits=digits)
    assert f"({name}), 320 tokens" in exported(model, tmp_path).facts["vocabulary"]
    _, fields = tensors(tmp_path)
    assert fields["tokenizer.ggml.pre"].contents() == name
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD319]"
    assert fields["tokenizer.ggml.token_type"].contents()[0] == gguf.TokenType.CONTROL
    text = "the quick fox saw two dogs"
    ids = AutoTokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=FILE)(text)["input_ids"] == ids


def test_other_tokenizers_are_refused(tmp_path):
    import saved_models

    trained("llama").save_pretrained(tmp_path / "saved")
    saved_models.tokenizer(28).save_pretrained(tmp_path / "saved")
    assert VOCABULARY >= 28
    with pytest.raises(InputError, match="byte-level BPE tokenizers"):
        export(tmp_path / "saved", tmp_path / "out", format="gguf")
