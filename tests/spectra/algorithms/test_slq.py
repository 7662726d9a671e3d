"""Stochastic Lanczos quadrature on matrices whose spectrum is prescribed."""

import numpy as np
import pytest
import torch
from oracles import matrix_with_spectrum, wasserstein

import spectra


def clustered(seed):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=40) * 0.01, 2 + rng.normal(size=8) * 1e-6, [3.0, 3.0, -2.0, 9.0]])


SPECTRA = {
    "normal": np.random.default_rng(0).normal(size=40),
    "clusters": clustered(1),
    "four decades": np.logspace(-4, 0, 30),
    "double and triple": np.array([5.0, 5.0, 5.0, 1.0, 1.0, 0.3, 0.2, -0.1, -4.0, -4.0]),
    "two values": np.array([1.0] * 7 + [-2.0] * 5),
    "identity": np.ones(12),
    "zero": np.zeros(8),
    "rank deficient": np.concatenate([np.zeros(20), [1.0, 2.0, -7.0]]),
    "rank one": np.concatenate([np.zeros(15), [3.0]]),
    "negative definite": -np.random.default_rng(2).uniform(0.1, 5, size=20),
    "one by one": np.array([-2.5]),
    "two by two": np.array([1.0, -1.0]),
    "huge": 1e12 * np.linspace(-1, 1, 15),
    "tiny": 1e-12 * np.linspace(-1, 1, 15),
    "outlier": np.concatenate([1e-3 * np.random.default_rng(3).normal(size=30), [1e3]]),
}


@pytest.fixture(params=SPECTRA)
def spectrum(request):
    return SPECTRA[request.param]


@pytest.mark.parametrize("extra", [0, 7])
def test_as_many_steps_as_dimensions_give_the_spectrum(spectrum, extra):
    op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=5))
    density = spectra.slq(op, probes=3, steps=len(spectrum) + extra, seed=0)
    radius = np.abs(spectrum).max() or 1.0
    assert wasserstein(density, spectrum) / radius < 1e-8
    np.testing.assert_allclose(density.weights.sum(1), 1, atol=1e-12)
    assert density.dimension == len(spectrum)
    n = len(spectrum)
    assert abs(density.trace().value - spectrum.sum()) < 1e-8 * n * radius
    assert abs(density.frobenius().value - np.linalg.norm(spectrum)) < 1e-8 * n * radius
    assert abs(density.rms().value - np.sqrt(np.mean(spectrum**2))) < 1e-8 * radius


@pytest.mark.parametrize("seed", range(5))
def test_a_random_spectrum_at_full_length(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    values = rng.standard_t(2.5, size=n)
    values[: n // 3] = rng.choice(values, size=n // 3)  # some of them repeated
    density = spectra.slq(spectra.DenseOperator(matrix_with_spectrum(values, seed)), probes=2, steps=n, seed=seed)
    assert wasserstein(density, values) / np.abs(values).max() < 1e-8


@pytest.mark.parametrize("reorthogonalize", ["auto", "full", "none"])
def test_fewer_steps_make_a_rule_inside_the_spectrum(spectrum, reorthogonalize):
    op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=6))
    steps = max(1, len(spectrum) // 2)
    density = spectra.slq(op, probes=4, steps=steps, seed=1, reorthogonalize=reorthogonalize)
    assert density.nodes.shape == density.weights.shape == (4, steps)
    assert density.alphas.shape == density.betas.shape == (4, steps)
    assert np.shape(density.lengths) == (4,)
    assert np.isfinite(density.nodes).all()
    assert (density.weights >= 0).all()
    np.testing.assert_allclose(density.weights.sum(1), 1, atol=1e-10)
    radius = np.abs(spectrum).max() or 1.0
    nodes = density.nodes[density.weights > 0]
    assert nodes.min() >= spectrum.min() - 1e-9 * radius
    assert nodes.max() <= spectrum.max() + 1e-9 * radius


def jacobi_matrix(density, probe):
    length = density.lengths[probe]
    couplings = density.betas[probe, : length - 1]
    return np.diag(density.alphas[probe, :length]) + np.diag(couplings, 1) + np.diag(couplings, -1)


def test_the_rule_has_the_moments_of_the_jacobi_matrix():
    """e1^T T^k e1 = sum_j w_j theta_j^k: nodes and weights are the Gauss rule of alphas and betas."""
    spectrum = np.random.default_rng(0).uniform(-1, 1, size=60)
    op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=7))
    density = spectra.slq(op, probes=3, steps=8, seed=0)
    for probe in range(3):
        matrix = jacobi_matrix(density, probe)
        power = np.eye(len(matrix))
        for k in range(16):
            moment = np.sum(density.weights[probe] * density.nodes[probe] ** k)
            assert abs(power[0, 0] - moment) < 1e-12
            power = power @ matrix


