"""Measuring during training: the right numbers, on disk, and a training that does not notice."""

import copy
import json

import numpy as np
import pytest
import tiny_models
import torch
from oracles import dense_gradient, dense_hessian, random_state, same_random_state
from torch import nn
from torch.nn import functional

import spectra

ESTIMATES = {
    "trace",
    "rms",
    "frobenius",
    "lambda_max",
    "lambda_min",
    "negative_share",
    "near_zero_share",
    "negative_energy_share",
    "negative_magnitude_share",
}
FIGURES = {
    *("symmetry_gap", "linearity_gap", "gradient_error", "product_error"),
    *("pieces_error", "slope_error", "precision_error"),
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def dropout_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))


def train(model, optimizer, probe, steps=7):
    """A plain loop that draws its data and its dropout from the global generator; returns all that it leaves."""
    torch.manual_seed(5)
    for i in range(steps):
        if probe:
            probe.step(i)
        inputs, targets = torch.randn(8, 4), torch.randint(0, 3, (8,))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if probe and i == 3:
            probe.measure(i, "between gradient and step")  # .grad is there
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return state, moments, [p.grad for p in model.parameters()], random_state()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_does_not_notice(optimizer):
    batches = [(torch.randn(5, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2, 0, 1]))]
    outcomes = []
    for watched in (False, True):
        model = dropout_network()
        probe = spectra.SpectrumProbe(model, batches, every=2, probes=2, steps=5) if watched else None
        outcomes.append(train(model, OPTIMIZERS[optimizer](model.parameters()), probe))
        if probe:
            assert len(probe.records) == 5
    (plain, moments, gradients, state), (watched, watched_moments, watched_gradients, watched_state) = outcomes
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, watched_gradients, strict=True))
    pairs = zip(moments, watched_moments, strict=True)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
    assert same_random_state(state, watched_state)


def test_the_training_does_depend_on_the_random_state():
    """Guards the test above: one draw more and the weights differ."""
    outcomes = []
    for draws in (0, 1):
        model = dropout_network()
        torch.manual_seed(5)
        torch.rand(draws)
        model(torch.randn(8, 4)).sum().backward()
        outcomes.append(model[0].weight.grad)
    assert not torch.equal(*outcomes)


@pytest.fixture
def case():
    model, batches = tiny_models.mlp(), tiny_models.regression((9, 4))
    inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    return model, batches, functional.mse_loss(model(inputs), targets)


def test_the_record_holds_the_true_numbers(case):
    model, batches, loss = case
    probe = spectra.SpectrumProbe(model, batches, probes=3, steps=51, seed=4, near_zero_tol=0.05)
    (record,) = probe.measure(12, label="start")
    parameters = list(model.parameters())
    values = torch.linalg.eigvalsh(dense_hessian(loss, parameters)).numpy()
    negative = values[values < -1e-9]
    truth = {
        "trace": values.sum(),
        "rms": np.sqrt(np.mean(values**2)),
        "frobenius": np.linalg.norm(values),
        "lambda_max": values.max(),
        "lambda_min": values.min(),
        "near_zero_share": np.mean(np.abs(values) < 0.05),
        "negative_energy_share": np.sum(negative**2) / np.sum(values**2),
        "negative_magnitude_share": np.sum(-negative) / np.sum(np.abs(values)),
    }
    assert ESTIMATES.issubset(record.estimates)
    for name, want in truth.items():
        assert record.estimates[name].value == pytest.approx(want, abs=1e-7), name
    assert record.loss == pytest.approx(loss.item(), rel=1e-10)
    assert record.gradient_norm == pytest.approx(dense_gradient(loss, parameters).norm().item(), rel=1e-10)
    assert (record.step, record.mode, record.label, record.dimension) == (12, "full", "start", 51)
    assert (record.probes, record.lanczos_steps, record.seed, record.near_zero_tol) == (3, 51, 4, 0.05)
    assert record.products > 0
    assert record.seconds > 0
    assert record.versions["torch"] == torch.__version__
    assert "float64" in record.dtype
    assert "cpu" in record.device


