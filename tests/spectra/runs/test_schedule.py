"""When a training is measured: steps, fractions, signals, a share of the time."""

import dataclasses
import json
import random

import numpy as np
import pytest
import tiny_models
import torch

import spectra
from spectra.backend.errors import InputError
from spectra.runs.schedule import Overhead, Schedule
from spectra.runs.signals import GradientNormJump, LossPlateau, Signal, in_words

OPTIONS = {"probes": 2, "steps": 4, "deflate": 0, "count_products": 0}


@pytest.fixture
def case():
    return tiny_models.mlp(), tiny_models.regression((9, 4))


@pytest.fixture
def quick(case, monkeypatch):
    """Probes that record a spectrum measured once, where only the training steps matter."""
    known, density = spectra.SpectrumProbe(*case, **OPTIONS)._measure_mode("full", 0, "", {}, 0.0, last_of_mode=True)

    def measure_mode(probe, mode, step, label, extras, started, *, last_of_mode):
        notes = [*probe.notes, *probe._why]
        return dataclasses.replace(known, step=step, label=label, notes=notes, seconds=0.5), density

    monkeypatch.setattr(spectra.SpectrumProbe, "_measure_mode", measure_mode)


def steps_of(case, steps=13, first=0, **options):
    """The training steps that a probe measures before the end of a training."""
    probe = spectra.SpectrumProbe(*case, **options, **OPTIONS)
    for i in range(first, steps):
        probe.step(i, loss=1 / (1 + i), gradient_norm=1.0 + 9 * (i == 7))
    return [record.step for record in probe.records]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every must be a whole number of training steps, at least 1, or a fraction .* got 0"),
        ({"every": 2.5}, "got 2.5"),
        ({"every": True}, "got True"),
        ({"every": "5"}, "got '5'"),
        ({"every": float("nan")}, "got nan"),
        ({"at": [3, -1]}, r"at must be training steps, 0 or more, or fractions .* got -1"),
        ({"at": [1.5]}, "got 1.5"),
        ({"at": "12"}, "got '12'"),
        ({"when": 5}, r"when must be a function \(history\) -> bool, such as LossPlateau\(\), got 5"),
        ({"when": LossPlateau}, "when must be a function"),
        ({"max_overhead": 1}, "max_overhead must be a share of the time between 0 and 1, got 1"),
        ({"max_overhead": 0.0}, "got 0.0"),
        ({"max_overhead": "5%"}, "got '5%'"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_line(case, options, words):
    for make in (lambda: Schedule(**options), lambda: spectra.SpectrumProbe(*case, **options)):
        with pytest.raises(InputError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LossPlateau(window=0), "window must be a number of steps from 1 to 500, got 0"),
        (lambda: LossPlateau(window=501), "got 501"),
        (lambda: LossPlateau(tolerance=-0.1), "tolerance must be a part of the loss"),
        (lambda: GradientNormJump(factor=1), "factor must be a number above 1, got 1"),
        (lambda: GradientNormJump(window=2.5), "window must be"),
    ],
)
def test_signals_are_checked_when_they_are_made(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_a_schedule_is_a_value():
    schedule = Schedule(at=[9, 0.5, 9, np.int64(2)], when=LossPlateau(window=3))
    assert schedule == Schedule(at=(0.5, 2, 9), when=LossPlateau(window=3))
    assert (schedule.every, schedule.at) == (None, (0.5, 2, 9))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.every = 3
    assert Schedule().every == 200
    assert Schedule(max_overhead=0.05).every == 1
    assert json.loads(json.dumps(schedule.to_config())) == {
        "at": [0.5, 2, 9],
        "when": "LossPlateau(window=3, tolerance=0.01)",
    }
    assert " at 0x" not in in_words(lambda history: True) + in_words(type("Mine", (), {"__call__": len})())


def test_both_ways_at_once_are_refused(case):
    for given in ({"every": 3}, {"at": [4]}, {"max_overhead": 0.1}):
        with pytest.raises(InputError, match=f"give schedule=, or {next(iter(given))}=, not both"):
            spectra.SpectrumProbe(*case, schedule=Schedule(every=2), **given)
    with pytest.raises(InputError, match=r"schedule must be a spectra\.Schedule, got int"):
        spectra.SpectrumProbe(*case, schedule=5)


@pytest.mark.parametrize("total", [10, 97, 100, 1000, 1003])
@pytest.mark.parametrize("every", [0.1, 0.25, 1 / 3, 0.4, 0.007])
def test_the_steps_of_a_fraction(every, total):
    """The nearest to each multiple, as a count over the multiples says."""
    steps = set(range(total + 1))
    want = {round(k * (every * total)) for k in range(int(1 / every) + 2)}
    assert {step for step in steps if Schedule(every=every).names(step, total)} == want & steps


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every": 4}, [0, 4, 8, 12]),
        ({"every": 0.25, "total_steps": 20}, [0, 5, 10]),
        ({"at": [3, 5, 40]}, [0, 3, 5]),
        ({"at": [3, 0.5], "total_steps": 20, "every": 6}, [0, 3, 6, 10, 12]),
        ({"when": lambda history: len(history) == 5}, [0, 5, 10]),
        ({"when": GradientNormJump(window=3)}, [0, 7]),
        ({"when": LossPlateau(window=2, tolerance=0.0)}, [0]),  # the loss falls
        ({"when": LossPlateau(window=2, tolerance=0.5)}, [0, 4, 8, 12]),
    ],
)
def test_a_probe_measures_when_it_is_asked_to(case, quick, options, steps):
    assert steps_of(case, **options) == steps
    names = ("every", "at", "when", "max_overhead")
    whole = Schedule(**{name: options[name] for name in names if name in options})
    assert steps_of(case, schedule=whole, total_steps=options.get("total_steps")) == steps


