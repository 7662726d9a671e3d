"""A whole study on a tiny model: what it measures when, what it compares, and what it leaves on disk."""

import json
import math
import shutil
from dataclasses import asdict, replace

import pytest
import saved_models
import texts
import tiny_models
import torch
from transformers import TrainerCallback

import qat
from qat.study import compare as study
from qat.study import run as study_run
from qat.study.config import SmallLlamaConfig, StudyConfig
from qat.study.resume import check_same, is_finished, planned_marks, validation_curve
from qat.study.start import prepare
from qat.training.config import TrainConfig
from qat.training.distillation import Distillation, DistillationConfig
from qat.training.evaluate import evaluate
from qat.training.parq import PARQConfig
from qat.training.train import train
from spectra.backend.errors import InputError, NonFiniteError
from spectra.integrations.loading import load_model, load_tokenizer
from spectra.runs.folder import Run
from spectra.views import page

STEPS = 8
ROUGH = {"probes": 1, "lanczos_steps": 1}  # for what the spectra are not the subject of


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return str(saved_models.save(folder / "model")), str(saved_models.write_text(folder))


def tiny(llama, out, **changes):
    folder, text = llama
    training = TrainConfig(
        steps=changes.pop("steps", STEPS),
        batch_size=4,
        learning_rate=changes.pop("learning_rate", 3e-2),
        seed=changes.pop("seed", 0),
    )
    given = {
        "out": str(out),
        "bits": (1, 2),
        "model": folder,
        "text": (text,),
        "device": "cpu",
        "length": 8,
        "train": training,
        "validation_sequences": 8,
        "probes": 2,
        "lanczos_steps": 6,
        "deflate": 0,
        "count_products": 0,
        "measure_sequences": 1,
        "reference": False,
    }
    return StudyConfig(**given | changes)


@pytest.fixture(scope="module")
def done(llama, tmp_path_factory):
    """A finished study, the rows it returned and the lines it said."""
    said = []
    out = tmp_path_factory.mktemp("study") / "out"
    rows = study.compare(tiny(llama, out, reference=True), say=said.append)
    return out, rows, said


def run_of(out, bits, method):
    return Run(out / ("full-precision" if bits == 16 else f"{bits}bit-{method}"))


@pytest.mark.parametrize("bits", [1, 2])
def test_spectra_are_taken_at_start_quarters_resets_and_end(done, bits):
    marks = {m: [(r.step, r.label) for r in run_of(done[0], bits, m).records] for m in ("baseline", "winq")}
    assert marks["baseline"] == [(0, "start"), (2, "quarter"), (4, "quarter"), (6, "quarter"), (8, "end")]
    resets = [(step, f"{when}-reset") for step in (2, 4, 6) for when in ("before", "after")]
    assert marks["winq"] == [(0, "start"), *resets, (8, "end")]


def test_every_spectrum_has_the_same_batches_and_probe_vectors(done):
    runs = Run(done[0]).runs
    assert len(runs) == 5
    assert len({run.config["batches"] for run in runs}) == 1
    assert {(r.seed, r.probes, r.lanczos_steps) for run in runs for r in run.records} == {(0, 2, 6)}
    assert len({r.dimension for run in runs for r in run.records}) == 1


def test_both_methods_start_from_the_same_point(done):
    for bits in (1, 2):
        starts = [run_of(done[0], bits, method).records[0] for method in ("baseline", "winq")]
        assert starts[0].loss == starts[1].loss
        assert starts[0].estimates == starts[1].estimates
        first = [run_of(done[0], bits, method).telemetry[0]["validation_loss"] for method in ("baseline", "winq")]
        assert first[0] == first[1]


def test_a_reset_keeps_the_loss_and_brings_the_weights_to_the_grid(done):
    for bits in (1, 2):
        run = run_of(done[0], bits, "winq")
        for step in (2, 4, 6):
            before, after = [record for record in run.records if record.step == step]
            assert before.loss == after.loss
        distance = {line["step"]: line["distance_to_grid"] for line in run.telemetry if "distance_to_grid" in line}
        assert distance[3] < distance[2]


