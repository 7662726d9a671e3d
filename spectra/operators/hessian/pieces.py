"""Checks that the loss over all batches is the weighted sum of the losses of its pieces.

The objective takes the loss for a mean over rows or tokens, so that batches weigh what they count. This is wrong for
class weights in a closure, for sums, for batch normalisation in training mode and for contrastive losses. So loss and
gradient of all batches joined to one are compared with the weighted sum over the batches, and those of a batch with the
sum over its microbatches. Where batches cannot be joined, each is compared with the sum over its own thirds. These
identities hold at any weights. Where they fail at the current weights, they are compared at moved weights too, because
at a minimum the difference may be rounding error, and in float64, because in a deep network it may be that anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spectra.backend import memory
from spectra.backend.errors import InputError
from spectra.operators.hessian.batches import concatenated, constants_in, evenly_spaced_rows, kind_of, rows_in
from spectra.operators.hessian.graphs import GraphStore
from spectra.operators.hessian.isolation import random_states_kept
from spectra.operators.hessian.losses import counts_for_certain
from spectra.operators.hessian.objective import Objective, Piece

SUM_TOLERANCE = 1e-4  # relative difference of loss and gradient up to which the sum over pieces is that of the whole
ROUNDING_TOLERANCE = 1e-2  # the same up to which it may be float32's rounding error, and is measured again in float64
SHARES_TOLERANCE = 1e-3  # relative error of shares that are fitted to gradients with rounding errors
ROUNDING = 1e-7  # relative rounding error of a gradient, at least
WHOLE_ROWS = 8  # most rows that are evaluated at once, in units of the rows of the largest piece
LEAST_WHOLE_ROWS = 1024  # rows that may be evaluated at once in any case, if memory allows
WHOLE_MEMORY = 0.25  # share of the free memory that such an evaluation may take
MOST_GROUPS = 64  # most groups of batches that are joined to one batch and compared with it
GROUPS_BY_GRADIENT = 3  # groups that are compared by their gradients; the others are compared by their losses
SAMPLE_ROWS = (48, 6, 2)  # rows of a batch that are compared with the thirds of these rows; fewer if memory is short
MOST_SAMPLES = 8  # batches that are compared by their gradients with their thirds or their microbatches
MOST_SHARES = 64  # most batches whose shares are fitted at once
SKETCH = 512  # numbers in the sketch of a gradient
PERIOD = 2048 * SKETCH  # entries of a gradient after which the random signs repeat, up to one sign for all of them
MOVED = 0.1  # size of the move to other weights, relative to the root mean square of each parameter
OTHER_SEED = 20251126  # of the random numbers that show whether the loss depends on random numbers
# what a model may raise for rows or joined batches that it does not take as a batch
NOT_A_BATCH = (InputError, RuntimeError, ValueError, TypeError, IndexError, KeyError)

BY_THE_LOSS = "batches and microbatches have the weights that the loss itself gives them, fitted to its gradients"
SUMMED = "the loss is a sum over rows: the sum over batches is measured"
UNSHIFTED = "every label counts, the first of a row too: the loss is a mean over all of them"
RANDOM = (
    "the loss draws random numbers, so that batches could not be compared with all of them together: they weigh by "
    "what they count"
)
NO_MEAN = "the loss of a batch is not the mean over its rows"
NOT_TOGETHER = (
    "batches of several shapes, or that cannot be joined, could not be compared with all of them together: they weigh "
    "by what they count; pass weight= for another"
)


def settle_shares(graphs: GraphStore) -> tuple[Objective, float, str]:
    """Compare the loss and gradient over all batches together with the weighted sum over the pieces.

    If they differ, the loss may weight rows by something that is not counted, such as class weights inside a closure.
    Then shares are fitted for which the pieces' gradients add up to that of the whole. A contrastive loss, or one with
    batch normalisation in training mode, has no such shares: it is no mean over rows. The plain mean over the batches
    is measured then.

    Gradients are compared for a few groups of batches, and losses for the others. This costs about a third of a
    product. If they differ, all batches are compared by their gradients. This costs about one product.

    Args:
        graphs: The gradient's graphs, which evaluate loss and gradient of a piece.

    Returns:
        The objective to measure, the largest relative error of a weighted sum over pieces, and a note for the record.

    Raises:
        InputError: Where microbatches were asked for that change the loss.
    """
    if not graphs.objective.is_part:
        return _settled(graphs, graphs.objective)
    # every rank compares the batches of all ranks, as its own shares depend on those of the others
    everything = graphs.objective.of_all_ranks()
    settled, error, note = _settled(graphs, everything)
    return graphs.objective if settled is everything else settled.of_this_rank(), error, note


def _settled(graphs: GraphStore, objective: Objective) -> tuple[Objective, float, str]:
    first = objective.pieces[0]
    if len(objective.pieces) == 1 and first.batch is objective.batches[first.index]:  # the others count nothing
        return _settled_among_ranks(graphs, objective) if objective.has_others else (objective, 0.0, "")
    with _comparable(graphs):
        found, refusal = None, None
        try:
            found = _settled_as_counted(graphs, objective)
        except InputError as error:
            refusal = error
        if found is not None and found[1] <= SUM_TOLERANCE:
            return found
        other = objective.counting_unshifted()
        if other is not None and objective.weight is None:
            with contextlib.suppress(InputError):
                settled, error, _ = _settled_as_counted(graphs, other)
                if error <= SUM_TOLERANCE:
                    return settled, found[1] if found is not None else 1.0, UNSHIFTED
        if found is None:
            assert refusal is not None
            raise refusal
        return found


def _settled_among_ranks(graphs: GraphStore, objective: Objective) -> tuple[Objective, float, str]:
    """The objective of one batch, which weighs by what it counts beside those of other ranks, if its thirds do.

    The note is `SUMMED` or `UNSHIFTED` if its weight is another, and `NO_MEAN` if that is not known.
    """
    if objective.weight is not None or objective.adds_up:
        return objective, 0.0, ""
    unshifted = objective.counting_unshifted()
    ways = ((objective, ""), (unshifted, UNSHIFTED), (objective.summed(), SUMMED))
    errors = []
    with _comparable(graphs):
        for way, note in ways:
            if way is None:
                continue
            comparison = _Comparison(graphs, way)
            error = comparison.error_of_thirds(way.pieces[0])
            if error is None:
                return objective, 0.0, ""
            if error <= SUM_TOLERANCE:
                return way, error, note
            if comparison.is_random:
                return objective, 0.0, RANDOM
            errors.append(error)
    return objective, errors[0], NO_MEAN


def _settled_as_counted(graphs: GraphStore, objective: Objective) -> tuple[Objective, float, str]:
    comparison = _Comparison(graphs, objective)
    compared = objective.weight is None and len(objective.batches) > 1
    if compared and comparison.cut:
        findings = _findings(comparison)  # first the microbatches of all batches; if they add up, so do those of each
        if all(finding.groups and finding.error <= SUM_TOLERANCE for finding in findings):
            return _settle_batches(comparison, findings)
    comparison.objective, cut_error, cut_note = _settle_parts(comparison)
    if not compared:
        return comparison.objective, cut_error, cut_note
    settled, error, note = _settle_batches(comparison, _findings(comparison))
    return settled, max(error, cut_error), note or cut_note


def may_be_cut(graphs: GraphStore) -> bool:
    """Whether the batches may be cut into microbatches: whether the loss of some rows is that of their thirds together.

    Args:
        graphs: The gradient's graphs, which evaluate loss and gradient of a piece.

    Returns:
        Whether they may. False if the loss of a row depends on other rows, and if the loss draws random numbers.
    """
    with _comparable(graphs):
        comparison = _Comparison(graphs)
        errors = [comparison.error_of_thirds(piece) for piece in comparison.samples()]
        found = [error for error in errors if error is not None]
        return len(found) == len(errors) > 0 and max(found) <= SUM_TOLERANCE and not comparison.is_random


# -- loss and gradient of pieces, compared


@dataclass(frozen=True)
class _Evaluation:
    """Loss of one piece and a sketch of its gradient: sums of its entries with random signs.

    The squared norm of a sketch, or of a difference of sketches, has the squared norm of the gradients as expectation.
    """

    loss: float
    sketch: np.ndarray


class _Comparison:
    """Compares weighted sums over pieces of an objective with larger batches, at the same model weights."""

    def __init__(self, graphs: GraphStore, objective: Objective | None = None):
        self.graphs, self.objective = graphs, objective or graphs.objective
        # evaluations that are needed several times, by the batch's id, whether the weights are moved, and the dtype
        self._known: dict[tuple[int, bool, torch.dtype | None], _Evaluation] = {}
        self._kept = {id(batch) for batch in (*self.objective.batches, *(p.batch for p in self.objective.pieces))}
        self._signs: torch.Tensor | None = None
        self._offset: torch.Tensor | None = None

    def evaluate(self, piece: Piece, *, moved: bool = False, dtype: torch.dtype | None = None) -> _Evaluation:
        """Loss and gradient of a piece without its share, at the current weights or at moved ones."""
        key = (id(piece.batch), moved, dtype)
        if key in self._known:
            return self._known[key]
        alone = self.objective.with_pieces([replace(piece, share=1.0)])
        offset = self._moved_weights() if moved else None
        found = _Evaluation(*self._sketched(*self.graphs.gradient_at(alone, offset=offset, dtype=dtype)))
        if id(piece.batch) in self._kept:
            self._known[key] = found
        return found

    def error(self, whole: Piece, pieces: Sequence[Piece]) -> float:
        """The relative error of a weighted sum over pieces; if that may be rounding, at moved weights or in float64."""
        error = self._error(whole, pieces)
        if error <= SUM_TOLERANCE:
            return error
        others: list[dict[str, Any]] = [{"moved": True}]
        if error <= ROUNDING_TOLERANCE and self.graphs.dtype == torch.float32:
            others.append({"dtype": torch.float64})
        for other in others:
            with contextlib.suppress(*NOT_A_BATCH):
                again = self._error(whole, pieces, **other)
                if again <= SUM_TOLERANCE:
                    return again
        return error

    def _error(self, whole: Piece, pieces: Sequence[Piece], **where: Any) -> float:
        parts = [self.evaluate(piece, **where) for piece in pieces]
        return _disagreement(self.evaluate(whole, **where), parts, [piece.share for piece in pieces])

    def error_of_losses(self, whole: Piece, pieces: Sequence[Piece]) -> float:
        """The relative error of the weighted sum over the pieces' losses, without their gradients."""
        loss = self._loss(replace(whole, share=1.0))
        parts = [self._loss(piece) for piece in pieces]
        return _relative(abs(loss - sum(parts)), max(abs(loss), sum(map(abs, parts))))

    def _loss(self, piece: Piece) -> float:
        return self.graphs.loss_at(objective=self.objective.with_pieces([piece]))

    def shares(self, whole: Piece, pieces: Sequence[Piece]) -> list[float] | None:
        """Shares of at least 0 with which losses and gradients of the pieces add up to those of the whole.

        None if there are no such shares, or if they are not unique, as for more pieces than parameters.
        """
        from scipy.optimize import nnls  # a fifth of a second to load

        ones = [1.0] * len(pieces)
        columns: list[np.ndarray] = []
        wanted: list[np.ndarray] = []
        for moved in (False, True):
            evaluated = self.evaluate(whole, moved=moved)
            parts = [self.evaluate(piece, moved=moved) for piece in pieces]
            if not moved and _disagreement(evaluated, parts, ones) <= SUM_TOLERANCE:
                return ones  # even if other shares fit as well, as for one batch that was given twice
            wanted.append(np.append(evaluated.sketch, evaluated.loss))
            columns.append(np.stack([np.append(part.sketch, part.loss) for part in parts], axis=1))
            matrix, target = np.concatenate(columns), np.concatenate(wanted)
            if not (np.isfinite(matrix).all() and np.isfinite(target).all()):
                return None
            found, residual = nnls(matrix, target)
            shares = _rounded(found)
            if _disagreement(evaluated, parts, shares) <= SUM_TOLERANCE:
                sizes = np.linalg.norm(matrix, axis=0)
                smallest = np.linalg.svd(matrix / np.where(sizes > 0, sizes, 1.0), compute_uv=False)[-1]
                error = max(_relative(residual, float(np.linalg.norm(target))), ROUNDING)
                if len(matrix) >= len(found) and error <= SHARES_TOLERANCE * smallest:
                    return [float(share) for share in shares]
        return None

    def error_of_thirds(self, piece: Piece) -> float | None:
        """The error of the sum over the thirds of some rows of a piece; None where it cannot be measured."""
        for count in SAMPLE_ROWS:
            rows = min(count, rows_in(piece.batch))
            if rows < 2:
                return None
            try:
                sample = replace(piece, batch=evenly_spaced_rows(piece.batch, rows), share=1.0, within=1.0)
                parts = list(self.objective.split(sample, max(-(-rows // 3), 1)))
                return self.error(sample, parts) if parts else None
            except torch.OutOfMemoryError:
                continue
            except NOT_A_BATCH:
                return None
        return None

    def samples(self) -> list[Piece]:
        """Some of the pieces with more than one row, evenly spaced."""
        pieces = [piece for piece in self.objective.pieces if rows_in(piece.batch) > 1]
        return [pieces[i] for i in _evenly_spaced(len(pieces), MOST_SAMPLES)]

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether the gradient of some rows of the first piece changes when other random numbers are drawn."""
        piece = self.objective.pieces[0]
        for count in (*SAMPLE_ROWS, rows_in(piece.batch)):  # all rows, if the model takes no part of them
            with contextlib.suppress(torch.OutOfMemoryError, *NOT_A_BATCH):
                sample = replace(
                    piece, batch=evenly_spaced_rows(piece.batch, min(count, rows_in(piece.batch))), share=1.0
                )
                first = self.graphs.gradient_at(self.objective.with_pieces([sample]))
                with random_states_kept(self.graphs.device), _other_random_numbers(self.graphs):
                    again = self.graphs.gradient_at(self.objective.with_pieces([sample]))
                return (
                    _disagreement(_Evaluation(*self._sketched(*first)), [_Evaluation(*self._sketched(*again))], [1.0])
                    > SUM_TOLERANCE
                )
        return False

    @functools.cached_property
    def most_rows(self) -> int:
        """Rows that may be evaluated at once. A gradient without its graph takes less memory than the graph."""
        rows = max(self.objective.rows)
        most = max(WHOLE_ROWS * rows, LEAST_WHOLE_ROWS)
        with contextlib.suppress(*NOT_A_BATCH):
            of_graph = max(self.graphs.footprint().graph(most) / most, 1.0)  # bytes a row
            most = min(most, int(WHOLE_MEMORY * memory.available(self.graphs.device) / of_graph))
        return max(most, 2 * rows)

    @property
    def most_batches(self) -> int:
        """Batches that may be joined: so few that the entries of a gradient determine their shares."""
        return max(min(MOST_SHARES, self.graphs.space.dimension // 4), 2)

    @property
    def cut(self) -> list[int]:
        """Indices of the batches that are cut into several pieces."""
        batches = self.objective.batches
        return sorted({p.index for p in self.objective.pieces if rows_in(p.batch) != rows_in(batches[p.index])})

    def batch_as_piece(self, index: int) -> Piece:
        """A batch as one piece."""
        return Piece(self.objective.batches[index], 1.0, f"batch {index}", index)

    def _sketched(self, loss: float, gradient: torch.Tensor) -> tuple[float, np.ndarray]:
        """The loss, and the sketch of the gradient. Each period of entries has the same random signs, times its own."""
        generator = torch.Generator().manual_seed(0)
        if self._signs is None:
            size = min(-(-len(gradient) // SKETCH) * SKETCH, PERIOD)
            self._signs = (torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1).to(gradient.device)
        total = torch.zeros(len(self._signs), dtype=torch.float64, device=gradient.device)
        periods = gradient.split(len(total))
        for sign, part in zip(
            (torch.randint(0, 2, (len(periods),), generator=generator) * 2 - 1).tolist(), periods, strict=True
        ):
            total[: len(part)] += sign * part.double()
        return loss, (total * self._signs).view(-1, SKETCH).sum(dim=0).cpu().numpy()

    def _moved_weights(self) -> torch.Tensor:
        if self._offset is None:
            generator = torch.Generator().manual_seed(0)
            parts = []
            for parameter in self.graphs.space.parameters:
                size = float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0
                parts.append(MOVED * (size or MOVED) * torch.randn(parameter.numel(), generator=generator))
            self._offset = torch.cat(parts).to(self.graphs.device, self.graphs.dtype)
        return self._offset


def _disagreement(whole: _Evaluation, parts: Sequence[_Evaluation], shares: Sequence[float] | np.ndarray) -> float:
    """The difference between the whole and the weighted sum, relative to the sum of the parts' absolute values.

    It is the larger one of the differences of the losses and of the gradients.
    """
    gradient = sum(share * part.sketch for share, part in zip(shares, parts, strict=True))
    loss = sum(share * part.loss for share, part in zip(shares, parts, strict=True))
    norms = sum(share * float(np.linalg.norm(part.sketch)) for share, part in zip(shares, parts, strict=True))
    absolute = sum(share * abs(part.loss) for share, part in zip(shares, parts, strict=True))
    of_gradient = float(np.linalg.norm(whole.sketch - gradient))
    return max(
        _relative(of_gradient, max(norms, float(np.linalg.norm(whole.sketch)))),
        _relative(abs(whole.loss - loss), max(absolute, abs(whole.loss))),
    )


def _relative(part: float, size: float) -> float:
    return part / size if size > 0 else 0.0


def _rounded(shares: np.ndarray) -> np.ndarray:
    """Shares without their rounding error, if they are nearly all 1 (a sum) or nearly add up to 1 (a mean)."""
    if np.allclose(shares, 1.0, atol=1e-3):
        return np.ones_like(shares)
    return shares / shares.sum() if abs(shares.sum() - 1) < 1e-3 else shares


def _evenly_spaced(length: int, most: int) -> list[int]:
    """At most `most` indices out of `range(length)`, evenly spaced, with the first and the last."""
    if length <= most:
        return list(range(length))
    return [round(i * (length - 1) / (most - 1)) for i in range(most)]


# -- the parts of a batch


def _settle_parts(comparison: _Comparison) -> tuple[Objective, float, str]:
    """The objective in which the parts of each cut batch add up to the batch, the largest error, and a note."""
    objective = comparison.objective
    parts_of: dict[int, list[Piece]] = {}
    for piece in objective.pieces:
        parts_of.setdefault(piece.index, []).append(piece)
    cut = comparison.cut
    sampled = {cut[i] for i in _evenly_spaced(len(cut), MOST_SAMPLES)}
    errors, note = [0.0], ""
    for index in cut:
        parts_of[index], error = _settled_parts(comparison, parts_of[index], thorough=index in sampled)
        errors.append(error)
        note = BY_THE_LOSS if error > SUM_TOLERANCE else note
    if not note:
        return objective, max(errors), ""
    return objective.with_pieces([part for parts in parts_of.values() for part in parts]), max(errors), note


def _settled_parts(comparison: _Comparison, parts: list[Piece], *, thorough: bool) -> tuple[list[Piece], float]:
    """The parts of a batch with weights by which they add up to it, and the error with the weights they had before."""
    weighted = [replace(part, share=part.within) for part in parts]
    whole = comparison.batch_as_piece(parts[0].index)
    if rows_in(whole.batch) <= comparison.most_rows:
        try:
            if not thorough and (error := comparison.error_of_losses(whole, weighted)) <= SUM_TOLERANCE:
                return parts, error
            error = comparison.error(whole, weighted)
            if error <= SUM_TOLERANCE or comparison.is_random:
                return parts, 0.0 if error > SUM_TOLERANCE else error
            found = comparison.shares(whole, weighted)
            if found is not None:
                pairs = [(part, own) for part, own in zip(parts, found, strict=True) if own]
                return [replace(p, share=p.batch_share * own, within=own) for p, own in pairs], error
            raise _cut_refused(error)
        except torch.OutOfMemoryError:
            pass
    elif not thorough:
        return parts, 0.0
    sampled = _error_of_a_sample(comparison, whole.batch, max(weighted, key=lambda part: rows_in(part.batch)))
    if sampled is None or sampled <= SUM_TOLERANCE or comparison.is_random:
        return parts, min(sampled or 0.0, SUM_TOLERANCE)
    raise _cut_refused(sampled)


def _error_of_a_sample(comparison: _Comparison, batch: Any, part: Piece) -> float | None:
    """The error of the sum over parts of some rows of a batch, as many rows as fit in memory; None if too few fit."""
    rows = min(comparison.most_rows, rows_in(batch))
    while rows > rows_in(part.batch):
        sample = replace(part, batch=evenly_spaced_rows(batch, rows), share=1.0, within=1.0)
        with contextlib.suppress(torch.OutOfMemoryError):
            return comparison.error(sample, list(comparison.objective.split(sample, rows_in(part.batch))))
        rows //= 2
    return comparison.error_of_thirds(part)


def _cut_refused(error: float) -> InputError:
    return InputError(
        f"the loss of a batch is not the mean over its microbatches (they differ by {error:.1%}), as with batch "
        "normalisation in training mode, a contrastive loss or a batch on the second axis: leave out microbatch=, or "
        "pass weight= for a mean that weighs rows otherwise"
    )


# -- the batches


def _settle_batches(comparison: _Comparison, findings: list[_Finding]) -> tuple[Objective, float, str]:
    """The objective in which the batches add up to all of them joined, the error with the counted weights, a note."""
    objective = comparison.objective
    indices = sorted(itertools.chain.from_iterable(finding.indices for finding in findings))
    error = max(finding.error for finding in findings)
    if error <= SUM_TOLERANCE:
        linked = len(findings) == 1 and findings[0].groups
        certain = linked or counts_for_certain(objective.loss, objective.model, objective.batches[0])
        return objective, error, "" if certain else NOT_TOGETHER
    if len(findings) > 1:
        along = _error_of_groups(comparison, list(_groups(comparison, indices)), axis=1)
        if along is not None and along <= SUM_TOLERANCE:
            return objective, along, ""
    if comparison.is_random:
        return objective, 0.0, RANDOM
    shares = [_shares_of_groups(comparison, finding.groups) if finding.groups else None for finding in findings]
    if len(findings) == 1 and shares[0] is not None and any(share != 1.0 for share in shares[0].values()):
        return objective.with_batch_shares(shares[0]), error, BY_THE_LOSS
    sums = [_is_sum(comparison, finding, own) for finding, own in zip(findings, shares, strict=True)]
    if any(sums) and not any(is_sum is False for is_sum in sums):
        return objective.with_batch_shares(dict.fromkeys(indices, 1.0)), error, SUMMED
    note = (
        f"the loss is no weighted mean over rows (the batches together differ by {error:.1%}): the plain mean over the "
        f"{len(indices)} batches is measured; pass weight= for another"
    )
    return objective.with_batch_shares(dict.fromkeys(indices, 1 / len(indices))), error, note


@dataclass(frozen=True)
class _Finding:
    """The result of comparing the batches of one kind with these batches joined.

    Attributes:
        indices: The indices of the batches.
        groups: Groups of batches that were joined; empty if they cannot be joined, or there is only one batch.
        error: The error of the sum weighted by counts, over groups or over the thirds of batches; 0 if not measured.
        compared: Whether the error was measured.
    """

    indices: list[int]
    groups: list[list[int]]
    error: float
    compared: bool


def _findings(comparison: _Comparison) -> list[_Finding]:
    """The findings for the batches of each kind."""
    objective = comparison.objective
    kinds: dict[Any, list[int]] = {}
    for index in dict.fromkeys(piece.index for piece in objective.pieces):
        batch = objective.batches[index]
        kinds.setdefault(kind_of(batch, rows_in(batch)), []).append(index)
    return [_finding(comparison, indices) for indices in kinds.values()]


def _finding(comparison: _Comparison, indices: list[int]) -> _Finding:
    groups = list(_groups(comparison, indices))
    by_axis: list[float] = []
    for axis in (0, 1):  # the examples of a (time, batch) layout lie along the second
        error = _error_of_groups(comparison, groups, axis=axis)
        by_axis += [] if error is None else [error]
        if error is not None and error <= SUM_TOLERANCE:
            break
    if by_axis:
        return _Finding(indices, groups, by_axis[0] if by_axis[-1] > SUM_TOLERANCE else by_axis[-1], True)
    pieces = [piece for piece in comparison.samples() if piece.index in indices]
    errors = [error for piece in pieces if (error := comparison.error_of_thirds(piece)) is not None]
    return _Finding(indices, [], max(errors, default=0.0), bool(errors))


def _is_sum(comparison: _Comparison, finding: _Finding, shares: dict[int, float] | None) -> bool | None:
    """Whether the batches of one kind add up with a weight of 1 each; None if that cannot be determined."""
    if finding.groups:
        return shares is not None and all(share == 1.0 for share in shares.values())
    if not finding.compared:
        return None
    if len({constants_in(batch) for batch in comparison.objective.batches}) > 1:
        return False  # a sum divided by its batch's own number is a mean
    summed = _Comparison(comparison.graphs, comparison.objective.summed())
    pieces = [piece for piece in summed.samples() if piece.index in finding.indices]
    errors = [summed.error_of_thirds(piece) for piece in pieces]
    return all(error is not None and error <= SUM_TOLERANCE for error in errors)


def _groups(comparison: _Comparison, indices: list[int]) -> Iterator[list[int]]:
    """Groups of consecutive batches with few enough rows. Each group starts with the last batch of the one before.

    This common batch links the weights within a group to those of all others. There are no groups if two batches
    already have too many rows.
    """
    rows = [rows_in(batch) for batch in comparison.objective.batches]
    if len(indices) < 2 or any(rows[i] + rows[j] > comparison.most_rows for i, j in itertools.pairwise(indices)):
        return
    group = [indices[0]]
    for index in indices[1:]:
        full = sum(rows[i] for i in [*group, index]) > comparison.most_rows or len(group) == comparison.most_batches
        if full and len(group) > 1:
            yield group
            group = [group[-1]]
        group.append(index)
    yield group


def _pieces_of(objective: Objective, group: Sequence[int]) -> list[Piece]:
    """The pieces of some batches, with shares that add up to 1 unless the loss is a sum."""
    pieces = [piece for piece in objective.pieces if piece.index in group]
    shares = {piece.index: piece.batch_share for piece in pieces}
    total = 1.0 if objective.adds_up else sum(shares.values())
    return [replace(piece, share=piece.share / total) for piece in pieces]


def _error_of_groups(comparison: _Comparison, groups: list[list[int]], *, axis: int) -> float | None:
    """The largest error of a sum over the pieces of a group, against its batches joined; None if they cannot be joined.

    Some groups are compared by their gradients, others by their losses alone.
    """
    chosen = [groups[i] for i in _evenly_spaced(len(groups), MOST_GROUPS)]
    thorough = set(_evenly_spaced(len(chosen), GROUPS_BY_GRADIENT))
    errors = []
    for number, group in enumerate(chosen):
        try:
            whole = _together(comparison.objective, group, axis)
            if whole is None:
                return None
            pieces = _pieces_of(comparison.objective, group)
            if number not in thorough and comparison.error_of_losses(whole, pieces) <= SUM_TOLERANCE:
                continue
            errors.append(comparison.error(whole, pieces))
        except NOT_A_BATCH:  # memory errors too: the batches are then compared with their parts
            return None
        if errors[-1] > SUM_TOLERANCE:
            break
    return max(errors, default=None)


def _together(objective: Objective, group: Sequence[int], axis: int = 0) -> Piece | None:
    """Several batches joined to one piece; None if they cannot be joined."""
    batch = concatenated([objective.batches[i] for i in group], axis)
    return None if batch is None else Piece(batch, 1.0, "all batches together")


def _shares_of_groups(comparison: _Comparison, groups: list[list[int]]) -> dict[int, float] | None:
    """Shares of the batches with which every group adds up; the batches that two groups have in common link them."""
    shares: dict[int, float] = {}
    is_mean = is_sum = True
    for group in groups:
        try:
            whole = _together(comparison.objective, group)
            found = whole and comparison.shares(whole, [comparison.batch_as_piece(index) for index in group])
        except NOT_A_BATCH:
            return None
        if not found:
            return None
        is_sum &= all(share == 1.0 for share in found)
        is_mean &= abs(sum(found) - 1) < 1e-6
        if shares and not found[0]:
            return None  # a batch that counts nothing links no groups
        scale = shares[group[0]] / found[0] if shares else 1.0
        shares |= {index: share * scale for index, share in zip(group, found, strict=True)}
    if len(groups) == 1 or is_sum:
        return shares
    total = sum(shares.values())
    return {index: share / total for index, share in shares.items()} if is_mean and total > 0 else None


# -- evaluations that can be compared


@contextlib.contextmanager
def _comparable(graphs: GraphStore) -> Iterator[None]:
    """A context with gradients of this process alone, and without dropout, whose masks differ from batch to batch."""
    before, over_ranks = graphs.each_forward, graphs.over_ranks
    try:
        graphs.over_ranks = False
        if graphs.training:
            graphs.each_forward = _WithoutDropout
        yield
    finally:
        graphs.each_forward, graphs.over_ranks = before, over_ranks


@contextlib.contextmanager
def _other_random_numbers(graphs: GraphStore) -> Iterator[None]:
    """A context in which forward passes draw other random numbers."""
    before = graphs.each_forward

    @contextlib.contextmanager
    def seeded() -> Iterator[None]:
        torch.manual_seed(OTHER_SEED)
        with before():
            yield

    try:
        graphs.each_forward = seeded
        yield
    finally:
        graphs.each_forward = before


class _WithoutDropout(TorchFunctionMode):
    """A context in which dropout drops nothing, in modules and in functions."""

    FUNCTIONS = (
        functional.dropout,
        functional.dropout1d,
        functional.dropout2d,
        functional.dropout3d,
        functional.alpha_dropout,
        functional.feature_alpha_dropout,
        torch.dropout,
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FUNCTIONS:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        return func(*args, **kwargs)
