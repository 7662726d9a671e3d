"""Validation loss and perplexity of a language model on a text, as exact means over the predicted tokens."""

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

BLOCK = 2048  # tokens a block, where the model takes as many


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        loss: The mean next-token cross-entropy, in nats a token.
        tokens: How many tokens were predicted.
        block: Tokens a block; the first token of a block is not predicted.
    """

    loss: float
    tokens: int
    block: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity_of(self.loss)


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite where that overflows, NaN for NaN."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


def evaluate(model: nn.Module, blocks: Blocks, *, batch_size: int = 16) -> Evaluation:
    """The mean loss over blocks: - (1 / N) sum_i log p(token_i | the tokens before it in its block).

    N counts length - 1 predicted tokens a block. The model computes in evaluation mode and without gradients; the mode
    of every module is put back. The sum is in float64.

    Args:
        model: A causal language model of transformers.
        blocks: Tokens in blocks.
        batch_size: Blocks a forward pass.

    Returns:
        The loss, and how many tokens it is the mean of.
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


def perplexity(model: nn.Module, tokens: torch.Tensor, *, block: int | None = None, batch_size: int = 1) -> Evaluation:
    """Perplexity of a text in blocks that do not overlap.

    An incomplete last block is left out, unless it is the only one.

    Args:
        model: A causal language model of transformers.
        tokens: Token ids, (number of tokens,).
        block: Tokens a block; where the text has fewer, that many. None: 2048, or the most that the model takes.
        batch_size: Blocks a forward pass.

    Returns:
        The loss, with `.perplexity`.

    Raises:
        InputError: There are fewer than two tokens, or `block` is below 2 or longer than the model takes.
    """
    if len(tokens) < 2:
        raise InputError(f"perplexity needs two tokens or more, the text has {len(tokens)}: give a longer text")
    check_block(block)
    longest = longest_sequence(model)  # type: ignore[arg-type]
    if block is None:
        block = min(BLOCK, longest or BLOCK)
    if longest is not None and block > longest:
        raise InputError(f"the model takes blocks of at most {longest} tokens, got --block {block}: lower it")
    return evaluate(model, Blocks(tokens, min(block, len(tokens))), batch_size=batch_size)


def check_block(block: int | None) -> None:
    """Raise an InputError for a number of tokens that no block can have."""
    if block is not None and block < 2:
        raise InputError(f"a block has two tokens or more, got --block {block}")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, which turns dropout off; on exit every module gets back the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