def test_the_end_of_a_record_the_curve_and_the_table_agree(done):
    out, rows, _ = done
    for row in rows:
        run = run_of(out, row["bits"], row["method"])
        assert row["validation_loss"] == run.telemetry[-1]["validation_loss"]
        assert row["perplexity"] == pytest.approx(math.exp(row["validation_loss"]))
        assert row["lambda_max_start"] == run.records[0].estimates["lambda_max"]
        assert row["near_zero_share_end"] == run.records[-1].estimates["near_zero_share"]


def test_the_table_has_a_row_for_each_bit_width_and_method(done):
    out, rows, said = done
    kinds = [(16, "full-precision"), (1, "baseline"), (1, "winq"), (2, "baseline"), (2, "winq")]
    assert [(row["bits"], row["method"]) for row in rows] == kinds
    stored = json.loads((out / "table.json").read_text())
    assert [(row["bits"], row["method"]) for row in stored] == kinds
    quantities = {key.removesuffix("_start") for key in stored[0] if key.endswith("_start")}
    assert quantities == set(run_of(out, 1, "winq").records[0].estimates)
    for row in stored:
        assert {"value", "low", "high"} <= set(row["rms_end"])
    assert "steps to baseline loss" in "\n".join(said)
    assert (out / "table.md").read_text().count("\n| ") == 1 + 1 + 5


def test_figures_and_a_report_are_left(done):
    out, _, _ = done
    names = {path.stem for path in (out / "figures").glob("*.png")}
    wanted = "lambda_max lambda_min rms trace negative_energy_share near_zero_share negative_share flip_rate"
    wanted += " relative_gradient_norm distance_to_grid validation_loss"
    assert {f"trajectory-{name}" for name in wanted.split()} <= names
    assert {"density-1-bit", "density-2-bit"} <= names
    report = (out / "report.html").read_text()
    assert len(report) > 50_000
    assert "Unfinished:" not in report


def test_the_reference_is_the_full_precision_model_in_the_same_weights(done, llama):
    run = Run(done[0] / "full-precision")
    record, end = run.records
    assert (record.mode, record.label, end.mode, end.label, end.step) == ("full", "start", "full", "end", STEPS)
    model = load_model(llama[0])
    config = tiny(llama, "unused")
    start = prepare(config, say=lambda line: None)
    (batch,) = start.batches
    with torch.no_grad():
        assert record.loss == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert record.dimension == run_of(done[0], 2, "winq").records[0].dimension


def test_the_reference_is_trained_as_long_and_by_the_same_settings(done, llama):
    row = done[1][0]
    assert (row["label"], row["bits"], row["method"], row["steps"]) == ("full precision", 16, "full-precision", STEPS)
    assert "steps_to_baseline_loss" not in row
    run = Run(done[0] / "full-precision")
    start = prepare(tiny(llama, "unused"), say=lambda line: None)
    result = train(start.model, start.train, start.validation, tiny(llama, "unused").train, device="cpu")
    assert row["validation_loss"] == result.validation_loss
    assert validation_curve(run) == result.curve
    assert row["validation_loss"] < result.curve[0][1]
    table = (done[0] / "table.md").read_text().splitlines()
    names, values = (next(x for x in table if x.startswith(f"| {kind} |")).split(" | ") for kind in ("bits", 16))
    cells = dict(zip(names, values, strict=True))
    assert cells["steps to baseline loss"] == "-"
    assert list(cells)[1:6] == ["method", "validation loss", "perplexity", "steps", "steps to baseline loss"]
    assert any("the unquantized model, trained as long" in line for line in table)


@pytest.mark.usefixtures("no_pictures")
def test_without_the_reference_its_start_alone_is_measured_as_before(done, llama, tmp_path):
    rows = study.compare(tiny(llama, tmp_path / "out", bits=(2,), methods=("baseline",)), say=lambda line: None)
    assert rows == done[1][3:4]
    (record,) = Run(tmp_path / "out" / "full-precision").records
    assert record.estimates == Run(done[0] / "full-precision").records[0].estimates