def test_a_fraction_needs_the_length(case):
    with pytest.raises(InputError, match=r"0\.25 is a fraction of the training, whose length .* pass total_"):
        spectra.SpectrumProbe(*case, every=0.25)
    for length in (0, 2.5, True, "9"):
        with pytest.raises(InputError, match="total_steps must be a number of training steps"):
            spectra.SpectrumProbe(*case, total_steps=length)


def test_a_run_goes_on_with_its_schedule(case, quick, tmp_path):
    """Steps and fractions are those of the whole training; another schedule is no reason to refuse, but is noted."""
    options = {"out": tmp_path, "at": [0.3], "every": 5, "total_steps": 20}
    assert steps_of(case, 8, **options) == [0, 5, 6]
    assert steps_of(case, 20, first=8, **options) == [0, 5, 6, 10, 15]
    assert json.loads((tmp_path / "config.json").read_text())["schedule"] == {"every": 5, "at": [0.3]}
    assert not any("schedule" in note for record in spectra.Run(tmp_path).records for note in record.notes)
    assert steps_of(case, 31, first=20, out=tmp_path, every=30) == [0, 5, 6, 10, 15, 30]
    notes = spectra.Run(tmp_path).records[-1].notes
    assert "measured by another schedule than the run began with (every=5, at=[0.3]): every=30" in notes


def test_the_record_says_on_which_signal(case, quick):
    probe = spectra.SpectrumProbe(*case, every=3, when=lambda history: history[-1]["step"] in (2, 3), **OPTIONS)
    for i in range(5):
        probe.step(i, loss=1.0)
    notes = {record.step: [note for note in record.notes if "signal" in note] for record in probe.records}
    assert [len(notes[step]) for step in (0, 2, 3)] == [0, 1, 0]  # step 3 is due anyway


# -- signals


def test_a_plateau():
    signal = LossPlateau(window=3, tolerance=0.1)
    for losses, want in (
        ([3, 3, 3, 2, 2, 2], False),
        ([3, 3, 3, 2.8, 2.8, 2.8], True),
        ([9, 3, 3, 3, 2, 2, 2], False),
        ([3, 3, 3, 4, 4, 4], True),
        ([-3, -3, -3, -4, -4, -4], False),
        ([-3, -3, -3, -3, -3, -3], True),
        ([3, 3, 3, 3, 3], False),
        ([3, 3, 3, 3, 3, float("nan")], False),
    ):
        history = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
        assert signal(history) is want, losses
        assert signal([*history, {"step": 99, "gradient_norm": 1.0}]) is want
    assert isinstance(signal, Signal)


