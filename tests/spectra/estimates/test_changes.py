"""compare: intervals of changes that cover and are narrower for shared probe vectors, and sentences about them."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

import spectra
from spectra.estimates.changes import Change, _made_consistent, _same_probes
from spectra.estimates.estimate import Estimate, certain

N = 400


def pair(seed, *, kind="each", radius=27.0, zeros=0.0, n=N):
    """Eigenvalues before and after: outliers of both signs over a bulk within a hundredth of zero."""
    rng = np.random.default_rng(seed)
    before = 0.005 * (rng.laplace(size=n) if seed % 2 else rng.standard_t(3, size=n))
    before[rng.random(n) < zeros] = 0.0
    after = before * rng.uniform(0.7, 1.5)
    before[:12] = np.geomspace(0.5, radius, 12) * np.where(np.arange(12) % 4 == 1, -0.3, 1)
    factors = {
        "each": rng.uniform(0.7, 1.5, size=12),
        "largest": np.where(np.arange(12) == 11, 1.3, 1.0),
        "all": np.full(12, 1.2),
    }[kind]
    after[:12] = before[:12] * factors
    return before, after


def turned(values, seed, *, angle):
    """A dense symmetric matrix with these eigenvalues, whose leading eigenvectors are turned among each other."""
    rng, values = np.random.default_rng(seed + 10_000), values.copy()
    vectors = np.linalg.qr(np.eye(12) + angle * rng.normal(size=(12, 12)))[0]
    matrix = np.diag(values)
    matrix[:12, :12] = vectors @ matrix[:12, :12] @ vectors.T
    return spectra.DenseOperator(torch.tensor(matrix))


def slq(values, *, probes=4, steps=40, seed=0, **options):
    op = values if isinstance(values, spectra.LinearOperator) else spectra.DiagonalOperator(values)
    return spectra.slq(op, probes=probes, steps=steps, seed=seed, **options)


def truth(values):
    squares, sizes, negative = values**2, np.abs(values), values < 0
    return {
        "trace": values.sum(),
        "rms": math.sqrt(squares.mean()),
        "frobenius": math.sqrt(squares.sum()),
        "lambda_max": values.max(),
        "lambda_min": values.min(),
        "negative_share": negative.mean(),
        "near_zero_share": (sizes < 1.5e-3).mean(),
        "negative_energy_share": squares[negative].sum() / squares.sum(),
        "negative_magnitude_share": sizes[negative].sum() / sizes.sum(),
    }


def traced(density, rule):
    """The trace as one probe vector estimates it."""
    return density.measure.sampled_dimension * (rule.weights @ rule.nodes)


CASES = {  # kind of change, outlier radius, share of zeros, turn of the leading eigenvectors
    "same vectors": ("each", 27.0, 0.0, 0.0),
    "one outlier": ("largest", 1000.0, 0.4, 0.0),
    "turned": ("each", 27.0, 0.0, 0.3),
    "unrelated": ("each", 27.0, 0.0, 100.0),
}


def test_intervals_of_changes_cover_where_students_would_not(monkeypatch):
    """Of sums and of a ratio, seen by four probes. Where one outlier grows, the pairs are as skewed as the square of a
    normal number."""
    names = ("trace", "rms", "negative_energy_share")  # counted shares are slow, and wide enough
    monkeypatch.setattr(
        "spectra.estimates.changes.summarize", lambda density, _: {n: getattr(density, n)() for n in names}
    )
    print("seeds = 0 to 15")
    held, alone = {}, {}
    for case, (kind, radius, zeros, angle) in CASES.items():
        for seed in range(16):
            before, after = pair(seed, kind=kind, radius=radius, zeros=zeros)
            second = turned(after, seed, angle=angle) if angle else after
            a, b = slq(before, seed=seed, steps=24), slq(second, seed=seed, steps=24)
            first, last = truth(before), truth(after)
            for name, change in spectra.compare(a, b).items():
                exact = last[name] - first[name]
                held.setdefault(name, []).append(change.difference.low <= exact <= change.difference.high)
                if change.ratio.resolved:
                    held.setdefault("ratio", []).append(
                        change.ratio.low <= last[name] / first[name] <= change.ratio.high
                    )
            sums = [traced(b, y) - traced(a, x) for x, y in zip(a.measure.rules, b.measure.rules, strict=True)]
            half = student.ppf(0.975, 3) * np.std(sums, ddof=1) / 2
            alone.setdefault(case, []).append(abs(np.mean(sums) - last["trace"] + first["trace"]) <= half)
    coverage = {name: float(np.mean(each)) for name, each in held.items()}
    print(coverage, "Student's alone", {case: float(np.mean(each)) for case, each in alone.items()})
    assert min(coverage.values()) >= 0.93
    assert np.mean(list(alone.values())) < coverage["trace"] - 0.04


def test_shared_probe_vectors_narrow_the_interval_of_a_change():
    before, after = pair(1)
    a, b, other = slq(before, probes=10), slq(after, probes=10), slq(after, probes=10, seed=1)
    paired, unpaired = spectra.compare(a, b), spectra.compare(a, other)
    assert all(change.paired for change in paired.values())
    assert not any(change.paired for change in unpaired.values())
    for name in ("trace", "rms", "frobenius", "negative_energy_share"):
        change = paired[name]
        assert change.difference.half_width < 0.5 * unpaired[name].difference.half_width
        assert change.difference.low >= change.after.low - change.before.high - 1e-12
        assert change.difference.high <= change.after.high - change.before.low + 1e-12
    assert paired["rms"].ratio.half_width < 0.1


def test_a_spectrum_that_scales_has_an_exact_ratio():
    before, _ = pair(2)
    for changes in (
        spectra.compare(slq(before), slq(1.25 * before)),
        spectra.compare(slq(before, deflate=6), slq(1.25 * before, deflate=6)),
    ):
        for name in ("trace", "rms", "frobenius", "lambda_max"):
            assert changes[name].ratio.low == pytest.approx(1.25, rel=1e-3)
            assert changes[name].ratio.high == pytest.approx(1.25, rel=1e-3)
            assert changes[name].measurable
        rms = changes["rms"]  # the difference is as uncertain as the size
        assert rms.difference.half_width == pytest.approx(0.25 * rms.before.half_width, rel=1)
        energy = changes["negative_energy_share"].difference
        assert abs(energy.low) + abs(energy.high) < 1e-3


def test_zeros_that_come_and_deflation_keep_pairs():
    before, after = pair(3, zeros=0.3)
    after[20:60] = 0.0
    changes = spectra.compare(slq(before, deflate=3), slq(after, deflate=2))
    assert changes["trace"].paired
    for name, change in changes.items():
        exact = truth(after)[name] - truth(before)[name]
        assert change.difference.low - 1e-6 <= exact <= change.difference.high + 1e-6, name


def test_ends_and_counts_get_the_difference_of_the_intervals():
    before, after = pair(4)
    changes = spectra.compare(slq(before, steps=15), slq(after, steps=15))
    for name in ("lambda_max", "lambda_min", "negative_share", "near_zero_share"):
        change = changes[name]
        assert change.difference.low == pytest.approx(change.after.low - change.before.high)
        assert change.difference.high == pytest.approx(change.after.high - change.before.low)
    assert not changes["negative_share"].difference.resolved
    assert "steps" in changes["negative_share"].difference.reason


def test_independent_intervals_add_in_quadrature_and_unknown_ones_add_up():
    before, after = pair(5)
    a, b = slq(before), slq(after, seed=7)
    change = spectra.compare(a, b)["rms"]
    first, last = change.before, change.after
    below = math.hypot(last.value - last.low, first.high - first.value)
    assert change.difference.low == pytest.approx(last.value - first.value - below)
    arrays = b.to_arrays()
    del arrays["seed"]
    for unsure in (spectra.SpectralDensity.from_arrays(arrays), slq(after, probes=5)):
        change = spectra.compare(a, unsure)["rms"]
        assert not change.paired
        assert change.difference.low == pytest.approx(change.after.low - change.before.high)
    alone = spectra.compare(slq(before, probes=1), slq(after, probes=1))["trace"]  # one pair says nothing of its spread
    assert alone.paired
    assert alone.difference.low == pytest.approx(alone.after.low - alone.before.high)


def test_exact_spectra_change_exactly():
    before, after = pair(6)
    changes = spectra.compare(slq(before, steps=N), slq(after, steps=N, seed=3))
    for name, change in changes.items():
        exact = truth(after)[name] - truth(before)[name]
        assert change.paired
        assert change.difference.half_width < 1e-8, name
        assert change.difference.low - 1e-9 <= exact <= change.difference.high + 1e-9
    mixed = spectra.compare(slq(before, steps=N), slq(after))["frobenius"]
    assert mixed.difference.half_width == pytest.approx(mixed.after.half_width)
    same = spectra.compare(slq(before, steps=N), slq(before, steps=N))
    assert not any(change.measurable for change in same.values())


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 5])
def test_the_seed_is_stored(seed):
    density = slq(np.arange(30.0), steps=4, seed=seed)
    assert density.seed == seed
    again = spectra.SpectralDensity.from_arrays(density.to_arrays())
    assert spectra.compare(density, again)["trace"].paired
    assert not spectra.compare(density, slq(np.arange(30.0), steps=4, seed=seed + 1))["trace"].paired


def say(quantity, before, after, difference, ratio):
    return str(Change(quantity, certain(before), certain(after), Estimate(*difference), Estimate(*ratio), True))


def test_sentences():
    rose = say("lambda_max", 10, 13.1, (3.1, 2.7, 3.5), (1.31, 1.27, 1.35))
    assert rose == "lambda_max rose by 31.0 % [27.0, 35.0]"
    fell = say("rms", 0.02, 0.0138, (-0.0062, -0.007, -0.0054), (0.69, 0.65, 0.73))
    assert fell == "rms fell by 31.0 % [27.0, 35.0]"
    share = say("negative_share", 0.3, 0.279, (-0.021, -0.032, -0.010), (0.93, 0.9, 0.97))
    assert share == "negative share fell by 0.021 [0.010, 0.032]"
    deeper = say("lambda_min", -2.0, -2.5, (-0.5, -0.6, -0.4), (1.25, 1.2, 1.3))
    assert deeper == "lambda_min became more negative by 25.0 % [20.0, 30.0]"
    flatter = say("lambda_min", -2.0, -1.5, (0.5, 0.4, 0.6), (0.75, 0.7, 0.8))
    assert flatter == "lambda_min became less negative by 25.0 % [20.0, 30.0]"
    crossed = say("lambda_min", -2.0, 1.0, (3.0, 2.0, 4.0), (-0.5, -0.7, -0.3))
    assert crossed == "lambda_min rose by 3.0 [2.0, 4.0]"
    still = say("trace", 10.0, 10.2, (0.2, -0.3, 0.7), (1.02, 0.97, 1.07))
    assert still == "trace did not change measurably: +2.0 % [-3.0, 7.0]"
    steady = say("near_zero_share", 0.3, 0.3, (-0.001, -0.02, 0.02), (1.0, 0.9, 1.1))
    assert steady == "near zero share did not change measurably: -0.001 [-0.020, 0.020]"
    assert say("trace", 1.0, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) == "trace did not change"


def test_a_ratio_to_what_may_be_zero_is_unresolved():
    rng = np.random.default_rng(8)
    values = rng.normal(size=300)
    change = spectra.compare(slq(values), slq(values + 0.5))["trace"]
    assert not change.ratio.resolved
    assert "zero" in change.ratio.reason
    assert change.difference.low <= 150 <= change.difference.high
    assert "%" not in str(change)


def test_other_things_are_refused_in_one_line():
    density = slq(np.arange(30.0), steps=4)
    with pytest.raises(spectra.InputError, match=r"Run\.density"):
        spectra.compare(density, "runs/a")
    with pytest.raises(spectra.InputError, match="positive"):
        spectra.compare(density, density, near_zero_tol=0)


def test_small_negative_values_are_called_negative_too():
    deeper = say("lambda_min", -0.02, -0.025, (-0.005, -0.006, -0.004), (1.25, 1.2, 1.3))
    assert deeper == "lambda_min became more negative by 25.0 % [20.0, 30.0]"


@pytest.mark.parametrize(
    ("difference", "ratio", "wanted"),
    [
        ((0.2, 0.1, 0.3), (1.2, 0.9, 1.4), ((0.1, 0.3), (1.1, 1.3))),
        ((-0.2, -0.5, 0.0), (0.8, 0.5, 0.9), ((-0.5, -0.1), (0.5, 0.9))),
        ((0.2, 0.0, 0.5), (1.2, 1.1, 1.5), ((0.1, 0.5), (1.1, 1.5))),
        ((0.2, -0.1, 0.5), (1.2, 0.8, 1.6), ((-0.1, 0.5), (0.8, 1.6))),
    ],
)
def test_the_interval_that_excludes_no_change_narrows_the_other(difference, ratio, wanted):
    """Of a quantity that was 1 for certain, the ratio is 1 + difference."""
    found = _made_consistent(Estimate(*difference), Estimate(*ratio), certain(1.0))
    for estimate, ends in zip(found, wanted, strict=True):
        assert (estimate.low, estimate.high) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("before", "after", "paired"),
    [([3, 3], [3, 2], True), ([3, 3], [3, 0], False), ([3, 0], [0, 3], False), ([0, 0], [3, 3], False)],
)
def test_pairs_are_probe_vectors_that_both_spectra_have(before, after, paired):
    """A length of zero stands for a probe vector without a recurrence, as where all was deflated."""
    alphas, betas = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 4.0]]), np.ones((2, 3))
    a, b = (spectra.SpectralDensity(9, alphas, betas, np.array(lengths), seed=0) for lengths in (before, after))
    assert _same_probes(a, b) is paired
    assert _same_probes(b, a) is paired
    assert not _same_probes(a, spectra.SpectralDensity(9, alphas[:1], betas[:1], np.array([3]), seed=0))
