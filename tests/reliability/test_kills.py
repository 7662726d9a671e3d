"""SIGKILL and Ctrl-C at random moments: the same command again ends with the files of an undisturbed one, bit for bit.

Those are records, matrices, telemetry, tables and the weights of the trained model.
"""

import json
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import commands
import pytest
import saved_models

from spectra.runs.folder import is_recorded

SEED = 13
TRAINING = [
    *("--steps", "4", "--batch-size", "2", "--length", "8", "--probes", "1", "--lanczos-steps", "3", "--deflate", "0"),
    *("--count-products", "0", "--measure-sequences", "1", "--validation-sequences", "4", "--device", "cpu"),
]
# With checkpoints, weight noise, resets, and spectra that carry their outliers to the next.
SAVED = [
    *("--steps", "8", "--batch-size", "2", "--length", "8", "--probes", "1", "--lanczos-steps", "2", "--deflate", "1"),
    *("--count-products", "0", "--measure-sequences", "1", "--validation-sequences", "4", "--device", "cpu"),
    *("--save-every", "1", "--schedule", "cosine", "--warmup", "0.2"),
]
ARGUMENTS = {
    "study": ["qat", "compare", "--bits", "2", *TRAINING],
    "training": ["qat", "train", "--bits", "2", *TRAINING],
    "saved training": ["qat", "train", "--bits", "2", *SAVED],
    "saved study": ["qat", "compare", "--bits", "2,4", *SAVED],
    "saved seeds": ["qat", "train", "--bits", "2", "--seeds", "0,7", *SAVED],
    "measurement": [
        "spectra",
        "measure",
        "--probes",
        "2",
        "--steps",
        "60",
        "--deflate",
        "4",
        "--device",
        "cpu",
        "--count-products",
        "0",
    ],
}
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs the signals of POSIX")


