"""Trainings that change what a probe was made for: their parameters, batches, weights and training steps."""

import copy
import warnings

import pytest
import tiny_models
import torch
from oracles import dense_hessian, same_random_state
from oracles import random_state as random_state_of
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import spectra
from spectra.backend.errors import InputError

OPTIONS = {"every": 2, "probes": 1, "steps": 100, "deflate": 0, "count_products": 0}
INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
BATCHES = [(INPUTS[start : start + 8], torch.arange(start, start + 8) % 3) for start in (0, 8, 16)]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


def loss_of(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def train(model, probe, *, steps=6, change=lambda model, step: None, batches=BATCHES):
    """Plain SGD; `change` may do what it wants to the model before a step."""
    for step in range(steps):
        change(model, step)
        for parameter in model.parameters():
            parameter.grad = None
        loss_of(model, batches[step % len(batches)]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)
        if probe is not None:
            probe.step(step)
    if probe is not None:
        probe.close()


def unnoticed(change, **options):
    """The probe of a training that ends with the same weights and random numbers without it."""
    left = []
    for watched in (False, True):
        model = network()
        torch.manual_seed(7)
        probe = spectra.SpectrumProbe(model, BATCHES, **{**OPTIONS, **options}) if watched else None
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*spectrum")
            train(model, probe, change=change)
        left.append((copy.deepcopy(model.state_dict()), random_state_of()))
    (weights, state), (others, other) = left
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert same_random_state(state, other)
    return model, probe


def assert_dense(record, loss, parameters):
    """The ends of the spectrum are those of the dense float64 Hessian."""
    values = torch.linalg.eigvalsh(dense_hessian(loss, parameters))
    assert record.dimension == len(values)
    assert record.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, value in (("lambda_max", values[-1]), ("lambda_min", values[0])):
        assert record.estimates[name].value == pytest.approx(float(value), abs=2e-3 * float(values.abs().max())), name


def thaw(model, step):
    model[0].requires_grad_(step >= 3)


def freeze(model, step):
    model[0].requires_grad_(step < 3)


def widen(model, step):
    if step == 3:
        torch.manual_seed(2)
        model[3] = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("change", "sizes"), [(thaw, [21, 51]), (freeze, [51, 21]), (widen, [51, 73])], ids=["thaw", "freeze", "widen"]
)
@pytest.mark.parametrize("options", [{}, {"steps": 6, "deflate": 2, "count_products": 120}], ids=["whole", "deflated"])
def test_parameters_that_are_trained_from_then_on_are_measured(change, sizes, options):
    """Deflation starts from the eigenvectors of the last checkpoint, which are of other parameters."""
    model, probe = unnoticed(change, **options)
    records = probe.records
    assert [(r.step, r.status, r.dimension) for r in records] == [
        (0, "ok", sizes[0]),
        (2, "ok", sizes[0]),
        (4, "ok", sizes[1]),
        (5, "ok", sizes[1]),
    ]
    said = [[note for note in r.notes if "what is trained has changed" in note] for r in records]
    assert said[:2] == [[], []]
    assert (
        said[2]
        == said[3]
        == [f"measured over {sizes[1]} parameters, after {sizes[0]} at training step 2: what is trained has changed"]
    )
    if not options:
        exact = copy.deepcopy(model).double().eval()
        trained = [p for p in exact.parameters() if p.requires_grad]
        loss = sum(loss_of(exact, (inputs.double(), targets)) for inputs, targets in BATCHES) / 3
        assert_dense(records[-1], loss, trained)


def test_a_layer_that_is_pruned():
    model, probe = unnoticed(
        lambda model, step: prune.l1_unstructured(model[0], "weight", amount=0.5) if step == 3 else None
    )
    parameters = [p.detach().double().requires_grad_() for p in model.parameters()]
    bias, original, *last = parameters
    mask = model[0].weight_mask.double()
    losses = []
    for inputs, targets in BATCHES:
        hidden = torch.tanh(functional.linear(inputs.double(), original * mask, bias))
        losses.append(functional.cross_entropy(functional.linear(hidden, *last), targets))
    assert_dense(probe.records[-1], sum(losses) / 3, parameters)


