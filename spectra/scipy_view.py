"""Our operators as SciPy's, in a module of its own because scipy.sparse.linalg takes half a second to load."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyOperator

from spectra.operators import LinearOperator


class ScipyView(ScipyOperator):
    """SciPy's interface on one of our operators."""

    def __init__(self, op: LinearOperator):
        self._op = op
        super().__init__(np.dtype(np.float64 if op.dtype == torch.float64 else np.float32), op.shape)

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return (self._op @ np.asarray(X, dtype=self.dtype)).astype(self.dtype, copy=False)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(x.reshape(-1))

    def _adjoint(self) -> ScipyView:
        return self
