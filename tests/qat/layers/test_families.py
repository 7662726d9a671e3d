"""Every kind of model by one rule: the quantized model computes what the plain one does with Q(W) as its weights."""

import copy

import model_families
import pytest
import torch
import transformers as t
from model_families import COMMON, MODERN
from torch import nn

import qat
from qat.layers.linear import full_precision_names

# How many modules and parameters are swapped, and the least share of all parameters that is quantized.
LANGUAGE = {
    "llama": (14, 0.70),
    "gemma2": (14, 0.80),
    "gemma3": (14, 0.80),
    "phi": (12, 0.65),
    "phi3": (8, 0.70),
    "gpt-j": (12, 0.75),
    "falcon": (8, 0.85),
    "bloom": (8, 0.80),
    "mpt": (8, 0.85),
    "gpt-bigcode": (8, 0.70),
    "mixtral": (12, 0.85),
    "olmoe": (12, 0.85),
    "granite-moe": (12, 0.85),
    "mamba": (8, 0.70),
    "jamba": (13, 0.80),
    "recurrent-gemma": (19, 0.70),
}
TOKENS = torch.arange(2, 26).reshape(2, 12)


def plain_twin(model, plain):
    twin = copy.deepcopy(plain)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, layer in full_precision_names(model).items():
            parameters[name].copy_(layer.quantized_weight())
    return twin


def quantized(plain):
    model = copy.deepcopy(plain)
    report = qat.quantize_model(model, qat.QuantConfig(bits=2))
    matrices = {
        name
        for name, module in plain.named_modules()
        if any(p is not None and p.dim() >= 2 for p in module._parameters.values())
    }
    owners = {name.rpartition(".")[0] for name in report.swapped}
    assert matrices <= {*report.swapped, *report.skipped, *owners}, "each matrix is swapped or has a reason"
    assert report.weight_count == sum(layer.weight.numel() for _, layer in qat.quant_layers(model))
    assert f"{report.share:.1%} of all parameters" in str(report)
    return model, report


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    swapped, share = LANGUAGE[name]
    plain = model_families.causal_lm(name)
    model, report = quantized(plain)
    assert len(report.swapped) == swapped
    assert share < report.share < share + 0.1
    twin = plain_twin(model, plain)
    logits = model(input_ids=TOKENS, labels=TOKENS)
    assert torch.equal(logits.logits, twin(input_ids=TOKENS).logits)
    assert not torch.equal(logits.logits, plain(input_ids=TOKENS).logits)
    logits.loss.backward()
    assert all(layer.weight.grad is not None for _, layer in qat.quant_layers(model))


def mamba():
    torch.manual_seed(0)
    config = t.MambaConfig(**COMMON, hidden_size=16, state_size=4, num_hidden_layers=1)
    return t.MambaForCausalLM(config).eval()


def test_a_mixer_that_reads_weights_past_its_layers_reads_the_quantized_ones():
    """Mamba reads dt_proj.weight; WinQ's noise and resets reach it, and copies compute the same."""
    model = mamba()
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    layer = model.backbone.layers[0].mixer.dt_proj
    logits = model(input_ids=TOKENS).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=TOKENS).logits, logits)
    qat.interpolate_(model, alpha=0.5)
    assert torch.equal(model(input_ids=TOKENS).logits, logits)
    with torch.no_grad():
        layer.weight.neg_()
    assert not torch.equal(model(input_ids=TOKENS).logits, logits)
    for mode in qat.MODES:
        batches = [{"input_ids": TOKENS, "labels": TOKENS}]
        operator = qat.hessian_operator(model, batches, mode, sigma=1e-2, draws=1, params=["*mixer*proj.weight"])
        assert operator.symmetry_gap() < 1e-5


def test_what_a_mixer_reads_is_left_where_activations_are_quantized():
    report = qat.quantize_model(mamba(), qat.QuantConfig(bits=2, activation_bits=8))
    assert report.swapped == ("backbone.layers.0.mixer.in_proj",)
    for child in ("x_proj", "dt_proj", "out_proj"):
        reason = report.skipped[f"backbone.layers.0.mixer.{child}"]
        assert reason == "MambaMixer reads its weight without calling it"


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read, self.asked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.called(x) @ self.read.weight.t() + self.read.bias
        return self.asked(x.to(self.asked.weight.dtype))


class ReadsElsewhere(Reads):
    def forward(self, x):
        return self.inner(self.called(x))

    def inner(self, x):
        return self.asked(x @ self.read.weight.t())


def test_modules_of_ones_own_that_read_a_weight():
    torch.manual_seed(0)
    plain = nn.Sequential(Reads())
    model, report = quantized(plain)
    assert report.swapped == ("0.called", "0.read", "0.asked")
    x = torch.randn(3, 4)
    assert torch.equal(model(x), plain_twin(model, plain)(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    report = qat.quantize_model(nn.Sequential(ReadsElsewhere()), qat.QuantConfig(bits=2))
    assert report.swapped == ("0.called", "0.asked")
    assert report.skipped == {"0.read": "ReadsElsewhere reads its weight without calling it"}


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_encoders_and_classifiers(activation_bits):
    torch.manual_seed(0)
    shape = {key: MODERN[key] for key in MODERN if key != "max_position_embeddings"}
    text, image = {"input_ids": TOKENS}, {"pixel_values": torch.randn(2, 3, 8, 8)}
    cases = (
        (t.BertForSequenceClassification(t.BertConfig(**COMMON, **MODERN, num_labels=3)), text, 13),
        (t.DistilBertModel(t.DistilBertConfig(**COMMON, dim=16, n_layers=2, n_heads=4, hidden_dim=24)), text, 12),
        (t.ViTForImageClassification(t.ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3)), image, 12),
    )
    for plain, inputs, count in cases:
        plain = plain.eval()
        model = copy.deepcopy(plain)
        report = qat.quantize_model(model, qat.QuantConfig(bits=2, activation_bits=activation_bits))
        assert len(report.swapped) == count, report.swapped
        found, twin = model(**inputs)[0], plain_twin(model, plain)(**inputs)[0]
        assert torch.equal(found, twin) == (activation_bits == 16)
        assert (found - twin).abs().max() < 0.1 * twin.abs().max()
        found.square().sum().backward()
        grads = [layer.weight.grad is not None for name, layer in qat.quant_layers(model) if "pooler" not in name]
        assert all(grads)
