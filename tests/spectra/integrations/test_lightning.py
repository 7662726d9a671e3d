"""SpectrumLightningCallback in Lightning: the loss of training_step, and a training that does not notice."""

import csv
import pickle

import pytest
import torch
from oracles import random_state, same_random_state
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import spectra
from spectra.backend.errors import InputError

lightning = pytest.importorskip("pytorch_lightning")
torchmetrics = pytest.importorskip("torchmetrics")

from spectra.integrations.lightning import SpectrumLightningCallback  # noqa: E402

OPTIONS = {"probes": 2, "steps": 4, "deflate": 0, "count_products": 0}
ROWS, BATCH = 24, 4


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(ROWS, 4, generator=g), torch.randint(0, 3, (ROWS,), generator=g))


class Classifier(lightning.LightningModule):
    """Dropout, batch norm, a metric, augmentation on the way, and logs of every kind in training_step."""

    def __init__(self, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.automatic_optimization = not manual
        self.seen = []
        self.epochs = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        inputs, targets = batch
        return inputs + 0.1 * torch.randn_like(inputs), targets

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        outputs = self.net(inputs)
        loss = functional.cross_entropy(outputs, targets)
        self.seen.append(len(inputs))
        self.accuracy(outputs, targets)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        if self.logger is not None:
            self.logger.log_metrics({"direct": float(loss.detach())}, step=self.trainer.global_step)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return {"loss": loss, "outputs": outputs.detach()}

    def on_train_epoch_end(self):
        self.epochs.append(float(self.trainer.callback_metrics["loss_epoch"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder, callback=None, *, module=None, epochs=2, logger=False, resume=None, **options):
    """A module after a few shuffled epochs, and what is left of the random state."""
    module = module or Classifier()
    torch.manual_seed(5)
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback] if callback else [],
        **options,
    )
    trainer.fit(module, DataLoader(data(), batch_size=BATCH, shuffle=True), ckpt_path=resume)
    return module, trainer


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def rows_of(logger):
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def values_of(rows, name):
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]


def test_training_does_not_notice(tmp_path):
    """Weights, optimizer, random state, metrics and logs are those of a training without the callback."""
    plain, trainer = fit(tmp_path / "plain", logger=lightning.loggers.CSVLogger(tmp_path / "plain"))
    state, moments = random_state(), trainer.optimizers[0].state_dict()["state"]
    callback = SpectrumLightningCallback(every=2, out=tmp_path / "run", strict=True, **OPTIONS)
    watched, other = fit(tmp_path / "watched", callback, logger=lightning.loggers.CSVLogger(tmp_path / "watched"))
    assert same_random_state(state, random_state())
    assert same_weights(plain, watched)
    assert not same_weights(plain, Classifier())
    others = other.optimizers[0].state_dict()["state"]
    assert all(torch.equal(moments[i][name], others[i][name]) for i in moments for name in moments[i])
    assert (plain.seen, plain.epochs) == (watched.seen, watched.epochs)
    assert plain.trainer.callback_metrics == watched.trainer.callback_metrics
    rows, others = rows_of(trainer.logger), rows_of(other.logger)
    for name in ("loss_step", "loss_epoch", "accuracy", "direct"):
        assert values_of(rows, name) == values_of(others, name), name
        assert values_of(rows, name)
    assert [record.step for record in spectra.Run(tmp_path / "run").records] == [0, 2, 4, 6, 8, 10, 12]


def test_the_scalars_reach_the_loggers_at_their_steps(tmp_path):
    callback = SpectrumLightningCallback(every=5, out=tmp_path / "run", strict=True, **OPTIONS)
    _, trainer = fit(tmp_path, callback, logger=lightning.loggers.CSVLogger(tmp_path))
    rows = rows_of(trainer.logger)
    records = callback.probe.records
    assert [record.step for record in records] == [0, 5, 10, 12]
    for name in ("lambda_max", "rms", "negative_share"):
        for end in ("low", "high"):
            logged = values_of(rows, f"spectra/{name}_{end}")
            assert logged == [(record.step, getattr(record.estimates[name], end)) for record in records], name


