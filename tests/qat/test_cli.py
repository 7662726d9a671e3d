"""The commands as a person types them: a real run, and every kind of bad input in one line with exit code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import saved_models
import texts

from qat.cli import main
from spectra import Run

TINY = (
    *("--steps", "6", "--batch-size", "4", "--length", "24", "--probes", "2", "--lanczos-steps", "5"),
    *("--measure-sequences", "2", "--validation-sequences", "4"),
)
SMALL_MODEL = ("--vocabulary-size", "300", "--base-steps", "4")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    texts.write(folder, texts.prose(40_000), "", "too short")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_CACHE", str(folder / "cache"))
        yield folder


def text(place, index=0):
    return ("--text", str(place / f"text-{index}.txt"))


def compare(place, name, *more, bits="2"):
    return main(["compare", "--bits", bits, "--out", str(place / name), *TINY, *more])


def refused(capsys, code):
    """The one line of an error."""
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert "\n" not in error, error
    assert error.startswith("qat: error: ")
    assert "Traceback" not in error
    return error


def test_compare_on_a_text_of_ours(place, capsys):
    assert compare(place, "run", *text(place), *SMALL_MODEL) == 0
    said = capsys.readouterr()
    assert "winq" in said.out
    assert "perplexity" in said.out
    assert str(place / "run") in said.out
    run = Run(place / "run")
    assert len([record for single in run.runs for record in single.records]) >= 10
    assert (place / "run" / "report.html").is_file()


@pytest.mark.parametrize("architecture", ["qwen3", "gpt-neox", "opt", "gpt2", "llama-tied"])
def test_a_model_folder_of_any_architecture(place, capsys, architecture):
    model = saved_models.save(place / f"model-{architecture}", architecture)
    path = saved_models.write_text(place)
    code = compare(
        place, f"of-{architecture}", "--model", str(model), "--text", str(path), "--length", "12", "--methods", "winq"
    )
    assert code == 0, capsys.readouterr().err
    assert "2" in capsys.readouterr().out


def test_evaluate_prints_a_perplexity(place, capsys):
    model = saved_models.save(place / "model-evaluated")
    assert main(["evaluate", str(model), "--text", str(saved_models.write_text(place)), "--block", "12"]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "7.3"), ("7.3", "1.58")),
        (("--bits", "two"), ("two",)),
        (("--methods", "sgd"), ("sgd", "winq")),
        (("--modes", "third"), ("third", "ste")),
        (("--schedule", "sawtooth"), ("sawtooth", "cosine")),
        (("--preset", "mine"), ("mine", "paper")),
        (("--quantizer", "gptq"), ("gptq", "lsq")),
        (("--alpha", "3"), ("alpha", "3")),
        (("--steps", "0"), ("steps", "0")),
        (("--steps", "many"), ("many",)),
        (("--device", "tpu"), ("tpu",)),
        (("--no-such-option",), ("no-such-option",)),
        (("--text", "no/such/file.txt"), ("no/such/file.txt",)),
        (("--model", "no/such/folder/at/all"), ("no/such/folder",)),
        (("--model", "nobody/no-such-model"), ("nobody/no-such-model",)),
        (("--dataset", "nobody/no-such-data"), ("nobody/no-such-data",)),
    ],
)
def test_bad_options_end_in_one_line(place, capsys, options, words):
    line = refused(capsys, compare(place, "refused", *options))
    for word in words:
        assert word in line
    assert not (place / "refused" / "records.jsonl").exists()


@pytest.mark.parametrize(("index", "word"), [(1, "empty"), (2, "token")])
def test_an_empty_or_short_text(place, capsys, index, word):
    line = refused(capsys, compare(place, "short", *text(place, index), *SMALL_MODEL))
    assert word in line
    assert f"text-{index}.txt" in line or "token" in line


def test_nothing_to_quantize(place, capsys):
    line = refused(capsys, compare(place, "nothing", *text(place), *SMALL_MODEL, "--skip", "*"))
    assert "quantize" in line


def test_a_folder_that_holds_another_run(place, capsys):
    (place / "taken").mkdir()
    (place / "taken" / "config.json").write_text("{}")
    line = refused(capsys, compare(place, "taken", *text(place), *SMALL_MODEL))
    assert "taken" in line
    assert (place / "taken" / "config.json").read_text() == "{}"


def test_a_loss_that_is_not_finite(place, capsys):
    code = compare(place, "broken", *text(place), *SMALL_MODEL, "--methods", "baseline", "--lr", "1e30")
    line = refused(capsys, code)
    assert "step" in line
    assert "learning rate" in line
    assert any(single.records for single in Run(place / "broken").runs)


def test_the_installed_command_in_a_process_of_its_own(place):
    """With no terminal: no progress bar, no traceback, exit code 2."""
    command = [str(Path(sys.executable).with_name("qat")), "compare", "--bits", "7.3", "--out", str(place / "process")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("qat: error: ")
    assert len(done.stderr.splitlines()) == 1
