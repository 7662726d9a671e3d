"""The loss over a list of batches: one exact, token-weighted mean, evaluated piece by piece."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spectra.backend import ranks
from spectra.backend.errors import InputError, NonFiniteError

IGNORED = -100  # the label that PyTorch's and transformers' losses leave out


@dataclass(frozen=True)
class Piece:
    """A microbatch: its data, the share of the objective it carries, and where it came from."""

    batch: Any
    share: float
    name: str


class Objective:
    """L = sum_b (c_b / sum c) L_b over batches b, where L_b is the mean loss of b and c_b how many terms it averages.

    batches: a list (or DataLoader, or a single batch) of Hugging Face batches (mappings whose model call returns
    `.loss`; without "labels" a causal language model predicts its own input) or (inputs, targets) pairs.
    c_b is the number of counted tokens: labels other than -100, after the shift where the model shifts them, so that
    padding and ragged batches weigh what they should. For pairs it is the number of targets other than the loss's
    ignore_index, or of rows where targets are real-valued.

    loss: for pairs loss(output, targets), by default cross-entropy for integer and mean squared error for real
    targets; for mappings loss(output, batch), by default the model's own. A mean over the batch is expected; a loss
    module with reduction="sum" adds up over batches instead.
    microbatch: rows at a time; the mean over microbatches is the mean over the batch, exactly.
    weight: batch -> c_b, where the count above does not fit. cast: dtype that real-valued batch tensors are brought to.

    Raises InputError where a batch cannot be understood or nothing is counted, NonFiniteError where a loss is not
    finite.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        loss: Callable[..., torch.Tensor] | None = None,
        *,
        microbatch: int | None = None,
        weight: Callable[[Any], float] | None = None,
        cast: torch.dtype | None = None,
    ):
        if microbatch is not None and microbatch < 1:
            raise InputError(f"microbatch must be at least 1 row, got {microbatch}")
        self.model, self.loss = model, loss
        self._accepts_use_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._weight, self._cast = weight, cast
        self.pieces: tuple[Piece, ...] = tuple(self._cut(as_batches(batches), microbatch))

    @property
    def rows(self) -> list[int]:
        """Rows of each piece."""
        return [rows_in(piece.batch) for piece in self.pieces]

    def some_rows(self, count: int) -> Piece:
        """The first rows of the largest piece."""
        piece = max(self.pieces, key=lambda piece: rows_in(piece.batch))
        rows = rows_in(piece.batch)
        return Piece(rows_between(piece.batch, 0, min(count, rows), rows), piece.share, f"{piece.name}, {count} rows")

    def only(self, pieces: Sequence[Piece]) -> Objective:
        """The part of the objective that these pieces carry: a term of the sum, with the shares as they are."""
        part = copy.copy(self)
        part.pieces = tuple(pieces)
        return part

    def halved(self) -> Objective:
        """The same objective with its larger pieces cut in two."""
        most = (max(self.rows) + 1) // 2
        return self.only([part for piece in self.pieces for part in self._split(piece, most)])

    def _split(self, piece: Piece, most: int) -> Iterator[Piece]:
        if rows_in(piece.batch) <= most:
            yield piece
            return
        summed = getattr(self.loss, "reduction", None) == "sum"
        parts = list(self._parts(piece.batch, most))
        whole = sum(count for _, count, _ in parts)
        for part, count, where in parts:
            if count > 0:
                share = piece.share if summed else piece.share * count / whole
                yield Piece(part, share, f"{piece.name}, part {where}")

    def _parts(self, batch: Any, most: int) -> Iterator[tuple[Any, float, str]]:
        """The batch in parts of at most so many rows, what each counts, and which rows they are."""
        rows = rows_in(batch)
        for start in range(0, rows, most):
            stop = min(start + most, rows)
            part = rows_between(batch, start, stop, rows)
            yield part, self.count(part), f"{start} to {stop - 1}"

    def forward(self, piece: Piece, device: torch.device) -> torch.Tensor:
        """The mean loss of one piece, with its graph: a scalar. Raises NonFiniteError naming the batch."""
        value = self.evaluate(piece, device)
        if not torch.isfinite(value):
            broken = [name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()]
            cause = f"parameter '{broken[0]}' holds NaN or infinity" if broken else "every weight is finite"
            raise NonFiniteError(
                f"the loss of {piece.name} is {value.item()}, expected a finite number; {cause}: "
                f"check {'the weights' if broken else 'that batch'}"
            )
        return value

    def evaluate(self, piece: Piece, device: torch.device) -> torch.Tensor:
        """The same without a look at the value, for transformations that have none."""
        value = self._loss_of(_moved(piece.batch, device, self._cast))
        if value.numel() != 1:
            raise InputError(f"the loss must be one number, got shape {tuple(value.shape)}; reduce it to a mean")
        return value.reshape(())

    def _loss_of(self, batch: Any) -> torch.Tensor:
        if isinstance(batch, Mapping):
            extra = {"use_cache": False} if self._accepts_use_cache and "use_cache" not in batch else {}
            output = self.model(**batch, **extra)
            if self.loss is not None:
                return self.loss(output, batch)
            value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            if value is None:
                raise InputError(
                    f"{type(self.model).__name__} returned no loss for a batch with {sorted(batch)}; "
                    "add 'labels' to the batch or pass loss=..."
                )
            return value
        inputs, targets = batch
        output = self.model(*inputs) if isinstance(inputs, tuple | list) else self.model(inputs)
        return (self.loss or _default_loss)(output, targets)

    def _cut(self, batches: Sequence[Any], microbatch: int | None) -> Iterator[Piece]:
        named: list[tuple[Any, float, str]] = []
        for index, raw in enumerate(batches):
            batch = self.complete(raw, index)
            if microbatch is None or microbatch >= rows_in(batch):
                named.append((batch, self.count(batch), f"batch {index}"))
                continue
            for part, count, where in self._parts(batch, microbatch):
                named.append((part, count, f"batch {index}, rows {where}"))
        total = sum(count for _, count, _ in named)
        if not total > 0:
            raise InputError(
                f"no token of the {len(batches)} batches counts in the loss (every label is {IGNORED}); "
                "give batches with labels"
            )
        summed = getattr(self.loss, "reduction", None) == "sum"
        for batch, count, name in named:
            if count > 0:
                yield Piece(batch, 1.0 if summed else count / total, name)

    def complete(self, batch: Any, index: int) -> Any:
        """The batch as the model gets it, checked. Language-model batches gain labels where they lack them."""
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
        raise InputError(
            f"batch {index} must be a mapping of tensors or a pair (inputs, targets), got {type(batch).__name__}"
        )

    def count(self, batch: Any) -> float:
        """c_b: how many terms the loss of a completed batch averages."""
        if self._weight is not None:
            return float(self._weight(batch))
        if isinstance(batch, Mapping):
            labels = batch.get("labels")
            if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
                return float(rows_in(batch))
            shifted = labels.ndim > 1 and self.loss is None and shifts_labels(self.model)
            return float(((labels[..., 1:] if shifted else labels) != IGNORED).sum())
        targets = batch[1]
        if not isinstance(targets, torch.Tensor) or targets.is_floating_point():
            return float(rows_in(batch))
        return float((targets != getattr(self.loss, "ignore_index", IGNORED)).sum())


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


