"""batch_noise: the jackknife against closed forms, and totals that hold the truth of the population."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import nn

import spectra
from spectra.algorithms.batch_noise import batch_noise, jackknife
from spectra.estimates.estimate import Estimate, certain
from spectra.operators.derived import MeanOperator


def regression(rows, *, seed, dimension=6):
    """A linear model, and batches of so many rows each, whose mean squared error has the Hessian 2 X'X / rows."""
    print(f"seed = {seed}")
    torch.manual_seed(seed)
    model = nn.Linear(dimension, 1, bias=False).double()
    batches = [(torch.randn(k, dimension).double(), torch.randn(k, 1).double()) for k in rows]
    return model, batches


def builder(model):
    return lambda batches: spectra.HessianOperator(model, batches)


def weighted_error(values, weights):
    """The textbook's jackknife error of a weighted mean, from its residuals."""
    shares = np.asarray(weights) / np.sum(weights)
    mean = shares @ values
    return math.sqrt(np.mean((values - mean) ** 2 * shares / (1 - shares)))


def test_the_trace_gets_the_error_of_a_weighted_mean_of_the_batches_traces():
    rows = [4, 9, 16, 5, 30]
    model, batches = regression(rows, seed=0)
    traces = np.array([2 * float((x**2).sum()) / len(x) for x, _ in batches])
    split = batch_noise(builder(model), batches, groups=5)["trace"]
    assert split.estimate.value == pytest.approx(traces @ rows / sum(rows))
    assert split.batch_half_width == pytest.approx(student.ppf(0.975, 4) * weighted_error(traces, rows))
    assert split.bias == pytest.approx(0, abs=1e-9)
    assert split.probe_half_width < 1e-9  # as many steps as dimensions: nothing is sampled
    assert split.total.half_width == pytest.approx(split.batch_half_width)


def test_with_equal_groups_it_is_the_standard_error_of_the_mean():
    values = np.random.default_rng(1).normal(size=8)
    left_out = [{"trace": certain((values.sum() - value) / 7)} for value in values]
    split = jackknife({"trace": certain(values.mean())}, left_out, np.full(8, 3.0))["trace"]
    assert split.batch_half_width == pytest.approx(student.ppf(0.975, 7) * values.std(ddof=1) / math.sqrt(8))


def test_widths_add_in_quadrature_and_the_bias_gets_room_on_its_side():
    """A variance over all the data, sum (x - mean)^2 / n, is too small by itself over n."""
    values = np.random.default_rng(2).normal(size=20)
    left_out = [{"variance": certain(np.delete(values, j).var())} for j in range(20)]
    full = Estimate(values.var(), values.var() - 0.3, values.var() + 0.4)
    split = jackknife({"variance": full}, left_out, np.ones(20))["variance"]
    assert split.bias == pytest.approx(values.var() - values.var(ddof=1))
    assert split.probe_half_width == pytest.approx(0.35)
    assert split.total.low == pytest.approx(values.var() - math.hypot(0.3, split.batch_half_width))
    assert split.total.high == pytest.approx(values.var() + math.hypot(0.4, split.batch_half_width) - split.bias)
    assert "probe vectors +-0.35, batches +-" in str(split)


def test_shares_stay_shares_and_wide_ones_are_unresolved():
    left_out = [{"negative_share": certain(value)} for value in (0.1, 0.5, 0.3)]
    total = jackknife({"negative_share": certain(0.3)}, left_out, np.ones(3))["negative_share"].total
    assert (total.low, total.high) == (0.0, 1.0)
    assert not total.resolved
    assert "batches" in total.reason


@pytest.mark.parametrize("groups", [3, 5, 10])
def test_the_total_holds_the_trace_of_the_population(groups):
    """Of ten batches of unequal size from a population, some with larger inputs than others, seen by four probes."""
    print(f"seed = {groups}")
    rng, dimension, held, probes_alone = np.random.default_rng(groups), 60, [], []
    variances = np.linspace(0.2, 2, dimension)
    for _ in range(300):
        rows = rng.integers(20, 60, size=10)
        scales = rng.gamma(8, 1 / 8, size=10)
        data = [np.sqrt(s * variances) * rng.normal(size=(k, dimension)) for k, s in zip(rows, scales, strict=True)]
        probes = rng.normal(size=(4, dimension))
        probes *= math.sqrt(dimension) / np.linalg.norm(probes, axis=1, keepdims=True)

        def trace(chosen, probes=probes, data=data):
            x = np.concatenate([data[i] for i in chosen])
            values = 2 * np.mean((x @ probes.T) ** 2, axis=0)
            eigenvalues = np.linalg.eigvalsh(2 * x.T @ x / len(x))
            error = math.sqrt(2 * dimension**2 * eigenvalues.var() / (dimension + 2) / 4)
            return Estimate(values.mean(), values.mean() - 1.96 * error, values.mean() + 1.96 * error)

        parts = np.array_split(np.arange(10), groups)
        left_out = [{"trace": trace([i for i in range(10) if i not in part])} for part in parts]
        split = jackknife({"trace": trace(range(10))}, left_out, [rows[part].sum() for part in parts])["trace"]
        truth = 2 * variances.sum()
        held.append(split.total.low <= truth <= split.total.high)
        probes_alone.append(split.estimate.low <= truth <= split.estimate.high)
    print(f"coverage {np.mean(held):.3f}, of probe noise alone {np.mean(probes_alone):.3f}")
    assert 0.92 <= np.mean(held) <= 0.99
    assert np.mean(probes_alone) < 0.85


