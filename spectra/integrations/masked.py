"""Batches for a masked language model: text with some tokens hidden, the same ones each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from spectra.backend.errors import InputError
from spectra.integrations.loading import cut_sequences, longest_sequence, sequence_length
from spectra.operators.hessian.objective import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARE = 0.15  # of the tokens to predict (Devlin et al., arXiv 1810.04805, section 3.1), and of those:
HIDDEN, REPLACED = 0.8, 0.1  # by the mask token, by a random token; the others are left


def masked_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    sequences: int = 8,
    length: int | None = None,
    batch_size: int = 8,
    share: float = SHARE,
    seed: int = 0,
) -> tuple[list[dict[str, torch.Tensor]], str]:
    """Sequences at equal distances in the texts, with some tokens to predict, chosen by a seed.

    As in training, 80 % of these tokens are replaced by the mask token, 10 % by a random one, and 10 % are left (Devlin
    et al., arXiv 1810.04805). Labels of all others are -100, which the loss leaves out. Each sequence begins and ends
    with the tokenizer's own tokens for that, which are never masked.

    Args:
        model: The model; its longest sequence, its vocabulary and its device matter.
        tokenizer: The tokenizer of the model, which has a mask token.
        texts: The texts to cut.
        sequences: How many sequences to take.
        length: Tokens a sequence with those at its ends; None is 256, or the model's longest sequence if that is
            shorter.
        batch_size: Sequences a batch.
        share: The share of the tokens of each sequence to predict; one token at least.
        seed: Which tokens.

    Returns:
        Batches with `input_ids` and `labels`, both (batch_size, length), and a sentence that counts what is predicted.

    Raises:
        InputError: As `sequence_batches`; or the tokenizer has no mask token, the share is not between 0 and 1, or a
            sequence holds nothing but special tokens.
    """
    mask: Any = tokenizer.mask_token_id
    if mask is None:
        raise InputError(
            "the tokenizer has no mask token: give a masked language model together with its own tokenizer"
        )
    if not 0 < share < 1:
        raise InputError(f"expected a share of masked tokens between 0 and 1, got {share}")
    if batch_size < 1:
        raise InputError(f"expected batches of one sequence or more, got {batch_size}")
    ends = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    start, stop = ([] if end is None else [end] for end in ends)
    limits = (longest_sequence(model), tokenizer.model_max_length)
    limit = min((limit for limit in limits if limit), default=None)
    length = sequence_length(limit, length, special=len(start + stop))
    inner = cut_sequences(model, tokenizer, texts, sequences=sequences, length=length - len(start + stop))
    first, last = (inner.new_tensor([end]).expand(sequences, len(end)) for end in (start, stop))
    rows = torch.cat([first, inner, last], dim=1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.stack([_labels(row, set(tokenizer.all_special_ids), share, generator) for row in rows])
    chosen = labels != IGNORED
    inputs, hidden, replaced = _hidden(rows, chosen, mask, _vocabulary(model), generator)
    total = int(chosen.sum())
    note = (
        f"masked-token loss of {total} of {rows.numel()} tokens (seed {seed}): {hidden} replaced by "
        f"{tokenizer.mask_token}, {replaced} by a random token, {total - hidden - replaced} left"
    )
    parts = zip(inputs.to(model.device).split(batch_size), labels.to(model.device).split(batch_size), strict=True)
    return [{"input_ids": part, "labels": wanted} for part, wanted in parts], note


def _labels(row: torch.Tensor, special: set[int], share: float, generator: torch.Generator) -> torch.Tensor:
    """The tokens of a sequence to predict, -100 elsewhere."""
    candidates = torch.tensor([i for i, token in enumerate(row.tolist()) if token not in special])
    if not len(candidates):
        raise InputError("a sequence of the text holds no token that can be masked: give other text")
    count = max(1, round(share * len(candidates)))
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    labels = torch.full_like(row, IGNORED)
    labels[chosen] = row[chosen]
    return labels


def _hidden(
    rows: torch.Tensor, chosen: torch.Tensor, mask: int, vocabulary: int, generator: torch.Generator
) -> tuple[torch.Tensor, int, int]:
    """The sequences as the model sees them, and how many tokens are masked and replaced by others."""
    draw = torch.rand(rows.shape, generator=generator)
    other = torch.randint(vocabulary, rows.shape, generator=generator)
    hidden = chosen & (draw < HIDDEN)
    replaced = chosen & (draw >= HIDDEN) & (draw < HIDDEN + REPLACED)
    seen = torch.where(hidden, mask, torch.where(replaced, other, rows))
    return seen, int(hidden.sum()), int(replaced.sum())


def _vocabulary(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size
