import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_folders
import saved_models

from spectra import Run
from spectra.algorithms.slq import slq
from spectra.cli.main import main
from spectra.operators.explicit import DiagonalOperator


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_models.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    return saved_models.write_text(tmp_path)


def measure(model, text, out, *more):
    quick = ["--probes", "2", "--steps", "6", "--count-products", "0"]  # options that follow take their place
    return main(["measure", str(model), "--text", str(text), "--out", str(out), *quick, *more])


def refused(capsys, code):
    """The one line of an error."""
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("spectra: error: ")
    return lines[0]


def test_measure_leaves_a_run_and_prints_its_estimates(model, text, tmp_path, capsys):
    out = tmp_path / "run"
    quick = ["--sequences", "3", "--count-products", "100"]
    assert measure(model, text, out, *quick, "--seed", "5", "--params", "*mlp*", "*norm*") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    run = Run(out)
    (record,) = run.records
    assert (record.probes, record.lanczos_steps, record.seed, record.step) == (2, 6, 5, 0)
    assert run.config["params"] == ["*mlp*", "*norm*"]
    assert (run.config["length"], run.config["sequences"], run.config["checkpoint"]) == (16, 3, str(model))
    rms = record.estimates["rms"]
    (line,) = [line for line in captured.out.splitlines() if line.startswith("root-mean-square eigenvalue")]
    assert line.split("eigenvalue")[1].split() == str(rms).split()
    columns = [line.index("[") for line in captured.out.splitlines()[2:] if "[" in line]
    assert len(columns) == len(record.estimates)
    assert len(set(columns)) == 1  # aligned
    assert run.density(record).rms() == rms


def test_measure_prints_a_row_for_each_block(model, text, tmp_path, capsys):
    quick = ["--sequences", "2", "--count-products", "0", "--deflate", "0"]
    assert measure(model, text, tmp_path / "run", *quick, "--blocks", "*mlp*", "*norm.weight") == 0
    lines = capsys.readouterr().out.splitlines()
    whole, mlp, norm = Run(tmp_path / "run").records
    assert (whole.block, mlp.block, norm.block) == ("", "*mlp*", "*norm.weight")
    assert mlp.mode == "full: *mlp*"
    for record in (mlp, norm):
        (line,) = [line for line in lines if line.startswith(f"{record.block} ")]
        assert line.split()[1] == f"{record.dimension:,}"
        assert str(record.estimates["rms"]).removesuffix(" (unresolved)") in line
    assert measure(model, text, tmp_path / "all", *quick, "--blocks", "layers", "--json") == 0
    assert "model.layers.0" in json.loads(capsys.readouterr().out)["blocks"]
    assert "no parameter matches" in refused(capsys, measure(model, text, tmp_path / "no", "--blocks", "*nothing*"))


def test_measure_takes_the_parameters_and_the_loss_it_was_asked_for(model, text, tmp_path):
    import torch

    from spectra import HessianOperator
    from spectra.integrations.loading import load_causal_lm, sequence_batches
    from spectra.integrations.text_files import read_texts

    measure(model, text, tmp_path / "run", "--params", "*mlp*", "--dtype", "float64", "--sequences", "2")
    (record,) = Run(tmp_path / "run").records
    loaded, tokenizer = load_causal_lm(model, dtype=torch.float64)
    batches = sequence_batches(loaded, tokenizer, read_texts([text]), sequences=2)
    with HessianOperator(loaded, batches, ["*mlp*"]) as op:
        assert record.dimension == op.shape[0]
        assert record.loss == pytest.approx(op.loss(), rel=1e-6)


def test_measure_in_a_lower_precision_says_what_that_loses(model, text, tmp_path, capsys):
    measure(model, text, tmp_path / "run", "--dtype", "bfloat16", "--deflate", "3", "--sequences", "2")
    (record,) = Run(tmp_path / "run").records
    assert record.checks["precision_error"] > 1e-4
    assert "note: products in bfloat16" in capsys.readouterr().out
    assert Run(tmp_path / "run").config["deflated"] == 3