def test_it_measures_where_the_step_is_a_multiple(case):
    model, batches, _ = case
    probe = spectra.SpectrumProbe(model, batches, every=3, probes=2, steps=4)
    counts = {i: len(probe.step(i)) for i in range(8)}
    assert counts == {0: 1, 1: 0, 2: 0, 3: 1, 4: 0, 5: 0, 6: 1, 7: 0}
    assert [record.step for record in probe.records] == [0, 3, 6]


def test_the_same_probe_vectors_each_time(case):
    model, batches, _ = case
    # of engine="auto" the clock decides, and engines agree to rounding alone
    probe = spectra.SpectrumProbe(model, batches, probes=3, steps=6, seed=9, engine="reverse")
    (one,), (again,) = probe.measure(0), probe.measure(5)
    assert one.estimates == again.estimates
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    (moved,) = probe.measure(10)
    assert moved.estimates != one.estimates
    with torch.no_grad():
        model[0].weight.div_(1.5)
    (back,) = probe.measure(15)
    for name, estimate in one.estimates.items():
        assert back.estimates[name].value == pytest.approx(estimate.value, rel=1e-8, abs=1e-10), name
    other = spectra.SpectrumProbe(model, batches, probes=3, steps=6, seed=10).measure(0)[0]
    assert other.estimates["trace"] != one.estimates["trace"]


def test_the_estimates_are_those_of_slq(case):
    model, batches, _ = case
    probe = spectra.SpectrumProbe(model, batches, probes=3, steps=6, seed=9, deflate=0, engine="reverse")
    (record,) = probe.measure(0)
    density = spectra.slq(spectra.HessianOperator(model, batches, engine="reverse"), probes=3, steps=6, seed=9)
    assert record.engine == "reverse"
    assert record.estimates["trace"] == density.trace()
    assert record.estimates["lambda_min"] == density.lambda_min()
    assert record.estimates["near_zero_share"] == density.near_zero_share(record.near_zero_tol)


def test_records_and_densities_are_on_disk(case, tmp_path):
    model, batches, _ = case
    out = tmp_path / "a" / "run"
    options = {"probes": 2, "steps": 5, "deflate": 0, "config": {"bits": 2}}
    probe = spectra.SpectrumProbe(model, batches, every=2, out=out, extras=lambda m: {"flip_rate": 0.25}, **options)
    for i in range(5):
        probe.step(i)
    run = spectra.Run(out)
    assert [record.step for record in run.records] == [0, 2, 4]
    for record, written in zip(probe.records, run.records, strict=True):
        assert json.dumps(record.to_dict(), sort_keys=True) == json.dumps(written.to_dict(), sort_keys=True)
        assert written.extras["flip_rate"] == 0.25
        density = run.density(written)
        assert density.nodes.shape == (2, 5)
        assert density.trace().value == pytest.approx(written.estimates["trace"].value, rel=1e-12)
    assert run.config["bits"] == 2


def test_records_are_there_as_soon_as_they_are_measured(case, tmp_path):
    """A training that dies later keeps what was recorded."""
    model, batches, _ = case
    probe = spectra.SpectrumProbe(model, batches, every=1, out=tmp_path / "run", probes=2, steps=4)
    probe.step(0)
    assert len(spectra.Run(tmp_path / "run").records) == 1
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="no spectrum at training step 1"):
        probe.step(1)
    assert [(record.step, record.status) for record in spectra.Run(tmp_path / "run").records] == [
        (0, "ok"),
        (1, "failed"),
    ]
    probe.strict = True
    with pytest.raises(spectra.NonFiniteError):
        probe.step(2)
    assert [record.step for record in spectra.Run(tmp_path / "run").records] == [0, 1]


def test_a_folder_that_holds_another_run_is_refused(case, tmp_path):
    model, batches, _ = case
    spectra.SpectrumProbe(model, batches, out=tmp_path / "run", probes=2, steps=4).measure(0)
    with pytest.raises(spectra.InputError) as caught:
        spectra.SpectrumProbe(model, batches, out=tmp_path / "run", probes=2, steps=5).measure(0)
    assert "lanczos_steps: 4 in the folder, 5 asked for" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(spectra.Run(tmp_path / "run").records) == 1


