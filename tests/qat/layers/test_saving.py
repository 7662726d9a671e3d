"""Folders of quantized models: quantized values for every tool, latents and scales for this one, checkpoints kept."""

import copy
import json
import pickle
import weakref

import pytest
import torch
from quantized_models import BITS, VOCABULARY, assert_same_codes_and_scales, logits, plain, trained
from safetensors.torch import load_file

import qat
from qat.layers.saving import CHECKPOINT_WEIGHTS, FOLDER, LATENTS, SETTINGS
from spectra.backend.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BOTH = {"quantize_head": True, "quantize_embeddings": True}


@pytest.fixture(autouse=True)
def quiet():
    from spectra.integrations.loading import quiet_transformers

    with quiet_transformers():
        yield


def from_pretrained(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("which", [{}, BOTH, {"quantize_head": True}])
def test_a_saved_model_is_itself_with_qat_load_and_quantized_elsewhere(family, bits, which, tmp_path):
    model = trained(family, bits, **which)
    model.save_pretrained(tmp_path)
    loaded = qat.load(tmp_path)
    assert_same_codes_and_scales(model, loaded)
    latents = model.state_dict()
    assert loaded.state_dict().keys() == latents.keys()
    assert all(torch.equal(tensor, latents[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits(loaded), logits(model))
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, loaded)]
    assert tied == [True, True]
    elsewhere = from_pretrained(tmp_path)
    assert torch.allclose(logits(elsewhere), logits(model), rtol=0, atol=1e-5)
    for name, layer in qat.quant_layers(model):
        assert torch.equal(elsewhere.get_parameter(f"{name}.weight"), layer.quantized_weight()), name
        assert not torch.equal(layer.quantized_weight(), layer.weight)


@pytest.mark.parametrize(
    ("bits", "quantizer", "group"),
    [(1.58, "bitnet", None), (2, "quest", None), (3, "quest", 32), (4, "parq", 32), (2, "seq", 16), (4, "rtn", 32)],
)
def test_computed_scales_and_groups_come_back(bits, quantizer, group, tmp_path):
    model = trained("gpt2", bits, quantizer=quantizer, group_size=group)
    model.save_pretrained(tmp_path)
    loaded = qat.load(tmp_path)
    assert_same_codes_and_scales(model, loaded)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.qat_config == model.qat_config == qat.QuantConfig(bits=bits, quantizer=quantizer, group_size=group)


def test_searched_initial_scales_are_not_searched_again(tmp_path, monkeypatch):
    from qat.layers import linear

    model = trained(initial_scale="mse")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(linear, "least_error_scale", None)
    loaded = qat.load(tmp_path)
    assert loaded.qat_config.initial_scale == "mse"
    assert torch.equal(logits(loaded), logits(model))


def test_training_goes_on_from_a_loaded_model_as_from_the_saved_one(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    losses = []
    for start in (model, qat.load(tmp_path)):
        start.train()
        optimizer = torch.optim.SGD(start.parameters(), lr=0.1)
        ids = torch.arange(24).view(2, 12) % VOCABULARY
        for _ in range(2):
            loss = start(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(start(input_ids=ids, labels=ids).loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("which", [{}, BOTH])
def test_the_dtype_of_the_model_is_kept(dtype, which, tmp_path):
    plain("llama").save_pretrained(tmp_path / "plain")
    model = from_pretrained(tmp_path / "plain", dtype=dtype)  # unlike .to(dtype), with rotary frequencies in float32
    qat.quantize_model(model, qat.QuantConfig(bits=3, **which))
    model.eval().save_pretrained(tmp_path)
    for loaded in (qat.load(tmp_path), from_pretrained(tmp_path)):
        assert logits(loaded).dtype == dtype
        assert torch.equal(logits(loaded), logits(model))


def test_shards_copies_and_pickles_are_saved_as_what_they_are(tmp_path):
    model = trained()
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for index, other in enumerate(others):
        with torch.no_grad():
            for _, layer in qat.quant_layers(other):
                layer.weight.mul_(-1)
        folder = tmp_path / str(index)
        other.save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        assert torch.equal(logits(qat.load(folder)), logits(other))
        assert torch.equal(logits(from_pretrained(folder)), logits(other))
        assert not torch.equal(logits(other), logits(model))


def test_a_given_state_dict_is_saved_instead_of_the_models_own(tmp_path):
    model, average = trained(), trained(seed=1)
    model.save_pretrained(tmp_path, state_dict=average.state_dict())
    assert torch.equal(logits(qat.load(tmp_path)), logits(average))
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(average))


def test_a_model_inside_a_model_is_saved_too(tmp_path):
    model = trained()
    model.model.save_pretrained(tmp_path)
    assert torch.equal(logits(qat.load(tmp_path)), logits(model.model))


def test_saving_changes_nothing_and_keeps_nothing_alive(tmp_path):
    model = trained(quantize_head=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert model.config.tie_word_embeddings is True
    assert {**model.config.to_dict(), "architectures": None, "dtype": None} == {
        **config,
        "architectures": None,
        "dtype": None,
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["tie_word_embeddings"] is False, "one of the two alone is quantized, so they are two matrices now"
    reference = weakref.ref(model)
    del model
    assert reference() is None


def trainer_of(folder, model, **options):
    import oracles
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(0, VOCABULARY, (12, 8), generator=oracles.generator(2))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])


@pytest.mark.parametrize(("bits", "quantizer"), [(2, "auto"), (4, "rtn")])
def test_the_trainer_resumes_from_latents_and_other_tools_get_quantized_values(bits, quantizer, tmp_path):
    def fresh():
        model = plain("llama")
        qat.quantize_model(model, qat.QuantConfig(bits=bits, quantizer=quantizer, **BOTH))
        return model

    whole, resumed = fresh(), fresh()
    trainer_of(tmp_path / "whole", whole).train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    trainer_of(tmp_path / "resumed", resumed).train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items()), (
        "resumed training ends with the same latents and scales"
    )
    last = tmp_path / "whole" / "checkpoint-6"
    assert torch.equal(logits(qat.load(last)), logits(whole.eval()))
    assert torch.equal(logits(from_pretrained(last)), logits(whole))
    assert (last / CHECKPOINT_WEIGHTS).is_file()
    trainer = trainer_of(tmp_path / "saved", whole)
    trainer.save_model()
    assert not (tmp_path / "saved" / CHECKPOINT_WEIGHTS).exists()
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(whole))


def test_the_folder_says_how_it_was_made(tmp_path):
    model = trained(bits=3, skip="*.mlp.*")
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / FOLDER / SETTINGS).read_text())
    assert settings["config"]["bits"] == 3
    assert settings["config"]["skip"] == ["*.mlp.*"]
    assert settings["versions"]["torch"] == torch.__version__
    assert set(load_file(tmp_path / FOLDER / LATENTS)) == {
        f"{name}.{part}" for name, _ in qat.quant_layers(model) for part in ("weight", "scale")
    }


