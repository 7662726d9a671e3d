"""From the first training step to the last, over several processes, and what a probe refuses when it is made."""

import random
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from oracles import random_state, same_random_state
from torch.utils.data import DataLoader, Dataset, TensorDataset

import spectra
from spectra.runs.folder import Run
from spectra.runs.probe import SpectrumProbe

OPTIONS = {"probes": 2, "steps": 4, "deflate": 0, "count_products": 0}


@pytest.fixture
def case():
    return tiny_models.mlp(), tiny_models.regression((9, 4))


def marks(records):
    return [(record.step, record.label) for record in records]


# -- start and end


def test_the_first_step_and_the_last_are_measured(case, tmp_path):
    with SpectrumProbe(*case, every=10, out=tmp_path, **OPTIONS) as probe:
        for i in range(3, 25):
            probe.step(i)
    assert marks(Run(tmp_path).records) == [(3, "start"), (10, ""), (20, ""), (24, "end")]
    probe.close()
    assert len(probe.records) == 4


def test_an_end_that_was_measured_is_not_measured_again(case):
    with SpectrumProbe(*case, every=4, **OPTIONS) as probe:
        for i in range(9):
            probe.step(i)
    assert marks(probe.records) == [(0, "start"), (4, ""), (8, "")]


def test_a_training_that_breaks_off_has_no_end(case):
    probe = SpectrumProbe(*case, every=4, **OPTIONS)
    probe.step(0)
    probe.step(1)
    with pytest.raises(KeyError), probe:
        raise KeyError
    assert marks(probe.records) == [(0, "start")]


def test_steps_that_come_again_are_measured_once(case):
    """As where gradients are accumulated; and a count that starts again is said."""
    probe = SpectrumProbe(*case, every=2, **OPTIONS)
    for i in (0, 0, 1, 2, 2, 2):
        probe.step(i)
    assert [record.step for record in probe.records] == [0, 2]
    with pytest.warns(UserWarning, match="training step 0 comes after 2: count the steps of the whole training"):
        assert probe.step(0) == []


# -- a run goes on


def test_a_probe_made_again_goes_on(case, tmp_path):
    first = SpectrumProbe(*case, every=2, out=tmp_path, **OPTIONS)
    for i in range(5):
        first.step(i)
    again = SpectrumProbe(*case, every=2, out=tmp_path, **OPTIONS)
    assert marks(again.records) == [(0, "start"), (2, ""), (4, "")]
    assert [len(again.step(i)) for i in range(3, 8)] == [0, 0, 0, 1, 0]
    again.close()
    assert [record.step for record in Run(tmp_path).records] == [0, 2, 4, 6, 7]
    assert again.measure(4, "start") == [again.records[2]]


def test_records_of_later_training_steps_are_kept(case, tmp_path):
    """A training goes on from its last checkpoint, before the last spectrum."""
    with SpectrumProbe(*case, every=2, out=tmp_path, **OPTIONS) as probe:
        for i in range(7):
            probe.step(i)
    before = Run(tmp_path).records
    with SpectrumProbe(*case, every=2, out=tmp_path, **OPTIONS) as probe:
        for i in range(3, 10):
            probe.step(i)
    assert Run(tmp_path).records[:4] == before
    assert [record.step for record in Run(tmp_path).records] == [0, 2, 4, 6, 8, 9]


def test_spectra_of_other_weights_at_a_step_are_told_apart_by_their_labels(case, tmp_path):
    with SpectrumProbe(*case, out=tmp_path, **OPTIONS) as probe:
        probe.measure(3, "before-reset")
    with SpectrumProbe(*case, out=tmp_path, **OPTIONS) as probe:
        for label in ("before-reset", "after-reset"):
            probe.measure(3, label)
    assert marks(Run(tmp_path).records) == [(3, "before-reset"), (3, "after-reset")]


def test_a_note_says_that_a_kept_record_has_other_weights(case, tmp_path):
    model, batches = case
    SpectrumProbe(model, batches, out=tmp_path, **OPTIONS).measure(0)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    again = SpectrumProbe(model, batches, out=tmp_path, **OPTIONS)
    with pytest.warns(UserWarning, match="keeps its record of training step 0, which was measured at other weights"):
        again.measure(0)


def test_a_failed_record_may_be_followed_by_one_that_is_ok(case, tmp_path):
    model, batches = case
    kept = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    with pytest.warns(UserWarning, match="no spectrum at training step 5"):
        SpectrumProbe(model, batches, out=tmp_path, **OPTIONS).step(5)
    with torch.no_grad():
        model[0].weight.copy_(kept)
    (record,) = SpectrumProbe(model, batches, out=tmp_path, **OPTIONS).step(5)
    assert [(r.step, r.status) for r in Run(tmp_path).records] == [(5, "failed"), (5, "ok")]
    assert record.label == "start"