def test_it_measures_the_loss_of_training_step(tmp_path):
    """On the batch that the loader yields first, after the module's hooks, in evaluation mode."""
    callback = SpectrumLightningCallback(every=100, out=tmp_path, strict=True, **OPTIONS)
    module, _ = fit(tmp_path, callback)
    (inputs, targets) = callback.probe.batches[0]
    assert inputs.shape == (BATCH, 4)
    rows = data().tensors[0]
    gaps = (inputs[:, None] - rows).norm(dim=-1).min(1).values
    assert (gaps > 0).all()  # noise was added
    assert (gaps < 1).all()
    with torch.no_grad():
        loss = functional.cross_entropy(module.eval().net(inputs), targets)
    assert callback.probe.records[-1].loss == pytest.approx(float(loss), rel=1e-5)
    op = spectra.HessianOperator(module.net, [(inputs, targets)], loss=nn.CrossEntropyLoss())
    values = torch.linalg.eigvalsh(torch.as_tensor(op.to_dense()).double())
    full = SpectrumLightningCallback(every=100, out=tmp_path / "full", strict=True, **{**OPTIONS, "steps": 100})
    again, _ = fit(tmp_path, full)
    assert same_weights(module, again)
    assert full.probe.records[-1].estimates["lambda_max"].value == pytest.approx(float(values.max()), rel=1e-4)


def test_gradients_that_are_accumulated(tmp_path):
    plain, _ = fit(tmp_path / "plain", accumulate_grad_batches=3)
    callback = SpectrumLightningCallback(every=1, out=tmp_path / "run", strict=True, **OPTIONS)
    watched, trainer = fit(tmp_path / "watched", callback, accumulate_grad_batches=3)
    assert same_weights(plain, watched)
    assert trainer.global_step == 4
    assert [record.step for record in callback.probe.records] == [0, 1, 2, 3, 4]
    assert any("gradient accumulation" in note for note in callback.probe.records[0].notes)


def test_a_training_that_goes_on_adds_to_its_run(tmp_path):
    def checkpoint(folder, callback):
        _, trainer = fit(folder, callback, epochs=1)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        return fit(folder, callback, epochs=2, resume=tmp_path / "half.ckpt")[0]

    plain = checkpoint(tmp_path / "plain", None)
    callback = SpectrumLightningCallback(every=4, out=tmp_path / "run", strict=True, **OPTIONS)
    watched = checkpoint(tmp_path / "watched", callback)
    assert same_weights(plain, watched)
    assert [record.step for record in spectra.Run(tmp_path / "run").records] == [0, 4, 6, 8, 12]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every": 0.25}, [0, 3, 6, 9, 12]),
        ({"at": [1, 0.5]}, [0, 1, 6, 12]),
        ({"when": lambda history: history[-1]["loss"] > 0 and history[-1]["step"] == 7}, [0, 7, 12]),
        ({"when": lambda history: history[-1]["gradient_norm"] > 0 and len(history) == 5}, [0, 5, 10, 12]),
    ],
)
def test_when_it_measures(tmp_path, options, steps):
    callback = SpectrumLightningCallback(**options, out=tmp_path / "run", strict=True, **OPTIONS)
    fit(tmp_path, callback)
    assert [record.step for record in callback.probe.records] == steps


def test_a_fraction_of_a_training_without_end_is_refused(tmp_path):
    callback = SpectrumLightningCallback(every=0.5, out=tmp_path / "run", **OPTIONS)
    module = Classifier()
    module.on_train_batch_end = lambda *_: setattr(module.trainer, "should_stop", module.trainer.global_step >= 2)
    with pytest.warns(UserWarning, match="whose length is not known: pass total_steps="):
        fit(tmp_path, callback, module=module, epochs=-1)
    assert callback.probe is None


def test_manual_optimization_is_refused_in_one_line(tmp_path):
    plain, _ = fit(tmp_path / "plain", module=Classifier(manual=True))
    callback = SpectrumLightningCallback(every=2, out=tmp_path / "run", **OPTIONS)
    with pytest.warns(UserWarning, match="Classifier optimizes manually .* no loss to measure: pass loss="):
        watched, _ = fit(tmp_path / "watched", callback, module=Classifier(manual=True))
    assert same_weights(plain, watched)
    (record,) = spectra.Run(tmp_path / "run").records
    assert "pass loss=" in record.reason
    given = SpectrumLightningCallback(
        every=2,
        out=tmp_path / "given",
        strict=True,
        loss=lambda model, batch: model.net(batch[0]).square().mean(),
        **OPTIONS,
    )
    measured, _ = fit(tmp_path / "given", given, module=Classifier(manual=True))
    assert same_weights(plain, measured)
    assert len(given.probe.records) == 7


def test_options_are_checked_when_it_is_made():
    for options, words in (
        ({"every": 0}, "every must be"),
        ({"batch_count": 0}, "batch_count must be at least 1"),
        ({"probe": 3}, "there is no setting 'probe'"),
        ({"max_overhead": 2}, "max_overhead must be"),
    ):
        with pytest.raises(InputError, match=words):
            SpectrumLightningCallback(**options)
    again = pickle.loads(pickle.dumps(SpectrumLightningCallback(every=3, probes=4)))
    assert (again.schedule.every, again.options) == (3, {"probes": 4})