@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_the_rule_is_exact_to_degree_two_m_minus_one(reorthogonalize):
    """v^T A^k v is the k-th moment of a probe vector's rule for k < 2m, so longer rules agree with shorter ones."""
    spectrum = np.random.default_rng(1).uniform(-1, 1, size=60)
    op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=8))
    short = spectra.slq(op, probes=4, steps=6, seed=2, reorthogonalize=reorthogonalize)
    long = spectra.slq(op, probes=4, steps=30, seed=2, reorthogonalize="full")
    for k in range(12):
        moments = [np.sum(d.weights * d.nodes**k, axis=1) for d in (short, long)]
        np.testing.assert_allclose(*moments, atol=1e-12)
    gap = [np.sum(d.weights * d.nodes**12, axis=1) for d in (short, long)]
    assert (np.abs(gap[0] - gap[1]) > 1e-9).all()  # and no further: else this test compares a rule with itself


def test_a_probe_vector_is_a_uniform_direction():
    """Averaged over probe vectors the moments of the rule are those of the spectrum: E v^T A^k v = tr(A^k) / n."""
    spectrum = np.random.default_rng(4).uniform(-1, 2, size=50)
    op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=9))
    density = spectra.slq(op, probes=2000, steps=3, seed=3)
    for k in (1, 2, 3):
        moments = np.sum(density.weights * density.nodes**k, axis=1)
        error = moments.std(ddof=1) / np.sqrt(len(moments))
        assert error > 0
        assert abs(moments.mean() - np.mean(spectrum**k)) < 4 * error


def test_the_same_jacobi_matrices_with_and_without_reorthogonalisation_at_first():
    spectrum = np.random.default_rng(0).normal(size=100)
    op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=10))
    full, none = (spectra.slq(op, probes=3, steps=10, seed=0, reorthogonalize=how) for how in ("full", "none"))
    np.testing.assert_allclose(full.alphas, none.alphas, atol=1e-10)
    np.testing.assert_allclose(full.betas, none.betas, atol=1e-10)
    np.testing.assert_allclose(full.nodes, none.nodes, atol=1e-10)


def test_full_reorthogonalisation_leaves_no_ghosts():
    """Without it an outlier converges again and again; with it each eigenvalue of a simple spectrum comes once."""
    spectrum = np.concatenate([np.random.default_rng(0).normal(size=150) * 0.01, [5.0, 10.0]])
    op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=11))
    full, none = (spectra.slq(op, probes=1, steps=80, seed=0, reorthogonalize=how) for how in ("full", "none"))
    assert np.sum(np.abs(full.nodes - 10) < 1e-6) == 1
    assert np.sum(np.abs(full.nodes - 5) < 1e-6) == 1
    assert np.sum(np.abs(none.nodes - 10) < 1e-6) > 1  # what "none" means
    # the ghosts share their eigenvalue's weight, so the rule itself stays right
    weight = [np.sum(d.weights[np.abs(d.nodes - 10) < 1e-6]) for d in (full, none)]
    assert weight[0] == pytest.approx(weight[1], rel=1e-8)


