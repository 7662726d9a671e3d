"""PARQ: its schedule, what a training computes with along it, and where it ends."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from oracles import dense_hessian, normal, relative_error
from tiny_models import causal_lm, mlp, regression, token_batches
from torch import nn

import qat
from qat.training.parq import inverse_slope
from spectra import HessianOperator
from spectra.backend.errors import InputError


def parq_model(bits=2, group_size=None):
    plain = mlp(seed=3)
    model = copy.deepcopy(plain)
    qat.quantize_model(model, qat.QuantConfig(bits=bits, quantizer="parq", group_size=group_size))
    return plain, model


def test_the_inverse_slope_falls_from_one_to_zero_as_a_sigmoid():
    config = qat.PARQConfig(start=0.2, end=0.8, steepness=10)
    assert [inverse_slope(progress, config) for progress in (0, 0.1, 0.2, 0.8, 1)] == [1, 1, 1, 0, 0]
    assert inverse_slope(0.5, config) == pytest.approx(0.5)
    values = [inverse_slope(progress / 100, config) for progress in range(21, 80)]
    assert all(1 > one > other > 0 for one, other in pairwise(values))
    for done in (0.1, 0.3, 0.77):
        sigmoids = [1 / (1 + math.exp(10 * (t - 0.5))) for t in (done, 0, 1)]
        want = (sigmoids[0] - sigmoids[2]) / (sigmoids[1] - sigmoids[2])
        assert inverse_slope(0.2 + 0.6 * done, config) == pytest.approx(want, rel=1e-9)
    assert inverse_slope(0.25, qat.PARQConfig(0, 1, 1e-3)) == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.5, "end": 0.5}, "start and end are parts of the run"),
        ({"start": -0.1}, "start and end are parts of the run"),
        ({"end": 1.1}, "got start=0.0, end=1.1"),
        ({"end": None}, "start and end are parts of the run"),
        ({"start": float("nan")}, "start and end are parts of the run"),
        ({"steepness": 0}, "steepness must be above 0"),
        ({"steepness": float("nan")}, "steepness must be above 0"),
    ],
)
def test_refusals(options, message):
    for settings in (qat.PARQConfig, qat.PARQCallback):
        with pytest.raises(InputError, match=message) as caught:
            settings(**options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("group_size", [None, 2])
def test_a_training_begins_in_full_precision_and_ends_on_the_grid(group_size):
    plain, model = parq_model(group_size=group_size)
    x, parq = normal(5, 4, seed=1), qat.PARQ(qat.PARQConfig(start=0.25, end=0.75))
    model.train()
    on_grid = model.eval()(x)
    with pytest.raises(InputError, match="start it first"):
        parq.step(1)
    distances = []
    parq.start(model.train(), 8)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    for step in range(1, 9):
        distances.append((model.train()(x) - on_grid).norm().item())
        assert torch.equal(model.eval()(x), on_grid), "evaluation is on the grid always"
        parq.step(step)
    assert distances[0] == distances[2] > distances[3] > distances[4] >= distances[5] >= distances[6] == 0
    assert distances[6] == distances[7], "the grid is reached at three quarters"
    parq.start(model.train(), 8, done=3)
    resumed = model(x)
    parq.start(model, 8)
    parq.step(3)
    assert torch.equal(model(x), resumed)
    parq.stop()
    parq.stop()
    assert torch.equal(model.train()(x), on_grid), "a run that was cut short computes with the grid"
    with pytest.raises(InputError, match="no layer of the model is quantized by parq"):
        parq.start(mlp(), 8)


def test_the_gradient_is_taken_at_the_annealed_weights_and_goes_to_the_latent_ones():
    plain, model = parq_model(bits=3)
    x, parq = normal(5, 4, seed=1), qat.PARQ(qat.PARQConfig(0, 1))
    parq.start(model.train(), 10, done=4)
    model(x).pow(3).sum().backward()
    first = model[0]
    with torch.no_grad():
        for index in (0, 2):
            plain[index].weight.copy_(model[index].training_weight())
    assert not torch.equal(plain[0].weight, first.weight)
    assert not torch.equal(plain[0].weight, first.quantized_weight())
    plain(x).pow(3).sum().backward()
    torch.testing.assert_close(first.weight.grad, plain[0].weight.grad)


def test_a_spectrum_in_train_mode_is_that_at_the_annealed_weights():
    plain, model = parq_model(bits=3)
    batches, parq = regression((5,), seed=4), qat.PARQ(qat.PARQConfig(0, 1))
    parq.start(model.train(), 10, done=4)
    names = ["0.weight", "2.weight"]
    found = HessianOperator(model, batches, params=names, training=True).to_dense()
    on_grid = HessianOperator(model, batches, params=names).to_dense()
    with torch.no_grad():
        for index in (0, 2):
            plain[index].weight.copy_(model[index].training_weight())
    want = dense_hessian(F.mse_loss(plain(batches[0][0]), batches[0][1]), [plain[0].weight, plain[2].weight])
    assert relative_error(found, want) < 1e-10
    assert relative_error(on_grid, want) > 1e-2


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of tokens, the same each time."""

    def __init__(self):
        self.tokens = torch.randint(2, 24, (16, 8), generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def test_the_trainer_anneals_by_optimizer_steps_and_ends_on_the_grid(tmp_path):
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = causal_lm("llama", dtype=torch.float32)
    qat.quantize_model(model, qat.QuantConfig(bits=2, quantizer="parq", group_size=4))
    layer, seen = next(layer for _, layer in qat.quant_layers(model)), []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(layer.scheme.inverse_slope.item())

    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 6, "use_cpu": True}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), save_strategy="no", report_to=[], disable_tqdm=True, learning_rate=1e-2, **options
    )
    callback = qat.PARQCallback(start=0.2, end=0.7)
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[callback, Look()]).train()
    want = [inverse_slope(step / 6, callback.config) for step in range(6)]
    assert seen == pytest.approx(want, rel=1e-6)
    assert seen[0] == 1
    assert seen[-1] == 0
    batch = token_batches()[0]
    assert torch.equal(model.train()(**batch).logits, model.eval()(**batch).logits)


def test_it_learns_a_teacher_on_the_grid_and_ends_at_it():
    x = normal(64, 16, seed=1)
    target = x @ torch.where(normal(1, 16, seed=2) > 0, 0.3, -0.3).double().t()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 1, bias=False)).double()
    qat.quantize_model(model, qat.QuantConfig(bits=1, quantizer="parq"))
    start = F.mse_loss(model(x), target).item()
    optimizer, parq = torch.optim.SGD(model.parameters(), lr=0.05), qat.PARQ()
    parq.start(model.train(), 200)
    for step in range(1, 201):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        parq.step(step)
    parq.stop()
    assert start > 0.1
    assert F.mse_loss(model.eval()(x), target).item() < 1e-3 * start