def test_a_measured_run_is_drawn_and_reported(model, text, tmp_path, capsys):
    out = tmp_path / "run"
    measure(model, text, out)
    capsys.readouterr()
    assert main(["plot", str(out)]) == 0
    assert main(["plot", str(out), "--quantity", "trace", "--out", str(tmp_path / "new" / "t.svg")]) == 0
    assert main(["report", str(out), "--title", "Mine"]) == 0
    bands, trajectory, page = capsys.readouterr().out.splitlines()
    assert bands == str(out / "cumulative.png")
    assert Path(bands).read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path(trajectory).read_text()
    assert "<h1>Mine</h1>" in Path(page).read_text()


def test_a_study_is_drawn_by_its_last_spectra(tmp_path, capsys):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    assert main(["plot", str(study.folder)]) == 0
    assert (study.folder / "cumulative.png").is_file()


@pytest.mark.parametrize("kind", ["cumulative", "tails", "density", "ridge"])
def test_the_name_of_an_image_says_what_is_drawn(kind, tmp_path, capsys):
    run = run_folders.run_folder(tmp_path / "a", modes=("ste", "latent"))
    other = run_folders.run_folder(tmp_path / "b", modes=("latent",))
    folders = [str(run.folder), str(other.folder)]
    capsys.readouterr()
    assert main(["plot", folders[0], "--kind", kind, "--step", "0", "20"]) == 0
    assert main(["plot", *folders, "--kind", kind, "--mode", "latent"]) == 0
    found = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert found == [f"{kind}-ste-step-0-20.png", f"{kind}-latent-with-b.png"]
    assert all((run.folder / name).is_file() for name in found)


def test_options_of_plot_that_contradict_each_other_are_refused(tmp_path, capsys):
    run = str(run_folders.run_folder(tmp_path / "a").folder)
    capsys.readouterr()
    for options, words in (
        (["--kind", "trajectory"], "goes with --quantity, got --kind trajectory and no --quantity"),
        (["--kind", "tails", "--quantity", "rms"], "got --kind tails and --quantity rms"),
        (["--quantity", "rms", "--step", "0"], "leave one out"),
        (["--step", "first"], "expected training steps, 'last' or 'all' after --step, got first"),
        (["--step", "7"], "has no spectrum of step 7: choose among 0, 10, 20"),
    ):
        assert words in refused(capsys, main(["plot", run, *options]))


def test_compare_says_what_changed(tmp_path, capsys):
    """Steps 0 and 20 of a run whose spectrum shrinks by a fifth."""
    run = run_folders.run_folder(tmp_path / "a")
    capsys.readouterr()
    assert main(["compare", str(run.folder)]) == 0
    heading, columns, *lines = capsys.readouterr().out.splitlines()
    assert heading == f"{run.folder} step 0 (start), full -> {run.folder} step 20 (end), full, the same probe vectors"
    assert columns.split() == ["quantity", "before", "after", "change"]
    assert len(lines) == len(run.records[0].estimates)
    (largest,) = [line for line in lines if line.startswith("largest eigenvalue")]
    assert largest.split("eigenvalue")[1].split() == ["8", "6.4", "fell", "by", "20", "%", "[20,", "20]"]
    assert any(line.startswith("near-zero share (|λ| < 0.001)") for line in lines)
    starts = {line.index(word) for line in lines for word in ("fell by", "did not", "became") if word in line}
    assert starts == {columns.index("change")}  # aligned
    assert main(["compare", str(run.folder), "--from", "10"]) == 0
    assert "fell by 11.11 % [11.11, 11.12]" in capsys.readouterr().out