OTHER = {
    "probes": ({"probes": 8}, "probes: 2 in the folder, 8 asked for"),
    "steps": ({"steps": 5}, "lanczos_steps: 4 in the folder, 5 asked for"),
    "params": ({"params": "2.*"}, r"params: none in the folder, 2\.\* asked for"),
    "predicate": ({"params": lambda name, p: "bias" in name}, "params: none in the folder, 2 chosen by a function"),
    "modes": ({"modes": {"mine": spectra.HessianOperator}}, r'modes: \["full"\] in the folder, \["mine"\] asked for'),
    "training": ({"training": True}, "training: false in the folder, true asked for"),
    "facts": ({"config": {"lr": 0.2}}, "lr: none in the folder, 0.2 asked for"),
}


@pytest.mark.parametrize("changed", OTHER)
def test_other_settings_are_refused_with_the_difference_named(case, tmp_path, changed):
    SpectrumProbe(*case, out=tmp_path, **OPTIONS).measure(0)
    options, words = OTHER[changed]
    with pytest.raises(spectra.InputError, match=words):
        SpectrumProbe(*case, out=tmp_path, **{**OPTIONS, **options})
    assert len(Run(tmp_path).records) == 1


def test_other_batches_and_other_models_are_refused(case, tmp_path):
    model, batches = case
    SpectrumProbe(model, batches, out=tmp_path, **OPTIONS).measure(0)
    with pytest.raises(spectra.InputError, match=r"batches: \w+ in the folder, \w+ asked for"):
        SpectrumProbe(model, tiny_models.regression((9, 4), seed=2), out=tmp_path, **OPTIONS)
    with pytest.raises(spectra.InputError, match="parameters: 51 in the folder, 67 asked for"):
        SpectrumProbe(tiny_models.mlp(hidden=8), batches, out=tmp_path, **OPTIONS)


GO_ON = """
import sys
sys.path[:0] = ["tests/helpers"]
import spectra, tiny_models
options = dict(every=2, out=sys.argv[1], probes=2, steps=4, deflate=0, count_products=0)
with spectra.SpectrumProbe(tiny_models.mlp(), tiny_models.regression((9, 4)), **options) as probe:
    for i in range(int(sys.argv[2])):
        probe.step(i)
"""


