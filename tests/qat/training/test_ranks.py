"""Batches divided among ranks and parts, and two real ranks that train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import training_ranks

from qat.study.compare import compare, train_one, train_seeds
from qat.study.config import StudyConfig
from qat.training.config import TrainConfig
from qat.training.ranks import batch_in_words, order_of_rank, seed_of_rank, sequences_at_once
from spectra.backend.errors import InputError

HELPERS = Path(training_ranks.__file__).parent


def on_rank(monkeypatch, rank, count):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_every_step_sees_its_batch_however_it_is_divided(monkeypatch, count, parts):
    config = TrainConfig(steps=3, batch_size=12, accumulate=parts)
    order = list(range(36))
    shares = []
    for rank in range(count):
        on_rank(monkeypatch, rank, count)
        assert sequences_at_once(config) == 12 // (count * parts)
        shares.append(np.array(order_of_rank(order, config)).reshape(3, -1))
    for step in range(3):
        seen = sorted(int(i) for share in shares for i in share[step])
        assert seen == list(range(12 * step, 12 * step + 12))


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    on_rank(monkeypatch, 0, 2)
    with pytest.raises(
        InputError, match=r"16 sequences .* 6 \(2 ranks, --accumulate 3\): make --batch-size a multiple of 6"
    ):
        sequences_at_once(TrainConfig(batch_size=16, accumulate=3))


def test_the_global_batch_in_words(monkeypatch):
    assert batch_in_words(TrainConfig(batch_size=16), 1024) == "16 sequences of 1,024 tokens a training step"
    on_rank(monkeypatch, 0, 2)
    assert batch_in_words(TrainConfig(batch_size=16, accumulate=4), 1024) == (
        "16 sequences of 1,024 tokens a training step: 2 ranks x 4 parts x 2 sequences"
    )
    assert batch_in_words(TrainConfig(batch_size=16), 8).endswith(": 2 ranks x 8 sequences")


def test_what_trains_on_one_device_is_refused_under_torchrun(monkeypatch, tmp_path):
    on_rank(monkeypatch, 1, 2)
    one = StudyConfig(out=str(tmp_path / "run"), bits=(2,), methods=("winq",))
    for call in (compare, train_seeds):
        with pytest.raises(InputError, match="one device: start it without torchrun"):
            call(one)
    with pytest.raises(InputError, match="the default model is too small for several ranks: give --model"):
        train_one(one)


def test_seeds_of_ranks_are_the_same_or_all_different(monkeypatch):
    seeds = {"same": set(), "own": set()}
    for rank in range(4):
        on_rank(monkeypatch, rank, 4)
        for seed in (0, 1, 2):
            for name, found in seeds.items():
                found.add(seed_of_rank(TrainConfig(seed=seed, rank_noise=name)))
    assert seeds["same"] == {0, 1, 2}
    assert len(seeds["own"]) == 12


def test_two_ranks_train_as_one_does(tmp_path):
    """Two processes, at once and in parts, against one: the same weights, curve and losses; one rank records."""
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [training_ranks.__file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]

    first, second = (dict(np.load(tmp_path / f"rank-{rank}.npz")) for rank in range(2))
    alone = training_ranks.trained(tmp_path / "alone")
    for name in second:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for name, value in alone.items():
        if name.startswith("whole"):
            np.testing.assert_allclose(first[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    # The noise of a step is drawn once a part, so it takes another course in parts, and with ranks of their own noise.
    assert np.abs(first["own"] - first["whole"]).max() > 1e-3
    np.testing.assert_array_equal(first["checkpointed"], first["whole"])
