"""Whether the weighted sum over batches and microbatches is the loss over all of them.

A loss over several batches is taken to be a mean over rows or tokens, weighted by what each batch counts. Class weights
in a closure, sums, batch normalisation in training mode and contrastive losses are not. So the loss and gradient of all
batches together are compared with the sum over them, a batch with its microbatches, and where all batches cannot be
one, a batch with its own thirds. These identities hold at any weights: where rounding may hide them, as at a minimum,
they are compared at moved weights too.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spectra.backend.errors import InputError
from spectra.backend.vectors import norm
from spectra.operators.hessian.batches import concatenated, constants_in, kind_of, rows_in, spread_rows
from spectra.operators.hessian.graphs import GraphStore
from spectra.operators.hessian.isolation import random_states_kept
from spectra.operators.hessian.losses import counts_for_certain
from spectra.operators.hessian.objective import Objective, Piece

SUM_TOLERANCE = 1e-4  # relative, of loss and gradient of the whole against the weighted sum over pieces
WHOLE_ROWS = 8  # times the rows of the largest piece are evaluated at once to compare the whole with its pieces
LEAST_WHOLE_ROWS = 256  # that are evaluated at once in any case
SAMPLE_ROWS = (48, 6, 2)  # of a batch, compared with its thirds; fewer where memory is short
MOST_SAMPLES = 8  # batches that are compared with their thirds
MOST_SHARES = 64  # pieces whose shares are looked for
MOVED = 0.1  # of a parameter's root mean square, to weights where the same identities hold
OTHER_SEED = 20251126  # of what a forward pass draws when it is asked whether that matters
# what a batch may raise that is no batch of this model, as one made of others may be
NOT_A_BATCH = (InputError, RuntimeError, ValueError, TypeError, IndexError, KeyError)

BY_THE_LOSS = "batches and microbatches weigh what the loss itself gives them, found by comparing it over all of them"
SUMMED = "the loss is a sum over rows: the sum over batches is measured"
UNSHIFTED = "every label counts, the first of a row too: the loss is a mean over all of them"
RANDOM = (
    "the loss draws random numbers, so that batches could not be compared with all of them together: they weigh by "
    "what they count"
)
OF_SEVERAL_SHAPES = (
    "batches of several shapes could not be compared with all of them together: they weigh by what they count; pass "
    "weight= for another"
)


def settle_shares(graphs: GraphStore) -> tuple[Objective, float, str]:
    """Compare the loss and gradient over all batches together with the weighted sum over the pieces.

    Where they differ, the loss may weigh rows by something that is not counted, such as class weights inside a closure.
    Then the shares are found for which the pieces' gradients add up to that of the whole. A loss without such shares,
    as a contrastive loss or one with batch normalisation in training mode, is no mean over rows; the plain mean over
    the batches is then what is measured.

    Args:
        graphs: the gradient, by which pieces are evaluated.

    Returns:
        The objective to measure, the largest relative error of a weighted sum over pieces, and a note for the record.

    Raises:
        InputError: where microbatches were asked for that change the loss.
    """
    if not graphs.over_ranks:
        return _settled(graphs, graphs.objective)
    # every rank compares all batches, as the shares of its own depend on those of others
    everything = graphs.objective.of_all_ranks()
    settled, error, note = _settled(graphs, everything)
    return graphs.objective if settled is everything else settled.of_this_rank(), error, note


def _settled(graphs: GraphStore, objective: Objective) -> tuple[Objective, float, str]:
    if len(objective.batches) == 1 and len(objective.pieces) == 1:
        return objective, 0.0, ""
    with _comparable(graphs):
        try:
            found = _settled_as_counted(graphs, objective)
        except InputError:
            found = None
        if found is not None and found[1] <= SUM_TOLERANCE:
            return found
        other = objective.counting_otherwise()
        if other is not None and objective.weight is None:
            with contextlib.suppress(InputError):
                settled, error, _ = _settled_as_counted(graphs, other)
                if error <= SUM_TOLERANCE:
                    return settled, found[1] if found is not None else 1.0, UNSHIFTED
        return found if found is not None else _settled_as_counted(graphs, objective)


def _settled_as_counted(graphs: GraphStore, objective: Objective) -> tuple[Objective, float, str]:
    comparison = _Comparison(graphs, objective)
    if objective.weight is None and (error := comparison.error_over_everything()) is not None:
        return objective, error, ""
    objective, cut_error, cut_note = _settle_parts(comparison)
    if objective.weight is not None or len(objective.batches) == 1:
        return objective, cut_error, cut_note
    objective, error, note = _settle_batches(_Comparison(graphs, objective))
    return objective, max(error, cut_error), note if note else cut_note


def may_be_cut(graphs: GraphStore) -> bool:
    """Whether rows of the batches, spread over them, have the loss that their parts add up to.

    Args:
        graphs: the gradient, by which pieces are evaluated.

    Returns:
        Whether they have. False where the rows do not stand alone, and where the loss draws random numbers.
    """
    with _comparable(graphs):
        comparison = _Comparison(graphs)
        errors = [comparison.error_of_thirds(piece) for piece in comparison.samples()]
        found = [error for error in errors if error is not None]
        return len(found) == len(errors) > 0 and max(found) <= SUM_TOLERANCE and not comparison.is_random()


# -- loss and gradient of pieces, compared


@dataclass(frozen=True)
class _Sum:
    """Loss and gradient of a weighted sum over pieces, and the sums of their absolute values and norms."""

    loss: float
    gradient: torch.Tensor
    absolute: float
    norms: float


class _Comparison:
    """Sums over pieces of an objective and over batches made of several, compared at the same weights."""

    def __init__(self, graphs: GraphStore, objective: Objective | None = None):
        self.graphs, self.objective = graphs, objective or graphs.objective
        self._offset: torch.Tensor | None = None

    def sum_over(self, pieces: Iterable[Piece], *, moved: bool = False) -> _Sum:
        """The weighted sum over pieces, at the current weights or at moved ones."""
        offset = self._moved_weights() if moved else None
        total, loss, absolute, norms = None, 0.0, 0.0, 0.0
        for piece in pieces:
            value, gradient = self.graphs.gradient_at(self.objective.with_pieces([piece]), offset=offset)
            loss, absolute, norms = loss + value, absolute + abs(value), norms + norm(gradient)
            total = gradient if total is None else total.add_(gradient)
        assert total is not None  # a comparison has at least one piece
        return _Sum(loss, total, absolute, norms)

    def error(self, whole: Piece, pieces: Sequence[Piece]) -> float:
        """The relative error of a sum over pieces. Rounding is told from disagreement at moved weights."""
        error = _disagreement(self.sum_over([whole]), self.sum_over(pieces))
        if error <= SUM_TOLERANCE:
            return error
        with contextlib.suppress(*NOT_A_BATCH):
            again = _disagreement(self.sum_over([whole], moved=True), self.sum_over(pieces, moved=True))
            return again if again <= SUM_TOLERANCE else error
        return error

    def shares(self, whole: Piece, pieces: Sequence[Piece]) -> list[float] | None:
        """Shares of the pieces, at least 0, whose sum has the loss and gradient of the whole, None where none do.

        The gradients are compared through random signed sums of their entries, four for each piece.
        """
        if len(pieces) > MOST_SHARES:
            return None
        count = 4 * len(pieces)

        def sketch(found: _Sum) -> np.ndarray:
            generator = torch.Generator().manual_seed(0)
            padded = torch.zeros(-(-len(found.gradient) // count) * count, dtype=torch.float64)
            padded[: len(found.gradient)] = found.gradient.double().cpu()
            padded *= torch.randint(0, 2, padded.shape, generator=generator) * 2 - 1
            return np.append(padded.view(-1, count).sum(dim=0).numpy(), found.loss)

        for moved in (False, True):
            wanted = self.sum_over([whole], moved=moved)
            columns = [sketch(self.sum_over([replace(piece, share=1.0)], moved=moved)) for piece in pieces]
            found, _ = scipy.optimize.nnls(np.stack(columns, axis=1), sketch(wanted))
            shares = [float(share) for share in _rounded(found)]
            weighted = [replace(piece, share=share) for piece, share in zip(pieces, shares, strict=True)]
            if _disagreement(wanted, self.sum_over(weighted, moved=moved)) <= SUM_TOLERANCE:
                return shares
        return None

    def error_over_everything(self) -> float | None:
        """The error of all pieces against all batches together, None where it is large or cannot be known."""
        batches = self.objective.batches
        if sum(map(rows_in, batches)) > self.most_rows():
            return None
        batch = batches[0] if len(batches) == 1 else concatenated(batches)
        if batch is None:
            return None
        try:
            error = self.error(self.piece_of(batch), self.objective.pieces)
        except NOT_A_BATCH:
            return None
        return error if error <= SUM_TOLERANCE else None

    def error_of_thirds(self, piece: Piece) -> float | None:
        """The error of the thirds of some rows of a piece against these rows, None where it cannot be known."""
        for count in SAMPLE_ROWS:
            rows = min(count, rows_in(piece.batch))
            if rows < 2:
                return None
            sample = replace(piece, batch=spread_rows(piece.batch, rows), share=1.0)
            try:
                parts = list(self.objective.split(sample, max(-(-rows // 3), 1)))
                return self.error(sample, parts) if parts else None
            except torch.OutOfMemoryError:
                continue
            except NOT_A_BATCH:
                return None
        return None

    def samples(self) -> list[Piece]:
        """Some pieces of more than one row, evenly spread over those there are."""
        pieces = [piece for piece in self.objective.pieces if rows_in(piece.batch) > 1]
        count = min(len(pieces), MOST_SAMPLES)
        return [pieces[i * len(pieces) // count] for i in range(count)]

    def is_random(self) -> bool:
        """Whether the loss of some rows of the first piece is another when other random numbers are drawn."""
        piece = self.objective.pieces[0]
        for count in (*SAMPLE_ROWS, rows_in(piece.batch)):  # all rows where fewer are no batch
            sample = replace(piece, batch=spread_rows(piece.batch, min(count, rows_in(piece.batch))))
            with contextlib.suppress(torch.OutOfMemoryError, *NOT_A_BATCH):
                return self._is_random(sample)
        return self._is_random(piece)

    def _is_random(self, piece: Piece) -> bool:
        first = self.sum_over([piece])
        with random_states_kept(self.graphs.device), _other_random_numbers(self.graphs):
            return _disagreement(first, self.sum_over([piece])) > SUM_TOLERANCE

    def most_rows(self) -> int:
        """Rows that may be evaluated at once: a gradient without a graph takes less than a graph of a piece."""
        return max(WHOLE_ROWS * max(self.objective.rows), LEAST_WHOLE_ROWS)

    def piece_of(self, batch: Any) -> Piece:
        """A batch made of several."""
        return Piece(batch, 1.0, "all batches together")

    def _moved_weights(self) -> torch.Tensor:
        if self._offset is None:
            generator = torch.Generator().manual_seed(0)
            parts = []
            for parameter in self.graphs.space.parameters:
                size = float(parameter.detach().double().square().mean().sqrt()) if parameter.numel() else 0.0
                parts.append(MOVED * (size or MOVED) * torch.randn(parameter.numel(), generator=generator))
            self._offset = torch.cat(parts).to(self.graphs.device, self.graphs.dtype)
        return self._offset


def _disagreement(one: _Sum, other: _Sum) -> float:
    """The larger relative difference of loss and gradient, relative to the sizes of what was added up."""
    norms, absolute = max(one.norms, other.norms), max(one.absolute, other.absolute)
    of_gradient = norm(one.gradient - other.gradient) / norms if norms > 0 else 0.0
    return max(of_gradient, abs(one.loss - other.loss) / absolute if absolute > 0 else 0.0)


def _rounded(shares: np.ndarray) -> np.ndarray:
    """Shares that are all 1 to rounding, or add up to 1, as what they are meant to be."""
    if np.allclose(shares, 1.0, atol=1e-3):
        return np.ones_like(shares)
    return shares / shares.sum() if abs(shares.sum() - 1) < 1e-3 else shares


# -- the parts of a batch


def _settle_parts(comparison: _Comparison) -> tuple[Objective, float, str]:
    """The objective whose parts of each cut batch add up to it, the largest error, and a note."""
    objective = comparison.objective
    pieces: list[Piece] = []
    errors, note = [0.0], ""
    for index, batch in enumerate(objective.batches):
        parts = [piece for piece in objective.pieces if piece.index == index]
        if len(parts) > 1 and rows_in(batch) != rows_in(parts[0].batch):
            parts, error = _settled_parts(comparison, batch, parts)
            errors.append(error)
            note = BY_THE_LOSS if error > SUM_TOLERANCE else note
        pieces.extend(parts)
    settled = objective if not note else objective.with_pieces(pieces)
    return settled, max(errors), note


def _settled_parts(comparison: _Comparison, batch: Any, parts: list[Piece]) -> tuple[list[Piece], float]:
    weighted = [replace(part, share=part.within) for part in parts]
    if rows_in(batch) <= comparison.most_rows():
        piece = _as_one(comparison, parts[0].index)
        try:
            error = comparison.error(piece, weighted)
            if error <= SUM_TOLERANCE or comparison.is_random():
                return parts, 0.0 if error > SUM_TOLERANCE else error
            found = comparison.shares(piece, weighted)
            if found is not None:
                pairs = [(part, own) for part, own in zip(parts, found, strict=True) if own]
                return [replace(p, share=p.batch_share * own, within=own) for p, own in pairs], error
            raise _cut_refused(error)
        except torch.OutOfMemoryError:
            pass
    error = _error_of_a_sample(comparison, batch, max(weighted, key=lambda part: rows_in(part.batch)))
    if error is None or error <= SUM_TOLERANCE or comparison.is_random():
        return parts, min(error or 0.0, SUM_TOLERANCE)
    raise _cut_refused(error)


def _error_of_a_sample(comparison: _Comparison, batch: Any, part: Piece) -> float | None:
    """The error of the parts of some rows of a batch, as many as memory holds, None where that is too few to cut."""
    rows = min(comparison.most_rows(), rows_in(batch))
    while rows > rows_in(part.batch):
        sample = replace(part, batch=spread_rows(batch, rows), share=1.0, within=1.0)
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


def _settle_batches(comparison: _Comparison) -> tuple[Objective, float, str]:
    """The objective whose batches add up to all of them together, the error of the counted one, and a note."""
    objective = comparison.objective
    kinds: dict[Any, list[int]] = {}
    for index in dict.fromkeys(piece.index for piece in objective.pieces):
        batch = objective.batches[index]
        kinds.setdefault(kind_of(batch, rows_in(batch)), []).append(index)
    findings = [_Finding(comparison, indices) for indices in kinds.values()]
    error = max(finding.error for finding in findings)
    if error <= SUM_TOLERANCE:
        unknown = len(findings) > 1 and not counts_for_certain(objective.loss, objective.model)
        return objective, error, OF_SEVERAL_SHAPES if unknown else ""
    if comparison.is_random():
        return objective, 0.0, RANDOM
    if any(finding.is_sum for finding in findings) and all(finding.is_sum is not False for finding in findings):
        summed = objective.with_batch_shares(dict.fromkeys(itertools.chain(*kinds.values()), 1.0))
        return summed, error, SUMMED
    if len(findings) == 1 and findings[0].shares is not None:
        return objective.with_batch_shares(findings[0].shares), error, BY_THE_LOSS
    return _mean_over_batches(objective, error)


class _Finding:
    """What comparing the batches of one kind with all of them together shows.

    Attributes:
        error: the relative error of the sum weighted by counts; 0 where nothing could be compared.
        shares: of the batches by index, found from the loss itself, where the error is large.
        is_sum: whether the batches and their parts add up with a weight of 1 each, None where that cannot be known.

    Args:
        comparison: of an objective.
        indices: of the batches of that kind.
    """

    def __init__(self, comparison: _Comparison, indices: list[int]):
        self.error, self.shares = 0.0, None
        self.is_sum: bool | None = None
        groups = list(_groups(comparison, indices)) if len(indices) > 1 else []
        errors = [_error_of_group(comparison, group, axis=0) for group in groups]
        if not errors or any(error is None for error in errors):
            errors = [_error_of_group(comparison, group, axis=1) for group in groups]
        known = [error for error in errors if error is not None]
        if known and len(known) == len(errors):
            self.error = max(known)
            self.is_sum = False
            if self.error > SUM_TOLERANCE:
                self._look_further(comparison, groups)
            return
        self._compare_thirds(comparison, indices)

    def _look_further(self, comparison: _Comparison, groups: list[list[int]]) -> None:
        """Shares by which the batches add up, or the second axis as that of the examples."""
        self.shares = _shares_of_groups(comparison, groups)
        self.is_sum = self.shares is not None and all(share == 1.0 for share in self.shares.values())
        if self.shares is None:
            errors = [_error_of_group(comparison, group, axis=1) for group in groups]
            known = [error for error in errors if error is not None]
            if len(known) == len(groups) and max(known) <= SUM_TOLERANCE:
                self.error = max(known)

    def _compare_thirds(self, comparison: _Comparison, indices: list[int]) -> None:
        pieces = [piece for piece in comparison.samples() if piece.index in indices]
        errors = [error for piece in pieces if (error := comparison.error_of_thirds(piece)) is not None]
        self.error = max(errors, default=0.0)
        self.is_sum = None if not errors else False
        same = len({constants_in(batch) for batch in comparison.objective.batches}) == 1
        if self.error > SUM_TOLERANCE and same:  # a sum divided by its batch's own number is a mean
            summed = _Comparison(comparison.graphs, comparison.objective.summed())
            again = [summed.error_of_thirds(piece) for piece in pieces]
            self.is_sum = all(error is not None and error <= SUM_TOLERANCE for error in again)


def _groups(comparison: _Comparison, indices: list[int]) -> Iterator[list[int]]:
    """Consecutive batches that are few enough rows together, each group starting with the last batch of the one before.

    So the weights that a group's batches have among themselves are linked to those of all others.
    """
    batches, most = comparison.objective.batches, comparison.most_rows()
    group = [indices[0]]
    for index in indices[1:]:
        if len(group) > 1 and sum(rows_in(batches[i]) for i in [*group, index]) > most:
            yield group
            group = [group[-1]]
        group.append(index)
    yield group


def _pieces_of(comparison: _Comparison, group: Sequence[int]) -> list[Piece]:
    """The pieces of some batches, with shares that add up to 1 unless the loss is a sum."""
    pieces = [piece for piece in comparison.objective.pieces if piece.index in group]
    shares = {piece.index: piece.batch_share for piece in pieces}
    total = 1.0 if comparison.objective.adds_up else sum(shares.values())
    return [replace(piece, share=piece.share / total) for piece in pieces]


def _error_of_group(comparison: _Comparison, group: list[int], *, axis: int) -> float | None:
    whole = concatenated([comparison.objective.batches[i] for i in group], axis)
    if whole is None:
        return None
    try:
        return comparison.error(comparison.piece_of(whole), _pieces_of(comparison, group))
    except NOT_A_BATCH:  # memory errors too: the batches are then compared with their parts
        return None


def _shares_of_groups(comparison: _Comparison, groups: list[list[int]]) -> dict[int, float] | None:
    """Shares of the batches by which every group adds up, linked by the batches that two groups have in common."""
    shares: dict[int, float] = {}
    is_mean = is_sum = True
    for group in groups:
        whole = concatenated([comparison.objective.batches[i] for i in group])
        pieces = [_as_one(comparison, index) for index in group]
        found = comparison.shares(comparison.piece_of(whole), pieces)
        if found is None:
            return None
        is_sum &= all(share == 1.0 for share in found)
        is_mean &= abs(sum(found) - 1) < 1e-6
        scale = shares[group[0]] / found[0] if shares and found[0] else 1.0
        shares |= {index: share * scale for index, share in zip(group, found, strict=True)}
    if len(groups) == 1 or is_sum:
        return shares
    total = sum(shares.values())
    return {index: share / total for index, share in shares.items()} if is_mean and total > 0 else None


def _as_one(comparison: _Comparison, index: int) -> Piece:
    """A batch as one piece."""
    return Piece(comparison.objective.batches[index], 1.0, f"batch {index}", index)


def _mean_over_batches(objective: Objective, error: float) -> tuple[Objective, float, str]:
    indices = {piece.index for piece in objective.pieces}
    note = (
        f"the loss is no weighted mean over rows (the batches together differ by {error:.1%}): the plain mean over the "
        f"{len(indices)} batches is measured; pass weight= for another"
    )
    return objective.with_batch_shares(dict.fromkeys(indices, 1 / len(indices))), error, note


# -- evaluations that can be compared


@contextlib.contextmanager
def _comparable(graphs: GraphStore) -> Iterator[None]:
    """Inside, gradients are those of this process alone, without dropout, which no two batches share."""
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
    """Inside, a forward pass draws other random numbers than it did."""
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
    """Inside, dropout keeps everything, in modules and in functions."""

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
