"""Two ranks give what one gives; a rank that dies ends the run with a message."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny_models

import spectra
from spectra import distributed

HELPERS = Path(ranks.__file__).parent


def torchrun(out, *tasks, count=2):
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [ranks.__file__, str(out), *tasks]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_two_ranks_give_what_one_gives_and_write_one_run(tmp_path):
    """And a rank that measures alone, by itself or in a Trainer, waits for no other: `alone`, `trained` in ranks.py."""
    done = torchrun(tmp_path, "measure", "alone", "trainer")
    assert done.returncode == 0, done.stderr[-2000:]
    alone = ranks.measured(spread="none")
    for spread in ("probes", "batches"):
        for rank in range(2):
            together = np.load(tmp_path / f"{spread}-{rank}.npz")
            for name, value in alone.items():
                np.testing.assert_allclose(together[name], value, rtol=1e-6, atol=1e-8, err_msg=f"{spread}, {name}")
    (record,) = spectra.Run(tmp_path / "run").records
    assert record.estimates["rms"].resolved


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run(tmp_path):
    """Under torchrun; the next test holds it without."""
    done = torchrun(tmp_path, "die")
    assert done.returncode != 0
    assert "another rank stopped" in done.stderr or "exitcode  : 3" in done.stderr


def test_gloo_leaves_the_exit_code_of_a_rank_that_is_left_alone(tmp_path):
    """Its threads abort an interpreter (code 134) that ends while they wait for a rank that died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ranks.__file__, str(tmp_path), "die"]
    alone, dead = (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**shared, "RANK": str(rank)})
        for rank in range(2)
    )
    _, err = alone.communicate(timeout=120)
    dead.communicate(timeout=120)
    assert (alone.returncode, dead.returncode) == (1, 3), err[-1000:]
    assert "another rank stopped" in err


def test_a_spread_without_ranks_is_refused():
    op = spectra.DiagonalOperator(np.arange(100.0))
    with pytest.raises(spectra.InputError, match="torchrun"):
        spectra.slq(op, probes=2, steps=5, spread="probes")
    with pytest.raises(spectra.InputError, match="torchrun"):
        spectra.HessianOperator(tiny_models.mlp(), tiny_models.classification((3,)), spread="batches")
    with pytest.raises(spectra.InputError, match="spread must be one of"):
        spectra.slq(op, probes=2, steps=5, spread="rows")
    with pytest.raises(spectra.InputError, match="torchrun"):
        distributed.start()