def test_a_batch_alone_is_split_by_rows():
    model, (batch,) = regression([40], seed=4)
    parts = [(batch[0][start : start + 8], batch[1][start : start + 8]) for start in range(0, 40, 8)]
    one, five = (batch_noise(builder(model), data, groups=5) for data in ([batch], parts))
    for name in ("trace", "rms", "lambda_max"):
        assert one[name].batch_half_width == pytest.approx(five[name].batch_half_width)
    mapped, _ = (batch_noise(builder(model), data, groups=3)["trace"] for data in (parts[:2], parts))
    traces = np.array(
        [2 * float((x**2).sum()) / len(x) for x in torch.cat([parts[0][0], parts[1][0]]).split([5, 5, 6])]
    )
    assert mapped.batch_half_width == pytest.approx(student.ppf(0.975, 2) * weighted_error(traces, [5, 5, 6]))


def test_groups_weigh_counted_tokens():
    model = nn.Linear(5, 3).double()
    torch.manual_seed(5)
    inputs, targets = torch.randn(6, 7, 5).double(), torch.randint(3, (6, 7))
    targets[1, 2:] = -100
    batches = list(zip(inputs, targets, strict=True))
    split = batch_noise(builder(model), batches, groups=3)["trace"]
    of_mean = batch_noise(lambda b: MeanOperator([spectra.HessianOperator(model, b)]), batches, groups=3)["trace"]
    assert of_mean.batch_half_width == pytest.approx(split.batch_half_width)
    traces, counts = [], [9, 14, 14]
    for start in (0, 2, 4):
        with spectra.HessianOperator(model, batches[start : start + 2]) as op:
            traces.append(spectra.slq(op, steps=20).trace().value)
    assert split.batch_half_width == pytest.approx(student.ppf(0.975, 2) * weighted_error(np.array(traces), counts))


def test_what_cannot_be_split_is_refused_in_one_line():
    model, batches = regression([2, 1], seed=6)
    cases = [
        ({"groups": 1}, "at least 2"),
        ({"groups": 4}, "groups=3"),
    ]
    for options, words in cases:
        with pytest.raises(spectra.InputError, match=words) as caught:
            batch_noise(builder(model), batches, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(spectra.InputError, match="reduction='mean'"):
        batch_noise(
            lambda b: spectra.HessianOperator(model, b, loss=nn.MSELoss(reduction="sum")), batches * 2, groups=2
        )
    with pytest.raises(spectra.InputError, match=r"1 rows in all make no 2 groups: give more batches$"):
        batch_noise(builder(model), batches[1:], groups=2)
    nothing = nn.Linear(6, 2).double()
    silent = [(x, torch.full((len(x),), label)) for (x, _), label in zip(batches, (1, -100), strict=True)]
    with pytest.raises(spectra.InputError, match="use fewer groups"):
        batch_noise(builder(nothing), silent, groups=2)
    with pytest.raises(spectra.InputError, match="a weight each"):
        jackknife({"trace": certain(1.0)}, [{"trace": certain(1.0)}] * 2, [1.0])


def test_settings_left_out_are_those_of_the_docstring():
    """In 200 dimensions, which the steps do not span: with others the numbers differ."""
    batches = list(torch.linspace(-1, 2, 6 * 200, dtype=torch.float64).view(6, 1, 200) ** 3)

    def diagonal(parts):
        return spectra.DiagonalOperator(torch.cat(parts).mean(0))

    named = {"groups": 5, "probes": 4, "steps": 60, "seed": 0, "deflate": 0}
    found, want = (batch_noise(diagonal, batches, **options) for options in ({}, named))
    assert {key: split.to_dict() for key, split in found.items()} == {k: split.to_dict() for k, split in want.items()}


def test_a_record_stores_both_widths_and_the_ends():
    values = [0.2, 0.5, 0.3, 0.9]
    left_out = [{"trace": certain(value)} for value in values]
    split = jackknife({"trace": Estimate(0.4, 0.3, 0.6)}, left_out, [1.0, 2.0, 3.0, 4.0])["trace"]
    stored = split.to_dict()
    assert stored == {
        "probes": pytest.approx(0.15),
        "batches": split.batch_half_width,
        "bias": split.bias,
        "low": split.total.low,
        "high": split.total.high,
    }
    assert stored["low"] < 0.3
    assert stored["high"] > 0.6