def test_the_start_is_measured_once_and_shared_bit_for_bit(done):
    for bits in (1, 2):
        one, other = (run_of(done[0], bits, method) for method in ("baseline", "winq"))
        lines = [(run.folder / "records.jsonl").read_bytes().splitlines()[0] for run in (one, other)]
        assert lines[0] == lines[1]
        assert b"wall_time" in lines[0]
        name = one.records[0].lanczos
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    assert not (done[0] / ".starts").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_measures_its_own_start_has_the_same_records(done, llama, tmp_path):
    study.compare(tiny(llama, tmp_path / "out", bits=(2,), methods=("winq",)), say=lambda line: None)
    alone, shared = (run_of(out, 2, "winq").records for out in (tmp_path / "out", done[0]))
    assert [record.estimates for record in alone] == [record.estimates for record in shared]
    assert [record.checks for record in alone] == [record.checks for record in shared]


def test_config_says_what_was_done(done, llama):
    out, _, _ = done
    config = run_of(out, 2, "winq").config
    want = {"bits": 2, "method": "winq", "schedule": "constant", "learning_rate": 3e-2, "steps": STEPS, "alpha": 0.4}
    assert config | want == config
    assert config["model_name"] == llama[0]
    assert Run(out).config["train"] == asdict(TrainConfig(steps=STEPS, batch_size=4, learning_rate=3e-2))
    assert "alpha" not in run_of(out, 2, "baseline").config


def test_other_settings_are_refused_with_the_difference_before_anything_is_loaded(done, llama, monkeypatch):
    monkeypatch.setattr(study, "prepare", None)
    with pytest.raises(InputError, match=r"train.steps: 8 in the folder, 4 asked for"):
        study.compare(tiny(llama, done[0], steps=4, reference=True))


def test_another_text_under_the_same_name_is_refused(done, llama, monkeypatch):
    known = prepare(tiny(llama, "unused"), say=lambda line: None)
    changed = replace(known, facts={**known.facts, "text_fingerprint": "another"})
    monkeypatch.setattr(study, "prepare", lambda config, say: changed)
    with pytest.raises(InputError, match="text_fingerprint"):
        study.compare(tiny(llama, done[0], reference=True))


def test_a_run_inside_that_holds_something_else_is_refused(tmp_path, llama, monkeypatch):
    Run.create(tmp_path / "out" / "2bit-winq", {}).append_telemetry({"step": 1})
    monkeypatch.setattr(study, "prepare", None)
    with pytest.raises(InputError, match="already holds a run"):
        study.compare(tiny(llama, tmp_path / "out"))


def test_a_folder_in_which_nothing_was_recorded_is_no_obstacle(tmp_path, llama):
    Run.create(tmp_path / "out" / "2bit-winq", {"other": 1})
    check_same(tmp_path / "out", {"study": "compare"})
    check_same(tmp_path / "out" / "2bit-winq", {})


