"""A density knows what it was measured on, and why it cannot be relied on."""

import contextlib
import hashlib
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import spectra
from spectra.algorithms.origin import origin_of, unverified
from spectra.estimates.origin import Origin

REASON = "products are not the derivative of the gradient"


class Doubtful(spectra.DiagonalOperator):
    """Finds out with its first product that it cannot be relied on, as a HessianOperator with strict=False does."""

    def _multiply_rows(self, vectors):
        self.unverified = REASON
        return super()._multiply_rows(vectors)


def doubtful(n=300):
    return Doubtful(np.append(np.linspace(1.0, 2.0, n), 30.0))


def model(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 4, generator=generator), torch.randn(6, 1, generator=generator))]


def density(*, params=None, batches=None, of=None, **options):
    with spectra.HessianOperator(
        of or model(), batch() if batches is None else batches, params, loss=nn.MSELoss(), **options
    ) as op:
        return spectra.slq(op, probes=2, steps=4)


DENSITIES = {
    "sampled": lambda op: spectra.slq(op, probes=2, steps=8),
    "deflated": lambda op: spectra.slq(op, probes=2, steps=8, deflate=1),
    "exact": lambda op: spectra.slq(op, probes=2, steps=400),
    "mean": lambda op: spectra.slq(spectra.MeanOperator([spectra.DiagonalOperator(op.values), op]), probes=2, steps=8),
    "deflated operator": lambda op: spectra.slq(
        spectra.DeflatedOperator(op, torch.eye(301, 1, dtype=torch.float64)), probes=2, steps=8
    ),
    "stored": lambda op: spectra.SpectralDensity.from_arrays(spectra.slq(op, probes=2, steps=8).to_arrays()),
    "without zeros": lambda op: spectra.slq(op, probes=2, steps=8).without_known_zeros(),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_every_estimate_of_an_unverified_operator_is_unresolved(name):
    found = DENSITIES[name](doubtful())
    arguments = {"near_zero_share": (0.1,), "share_between": (0.0, 1.0)}
    checked = 0
    for method in (name for name in dir(found) if not name.startswith("_")):
        attribute = getattr(found, method)
        if not callable(attribute) or method in ("cumulative", "density", "with_origin", "with_count", "from_arrays"):
            continue
        if method == "from_eigenvalues":
            continue
        estimate = attribute(*arguments.get(method, ()))
        if isinstance(estimate, spectra.Estimate):
            checked += 1
            assert not estimate.resolved, method
            assert estimate.reason == REASON, method
    assert checked == 10


def test_an_unverified_operator_changes_no_number():
    op = doubtful()
    for one, other in zip(
        spectra.estimates.quantities.summarize(spectra.slq(op, probes=2, steps=8)).values(),
        spectra.estimates.quantities.summarize(
            spectra.slq(spectra.DiagonalOperator(op.values), probes=2, steps=8)
        ).values(),
        strict=True,
    ):
        assert (one.value, one.low, one.high) == (other.value, other.low, other.high)


def test_every_other_result_has_the_reason_too():
    for probes in (10, 400):
        for method in ("hutchinson", "hutch++", "xtrace"):
            trace = spectra.trace(doubtful(), method=method, probes=probes)
            assert (trace.resolved, trace.reason) == (False, REASON)
    for budget in (40, 400):
        share = spectra.resolve(doubtful(), budget=budget, half_width=0.4)
        assert (share.resolved, share.reason) == (False, REASON)
    for n in (20, 300):
        pairs = spectra.topk(doubtful(n), 2)
        assert pairs.unverified == REASON
        assert not pairs.resolved.any()
    assert spectra.topk(spectra.DiagonalOperator(np.arange(100.0)), 2).resolved.all()
    splits = spectra.batch_noise(lambda batches: doubtful(), [torch.zeros(4, 1)], groups=2, probes=2, steps=8)
    for split in splits.values():
        assert (split.total.resolved, split.total.reason) == (False, REASON)
        assert (split.estimate.resolved, split.estimate.reason) == (False, REASON)


def test_a_change_from_or_to_an_unverified_spectrum_is_unresolved():
    op = doubtful()
    sound = spectra.slq(spectra.DiagonalOperator(1.1 * op.values), probes=2, steps=8)
    for pair in ((spectra.slq(op, probes=2, steps=8), sound), (sound, spectra.slq(op, probes=2, steps=8))):
        for change in spectra.compare(*pair).values():
            assert change.difference.reason == change.ratio.reason == REASON
            assert not change.difference.resolved
            assert str(change).endswith("(unresolved)")


def test_reasons_inside_of_operators_are_found():
    op = doubtful()
    assert unverified(op) == ""
    op @ torch.ones(301, dtype=torch.float64)
    assert unverified(spectra.MeanOperator([spectra.DiagonalOperator(op.values), op])) == REASON


def test_spectra_of_other_parameters_are_refused():
    first = density()
    with pytest.raises(spectra.InputError, match="19 eigenvalues and 4") as caught:
        spectra.compare(first, density(params="2.*"))
    assert "\n" not in str(caught.value)
    square = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
    zero, two = (density(of=square, params=name) for name in ("0.weight", "2.weight"))
    with pytest.raises(spectra.InputError, match="different names or shapes"):
        spectra.compare(zero, two)
    spectra.compare(zero, density(of=square, params="0.weight"))


def test_a_warning_says_that_the_batches_differ():
    first = density()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectra.compare(first, density(microbatch=2))
        spectra.compare(first, density(precision="float64"))
    with pytest.warns(UserWarning, match="different batches"):
        spectra.compare(first, density(batches=batch(seed=2)))


def test_an_origin_is_stored_and_older_files_have_none():
    first = density()
    assert first.origin.parameters
    assert first.origin.batches
    arrays = first.to_arrays()
    assert spectra.SpectralDensity.from_arrays(arrays).origin == first.origin
    del arrays["origin"]
    older = spectra.SpectralDensity.from_arrays(arrays)
    assert older.origin == Origin()
    assert spectra.compare(older, first)["trace"].paired
    assert origin_of(spectra.DiagonalOperator(np.ones(3))) == Origin()


def test_training_and_evaluation_mode_are_not_compared():
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    evaluation, training = density(of=net), density(of=net, training=True)
    assert (evaluation.origin.training, training.origin.training) == ("evaluation", "training")
    with pytest.raises(spectra.InputError, match=r"one in evaluation and one in training mode: .* training="):
        spectra.compare(evaluation, training)
    spectra.compare(training, density(of=net, training=True))


def test_different_hessians_are_said():
    qat = pytest.importorskip("qat")
    net = model()
    qat.quantize_model(net, qat.QuantConfig(bits=2))
    modes = {"ste": {}, "latent": {}, "latent, point=0.5": {"point": 0.5}, "noisy, sigma=0.01": {"sigma": 0.01}}
    found = {}
    for name, options in modes.items():
        op = qat.hessian_operator(net, batch(), name.split(",")[0], loss=nn.MSELoss(), draws=2, **options)
        found[name] = spectra.slq(op, probes=2, steps=4)
        assert found[name].origin.mode == name
    for one, other in itertools.pairwise(modes):
        with pytest.warns(UserWarning, match=f"different Hessians, '{one}' and '{other}'"):
            spectra.compare(found[one], found[other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectra.compare(found["ste"], density(of=net, params=["0.weight", "2.weight"]))  # the operator's own mode
        spectra.compare(found["ste"], found["ste"])


def test_a_probe_names_the_hessian_of_a_builder_that_does_not():
    def mine(model, batches, **options):
        return spectra.HessianOperator(model, batches, context=contextlib.nullcontext, **options)

    modes = {"mine": mine, "full": spectra.HessianOperator}
    probe = spectra.SpectrumProbe(model(), batch(), loss=nn.MSELoss(), modes=modes, probes=1, steps=3)
    own, full = map(probe.density, probe.measure(0))
    assert (own.origin.mode, full.origin.mode) == ("mine", "full")
    with pytest.warns(UserWarning, match="different Hessians"):
        spectra.compare(own, full)


def test_what_is_stored_of_batches_stays_the_same():
    """Records are compared with those of other versions. Of 200,000 entries every third is looked at."""
    batch = torch.arange(200_000.0).reshape(400, 500)
    looked_at = np.arange(0, 200_000, 3, dtype=np.float32)
    with spectra.HessianOperator(nn.Linear(500, 1), [batch], loss=lambda outputs: outputs.mean()) as op:
        stored = hashlib.sha256(repr(((400, 500), looked_at.tobytes())).encode()).hexdigest()[:16]
        assert origin_of(op).batches == stored