def as_batches(batches: Any) -> list[Any]:
    """A list of batches from a list, a DataLoader or any iterable of them, or one batch alone."""
    if isinstance(batches, Mapping) or (
        isinstance(batches, tuple) and any(isinstance(b, torch.Tensor) for b in batches)
    ):
        return [batches]
    if not isinstance(batches, Iterable):
        raise InputError(f"batches must be a list of batches, got {type(batches).__name__}")
    listed = list(batches)
    if not listed:
        raise InputError("at least one batch is expected, got none")
    return listed


def _default_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else output.logits
    if targets.is_floating_point():
        return functional.mse_loss(logits, targets)
    if targets.shape == logits.shape[:-1]:  # classes last, as language models have them
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return functional.cross_entropy(logits, targets)


def tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors_of(value)


def rows_in(batch: Any) -> int:
    """How many rows a batch has. Raises InputError for one without a tensor."""
    leading = batch.get("labels", batch.get("input_ids")) if isinstance(batch, Mapping) else batch[1]
    first = leading if isinstance(leading, torch.Tensor) else next(tensors_of(batch), None)
    if first is None:
        raise InputError("a batch holds no tensor; expected input_ids and labels, or (inputs, targets)")
    return first.shape[0] if first.ndim else 1


def rows_between(batch: Any, start: int, stop: int, rows: int) -> Any:
    """The rows from start to stop of a batch of `rows`; what has no such rows stays whole."""
    if isinstance(batch, torch.Tensor):
        return batch[start:stop] if batch.ndim and batch.shape[0] == rows else batch
    if isinstance(batch, Mapping):
        return {key: rows_between(value, start, stop, rows) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(rows_between(value, start, stop, rows) for value in batch)
    return batch


def _moved(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, dtype) if batch.is_floating_point() else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_moved(value, device, dtype) for value in batch)
    return batch


def pieces_of_rank(pieces: tuple[Piece, ...]) -> list[Piece]:
    """This rank's microbatches, the largest dealt out first so that the ranks have about as much to do.

    Raises InputError where there are fewer than ranks.
    """
    if len(pieces) < ranks.rank_count():
        raise InputError(
            f"at least one batch a rank is expected, got {len(pieces)} for {ranks.rank_count()} ranks: "
            "cut them with microbatch="
        )
    return ranks.part_of_rank(sorted(pieces, key=lambda piece: -piece.share))
