"""LoRA with peft: adapters beside quantized weights, and adapters merged into the latents."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers as t

import qat
from qat.layers.linear import full_precision_names

peft = pytest.importorskip("peft")

COMMON = {"vocab_size": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.arange(2, 22).reshape(2, 10)
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def base(kind="llama"):
    torch.manual_seed(0)
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(**COMMON, n_embd=8, n_layer=2, n_head=2, n_positions=32)).eval()
    return t.LlamaForCausalLM(t.LlamaConfig(**COMMON, **SHAPE, max_position_embeddings=32)).eval()


def adapted(kind="llama", **options):
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(base(kind), config).eval()


@pytest.mark.parametrize(
    ("kind", "targets", "count"),
    [("llama", ["q_proj", "v_proj"], 14), ("llama", "all-linear", 14), ("gpt2", ["c_attn"], 8)],
)
def test_adapters_stay_in_full_precision(kind, targets, count):
    plain = adapted(kind, target_modules=targets)
    model = copy.deepcopy(plain)
    report = qat.quantize_model(model, qat.QuantConfig(bits=2))
    assert len(report.swapped) == count
    assert not any("lora" in name for name in report.swapped)
    adapters = [name for name, reason in report.skipped.items() if reason == "LoRA adapter: full precision"]
    assert len(adapters) == 2 * sum(name.endswith("base_layer") for name in report.swapped) > 0
    assert any("merge_and_unload() before quantize_model" in note for note in report.notes)

    parameters = dict(plain.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, layer in full_precision_names(model).items():
            parameters[name].copy_(layer.quantized_weight())
    assert torch.equal(model(**BATCH).logits, plain(**BATCH).logits)

    model(**BATCH).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in plain.named_parameters() if "lora_" in name}
    assert any("do not require gradients" in note for note in report.notes)


def test_latents_beside_adapters_train_where_they_are_asked_to():
    model = adapted(target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    model(**BATCH).loss.backward()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.grad is not None
    assert layer.base_layer.scale.grad is not None
    assert layer.lora_A["default"].weight.grad is not None


def test_merged_adapters_are_quantized_with_the_weights():
    model = adapted(target_modules="all-linear")
    logits = model(**BATCH).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**BATCH).logits, logits)
    weight = merged.model.layers[0].mlp.up_proj.weight
    merged.requires_grad_(True)
    report = qat.quantize_model(merged, qat.QuantConfig(bits=4))
    assert len(report.swapped) == 14
    assert report.notes == ()
    assert merged.model.layers[0].mlp.up_proj.weight is weight
    merged(**BATCH).loss.backward()
    assert weight.grad is not None


def test_a_merged_model_says_that_peft_has_frozen_it():
    merged = adapted(target_modules="all-linear").merge_and_unload()
    report = qat.quantize_model(merged, qat.QuantConfig(bits=4))
    assert report.notes == ("14 of 14 quantized weights do not require gradients, and training leaves them",)


def test_what_reads_the_base_weight_is_left_with_its_reason():
    report = qat.quantize_model(adapted(target_modules=["q_proj"], use_dora=True), qat.QuantConfig(bits=2))
    left = [name for name in report.skipped if name.endswith("q_proj.base_layer")]
    assert len(left) == 2
    assert "reads its weight" in report.skipped[left[0]]
    assert len(report.swapped) == 12


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_wrapped_head_is_still_the_head(options):
    report = qat.quantize_model(adapted(**{"target_modules": ["q_proj"], **options}), qat.QuantConfig(bits=2))
    assert not any("lm_head" in name for name in report.swapped)
    assert "output head (quantize_head=False)" in report.skipped.values()


def test_an_adapted_projection_has_its_cache_quantized_with_the_adapter():
    model = adapted(target_modules=["k_proj", "v_proj"])
    other = copy.deepcopy(model)
    qat.quantize_model(model, qat.QuantConfig(bits=4))
    qat.quantize_model(other, qat.QuantConfig(bits=4, cache_bits=4))
    values = [one(input_ids=TOKENS, use_cache=True).past_key_values.layers[0].values.detach() for one in (model, other)]
    from qat.layers.activations import quantize_activations

    torch.testing.assert_close(values[1], quantize_activations(values[0], 4))


def test_resets_move_the_latents_under_the_adapters():
    model = adapted(target_modules="all-linear")
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    before, loss = layer.weight.detach().clone(), model(**BATCH).loss
    qat.interpolate_(model, alpha=0.5)
    assert not torch.equal(layer.weight, before)
    assert torch.equal(model(**BATCH).loss, loss)


def test_peft_is_not_imported_for_a_model_without_it():
    code = "import sys, torch, qat; m = torch.nn.Sequential(torch.nn.Linear(2, 2)); qat.quantize_model(m)"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'peft' not in sys.modules"], check=True)
