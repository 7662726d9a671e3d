"""The benchmark of several devices, on two processes of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "speed" / "several_devices.py"


def test_two_ranks_agree_with_one_and_are_timed_in_turns(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    options = "--device cpu --model tiny --probes 2 --steps 4 --batches 2 --repeats 1"
    command += [*options.split(), "--out", str(tmp_path / "rows.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert kept["environment"]["ranks"] == 2
    assert [row["shared"] for row in kept["rows"]] == ["probe vectors", "batches"]
    for row in kept["rows"]:
        assert row["difference"] < 1e-5
        assert row["alone"] > 0
        assert row["together"] > 0
        assert f"{row['gain']:.2f}" in done.stdout