def test_compare_takes_both_sides_of_a_reset_and_two_runs(tmp_path, capsys):
    run = run_folders.run_folder(tmp_path / "a", marks=run_folders.RESETS)
    other = run_folders.run_folder(tmp_path / "b", marks=((0, ""), (20, "")), batches="others")
    capsys.readouterr()
    assert main(["compare", str(run.folder), "--from", "10", "--to", "10"]) == 0
    reset = capsys.readouterr().out
    assert "step 10 (before-reset), full -> " in reset
    assert "rose by 33.33 % [33.33, 33.34]" in reset
    assert main(["compare", str(run.folder), str(other.folder)]) == 0
    last = capsys.readouterr().out
    assert last.startswith(f"{run.folder} step 20 (end), full -> {other.folder} step 20, full")
    assert "note: the two spectra were measured on different batches" in last
    assert main(["compare", str(run.folder), str(other.folder), "--to", "0"]) == 0
    assert f"{run.folder} step 0 (start), full -> {other.folder} step 0, full" in capsys.readouterr().out


def test_compare_refuses_runs_of_other_things(tmp_path, capsys):
    first = run_folders.run_folder(tmp_path / "a", model="A", params=["*mlp*"], training=False)
    for name, config, words in (
        ("b", {"model": "B", "params": ["*mlp*"]}, "the same models are expected, got model: A in"),
        ("c", {"model": "A", "params": None}, "got params: *mlp* in"),
        ("d", {"model": "A", "params": ["*mlp*"], "training": True}, "got training: False in"),
    ):
        other = run_folders.run_folder(tmp_path / name, **config)
        capsys.readouterr()
        assert words in refused(capsys, main(["compare", str(first.folder), str(other.folder)]))
    smaller = Run.create(tmp_path / "e")
    values = DiagonalOperator(np.arange(1.0, 100.0))
    density = slq(values, probes=3, steps=20)
    smaller.append(run_folders.record(density), density)
    smaller.close()
    capsys.readouterr()
    assert "400 eigenvalues and 99" in refused(capsys, main(["compare", str(first.folder), str(smaller.folder)]))


def test_compare_says_other_batches_first_and_marks_what_is_unresolved(tmp_path, capsys):
    run = run_folders.run_folder(tmp_path / "a", batches="some")
    other = run_folders.run_folder(tmp_path / "b", marks=((0, ""), (20, "")), batches="others")
    capsys.readouterr()
    assert main(["compare", str(run.folder), str(other.folder)]) == 0
    _, note, columns, *lines = capsys.readouterr().out.splitlines()
    assert note.startswith("note: the two spectra were measured on different batches")
    assert columns.startswith("quantity")
    density = run.density(run.measured[-1])
    for line in lines:
        if line.startswith("near-zero share"):
            assert "?" in line.split(")")[1].split()[0]
        if line.startswith("largest eigenvalue"):
            assert "?" not in line
    assert not density.near_zero_share(run_folders.TOLERANCE).resolved


