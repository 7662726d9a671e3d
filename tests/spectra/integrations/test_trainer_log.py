"""Spectra in the Trainer's own log, and what its reporting callbacks wrote."""

import json
import random
from pathlib import Path

import pytest
import tiny_models
import torch

import spectra

transformers = pytest.importorskip("transformers")

from transformers.trainer_callback import TrainerCallback  # noqa: E402

OPTIONS = {"params": "*mlp*", "probes": 2, "steps": 4, "deflate": 0, "count_products": 0}


def rows(count=12):
    ids = torch.randint(2, tiny_models.VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


class Drawing(TrainerCallback):
    """Draws random numbers when something is logged, as a careless reporter does."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        random.random()
        torch.rand(())
        self.logs.append((state.global_step, dict(logs)))


def trained(folder, *callbacks, steps=5, resume=None, trainer_class=None, **arguments):
    model = tiny_models.causal_lm("gpt2", dtype=torch.float32)
    given = {"report_to": [], "save_strategy": "no", "logging_steps": 1, **arguments}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **given,
    )
    kind = trainer_class or transformers.Trainer
    trainer = kind(model, arguments, train_dataset=rows(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same_weights(one, other):
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def spectra_in(history):
    return [entry for entry in history if any(name.startswith("spectra/") for name in entry)]


def others_in(history):
    """What is logged without spectra, but for times."""
    kept = [entry for entry in history if not any(name.startswith("spectra/") for name in entry)]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in kept]


def assert_as_recorded(entries, records):
    assert [entry["step"] for entry in entries] == [record.step for record in records]
    for entry, record in zip(entries, records, strict=True):
        assert entry["spectra/loss"] == record.loss
        for name, estimate in record.estimates.items():
            assert entry[f"spectra/{name}_low"] == estimate.low
            assert entry[f"spectra/{name}_high"] == estimate.high
            assert (f"spectra/{name}" in entry) == estimate.resolved
            if estimate.resolved:
                assert entry[f"spectra/{name}"] == estimate.value


def test_the_log_holds_the_spectra_and_the_training_does_not_notice(tmp_path):
    plain = trained(tmp_path / "plain", Drawing())
    callback, drawing = spectra.SpectrumCallback(every=2, strict=True, **OPTIONS), Drawing()
    watched = trained(tmp_path / "watched", drawing, callback)
    assert same_weights(plain, watched)
    assert others_in(plain.state.log_history) == others_in(watched.state.log_history)  # its own losses are logged too
    entries = spectra_in(watched.state.log_history)
    assert_as_recorded(entries, callback.probe.records)
    assert [entry["step"] for entry in entries] == [0, 2, 4, 5]
    assert spectra_in([{"step": step, **logs} for step, logs in drawing.logs]) == [
        {"step": entry["step"], **{k: v for k, v in entry.items() if k != "step"}} for entry in entries
    ]
    assert json.loads(json.dumps(watched.state.log_history)) == watched.state.log_history


def test_a_resumed_training_goes_on_with_its_log(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 2}

    def in_two_parts(folder, *make):
        trained(folder, *(each() for each in make), steps=8, **saving)
        return trained(folder, *(each() for each in make), steps=8, resume=str(folder / "checkpoint-4"), **saving)

    plain = in_two_parts(tmp_path / "plain")
    watched = in_two_parts(
        tmp_path / "watched", lambda: spectra.SpectrumCallback(every=3, out=tmp_path / "run", strict=True, **OPTIONS)
    )
    assert same_weights(plain, watched)
    assert others_in(plain.state.log_history) == others_in(watched.state.log_history)
    steps = [entry["step"] for entry in spectra_in(watched.state.log_history)]
    assert steps == [0, 3, 4, 6, 8]  # step 6 was recorded before, and is logged again as the training gets there
    assert [record.step for record in spectra.Run(tmp_path / "run").records] == [0, 3, 6, 8, 4]


def test_a_trainers_own_log_is_passed_over(tmp_path):
    """TRL's trainers empty their counters in it."""

    class Counting(transformers.Trainer):
        counted = 0

        def training_step(self, *args, **kwargs):
            self.counted += 1
            return super().training_step(*args, **kwargs)

        def log(self, logs, *args, **kwargs):
            logs["counted"], self.counted = self.counted, 0
            super().log(logs, *args, **kwargs)

    logs = {}
    for watched in (False, True):
        callbacks = [spectra.SpectrumCallback(every=1, **OPTIONS)] if watched else []
        trainer = trained(tmp_path / str(watched), *callbacks, trainer_class=Counting, logging_steps=2)
        logs[watched] = [entry["counted"] for entry in trainer.state.log_history if "counted" in entry]
    assert logs[True] == logs[False] == [2, 2, 1]


def test_two_callbacks_are_told_apart_by_their_prefix(tmp_path):
    one = spectra.SpectrumCallback(every=2, strict=True, **OPTIONS)
    options = {**OPTIONS, "params": "*attn*", "log_prefix": "spectra/attention"}
    other = spectra.SpectrumCallback(every=4, out=tmp_path / "b", strict=True, **options)
    history = trained(tmp_path / "a", one, other).state.log_history
    for callback, prefix in ((one, "spectra"), (other, "spectra/attention")):
        read = [(entry["step"], entry[f"{prefix}/rms_high"]) for entry in history if f"{prefix}/rms_high" in entry]
        assert read == [(record.step, record.estimates["rms"].high) for record in callback.probe.records]


def test_a_callback_that_another_one_calls(tmp_path):
    """It is not in the Trainer's list, and logs all the same."""

    class Calling(TrainerCallback):
        def __init__(self):
            self.inner = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.inner.on_train_begin(args, state, control, **kwargs)

        def on_step_end(self, args, state, control, **kwargs):
            self.inner.on_step_begin(args, state, control, **kwargs)
            self.inner.on_step_end(args, state, control, **kwargs)

    class Late(transformers.Trainer):
        def train(self, *args, **kwargs):
            calling.inner.trainer = self
            return super().train(*args, **kwargs)

    calling = Calling()
    calling.inner = spectra.SpectrumCallback(every=2, strict=True, **OPTIONS)
    trainer = trained(tmp_path, calling, trainer_class=Late)
    assert [entry["step"] for entry in spectra_in(trainer.state.log_history)][1:] == [2, 4]


def test_a_log_of_ones_own(tmp_path):
    logged = {}
    callback = spectra.SpectrumCallback(every=2, log=lambda values, step: logged.update({step: values}), **OPTIONS)
    trainer = trained(tmp_path, callback)
    assert list(logged) == [0, 2, 4, 5]
    assert not spectra_in(trainer.state.log_history)


def test_a_log_that_fails_is_a_warning(tmp_path):
    class Failing(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "spectra/loss" in logs:
                raise OSError("no room")

    plain = trained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="not logged.*no room"):
        watched = trained(tmp_path / "watched", spectra.SpectrumCallback(every=2, **OPTIONS), Failing())
    assert same_weights(plain, watched)
    assert [record.step for record in spectra.Run(tmp_path / "watched/spectra").records] == [0, 2, 4, 5]


@pytest.mark.parametrize("added", ["first", "last"])
def test_tensorboard_gets_every_scalar_at_its_step(tmp_path, monkeypatch, added):
    """Read back from the event files; the last spectrum is written before the writer closes: there is one file."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = spectra.SpectrumCallback(every=2, strict=True, **OPTIONS)
    if added == "last":
        trained(tmp_path, callback, report_to=["tensorboard"])
    else:
        from transformers.integrations import TensorBoardCallback

        trained(tmp_path, callback, TensorBoardCallback())
    assert len(list(Path(tmp_path / "events").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name in ("lambda_max", "rms", "negative_share"):
        for end in ("low", "high"):
            read = [(event.step, event.value) for event in events.Scalars(f"train/spectra/{name}_{end}")]
            truth = [(record.step, getattr(record.estimates[name], end)) for record in callback.probe.records]
            assert [step for step, _ in read] == [0, 2, 4, 5]
            assert [value for _, value in read] == pytest.approx([value for _, value in truth], rel=1e-6)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_trackio_gets_every_scalar_at_its_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    import sqlite3

    plain = trained(tmp_path / "plain")
    callback = spectra.SpectrumCallback(every=2, strict=True, **OPTIONS)
    options = {"project": "spectra-test", "run_name": "tiny", "report_to": ["trackio"]}
    watched = trained(tmp_path / "watched", callback, trackio_static_space_id=False, **options)
    assert same_weights(plain, watched)
    databases = list((tmp_path / "trackio").rglob("*.db"))
    assert databases, trackio.__version__
    found, runs = [], set()
    for path in databases:
        with sqlite3.connect(path) as connection:
            lines = connection.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
        runs |= {run for run, _ in lines}
        found += [json.loads(line) for _, line in lines]
    assert runs == {"tiny"}  # the end is in the same run: trackio's was not closed before
    read = [entry for entry in found if "train/spectra/loss" in entry]
    assert [entry["train/global_step"] for entry in read] == [0, 2, 4, 5]
    assert [entry["train/spectra/rms_high"] for entry in read] == [
        record.estimates["rms"].high for record in callback.probe.records
    ]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every": 0.5}, [0, 4, 8]),
        ({"at": [3, 0.25]}, [0, 2, 3, 8]),
        ({"when": lambda history: bool(history) and history[-1]["step"] == 5}, [0, 6, 8]),  # known a step later
        ({"when": lambda history: len(history) == 3 and history[-1]["gradient_norm"] > 0}, [0, 4, 7, 8]),
        ({"schedule": spectra.Schedule(every=7)}, [0, 7, 8]),
    ],
)
def test_when_it_measures(tmp_path, options, steps):
    callback = spectra.SpectrumCallback(**options, strict=True, **OPTIONS)
    trained(tmp_path, callback, steps=8)
    assert [record.step for record in callback.probe.records] == steps


def test_the_start_is_measured_whatever_the_share_of_the_time(tmp_path):
    callback = spectra.SpectrumCallback(max_overhead=1e-9, **OPTIONS)
    trained(tmp_path, callback, steps=8)
    assert [record.step for record in callback.probe.records] == [0, 8]
