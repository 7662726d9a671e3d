"""The command line: what it does with good options, and one line with exit code 2 for every kind of bad one."""

import csv
import json
import math
import re
import subprocess
import sys

import pytest
import saved_models
import texts
import torch

import qat
from qat import cli
from qat.study.config import SmallLlamaConfig, StudyConfig
from qat.training.config import SMALL_LLAMA_RATE, TrainConfig
from qat.training.distillation import DistillationConfig
from qat.training.parq import PARQConfig
from spectra.runs.folder import Run
from spectra.views import page

QUICK = [
    *("--steps", "2", "--batch-size", "2", "--length", "8", "--probes", "1", "--lanczos-steps", "3", "--deflate", "0"),
    *("--count-products", "0", "--measure-sequences", "1", "--validation-sequences", "8", "--device", "cpu"),
]


@pytest.fixture
def no_figures(monkeypatch):
    """For what is not about figures: drawing takes longer than all else."""
    for name in ("density_pictures", "trajectory_pictures"):
        monkeypatch.setattr(page, name, lambda run: [])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """`--model FOLDER --text FILE` of a tiny model."""
    folder = tmp_path_factory.mktemp("llama")
    return ["--model", str(saved_models.save(folder / "model")), "--text", str(saved_models.write_text(folder))]


def refused(capfd, *arguments):
    """The one line that the command ends with; it says nothing else on stderr and exits with 2."""
    capfd.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(r"qat( compare| train| evaluate| export)?: error: ", line)  # argparse names the command too
    return line