def test_a_jump_of_the_gradient_norm():
    signal = GradientNormJump(factor=2, window=3)
    for norms, want in (
        ([1, 1, 1, 2.1], True),
        ([1, 1, 1, 1.9], False),
        ([1, 1, 9], False),
        ([9, 9, 1, 1, 1, 3], True),
    ):
        assert signal([{"step": i, "gradient_norm": norm} for i, norm in enumerate(norms)]) is want, norms


def test_a_signal_that_fails_ends_no_training(case, quick):
    def failing(history):
        raise KeyError("loss")

    probe = spectra.SpectrumProbe(*case, when=failing, **OPTIONS)
    probe.step(0)
    with pytest.warns(UserWarning, match="the signal failed at training step 1: when= KeyError: 'loss'"):
        probe.step(1)
    probe.step(2)
    assert [record.step for record in probe.records] == [0]
    strict = spectra.SpectrumProbe(*case, when=failing, strict=True, **OPTIONS)
    strict.step(0)
    with pytest.raises(KeyError):
        strict.step(1)


def test_a_signal_that_hears_nothing_is_said(case, quick):
    probe = spectra.SpectrumProbe(*case, when=LossPlateau(), **OPTIONS)
    for i in range(4):
        probe.step(i, gradient_norm=torch.tensor(1.0))
    with pytest.warns(UserWarning, match=r"needs the loss, which was not reported: call probe.step\(i, loss=...\)"):
        probe.close()
    probe = spectra.SpectrumProbe(*case, when=LossPlateau(), **OPTIONS)
    with pytest.warns(UserWarning, match="a number of training step 0 cannot be read"):
        probe.step(0, loss=torch.ones(3))


def test_a_signal_that_draws_does_not_change_the_training(case, quick):
    def drawing(history):
        return random.random() + float(torch.rand(())) + np.random.rand() < 0  # noqa: NPY002

    def numbers(probe):
        random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
        for i in range(3):
            probe.step(i)
        return random.random(), float(torch.rand(())), np.random.rand()  # noqa: NPY002

    found = [numbers(spectra.SpectrumProbe(*case, every=9, when=when, **OPTIONS)) for when in (None, drawing)]
    assert found[0] == found[1]


# -- a share of the time


class Clock:
    """A time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("cost", [1.0, 5.0])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_measurements_take_at_most_their_share(share, cost):
    """Of all the time, the one at the end included; and they take nearly all of it."""
    clock = Clock()
    overhead = Overhead(share, clock=clock)
    spent, start = 0.0, clock.now
    for step in range(2000):
        if step == 0 or overhead.has_room():
            before = overhead.start()
            clock.now += cost
            overhead.add(clock.now - before, as_expected=True)
            spent += cost
        clock.now += 0.5
    spent, elapsed = spent + cost, clock.now - start + cost  # the end is measured whatever it takes
    assert spent / elapsed <= share
    assert spent / elapsed > 0.9 * share


def test_a_probe_spaces_what_is_due(case, quick, monkeypatch):
    """Every second step is due; a measurement takes 10 s, a training step 5 s: one more fits in every 20 steps."""
    clock = Clock()
    probe = spectra.SpectrumProbe(*case, every=2, max_overhead=0.1, **OPTIONS)
    probe._overhead = Overhead(0.1, clock=clock)
    measure = probe._measure_modes

    def slow(step, label):
        clock.now += 10
        return measure(step, label)

    monkeypatch.setattr(probe, "_measure_modes", slow)
    for i in range(101):
        probe.step(i)
        clock.now += 5
    steps = [record.step for record in probe.records]
    # room for the n-th is where n + 1 measurements, with that of the end, are a tenth of the time: 5 i = 90 (n + 1)
    want = [0, *(18 * (n + 1) for n in range(2, 6))]
    assert steps == [step for step in want if step <= 100]


def test_a_resumed_run_expects_what_its_records_say(case, quick, tmp_path):
    options = {"out": tmp_path, "max_overhead": 0.05}
    first = spectra.SpectrumProbe(*case, **options, **OPTIONS)
    first.step(0)
    again = spectra.SpectrumProbe(*case, **options, **OPTIONS)
    assert again._overhead.expected == first.records[0].seconds > 0
    assert again.step(1) == []  # no share of no time
