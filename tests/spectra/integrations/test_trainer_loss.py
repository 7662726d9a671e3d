"""SpectrumCallback measures what the Trainer trains."""

import pickle
import random
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from torch.nn import functional

import spectra

transformers = pytest.importorskip("transformers")


def rows(count=8, seed=0, lengths=(8,)):
    """Rows whose labels end in padding: row i counts lengths[i % len(lengths)] labels."""
    ids = torch.randint(2, tiny_models.VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(seed))
    out = []
    for i, row in enumerate(ids):
        labels = row.clone()
        labels[lengths[i % len(lengths)] :] = -100
        out.append({"input_ids": row, "labels": labels})
    return out


def trainer_of(folder, *, kind=None, callback=None, data=None, collate=None, model=None, loss_function=None, **options):
    transformers.set_seed(3)
    model = model or tiny_models.causal_lm("llama", dtype=torch.float32)
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no", "seed": 3, "use_cpu": True}
    settings |= {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "learning_rate": 1e-2}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **(settings | options))
    return (kind or transformers.Trainer)(
        model,
        arguments,
        train_dataset=rows() if data is None else data,
        data_collator=collate,
        compute_loss_func=loss_function,
        callbacks=[callback] if callback else [],
    )


def watch(**options):
    """A quick callback; test_trainer.py has the count of negative eigenvalues that most of the time goes into."""
    quick = {"every": 2, "probes": 1, "steps": 3, "deflate": 0, "count_products": 0, "params": "*mlp*"}
    return spectra.SpectrumCallback(**(quick | options))


def weights(trainer):
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])


def measured(folder, **options):
    """The records of a training, which has to end with the weights it has without the callback."""
    plain = trainer_of(folder / "plain", **options)
    plain.train()
    callback = watch(batch_count=2)
    trainer = trainer_of(folder / "watched", callback=callback, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train()
    assert torch.equal(weights(plain), weights(trainer))
    assert callback.probe is not None
    assert [record.step for record in callback.probe.records] == [0, 2, 3]
    assert all(record.is_measured for record in callback.probe.records)
    return trainer, callback.probe


def token_sums(model, batch, smoothing=0.0):
    """The summed cross-entropy of a batch in plain torch, and how many tokens count."""
    labels = batch["labels"][:, 1:].reshape(-1)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].reshape(len(labels), -1)
    total = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return total, (labels != -100).sum()


def mean_loss(model, batches, smoothing=0.0):
    with torch.no_grad():
        model.eval()
        pairs = [token_sums(model, batch, smoothing) for batch in batches]
    return float(sum(total for total, _ in pairs) / sum(count for _, count in pairs))


class Penalised(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **options):
        outputs = model(**inputs)
        self.calls = getattr(self, "calls", 0) + 1
        self.log({"calls": self.calls})
        loss = outputs.loss + 0.01 * sum((p**2).sum() for p in self.model.parameters())
        return (loss, outputs) if return_outputs else loss


