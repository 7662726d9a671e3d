"""Tasks of lm-eval on a quantized model, against log-likelihoods that are summed token by token."""

import functools
import json

import pytest
import quantized_models
import saved_models
import torch

import qat
from qat import cli
from qat.training.tasks import TaskScore, evaluate_tasks, in_table
from spectra.backend.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def task(tmp_path):
    """A folder with a task of multiple choice over letters, the tokens of the helpers' tokenizer, and its rows."""
    pytest.importorskip("lm_eval")
    rows = [
        {"question": LETTERS[i : i + 4], "choices": [LETTERS[i + 4], LETTERS[i + 2] + LETTERS[i]], "answer": i % 2}
        for i in range(12)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    settings = {
        "task": "letters_standin",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "letters.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder, rows


def model_and_tokenizer(**config):
    model = quantized_models.trained("llama", steps=0, options={"tied": False}, **config)
    return model.eval(), saved_models.tokenizer(quantized_models.VOCABULARY)


def accuracy(model, tokenizer, rows):
    """The share of rows whose answer has the largest sum of log p over its tokens, in float64."""
    right = 0
    for row in rows:
        sums = []
        for choice in row["choices"]:
            before = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
            ids = tokenizer(row["question"] + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(logs[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
        right += sums.index(max(sums)) == row["answer"]
    return right / len(rows)


@pytest.mark.parametrize("config", [{"bits": 2}, {"bits": 4, "activation_bits": 8, "cache_bits": 8}])
def test_scores_are_those_of_the_quantized_model(task, config):
    folder, rows = task
    model, tokenizer = model_and_tokenizer(**config)
    model.train()
    (score,) = evaluate_tasks(model, tokenizer, ["letters_stand*"], folder=folder, batch_size=3)
    assert model.training
    assert "tie_weights" not in vars(model)
    assert (score.task, score.metric, score.shots, score.examples) == ("letters_standin", "acc", 0, 12)
    assert score.value == pytest.approx(accuracy(model.eval(), tokenizer, rows))
    assert 0 < score.value < 1
    error = (score.value * (1 - score.value) / 11) ** 0.5
    assert score.standard_error == pytest.approx(error, rel=1e-6)
    (few,) = evaluate_tasks(model, tokenizer, ["letters_standin"], folder=folder, limit=5)
    assert few.value == pytest.approx(accuracy(model, tokenizer, rows[:5]))


def test_the_command_prints_scores_of_trained_and_packed_models(task, tmp_path, capfd):
    folder, rows = task
    model, tokenizer = model_and_tokenizer(bits=4, quantize_head=True)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert cli.main(["export", str(tmp_path / "saved"), "--format", "packed", "--out", str(tmp_path / "packed")]) == 0
    expected = accuracy(qat.load(tmp_path / "saved"), tokenizer, rows)
    for name in ("saved", "packed"):
        capfd.readouterr()
        given = ["--tasks", "letters_standin", "--task-folder", str(folder), "--device", "cpu"]
        assert cli.main(["evaluate", str(tmp_path / name), *given, "--json"]) == 0
        (score,) = json.loads(capfd.readouterr().out)["scores"]
        assert score["value"] == pytest.approx(expected)


def test_unknown_tasks_and_settings_are_refused(task, monkeypatch):
    import lm_eval.tasks

    # lm-eval's own tasks are ten thousand files, which take long to read.
    small = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **options: small(include_path=include_path))
    folder, _ = task
    model, tokenizer = model_and_tokenizer(bits=2)
    for tasks, options, message in (
        (["letters_standi"], {}, "no task 'letters_standi'; did you mean letters_standin"),
        (["letters_standin"], {"shots": -1}, "--shots is 0 or more, got -1"),
        (["letters_standin"], {"limit": 0}, "--limit is 1 or more, got 0"),
        (["letters_standin"], {"chat_template": True}, "no chat template"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            evaluate_tasks(model, tokenizer, tasks, folder=folder, **options)
        assert "\n" not in str(caught.value)
    (folder.parent / "rows.jsonl").unlink()
    with pytest.raises(InputError, match="lm-eval failed on letters_standin") as caught:
        evaluate_tasks(model, tokenizer, ["letters_standin"], folder=folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there is no folder"):
        evaluate_tasks(model, tokenizer, ["letters_standin"], folder=folder / "none")


def test_without_lm_eval_the_extra_is_named_before_the_model_is_loaded(monkeypatch, capfd):
    monkeypatch.setattr("spectra.backend.extras.find_spec", lambda name: None)
    assert cli.main(["evaluate", "no/model", "--tasks", "piqa"]) == 2
    assert capfd.readouterr().err == 'qat: error: lm_eval is not installed: pip install "spectra-qat[lm-eval]"\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tasks piqa --block 8", "--block belongs to --text"),
        ("--tasks piqa --per-byte", "--per-byte belongs to --text"),
        ("--text FILE --shots 0", "--shots belongs to --tasks"),
        ("--text FILE --task-folder DIR", "--task-folder belongs to --tasks"),
        ("--text FILE --tasks piqa", "not allowed with argument"),
        ("", "one of the arguments --text --tasks is required"),
    ],
)
def test_text_and_tasks_have_options_of_their_own(options, message, capfd):
    assert cli.main(["evaluate", "no/model", *options.split()]) == 2
    assert message in capfd.readouterr().err


def test_the_table_has_a_line_for_each_metric():
    scores = [TaskScore("a", "acc", 0.5, 0.1, shots=0, examples=1200), TaskScore("group", "text", "n/a")]
    assert in_table(scores).splitlines() == [
        "task   metric  filter  shots  examples  value   standard error",
        "a      acc     none    0      1,200     0.5000  0.1000",
        "group  text    none                     n/a",
    ]
