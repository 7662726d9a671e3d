"""How good a language model is on a text: validation loss and perplexity, exact means over all counted tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from qat.text.corpus import Blocks
from spectra.backend.errors import InputError
from spectra.integrations.loading import longest_sequence


@dataclass(frozen=True)
class Evaluation:
    """The mean next-token cross-entropy in nats over `tokens` predicted tokens, in blocks of `block` tokens."""

    loss: float
    tokens: int
    block: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity_of(self.loss)


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def evaluate(model: nn.Module, blocks: Blocks, *, batch_size: int = 16) -> Evaluation:
    """The loss sum_i -log p(token_i | those before it in its block) / N over all blocks; N counts length - 1 a block.

    In evaluation mode and without gradients; the mode of every module is put back. Sums are in float64.
    """
    total = 0.0
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(blocks), batch_size):
            tokens = blocks.blocks[start : start + batch_size].to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
            losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            total += losses.double().sum().item()
    count = len(blocks) * (blocks.length - 1)
    return Evaluation(total / count, count, blocks.length)


def perplexity(model: nn.Module, tokens: torch.Tensor, *, block: int = 2048, batch_size: int = 1) -> Evaluation:
    """Perplexity in non-overlapping blocks, the usual way: blocks of min(block, the longest input of the model).

    tokens: (n,) token ids. The incomplete last block is left out, unless it is the only one. Raises InputError for
    fewer than two tokens.
    """
    if len(tokens) < 2:
        raise InputError(f"perplexity needs two tokens or more, the text has {len(tokens)}: give a longer text")
    if block < 2:
        raise InputError(f"a block has two tokens or more, got --block {block}")
    longest = longest_sequence(model)  # type: ignore[arg-type]
    length = min(block, len(tokens), longest if longest is not None else block)
    return evaluate(model, Blocks(tokens, length), batch_size=batch_size)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and the like off inside; every module is then put back in the mode it was in, one by one."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