@pytest.mark.parametrize("reorthogonalize", ["auto", "full", "none"])
def test_a_breakdown_is_relative_to_the_operator(reorthogonalize):
    """A matrix of rank 3 ends after at most 4 steps whatever its units; the rest of the row is padding.

    Without reorthogonalisation rounding brings lost directions back and it may go on; the rule stays right.
    """
    for scale in (1e-10, 1.0, 1e10):
        spectrum = scale * np.concatenate([np.zeros(40), [1.0, 2.0, -7.0]])
        op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=12))
        density = spectra.slq(op, probes=3, steps=20, seed=0, reorthogonalize=reorthogonalize)
        assert density.nodes.shape == (3, 20)
        if reorthogonalize != "none":
            assert (np.asarray(density.lengths) <= 5).all(), (scale, density.lengths)
        np.testing.assert_allclose(density.weights.sum(1), 1, atol=1e-10)
        for probe, length in enumerate(density.lengths):
            assert not density.weights[probe, length:].any()
        assert abs(density.lambda_min().value + 7 * scale) < 1e-8 * scale


def test_the_same_seed_gives_the_same_numbers():
    op = spectra.DenseOperator(matrix_with_spectrum(SPECTRA["normal"], seed=13))
    one, again, other = (spectra.slq(op, probes=3, steps=10, seed=seed) for seed in (4, 4, 5))
    for name in ("nodes", "weights", "alphas", "betas"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert not np.allclose(one.alphas, other.alphas)


def test_seeds_share_no_probe_vectors():
    op = spectra.DenseOperator(matrix_with_spectrum(SPECTRA["normal"], seed=13))
    first = np.concatenate([spectra.slq(op, probes=5, steps=4, seed=seed).alphas[:, 0] for seed in range(6)])
    assert len(np.unique(np.round(first, 10))) == 30


def test_fewer_probe_vectors_are_the_first_of_more():
    op = spectra.DenseOperator(matrix_with_spectrum(SPECTRA["normal"], seed=13))
    few, many = (spectra.slq(op, probes=probes, steps=10, seed=4) for probes in (5, 10))
    np.testing.assert_allclose(few.nodes, many.nodes[:5], atol=1e-9)
    np.testing.assert_allclose(few.weights, many.weights[:5], atol=1e-9)


def test_the_global_random_state_is_neither_used_nor_moved():
    op = spectra.DenseOperator(matrix_with_spectrum(SPECTRA["normal"], seed=13))
    torch.manual_seed(1)
    one, before = spectra.slq(op, probes=2, steps=5, seed=0), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.testing.assert_array_equal(one.nodes, spectra.slq(op, probes=2, steps=5, seed=0).nodes)


def test_a_float32_operator_works_in_its_precision():
    spectrum = SPECTRA["normal"]
    op = spectra.DenseOperator(matrix_with_spectrum(spectrum, seed=14).float())
    density = spectra.slq(op, probes=3, steps=len(spectrum), seed=0)
    assert density.nodes.dtype == np.float64  # the small problem is solved on the host in float64
    assert wasserstein(density, spectrum) / np.abs(spectrum).max() < 1e-4


def test_products_are_probe_vectors_times_steps_at_most():
    op = spectra.DenseOperator(matrix_with_spectrum(SPECTRA["normal"], seed=15))
    spectra.slq(op, probes=3, steps=7, seed=0)
    assert op.products == 21
    identity = spectra.DenseOperator(torch.eye(30, dtype=torch.float64))
    spectra.slq(identity, probes=3, steps=20, seed=0)
    assert identity.products <= 6  # it stops at the breakdown


@pytest.mark.parametrize(
    "options",
    [
        {"probes": 0},
        {"steps": 0},
        {"probes": -3},
        {"reorthogonalize": "sometimes"},
    ],
)
def test_bad_options_are_refused_in_one_line(options):
    op = spectra.DenseOperator(torch.eye(5, dtype=torch.float64))
    with pytest.raises(spectra.InputError) as caught:
        spectra.slq(op, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [70, 20])
def test_progress_reaches_the_number_of_products(n):
    """Both where probe vectors are sampled and where the matrix is formed, also after an early breakdown."""
    for values in (np.arange(1.0, n + 1), np.ones(n)):
        op, reports = spectra.DiagonalOperator(values), []
        spectra.slq(op, probes=3, steps=25, progress=lambda done, total, reports=reports: reports.append((done, total)))
        done = [report[0] for report in reports]
        assert done == sorted(set(done))
        assert reports[-1] == ((75, 75) if n == 70 else (20, 20))
