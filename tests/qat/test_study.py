"""The main job on a small text of our own: what it writes, and that its comparison is a fair one."""

import json

import numpy as np
import pytest
import texts
import torch

import qat
from qat.settings import SmallLlamaConfig, StudyConfig, TrainConfig
from qat.study import compare, train_one
from spectra import InputError, NonFiniteError, Run

SMALL = SmallLlamaConfig(vocabulary_size=300, hidden_size=16, intermediate_size=24, layers=1, heads=2, steps=6)
QUANTITIES = ("lambda_max", "lambda_min", "rms", "trace", "negative_energy_share", "near_zero_share", "negative_share")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a cache that the studies of this module share."""
    folder = tmp_path_factory.mktemp("study")
    texts.write(folder, texts.prose(60_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_CACHE", str(folder / "cache"))
        yield folder


def settings(place, name, **changes):
    options = {
        "out": str(place / name),
        "bits": (2,),
        "text": (str(place / "text-0.txt"),),
        "length": 24,
        "train": TrainConfig(steps=8, batch_size=4, learning_rate=2e-3),
        "validation_sequences": 8,
        "probes": 2,
        "lanczos_steps": 6,
        "measure_sequences": 2,
        "small_llama": SMALL,
    }
    return StudyConfig(**(options | changes))


@pytest.fixture(scope="module")
def study(place):
    config = settings(place, "both", bits=(1, 2), modes=("ste", "quantized"))
    return compare(config, say=lambda line: None), Run(config.out)


def test_a_row_for_each_bit_width_and_method(study):
    rows, run = study
    assert [(row["bits"], row["method"]) for row in rows] == [
        (1, "baseline"), (1, "winq"), (2, "baseline"), (2, "winq"),
    ]  # fmt: skip
    for row in rows:
        assert row["perplexity"] == pytest.approx(np.exp(row["validation_loss"]))
        for quantity in QUANTITIES:
            for when in ("start", "end"):
                estimate = row[f"{quantity}_{when}"]
                assert estimate.low <= estimate.value <= estimate.high
    table = json.loads((run.folder / "table.json").read_text())
    assert [row["validation_loss"] for row in table] == [row["validation_loss"] for row in rows]
    assert (run.folder / "table.md").read_text().count("\n| ") >= 4


def test_figures_and_a_report_are_left(study):
    _, run = study
    names = {path.stem for path in (run.folder / "figures").glob("*.png")}
    assert any(name.startswith("density") for name in names)
    for quantity in ("lambda_max", "rms", "trace", "flip_rate", "distance_to_grid", "relative_gradient_norm"):
        assert any(name.startswith(f"trajectory-{quantity}") for name in names), (quantity, names)
    page = (run.folder / "report.html").read_text()
    assert "data:image/" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_spectra_at_the_start_the_quarters_around_resets_and_the_end(study):
    _, run = study
    runs = {(r.config["bits"], r.config["method"]): r for r in run.runs if "bits" in r.config}
    for bits in (1, 2):
        labels = {
            method: [(r.step, r.label) for r in runs[bits, method].records if r.mode == "ste"]
            for method in ("baseline", "winq")
        }
        assert labels["baseline"] == [(0, "start"), (2, "quarter"), (4, "quarter"), (6, "quarter"), (8, "end")]
        around = [(step, label) for step in (2, 4, 6) for label in ("before-reset", "after-reset")]
        assert labels["winq"] == [(0, "start"), *around, (8, "end")]
    assert {r.mode for r in runs[2, "winq"].records} == {"ste", "quantized"}


def test_methods_start_from_the_same_weights_batches_and_probes(study):
    _, run = study
    records = {(r.config["bits"], r.config["method"]): r.records for r in run.runs if "bits" in r.config}
    configs = [r.config for r in run.runs if "bits" in r.config]
    for bits in (1, 2):
        ours, theirs = records[bits, "baseline"][0], records[bits, "winq"][0]
        assert ours.loss == theirs.loss
        assert ours.estimates == theirs.estimates
    assert len({config["batches"] for config in configs}) == 1


def test_a_reset_changes_the_weights_but_not_the_loss(study):
    _, run = study
    winq = next(r for r in run.runs if r.config.get("method") == "winq" and r.config.get("bits") == 2)
    pairs = [r for r in winq.records if r.mode == "ste" and r.label.endswith("-reset")]
    for before, after in zip(pairs[::2], pairs[1::2], strict=True):
        assert (before.label, after.label) == ("before-reset", "after-reset")
        assert before.loss == after.loss


def test_without_resets_and_noise_winq_is_the_baseline(place):
    config = settings(place, "idle", winq=qat.WinQConfig(every=4, alpha=0.0, sigma=0.0))
    baseline, winq = compare(config, say=lambda line: None)
    assert baseline["validation_loss"] == winq["validation_loss"]
    assert winq["steps_to_baseline_loss"] == baseline["steps_to_baseline_loss"]


def test_train_leaves_a_model_that_reloads(place):
    from transformers import AutoModelForCausalLM

    config = settings(place, "one", methods=("winq",))
    row = train_one(config, say=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(place / "one" / "model")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert all(len(torch.unique(channel)) <= 4 for channel in weight)
    assert row["method"] == "winq"
    assert (place / "one" / "report.html").is_file()


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_recorded(place):
    config = settings(place, "broken", train=TrainConfig(steps=8, batch_size=4, learning_rate=1e30))
    with pytest.raises(NonFiniteError, match="step") as caught:
        compare(config, say=lambda line: None)
    assert "\n" not in str(caught.value)
    run = Run(place / "broken")
    assert any(single.records for single in run.runs)


def test_a_folder_with_a_run_is_refused_before_anything_slow(place, study):
    with pytest.raises(InputError, match="already holds a run"):
        compare(settings(place, "both"), say=lambda line: pytest.fail(line))
