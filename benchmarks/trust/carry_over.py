"""What a product of each library is, for losses that libraries weigh differently; docs/from-*.md quote the table.

    python benchmarks/trust/carry_over.py

A network of 323 parameters in float64, whose Hessian is formed. "Error" is that of a Hessian-vector product, relative.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spectra

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))

import tiny_models
from oracles import dense_hessian, flat, relative_error

CRITERION = nn.CrossEntropyLoss()


def spectra_product(model: nn.Module, batches: list[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    operator = spectra.HessianOperator(model, batches, loss=CRITERION)
    return lambda v: operator @ v


def pyhessian_product(model: nn.Module, batches: list[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    from pyhessian import hessian, hessian_vector_product

    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    found = hessian(model, CRITERION, cuda=False, **data)
    shapes = [p.shape for p in found.params]

    def product(v: torch.Tensor) -> torch.Tensor:
        parts = v.split([shape.numel() for shape in shapes])
        split = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        if len(batches) == 1:
            return flat(hessian_vector_product(found.gradsH, found.params, split))
        return flat(found.dataloader_hv_product(split)[1])

    return product


def eigenthings_product(model: nn.Module, batches: list[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    import hessian_eigenthings as library

    return library.HessianOperator(model, batches, library.supervised_loss(CRITERION)).matvec


def curvlinops_product(model: nn.Module, batches: list[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    import curvlinops

    operator = curvlinops.HessianLinearOperator(model, CRITERION, list(model.parameters()), batches)
    return lambda v: operator @ v


LIBRARIES = {
    "spectra": spectra_product,
    "PyHessian 0.1": pyhessian_product,
    "hessian-eigenthings 1.0.0a5": eigenthings_product,
    "curvlinops 3.0.1": curvlinops_product,
}


def cases() -> dict[str, tuple[nn.Module, list[Any], list[Any]]]:
    """For each case the model, its batches, and the same rows without those that do not count."""
    model = tiny_models.mlp(hidden=40)
    uneven = tiny_models.classification((60, 4))
    (inputs, targets), second = tiny_models.classification((30, 30))
    ignored = torch.where(torch.arange(30) < 27, -100, targets)
    return {
        "batches of 60 and 4 rows": (model, uneven, uneven),
        "27 of 30 targets of a batch ignored": (
            model,
            [(inputs, ignored), second],
            [(inputs[27:], targets[27:]), second],
        ),
    }


def outcome(make: Callable[..., Any], model: nn.Module, batches: list[Any], v: torch.Tensor) -> Any:
    """The product, or the class of the error."""
    try:
        return make(model, batches)(v).detach().double()
    except Exception as error:  # whatever another library raises
        return f"refused: {type(error).__name__}: {str(error).splitlines()[0][:60]}"


def main() -> None:
    """Print the tables."""
    warnings.simplefilter("ignore")
    print(f"{'error of a product':<40}" + "".join(f"{name:>30}" for name in LIBRARIES))
    for name, (model, batches, whole) in cases().items():
        inputs, targets = tiny_models.whole(whole)
        dense = dense_hessian(CRITERION(model(inputs), targets), list(model.parameters()))
        v = torch.randn(len(dense), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        cells = []
        for make in LIBRARIES.values():
            found = outcome(make, copy.deepcopy(model), batches, v)
            cells.append(found if isinstance(found, str) else f"{relative_error(found, dense @ v):.1e}")
        print(f"{name:<40}" + "".join(f"{cell:>30}" for cell in cells))
    print("\na network with dropout in training mode, afterwards:")
    for name, make in LIBRARIES.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 3)).double()
        batches = tiny_models.classification((30,))
        v = torch.randn(323, dtype=torch.float64)
        one, two = (outcome(make, model, batches, v) for _ in range(2))
        same = one if isinstance(one, str) else f"{relative_error(two, one):.1e}"
        graph = any(p.grad is not None and p.grad.grad_fn is not None for p in model.parameters())
        gradients = "with its graph" if graph else "none" if all(p.grad is None for p in model.parameters()) else "some"
        print(f"{name:<30} two products differ by {same:<10} training mode {model.training}, .grad {gradients}")


if __name__ == "__main__":
    main()