class Distilled(transformers.Trainer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.teacher = tiny_models.causal_lm("llama", seed=5, dtype=torch.float32).train()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            wanted = self.teacher(**inputs).logits.softmax(-1)
        loss = functional.cross_entropy(outputs.logits.flatten(0, 1), wanted.flatten(0, 1))
        return (loss, outputs) if return_outputs else loss


class Weighted(transformers.Trainer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.class_weights = torch.linspace(0.1, 4, tiny_models.VOCABULARY)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=self.class_weights.to(logits))


class Ignoring(transformers.Trainer):
    """A mean over the tokens of a batch, whatever num_items_in_batch says."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Dividing(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return token_sums(model, inputs)[0] / num_items_in_batch


log = []


class Meter:
    """An object of the user that counts, and draws."""

    def __init__(self):
        self.calls, self.numpy = 0, np.random.RandomState(0)

    def draw(self):
        self.calls += 1
        return 1 + 0.1 * self.numpy.rand() + 0.01 * self.calls


class Busy(transformers.Trainer):
    """compute_loss draws from generators of its own, counts in objects and globals, and reads plain iterators."""

    kept = []  # noqa: RUF012, the mistake that people make

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.numpy, self.meter, self.weights = np.random.default_rng(0), Meter(), iter([1.0, 2.0, 3.0, 4.0] * 9)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs).loss * (1 + self.numpy.random()) * self.meter.draw() * next(self.weights)
        loss = loss * self.data_collator.meter.draw() * self.train_dataset.meter.draw()
        log.append(loss.item())
        self.kept.append(len(log))
        return loss * (1 + 0.01 * len(self.kept))


class Collator:
    def __init__(self):
        self.meter = Meter()

    def __call__(self, features):
        return transformers.default_data_collator(features)


class Metered(torch.utils.data.Dataset):
    def __init__(self):
        self.meter, self.rows = Meter(), rows()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_whatever_compute_loss_changes_in_what_the_trainer_holds_is_put_back(tmp_path):
    found = []
    for callback in (None, watch()):
        log.clear()
        Busy.kept.clear()
        trainer = trainer_of(tmp_path, kind=Busy, data=Metered(), collate=Collator(), callback=callback)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.train()
        numbers = (trainer.numpy.random(), next(trainer.weights), trainer.meter.calls, trainer.meter.numpy.rand())
        found.append((weights(trainer).tolist(), list(log), list(Busy.kept), numbers))
    assert found[0] == found[1]
    assert [record.is_measured for record in callback.probe.records] == [True] * 3


def test_a_compute_loss_that_reads_from_a_loader_is_refused_and_the_training_misses_nothing(tmp_path):
    class Mixed(transformers.Trainer):
        others = None

        def compute_loss(self, model, inputs, **options):
            if self.others is None:
                self.others = iter(torch.utils.data.DataLoader(rows(40, seed=2), batch_size=2))
            return model(**inputs).loss + model(**next(self.others)).loss

    found = []
    for callback in (None, watch(every=1)):
        trainer = trainer_of(tmp_path / str(callback is None), kind=Mixed, callback=callback)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        found.append(weights(trainer))
    assert torch.equal(*found)
    assert [record.is_measured for record in callback.probe.records] == [True, False, False, False]
    assert "DataLoader's iterator" in callback.probe.records[-1].reason
    assert sum("no spectrum" in str(warning.message) for warning in caught) == 1


def test_a_compute_loss_that_steps_another_optimizer_is_refused(tmp_path):
    class Adversarial(transformers.Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.critic = torch.nn.Linear(tiny_models.VOCABULARY, 1)
            self.critic_optimizer = torch.optim.Adam(self.critic.parameters())

        def compute_loss(self, model, inputs, **options):
            logits = model(**inputs).logits
            self.critic_optimizer.zero_grad()
            self.critic(logits.detach()).mean().backward()
            self.critic_optimizer.step()
            return -self.critic(logits).mean()

    found = []
    for callback in (None, watch()):
        trainer = trainer_of(tmp_path / str(callback is None), kind=Adversarial, callback=callback)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        moments = trainer.critic_optimizer.state_dict()["state"][0]
        found.append(torch.cat([weights(trainer), trainer.critic.weight.flatten(), moments["exp_avg"].flatten()]))
    assert torch.equal(*found)
    assert "step of an optimizer (Adam)" in callback.probe.records[-1].reason


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", [None, Ignoring, Dividing, Penalised])
def test_what_is_measured_under_accumulation_is_said(tmp_path, kind, steps):
    _, probe = measured(tmp_path, kind=kind, data=rows(lengths=(8, 7, 3, 2)), gradient_accumulation_steps=steps)
    notes = [note for note in probe.records[-1].notes if "gradient accumulation" in note]
    expected = steps == 2 and kind in (Ignoring, Penalised)
    assert [("the sum of the losses of its 2 batches" in note) for note in notes] == [True] * expected


def test_the_sum_that_is_said_is_what_a_step_descends(tmp_path):
    """The gradient of a step over two batches is twice that of their mean loss, where compute_loss is a mean."""

    class Seen(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            self.gradient = self.gradient if state.global_step else [p.grad.clone() for p in model.parameters()]

    seen = Seen()
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "max_steps": 1}
    callback = watch(batch_count=2, params=None)
    trainer = trainer_of(tmp_path, kind=Ignoring, callback=callback, **options)
    trainer.add_callback(seen)
    trainer.train()
    fresh = tiny_models.causal_lm("llama", dtype=torch.float32)
    op = spectra.HessianOperator(fresh, callback.probe.batches)
    summed = torch.cat([g.flatten() for g in seen.gradient])
    assert torch.allclose(summed, 2 * op.gradient(), rtol=1e-4, atol=1e-6)


def test_the_models_own_loss_has_the_same_digits(tmp_path):
    trained, collated = [], transformers.default_data_collator

    def collate(features):
        trained.append(collated(features))
        return trained[-1]

    trainer_of(tmp_path / "seen", data=rows(lengths=(8, 3)), collate=collate).train()
    trainer, probe = measured(tmp_path, data=rows(lengths=(8, 3)))
    assert all(torch.equal(trained[i][key], probe.batches[i][key]) for i in range(2) for key in trained[0])
    op = spectra.HessianOperator(trainer.model, trained[:2], params="*mlp*")
    assert probe.records[-1].loss == op.loss()
    assert not any("loss" in note for note in probe.records[-1].notes)


def test_a_penalty_on_the_trainers_model(tmp_path):
    trainer, probe = measured(tmp_path, kind=Penalised)
    penalty = 0.01 * sum(float((p.detach() ** 2).sum()) for p in trainer.model.parameters())
    assert probe.records[-1].loss == pytest.approx(mean_loss(trainer.model, probe.batches) + penalty, rel=1e-5)
    assert any("compute_loss" in note for note in probe.records[-1].notes)
    assert trainer.calls == 3  # one a training step: those of the measurement are put back
    assert not any("calls" in entry and entry["calls"] > 3 for entry in trainer.state.log_history)
    plain = spectra.HessianOperator(trainer.model, probe.batches, params="*mlp*")
    own = probe.modes["full"](trainer.model, probe.batches, **probe._operator_options)
    v = torch.randn(own.shape[0], generator=torch.Generator().manual_seed(0))
    assert torch.allclose(own @ v, plain @ v + 0.02 * v, atol=1e-4)


def test_a_teacher(tmp_path):
    trainer, probe = measured(tmp_path, kind=Distilled)
    trainer.model.eval()
    trainer.teacher.eval()
    with torch.no_grad():
        loss = [float(trainer.compute_loss(trainer.model, dict(batch))) for batch in probe.batches]
    assert probe.records[-1].loss == pytest.approx(sum(loss) / 2, rel=1e-5)
    assert loss[0] != pytest.approx(mean_loss(trainer.model, probe.batches), rel=1e-2)


def test_class_weights_of_the_trainer(tmp_path):
    trainer, probe = measured(tmp_path, kind=Weighted)
    together = {key: torch.cat([batch[key] for batch in probe.batches]) for key in probe.batches[0]}
    trainer.model.eval()
    with torch.no_grad():
        assert probe.records[-1].loss == pytest.approx(float(trainer.compute_loss(trainer.model, together)), rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing_over_ragged_batches(tmp_path, accumulation):
    options = {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": accumulation}
    trainer, probe = measured(tmp_path, data=rows(lengths=(8, 7, 3, 2)), **options)
    assert probe.records[-1].loss == pytest.approx(mean_loss(trainer.model, probe.batches, 0.2), rel=1e-5)
    assert any("label smoothing 0.2" in note for note in probe.records[-1].notes)


def test_a_loss_function_that_divides_by_the_items(tmp_path):
    def loss(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    trainer, probe = measured(tmp_path, data=rows(lengths=(8, 7, 3, 2)), loss_function=loss)
    counts = [sum(int((b["labels"][:, 1:] != -100).sum()) for b in probe.batches)]
    assert counts == [16]
    assert probe.records[-1].loss == pytest.approx(mean_loss(trainer.model, probe.batches), rel=1e-5)


def test_autocast_of_the_training_is_not_measured(tmp_path):
    trainer, probe = measured(tmp_path, bf16=True)
    assert any("autocast to bfloat16" in note for note in probe.records[-1].notes)
    fresh = tiny_models.causal_lm("llama", dtype=torch.float32)
    fresh.load_state_dict(trainer.model.state_dict())
    assert probe.records[-1].loss == spectra.HessianOperator(fresh, probe.batches, params="*mlp*").loss()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer, probe = measured(tmp_path, **options)
    assert probe.records[-1].loss == pytest.approx(mean_loss(trainer.model, probe.batches), rel=1e-5)


def test_only_trained_parameters(tmp_path):
    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("down_proj" in name)
    callback = watch(params=None)
    trainer_of(tmp_path, model=model, callback=callback).train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [record.dimension for record in callback.probe.records] == [trained] * 3


def test_a_quantized_model_is_said_to_be_measured_straight_through(tmp_path):
    import qat

    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    callback = watch(params=None)
    trainer_of(tmp_path, model=model, callback=callback).train()
    assert all(record.is_measured for record in callback.probe.records)
    assert any("straight-through" in note for note in callback.probe.records[-1].notes)
    assert {record.mode for record in callback.probe.records} == {"ste"}


# -- the data


def drawing(features):
    """A collator that draws from every random state."""
    batch = transformers.default_data_collator(features)
    shift = random.randrange(3) + int(torch.randint(0, 5, ()))
    batch["input_ids"] = (batch["input_ids"] + shift) % tiny_models.VOCABULARY
    return batch


class DrawsFromItsOwn:
    """A collator with a generator that it makes at its first call, as DataCollatorForLanguageModeling does."""

    generator = None

    def __call__(self, features):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(1)
        batch = transformers.default_data_collator(features)
        shift = int(torch.randint(0, 9, (), generator=self.generator))
        batch["input_ids"] = (batch["input_ids"] + shift) % tiny_models.VOCABULARY
        return batch


class Iterated(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from rows(12)


class ReadOnce(torch.utils.data.IterableDataset):
    def __init__(self):
        self.rows = iter(rows(12))

    def __iter__(self):
        yield from self.rows


def test_a_collator_that_draws(tmp_path):
    _, probe = measured(tmp_path, collate=drawing)
    assert any("drawn at random" in note for note in probe.records[-1].notes)


def test_a_collator_with_a_generator_of_its_own(tmp_path):
    plain = trainer_of(tmp_path / "plain", collate=DrawsFromItsOwn())
    plain.train()
    watched = trainer_of(tmp_path / "watched", collate=DrawsFromItsOwn(), callback=watch())
    watched.train()
    assert torch.equal(weights(plain), weights(watched))


def test_data_that_are_iterated(tmp_path):
    _, probe = measured(tmp_path, data=Iterated())
    assert torch.equal(probe.batches[1]["input_ids"], torch.stack([row["input_ids"] for row in rows(12)[2:4]]))


def test_data_that_can_be_read_once(tmp_path):
    plain = trainer_of(tmp_path / "plain", data=ReadOnce())
    plain.train()
    callback = watch()
    trainer = trainer_of(tmp_path / "watched", data=ReadOnce(), callback=callback)
    with pytest.warns(UserWarning, match="pass batches="):
        trainer.train()
    assert torch.equal(weights(plain), weights(trainer))
    assert callback.probe is None


def test_columns_that_the_model_does_not_take_and_workers(tmp_path):
    datasets = pytest.importorskip("datasets")
    plain = [{key: value.tolist() for key, value in row.items()} | {"text": "x"} for row in rows()]
    _, probe = measured(tmp_path, data=datasets.Dataset.from_list(plain), dataloader_num_workers=1)
    assert set(probe.batches[0]) == {"input_ids", "labels"}


# -- the life cycle


def test_training_goes_on_from_a_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, callback=watch(), collate=drawing, **options).train()
    callback = watch()
    again = trainer_of(tmp_path, callback=callback, collate=drawing, **(options | {"max_steps": 6}))
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    steps = [record.step for record in spectra.Run(tmp_path / "spectra").records]
    assert sorted(steps) == [0, 2, 3, 4, 6]


def test_a_training_that_raises_and_one_after_it(tmp_path):
    class Stop(transformers.TrainerCallback):
        on = True

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 1 and self.on:
                raise KeyError("stop")

    callback = watch()
    trainer = trainer_of(tmp_path, callback=callback)
    stop = Stop()
    trainer.add_callback(stop)
    with pytest.raises(KeyError):
        trainer.train()
    stop.on = False
    with pytest.warns(UserWarning, match="its step 0 is training step 1 there"):
        trainer.train()
    assert [record.step for record in callback.probe.records] == [0, 1, 2, 4]


@pytest.mark.parametrize("other_process", [False, True])
def test_a_second_training_counts_on(tmp_path, other_process):
    callback = watch()
    trainer = trainer_of(tmp_path, callback=callback)
    trainer.train()
    if other_process:
        callback = watch()
        trainer = trainer_of(tmp_path, callback=callback, model=trainer.model)
    with pytest.warns(UserWarning, match=f"{tmp_path}.*: its step 0 is training step 3 there") as caught:
        trainer.train()
    assert sum("its step 0" in str(warning.message) for warning in caught) == len(caught) == 1
    records = spectra.Run(tmp_path / "spectra").records
    assert [(record.step, record.label) for record in records] == [
        (0, "start"),
        (2, ""),
        (3, "end"),
        (4, ""),
        (6, "end"),
    ]
    assert [any("its step 0" in note for note in record.notes) for record in records] == [False] * 3 + [True] * 2
    fresh = spectra.HessianOperator(trainer.model, callback.probe.batches, params="*mlp*")
    assert records[-1].loss == fresh.loss()


def test_the_same_training_again_adds_nothing(tmp_path):
    """With a model that was made anew; and with the weights of the start put back."""
    trainer_of(tmp_path, callback=watch()).train()
    before = spectra.Run(tmp_path / "spectra").records
    callback = watch()
    trainer = trainer_of(tmp_path, callback=callback)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.train()
        transformers.set_seed(3)
        trainer.model.load_state_dict(start)
    assert spectra.Run(tmp_path / "spectra").records == before


def test_a_second_training_on_other_data_is_refused_in_the_folder_of_the_first(tmp_path):
    callback = watch()
    trainer = trainer_of(tmp_path, callback=callback)
    trainer.train()
    trainer.train_dataset = rows(seed=1)
    with pytest.warns(UserWarning, match=r"holds a run with other settings \(batches: "):
        trainer.train()
    assert len(spectra.Run(tmp_path / "spectra").records) == 3


def test_a_training_that_is_stopped_is_measured_once_at_its_end(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    callback = watch()
    trainer = trainer_of(tmp_path, callback=callback, max_steps=9)
    trainer.add_callback(Stop())
    trainer.train()
    assert [record.step for record in callback.probe.records] == [0, 2]


def test_a_note_says_that_the_best_model_was_loaded(tmp_path):
    class Worse(transformers.Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, eval_dataset=rows(2), **options)

        def evaluate(self, *_, **__):
            metrics = {"eval_loss": float(self.state.global_step)}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    callback = watch()
    strategies = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    data = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_on_start": True}
    trainer = trainer_of(tmp_path, kind=Worse, callback=callback, **strategies, **data)
    trainer.train()
    assert [record.step for record in callback.probe.records] == [0, 2, 3]
    assert any("checkpoint-1" in note for note in callback.probe.records[-1].notes)
    assert not any("checkpoint-1" in note for note in callback.probe.records[1].notes)


def test_nan_weights_end_no_training(tmp_path):
    class Break(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")

    callback = watch()
    trainer = trainer_of(tmp_path, callback=callback)
    trainer.add_callback(Break())
    with pytest.warns(UserWarning, match="NaN"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert [record.is_measured for record in callback.probe.records] == [True, False, False]


@pytest.mark.parametrize("strict", [False, True])
def test_a_probe_that_cannot_be_made(tmp_path, strict):
    callback = watch(params="nothing*", strict=strict)
    trainer = trainer_of(tmp_path, callback=callback)
    if strict:
        with pytest.raises(spectra.InputError):
            trainer.train()
        return
    for _ in range(2):
        with pytest.warns(UserWarning, match="no spectrum of this training: no parameter matches"):
            trainer.train()
    assert trainer.state.global_step == 3
    records = spectra.Run(tmp_path / "spectra").records
    assert [(record.step, record.status, record.label) for record in records] == [
        (0, "failed", "start"),
        (3, "failed", "start"),
    ]
    assert "no parameter matches" in records[0].reason
    trainer_of(tmp_path, callback=watch()).train()  # with other settings: nothing was measured with those
    assert [record.step for record in spectra.Run(tmp_path / "spectra").measured] == [0, 2, 3]


def test_a_probe_that_cannot_be_made_leaves_the_runs_of_others_alone(tmp_path):
    trainer_of(tmp_path, callback=watch()).train()
    before = (tmp_path / "spectra" / "records.jsonl").read_bytes()
    for options in ({"probes": 2}, {"params": "nothing*", "probes": 2}):
        with pytest.warns(UserWarning, match="no spectrum of this training"):
            trainer_of(tmp_path, callback=watch(**options)).train()
    assert (tmp_path / "spectra" / "records.jsonl").read_bytes() == before


def test_a_probe_that_cannot_be_made_is_recorded_in_the_run_that_goes_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, callback=watch(), **options).train()

    class Vanished(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            if i < 8:
                raise OSError("the disk with the data is gone")

    with pytest.warns(UserWarning, match="the disk with the data is gone"), pytest.raises(OSError, match="is gone"):
        trainer_of(tmp_path, callback=watch(), data=Vanished(), **(options | {"max_steps": 6})).train(
            resume_from_checkpoint=f"{tmp_path}/checkpoint-2"
        )
    record = spectra.Run(tmp_path / "spectra").records[-1]
    assert (record.step, record.status) == (2, "failed")
    assert "the disk with the data is gone" in record.reason


def test_two_trainers_one_after_another(tmp_path):
    callback = watch()
    for name in ("a", "b"):
        trainer_of(tmp_path / name, callback=callback).train()
        assert [record.step for record in spectra.Run(tmp_path / name / "spectra").records] == [0, 2, 3]


def test_a_callback_is_pickled_without_its_probe(tmp_path):
    callback = watch()
    trainer_of(tmp_path, callback=callback).train()
    again = pickle.loads(pickle.dumps(callback))
    assert again.probe is None
    assert (again.schedule, again.options) == (callback.schedule, callback.options)
    assert callback.probe is not None


def test_without_a_trainer_it_says_so(tmp_path):
    trainer = trainer_of(tmp_path)
    callback = watch()
    callback.on_train_begin(
        trainer.args,
        trainer.state,
        trainer.control,
        model=trainer.model,
        train_dataloader=trainer.get_train_dataloader(),
    )
    assert any("Trainer was not found" in note for note in callback.probe.records[0].notes)


def test_unknown_options_are_refused_when_the_callback_is_made():
    with pytest.raises(spectra.InputError, match="there is no setting"):
        spectra.SpectrumCallback(probse=2)
