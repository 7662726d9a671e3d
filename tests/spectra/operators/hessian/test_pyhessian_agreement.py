"""PyHessian, a second library, on the same network and batch.

PyHessian stops its power iteration and its trace early, keeps gradients with their graph and changes the model's mode,
hence the copies and the room in the comparisons.
"""

import copy
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn

import spectra

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyhessian = pytest.importorskip("pyhessian")


class Logits(nn.Module):
    """A causal language model as PyHessian wants a network: tokens in, plain next-token logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).logits[:, :-1].flatten(0, 1)


def classifier():
    model = tiny_models.mlp(dtype=torch.float32)
    ((inputs, targets),) = tiny_models.classification((30,))
    batch = (inputs.float(), targets)
    return model, [batch], copy.deepcopy(model), batch


def language_model():
    model = tiny_models.causal_lm("llama-tied", dtype=torch.float32)
    (batch,) = tiny_models.token_batches(((8, 8, 8),))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(20):  # toward a minimum: at random weights the trace is near zero and lost in its own noise
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.zero_grad()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return model, [batch], Logits(eager), (batch["input_ids"], batch["labels"][:, 1:].flatten())


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("case", [classifier, language_model])
def test_largest_eigenvalue_and_trace(case):
    model, batches, theirs, data = case()
    torch.manual_seed(0)
    other = pyhessian.hessian(theirs, nn.CrossEntropyLoss(), data=data, cuda=False)
    op = spectra.HessianOperator(model, batches)

    (power,), _ = other.eigenvalues(maxIter=1000, tol=1e-6, top_n=1)
    pairs = spectra.topk(op, 1, which="LM", seed=0)
    assert pairs.converged.all()
    assert float(pairs.values[0]) == pytest.approx(power, rel=1e-3)

    samples = np.array(other.trace(maxIter=200, tol=-np.inf))  # its own rule stops at once where the mean is negative
    assert len(samples) == 200
    error = samples.std(ddof=1) / np.sqrt(len(samples))
    ours = spectra.trace(op, method="hutchinson", probes=200, seed=0)
    assert error < 0.2 * abs(samples.mean())  # else this compares noise
    assert abs(ours.value - samples.mean()) < 4 * error + 2 * ours.half_width
    for parameter in theirs.parameters():
        parameter.grad = None  # PyHessian leaves a cycle with the graph