@dataclass
class Command:
    """A command, what it leaves undisturbed, and how long it takes."""

    words: list
    cache: Path
    undisturbed: dict
    seconds: float

    def start(self, out, *more, fresh=False):
        return commands.start(*self.words, "--out", out, *more, cache=self.cache, fresh=fresh)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command of a name."""
    folder, made = tmp_path_factory.mktemp("kills"), {}
    model, text = saved_models.save(folder / "model"), saved_models.write_text(folder)

    def made_once(name, fresh=False):
        if (name, fresh) not in made:
            program, first, *options = ARGUMENTS[name]
            model_words = [model] if program == "spectra" else ["--model", model]
            words = [program, first, *model_words, "--text", text, *options]
            undisturbed = folder / f"{name}-{fresh}"
            commands.finish(commands.start("spectra", "--version", cache=folder / "cache"))  # the server is there now
            started = time.monotonic()
            process = commands.start(*words, "--out", undisturbed, cache=folder / "cache", fresh=fresh)
            code, _, err = commands.finish(process)
            assert (code, err) == (0, "")
            seconds = time.monotonic() - started
            made[name, fresh] = Command(words, folder / "cache", commands.contents(undisturbed), seconds)
        return made[name, fresh]

    return made_once


def wait_for(process, condition):
    """Wait until the condition holds; the command must not end before that."""
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


def killed_and_gone_on(command, out, kills, seed, *more, fresh=False):
    """Kill a command so many times, each at a random moment of its time, then let it end."""
    chance = random.Random(seed)
    print(f"seed = {seed}")
    for _ in range(kills):
        process = command.start(out, *more, fresh=fresh)
        time.sleep(chance.uniform(0.3 if fresh else 0.0, 1.0) * command.seconds)  # a fresh one imports first
        commands.kill_alone(process)
        commands.finish(process)
        assert commands.none_left(process)
    code, _, err = commands.finish(command.start(out, *more, fresh=fresh))
    assert (code, err) == (0, ""), err
    left, expected = commands.contents(out), dict(command.undisturbed)
    for contents in (left, expected):
        contents.get("config.json", {}).pop("workers", None)
    assert left == expected
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
    assert not list(out.rglob("*.partial"))
    assert not list(out.rglob("checkpoint*"))
    assert not list(out.rglob("*.pt*"))
    assert list(command.cache.with_name("temporary").iterdir()) == []


@pytest.mark.parametrize("name", ["study", "training", "saved training", "measurement"])
def test_what_is_killed_twice_ends_as_if_undisturbed(name, command, tmp_path):
    killed_and_gone_on(command(name), tmp_path / "out", 2, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saved training", "saved study", "saved study with workers", "saved seeds"])
def test_twenty_kills_of_trainings_with_checkpoints(name, command, tmp_path):
    """20 kills each, at random moments of one command after another, until the last may end."""
    more = ["--workers", 2] if name.endswith("workers") else []
    killed_and_gone_on(command(name.removesuffix(" with workers")), tmp_path / "out", 20, SEED, *more)


def test_a_killed_training_does_not_repeat_the_steps_before_its_checkpoint(command, tmp_path):
    out, training = tmp_path / "out", command("saved training")
    process = training.start(out)
    wait_for(process, (out / "checkpoints" / "checkpoint-3" / "complete.json").exists)
    commands.kill_alone(process)
    commands.finish(process)
    kept = (out / "telemetry.jsonl").read_bytes().splitlines()[:4]
    times = [json.loads(line)["wall_time"] for line in (out / "records.jsonl").read_bytes().splitlines()[:3]]
    assert commands.finish(training.start(out))[::2] == (0, "")
    assert (out / "telemetry.jsonl").read_bytes().splitlines()[:4] == kept
    assert [json.loads(line)["wall_time"] for line in (out / "records.jsonl").read_bytes().splitlines()[:3]] == times
    assert commands.contents(out) == training.undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study", "study with workers", "training", "measurement"])
@pytest.mark.parametrize("seed", range(3))
def test_many_kills(name, seed, command, tmp_path):
    """60 kills of interpreters of their own."""
    more = ["--workers", 2] if name == "study with workers" else []
    killed_and_gone_on(command(name.partition(" ")[0], True), tmp_path / "out", 5, seed, *more, fresh=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_study_is_130_in_one_line_and_leaves_no_process(workers, command, tmp_path):
    out = tmp_path / "out"
    process = command("study").start(out, "--workers", workers)
    records = out / "2bit-baseline" / "records.jsonl"
    wait_for(process, lambda: records.exists() and records.stat().st_size > 0)
    commands.signal_group(process, signal.SIGINT)
    code, _, err = commands.finish(process)
    assert code == 130
    (line,) = err.splitlines()
    found = re.search(r"interrupted: (\d) of 3 runs are finished and kept in", line)
    assert found
    assert commands.none_left(process)
    ends = [path for path in out.glob("*/records.jsonl") if '"label": "end"' in path.read_text()]
    assert len(ends) >= int(found[1])
    assert commands.contents(out)["2bit-baseline/records.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training", "measurement"])
def test_an_interrupt_says_truly_what_is_kept(name, command, tmp_path):
    chance, code = random.Random(SEED), 130
    while code:
        out = tmp_path / "out"
        process = command(name).start(out)
        time.sleep(chance.uniform(0.1, 1.1) * command(name).seconds)
        commands.signal_group(process, signal.SIGINT)
        code, _, err = commands.finish(process)
        assert code in (0, 130)
        assert commands.none_left(process)
        kept = "1 of 1" in err or "the spectrum is kept" in err
        finished = (out / "model").is_dir() if name == "training" else is_recorded(out)
        assert len(err.splitlines()) == (code == 130)
        assert kept == (finished and code == 130)
        if code == 130 and "nothing" in err:
            assert not is_recorded(out)


def test_a_second_writer_is_refused_in_one_line(command, tmp_path):
    out = tmp_path / "out"
    first = command("study").start(out)
    try:
        wait_for(first, (out / "full-precision" / "records.jsonl").exists)
        first.send_signal(signal.SIGSTOP)  # it holds the lock while the second tries
        code, _, err = commands.finish(command("study").start(out))
        assert code == 2
        (line,) = err.splitlines()
        assert "is being written by another process" in line
        assert "--out" in line
        first.send_signal(signal.SIGCONT)
        assert commands.finish(first)[0] == 0
    finally:
        first.kill()
