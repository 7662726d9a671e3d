"""The Trainer as we wire it: against a loop written out, with the same data in the same order, and stopping at NaN."""

import math
import tempfile

import pytest
import tiny_models
import torch
from oracles import generator
from transformers import TrainerCallback

import qat
from qat.text.corpus import Blocks
from qat.training.config import TrainConfig
from qat.training.evaluate import evaluate
from qat.training.train import data_order, make_optimizer, schedule_factor, train
from spectra.backend.errors import InputError, NonFiniteError
from spectra.runs.folder import Run


def blocks(count=12, length=8, seed=5):
    return Blocks(torch.randint(2, tiny_models.VOCABULARY, (count * length,), generator=generator(seed)), length)


def model_of(architecture="llama", bits=None):
    model = tiny_models.causal_lm(architecture, dtype=torch.float32)
    if bits is not None:
        qat.quantize_model(model, qat.QuantConfig(bits=bits))
    return model


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def settings(**changes):
    return TrainConfig(**{"steps": 6, "batch_size": 4, "learning_rate": 1e-2} | changes)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("bits", [None, 2])
def test_training_is_adamw_on_the_mean_loss_in_the_drawn_order(schedule, bits):
    config = settings(schedule=schedule, warmup=0.3, weight_decay=0.1, gradient_clip=0.5)
    data, model, want = blocks(), model_of(bits=bits), model_of(bits=bits)
    train(model, data, blocks(3, seed=6), config, device="cpu")

    scales = qat.decay_exempt(want)
    parameters = [p for n, p in want.named_parameters() if p.ndim >= 2 and n not in scales]
    others = [p for n, p in want.named_parameters() if p.ndim < 2 or n in scales]
    optimizer = torch.optim.AdamW([{"params": parameters, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}])
    order = data_order(len(data), config)
    want.train()
    for step in range(config.steps):
        rows = data.blocks[order[4 * step : 4 * step + 4]]
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * schedule_factor(step, config)
        optimizer.zero_grad()
        logits = want(input_ids=rows).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(want.parameters(), 0.5)
        optimizer.step()
    for one, other in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    results = []
    for seed in (0, 0, 1):
        model = model_of("opt")  # with dropout
        train(model, blocks(), blocks(3, seed=6), settings(seed=seed), device="cpu")
        results.append(model)
    assert same_weights(results[0], results[1])
    assert not same_weights(results[0], results[2])


def test_validating_more_often_changes_no_weight(tmp_path):
    """Validation losses, telemetry and a run folder leave dropout's random numbers, gradients and weights alone."""
    plain, watched = model_of("opt", bits=2), model_of("opt", bits=2)
    train(plain, blocks(), blocks(3, seed=6), settings(evaluate_every=6), device="cpu")
    train(
        watched,
        blocks(),
        blocks(3, seed=6),
        settings(evaluate_every=1),
        run=Run.create(tmp_path / "run", {}),
        telemetry=qat.telemetry.Telemetry(watched),
        device="cpu",
    )
    assert same_weights(plain, watched)


