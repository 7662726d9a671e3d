"""torchao's tensors, read back by transformers: the logits of the quantized model."""

import pytest
import torch
from quantized_models import BITS, logits, trained

import qat
from qat.export.command import export
from spectra.backend.errors import InputError
from spectra.integrations.loading import quiet_transformers

pytest.importorskip("torchao", reason="torchao is not installed: make test-peers")


@pytest.fixture(autouse=True)
def quiet():
    with quiet_transformers():
        yield


@pytest.mark.parametrize(("bits", "group"), [*((bits, None) for bits in BITS), (2, 32), (4, 32)])
@pytest.mark.parametrize("which", [{}, {"quantize_head": True}])
def test_transformers_loads_the_same_logits(bits, group, which, tmp_path):
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from transformers import AutoModelForCausalLM

    model = trained("llama", bits, group_size=group, **which)
    model.save_pretrained(tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "out", format="torchao")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, _ in qat.quant_layers(model):
        assert isinstance(loaded.get_parameter(f"{name}.weight"), IntxUnpackedToInt8Tensor), name
    assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gpt2", {}, "is a Conv1D"),
        ("llama", {"quantize_embeddings": True}, "quantized Embedding"),
        ("llama", {"quantizer": "quest"}, "no integers times a scale"),
    ],
)
def test_what_has_no_such_tensor_is_refused(family, config, message, tmp_path):
    trained(family, 2, steps=0, **config).save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=message) as caught:
        export(tmp_path / "saved", tmp_path / "out", format="torchao")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
