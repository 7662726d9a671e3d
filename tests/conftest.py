"""What every test shares: one thread, no network, no window, and the helpers on the import path."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import torch

torch.set_num_threads(1)  # the products are tiny: threads only add noise, and the suite runs one worker a core

# The files that take longest. They start first, or one worker would be left alone with one of them at the end.
LONGEST = (
    *("test_notebooks.py", "test_compare.py", "test_kills.py", "test_project.py", "test_sharded_graphs.py"),
    *("test_ranks.py", "test_inertia.py", "test_trainer_loss.py", "test_trainings.py", "test_faults.py"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish():
    """Keep the garbage collector off all that was imported: a look at it takes a quarter of a second.

    A Trainer collects at the end of each training.
    """
    gc.collect()
    gc.freeze()