def refusal(folder):
    with pytest.raises(InputError) as caught:
        qat.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_quantized_model_is_refused_in_a_line(tmp_path):
    assert "there is no folder" in refusal(tmp_path / "nothing")
    plain("llama").save_pretrained(tmp_path / "plain")
    assert "has no quantization/settings.json" in refusal(tmp_path / "plain")
    trained().save_pretrained(tmp_path / "model")
    plain("llama", seed=3).save_pretrained(tmp_path / "model")  # over it, and the latents stay
    assert "has other weights in model.layers.0.self_attn.q_proj" in refusal(tmp_path / "model")
    trained().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / FOLDER / SETTINGS
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "layers": content["layers"][1:]}))
    assert "has 7 layers to quantize, where 6 are described" in refusal(tmp_path / "model")
    path.write_text(json.dumps({**content, "config": {**content["config"], "spin": 1}}))
    assert "written by another version" in refusal(tmp_path / "model")
    path.write_text("{")
    assert "cannot be read" in refusal(tmp_path / "model")
    path.write_text(json.dumps(content))
    (tmp_path / "model" / FOLDER / LATENTS).write_bytes(b"")
    assert "cannot be read" in refusal(tmp_path / "model")


def test_distributed_checkpoints_are_refused(tmp_path):
    with pytest.raises(InputError, match="distributed_checkpoint"):
        trained().save_pretrained(tmp_path, distributed_checkpoint=True)
