"""The compiled step: one compilation a run, whatever happens beside it, and the same loss as the model's own."""

from functools import partial

import pytest
import tiny_models
import torch
from oracles import generator
from torch._dynamo.testing import CompileCounter
from transformers import TrainerCallback

import qat
import spectra
from qat.text.corpus import Blocks
from qat.training.config import TrainConfig
from qat.training.evaluate import evaluate
from qat.training.noise import DrawnNoise
from qat.training.step import TrainingStep, checkpoint_activations, computation_facts, next_token_loss, resolved
from qat.training.train import train
from spectra.backend.errors import InputError


def blocks(count=12, length=8, seed=5):
    return Blocks(torch.randint(2, tiny_models.VOCABULARY, (count * length,), generator=generator(seed)), length)


def batch_of(count=2):
    rows = blocks(count).blocks
    return {"input_ids": rows, "labels": rows}


def model_of(architecture="llama", bits=2):
    model = tiny_models.causal_lm(architecture, dtype=torch.float32)
    if bits is not None:
        qat.quantize_model(model, qat.QuantConfig(bits=bits))
    return model.train()


class Beside(TrainerCallback):
    """What may happen between two steps: validation, telemetry, a spectrum, a generated text."""

    def __init__(self, model, folder):
        self.model = model
        batch = batch_of()
        modes = {
            "ste": partial(qat.hessian_operator, mode="ste"),
            "latent": partial(qat.hessian_operator, mode="latent"),
        }
        self.probe = spectra.SpectrumProbe(
            model, [batch], out=folder, modes=modes, probes=1, steps=3, count_products=0, strict=True
        )
        self.telemetry = qat.telemetry.Telemetry(model)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (2, 5):
            evaluate(self.model, blocks(3))
            self.telemetry.measure()
            self.probe.measure(state.global_step)
            self.model.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_resets_validation_telemetry_and_spectra_compile_nothing_again(architecture, tmp_path, monkeypatch):
    model, counter = model_of(architecture), CompileCounter()
    monkeypatch.setattr("qat.training.train.TrainingStep", partial(TrainingStep, backend=counter))
    config = TrainConfig(steps=8, batch_size=4, learning_rate=1e-3, evaluate_every=3, compile=True)
    winq, beside = qat.WinQCallback(every=3), Beside(model, tmp_path / "run")
    telemetry = qat.telemetry.Telemetry(model)
    train(model, blocks(), blocks(3), config, callbacks=[winq, beside], telemetry=telemetry, device="cpu")
    assert winq.resets == [3, 6]
    assert len(beside.probe.run.records) == 4
    assert counter.frame_count == 1  # the whole step is one graph, compiled once
    assert not isinstance(model, torch._dynamo.OptimizedModule)
    assert model._compiled_call_impl is None


def test_a_compiled_training_is_the_eager_one(monkeypatch):
    """With the compiler left out ("eager" backend), the traced graph computes the same, noise included."""
    results = []
    for compiled in (False, True):
        model = model_of()
        drawn = partial(TrainingStep, backend="eager", noise=DrawnNoise(model))
        monkeypatch.setattr("qat.training.train.TrainingStep", drawn)
        config = TrainConfig(steps=4, batch_size=4, learning_rate=1e-2, compile=compiled)
        train(model, blocks(), blocks(3), config, callbacks=[qat.WinQCallback(every=2, sigma=1e-2)], device="cpu")
        results.append(list(model.parameters()))
        assert all(layer.drawn_noise is None for _, layer in qat.quant_layers(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_the_step_returns_the_models_own_loss_alone(architecture):
    model = model_of(architecture).eval()
    batch = batch_of()
    loss = TrainingStep(model)(**batch)
    assert loss.shape == ()
    assert torch.equal(loss, model(**batch).loss)
    assert torch.equal(loss, next_token_loss(model, batch))


def test_bfloat16_rounds_products_and_keeps_weights_gradients_and_loss_in_float32():
    model = model_of()
    batch, seen = batch_of(), []
    layer = qat.quant_layers(model)[0][1]
    layer.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    exact = TrainingStep(model)(**batch)
    rounded = TrainingStep(model, dtype="bfloat16")(**batch)
    rounded.backward()
    assert seen == [torch.float32, torch.bfloat16]
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded - exact) < 0.02 * exact
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad.dtype == torch.float32


def test_another_loss_takes_the_place_of_the_models():
    model, batch = model_of(), batch_of()
    step = TrainingStep(model, loss=lambda model, batch: 2 * next_token_loss(model, batch))
    torch.testing.assert_close(step(**batch), 2 * next_token_loss(model, batch))


def test_checkpointed_layers_draw_the_same_noise_again():
    """With weight noise and dropout, the gradients are those without checkpointing, bit for bit."""
    gradients = []
    for checkpointed in (False, True):
        model = model_of("opt")
        for _, layer in qat.quant_layers(model):
            layer.noise_sigma = 0.1
        if checkpointed:
            checkpoint_activations(model, True)
        torch.manual_seed(3)
        TrainingStep(model)(**batch_of()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    checkpoint_activations(model, False)
    assert not model.is_gradient_checkpointing


def test_checkpointing_stores_less_and_ends_with_the_training(monkeypatch):
    stored = []
    for checkpointed in (False, True):
        model, sizes = model_of(), []
        config = TrainConfig(steps=1, batch_size=4, learning_rate=1e-3, activation_checkpointing=checkpointed)

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        class Saved(TrainingStep):
            def forward(self, pack=pack, **batch):
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    return super().forward(**batch)

        monkeypatch.setattr("qat.training.train.TrainingStep", Saved)
        train(model, blocks(), blocks(3), config, device="cpu")
        stored.append(sum(sizes))
        assert not model.is_gradient_checkpointing
    assert stored[1] < 0.7 * stored[0]


def test_a_model_without_checkpointing_is_refused():
    with pytest.raises(InputError, match="Linear has no activation checkpointing: train without it"):
        checkpoint_activations(torch.nn.Linear(2, 2), True)


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler here\nand more")

    monkeypatch.setattr("qat.training.train.TrainingStep", partial(TrainingStep, backend=broken))
    config = TrainConfig(steps=1, batch_size=4, compile=True)
    with pytest.raises(InputError, match=r"torch.compile failed \(.*\): train with --no-compile") as refused:
        train(model_of(), blocks(), blocks(3), config, device="cpu")
    assert "\n" not in str(refused.value)


def test_auto_is_bfloat16_and_compiled_on_a_gpu_for_models_that_gain(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    large, small = torch.nn.Linear(4096, 4096), torch.nn.Linear(4, 4)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def choice(model, device, **given):
        config = resolved(TrainConfig(**given), model, device)
        return config.dtype, config.compile

    assert choice(large, gpu) == ("bfloat16", True)
    assert choice(small, gpu) == choice(large, cpu) == ("float32", False)
    assert choice(large, gpu, dtype="float32", compile=False) == ("float32", False)
    assert choice(small, cpu, dtype="bfloat16", compile=True) == ("bfloat16", True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    assert choice(large, gpu) == ("float32", True)
    facts = computation_facts(TrainConfig(), large, gpu)
    assert facts == {"computed_in": "float32", "compiled": True, "ranks": 1}
