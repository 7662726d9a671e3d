"""How many products the negative share of small trained language models takes.

    python benchmarks/trust/trained_models.py [--budget 300] [--steps 320] [--bits 16 1 1.58 2 4]

A GPT-2, a Qwen3 and a Llama of some 2e5 weights are trained on Python's standard library, in full precision and then,
from there, at each bit-width. `resolve` measures the Hessian over four training sequences of 128 tokens, in the
quantized weights alone ("linear") and in all weights. A line for each Hessian says n, the interval, the products spent,
whether the half-width of .05 was reached, and the part of the time outside Hessian-vector products. These Hessians are
too large to be diagonalised: congruence.py says whether intervals hold.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
import transformers

import qat
import spectra
from qat.text.corpus import Blocks, make_blocks, standard_library, trained_tokenizer
from qat.training.config import TrainConfig
from qat.training.train import train

FULL_PRECISION = 16
LENGTH = 128
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 256, "n_positions": LENGTH},
    "qwen3": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
    },
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": True,
    },
}


def untrained(architecture: str, vocabulary: int) -> Any:
    transformers.set_seed(0)
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, pad_token_id=0, **SIZES[architecture]
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def _is_linear(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is a matrix of a layer that `qat.quantize_model` quantizes."""
    return parameter.ndim == 2 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head"))


class _Timed:
    """Counts the seconds that an operator spends on its products."""

    def __init__(self, op: Any):
        self.seconds, self._multiply = 0.0, op._products
        op._products = self

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        products = self._multiply(vectors)
        self.seconds += time.perf_counter() - started
        return products


def measure(name: str, op: Any, budget: int, counts: list[int]) -> None:
    op.preflight()
    timed, started = _Timed(op), time.perf_counter()
    share = spectra.resolve(op, half_width=0.05, budget=budget)
    seconds = time.perf_counter() - started
    counts[0] += share.resolved
    counts[1] += 1
    result = "resolved" if share.resolved else "not resolved"
    print(
        f"{name}: n = {op.shape[0]}, [{share.low:.3f}, {share.high:.3f}] after {share.products} products, {result}, "
        f"{seconds:.0f} s, {1 - timed.seconds / seconds:.0%} outside",
        flush=True,
    )
    op.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Products that the negative share of small trained models takes.")
    parser.add_argument("--budget", type=int, default=300)
    parser.add_argument("--steps", type=int, default=320, help="of each training")
    parser.add_argument("--bits", nargs="+", type=float, default=[FULL_PRECISION, 1, 1.58, 2, 4])
    parser.add_argument("--architectures", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    text = standard_library()
    tokenizer = trained_tokenizer(text)
    train_blocks, validation_blocks = make_blocks(text, tokenizer, length=LENGTH)
    measured = Blocks(train_blocks.blocks[:4].flatten(), LENGTH)
    batch = {"input_ids": measured.blocks, "labels": measured.blocks}
    counts = [0, 0]
    for architecture in options.architectures:
        reference = untrained(architecture, len(tokenizer))
        settings = TrainConfig(steps=options.steps, batch_size=16, learning_rate=3e-3, schedule="cosine", warmup=0.05)
        result = train(reference, train_blocks, validation_blocks.evenly(32), settings, name=architecture, device="cpu")
        print(f"{architecture}: validation loss {result.validation_loss:.3f}", flush=True)
        for bits in options.bits:
            model = copy.deepcopy(reference)
            if bits != FULL_PRECISION:
                qat.quantize_model(model, qat.QuantConfig(bits=bits if bits % 1 else int(bits)))
                again = TrainConfig(steps=options.steps // 4, batch_size=16, learning_rate=1e-3)
                train(model, train_blocks, validation_blocks.evenly(32), again, name=f"{bits:g} bit", device="cpu")
            for which, params in (("linear", _is_linear), ("all", "*")):
                if bits == FULL_PRECISION:
                    op = spectra.HessianOperator(model, [batch], params=params)
                else:
                    op = qat.hessian_operator(model, [batch], "ste", params=params)
                measure(f"{architecture}, {bits:g} bit, {which}", op, options.budget, counts)
    print(f"{counts[0]} of {counts[1]} resolved to .05 within {options.budget} products")


if __name__ == "__main__":
    main()
