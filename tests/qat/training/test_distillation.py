"""Distillation against its equation, written out in float64, and a teacher that no training changes."""

import copy
import math

import pytest
import tiny_models
import torch
from oracles import dense_hessian, generator, normal, relative_error

import qat
from qat.layers.linear import full_precision_names
from qat.text.corpus import Blocks
from qat.training.config import TrainConfig
from qat.training.distillation import Distillation, DistillationConfig, divergence
from qat.training.step import TrainingStep
from qat.training.train import train
from spectra.backend.errors import InputError


def logits(seed, *shape):
    return 3 * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_and_its_gradient_are_the_closed_form(temperature):
    teacher, student = logits(1, 2, 3, 7), logits(2, 2, 3, 7).requires_grad_()
    p, q = ((each / temperature).softmax(-1) for each in (teacher, student))
    found = divergence(teacher, student, temperature=temperature)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(gradient, (q - p).detach() / temperature, rtol=1e-10, atol=1e-14)
    assert divergence(student, student).abs().max() == 0


def models(architecture="llama", bits=2):
    teacher = tiny_models.causal_lm(architecture, dtype=torch.float32)
    student = copy.deepcopy(teacher)
    qat.quantize_model(student, qat.QuantConfig(bits=bits))
    return teacher, student


def batch(ignored=()):
    tokens = torch.randint(2, tiny_models.VOCABULARY, (3, 8), generator=generator(4))
    labels = tokens.clone()
    for place in ignored:
        labels[place] = -100
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("ignored", [(), ((0, 3), (2, 7))])
@pytest.mark.parametrize(("weight", "temperature", "hidden"), [(0.0, 1.0, 0.0), (0.3, 2.0, 0.0), (1.0, 1.0, 0.7)])
def test_the_loss_is_its_equation(weight, temperature, hidden, ignored):
    teacher, student = models()
    student.eval()
    inputs = batch(ignored)
    found = Distillation(teacher, DistillationConfig(weight, temperature, hidden))(student, inputs)
    outputs = [m(input_ids=inputs["input_ids"], output_hidden_states=True) for m in (teacher, student)]
    counted = inputs["labels"][:, 1:] != -100
    logs = [(each.logits[:, :-1].double() / temperature).log_softmax(-1) for each in outputs]
    divergences = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)[counted].mean()
    plain = outputs[1].logits[:, :-1].double().log_softmax(-1)
    entropy = -plain.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0][counted].mean()
    pairs = zip(*(each.hidden_states[1:] for each in outputs), strict=True)
    seen = inputs["labels"] != -100
    errors = torch.stack([(a - b).double().square().mean(-1)[seen].mean() for a, b in pairs]).mean()
    want = (1 - weight) * entropy + weight * temperature**2 * divergences + hidden * errors
    assert found.item() == pytest.approx(want.item(), rel=2e-6)


def test_without_weight_it_is_the_models_own_loss_and_its_gradient():
    teacher, student = models()
    student.train()
    grads = []
    for loss in (Distillation(teacher, DistillationConfig(0.0))(student, batch()), student(**batch()).loss):
        student.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_teacher_that_is_the_student_costs_nothing_and_gives_no_gradient():
    teacher = tiny_models.causal_lm("llama", dtype=torch.float32)
    student = copy.deepcopy(teacher)
    loss = Distillation(teacher, DistillationConfig(1.0, 2.0, 1.0))(student, batch())
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-5


def test_the_teacher_computes_without_dropout_or_gradient_and_is_not_trained():
    teacher, student = models("opt")  # with dropout
    teacher.train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distillation = Distillation(teacher, DistillationConfig(0.9))
    seen = []
    teacher.register_forward_hook(lambda module, given, output: seen.append((module.training, output.logits)))
    tokens = torch.randint(2, tiny_models.VOCABULARY, (96,), generator=generator(5))
    data = Blocks(tokens, 8)
    config = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2)
    train(student, data, data, config, device="cpu", loss=distillation)
    assert len(seen) == 3
    assert not any(training or logits.requires_grad for training, logits in seen)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_distilling_brings_the_student_nearer_to_its_teacher():
    tokens = torch.randint(2, tiny_models.VOCABULARY, (320,), generator=generator(5))
    data, far = Blocks(tokens, 8), []
    for weight in (0.0, 1.0):
        teacher, student = models(bits=4)
        config = TrainConfig(steps=20, batch_size=8, learning_rate=3e-3)
        train(student, data, data, config, device="cpu", loss=Distillation(teacher, DistillationConfig(weight)))
        with torch.no_grad():
            rows = data.blocks
            pair = [m.eval()(input_ids=rows).logits for m in (teacher, student)]
        far.append(divergence(*pair).mean().item())
    assert far[1] < 0.5 * far[0]


def test_its_hessian_is_that_of_the_loss_and_not_of_the_cross_entropy():
    """The "quantized" mode against the dense Hessian of the plain student at Q(W), in float64."""
    teacher = tiny_models.causal_lm("llama", dtype=torch.float64)
    student = copy.deepcopy(teacher)
    qat.quantize_model(student, qat.QuantConfig(bits=2))
    twin = copy.deepcopy(teacher).eval()
    twin.set_attn_implementation("eager")  # fused attention has no second derivative
    plain = dict(twin.named_parameters())
    chosen = []
    with torch.no_grad():
        for name, layer in full_precision_names(student).items():
            plain[name].copy_(layer.quantized_weight())
            chosen.append(plain[name])
    distillation = Distillation(teacher, DistillationConfig(0.6, 2.0, 0.3))
    op = qat.hessian_operator(student.eval(), [batch()], mode="quantized", loss=distillation)
    dense = dense_hessian(distillation(twin, batch()), chosen)
    other = dense_hessian(twin(**batch()).loss, chosen)
    vector = normal(len(dense), seed=3)
    assert relative_error(op @ vector, dense @ vector) < 1e-6
    assert relative_error(op @ vector, other @ vector) > 0.1


def test_the_loss_is_compiled_whole():
    """Without a break of the graph, so that a GPU gets one compiled step, teacher and student."""
    teacher, student = models()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = []
    for compiled in (False, True):
        loss = Distillation(teacher, DistillationConfig(0.5, 2.0, 0.1))
        step = TrainingStep(student, compiled=compiled, backend="eager", loss=loss)
        student.zero_grad()
        losses.append(step(**batch()))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 1.5}, "between 0 and 1, got 1.5"),
        ({"weight": math.nan}, "between 0 and 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"hidden": -1.0}, "0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        DistillationConfig(**given)


def test_a_teacher_of_another_vocabulary_or_depth_is_refused():
    _, student = models()
    other = tiny_models.causal_lm("gpt2", dtype=torch.float32)
    other.resize_token_embeddings(tiny_models.VOCABULARY + 3)
    with pytest.raises(InputError, match="the teacher knows 27 tokens and the student 24"):
        Distillation(other)(student, batch())