def test_the_planned_marks_are_those_of_the_records(done, llama):
    config = tiny(llama, "unused")
    for method in config.methods:
        run = run_of(done[0], 2, method)
        assert tuple((record.step, record.label) for record in run.records) == planned_marks(config, method)
        assert run.config["planned_records"] == len(run.records)
        assert is_finished(run, config, method)


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing is tested above, and takes longer than all else."""
    for name in ("density_pictures", "trajectory_pictures"):
        monkeypatch.setattr(page, name, lambda run: [])


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_is_kept_and_an_unfinished_one_without_a_checkpoint_starts_again(done, llama, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    kept = snapshot(out / "1bit-winq")
    for name, lines in (("2bit-baseline", 2), ("2bit-winq", 0)):
        records = out / name / "records.jsonl"
        records.write_bytes(b"".join(records.read_bytes().splitlines(keepends=True)[:lines]))
    (out / "2bit-winq" / "mine.txt").write_text("a note")
    said = []
    rows = study.compare(tiny(llama, out, reference=True), say=said.append)
    assert snapshot(out / "1bit-winq") == kept
    assert any("3 of 5 runs are finished" in line for line in said)
    assert rows == done[1]
    assert (out / "2bit-winq" / "mine.txt").read_text() == "a note"
    assert len(list((out / "2bit-baseline" / "lanczos").iterdir())) == 5


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupt_says_what_is_kept_and_the_table_says_that_it_is_unfinished(llama, tmp_path, monkeypatch):
    out, trained = tmp_path / "out", study.train_method

    def interrupted(start, config, plan, **options):
        if plan.method == "winq":
            raise KeyboardInterrupt
        return trained(start, config, plan, **options)

    monkeypatch.setattr(study, "train_method", interrupted)
    config = tiny(llama, out, bits=(2,), steps=2, **ROUGH)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 runs are finished and kept"):
        study.compare(config, say=lambda line: None)
    assert "Unfinished: 1 of 2 runs are done." in (out / "table.md").read_text()
    monkeypatch.setattr(study, "train_method", trained)
    study.compare(config, say=lambda line: None)
    assert "Unfinished" not in (out / "table.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_side_by_side_and_again_the_numbers_are_the_same(done, llama, tmp_path):
    rows = study.compare(tiny(llama, tmp_path / "out", bits=(2,), workers=2), say=lambda line: None)
    assert rows == done[1][3:]


@pytest.mark.usefixtures("no_pictures")
def test_measuring_less_trains_the_same(done, llama, tmp_path):
    config = tiny(llama, tmp_path / "out", bits=(2,), methods=("winq",), **ROUGH)
    (row,) = study.compare(config, say=lambda line: None)
    assert row["validation_loss"] == done[1][4]["validation_loss"]


@pytest.mark.usefixtures("no_pictures")
def test_another_seed_gives_other_numbers(done, llama, tmp_path):
    config = tiny(llama, tmp_path / "out", bits=(2,), methods=("baseline",), seed=1, **ROUGH)
    (row,) = study.compare(config, say=lambda line: None)
    assert row["validation_loss"] != done[1][3]["validation_loss"]


@pytest.mark.usefixtures("no_pictures")
def test_every_hessian_mode_is_recorded_under_its_name(llama, tmp_path):
    modes = ("ste", "quantized", "latent", "noisy")
    often = qat.WinQConfig(every=1)
    config = tiny(llama, tmp_path / "out", bits=(2,), methods=("winq",), modes=modes, steps=1, winq=often, probes=1)
    (row,) = study.compare(config, say=lambda line: None)
    records = Run(tmp_path / "out" / "2bit-winq").records
    assert [record.mode for record in records[:4]] == list(modes)
    by_mode = {mode: [r.estimates["trace"].value for r in records if r.mode == mode] for mode in modes}
    assert len({tuple(values) for values in by_mode.values()}) == 4
    assert row["mode"] == "ste"
    assert row["noisy_trace_end"].value == by_mode["noisy"][-1]


@pytest.mark.usefixtures("no_pictures")
def test_resets_off_the_quarters_are_measured_for_the_baseline_too(llama, tmp_path):
    config = tiny(llama, tmp_path / "out", bits=(2,), winq=qat.WinQConfig(every=3), **ROUGH)
    study.compare(config, say=lambda line: None)
    marks = {m: [(r.step, r.label) for r in run_of(tmp_path / "out", 2, m).records] for m in ("baseline", "winq")}
    assert [step for step, _ in marks["baseline"]] == [0, 2, 3, 4, 6, 8]
    assert marks["winq"] == [
        *[(0, "start"), (2, "quarter"), (3, "before-reset"), (3, "after-reset"), (4, "quarter")],
        *[(6, "before-reset"), (6, "after-reset"), (8, "end")],
    ]


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "gpt-neox", "opt"])
@pytest.mark.usefixtures("no_pictures")
def test_other_architectures_go_all_the_way(architecture, llama, tmp_path):
    folder = saved_models.save(tmp_path / "model", architecture)
    config = tiny((str(folder), llama[1]), tmp_path / "out", bits=(2,), steps=2, probes=1, lanczos_steps=3)
    rows = study.compare(config, say=lambda line: None)
    assert all(math.isfinite(row["validation_loss"]) for row in rows)
    assert rows[0]["validation_loss"] != rows[1]["validation_loss"]


@pytest.mark.usefixtures("no_pictures")
def test_the_default_model_is_trained_on_the_given_text_before_it_is_quantized(tmp_path):
    small = SmallLlamaConfig(
        vocabulary_size=270, hidden_size=8, intermediate_size=12, layers=1, heads=2, steps=6, batch_size=2, length=16
    )
    (text,) = texts.write(tmp_path, texts.prose(6000))
    config = StudyConfig(
        out=str(tmp_path / "out"),
        bits=(2,),
        methods=("baseline",),
        text=(text,),
        length=12,
        small_llama=small,
        train=TrainConfig(steps=1, batch_size=2),
        **ROUGH,
        deflate=0,
        count_products=0,
        measure_sequences=1,
        device="cpu",
    )
    said = []
    study.compare(config, say=said.append)
    assert any("trained the full-precision model: 6 steps" in line for line in said)
    assert Run(tmp_path / "out").config["model_name"] == "small Llama"
    again = []
    study.compare(replace(config, out=str(tmp_path / "again")), say=again.append)
    assert not any("trained the full-precision model" in line for line in again)
    assert said[-2] == again[-2]  # the table


@pytest.mark.usefixtures("no_pictures")
def test_several_seeds_are_a_run_each_and_their_spread_is_shown(done, llama, tmp_path):
    out, said = tmp_path / "out", []
    rows = study.compare(tiny(llama, out, bits=(2,), methods=("baseline",), seeds=(0, 1)), say=said.append)
    assert [(row["seed"], row["label"]) for row in rows] == [(s, f"2-bit baseline, seed {s}") for s in (0, 1)]
    assert rows[0]["validation_loss"] == done[1][3]["validation_loss"] != rows[1]["validation_loss"]
    assert rows[0]["rms_end"] == done[1][3]["rms_end"]
    runs = [Run(out / f"2bit-baseline-seed{seed}") for seed in (0, 1)]
    assert [run.config["seed"] for run in runs] == [0, 1]
    assert {record.seed for run in runs for record in run.records} == {0}  # the same probe vectors
    assert runs[0].records[0] == runs[1].records[0]
    losses = [row["validation_loss"] for row in rows]
    (spread,) = json.loads((out / "seeds.json").read_text())
    assert (spread["validation_loss"]["mean"], spread["validation_loss"]["low"]) == (sum(losses) / 2, min(losses))
    words = f"2-bit baseline, 2 seeds: validation loss {sum(losses) / 2:.4f} on average, from {min(losses):.4f}"
    assert any(line.startswith(words) for line in said)
    assert words in (out / "table.md").read_text()
    assert f"({min(losses):.4f} to {max(losses):.4f})" in (out / "report.html").read_text()
    assert study.compare(tiny(llama, out, bits=(2,), methods=("baseline",), seeds=(0, 1)), say=said.append) == rows


@pytest.mark.usefixtures("no_pictures")
def test_a_training_with_several_seeds_leaves_a_model_each(done, llama, tmp_path):
    config = tiny(llama, tmp_path / "out", bits=(2,), methods=("baseline",), seeds=(0, 1), steps=2, **ROUGH)
    rows = study.train_seeds(config, say=lambda line: None)
    assert [row["seed"] for row in rows] == [0, 1]
    saved = [(tmp_path / "out" / f"seed{seed}" / "model" / "model.safetensors").read_bytes() for seed in (0, 1)]
    assert saved[0] != saved[1]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "table.md",
        "table.json",
        "seeds.json",
        "report.html",
    }
    assert not (tmp_path / "out" / ".starts").exists()
    assert study.train_seeds(config, say=lambda line: None) == rows


@pytest.mark.usefixtures("no_pictures")
def test_distilled_runs_say_which_loss_is_measured(done, llama, tmp_path):
    distilled = DistillationConfig(weight=0.8)
    config = tiny(llama, tmp_path / "out", bits=(2,), methods=("baseline",), reference=True, distillation=distilled)
    reference, row = study.compare(config, say=lambda line: None)
    assert reference == done[1][0]  # the reference is trained with the cross-entropy
    assert row["validation_loss"] != done[1][3]["validation_loss"]
    run = run_of(tmp_path / "out", 2, "baseline")
    assert run.config["measured_loss"] == "the cross-entropy"
    assert run.config["distillation"] == {"weight": 0.8, "temperature": 1.0, "hidden": 0.0}
    trained = "0.2 x cross-entropy + 0.8 x KL(teacher || student) at temperature 1"
    note = f"the cross-entropy is measured; trained with {trained}"
    assert all(note in record.notes for record in run.records)
    plain = run_of(done[0], 2, "baseline")
    assert run.records[0].estimates == plain.records[0].estimates
    assert "distillation" not in plain.config
    assert "distillation" not in Run(tmp_path / "out" / "full-precision").config
    with pytest.raises(InputError, match="distillation"):
        study.compare(replace(config, distillation=None), say=lambda line: None)


@pytest.mark.usefixtures("no_pictures")
def test_the_loss_that_distillation_trains_is_measured_on_request(llama, tmp_path):
    distilled = DistillationConfig(weight=0.8, temperature=2.0, hidden=0.5)
    given = {"bits": (2,), "methods": ("baseline",), "reference": True, "distillation": distilled, **ROUGH}
    config = tiny(llama, tmp_path / "out", measured_loss="training", **given)
    assert len(study.compare(config, say=lambda line: None)) == 2
    run, reference = run_of(tmp_path / "out", 2, "baseline"), run_of(tmp_path / "out", 16, "full-precision")
    assert run.config["measured_loss"] == "the training loss"
    note = f"the training loss is measured; trained with {distilled.in_words()}"
    assert all(note in record.notes for record in run.records)
    assert not any("measured" in note for record in reference.records for note in record.notes)
    assert "Their spectra are those of this loss" in (tmp_path / "out" / "table.md").read_text()
    start = prepare(config, say=lambda line: None)
    student = load_model(llama[0])
    qat.quantize_model(student, qat.QuantConfig(bits=2))
    loss = Distillation(start.model, distilled)(student.eval(), start.batches[0]).item()
    assert run.records[0].loss == pytest.approx(loss, rel=1e-5)
    assert reference.records[0].loss == pytest.approx(load_model(llama[0])(**start.batches[0]).loss.item(), rel=1e-5)
    with pytest.raises(InputError, match="measured_loss"):
        study.compare(replace(config, measured_loss="cross-entropy"), say=lambda line: None)
    with pytest.raises(InputError, match="give --distill"):
        tiny(llama, tmp_path / "out", measured_loss="training")


@pytest.mark.usefixtures("no_pictures")
def test_the_annealing_of_parq_is_a_setting_that_runs_follow_and_record(llama, tmp_path):
    annealing = PARQConfig(start=0.25, end=0.5, steepness=3.0)
    given = {"bits": (2,), "methods": ("baseline",), "quantizer": "parq", **ROUGH}
    losses = []
    for name, parq in (("given", annealing), ("default", PARQConfig())):
        config = tiny(llama, tmp_path / name, parq=parq, **given)
        losses += [row["validation_loss"] for row in study.compare(config, say=lambda line: None)]
        assert run_of(tmp_path / name, 2, "baseline").config["parq"] == asdict(parq)
    assert losses[0] != losses[1]
    with pytest.raises(InputError, match="parq"):
        study.compare(tiny(llama, tmp_path / "given", **given), say=lambda line: None)
    with pytest.raises(InputError, match="--quantizer parq"):
        tiny(llama, tmp_path / "out", parq=annealing)


class Poison(TrainerCallback):
    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step == 5:
            next(model.parameters()).data.fill_(math.nan)


@pytest.mark.usefixtures("no_pictures")
def test_a_broken_training_stops_the_study_and_all_that_was_recorded_is_kept(llama, tmp_path, monkeypatch):
    class Broken(qat.WinQCallback, Poison):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            Poison.on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(study_run, "WinQCallback", Broken)
    out = tmp_path / "out"
    with pytest.raises(NonFiniteError, match=r"1 bit, winq: the .* loss is nan at step [56] of 8") as stopped:
        study.compare(tiny(llama, out, **ROUGH), say=lambda line: None)
    assert "\n" not in str(stopped.value)
    assert [(row["bits"], row["method"]) for row in json.loads((out / "table.json").read_text())] == [(1, "baseline")]
    assert "Unfinished: 2 of 5 runs are finished." in (out / "report.html").read_text()
    assert [record.step for record in run_of(out, 1, "winq").records] == [0, 2, 2, 4, 4]
    assert not (out / "2bit-baseline").exists()


@pytest.mark.usefixtures("no_pictures")
def test_one_training_leaves_a_model_that_computes_with_the_quantized_weights(llama, tmp_path):
    config = tiny(llama, tmp_path / "out", bits=(2,), methods=("winq",), steps=2, **ROUGH)
    row = study.train_one(config, say=lambda line: None)
    saved = load_model(str(tmp_path / "out" / "model"))
    start = prepare(config, say=lambda line: None)
    assert evaluate(saved, start.validation).loss == pytest.approx(row["validation_loss"], rel=1e-6)
    for layer in (saved.model.layers[0].mlp.up_proj, saved.model.layers[1].self_attn.q_proj):
        assert all(len(values.unique()) <= 4 for values in layer.weight)
    assert len(saved.lm_head.weight.unique()) > 50
    assert load_tokenizer(str(tmp_path / "out" / "model")).get_vocab()
    assert [record.label for record in Run(tmp_path / "out").records][-1] == "end"
    before = snapshot(tmp_path / "out")
    assert study.train_one(config, say=lambda line: None) == row
    assert snapshot(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out" / "model")
    assert study.train_one(config, say=lambda line: None) == row
    assert snapshot(tmp_path / "out").keys() == before.keys()


@pytest.mark.usefixtures("no_pictures")
def test_a_training_without_its_model_is_not_finished(llama, tmp_path, monkeypatch):
    """Interrupted after the last record, and before the model is saved: the same command trains again."""
    config = tiny(llama, tmp_path / "out", bits=(2,), methods=("baseline",), steps=1, **ROUGH)

    def interrupt(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "_save_model", interrupt)
        with pytest.raises(KeyboardInterrupt, match="0 of 1 runs are finished"):
            study.train_one(config, say=lambda line: None)
    left = tmp_path / "out" / ".model-killed"
    left.mkdir()
    study.train_one(config, say=lambda line: None)
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert not left.exists()
    with monkeypatch.context() as patch:
        patch.setattr(study, "_write_report", interrupt)
        with pytest.raises(KeyboardInterrupt, match="1 of 1 runs are finished"):
            study.train_one(config, say=lambda line: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": (5,)}, "bits must be one of"),
        ({"bits": ()}, "bits is empty"),
        ({"methods": ("magic",)}, "unknown method 'magic': choose from baseline, winq"),
        ({"methods": ()}, "methods is empty"),
        ({"modes": ("fisher",)}, "unknown mode 'fisher'"),
        ({"modes": ("noisy",), "winq": qat.WinQConfig(sigma=0.0)}, "the noisy Hessian needs noise"),
        ({"quantizer": "lsq", "bits": (4, 1)}, "supports 3, 4, 8 bits; got 1"),
        ({"length": 1}, "length is 2 or more, got 1"),
        ({"probes": 0}, "probes is 1 or more"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"workers": 0}, "workers is 1 or more"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        StudyConfig(**{"out": "unused"} | changes)


def test_what_is_given_twice_is_done_once():
    config = StudyConfig(out="unused", bits=("2", 2.0, 1), methods=("winq", "winq"))
    assert config.bits == (2, 1)
    assert config.methods == ("winq",)


def test_blocks_of_tokens_that_the_model_does_not_know_are_refused(llama, tmp_path):
    other = saved_models.save(tmp_path / "other", with_tokenizer=False)
    saved_models.tokenizer(28).save_pretrained(other)
    text = saved_models.write_text(tmp_path, "zebras and wizards " * 100)
    assert tiny_models.VOCABULARY == 24
    with pytest.raises(InputError, match="the model knows 24 tokens"):
        study.compare(tiny((str(other), str(text)), tmp_path / "out"), say=lambda line: None)
    assert not (tmp_path / "out").exists()