@pytest.mark.parametrize("how", ["filled again", "in place", "numpy"])
def test_batches_that_the_training_overwrites_are_refused(how):
    """As of a static buffer, an augmentation in place, or memory that a loader shares with numpy."""
    left = []
    for watched in (False, True):
        model = network().eval()
        buffer = [(inputs.clone(), targets.clone()) for inputs, targets in BATCHES[:1]]
        probe = spectra.SpectrumProbe(model, buffer, **OPTIONS) if watched else None

        def change(model, step, buffer=buffer):
            if how == "filled again":
                buffer[0][0].copy_(BATCHES[step % 3][0])
            elif step and how == "in place":
                buffer[0][0].add_(0.1)
            elif step:
                buffer[0][0].numpy()[:] *= 1.1

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, probe, change=change, batches=buffer)
        left.append(model.state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in left), strict=True))
    first, *later = probe.records
    assert first.is_measured
    assert [record.is_measured for record in later] == [False] * 3
    assert all("give the probe copies of its own" in record.reason for record in later)
    assert sum("no spectrum" in str(warning.message) for warning in caught) == 1


def test_batches_that_hold_the_same_again_are_measured():
    model, buffer = network(), [(BATCHES[0][0].clone(), BATCHES[0][1])]
    probe = spectra.SpectrumProbe(model, buffer, **OPTIONS, strict=True)
    train(model, probe, batches=buffer, change=lambda *_: buffer[0][0].copy_(BATCHES[0][0]))
    assert [record.step for record in probe.records] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"at": [5, 14]}, [0, 8, 16, 36]),
        ({"every": 10}, [0, 12, 20, 32, 36]),
        ({"every": 0.5, "total_steps": 36}, [0, 20, 36]),
        ({"at": [100]}, [0, 36]),
    ],
)
def test_a_training_step_that_is_due_and_passed_over_is_measured_at_the_next_call(options, steps):
    """As by two optimizers that step in turn, or a loop that tells the probe of every fourth step."""
    with spectra.SpectrumProbe(network(), BATCHES, **options, probes=1, steps=3, deflate=0, count_products=0) as probe:
        for step in range(0, 40, 4):
            probe.step(step)
    assert [record.step for record in probe.records] == steps


def test_the_spectra_of_another_training_are_neither_logged_nor_mixed_in_silence(tmp_path):
    """A cell of a notebook that is run again, unseeded and longer, on the folder of the first."""
    logged = []
    for run, steps in enumerate((4, 8)):
        model, numbers = network(), {}
        torch.manual_seed(run)
        model[3].reset_parameters()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            probe = spectra.SpectrumProbe(
                model,
                BATCHES,
                out=tmp_path,
                log=lambda values, step, numbers=numbers: numbers.update({step: values}),
                **OPTIONS,
            )
            train(model, probe, steps=steps)
        logged.append(numbers)
        assert ["measured at other weights" in str(warning.message) for warning in caught] == [True] * run
    records = spectra.Run(tmp_path).records
    assert [record.step for record in records] == [0, 2, 3, 4, 6, 7]
    assert [list(numbers) for numbers in logged] == [[0, 2, 3], [4, 6, 7]]
    said = [any("earlier records may be of another training" in note for note in record.notes) for record in records]
    assert said == [False] * 3 + [True] * 3


def test_a_training_that_goes_on_logs_what_its_run_holds(tmp_path):
    """The same weights again: the numbers are of this training, whose new log has to have them."""
    found = []
    for _ in range(2):
        model, numbers = network(), {}
        torch.manual_seed(3)
        probe = spectra.SpectrumProbe(
            model,
            BATCHES,
            out=tmp_path,
            log=lambda values, step, numbers=numbers: numbers.update({step: values}),
            **OPTIONS,
        )
        train(model, probe)
        found.append(numbers)
    assert found[0] == found[1]
    assert list(found[0]) == [0, 2, 4, 5]


