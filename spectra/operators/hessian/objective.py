"""The loss over a list of batches, as a weighted sum of the losses of its pieces."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from spectra.backend import ranks
from spectra.backend.errors import InputError, NonFiniteError
from spectra.operators.hessian.batches import as_batches, concatenated, moved, rows_between, rows_in
from spectra.operators.hessian.losses import BatchLoss, counted

IGNORED = -100  # the label that PyTorch's and transformers' losses leave out


@dataclass(frozen=True)
class Piece:
    """A batch, or some of its rows.

    Attributes:
        batch: the data.
        share: the weight of its loss in the objective.
        name: which batch and rows it is, for messages.
    """

    batch: Any
    share: float
    name: str


class Objective:
    """The loss L = sum_b (c_b / sum c) L_b over batches b, where L_b is the mean loss of b over c_b terms.

    c_b is the number of counted tokens: labels other than -100, after the shift where the model shifts them, so that
    padding and ragged batches weigh what they should. For pairs it is the number of targets other than the loss's
    ignore_index, the sum of their class weights where the loss has some, or the number of floating-point entries.

    Args:
        model: the model.
        batches: a list, a DataLoader, or one batch alone. A batch is a Hugging Face mapping, whose model call returns
            the loss (without "labels" a causal language model predicts its own input), or an (inputs, targets) pair.
        loss: see `spectra.operators.hessian.losses.BatchLoss`. It is expected to be a mean over the batch; a module
            with reduction="sum" adds up over batches instead.
        microbatch: rows at a time. The weighted sum over microbatches is the loss of the batch.
        weight: batch -> c_b, where the count above does not fit the loss.

    Raises:
        InputError: for a batch that cannot be understood, and where nothing is counted.
        NonFiniteError: for a loss that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        loss: Callable[..., torch.Tensor] | None = None,
        *,
        microbatch: int | None = None,
        weight: Callable[[Any], float] | None = None,
    ):
        if microbatch is not None and microbatch < 1:
            raise InputError(f"microbatch must be at least 1 row, got {microbatch}")
        self.model, self.loss = model, loss
        self.batch_loss = BatchLoss(model, loss)
        self.weight = weight
        self.batches = [self.complete(batch, index) for index, batch in enumerate(as_batches(batches))]
        self.is_cut = microbatch is not None and any(rows_in(batch) > microbatch for batch in self.batches)
        self.pieces: tuple[Piece, ...] = tuple(self._cut(microbatch))

    @property
    def rows(self) -> list[int]:
        """Rows of each piece."""
        return [rows_in(piece.batch) for piece in self.pieces]

    @property
    def adds_up(self) -> bool:
        """Whether the loss module sums over a batch, so that the objective is the sum over batches."""
        return getattr(self.loss, "reduction", None) == "sum"

    def with_pieces(self, pieces: Sequence[Piece]) -> Objective:
        """The part of the objective that these pieces carry: a term of the sum, with their shares as they are."""
        part = copy.copy(self)
        part.pieces = tuple(pieces)
        return part

    def with_shares(self, shares: Sequence[float]) -> Objective:
        """The same pieces with other weights."""
        return self.with_pieces([replace(p, share=float(s)) for p, s in zip(self.pieces, shares, strict=True)])

    def whole(self) -> Piece | None:
        """All batches as one piece of share 1, None where their shapes do not allow that."""
        batch = self.batches[0] if len(self.batches) == 1 else concatenated(self.batches)
        return None if batch is None else Piece(batch, 1.0, "all batches together")

    # -- cutting into rows

    def some_rows(self, count: int) -> Piece:
        """The first rows of the largest piece."""
        piece = max(self.pieces, key=lambda piece: rows_in(piece.batch))
        rows = rows_in(piece.batch)
        return Piece(rows_between(piece.batch, 0, min(count, rows), rows), piece.share, f"{piece.name}, {count} rows")

    def halved(self) -> Objective:
        """The same objective with its larger pieces cut in two."""
        most = (max(self.rows) + 1) // 2
        cut = self.with_pieces([part for piece in self.pieces for part in self.split(piece, most)])
        cut.is_cut = True
        return cut

    def split(self, piece: Piece, most: int) -> Iterator[Piece]:
        """The piece in parts of at most `most` rows, which share its weight by what they count."""
        if rows_in(piece.batch) <= most:
            yield piece
            return
        parts = list(self._parts(piece.batch, most))
        total = sum(count for _, count, _ in parts)
        for part, count, where in parts:
            if count > 0:
                share = piece.share if self.adds_up else piece.share * count / total
                yield Piece(part, share, f"{piece.name}, part {where}")

    def _parts(self, batch: Any, most: int) -> Iterator[tuple[Any, float, str]]:
        """The batch in parts of at most so many rows, what each counts, and which rows they are."""
        rows = rows_in(batch)
        for start in range(0, rows, most):
            stop = min(start + most, rows)
            part = rows_between(batch, start, stop, rows)
            yield part, self.count(part), f"{start} to {stop - 1}"

    def _cut(self, microbatch: int | None) -> Iterator[Piece]:
        named: list[tuple[Any, float, str]] = []
        for index, batch in enumerate(self.batches):
            if microbatch is None or microbatch >= rows_in(batch):
                named.append((batch, self.count(batch), f"batch {index}"))
                continue
            for part, count, where in self._parts(batch, microbatch):
                named.append((part, count, f"batch {index}, rows {where}"))
        total = sum(count for _, count, _ in named)
        if not total > 0:
            raise InputError(
                f"no token of the {len(self.batches)} batches counts in the loss (every label is {IGNORED}); "
                "give batches with labels"
            )
        for batch, count, name in named:
            if count > 0:
                yield Piece(batch, 1.0 if self.adds_up else count / total, name)

    # -- the loss of a piece

    def forward(self, piece: Piece, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The loss of one piece, with its graph: a scalar.

        Args:
            piece: the batch or microbatch.
            device: that it is brought to.
            dtype: that its floating-point tensors are brought to, None for their own.

        Returns:
            The loss, a scalar.

        Raises:
            NonFiniteError: for NaN or infinity, naming the batch.
        """
        value = self.evaluate(piece, device, dtype)
        if not torch.isfinite(value):
            broken = [name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()]
            cause = f"parameter '{broken[0]}' holds NaN or infinity" if broken else "every weight is finite"
            raise NonFiniteError(
                f"the loss of {piece.name} is {value.item()}, expected a finite number; {cause}: "
                f"check {'the weights' if broken else 'that batch'}"
            )
        return value

    def evaluate(self, piece: Piece, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`forward` without a look at the value, for transformations under which there is none."""
        return self.batch_loss(moved(piece.batch, device, dtype)).reshape(())

    def complete(self, batch: Any, index: int) -> Any:
        """The batch in the form that the model gets, checked. Language-model batches gain labels if they lack them."""
        if isinstance(batch, torch.Tensor) and shifts_labels(self.model):
            batch = {"input_ids": batch}
        if isinstance(batch, Mapping):
            batch = dict(batch)
            if "labels" not in batch and self.loss is None and shifts_labels(self.model) and "input_ids" in batch:
                labels = batch["input_ids"].clone()
                if batch.get("attention_mask") is not None and batch["attention_mask"].shape == labels.shape:
                    labels[batch["attention_mask"] == 0] = IGNORED
                batch["labels"] = labels
            return batch
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return tuple(batch)
        if self.loss is not None and isinstance(batch, tuple | list | torch.Tensor):
            return tuple(batch) if isinstance(batch, list) else batch
        members = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise InputError(
            f"batch {index} must be a mapping of tensors or a pair (inputs, targets), got {type(batch).__name__}"
            f"{members}; for other batches pass loss=lambda model, batch: ..."
        )

    def count(self, batch: Any) -> float:
        """c_b: how many terms the loss of a completed batch averages."""
        if self.weight is not None:
            return float(self.weight(batch))
        rows = rows_in(batch)
        if isinstance(batch, Mapping):
            labels = batch.get("labels")
            if isinstance(labels, torch.Tensor) and labels.ndim > 1 and self.loss is None and shifts_labels(self.model):
                labels = labels[..., 1:]
            return counted(self.loss, labels, rows=rows)
        return counted(self.loss, batch[1], rows=rows) if isinstance(batch, tuple) and len(batch) == 2 else float(rows)


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss compares position t with label t + 1, as transformers' causal models do."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    kind = getattr(model, "loss_type", None)
    if kind is not None:
        return kind in ("ForCausalLM", "ForConditionalGeneration")
    name = type(model).__name__
    return "CausalLM" in name or "LMHead" in name


def pieces_of_rank(pieces: tuple[Piece, ...]) -> list[Piece]:
    """This rank's microbatches: the largest first, every rank in turn, so that the ranks have about as much to do.

    Args:
        pieces: all microbatches.

    Returns:
        This rank's microbatches.

    Raises:
        InputError: for fewer microbatches than ranks.
    """
    if len(pieces) < ranks.rank_count():
        raise InputError(
            f"at least one batch a rank is expected, got {len(pieces)} for {ranks.rank_count()} ranks: "
            "cut them with microbatch="
        )
    return ranks.items_of_rank(sorted(pieces, key=lambda piece: -piece.share))
