"""The other libraries, each called as its documentation says and with the settings that make it fastest.

Each is imported where it is used, so that a missing or broken one is reported and the others are still measured.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models import Case, Logits, targets
from tools import ACCURACY, EIGENVALUES, LOOSE, TOLERANCES, Eigenvalues, Tool, Trace, Way
from torch import nn

ARPACK_BASIS = 2 * EIGENVALUES + 1  # Krylov vectors by default
LARGE_BASIS = 4 * EIGENVALUES
RESTARTS = 100  # of ARPACK; a search that converges takes far fewer
LANCZOS_STEPS = (20, 40, 80, 160, 320)


class PyHessian(Tool):
    """PyHessian 0.1. With a single batch it keeps the graph of the gradient, which is its fastest way.

    It takes a module that returns logits, and a criterion. Its density calls torch.eig, which torch has removed; the
    benchmark supplies one for symmetric matrices. It has power iteration only, which finds the eigenvalues of largest
    magnitude and not both ends.
    """

    def __init__(self, case: Case):
        super().__init__(case)
        module = importlib.import_module("pyhessian.hessian")  # the package's attribute of this name is the class
        self._multiply = multiply = importlib.import_module("pyhessian.utils").hessian_vector_product

        def counted(gradient: Any, parameters: Any, vectors: Any) -> Any:
            self.products += 1
            return multiply(gradient, parameters, vectors)

        module.hessian_vector_product = counted
        torch.eig = _symmetric_eig
        data = (case.ids, targets(case.ids))
        self.inner = module.hessian(
            Logits(case.model), nn.CrossEntropyLoss(), data=data, cuda=case.device.type == "cuda"
        )

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        self.products += 1
        parts = self._multiply(self.inner.gradsH, self.inner.params, self.case.split(vector))
        return torch.cat([part.reshape(-1) for part in parts])

    def densities(self) -> dict[str, Way]:
        return {"density": Way(lambda probes, steps: self.inner.density(iter=steps, n_v=probes))}

    def traces(self) -> dict[str, Callable[[int], Trace]]:
        def run(probes: int) -> Trace:
            # by default it stops when its running mean stalls, and at once if that mean is negative
            samples = [float(sample) for sample in self.inner.trace(maxIter=probes, tol=-math.inf)]
            return Trace(float(np.mean(samples)), samples)

        return {"trace": run}

    def eigenvalues(self) -> dict[str, list[Callable[[], Eigenvalues]]]:
        def run() -> Eigenvalues:
            before, most = self.products, 100
            values, _ = self.inner.eigenvalues(maxIter=most, tol=ACCURACY, top_n=EIGENVALUES // 2)
            # it does not say whether it converged; it has not if it used every iteration
            return Eigenvalues(list(values), self.products - before < most * len(values), ends="magnitude")

        return {"eigenvalues": [run]}

    def close(self) -> None:
        # it left gradients on the parameters, and they hold the graph
        del self.inner
        super().close()


def _symmetric_eig(matrix: torch.Tensor, eigenvectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.eig as it was, for a symmetric matrix: eigenvalues as (m, 2) real and imaginary parts, and vectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


class HessianEigenthings(Tool):
    """hessian-eigenthings 1.0.0a5, which rebuilds the graph at every product.

    With exact products (method="autograd", its default): finite differences cost less, with errors of some percent.
    """

    def __init__(self, case: Case):
        super().__init__(case)
        import hessian_eigenthings as library

        self.library = library
        self.op = library.HessianOperator(case.model, case.batches(), library.hf_lm_loss())
        multiply = self.op.matvec

        def counted(vector: torch.Tensor) -> torch.Tensor:
            self.products += 1
            return multiply(vector)

        self.op.matvec = counted  # type: ignore[method-assign]

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return self.op.matvec(vector)

    def densities(self) -> dict[str, Way]:
        def bare(probes: int, steps: int) -> list[torch.Tensor]:
            runs = [
                self.library.lanczos_tridiagonal(self.op, self.case.vector(i), steps, reorthogonalize=False)
                for i in range(probes)
            ]
            return [torch.linalg.eigh(torch.diag(r.alphas) + _sides(r.betas)).eigenvalues for r in runs]

        return {
            "spectral_density": Way(
                lambda probes, steps: self.library.spectral_density(
                    self.op, num_runs=probes, lanczos_steps=steps, num_grid_points=1024, seed=0
                )
            ),
            "lanczos_tridiagonal, no reorthogonalisation": Way(bare),
        }

    def traces(self) -> dict[str, Callable[[int], Trace]]:
        def run(method: str) -> Callable[[int], Trace]:
            def traced(probes: int) -> Trace:
                found = self.library.trace(self.op, num_matvecs=probes, method=method, seed=0)
                samples = found.samples.tolist() if method == "hutchinson" else None
                return Trace(found.estimate, samples, None if samples else 1.96 * found.stderr)

            return traced

        return {method: run(method) for method in ("hutchinson", "hutch++")}

    def eigenvalues(self) -> dict[str, list[Callable[[], Eigenvalues]]]:
        def lanczos(steps: int) -> Callable[[], Eigenvalues]:
            def run() -> Eigenvalues:
                ends = [
                    self.library.lanczos(
                        self.op,
                        k=EIGENVALUES // 2,
                        max_iter=min(steps, self.op.size),
                        tol=ACCURACY,
                        reorthogonalize=True,
                        which=which,
                        seed=0,
                    )
                    for which in ("LA", "SA")
                ]
                values = torch.cat([end.eigenvalues for end in ends])
                return Eigenvalues(values.tolist(), all(bool(end.converged.all()) for end in ends))

            return run

        return {
            "lanczos, each end": [lanczos(steps) for steps in LANCZOS_STEPS],
            **_arpack(self.product, self.case),
        }


def _sides(values: torch.Tensor) -> torch.Tensor:
    upper = torch.diag(values, 1)
    return upper + upper.T


class Curvlinops(Tool):
    """curvlinops 3.0.1, forward over reverse with vmap over vectors.

    Its products run under no_grad, where torch has no forward derivative of SiLU, so its copy of the model computes
    SiLU as x sigmoid(x). The checks of its constructor are switched off except in the default call.
    """

    def __init__(self, case: Case):
        super().__init__(case)
        import curvlinops as library

        self.library = library
        self.model = Logits(_with_plain_silu(case.model))
        self.op = self._operator(check_deterministic=False, num_data=len(case.ids))

    def _operator(self, **options: Any) -> Any:
        tool = self

        class Counted(self.library.HessianLinearOperator):  # type: ignore[name-defined]
            def _matmat(self, M: list[torch.Tensor]) -> list[torch.Tensor]:
                tool.products += M[0].shape[-1]
                return super()._matmat(M)

        parameters = [p for p in self.model.parameters() if p.requires_grad]
        data = [(self.case.ids, targets(self.case.ids))]
        return Counted(self.model, nn.CrossEntropyLoss(), parameters, data, **options)

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return self.op @ vector

    def densities(self) -> dict[str, Way]:
        from curvlinops.papyan2020traces.spectrum import approximate_boundaries

        def runs(probes: int, steps: int) -> Any:
            # the boundaries set the grid only, not the time
            return self.library.lanczos_approximate_spectrum(self.op, steps, num_repeats=probes, boundaries=(-1.0, 1.0))

        return {
            "lanczos_approximate_spectrum": Way(runs),
            "its default call, with checks and boundary search": Way(
                lambda probes, steps: approximate_boundaries(self._operator()), "lanczos_approximate_spectrum"
            ),
        }

    def traces(self) -> dict[str, Callable[[int], Trace]]:
        library = self.library

        def one_by_one(probes: int) -> Trace:
            samples = [float(library.hutchinson_trace(self.op, 1)) for _ in range(probes)]
            return Trace(float(np.mean(samples)), samples)

        return {
            "hutchinson_trace, all at once": lambda probes: Trace(float(library.hutchinson_trace(self.op, probes))),
            "hutchinson_trace, one by one": one_by_one,
            "hutchpp_trace": lambda probes: Trace(float(library.hutchpp_trace(self.op, probes))),
            "xtrace": lambda probes: Trace(float(library.xtrace(self.op, probes))),
        }

    def eigenvalues(self) -> dict[str, list[Callable[[], Eigenvalues]]]:
        return _arpack(self.product, self.case)


class PlainSiLU(nn.Module):
    """x sigmoid(x), in operations that torch can differentiate in every mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def _with_plain_silu(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares parameters and buffers; the original is unchanged."""
    tensors = [*model.parameters(), *model.buffers()]
    model = copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in ("SiLU", "SiLUActivation"):
                setattr(module, name, PlainSiLU())
    return model


def _arpack(multiply: Callable[[torch.Tensor], torch.Tensor], case: Case) -> dict[str, list[Callable[[], Eigenvalues]]]:
    """SciPy's eigsh on the products of a tool, in the precision of the model, both ends at once."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    kind = np.dtype(str(case.dtype).removeprefix("torch."))

    def product(array: np.ndarray) -> np.ndarray:
        vector = torch.as_tensor(array.reshape(-1), device=case.device, dtype=case.dtype)
        return multiply(vector).detach().cpu().numpy()

    n = case.dimension
    matrix = LinearOperator((n, n), matvec=product, dtype=kind)  # type: ignore[call-arg]
    start = case.vector(1).cpu().numpy()

    def attempt(ncv: int | None, tol: float) -> Callable[[], Eigenvalues]:
        def run() -> Eigenvalues:
            if n * (ncv or ARPACK_BASIS) > 2**31:  # it would crash this process
                raise ValueError("the basis has more numbers than ARPACK's 32-bit indices can count")
            try:
                values, _ = eigsh(matrix, EIGENVALUES, which="BE", ncv=ncv, tol=tol, v0=start, maxiter=RESTARTS)
                return Eigenvalues(values.tolist(), True)
            except ArpackNoConvergence as error:
                return Eigenvalues(error.eigenvalues.tolist(), False)

        return run

    return {
        "eigsh": [attempt(None, tol) for tol in TOLERANCES],
        f"eigsh, ncv={LARGE_BASIS}": [attempt(LARGE_BASIS, tol) for tol in TOLERANCES],
        f"eigsh, tol={LOOSE:g}": [attempt(None, LOOSE)],
    }