def test_anomaly_detection_of_the_training_reports_nothing_of_the_measurement():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.set_detect_anomaly(True):
            probe = spectra.SpectrumProbe(network(), BATCHES, **OPTIONS, strict=True)
            probe.step(0)
            assert torch.is_anomaly_enabled()
    assert probe.records[0].is_measured


def test_the_folder_around_a_run_names_it(tmp_path):
    """The Trainer's output folder, which people give, holds the run in a folder of its own."""
    with spectra.SpectrumProbe(network(), BATCHES, out=tmp_path / "spectra", **OPTIONS) as probe:
        probe.step(0)
    with pytest.raises(InputError, match=rf"holds no config\.json: give {tmp_path / 'spectra'}$"):
        spectra.Run(tmp_path)


# -- the Hugging Face Trainer


def encoder(transformers):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=tiny_models.VOCABULARY,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        **sizes,
    )
    return transformers.BertForTokenClassification(config)


def trainer_of(folder, model, *, kind=None, callbacks=(), **options):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(2, tiny_models.VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(0))
    rows = []
    for number, row in enumerate(ids):
        labels = row % 3
        labels[2 + number % 5 :] = -100
        rows.append({"input_ids": row, "labels": labels})
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "seed": 3, "report_to": []}
    settings |= {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **(settings | options))
    return (kind or transformers.Trainer)(model, arguments, train_dataset=rows, callbacks=list(callbacks))


def test_a_model_that_takes_the_number_of_items_and_does_not_divide_by_it(tmp_path):
    """An encoder's loss is a mean over its batch: a step descends the sum of means, not the mean over all tokens."""
    transformers = pytest.importorskip("transformers")
    seen = {}

    class Seen(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            seen.setdefault("gradient", torch.cat([p.grad.flatten() for p in model.classifier.parameters()]))

    model = encoder(transformers)
    start = copy.deepcopy(model).eval()
    callback = spectra.SpectrumCallback(**OPTIONS, params="classifier*", batch_count=3, strict=True)
    trainer = trainer_of(
        tmp_path, model, callbacks=[callback, Seen()], gradient_accumulation_steps=3, max_steps=1, max_grad_norm=0.0
    )
    trainer.train()
    assert trainer.model_accepts_loss_kwargs
    summed = sum(start(**batch).loss for batch in callback.probe.batches)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(summed, list(start.classifier.parameters()))])
    assert torch.allclose(seen["gradient"], gradient, rtol=1e-4, atol=1e-6)
    for record in callback.probe.records:
        assert sum("descends the sum of the losses of its 3 batches" in note for note in record.notes) == 1


def test_why_a_compute_loss_fails_at_a_measurement_is_all_that_is_said(tmp_path):
    """One that is for training alone; the other forms that a loss function may have are none of it."""
    transformers = pytest.importorskip("transformers")

    class OnlyTraining(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **options):
            if not model.training:
                raise RuntimeError("compute_loss is for training")
            return model(**inputs).loss

    left = []
    for callbacks in ((), [spectra.SpectrumCallback(**OPTIONS, params="classifier*")]):
        trainer = trainer_of(
            tmp_path / str(len(callbacks)), encoder(transformers), kind=OnlyTraining, callbacks=callbacks
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        left.append(trainer.model.state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in left), strict=True))
    reasons = [record.reason for record in callbacks[0].probe.records]
    assert (
        reasons
        == [
            "the loss of batch 0, 2 rows cannot be computed (loss(model, batch): compute_loss is for training): check "
            "the batch, or compute the loss of it yourself, with loss=lambda model, batch: ..."
        ]
        * 2
    )
    assert sum("no spectrum" in str(warning.message) for warning in caught) == 1