def test_training_writes_nothing_but_its_run(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.extend(path for name in ("temporary", "here") for path in (tmp_path / name).iterdir())

    train(model_of(), blocks(), blocks(3, seed=6), settings(steps=2), callbacks=[Look()], device="cpu")
    assert seen == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_every_pass_over_the_data_takes_each_block_once():
    order = data_order(10, settings(steps=7, batch_size=5))
    assert len(order) == 35
    for start in (0, 10, 20):
        assert sorted(order[start : start + 10]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order == data_order(10, settings(steps=7, batch_size=5, learning_rate=1.0))
    assert order != data_order(10, settings(steps=7, batch_size=5, seed=1))


def test_schedules_at_their_ends_and_in_the_middle():
    constant, cosine, wsd = (settings(steps=100, schedule=name) for name in ("constant", "cosine", "wsd"))
    assert {schedule_factor(step, constant) for step in range(100)} == {1.0}
    assert [schedule_factor(step, cosine) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert [schedule_factor(step, wsd) for step in (0, 80, 90, 100)] == pytest.approx([1, 1, 0.5, 0])
    for schedule in ("constant", "cosine", "wsd"):
        warm = settings(steps=100, schedule=schedule, warmup=0.1)
        assert [schedule_factor(step, warm) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert schedule_factor(5, settings(steps=10, warmup=1.0, schedule="cosine")) == pytest.approx(0.6)


def test_scales_of_quantizers_and_vectors_have_no_weight_decay():
    model = model_of(bits=2)
    decay = {
        id(p): group["weight_decay"]
        for group in make_optimizer(model, settings(weight_decay=0.1)).param_groups
        for p in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 0.0 if name.endswith("scale") or parameter.ndim < 2 else 0.1
        assert decay[id(parameter)] == expected, name
    assert any(name.endswith("scale") and p.ndim == 2 for name, p in model.named_parameters())


def test_the_curve_is_the_validation_loss_along_the_way(tmp_path):
    model, validation = model_of(bits=2), blocks(3, seed=6)
    start = evaluate(model, validation).loss
    run = Run.create(tmp_path / "run", {})
    result = train(model, blocks(), validation, settings(evaluate_every=4), run=run, device="cpu")
    assert [step for step, _ in result.curve] == [0, 4, 6]
    assert result.curve[0][1] == start
    assert result.curve[-1][1] == result.validation_loss == evaluate(model, validation).loss
    logged = {line["step"]: line for line in run.telemetry}
    assert sorted(logged) == [0, 1, 2, 3, 4, 5, 6]
    assert [(step, logged[step]["validation_loss"]) for step in (0, 4, 6)] == list(result.curve)
    assert "validation_loss" not in logged[3]


def test_validation_losses_are_computed_in_the_dtype_of_the_training():
    model, validation = model_of(bits=2), blocks(3, seed=6)
    result = train(model, blocks(), validation, settings(dtype="bfloat16"), device="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = evaluate(model, validation).loss
    assert result.validation_loss == rounded != evaluate(model, validation).loss


def test_telemetry_has_what_happened_at_each_step(tmp_path):
    model = model_of(bits=2)
    run = Run.create(tmp_path / "run", {})
    config = settings(schedule="cosine", telemetry_every=2, evaluate_every=6)
    train(model, blocks(), blocks(3, seed=6), config, run=run, telemetry=qat.telemetry.Telemetry(model), device="cpu")
    lines = run.telemetry[1:]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["learning_rate"] == pytest.approx(1e-2 * schedule_factor(line["step"] - 1, config))
        assert 0 < line["distance_to_grid"] < 1
        assert line["relative_gradient_norm"] > 0
        assert math.isfinite(line["loss"])
    assert lines[-1]["distance_to_grid"] == pytest.approx(qat.telemetry.Telemetry(model).measure()["distance_to_grid"])


@pytest.mark.parametrize("bits", [None, 2])
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(bits, parts):
    whole, divided = model_of(bits=bits), model_of(bits=bits)
    train(whole, blocks(), blocks(3, seed=6), settings(), device="cpu")
    result = train(divided, blocks(), blocks(3, seed=6), settings(accumulate=parts), device="cpu")
    for one, other in zip(whole.parameters(), divided.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert result.steps == 6


def test_the_loss_of_a_batch_in_parts_is_the_mean_over_the_batch(tmp_path):
    losses = []
    for parts in (1, 4):
        run = Run.create(tmp_path / str(parts), {})
        train(model_of(), blocks(), blocks(3, seed=6), settings(accumulate=parts), run=run, device="cpu")
        losses.append([line["loss"] for line in run.telemetry[1:]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_parts_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(InputError, match="4 sequences cannot be divided equally into 3"):
        train(model_of(), blocks(), blocks(3, seed=6), settings(accumulate=3), device="cpu")


def test_scales_have_their_own_rate():
    """With a rate so small that nothing moves, the scales stay where they were, and the weights move."""
    start, model = model_of(bits=2), model_of(bits=2)
    train(model, blocks(), blocks(3, seed=6), settings(scale_learning_rate=1e-12), device="cpu")
    names = qat.decay_exempt(model)
    assert names
    for (name, before), after in zip(start.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(before, after, rtol=0, atol=1e-9) == (name in names), name


def test_without_a_rate_of_their_own_scales_have_that_of_the_weights():
    groups = make_optimizer(model_of(bits=2), settings()).param_groups
    assert [group["lr"] for group in groups] == [1e-2] * 3
    assert all(group["fused"] for group in groups)


def test_latents_of_16_bits_warn_and_their_lost_updates_are_telemetry(tmp_path):
    model = model_of(bits=2).bfloat16()
    run = Run.create(tmp_path / "run", {})
    telemetry = qat.telemetry.Telemetry(model)
    with pytest.warns(UserWarning, match="latent weights have 16 bits.*lost_updates.*model.float"):
        train(
            model,
            blocks(),
            blocks(3, seed=6),
            settings(learning_rate=1e-5),
            run=run,
            telemetry=telemetry,
            device="cpu",
        )
    assert all(0.5 < line["lost_updates"] < 1 for line in run.telemetry[1:])


class Poison(TrainerCallback):
    """Makes a weight NaN after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step == self.step:
            next(model.parameters()).data.fill_(math.nan)


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_what_was_recorded(tmp_path):
    run = Run.create(tmp_path / "run", {})
    config = settings(steps=20, evaluate_every=20)
    with pytest.raises(NonFiniteError, match=r"some name: the training loss is nan at step 4 of 20.*run") as stopped:
        train(
            model_of(),
            blocks(),
            blocks(3, seed=6),
            config,
            name="some name",
            run=run,
            callbacks=[Poison(3)],
            device="cpu",
        )
    assert "\n" not in str(stopped.value)
    assert [line["step"] for line in run.telemetry] == [0, 1, 2, 3, 4]
    assert math.isnan(run.telemetry[-1]["loss"])
    assert all(math.isfinite(line["loss"]) for line in run.telemetry[1:-1])


@pytest.mark.parametrize(("every", "seen"), [(3, 6), (100, 8)])
def test_losses_that_are_looked_at_later_name_the_same_step(tmp_path, monkeypatch, every, seen):
    """As on a GPU: the NaN of step 4 is seen at the next look, or before the first that is recorded."""
    monkeypatch.setattr("qat.training.train.look_every", lambda device: every)
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    run = Run.create(tmp_path / "run", {})
    config = settings(steps=20, evaluate_every=8, telemetry_every=20)
    with pytest.raises(NonFiniteError, match="the training loss is nan at step 4 of 20"):
        train(model_of(), blocks(), blocks(3, seed=6), config, run=run, callbacks=[Poison(3), Count()], device="cpu")
    assert steps[-1] == seen
    assert [line["step"] for line in run.telemetry] == [0, 4]


def test_a_long_run_has_as_many_lines_of_telemetry_as_a_short_one():
    assert settings(steps=6).telemetry_interval() == 1
    assert settings(steps=1280).telemetry_interval() == 10
    assert settings(steps=1280, telemetry_every=7).telemetry_interval() == 7


def test_a_validation_loss_that_is_not_finite_stops_too():
    with pytest.raises(NonFiniteError, match="the validation loss is nan at step 3 of 6"):
        train(
            model_of(),
            blocks(),
            blocks(3, seed=6),
            settings(evaluate_every=3),
            callbacks=[Poison(3)],
            device="cpu",
        )


def test_training_is_quiet_where_nobody_watches(capfd):
    train(model_of(), blocks(), blocks(3, seed=6), settings(), device="cpu")
    shown = capfd.readouterr()
    assert shown.out == "seed = 5\nseed = 6\n"  # those of the test's own data
    assert shown.err == ""


def test_a_terminal_gets_a_bar_with_the_loss_and_the_time_left(capfd, monkeypatch):
    monkeypatch.setattr("spectra.cli.progress.on_terminal", lambda: True)
    train(model_of(), blocks(), blocks(3, seed=6), settings(), name="2 bit, winq", device="cpu")
    bar = capfd.readouterr().err
    assert "2 bit, winq" in bar
    assert "/6" in bar
    assert "<" in bar  # elapsed<left


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 1 or more, got 0"),
        ({"batch_size": -1}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate is a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is a number above 0"),
        ({"schedule": "linear"}, "unknown schedule 'linear': choose one of constant, cosine, wsd"),
        ({"warmup": 1.5}, "warmup is a share"),
        ({"weight_decay": -0.1}, "weight_decay is 0 or more"),
        ({"gradient_clip": math.nan}, "gradient_clip is 0 or more"),
        ({"evaluate_every": -1}, "evaluate_every is 0 or more"),
        ({"seed": -1}, "a seed is a whole number"),
        ({"accumulate": 0}, "accumulate is 1 or more"),
        ({"telemetry_every": -1}, "telemetry_every is 0 or more"),
        ({"scale_learning_rate": 0.0}, "scale_learning_rate is a number above 0"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8': choose one of auto, float32, bfloat16"),
        ({"rank_noise": "none"}, "unknown rank_noise 'none': choose one of same, own"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)