def strict_json(capsys):
    """What a command has printed, which is strict JSON and nothing else."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_json_has_the_numbers_of_the_table(model, text, tmp_path, capsys):
    assert measure(model, text, tmp_path / "run", "--json") == 0
    printed = strict_json(capsys)
    (record,) = Run(tmp_path / "run").records
    assert printed["estimates"]["rms"] == record.estimates["rms"].to_dict()
    assert printed["out"] == str(tmp_path / "run")
    assert "json" not in Run(tmp_path / "run").config
    run = run_folders.run_folder(tmp_path / "a")
    capsys.readouterr()
    assert main(["compare", str(run.folder), "--json"]) == 0
    printed = strict_json(capsys)
    assert printed["before"] == f"{run.folder} step 0 (start), full"
    assert printed["after"] == f"{run.folder} step 20 (end), full"
    assert printed["paired"] is True
    assert printed["notes"] == []
    changes = printed["changes"]
    assert changes["lambda_max"]["verdict"] == "fell by 20 % [20, 20]"
    assert changes["lambda_max"]["before"]["value"] == pytest.approx(8)
    assert changes["lambda_max"]["ratio"]["value"] == pytest.approx(0.8)
    assert set(changes) == set(run.records[0].estimates)


def test_json_of_numbers_that_are_not_finite_is_strict(tmp_path, capsys):
    """From nothing to something is no ratio."""
    run = Run.create(tmp_path / "a")
    for step, scale in ((0, 0.0), (1, 1.0)):
        spectrum = run_folders.density(scale=scale)
        run.append(run_folders.record(spectrum, step=step), spectrum)
    capsys.readouterr()
    assert main(["compare", str(run.folder), "--json"]) == 0
    assert strict_json(capsys)["changes"]["lambda_max"]["ratio"]["value"] is None


def test_compare_says_that_a_run_is_unfinished(tmp_path, capsys):
    part = run_folders.run_folder(tmp_path / "a", planned_records=5)
    whole = run_folders.run_folder(tmp_path / "b", planned_records=3)
    capsys.readouterr()
    assert main(["compare", str(part.folder), str(whole.folder), "--json"]) == 0
    assert strict_json(capsys)["notes"] == [f"{part.folder} is unfinished: 3 of 5 spectra are measured"]
    assert main(["compare", str(whole.folder)]) == 0
    assert "unfinished" not in capsys.readouterr().out


def interrupt(*given, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "place", "words"),
    [
        (["plot"], "spectra.views.panels.figure_of", "no image was written"),
        (["plot", "--quantity", "rms"], "spectra.views.style.rendered", "no image was written"),
        (["plot", "--out", "{run}/x.pdf"], "os.replace", "no image was written"),
        (["report"], "spectra.views.page.density_pictures", "no report was written"),
        (["report"], "os.replace", "no report was written"),
        (["compare"], "spectra.cli.compare.compare", "nothing was compared"),
    ],
)
def test_an_interrupt_says_truly_that_nothing_was_written(command, place, words, tmp_path, capsys, monkeypatch):
    run = run_folders.run_folder(tmp_path / "a", marks=((0, ""), (1, "")))
    before = sorted(run.folder.rglob("*"))
    capsys.readouterr()
    monkeypatch.setattr("spectra.views.page.trajectory_pictures", lambda run: [])
    monkeypatch.setattr(place, interrupt)
    name, *options = [word.format(run=run.folder) for word in command]
    assert main([name, str(run.folder), *options]) == 130
    assert capsys.readouterr().err == f"spectra: error: interrupted: {words}\n"
    assert sorted(run.folder.rglob("*")) == before


@pytest.mark.parametrize(("command", "name"), [("plot", "cumulative.png"), ("report", "report.html")])
@pytest.mark.parametrize("there", [False, True])
def test_an_interrupt_after_the_file_was_written_says_so(command, name, there, tmp_path, capsys, monkeypatch):
    run = run_folders.run_folder(tmp_path / "a", marks=((0, ""),))
    monkeypatch.setattr("spectra.views.page.density_pictures", lambda run: [])
    monkeypatch.setattr("spectra.views.page.trajectory_pictures", lambda run: [])
    if there:
        assert main([command, str(run.folder)]) == 0
    capsys.readouterr()
    monkeypatch.setattr("spectra.runs.files.sync_folder", interrupt)
    assert main([command, str(run.folder)]) == 130
    assert capsys.readouterr().err == f"spectra: error: interrupted: {run.folder / name} is written\n"


def test_options_are_checked_before_a_model_is_loaded(model, text, tmp_path, capsys, monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("spectra.integrations.loading.load_model", load)
    for option, value in (
        ("--sequences", "0"),
        ("--batch-size", "-1"),
        ("--length", "1"),
        ("--probes", "0"),
        ("--steps", "0"),
        ("--deflate", "-1"),
    ):
        words = refused(capsys, measure(model, text, tmp_path / "run", option, value))
        assert "at least" in words or "0 or more" in words, option
    assert "is a folder" in refused(capsys, measure(model, tmp_path, tmp_path / "run"))


def test_the_next_commands_can_be_pasted(model, text, tmp_path, capsys):
    out = tmp_path / "a run; of mine"
    assert measure(model, text, out) == 0
    assert f"next: spectra plot '{out}', or spectra report '{out}'" in capsys.readouterr().out


def test_an_interrupted_measurement_keeps_nothing_and_says_so(model, text, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("spectra.runs.probe.slq", interrupt)
        assert measure(model, text, tmp_path / "run") == 130
    assert capsys.readouterr().err == (
        "spectra: error: interrupted before the spectrum was complete; nothing is kept\n"
    )
    assert measure(model, text, tmp_path / "run") == 0


def test_compare_refuses_in_one_line(tmp_path, capsys):
    folder = str(run_folders.run_folder(tmp_path / "a").folder)
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    bare = Run.create(tmp_path / "bare")
    for step in (0, 1):
        bare.append(run_folders.record(run_folders.density(), step=step))
    capsys.readouterr()
    for arguments, words in (
        ([folder, "--to", "0"], "choose other steps with --from and --to"),
        ([folder, "--from", "7"], "choose among 0, 10, 20"),
        ([folder, "--mode", "ste"], "one of the modes full"),
        ([folder, folder, "--from", "0"], "give --to alone"),
        ([folder, str(tmp_path / "nowhere")], "there is no folder"),
        ([str(study.folder)], "is a study"),
        ([str(bare.folder)], "without Lanczos matrices"),
    ):
        assert words in refused(capsys, main(["compare", *arguments]))


def test_a_terminal_gets_a_progress_bar(model, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("spectra.cli.progress.on_terminal", lambda: True)
    measure(model, text, tmp_path / "run")
    assert re.search(r"measuring: .*products", capsys.readouterr().err)


BAD = {
    "missing model": (["{tmp}/nowhere"], "there is no folder"),
    "hub name": (["nobody/no-such-model"], "expected a folder or a cached model, got nobody/no-such-model"),
    "missing text": (["{model}", "--text", "{tmp}/nothing.txt"], "there is no file"),
    "empty text": (["{model}", "--text", "{tmp}/empty.txt"], "is empty"),
    "short text": (["{model}", "--text", "{tmp}/short.txt"], "the text is too short"),
    "glob": (["{model}", "--params", "*nothing*"], "no parameter matches '*nothing*'"),
    "length": (["{model}", "--length", "99"], "a length of 2 to 16 tokens"),
    "probes": (["{model}", "--probes", "0"], "probes"),
    "device": (["{model}", "--device", "abacus"], "expected a device"),
    "out": (["{model}", "--out", "{tmp}/taken"], "already holds a run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_no_run(case, model, text, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("hello")
    Run.create(tmp_path / "taken").append_telemetry({"step": 0, "loss": 1.0})
    arguments, message = BAD[case]
    filled = [argument.format(tmp=tmp_path, model=model) for argument in arguments]
    for option, value in (("--text", text), ("--out", tmp_path / "run")):
        if option not in filled:
            filled += [option, str(value)]
    assert message in refused(capsys, main(["measure", *filled]))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_leaves_the_folder_free(model, text, tmp_path, capsys):
    import torch

    from spectra.integrations.loading import load_causal_lm

    loaded, tokenizer = load_causal_lm(model)
    with torch.no_grad():
        loaded.model.norm.weight[0] = float("nan")
    loaded.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    capsys.readouterr()
    assert "nan" in refused(capsys, measure(tmp_path / "broken", text, tmp_path / "run")).lower()
    assert measure(model, text, tmp_path / "run") == 0


def test_plot_and_report_refuse_what_is_no_run(tmp_path, capsys):
    assert "there is no folder" in refused(capsys, main(["plot", str(tmp_path / "missing")]))
    assert "holds no config.json" in refused(capsys, main(["report", str(tmp_path)]))
    run = run_folders.run_folder(tmp_path / "a")
    capsys.readouterr()
    assert "choose among negative_share" in refused(capsys, main(["plot", str(run.folder), "--quantity", "nope"]))
    assert "one of the modes full" in refused(capsys, main(["plot", str(run.folder), "--mode", "ste"]))
    bad = str(tmp_path / "x.gif")
    assert "ending in .png, .svg, .pdf" in refused(capsys, main(["plot", str(run.folder), "--out", bad]))


def test_arguments_are_explained(capsys):
    assert main(["measure", "x", "--text", "y", "--out", "z", "--probes", "many"]) == 2
    assert "spectra measure: error: argument --probes: invalid int value: 'many'" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--version"]) == 0


def test_the_installed_command_ends_without_a_traceback(tmp_path):
    """As a person meets it: another process, a hub name, and nothing that answers."""
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    text = saved_models.write_text(tmp_path)
    command = [
        Path(sys.executable).parent / "spectra",
        "measure",
        "nobody/model",
        "--text",
        text,
        "--out",
        tmp_path / "run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("spectra: error: expected a folder or a cached model, got nobody/model")
    assert done.stderr.count("\n") == 1


def test_the_same_command_again_keeps_the_spectrum(model, text, tmp_path, capsys):
    out = tmp_path / "run"
    assert measure(model, text, out) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"}
    first = capsys.readouterr().out.splitlines()
    assert measure(model, text, out) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[:-1] == first[:-1]
    assert again[-1].startswith(f"measured before, in {out}; next: ")
    assert {path: path.read_bytes() for path in before} == before
    assert "seed: 0 in the folder, 5 asked for" in refused(capsys, measure(model, text, out, "--seed", "5"))


def test_a_checkpoint_with_other_weights_is_refused(model, text, tmp_path, capsys):
    import torch

    from spectra.integrations.loading import load_causal_lm

    loaded, tokenizer = load_causal_lm(model)
    for factor in (1.0, 1.5):
        with torch.no_grad():
            loaded.model.norm.weight.mul_(factor)
        loaded.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        capsys.readouterr()
        code = measure(tmp_path / "model", text, tmp_path / "run")
    assert "a checkpoint with other weights" in refused(capsys, code)


def test_matrices_of_a_killed_command_are_not_in_the_way(model, text, tmp_path):
    """It was killed between the matrices and their record."""
    assert measure(model, text, tmp_path / "run") == 0
    (name,) = [path.name for path in (tmp_path / "run" / "lanczos").iterdir()]
    (tmp_path / "run" / "records.jsonl").write_text("")
    assert measure(model, text, tmp_path / "run") == 0
    assert [path.name for path in (tmp_path / "run" / "lanczos").iterdir()] == [name]


def read_csv(text):
    return list(csv.DictReader(text.splitlines()))


def test_csv_has_the_numbers_of_json(model, text, tmp_path, capsys):
    shown = []
    for form in ("--json", "--csv"):
        capsys.readouterr()
        assert measure(model, text, tmp_path / "run", form) == 0  # the second time the run is there
        shown.append(capsys.readouterr().out)
    estimates, rows = json.loads(shown[0])["estimates"], read_csv(shown[1])
    assert [row["quantity"] for row in rows] == list(estimates)
    for row in rows:
        for name in ("value", "low", "high"):
            expected = estimates[row["quantity"]][name]
            assert row[name] == ("" if expected is None else repr(expected))
        assert (row["resolved"] == "True") is estimates[row["quantity"]]["resolved"]


def test_a_comparison_as_csv(tmp_path, capsys):
    folder = str(run_folders.run_folder(tmp_path / "run").folder)
    shown = []
    for form in ("--json", "--csv"):
        capsys.readouterr()
        assert main(["compare", folder, form]) == 0
        shown.append(capsys.readouterr().out)
    changes, rows = json.loads(shown[0])["changes"], read_csv(shown[1])
    assert [row["quantity"] for row in rows] == list(changes)
    for row in rows:
        change = changes[row["quantity"]]
        assert float(row["before"]) == change["before"]["value"]
        assert float(row["difference_low"]) == change["difference"]["low"]
        assert row["verdict"] == change["verdict"]


def test_json_and_csv_are_not_given_together(tmp_path, capsys):
    assert main(["compare", str(tmp_path), "--json", "--csv"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument --csv: not allowed with argument --json" in line
