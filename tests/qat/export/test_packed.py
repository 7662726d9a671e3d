"""Packed folders: the size, the layout, and the exported model's logits bit for bit, at every width."""

import copy
import json

import pytest
import torch
from quantized_models import BITS, assert_same_codes_and_scales, logits, trained
from safetensors.torch import load_file

import qat
from qat.export.command import export, in_words
from qat.export.pack import unpack
from qat.layers.saving import FOLDER, SETTINGS
from spectra.backend.errors import InputError
from spectra.integrations.loading import quiet_transformers

BOTH = {"quantize_head": True, "quantize_embeddings": True}


@pytest.fixture(autouse=True)
def quiet():
    with quiet_transformers():
        yield


def packed(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return export(tmp_path / "saved", tmp_path / "packed", format="packed")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("which", [{}, BOTH, {"quantize_head": True}])
def test_packed_weights_give_the_same_logits_in_their_bits(family, bits, which, tmp_path):
    model = trained(family, bits, **which)
    made = packed(model, tmp_path)
    loaded = qat.load(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model))
    assert_same_codes_and_scales(model, loaded)
    layers = {id(layer.weight): layer for _, layer in qat.quant_layers(model)}.values()
    weights, scales = sum(layer.weight.numel() for layer in layers), sum(layer.scale.numel() for layer in layers)
    assert made.weights == weights
    assert made.facts["code_bytes"] <= 1.05 * bits * weights / 8
    assert made.facts["scale_bytes"] == 4 * scales
    assert all("weight" not in layer._parameters for _, layer in qat.quant_layers(loaded))
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(model))


@pytest.mark.parametrize(
    ("bits", "quantizer", "group"),
    [(1.58, "bitnet", None), (2, "quest", 32), (3, "parq", None), (2, "seq", 16), (4, "rtn", None), (8, "rtn", 32)],
)
def test_every_scheme_is_packed(bits, quantizer, group, tmp_path):
    model = trained("gpt2", bits, quantizer=quantizer, group_size=group)
    packed(model, tmp_path)
    assert torch.equal(logits(qat.load(tmp_path / "packed")), logits(model))


def test_the_file_can_be_read_by_its_description_alone(tmp_path):
    model = trained(bits=3)
    packed(model, tmp_path)
    settings = json.loads((tmp_path / "packed" / FOLDER / SETTINGS).read_text())
    tensors = load_file(tmp_path / "packed" / FOLDER / "packed.safetensors")
    for name, layer in qat.quant_layers(model):
        about = settings["layers"][name]
        values = torch.tensor(about["code_values"])
        rows, columns = about["shape"]
        codes = values[unpack(tensors[f"{name}.codes"], rows * columns, len(values)).long()].view(rows, columns)
        assert torch.equal(codes, layer.codes().long())
        assert torch.equal(codes * tensors[f"{name}.scale"], layer.quantized_weight()), "lsq: q = scale * code"
    assert torch.equal(tensors["model.norm.weight"], model.model.norm.weight)
    assert not list((tmp_path / "packed").glob("*.safetensors")), "nothing that another program takes for weights"


def test_packed_models_are_not_trained_saved_or_packed_again(tmp_path):
    packed(trained(), tmp_path)
    loaded = qat.load(tmp_path / "packed")
    for refused in (
        lambda: qat.interpolate_(loaded, alpha=0.5),
        lambda: loaded.save_pretrained(tmp_path / "again"),
        lambda: export(tmp_path / "packed", tmp_path / "again", format="packed"),
    ):
        with pytest.raises(InputError, match="latent") as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_exported_is_refused_in_a_line(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for message, arguments in {
        "--format is one of packed, torchao, gguf, got 'onnx'": (tmp_path / "saved", tmp_path / "out", "onnx"),
        "exists already": (tmp_path / "saved", tmp_path / "full", "packed"),
        "there is no folder": (tmp_path / "nothing", tmp_path / "out", "packed"),
    }.items():
        with pytest.raises(InputError, match=message):
            export(*arguments[:2], format=arguments[2])
    assert not (tmp_path / "out").exists()


def test_a_damaged_packed_folder_is_refused(tmp_path):
    packed(trained(), tmp_path)
    path = tmp_path / "packed" / FOLDER / SETTINGS
    content = json.loads(path.read_text())
    name = next(iter(content["layers"]))
    content["layers"][name]["shape"] = [1, 2]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"has .* of shape"):
        qat.load(tmp_path / "packed")
    (tmp_path / "packed" / FOLDER / "packed.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        qat.load(tmp_path / "packed")


def test_the_sentence_of_the_command(tmp_path):
    made = packed(trained(bits=1.58), tmp_path)
    assert "1.6 bits a weight" in in_words(made)
    assert f"{made.weights:,} quantized weights" in in_words(made)