def test_another_process_goes_on(tmp_path):
    with SpectrumProbe(tiny_models.mlp(), tiny_models.regression((9, 4)), every=2, out=tmp_path, **OPTIONS) as probe:
        for i in range(3):
            probe.step(i)
    for count in (3, 5):
        command = [sys.executable, "-c", GO_ON, str(tmp_path), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
    assert [record.step for record in Run(tmp_path).records] == [0, 2, 4]


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(case, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(spectra.InputError, match="choose another out=") as caught:
            SpectrumProbe(*case, out=out, **OPTIONS)
        assert "\n" not in str(caught.value)


# -- without a folder


def test_a_record_without_a_folder_keeps_its_density(case):
    plots = pytest.importorskip("spectra.views.plots")
    probe = SpectrumProbe(*case, every=1, **OPTIONS)
    for i in range(2):
        probe.step(i)
    for record in probe.records:
        assert probe.density(record).trace() == record.estimates["trace"]
    assert len(plots.density(probe).lines) >= 2
    assert plots.trajectory(probe, "rms").get_xlabel() == "training step"
    assert spectra.compare(*map(probe.density, probe.records))["rms"].paired


# -- what is checked when, and what is refused


@pytest.fixture
def verified(monkeypatch):
    """The operators that were checked."""
    checked, original = [], spectra.HessianOperator._verify
    monkeypatch.setattr(spectra.HessianOperator, "_verify", lambda op: checked.append(op) or original(op))
    return checked


def test_checks_are_made_again_where_parameters_were_replaced(case, verified):
    model, batches = case
    probe = SpectrumProbe(model, batches, **OPTIONS)
    counts = []
    for replaced in (False, False, True, False):
        if replaced:
            model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
        probe.measure(len(counts))
        counts.append(len(verified))
    assert counts == [1, 1, 2, 2]


def test_what_the_checks_settle_holds_for_every_record():
    """Batches of a loss with hidden class weights are weighed alike at every checkpoint."""
    model, batches = tiny_models.mlp(), tiny_models.classification((6, 5))
    weights = torch.tensor([1.0, 10.0, 0.2], dtype=torch.float64)

    def loss(outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets, weight=weights)

    probe = SpectrumProbe(model, batches, loss=loss, engine="reverse", **OPTIONS)
    one, again = (probe.measure(step)[0] for step in range(2))
    assert one.loss == again.loss == pytest.approx(loss(*tiny_models.whole([(model(x), y) for x, y in batches])).item())
    assert one.estimates == again.estimates
    assert one.notes == again.notes


def test_the_worst_figure_of_a_mean_is_recorded(case, verified):
    model, batches = case

    def mean(model, batches, **options):
        return spectra.MeanOperator([spectra.HessianOperator(model, [batch], **options) for batch in batches])

    probe = SpectrumProbe(model, batches, modes={"mean": mean}, **OPTIONS)
    first, second = (probe.measure(step)[0] for step in range(2))
    assert len(verified) == 2  # the members of the first mean
    singles = [spectra.HessianOperator(model, [batch]) for batch in batches]
    for op in singles:
        op.preflight()
    assert first.checks["product_error"] == max(op.checks["product_error"] for op in singles)
    assert second.checks == first.checks


def test_training_mode_reaches_the_builders_that_take_it():
    model, batches = tiny_models.conv_net(dropout=0.0), tiny_models.images((6,))
    measured = [SpectrumProbe(model, batches, training=mode, **OPTIONS).measure(0)[0].loss for mode in (False, True)]
    with torch.no_grad():
        evaluated = torch.nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).item()
    assert measured[0] == pytest.approx(evaluated)
    assert measured[1] != pytest.approx(evaluated, rel=1e-3)
    fixed = {"mine": lambda model, batches, params, loss, microbatch: spectra.HessianOperator(model, batches)}
    with pytest.raises(spectra.InputError, match="takes training=, which that of mode 'mine' does not"):
        SpectrumProbe(model, batches, modes=fixed, training=True, **OPTIONS)


MISTAKES = {
    "every": ({"every": 0}, "below 1, got 0"),
    "every text": ({"every": "often"}, "got 'often'"),
    "unknown": ({"lanczos": 3}, "there is no setting 'lanczos': choose among probes, steps"),
    "no modes": ({"modes": {}}, "an entry or more"),
    "mode": ({"modes": {"a": 3}}, "functions that build an operator"),
    "modes": ({"modes": ["full"]}, "a dictionary"),
    "no loss": ({"modes": {"a": lambda m, b, **o: spectra.DiagonalOperator(torch.ones(3))}}, "a loss for mode 'a'"),
    "params": ({"params": "nothing.*"}, "no parameter matches"),
    "settings": ({"settings": {"probes": 3}}, "settings must be MeasurementSettings, got dict"),
    "engine": ({"engine": "steam"}, "engine"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_when_the_probe_is_made(case, mistake, tmp_path):
    options, words = MISTAKES[mistake]
    with pytest.raises(spectra.InputError, match=words) as caught:
        SpectrumProbe(*case, out=tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batches", [3, "text", None, []])
def test_what_are_no_batches_is_refused_when_the_probe_is_made(case, batches):
    with pytest.raises(spectra.InputError, match="batch"):
        SpectrumProbe(case[0], batches)


def test_parameters_from_an_iterator_are_read_once(case):
    probe = SpectrumProbe(*case, params=iter(["0.*"]), **OPTIONS)
    assert [probe.measure(step)[0].dimension for step in range(2)] == [30, 30]


# -- making a probe moves no random state


class Augmented(Dataset):
    """Draws from every generator there is, one of its own among them."""

    def __init__(self):
        self.own = np.random.default_rng(0)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + self.own.random()  # noqa: NPY002
        return torch.full((4,), float(i), dtype=torch.float64) + noise + torch.randn(4, dtype=torch.float64), i % 3


@pytest.mark.parametrize("kind", ["shuffled", "augmented", "own generator"])
def test_a_loader_given_to_a_probe_leaves_the_random_states(kind):
    generator = torch.Generator().manual_seed(3) if kind == "own generator" else None
    plain = TensorDataset(torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3)
    data = Augmented() if kind == "augmented" else plain
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    states = random_state()
    with_probe = []
    for watched in (False, True):
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        if generator is not None:
            generator.manual_seed(3)
        if kind == "augmented":
            data.own = np.random.default_rng(0)
        if watched:
            SpectrumProbe(tiny_models.mlp(), loader, **OPTIONS)
            torch.set_rng_state(states[0])  # the network was drawn
            assert same_random_state(random_state(), states)
        with_probe.append(torch.cat([x for x, _ in loader]))
    assert torch.equal(*with_probe)