def test_extras_see_the_model(case):
    model, batches, _ = case

    def extras(model):
        return {"norm": model[0].weight.norm().item()}

    (record,) = spectra.SpectrumProbe(model, batches, probes=2, steps=4, extras=extras).measure(0)
    assert record.extras["norm"] == model[0].weight.norm().item()


def test_modes_are_measured_one_after_the_other(case):
    model, batches, _ = case

    def first_batch(model, batches, **options):
        return spectra.HessianOperator(model, batches[:1], **options)

    def mean(model, batches, **options):
        return spectra.MeanOperator([spectra.HessianOperator(model, [batch], **options) for batch in batches])

    modes = {"full": spectra.HessianOperator, "first": first_batch, "mean": mean}
    probe = spectra.SpectrumProbe(model, batches, modes=modes, probes=2, steps=51)
    records = probe.measure(3)
    assert [record.mode for record in records] == ["full", "first", "mean"]
    assert [record.step for record in records] == [3, 3, 3]
    traces = []
    for chosen in (batches, batches[:1], batches[1:]):
        inputs, targets = (torch.cat(column) for column in zip(*chosen, strict=True))
        hessian = dense_hessian(functional.mse_loss(model(inputs), targets), list(model.parameters()))
        traces.append(hessian.trace().item())
    got = [record.estimates["trace"].value for record in records]
    assert got == pytest.approx([traces[0], traces[1], (traces[1] + traces[2]) / 2], abs=1e-7)


def test_params_loss_and_microbatch_reach_the_operator(case):
    model, batches, _ = case

    def quartic(outputs, targets):
        return ((outputs - targets) ** 4).mean()

    probe = spectra.SpectrumProbe(model, batches, params="2.*", loss=quartic, microbatch=2, probes=2, steps=21)
    (record,) = probe.measure(0)
    inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    hessian = dense_hessian(quartic(model(inputs), targets), list(model[2].parameters()))
    assert record.dimension == 21
    assert record.estimates["trace"].value == pytest.approx(hessian.trace().item(), rel=1e-9)


@pytest.mark.parametrize("deflate", [0, 3])
def test_progress_counts_products(case, deflate):
    model, batches, _ = case
    seen = []
    options = {"probes": 2, "steps": 6, "deflate": deflate, "count_products": 0}
    spectra.SpectrumProbe(model, batches, progress=lambda *counts: seen.append(counts), **options).measure(0)
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert all(one <= other for one, other in seen)
    assert done[-1] == total[-1]
    assert total[-1] == 12 if deflate == 0 else total[-1] > 12 + 3  # those of deflation count too


def test_gradients_kept_for_accumulation_survive(case):
    model, batches, loss = case
    loss.backward()
    kept = [p.grad for p in model.parameters()]
    copies = copy.deepcopy(kept)
    spectra.SpectrumProbe(model, batches, probes=2, steps=4).measure(0)
    for parameter, gradient, copied in zip(model.parameters(), kept, copies, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, copied)
        assert not gradient.requires_grad


@pytest.mark.parametrize("options", [{"every": 0}, {"probes": 0}, {"steps": 0}, {"params": "no_such.*"}])
def test_bad_options_are_refused_in_one_line(case, options):
    model, batches, _ = case
    with pytest.raises(spectra.InputError) as caught:
        spectra.SpectrumProbe(model, batches, **options).measure(0)
    assert "\n" not in str(caught.value)


