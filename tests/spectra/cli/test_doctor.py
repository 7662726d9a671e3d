import json
import platform

import pytest
import saved_models
import torch

import spectra
from spectra.backend.extras import EXTRA_OF
from spectra.cli import doctor
from spectra.cli.main import main
from spectra.integrations.loading import load_model
from spectra.operators.hessian.isolation import attention_of, isolated
from spectra.runs.settings import MeasurementSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_models.save(tmp_path_factory.mktemp("model"))


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_what_is_installed_and_which_devices_there_are(capsys):
    assert main(["doctor", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert set(found["extras"]) == set(EXTRA_OF.values())
    cpu = found["devices"][0]
    assert (cpu["device"], cpu["threads"], cpu["float64_is_fast"]) == ("cpu", torch.get_num_threads(), False)
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert "model" not in found


def test_a_missing_extra_says_how_to_install_it(capsys, monkeypatch):
    find = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "pytorch_lightning" else find(name))
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("lightning")]
    assert line.endswith('without pytorch_lightning: pip install "spectra-qat[lightning]"')


def test_memory_that_is_short_is_seen(capsys, monkeypatch):
    monkeypatch.setattr("spectra.backend.memory.available", lambda device: 3 << 20)
    assert main(["doctor"]) == 0
    assert "3 MiB" in capsys.readouterr().out


def test_a_model_is_told_what_a_measurement_of_it_will_get(model, tmp_path, capsys):
    text = saved_models.write_text(tmp_path)
    quick = ["--probes", "2", "--steps", "6", "--count-products", "0", "--device", "cpu"]
    assert main(["measure", str(model), "--text", str(text), "--out", str(tmp_path / "run"), *quick]) == 0
    run = spectra.Run(tmp_path / "run")
    capsys.readouterr()
    assert main(["doctor", str(model), "--device", "cpu", "--json"]) == 0
    facts = strict(capsys.readouterr().out)["model"]
    (record,) = run.records
    assert (facts["engine"], facts["parameters"]) == (record.engine, record.dimension)
    assert (facts["length"], facts["sequences"]) == (run.config["length"], run.config["sequences"])
    assert facts["deflated"] == run.config["deflated"]
    settings = MeasurementSettings()
    assert (facts["probes"], facts["steps"]) == (settings.probes, settings.steps)
    assert facts["seconds_per_product"] > 0


def test_the_plan_is_that_of_the_library(model):
    facts = doctor.model_facts(str(model), "cpu")
    loaded = load_model(model)
    tokens = torch.zeros(facts["sequences"], facts["length"], dtype=torch.int64)
    with spectra.HessianOperator(loaded, [{"input_ids": tokens, "labels": tokens}], engine="reverse") as op:
        count = MeasurementSettings().count_products
        expected = spectra.plan(op, probes=facts["probes"], steps=facts["steps"], deflate=20, count_products=count)
    assert facts["plan"]["text"] == str(expected)
    assert facts["plan"]["peak"] == expected.peak


def test_the_attention_is_the_one_during_a_measurement(model):
    loaded = load_model(model)
    facts = doctor.model_facts(str(model), "cpu")
    with isolated(loaded):
        assert loaded.config._attn_implementation == facts["attention_measured"]
    own = loaded.config._attn_implementation
    assert attention_of(loaded, ("eager",)) == (own, "eager")
    with isolated(loaded, attention=("eager",)):
        assert loaded.config._attn_implementation == "eager"
    assert attention_of(torch.nn.Linear(2, 2)) == (None, None)


def test_another_attention_is_named_in_words():
    facts = {"model": "m", "class": "M", "kind": "a model", "parameters": 3, "plan": None}
    lines = doctor._model_lines(facts | {"attention": "flash_attention_2", "attention_measured": "eager"})
    assert "flash_attention_2; eager during a measurement" in lines[1]
    assert "needs your data" in lines[2]


@pytest.mark.parametrize("arguments", [["{tmp}/nowhere"], ["{model}", "--device", "abacus"]])
def test_bad_input_is_one_line(arguments, model, tmp_path, capsys):
    assert main(["doctor", *(argument.format(tmp=tmp_path, model=model) for argument in arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
