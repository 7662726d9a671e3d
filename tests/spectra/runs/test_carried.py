"""What a probe carries in a file: a probe that takes it over measures the same bits as the one that went on."""

import json

import pytest
import tiny_models
import torch

import qat
import spectra
from spectra.backend.errors import InputError
from spectra.runs.carried import Carried

OPTIONS = {"probes": 1, "steps": 8, "deflate": 3, "count_products": 100, "engine": "reverse", "strict": True}


def moved(model, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def probe_of(kind):
    model = tiny_models.mlp(inputs=12, hidden=16, outputs=9, dtype=torch.float32)
    if kind == "quantized":
        qat.quantize_model(model, qat.QuantConfig(bits=1))  # a part of the weights is masked
    inputs = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    batches = [(inputs, inputs[:, :9] ** 2)]
    return model, spectra.SpectrumProbe(model, batches, loss=torch.nn.functional.mse_loss, **OPTIONS)


@pytest.mark.parametrize("kind", ["network", "quantized"])
def test_a_probe_that_takes_over_measures_the_same_bits(kind, tmp_path):
    model, probe = probe_of(kind)
    probe.measure(0)
    probe.save_state(tmp_path / "a.safetensors")
    other, later = probe_of(kind)
    later.load_state(tmp_path / "a.safetensors")
    later.save_state(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    fresh_model, fresh = probe_of(kind)
    for each in (model, other, fresh_model):
        moved(each, 1)
    (want,), (found,), (cold,) = (each.measure(5) for each in (probe, later, fresh))
    assert probe._congruences
    assert probe._outliers
    assert (found.estimates, found.checks, found.notes) == (want.estimates, want.checks, want.notes)
    assert found.products == want.products
    assert (cold.estimates, cold.checks) != (want.estimates, want.checks)


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path):
    Carried().save(tmp_path / "empty.safetensors")
    assert Carried.load(tmp_path / "empty.safetensors") == Carried()
    for content in (b"", b"12345", json.dumps({"a": 1}).encode()):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read") as refused:
            Carried.load(tmp_path / "a.safetensors")
        assert "\n" not in str(refused.value)
