"""SpectrumCallback in Hugging Face's Trainer."""

import pytest
import tiny_models
import torch

import spectra

transformers = pytest.importorskip("transformers")


def dataset(rows, seed):
    ids = torch.randint(2, tiny_models.VOCABULARY, (rows, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def trained(folder, *, optimizer="adamw_torch", callback=None, steps=5, **options):
    """A GPT-2 with dropout after a few shuffled steps: its weights, and the trainer."""
    model = tiny_models.causal_lm("gpt2", dtype=torch.float32)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        optim=optimizer,
        optim_args="momentum=0.9" if optimizer == "sgd" else None,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        seed=3,
    )
    callbacks = [callback] if callback else []
    trainer = transformers.Trainer(model, arguments, train_dataset=dataset(12, 0), callbacks=callbacks, **options)
    trainer.train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, trainer


@pytest.mark.parametrize(("optimizer", "count"), [("sgd", 0), ("adamw_torch", 150)])
def test_training_does_not_notice(tmp_path, optimizer, count):
    """With the count of negative eigenvalues after a change of variables, and without."""
    plain, _ = trained(tmp_path / "plain", optimizer=optimizer)
    settings = {"params": "*mlp*", "probes": 2, "steps": 4, "count_products": count}
    callback = spectra.SpectrumCallback(every=2, batches=tiny_models.token_batches(), out=tmp_path / "run", **settings)
    watched, _ = trained(tmp_path / "watched", optimizer=optimizer, callback=callback)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    start = tiny_models.causal_lm("gpt2", dtype=torch.float32).state_dict()
    assert not torch.equal(plain["transformer.wte.weight"], start["transformer.wte.weight"])
    records = spectra.Run(tmp_path / "run").records
    assert [record.step for record in records] == [0, 2, 4, 5]  # the start, every second step, and the end
    assert all((record.products > 100) == (count > 0) for record in records)
    losses = [record.loss for record in records]
    assert len(set(losses)) == len(losses)  # taken at weights that move
    assert len(callback.probe.records) == 4


def test_the_last_record_is_of_the_final_weights(tmp_path):
    batches = tiny_models.token_batches()
    callback = spectra.SpectrumCallback(
        every=4, batches=batches, out=tmp_path / "run", params="*mlp*", probes=2, steps=4, count_products=0
    )
    _, trainer = trained(tmp_path / "watched", callback=callback, steps=4)
    records = spectra.Run(tmp_path / "run").records
    assert [record.step for record in records] == [0, 4]  # the end is a multiple: measured once
    op = spectra.HessianOperator(trainer.model, batches, params="*mlp*")
    assert records[-1].loss == pytest.approx(op.loss(), rel=1e-6)
    assert records[0].loss != pytest.approx(op.loss(), rel=1e-3)


@pytest.mark.parametrize("evaluation", [False, True])
def test_without_batches_it_takes_the_trainers(tmp_path, evaluation):
    options = {"eval_dataset": dataset(4, 1)} if evaluation else {}
    plain, _ = trained(tmp_path / "plain", **options)
    settings = {"params": "*mlp*", "probes": 2, "steps": 4, "count_products": 0}
    callback = spectra.SpectrumCallback(every=100, out=tmp_path / "run", **settings)
    watched, _ = trained(tmp_path / "watched", callback=callback, **options)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert [record.step for record in spectra.Run(tmp_path / "run").records] == [0, 5]