def test_a_bfloat16_model_is_measured_in_a_copy_where_asked_and_the_record_says_so(case):
    model, batches, _ = case
    model = copy.deepcopy(model).to(torch.bfloat16)
    batches = [(x.to(torch.bfloat16), y.to(torch.bfloat16)) for x, y in batches]
    with pytest.raises(spectra.InputError, match="precision='float32'"):
        spectra.SpectrumProbe(model, batches, probes=2, steps=5).measure(0)
    (record,) = spectra.SpectrumProbe(model, batches, probes=2, steps=5, precision="float32").measure(0)
    assert record.dtype == "float32"
    assert record.notes == ["bfloat16 weights, measured in a float32 copy"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_outliers_are_deflated_by_default_and_their_number_is_in_the_settings(case, tmp_path):
    model, batches, _ = case
    probe = spectra.SpectrumProbe(model, batches, probes=2, steps=5, out=tmp_path / "run")
    assert spectra.Run(tmp_path / "run").config["deflated"] == 20
    (record,) = probe.measure(0)
    assert record.checks["linearity_gap"] < 1e-6
    assert len(spectra.Run(tmp_path / "run").density(record).atoms) >= 20


def test_the_search_for_outliers_starts_from_those_of_the_last_checkpoint(case, monkeypatch):
    model, batches, _ = case
    starts, found, original = [], [], spectra.runs.probe.largest_eigenpairs

    def search(op, k, *, seed, start, progress):
        starts.append(start)
        found.append(original(op, k, seed=seed, start=start).vectors)
        return original(op, k, seed=seed, start=start, progress=progress)

    monkeypatch.setattr(spectra.runs.probe, "largest_eigenpairs", search)
    probe = spectra.SpectrumProbe(model, batches, probes=2, steps=5, deflate=3)
    for step in (0, 1):
        probe.measure(step)
    assert starts[0] is None
    torch.testing.assert_close(starts[1], found[0])


def test_the_checks_are_made_once_a_run_for_each_mode_and_stand_apart(case, monkeypatch, tmp_path):
    model, batches, _ = case
    asked, original = [], spectra.HessianOperator.preflight
    monkeypatch.setattr(spectra.HessianOperator, "preflight", lambda op: asked.append(op) or original(op))
    modes = {"a": spectra.HessianOperator, "b": spectra.HessianOperator}
    options = {"probes": 2, "steps": 5, "extras": lambda model: {"custom": 2.0}}
    probe = spectra.SpectrumProbe(model, batches, modes=modes, out=tmp_path / "run", **options)
    records = [*probe.measure(0), *probe.measure(1)]
    assert len(asked) == 2
    for record in [*records, *spectra.Run(tmp_path / "run").records]:
        assert set(record.checks) == FIGURES
        assert record.checks["symmetry_gap"] < 1e-12
        assert record.checks["product_error"] < 1e-6
        assert record.checks["gradient_error"] < 1e-12
        assert record.extras == {"custom": 2.0, "zero_share": 0.0}


def test_an_operator_without_a_loss_is_refused(case):
    model, batches, _ = case
    modes = {"diagonal": lambda model, batches, **options: spectra.DiagonalOperator(torch.ones(3))}
    with pytest.raises(spectra.InputError, match=r"a loss for mode 'diagonal', got a DiagonalOperator: use Hessian"):
        spectra.SpectrumProbe(model, batches, modes=modes, probes=2, steps=2).measure(0)


def test_batch_noise_is_split_off_where_asked(tmp_path):
    model, batches = tiny_models.mlp(), tiny_models.classification((6, 5, 7))
    options = {"probes": 2, "steps": 12, "deflate": 2, "batch_groups": 3}
    probe = spectra.SpectrumProbe(model, batches, out=tmp_path / "run", **options)
    (record,) = probe.measure(0)
    (written,) = spectra.Run(tmp_path / "run").records
    for name, estimate in record.estimates.items():
        split = record.batch_noise[name]
        assert split["probes"] == estimate.half_width
        assert split["batches"] >= 0
        assert split["low"] <= estimate.low <= estimate.high <= split["high"]
        assert written.batch_noise[name] == pytest.approx(split)


def test_every_checkpoint_has_a_count_below_zero_and_the_second_starts_from_the_first(tmp_path):
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches([(16, 16)])
    with spectra.SpectrumProbe(model, batches, every=1, out=tmp_path / "run", steps=20, count_products=150) as probe:
        probe.step(0)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.01)
        probe.step(1)
    first, second = spectra.Run(tmp_path / "run").records
    assert 0 < second.count["search_products"] < first.count["search_products"]
    for record in (first, second):
        assert record.count["products"] <= 150
        density = spectra.Run(tmp_path / "run").density(record)
        plain = density.with_count(None).negative_share()
        assert record.estimates["negative_share"] == density.negative_share()
        assert record.estimates["negative_share"].half_width < plain.half_width


def test_the_count_can_be_left_out(case):
    model, batches, _ = case
    (record,) = spectra.SpectrumProbe(model, batches, probes=1, steps=4, deflate=0, count_products=0).measure(0)
    assert record.count == {}
    assert record.products == 4
