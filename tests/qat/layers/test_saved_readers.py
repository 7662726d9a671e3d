"""Folders of models with experts, quantized activations and caches: the same logits after loading."""

import pytest
import torch
import transformers as t

import qat
from qat.layers.activations import ActivationQuantizer

COMMON = {"vocab_size": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 32}
SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1, "num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": lambda: t.MixtralConfig(**COMMON, **SHAPE, **HEADS, num_local_experts=4),
    "gpt-oss": lambda: t.GptOssConfig(**COMMON, **SHAPE, **HEADS, head_dim=4, num_local_experts=4),
}
TOKENS = torch.arange(2, 22).reshape(2, 10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_bits": 8, "activation_symmetric": False, "cache_bits": 4},
        {"bits": 4, "group_size": 4},
        {"bits": 1.58, "quantizer": "bitnet"},
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_saved_and_loaded(name, options, tmp_path):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    qat.quantize_model(model, qat.QuantConfig(**{"bits": 2, **options}))
    logits = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path)
    loaded = qat.load(tmp_path)
    loaded.set_attn_implementation("eager")
    assert torch.equal(loaded(input_ids=TOKENS).logits, logits)
    layer = loaded.get_submodule("model.layers.0.mlp.experts.down_proj")
    assert torch.equal(layer.weight, model.model.layers[0].mlp.experts.down_proj.weight)
    activations = loaded.get_submodule("model.layers.0.self_attn.q_proj").activations
    assert activations == (ActivationQuantizer(8, symmetric=False) if "activation_bits" in options else None)
    if "activation_bits" not in options:
        plain = t.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_packed(name, tmp_path):
    from qat import cli

    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    qat.quantize_model(model, qat.QuantConfig(bits=2, activation_bits=8))
    model.save_pretrained(tmp_path / "saved")
    command = ["export", str(tmp_path / "saved"), "--format", "packed", "--out", str(tmp_path / "packed")]
    assert cli.main(command) == 0
    packed = qat.load(tmp_path / "packed")
    packed.set_attn_implementation("eager")
    assert torch.equal(packed(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_adapters_beside_quantized_weights_are_saved_as_peft_does(tmp_path):
    peft = pytest.importorskip("peft")
    config = t.LlamaConfig(**COMMON, **SHAPE)
    torch.manual_seed(0)
    model = peft.get_peft_model(
        t.LlamaForCausalLM(config), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    from safetensors.torch import load_file

    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