def strict_json(text):
    """What stands in strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.usefixtures("no_figures")
def test_quantized_activations_and_caches(capfd, llama, tmp_path):
    out = tmp_path / "out"
    command = ["train", "--bits", "2", "--activation-bits", "8", "--activation-asymmetric", "--cache-bits", "4"]
    assert cli.main([*command, "--out", str(out), *QUICK, *llama, "--json"]) == 0
    row = strict_json(capfd.readouterr().out)
    assert (row["label"], row["activation_bits"], row["cache_bits"]) == ("W2A8KV4 WinQ", 8, 4)
    config = json.loads((out / "config.json").read_text())
    assert (config["activation_bits"], config["cache_bits"], config["activation_symmetric"]) == (8, 4, False)
    assert 0 < config["quantized_share"] < 1
    line = refused(capfd, "train", "--activation-bits", "5", "--out", tmp_path / "other", *QUICK, *llama)
    assert "activation_bits must be 16, 8, 4" in line


@pytest.mark.usefixtures("no_figures")
def test_compare_leaves_what_it_says(capfd, llama, tmp_path):
    out = tmp_path / "out"
    command = ["compare", "--bits", "1.58,4", "--out", str(out), "--lr", "0.01", *QUICK, *llama]
    assert cli.main(command) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert f"written to {out}" in shown.out
    rows = json.loads((out / "table.json").read_text())
    kinds = [(row["bits"], row["method"]) for row in rows]
    assert kinds == [(16, "full-precision"), (1.58, "baseline"), (1.58, "winq"), (4, "baseline"), (4, "winq")]
    for row in rows:
        assert f"{row['validation_loss']:.4f}" in shown.out
        assert math.isfinite(row["rms_end"]["value"])
    assert (out / "report.html").exists()
    assert {run.folder.name for run in Run(out).runs} == {
        *("full-precision", "1.58bit-baseline", "1.58bit-winq", "4bit-baseline", "4bit-winq")
    }
    assert cli.main([*command, "--json"]) == 0
    printed = strict_json(capfd.readouterr().out)
    assert printed["out"] == str(out)
    assert printed["rows"] == rows
    assert cli.main([*command, "--csv"]) == 0
    table = list(csv.DictReader(capfd.readouterr().out.splitlines()))
    assert [(float(row["bits"]), row["method"]) for row in table] == kinds
    for row, expected in zip(table, rows, strict=True):
        assert float(row["validation_loss"]) == expected["validation_loss"]
        assert (float(row["rms_end"]), row["rms_end_low"]) == (
            expected["rms_end"]["value"],
            repr(expected["rms_end"]["low"]),
        )


def test_every_option_reaches_the_study(monkeypatch, llama, tmp_path):
    seen = []
    monkeypatch.setattr("qat.study.compare.compare", lambda config, say: seen.append(config))
    options = """--bits 4 --methods winq --out OUT --tokenizer some/name --length 9 --trust-remote-code --device cpu
        --steps 7 --batch-size 3 --lr 0.5 --schedule wsd --warmup 0.1 --weight-decay 0.2 --evaluate-every 2
        --validation-sequences 5 --seed 11 --quantizer lsq --skip a b --preset released --every 3 --sigma 0.25
        --group-size 4 --workers 2 --initial-scale mse --modes latent,noisy --probes 6 --lanczos-steps 8
        --measure-sequences 4 --no-reference
        --save-every 3 --distill 0.3 --distill-temperature 2 --distill-hidden 0.5
        --measured-loss training"""
    assert cli.main(["compare", *options.split(), *llama]) == 0
    (config,) = seen
    folder, text = llama[1], llama[3]
    assert config == StudyConfig(
        out="OUT",
        bits=(4,),
        methods=("winq",),
        model=folder,
        text=(text,),
        length=9,
        tokenizer="some/name",
        trust_remote_code=True,
        device="cpu",
        quantizer="lsq",
        group_size=4,
        initial_scale="mse",
        skip=("a", "b"),
        validation_sequences=5,
        modes=("latent", "noisy"),
        probes=6,
        lanczos_steps=8,
        measure_sequences=4,
        workers=2,
        reference=False,
        save_every=3,
        distillation=DistillationConfig(weight=0.3, temperature=2.0, hidden=0.5),
        measured_loss="training",
        train=TrainConfig(
            steps=7,
            batch_size=3,
            learning_rate=0.5,
            schedule="wsd",
            warmup=0.1,
            weight_decay=0.2,
            evaluate_every=2,
            seed=11,
        ),
        winq=cli.WinQConfig(every=3, alpha=0.8, sigma=0.25, noise_scales=True),
    )


def test_the_options_of_parq_reach_the_training(monkeypatch):
    seen = []
    monkeypatch.setattr("qat.study.compare.train_one", lambda config, say: seen.append(config))
    options = "train --out OUT --quantizer parq --parq-start 0.1 --parq-end 0.7 --parq-steepness 4 --device cpu"
    assert cli.main(options.split()) == 0
    assert seen[0].parq == PARQConfig(start=0.1, end=0.7, steepness=4.0)
    assert cli.main(["train", "--out", "OUT", "--quantizer", "parq", "--device", "cpu"]) == 0
    assert seen[1].parq == PARQConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--parq-start 0.1", "anneal the quantizer parq, got 'auto': give --quantizer parq"),
        ("--quantizer parq --parq-start 0.9 --parq-end 0.5", "0 <= start < end <= 1"),
        ("--quantizer parq --parq-steepness 0", "steepness must be above 0"),
        ("--measured-loss training", "give --distill"),
        ("--distill --measured-loss teacher", "choose one of cross-entropy, training"),
    ],
)
def test_settings_of_what_is_not_used_are_refused(capfd, options, message):
    assert message in refused(capfd, "train", "--out", "OUT", "--device", "cpu", *options.split())


def test_without_options_the_defaults_are_those_of_the_settings(monkeypatch):
    seen = []
    monkeypatch.setattr("qat.study.compare.compare", lambda config, say: seen.append(config))
    monkeypatch.setattr(cli, "available_cores", lambda: 3)
    assert cli.main(["compare", "--out", "OUT", "--device", "cpu"]) == 0
    assert cli.main(["compare", "--out", "OUT", "--device", "cpu", "--model", "some/name"]) == 0
    assert seen[0] == StudyConfig(out="OUT", workers=3, device="cpu")
    assert seen[0].train.learning_rate == SMALL_LLAMA_RATE
    assert seen[1].workers == 1
    assert seen[1].train.learning_rate < 1e-4  # a pretrained model would not survive the other


def test_the_options_of_the_default_model_reach_it(monkeypatch):
    seen = []
    monkeypatch.setattr("qat.study.compare.train_one", lambda config, say: seen.append(config))
    arguments = "train --out OUT --vocabulary-size 500 --base-steps 30 --method baseline --bits 1.58 --device cpu"
    assert cli.main(arguments.split()) == 0
    assert seen[0].small_llama == SmallLlamaConfig(vocabulary_size=500, steps=30)
    assert (seen[0].methods, seen[0].bits) == (("baseline",), (1.58,))


def test_help_names_the_defaults(capfd):
    assert cli.main(["compare", "--help"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    assert f"training steps (default: {TrainConfig().steps})" in text
    assert f"tokens a sequence (default: {StudyConfig(out='x').length})" in text


@pytest.mark.usefixtures("no_figures")
def test_a_trained_model_can_be_evaluated(capfd, llama, tmp_path):
    out = tmp_path / "out"
    command = ["train", "--bits", "2", "--method", "baseline", "--out", str(out), *QUICK, *llama]
    capfd.readouterr()
    assert cli.main(command) == 0
    shown = capfd.readouterr()
    assert f"written to {out}" in shown.out
    assert shown.err == ""
    records = Run(out).records
    assert [record.label for record in records] == ["start", "quarter", "end"]
    assert cli.main([*command, "--json"]) == 0
    printed = strict_json(capfd.readouterr().out)
    assert (printed["out"], printed["bits"], printed["method"]) == (str(out), 2, "baseline")
    assert printed["rms_end"] == records[-1].estimates["rms"].to_dict()
    assert cli.main(["evaluate", str(out / "model"), "--block", "8", *llama[2:], "--device", "cpu"]) == 0
    shown = capfd.readouterr()
    found = re.fullmatch(
        r"perplexity ([\d.]+), loss ([\d.]+) nats a token, over ([\d,]+) tokens in blocks of 8\n", shown.out
    )
    assert found
    assert float(found[1]) == pytest.approx(math.exp(float(found[2])), rel=1e-3)
    assert cli.main(["evaluate", str(out / "model"), "--block", "8", *llama[2:], "--device", "cpu", "--json"]) == 0
    printed = strict_json(capfd.readouterr().out)
    assert set(printed) == {"perplexity", "loss", "tokens", "block"}
    assert printed["perplexity"] == pytest.approx(float(found[1]), rel=1e-3)
    assert (f"{printed['tokens']:,}", printed["block"]) == (found[3], 8)


@pytest.mark.usefixtures("no_figures")
def test_a_trained_model_is_exported_and_evaluated_to_the_same_loss(capfd, llama, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["train", "--bits", "2", "--method", "winq", "--out", str(out), *QUICK, *llama]) == 0
    capfd.readouterr()
    assert cli.main(["export", str(out / "model"), "--format", "packed", "--out", str(tmp_path / "packed")]) == 0
    shown = capfd.readouterr()
    assert "quantized weights as packed" in shown.out
    assert "2 bits a weight" in shown.out
    given = ["--block", "8", "--stride", "4", "--limit", "5", "--per-byte", *llama[2:], "--device", "cpu", "--json"]
    found = []
    for folder in (out / "model", tmp_path / "packed"):
        assert cli.main(["evaluate", str(folder), *given]) == 0
        found.append(strict_json(capfd.readouterr().out))
    assert found[0] == found[1]
    assert set(found[0]) == {"perplexity", "loss", "tokens", "block", "stride", "bits_per_byte", "bytes"}
    assert found[0]["tokens"] == 8 + 4 * 4 - 1
    assert found[0]["bytes"] == 23, "a letter a token"
    model = qat.load(out / "model")
    assert [layer.quantizer.bits for _, layer in qat.quant_layers(model)] == [2] * 14
    line = refused(capfd, "export", out / "model", "--format", "gguf", "--out", tmp_path / "gguf")
    assert "GGUF's blocks are 32" in line or "byte-level BPE" in line
    assert "--format is one of packed" in refused(
        capfd, "export", out / "model", "--format", "x", "--out", tmp_path / "x"
    )
    assert "--batch-size is one block" in refused(capfd, "evaluate", out / "model", *given, "--batch-size", "0")


def test_evaluate_gives_the_mean_over_blocks_of_the_whole_text(capfd, llama):
    assert cli.main(["evaluate", llama[1], *llama[2:], "--device", "cpu"]) == 0
    shown = capfd.readouterr().out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama[1])
    with open(llama[3], encoding="utf-8") as file:
        tokens = torch.tensor(AutoTokenizer.from_pretrained(llama[1])(file.read())["input_ids"])
    blocks = tokens[: len(tokens) // 16 * 16].view(-1, 16)  # the model's longest
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert float(re.search(r"loss ([\d.]+)", shown)[1]) == pytest.approx(loss, abs=2e-5)
    assert "in blocks of 16" in shown


def test_a_refusal_in_a_process_of_its_own_is_one_line_and_loads_nothing_that_trains(tmp_path):
    code = "import sys, qat.cli; code = qat.cli.main(sys.argv[1:])"
    code += "; print(sorted({'transformers', 'datasets', 'matplotlib'} & set(sys.modules))); sys.exit(code)"
    command = [sys.executable, "-c", code, "compare", "--bits", "1,7", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr == "qat: error: bits must be one of 1, 1.58, 2, 3, 4, 8; got 7\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bits 5", "bits must be one of 1, 1.58, 2, 3, 4, 8; got 5"),
        ("--bits two", "bits must be one of 1, 1.58, 2, 3, 4, 8; got two"),
        ("--bits ,", "bits is empty"),
        ("--methods baseline,magic", "unknown method 'magic': choose from baseline, winq"),
        ("--modes ste,fisher", "unknown mode 'fisher': choose from ste, quantized, latent, noisy"),
        ("--schedule linear", "unknown schedule 'linear': choose one of constant, cosine, wsd"),
        ("--quantizer magic", "quantizer must be one of auto"),
        ("--group-size 1", "group_size must be a whole number of columns, 2 or more"),
        ("--initial-scale median", "initial_scale must be one of max, mse"),
        ("--preset mine", "unknown preset 'mine': choose from paper, released"),
        ("--every never", "--every is a number of steps or a fraction of the run, got 'never'"),
        ("--every 1.5", "every must be a whole number of steps"),
        ("--alpha 2", "alpha must lie between 0 (no reset) and 1 (onto the grid); got 2.0"),
        ("--sigma nan", "sigma must be 0 (no noise) or a finite positive number"),
        ("--lr 0", "learning_rate is a number above 0, got 0.0"),
        ("--lr fast", "argument --lr/--learning-rate: invalid float value: 'fast'"),
        ("--steps 0", "steps is 1 or more, got 0"),
        ("--length 1", "length is 2 or more, got 1"),
        ("--seed -3", "a seed is a whole number"),
        ("--device tpu", "unknown device 'tpu': choose cpu or cuda"),
        ("--seeds 0,one", "--seeds is a list of whole numbers such as 0,1,2, got '0,one'"),
        ("--seeds ,", "--seeds is empty"),
        ("--seeds 0,1 --seed 2", "argument --seed: not allowed with argument --seeds"),
        ("--save-every -1", "save_every is a number of training steps, or 0 for none, got -1"),
        ("--distill 2", "the weight of distillation lies between 0 and 1, got 2.0"),
        ("--distill-hidden 1", "give --distill too"),
        ("--workers 0", "workers is 1 or more, got 0"),
        ("--base-steps 0", "steps is 1 or more, got 0"),
        ("--vocabulary-size 9", "a byte-level vocabulary has 257 tokens or more, got 9"),
        ("--magic", "unrecognized arguments: --magic"),
        ("--model ./no/such/folder", "there is no folder './no/such/folder'"),
        ("--text no-such-file.txt", "there is no file no-such-file.txt"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(options, message, capfd, tmp_path):
    assert message in refused(capfd, "compare", "--out", tmp_path / "out", *options.split())
    assert not (tmp_path / "out").exists()


def test_options_that_are_missing_are_named(capfd):
    assert "the following arguments are required: --out" in refused(capfd, "compare")
    assert "COMMAND" in refused(capfd)
    assert "invalid choice: 'compress'" in refused(capfd, "compress")


def test_a_missing_text_is_refused(capfd, tmp_path):
    line = refused(capfd, "compare", "--out", tmp_path / "out", "--text", tmp_path / "nothing.txt")
    assert f"there is no file {tmp_path / 'nothing.txt'}" in line


def test_an_empty_text_is_refused(capfd, tmp_path):
    (path,) = texts.write(tmp_path, " \n\n")
    assert f"{path} is empty" in refused(capfd, "compare", "--out", tmp_path / "out", "--text", path)


def test_a_text_that_is_too_short_is_refused_with_both_counts(capfd, tmp_path):
    (path,) = texts.write(tmp_path, texts.prose(3000))
    line = refused(capfd, "compare", "--out", tmp_path / "out", "--text", path)
    needed = TrainConfig().batch_size * StudyConfig(out="x").length
    assert re.search(rf"has \d+ tokens and {needed} are needed .*give more text, or a smaller --length", line)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_another_run_is_refused(capfd, llama, tmp_path):
    Run.create(tmp_path / "out", {"mine": True}).append_telemetry({"step": 1})
    line = refused(capfd, "compare", "--out", tmp_path / "out", *llama)
    assert f"{tmp_path / 'out'} holds a run with other settings (study: none in the folder, compare asked for)" in line
    assert "choose another --out" in line
    assert Run(tmp_path / "out").config == {"mine": True}


def test_a_model_with_nothing_to_quantize_is_refused_before_it_is_trained(capfd, tmp_path):
    (path,) = texts.write(tmp_path, texts.prose(30_000))
    line = refused(capfd, "compare", "--out", tmp_path / "out", "--text", path, "--skip", "*")
    assert "has nothing to quantize" in line
    assert not list((tmp_path / "cache").glob("small-llama*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--model", "--dataset"])
def test_a_hub_name_without_network_is_refused(option, capfd, tmp_path):
    line = refused(capfd, "compare", "--out", tmp_path / "out", option, "nobody/nothing")
    assert "nobody/nothing" in line
    assert "no network" in line


def test_a_model_folder_without_its_tokenizer_says_how_to_give_one(capfd, llama, tmp_path):
    folder = saved_models.save(tmp_path / "model", with_tokenizer=False)
    line = refused(capfd, "compare", "--out", tmp_path / "out", "--model", folder, *llama[2:])
    assert "give --tokenizer NAME_OR_FOLDER" in line
    assert "longest" not in line


def test_a_length_that_the_model_does_not_take_is_refused(capfd, llama, tmp_path):
    line = refused(capfd, "compare", "--out", tmp_path / "out", *llama, "--length", 40, "--batch-size", 2)
    assert "at most 16 tokens, got --length 40" in line


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("no_figures")
def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_recorded(workers, llama, tmp_path, capfd):
    out = tmp_path / "out"
    options = ["--bits", 2, "--methods", "baseline", "--out", out, *QUICK, "--steps", 4, *llama, "--lr", "1e30"]
    options += ["--no-reference", "--workers", workers]
    line = refused(capfd, "compare", *options)  # and nothing of a traceback, from a worker either
    found = re.search(r"at step (\d)", line)
    assert found
    assert "learning rate" in line
    assert str(out) in line
    run = Run(out / "2bit-baseline")
    assert run.records[0].label == "start"
    assert run.telemetry[0]["validation_loss"] > 0
    assert int(found[1]) - 1 <= max(telemetry["step"] for telemetry in run.telemetry) <= int(found[1])
    assert "Unfinished:" in (out / "report.html").read_text()


def test_evaluating_what_is_not_there_is_refused(capfd, llama, tmp_path):
    (path,) = texts.write(tmp_path, "a")
    assert "two tokens or more" in refused(capfd, "evaluate", llama[1], "--text", path)
    assert "there is no folder" in refused(capfd, "evaluate", tmp_path / "nothing", "--text", path)
