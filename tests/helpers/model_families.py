"""Configurations of transformers' language models, tiny and in float32, a line for each family."""

import torch
import transformers as t

COMMON = {"vocab_size": 48, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
MODERN = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = {"num_key_value_heads": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 32}
FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
ROUTED = {"num_experts_per_tok": 2}

CONFIGS = {
    "llama": lambda: t.LlamaConfig(**COMMON, **MODERN, **GROUPED),
    "qwen3": lambda: t.Qwen3Config(**COMMON, **MODERN, **GROUPED, head_dim=4),
    "gemma2": lambda: t.Gemma2Config(**COMMON, **MODERN, **GROUPED, head_dim=4),
    "gemma3": lambda: t.Gemma3TextConfig(**COMMON, **MODERN, **GROUPED, head_dim=4),
    "gpt-neox": lambda: t.GPTNeoXConfig(**COMMON, **MODERN),
    "phi": lambda: t.PhiConfig(**COMMON, **MODERN),
    "phi3": lambda: t.Phi3Config(**COMMON, **MODERN, **GROUPED),
    "gpt2": lambda: t.GPT2Config(**COMMON, **GPT),
    "gpt-j": lambda: t.GPTJConfig(**COMMON, **GPT, rotary_dim=4),
    "gpt-bigcode": lambda: t.GPTBigCodeConfig(**COMMON, **GPT),
    "opt": lambda: t.OPTConfig(**COMMON, **OPT, num_hidden_layers=2, num_attention_heads=4),
    "falcon": lambda: t.FalconConfig(**COMMON, **FALCON),
    "falcon-alibi": lambda: t.FalconConfig(**COMMON, **FALCON, multi_query=False, alibi=True),
    "falcon-groups": lambda: t.FalconConfig(**COMMON, **FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "bloom": lambda: t.BloomConfig(**COMMON, hidden_size=16, n_layer=2, n_head=4),
    "mpt": lambda: t.MptConfig(**COMMON, d_model=16, n_heads=4, n_layers=2, max_seq_len=32),
    "mixtral": lambda: t.MixtralConfig(**COMMON, **MODERN, **GROUPED, num_local_experts=4),
    "olmoe": lambda: t.OlmoeConfig(**COMMON, **MODERN, **ROUTED, num_experts=4),
    "granite-moe": lambda: t.GraniteMoeConfig(**COMMON, **MODERN, **GROUPED, num_local_experts=4),
    "mamba": lambda: t.MambaConfig(**COMMON, hidden_size=16, state_size=4, num_hidden_layers=2),
    "jamba": lambda: t.JambaConfig(
        **COMMON, **MODERN, **GROUPED, **JAMBA, **ROUTED, num_experts=4, mamba_d_state=4, mamba_dt_rank=2
    ),
    "recurrent-gemma": lambda: t.RecurrentGemmaConfig(
        **COMMON, **FALCON | {"num_hidden_layers": 3}, intermediate_size=24, num_key_value_heads=1, lru_width=16
    ),
}


def causal_lm(family):
    """The model of a family in evaluation mode, from seed 0."""
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").eval()
