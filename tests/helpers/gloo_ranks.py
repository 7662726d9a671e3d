"""Scripts on several gloo ranks, and how closely their numbers agree with those of one process."""

import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent
SUMS = {"rtol": 1e-12, "atol": 1e-14}  # of a few thousand numbers in float64, in another order
NODES = {"rtol": 1e-7, "atol": 1e-9}  # of a recurrence, which passes rounding errors on


def run_ranks(script, *, count):
    """Run a script of the helpers, with its arguments, on several gloo ranks."""
    path = os.pathsep.join([str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *script], capture_output=True, text=True, timeout=240, env=environment)
