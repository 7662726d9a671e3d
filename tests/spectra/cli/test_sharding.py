"""`spectra measure` in several processes of torchrun gives what one process gives, and ends in one line."""

import json
import os
import subprocess
import sys

import pytest
import saved_models

from spectra import Run
from spectra.cli.main import main

QUICK = ["--probes", "2", "--steps", "6", "--deflate", "2", "--count-products", "0", "--sequences", "4"]


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["-m", "spectra.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_two_processes_shard_a_checkpoint_and_print_one_record(tmp_path, capsys):
    model, text = saved_models.save(tmp_path / "model"), saved_models.write_text(tmp_path)
    arguments = ["measure", model, "--text", text, "--device", "cpu", *QUICK, "--batch-size", "2"]
    done = torchrun(*arguments, "--out", tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    printed = json.loads(done.stdout)
    assert main([*map(str, arguments), "--out", str(tmp_path / "one"), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert printed["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert printed["weights"] == alone["weights"] != ""
    for quantity in ("lambda_max", "lambda_min", "rms", "trace"):
        for end in ("low", "value", "high"):
            assert printed["estimates"][quantity][end] == pytest.approx(alone["estimates"][quantity][end], rel=1e-3)
    assert len(Run(tmp_path / "two").records) == 1


def test_an_error_of_several_processes_is_one_line(tmp_path):
    done = torchrun("measure", tmp_path / "none", "--text", tmp_path / "missing.txt", "--out", tmp_path / "run")
    assert done.returncode != 0
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("spectra: error: ")]
    assert len(lines) == 1, done.stderr
    assert "missing.txt" in lines[0]
