"""Small quantized models after a few training steps, and what the same of them means."""

import oracles
import torch

import qat

BITS = (1, 1.58, 2, 3, 4, 8)
VOCABULARY = 40


def plain(family, *, hidden=64, seed=0, tied=True, **options):
    """A causal language model of one layer, wide enough for the blocks of other programs."""
    import transformers as t

    torch.manual_seed(seed)
    modern = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    common = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    match family:
        case "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**common, **modern, **options))
        case "qwen2":
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**common, **modern, **options))
        case "qwen3":
            model = t.Qwen3ForCausalLM(t.Qwen3Config(**common, **modern, head_dim=128, **options))
        case "gpt2":
            model = t.GPT2LMHeadModel(
                t.GPT2Config(**common, n_embd=hidden, n_layer=1, n_head=4, n_positions=32, **options)
            )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def trained(family="llama", bits=2, *, steps=3, seed=0, options=None, **config):
    """A quantized model after a few steps of AdamW, in evaluation mode."""
    model = plain(family, seed=seed, **(options or {}))
    qat.quantize_model(model, qat.QuantConfig(bits=bits, **config))
    scales = qat.decay_exempt(model)
    weights = [parameter for name, parameter in model.named_parameters() if name not in scales]
    learned = [parameter for name, parameter in model.named_parameters() if name in scales]
    groups = [{"params": weights}, {"params": learned, "lr": 1e-5}] if learned else weights
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    g = oracles.generator(seed)
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (2, 12), generator=g)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model, length=20):
    ids = torch.randint(0, VOCABULARY, (2, length), generator=oracles.generator(9))
    with torch.no_grad():
        out = model(input_ids=ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def assert_same_codes_and_scales(model, other):
    layers, others = qat.quant_layers(model), qat.quant_layers(other)
    assert [name for name, _ in layers] == [name for name, _ in others]
    assert layers
    for (name, layer), (_, another) in zip(layers, others, strict=True):
        assert torch.equal(layer.codes(), another.codes()), name
        assert torch.equal(layer.scale, another.scale), name
