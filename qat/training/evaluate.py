"""Validation loss and perplexity of a language model on a text, as exact means over the predicted tokens."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from qat.text.corpus import Blocks
from spectra.backend import memory
from spectra.backend.errors import InputError, first_line
from spectra.integrations.loading import longest_sequence

BLOCK = 2048  # tokens a block, where the model takes as many
MOST_BLOCKS = 16  # in a forward pass
LOGIT_COPIES = 4  # of the float32 logits that a forward pass needs room for, its activations included
MEMORY_SHARE = 0.5  # of the free memory that a forward pass may plan with
ROWS = 512  # tokens whose losses are taken at once, so that float32 copies of the logits stay small


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        loss: The mean next-token cross-entropy, in nats a token.
        tokens: How many tokens were predicted.
        block: Tokens a block; the first token of a block is not predicted.
        stride: Tokens between the starts of two blocks; None where blocks do not overlap.
        bytes: UTF-8 bytes of the predicted tokens; None where they were not counted.
    """

    loss: float
    tokens: int
    block: int
    stride: int | None = None
    bytes: int | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity_of(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """loss * tokens / (bytes * log 2), which models with different tokenizers can be compared by."""
        return None if not self.bytes else self.loss * self.tokens / (self.bytes * math.log(2))


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
            total += token_losses(model, tokens).double().sum().item()
    count = len(blocks) * (blocks.length - 1)
    return Evaluation(total / count, count, blocks.length)


def token_losses(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """- log p of each token but the first of a row, given those before it.

    Args:
        model: A causal language model of transformers.
        tokens: Token ids, (rows, length), on the model's device.

    Returns:
        (rows, length - 1), float32, in nats.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    losses = [
        functional.cross_entropy(part.float(), target, reduction="none")
        for part, target in zip(logits.split(ROWS), targets.split(ROWS), strict=True)
    ]
    return torch.cat(losses).view(len(tokens), -1)


def perplexity(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    block: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    byte_ends: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of a text in blocks.

    Without a stride the blocks do not overlap, and an incomplete last one is left out, unless it is the only one: the
    way of GPTQ (arXiv 2210.17323) and of most papers on quantization. With a stride, a block begins every `stride`
    tokens, and of each but the first only the tokens that no block before it holds count. If the stride is smaller
    than the block, every token but the first counts once, with block - stride tokens before it or all there are.

    Args:
        model: A causal language model of transformers.
        tokens: Token ids, (number of tokens,).
        block: Tokens a block; where the text has fewer, that many. None: 2048, or the most that the model takes.
        stride: Tokens between the starts of two blocks, at most `block`; None: blocks do not overlap.
        limit: How many blocks are evaluated at most, from the first; None: all.
        batch_size: Blocks a forward pass; None: as many as fit into half of the free memory, 16 at most. Where memory
            runs out it is halved.
        byte_ends: For each token the UTF-8 bytes of the text up to its end; for `bits_per_byte`.
        progress: Called with how many blocks are done, and how many there are.

    Returns:
        The loss, with `.perplexity`.

    Raises:
        InputError: There are fewer than two tokens, a setting is out of range, or one block does not fit into memory.
    """
    if len(tokens) < 2:
        raise InputError(f"perplexity needs two tokens or more, the text has {len(tokens)}: give a longer text")
    check_block(block, stride, limit)
    longest = longest_sequence(model)  # type: ignore[arg-type]
    if block is None:
        block = min(BLOCK, longest or BLOCK)
    if longest is not None and block > longest:
        raise InputError(f"the model takes blocks of at most {longest} tokens, got --block {block}: lower it")
    block = min(block, len(tokens))
    if stride is not None and stride > block:
        raise InputError(f"--stride is at most the {block} tokens of a block, got {stride}: lower it")
    spans = _spans(len(tokens), block, stride)[:limit]
    device = next(iter(model.parameters())).device
    batch_size = batch_size or fitting_batch(model, block, device)
    total, done = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for group in _groups(spans):
            for loss in _batches(model, tokens, group, batch_size, device):
                total += loss
                done += 1
                if progress is not None:
                    progress(done, len(spans))
    counted = sum(span.end - span.counted for span in spans)
    size = None
    if byte_ends is not None:
        size = sum(byte_ends[span.end - 1] - byte_ends[span.counted - 1] for span in spans)
    return Evaluation(total / counted, counted, block, stride, size)


@dataclass(frozen=True)
class _Span:
    """A block of a text: its tokens are start to end, and the loss counts those from `counted` on."""

    start: int
    counted: int
    end: int


def _spans(count: int, block: int, stride: int | None) -> list[_Span]:
    """The blocks of a text of so many tokens."""
    if stride is None:
        return [_Span(start, start + 1, start + block) for start in range(0, count - block + 1, block)]
    spans: list[_Span] = []
    for start in range(0, count, stride):
        end = min(start + block, count)
        counted = max(spans[-1].end if spans else 0, start + 1)
        if counted < end:
            spans.append(_Span(start, counted, end))
        if end == count:
            break
    return spans


def _groups(spans: Sequence[_Span]) -> Iterator[list[_Span]]:
    """Spans one after another that have the same length."""
    group: list[_Span] = []
    for span in spans:
        if group and span.end - span.start != group[0].end - group[0].start:
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _batches(
    model: nn.Module, tokens: torch.Tensor, spans: list[_Span], batch_size: int, device: torch.device
) -> Iterator[float]:
    """The sum of the counted losses of each span. Where memory runs out, fewer are computed at once."""
    start = 0
    while start < len(spans):
        batch = spans[start : start + batch_size]
        rows = torch.stack([tokens[span.start : span.end] for span in batch]).to(device)
        try:
            losses = token_losses(model, rows).double().cpu()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if batch_size == 1:
                length = rows.shape[1]
                raise InputError(
                    f"a block of {length} tokens does not fit into the memory of {device} ({first_line(error)}): "
                    "lower --block, or choose another --device"
                ) from error
            batch_size = len(batch) // 2 or 1
            del rows
            error.__traceback__ = None
            _free(device)
            continue
        for span, row in zip(batch, losses, strict=True):
            yield row[span.counted - span.start - 1 :].sum().item()
        start += len(batch)


def fitting_batch(model: nn.Module, block: int, device: torch.device) -> int:
    """How many blocks a forward pass may have, by the size of their logits and the free memory.

    Args:
        model: A causal language model of transformers.
        block: Tokens a block.
        device: Where it computes.

    Returns:
        1 to 16.
    """
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    needed = LOGIT_COPIES * 4 * block * vocabulary
    return max(1, min(MOST_BLOCKS, int(MEMORY_SHARE * memory.available(device)) // needed))


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out; on a CPU, torch raises a plain RuntimeError for that."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_block(block: int | None, stride: int | None = None, limit: int | None = None) -> None:
    """Raise an InputError for numbers that no evaluation can have.

    Args:
        block: Tokens a block.
        stride: Tokens between the starts of two blocks.
        limit: How many blocks at most.

    Raises:
        InputError: A number is too small.
    """
    if block is not None and block < 2:
        raise InputError(f"a block has two tokens or more, got --block {block}")
    if stride is not None and stride < 1:
        raise InputError(f"--stride is one token or more, got {stride}")
    if limit is not None and limit < 1:
        raise InputError(f"--limit is one block or more, got {limit}")


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
