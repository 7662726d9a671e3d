"""The loss over a list of batches, as a weighted sum of the losses of its pieces."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from spectra.backend import ranks
from spectra.backend.errors import InputError, NonFiniteError, first_line
from spectra.operators.hessian.batches import (
    as_batches,
    mapped,
    moved,
    rows_between,
    rows_in,
    tensors_of,
    with_items,
    with_tensors,
)
from spectra.operators.hessian.losses import BatchLoss, counted

IGNORED = -100  # the label that PyTorch's and transformers' losses leave out


@dataclass(frozen=True)
class Piece:
    """A batch, or some of its rows.

    Attributes:
        batch: The data.
        share: The weight of its loss in the objective.
        name: Which batch and rows it is, for messages.
        index: Position of its batch in the list of batches.
        within: The weight of its loss in the loss of its batch; 1 for a whole batch.
    """

    batch: Any
    share: float
    name: str
    index: int = 0
    within: float = 1.0

    @property
    def batch_share(self) -> float:
        """The weight of the batch's loss in the objective."""
        return self.share / self.within


class Objective:
    """The loss L = sum_b (c_b / sum c) L_b over batches b, where L_b is the mean loss of b over c_b terms.

    c_b is the number of counted tokens: labels other than -100, after the shift where the model shifts them, so that
    padding and ragged batches weigh what they should. For pairs it is the number of targets other than the loss's
    ignore_index, the sum of their class weights where the loss has some, or the number of floating-point entries.
    Before the first product, `HessianOperator` compares the loss over all batches with this sum, see
    `spectra.operators.hessian.pieces`.

    A batch has one of these forms:

    * a mapping of tensors, also a BatchEncoding or a Hugging Face output. The model is called with the members that it
      takes, and returns the loss unless `loss` is given. Without "labels" a causal language model predicts its own
      input. Members may be NumPy arrays or lists of numbers. A row that was not collated, with `input_ids` of one
      dimension, is a batch of one row.
    * a pair (inputs, targets), as a tuple, a named tuple or a list. Inputs may be a tensor, a tuple of positional
      arguments, or a mapping of keyword arguments. The default loss is a cross-entropy for integer targets, and a mean
      squared error for floating-point targets of the shape of the outputs. It is refused where another loss fits too.
    * a tuple of three or more, of which the last member holds the targets and the others are the model's inputs.
    * with `loss`, also a tensor, a dataclass, or any object that the loss accepts.

    Args:
        model: The model.
        batches: A list, a DataLoader, another iterable, or one batch alone, see
            `spectra.operators.hessian.batches.as_batches`.
        loss: See `spectra.operators.hessian.losses.BatchLoss`. It is expected to be a mean over the batch; a module
            with reduction="sum" adds up over batches instead.
        microbatch: Number of rows that are computed at a time. The weighted sum over such microbatches is the loss of
            the batch.
        weight: A function batch -> c_b, for a loss that the count above does not fit.

    Raises:
        InputError: If a batch has another form, if several default losses fit, or if no token counts.
        NonFiniteError: For a loss that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        loss: Callable[..., Any] | None = None,
        *,
        microbatch: int | None = None,
        weight: Callable[[Any], float] | None = None,
    ):
        if microbatch is not None and (not isinstance(microbatch, int) or microbatch < 1):
            raise InputError(f"microbatch must be a whole number of rows, at least 1, got {microbatch}")
        for option, given in (("loss", loss), ("weight", weight)):
            if given is not None and not callable(given):
                raise InputError(f"{option}= must be a function, got {type(given).__name__}")
        self.model, self.loss = model, loss
        self.counts_shifted = shifts_labels(model)  # whether the first label of a row counts nothing
        self.batch_loss = BatchLoss(model, loss)
        self.weight = weight
        self.batches = [self.complete(batch, index) for index, batch in enumerate(as_batches(batches))]
        self._check_targets()
        self.adds_up = getattr(loss, "reduction", None) == "sum"
        self._microbatch = microbatch
        self.counted = 0.0  # the terms of all batches, sum c_b
        self.is_part = False  # whether other ranks have other pieces of the same batches
        self.has_others = False  # whether other ranks have other batches
        self.pieces: tuple[Piece, ...] = tuple(self._cut(microbatch))
        self._everything = self.pieces

    @property
    def rows(self) -> list[int]:
        """Rows of each piece."""
        return [rows_in(piece.batch) for piece in self.pieces]

    def with_pieces(self, pieces: Sequence[Piece]) -> Objective:
        """The part of the sum that belongs to these pieces, with their shares as they are."""
        part = copy.copy(self)
        part.pieces = tuple(pieces)
        return part

    def of_this_rank(self) -> Objective:
        """The part of the objective that this rank of torch.distributed computes; see `pieces_of_rank`."""
        part = self.with_pieces(pieces_of_rank(self.pieces))
        part._everything = self.pieces
        part.is_part = True
        return part

    def scaled(self, factor: float) -> Objective:
        """The objective times a factor, as a part of the sum over several ranks."""
        return self.with_pieces([replace(piece, share=piece.share * factor) for piece in self.pieces])

    def of_all_ranks(self) -> Objective:
        """The objective over the pieces of all ranks, from the part that `of_this_rank` returned."""
        everything = self.with_pieces(self._everything)
        everything.is_part = False
        return everything

    def with_batch_shares(self, shares: Mapping[int, float]) -> Objective:
        """The same pieces with other weights of their batches, by index. Batches of weight 0 are left out."""
        pieces = [replace(p, share=p.within * shares[p.index]) for p in self.pieces if shares[p.index]]
        return self.with_pieces(pieces)

    def summed(self) -> Objective:
        """The objective of a loss that is a sum over its rows, as if it had reduction="sum"."""
        found = self.with_pieces([replace(piece, share=1.0, within=1.0) for piece in self.pieces])
        found.adds_up = True
        return found

    def counting_unshifted(self) -> Objective | None:
        """The objective in which the first label of a row counts too; None if that counts the same."""
        labels = [batch.get("labels") for batch in self.batches if isinstance(batch, Mapping)]
        if self.loss is None or not self.counts_shifted or not any(isinstance(item, torch.Tensor) for item in labels):
            return None
        other = copy.copy(self)
        other.counts_shifted = False
        other.pieces = tuple(other._cut(self._microbatch))
        other._everything = other.pieces
        return other

    # -- cutting into rows

    def some_rows(self, count: int) -> Piece:
        """The first rows of the largest piece."""
        piece = max(self.pieces, key=lambda piece: rows_in(piece.batch))
        rows = rows_in(piece.batch)
        some = rows_between(piece.batch, 0, min(count, rows), rows)
        return replace(piece, batch=some, name=f"{piece.name}, {count} rows")

    def halved(self) -> Objective:
        """The same objective with its larger pieces cut in two."""
        most = (max(self.rows) + 1) // 2
        return self.with_pieces([part for piece in self.pieces for part in self.split(piece, most)])

    def split(self, piece: Piece, most: int) -> Iterator[Piece]:
        """Cut the piece into parts of at most `most` rows, and divide its weight among them by what they count."""
        if rows_in(piece.batch) <= most:
            yield piece
            return
        parts = list(self._parts(piece.batch, most))
        total = sum(count for _, count, _ in parts)
        for part, count, where in parts:
            if count > 0:
                share = piece.share if self.adds_up else piece.share * count / total
                within = piece.within if self.adds_up else piece.within * count / total
                yield Piece(part, share, f"{piece.name}, part {where}", piece.index, within)

    def _parts(self, batch: Any, most: int) -> Iterator[tuple[Any, float, str]]:
        """Parts of a batch of at most `most` rows, each with what it counts and the rows it holds."""
        rows = rows_in(batch)
        for start in range(0, rows, most):
            stop = min(start + most, rows)
            part = rows_between(batch, start, stop, rows)
            yield part, self.count(part), f"{start} to {stop - 1}"

    def _cut(self, microbatch: int | None) -> Iterator[Piece]:
        found: list[Piece] = []  # their shares are, until the end, what they count
        for index, batch in enumerate(self.batches):
            if microbatch is None or microbatch >= rows_in(batch):
                found.append(Piece(batch, self.count(batch), f"batch {index}", index))
                continue
            parts = list(self._parts(batch, microbatch))
            counted, scale = sum(count for _, count, _ in parts), self._scale(batch, parts)
            for part, count, where in parts:
                within = count / counted if counted else 0.0
                found.append(Piece(part, count * scale, f"batch {index}, rows {where}", index, within))
        total = sum(piece.share for piece in found)
        if not total > 0:
            cause = f"every label is {IGNORED}, or they have no rows" if self.weight is None else "weight= gives 0"
            raise InputError(
                f"no token of the {len(self.batches)} batches counts in the loss ({cause}); give batches with labels"
            )
        self.counted = total
        for piece in found:
            if piece.share > 0:
                share = 1.0 if self.adds_up else piece.share / total
                yield replace(piece, share=share, within=1.0 if self.adds_up else piece.within)

    def _scale(self, batch: Any, parts: Sequence[tuple[Any, float, str]]) -> float:
        """The factor by which the weights of the parts add up to that of the batch, which `weight` may not ensure."""
        if self.weight is None:
            return 1.0
        counted = sum(count for _, count, _ in parts)
        return self.count(batch) / counted if counted else 1.0

    # -- the loss of a piece

    def forward(self, piece: Piece, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The loss of one piece, with its graph: a scalar.

        Args:
            piece: The batch or microbatch.
            device: The device to compute on.
            dtype: The dtype of the floating-point tensors, None for their own.

        Returns:
            The loss, a scalar.

        Raises:
            NonFiniteError: For NaN or infinity, naming the batch.
        """
        value = self.evaluate(piece, device, dtype)
        if not torch.isfinite(value):
            broken = [name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()]
            cut = not broken and rows_in(piece.batch) < rows_in(self.batches[piece.index])
            cause = f"parameter '{broken[0]}' holds NaN or infinity" if broken else "every weight is finite"
            raise NonFiniteError(
                f"the loss of {piece.name} is {value.item()}, expected a finite number; {cause}: "
                f"check {'the weights' if broken else 'that batch'}"
                + (", or leave out microbatch=: the mean of a part in which nothing counts is NaN" if cut else "")
            )
        return value

    def evaluate(self, piece: Piece, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`forward` without a check of the value, which torch.func and torch.compile do not allow."""
        return self.batch_loss(moved(piece.batch, device, dtype), piece.name).reshape(())

    def complete(self, batch: Any, index: int) -> Any:
        """The batch in the form that the model gets, checked. A language-model batch without labels gets some."""
        batch = with_tensors(batch, self._dtype())
        if any(tensor.is_meta for tensor in tensors_of(batch)):
            raise InputError(f"batch {index} holds tensors on the meta device, which have no values: give it data")
        own_loss = self.loss is None and shifts_labels(self.model)
        if own_loss and isinstance(batch, torch.Tensor):
            batch = {"input_ids": batch}
        if own_loss and isinstance(batch, tuple | list) and len(batch) > 1:
            batch = self._language_tuple(batch, index)
        if isinstance(batch, Mapping):
            if self.loss is None and batch and not any(True for _ in tensors_of(batch)):
                raise InputError(
                    f"batch {index} is a mapping without tensors, of {', '.join(sorted(map(str, batch)))}: of several "
                    "loaders or datasets give one, such as batches['train']"
                )
            return self._complete_mapping(batch)
        if isinstance(batch, list):
            batch = tuple(batch)
        known = isinstance(batch, tuple) and len(batch) > 1 and any(True for _ in tensors_of(batch))
        if known or (self.loss is not None and not isinstance(batch, str | int | float)):
            return batch
        members = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise InputError(
            f"batch {index} must be a mapping of tensors or a pair (inputs, targets), got {type(batch).__name__}"
            f"{members}; for other batches pass loss=lambda model, batch: ..."
        )

    def _complete_mapping(self, batch: Mapping[str, Any]) -> Any:
        ids = batch.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.ndim == 1 and hasattr(self.model, "config"):
            batch = mapped(batch, lambda tensor: tensor[None])
            ids = batch["input_ids"]
        added = {}
        predicts = self.loss is None and shifts_labels(self.model)
        if predicts and isinstance(ids, torch.Tensor) and batch.get("labels") is None:
            labels, mask = ids.clone(), batch.get("attention_mask")
            if isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
                labels[mask == 0] = IGNORED
            added = {"labels": labels}
        return with_items(batch, {**batch, **added})

    def _language_tuple(self, batch: Sequence[Any], index: int) -> Any:
        """A tuple of tensors for a language model that shifts labels itself: the last may hold the labels."""
        ids, labels = batch[0], batch[-1]
        if not all(isinstance(member, torch.Tensor) and member.ndim > 1 for member in (ids, labels)):
            return batch
        if ids.shape != labels.shape or labels.is_floating_point():
            return batch
        counted = labels != IGNORED
        if bool((labels == ids)[counted].all()):
            names = list(inspect.signature(self.model.forward).parameters)[: len(batch) - 1]
            return {**dict(zip(names, batch[:-1], strict=True)), "labels": labels}
        if bool((labels[:, :-1] == ids[:, 1:])[counted[:, :-1]].all()):
            return batch  # shifted already: the default loss does not shift again
        raise InputError(
            f"batch {index} is a sequence of tensors, and whether the last holds labels of the first or is another "
            f"batch cannot be told, since {type(self.model).__name__} shifts labels itself: give mappings with "
            "'input_ids' and 'labels'"
        )

    def _check_targets(self) -> None:
        """Refuse floating-point targets that could be classes as well as numbers, where there is no `loss`."""
        if self.loss is not None:
            return
        targets = [batch[-1] for batch in self.batches if isinstance(batch, tuple)]
        numbers = [t for t in targets if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
        if not numbers or len(numbers) < len(targets):
            return
        if (
            all(bool(((t == 0) | (t == 1)).all()) for t in numbers)
            and len({float(t.max()) for t in numbers} | {float(t.min()) for t in numbers}) == 2
        ):
            raise InputError(
                "floating-point targets that are all 0 or 1 fit a binary cross-entropy and a mean squared error: pass "
                "loss=torch.nn.BCEWithLogitsLoss(), torch.nn.MSELoss() or another"
            )
        if all(t.ndim > 1 and t.size(1) > 1 and bool((t >= 0).all()) for t in numbers) and all(
            bool(((t.sum(1) - 1).abs() < 1e-5).all()) for t in numbers
        ):
            raise InputError(
                "floating-point targets that are probabilities fit a cross-entropy and a mean squared error: pass "
                "loss=torch.nn.CrossEntropyLoss(), torch.nn.MSELoss() or another"
            )

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def count(self, batch: Any) -> float:
        """c_b: the number of terms whose mean is the loss of a completed batch."""
        return self.terms(batch) if self.weight is None else self._given_weight(batch)

    def terms(self, batch: Any) -> float:
        """The number of terms that are counted in a completed batch, whatever `weight` says."""
        rows = rows_in(batch)
        if isinstance(batch, Mapping):
            labels = batch.get("labels")
            if self.counts_shifted:
                if isinstance(batch.get("shift_labels"), torch.Tensor):
                    labels = batch["shift_labels"]
                elif isinstance(labels, torch.Tensor) and labels.ndim > 1:
                    labels = labels[..., 1:]
            return counted(self.loss, labels, rows=rows)
        if isinstance(batch, tuple) and len(batch) > 1 and (len(batch) == 2 or self.loss is None):
            return counted(self.loss, batch[-1], rows=rows)
        return float(rows)

    def _given_weight(self, batch: Any) -> float:
        assert self.weight is not None
        try:
            weight = float(self.weight(batch))
        except Exception as error:  # whatever the caller's function raises
            raise InputError(
                f"weight= failed on a batch ({first_line(error)}): it gets a batch as the loss does"
            ) from error
        if not 0 <= weight < math.inf:
            raise InputError(f"weight= must give a number that is at least 0, got {weight}")
        return weight


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
    """This rank's microbatches. They are dealt out in turn, the largest first, so that the ranks have equal work.

    Args:
        pieces: All microbatches.

    Returns:
        This rank's microbatches.

    Raises:
        InputError: For fewer microbatches than ranks.
    """
    if len(pieces) < ranks.rank_count():
        raise InputError(
            f"at least one batch a rank is expected, got {len(pieces)} for {ranks.rank_count()} ranks: "
            "cut them with microbatch="
        )
    return ranks.items_of_rank(sorted(pieces, key=lambda piece: -piece.share))
