"""`spectra measure` of encoders, classifiers and vision models, and with a loss of the user's own."""

import csv
import json
import sys

import numpy as np
import pytest
import saved_encoders
import saved_models
import torch

from spectra import HessianOperator, Run
from spectra.cli.main import main
from spectra.integrations.architectures import MASKED, OTHER, SEQUENCE
from spectra.integrations.labelled import labelled_batches, read_labelled
from spectra.integrations.loading import load_model, load_tokenizer
from spectra.integrations.masked import masked_batches

QUICK = ["--probes", "2", "--steps", "5", "--count-products", "0", "--params", "*output*", "--sequences", "4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models by name, in folders."""
    root = tmp_path_factory.mktemp("models")
    heads = {
        "masked": "BertForMaskedLM",
        "sequence": "BertForSequenceClassification",
        "tokens": "BertForTokenClassification",
    }
    found = {name: saved_encoders.save_bert(root / name, head, num_labels=3) for name, head in heads.items()}
    return {**found, "vit": saved_encoders.save_vit(root / "vit"), "causal": saved_models.save(root / "causal")}


@pytest.fixture
def data(tmp_path):
    """Options that give each kind of data."""
    return {
        "text": ["--text", str(saved_models.write_text(tmp_path))],
        "labelled": ["--labelled", str(saved_encoders.write_rows(tmp_path, saved_encoders.some_rows()))],
        "images": ["--images", str(saved_encoders.write_images(tmp_path / "images"))],
    }


def refused(capsys, code):
    """The one line of an error."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def loss_of(model, batches):
    with HessianOperator(model, batches) as op:
        return op.loss()


def test_a_masked_language_model_gets_a_masked_token_loss(folders, data, tmp_path, capsys):
    out = str(tmp_path / "run")
    command = ["measure", str(folders["masked"]), *data["text"], "--out", out, *QUICK]
    assert main([*command, "--mask-seed", "3"]) == 0
    printed = capsys.readouterr().out
    model, tokenizer = load_model(folders["masked"], kind=MASKED), load_tokenizer(folders["masked"])
    batches, note = masked_batches(model, tokenizer, [saved_models.TEXT], sequences=4, seed=3)
    (record,) = Run(out).records
    assert record.loss == pytest.approx(loss_of(model, batches), rel=1e-6)
    assert note in record.notes
    assert f"note: {note}" in printed
    config = Run(out).config
    assert (config["mask_seed"], config["mask_share"], config["length"]) == (3, 0.15, 16)
    assert main([*command, "--mask-seed", "3"]) == 0
    assert "measured before" in capsys.readouterr().out
    assert "mask_seed: 3 in the folder, 4 asked for" in refused(capsys, main([*command, "--mask-seed", "4"]))


def test_a_sequence_classifier_gets_labelled_rows(folders, data, tmp_path):
    out = str(tmp_path / "run")
    assert main(["measure", str(folders["sequence"]), *data["labelled"], "--out", out, *QUICK]) == 0
    model, tokenizer = load_model(folders["sequence"], kind=SEQUENCE), load_tokenizer(folders["sequence"])
    batches = labelled_batches(model, tokenizer, read_labelled(data["labelled"][1:]), sequences=4)
    (record,) = Run(out).records
    assert record.loss == pytest.approx(loss_of(model, batches), rel=1e-6)


def test_an_image_classifier_gets_images(folders, data, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["measure", str(folders["vit"]), *data["images"], "--out", out, *QUICK, "--params", "*layernorm*"]) == 0
    assert capsys.readouterr().err == ""
    (record,) = Run(out).records
    assert record.loss > 0.1
    assert record.estimates["lambda_max"].value > 0


def test_a_causal_model_is_measured_as_before(folders, data, tmp_path):
    """Its folder says nothing of options that it does not use."""
    out = str(tmp_path / "run")
    assert main(["measure", str(folders["causal"]), *data["text"], "--out", out, *QUICK[:-4], "--sequences", "4"]) == 0
    assert not {"labelled", "images", "mask_seed", "mask_share"} & set(Run(out).config)
    assert Run(out).records[0].notes == []


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (
            "sequence",
            "text",
            "is a BertForSequenceClassification, a sequence classifier, whose loss needs text with labels",
        ),
        ("vit", "text", "an image classifier, whose loss needs images with classes: give --images DIR"),
        ("masked", "labelled", "a masked language model, whose loss needs text: give --text FILE"),
        ("causal", "images", "a causal language model, whose loss needs text: give --text FILE"),
        ("tokens", "text", "BertForTokenClassification, which has no loss that could be guessed"),
    ],
)
def test_other_data_than_the_loss_needs_are_refused(model, given, words, folders, data, tmp_path, capsys):
    out = tmp_path / "run"
    line = refused(capsys, main(["measure", str(folders[model]), *data[given], "--out", str(out), *QUICK]))
    assert words in line
    assert not out.exists()


def test_options_that_do_not_fit_are_refused(folders, data, tmp_path, capsys):
    command = ["measure", str(folders["causal"]), *data["text"], "--out", str(tmp_path / "run"), *QUICK]
    assert "are for masked language models" in refused(capsys, main([*command, "--mask-seed", "1"]))
    assert "not allowed with argument --text" in refused(capsys, main([*command, *data["images"]]))
    without = ["measure", str(folders["causal"]), "--out", str(tmp_path / "run")]
    assert "one of the arguments --text --labelled --images is required" in refused(capsys, main(without))
    masked = ["measure", str(folders["masked"]), *data["text"], "--out", str(tmp_path / "run"), *QUICK]
    for share in ("0", "2"):
        assert f"between 0 and 1, got {share}.0" in refused(capsys, main([*masked, "--mask-share", share]))


LOSSES = """
import torch

def entropy(model, batch):
    '''The mean entropy of the predictions, which needs no labels.'''
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.distributions.Categorical(logits=logits).entropy().mean()
"""


def test_a_loss_of_ones_own_is_measured_for_any_model(folders, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "losses_of_a_user.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    command = ["measure", str(folders["tokens"]), *data["text"], "--out", "run", *QUICK]
    assert main([*command, "--loss", "losses_of_a_user:entropy"]) == 0
    sys.modules.pop("losses_of_a_user")
    (record,) = Run("run").records
    model, tokenizer = load_model(folders["tokens"], kind=OTHER), load_tokenizer(folders["tokens"])
    tokens = tokenizer(saved_models.TEXT, add_special_tokens=False)["input_ids"]
    pieces = torch.tensor(tokens[: len(tokens) // 16 * 16]).view(-1, 16)
    rows = pieces[torch.arange(4) * len(pieces) // 4]
    with torch.no_grad():
        logits = model(rows).logits
    assert record.loss == pytest.approx(
        float(torch.distributions.Categorical(logits=logits).entropy().mean()), rel=1e-5
    )
    assert Run("run").config["loss"] == "losses_of_a_user:entropy"
    capsys.readouterr()
    assert "has no nothing" in refused(capsys, main([*command, "--out", "other", "--loss", "losses_of_a_user:nothing"]))


def test_crosscheck_prints_both_and_their_costs(folders, data, capsys):
    pytest.importorskip("pyhessian")
    quick = [
        "--probes",
        "1",
        "--steps",
        "6",
        "--max-iterations",
        "12",
        "--params",
        "*intermediate*",
        "--sequences",
        "4",
    ]
    command = ["crosscheck", str(folders["masked"]), *data["text"], *quick]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    heading, columns, *lines = captured.out.splitlines()
    assert heading.startswith("108 parameters, loss ")
    assert columns.split() == ["quantity", "PyHessian", "spectra", "95", "%", "interval", "PyHessian's", "number", "is"]
    assert sum(line.endswith("inside") or "outside, " in line for line in lines) == 6
    assert [line.split()[0] for line in lines if " s " in line][:4] == [
        "preparation",
        "eigenvalues",
        "trace",
        "density",
    ]
    assert any(line.startswith("note: masked-token loss of ") for line in lines)
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["dimension"] == 108
    assert printed["costs"]["density"]["pyhessian"]["products"] == 6
    largest = printed["quantities"]["eigenvalue of largest magnitude"]
    assert largest["inside"] is (largest["spectra"]["low"] <= largest["pyhessian"] <= largest["spectra"]["high"])
    assert np.isfinite(largest["pyhessian"])
    assert main([*command, "--csv"]) == 0
    rows = {row["quantity"]: row for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    assert list(rows)[: len(printed["quantities"])] == list(printed["quantities"])
    read = rows["eigenvalue of largest magnitude"]
    assert float(read["pyhessian"]) == pytest.approx(largest["pyhessian"], rel=1e-6)
    assert float(read["spectra_low"]) == pytest.approx(largest["spectra"]["low"], rel=1e-6)
    assert rows["density, products"]["pyhessian"] == "6"
    (line,) = [line for line in lines if line.startswith("eigenvalue of largest magnitude")]
    assert float(line.split()[4]) == pytest.approx(largest["pyhessian"], rel=1e-3)
    assert "float32" in refused(capsys, main([*command, "--dtype", "bfloat16"]))
    assert "top must be at least 1" in refused(capsys, main([*command, "--top", "0"]))


def test_crosscheck_without_pyhessian_names_the_extra(folders, data, capsys, monkeypatch):
    monkeypatch.setattr("spectra.backend.extras.find_spec", lambda package: None)
    command = ["crosscheck", str(folders["masked"]), *data["text"]]
    assert 'pip install "spectra-qat[pyhessian]"' in refused(capsys, main(command))
