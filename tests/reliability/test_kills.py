"""SIGKILL and Ctrl-C at random moments: the same command again ends with the records of an undisturbed one."""

import random
import re
import signal
import time

import commands
import pytest
import saved_models

SEED = 13
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs the signals of POSIX")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Arguments of a small study, its cache, what it leaves undisturbed, and how long it took."""
    folder = tmp_path_factory.mktemp("study")
    model, text = saved_models.save(folder / "model"), saved_models.write_text(folder)
    arguments = ["compare", *commands.STUDY, "--model", model, "--text", text]
    started = time.monotonic()
    process = commands.start("qat", *arguments, "--out", folder / "undisturbed", cache=folder / "cache")
    code, _, err = commands.finish(process)
    assert (code, err) == (0, "")
    return arguments, folder / "cache", commands.contents(folder / "undisturbed"), time.monotonic() - started


def wait_for(process, condition):
    """Wait until the condition holds; the command must not end before that."""
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


def killed_and_gone_on(study, out, kills, seed, workers=1):
    """Kill a study so many times, each at a random moment of its time, then let it end."""
    arguments, cache, undisturbed, seconds = study
    chance = random.Random(seed)
    print(f"seed = {seed}")
    command = [*arguments, "--out", out, "--workers", workers]
    for _ in range(kills):
        process = commands.start("qat", *command, cache=cache)
        time.sleep(chance.uniform(0.3, 1.0) * seconds)
        commands.kill_alone(process)
        commands.finish(process)
        assert commands.none_left(process)
    code, _, err = commands.finish(commands.start("qat", *command, cache=cache))
    assert (code, err) == (0, ""), err
    left = commands.contents(out)
    assert left.pop("config.json").pop("workers") == workers
    expected = dict(undisturbed)
    expected.pop("config.json")
    assert left == expected
    assert not list(out.rglob("*.partial"))


def test_a_study_killed_twice_ends_as_if_undisturbed(study, tmp_path):
    killed_and_gone_on(study, tmp_path / "out", kills=2, seed=SEED)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_fifty_kills(study, tmp_path, seed):
    killed_and_gone_on(study, tmp_path / "out", kills=5, seed=seed, workers=1 + seed % 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_is_130_in_one_line_and_leaves_no_process(study, tmp_path, workers):
    arguments, cache, _, _ = study
    out = tmp_path / "out"
    process = commands.start("qat", *arguments, "--out", out, "--workers", workers, cache=cache)
    records = out / "2bit-baseline" / "records.jsonl"
    wait_for(process, lambda: records.exists() and records.stat().st_size > 0)
    commands.signal_group(process, signal.SIGINT)
    code, _, err = commands.finish(process)
    assert code == 130
    (line,) = err.splitlines()
    found = re.search(r"interrupted: (\d) of 2 runs are finished and kept in", line)
    assert found
    assert commands.none_left(process)
    ends = [path for path in out.glob("2bit-*/records.jsonl") if '"label": "end"' in path.read_text()]
    assert len(ends) >= int(found[1])
    assert commands.contents(out)["full-precision/records.jsonl"]


def test_a_second_writer_is_refused_in_one_line(study, tmp_path):
    arguments, cache, _, _ = study
    out = tmp_path / "out"
    first = commands.start("qat", *arguments, "--out", out, cache=cache)
    try:
        wait_for(first, (out / "full-precision" / "records.jsonl").exists)
        first.send_signal(signal.SIGSTOP)  # it holds the lock while the second tries
        code, _, err = commands.finish(commands.start("qat", *arguments, "--out", out, cache=cache))
        assert code == 2
        (line,) = err.splitlines()
        assert "is being written by another process" in line
        assert "--out" in line
        first.send_signal(signal.SIGCONT)
        assert commands.finish(first)[0] == 0
    finally:
        first.kill()
