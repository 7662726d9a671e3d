"""The benchmark of training speed runs as a whole at a tiny size, and its table has what it measured."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training" / "speed.py"


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("training_speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_is_trained_and_compared(speed, tmp_path, capsys):
    sizes = ["--batch", "2", "--length", "16", "--steps", "2", "--warm-up", "9", "--bits", "2,1"]
    out = tmp_path / "speed.json"
    speed.main(["tiny", "--device", "cpu", "--way", "train", *sizes, "--skip", "torchao", "--out", str(out)])
    printed = capsys.readouterr().out.strip().splitlines()
    kept = json.loads(printed[-1])
    assert kept == json.loads(out.read_text())
    rows = {row["setting"]: row for row in kept["rows"]}
    assert list(rows)[:3] == ["unquantized", "2 bit, winq", "1 bit, winq"]
    for name in ("unquantized", "2 bit, winq", "1 bit, winq"):
        row = rows[name]
        shares = [row[f"{part}_share"] for part in ("validation", "telemetry", "resets") if f"{part}_share" in row]
        assert len(shares) == (1 if name == "unquantized" else 3)
        # A whole run takes its steps and what is beside them.
        assert row["whole_tokens_per_second"] == pytest.approx(row["tokens_per_second"] * (1 - sum(shares)))
        assert row["tokens_per_second"] == pytest.approx(32 / row["step_ms"] * 1e3)
    assert "noise_share" in rows["2 bit, noise, plain loop, in turns"]


def test_eager_steps_take_turns_on_a_cpu(speed, capsys):
    speed.main(["tiny", "--device", "cpu", "--steps", "2"])
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    assert [row["setting"].partition(": ")[2] for row in rows] == ["unquantized", "2 bit", "2 bit, noise"]
    assert rows[0]["times_unquantized"] == 1
    assert all(row["times_unquantized"] == pytest.approx(row["step_ms"] / rows[0]["step_ms"]) for row in rows)


def test_without_a_gpu_it_says_so(speed, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    speed.main([])
    assert capsys.readouterr().out.startswith("skipped: no GPU")
