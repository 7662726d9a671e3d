"""Quantization-aware training of language models, watched through Hessian spectra.

report = qat.quantize_model(model, qat.QuantConfig(bits=2))
trainer.add_callback(qat.WinQCallback(every=0.25, alpha=0.4, sigma=1e-3))
operator = qat.hessian_operator(model, batches, mode="ste")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qat.hessian import MODES, hessian_mode, hessian_operator
from qat.layers.config import QuantConfig
from qat.layers.convert import ConversionReport, quantize_model
from qat.layers.linear import QuantEmbedding, QuantLayer, QuantLinear, decay_exempt, quant_layers
from qat.ranking import sensitivity
from qat.training import telemetry
from qat.training.parq import PARQ, PARQConfig
from qat.training.winq import PRESETS, WinQ, WinQConfig, interpolate_, reset_steps
from spectra.backend.errors import InputError
from spectra.backend.extras import need

if TYPE_CHECKING:
    from qat.training.callback import PARQCallback, WinQCallback

__all__ = [
    "MODES",
    "PARQ",
    "PRESETS",
    "ConversionReport",
    "InputError",
    "PARQCallback",
    "PARQConfig",
    "QuantConfig",
    "QuantEmbedding",
    "QuantLayer",
    "QuantLinear",
    "WinQ",
    "WinQCallback",
    "WinQConfig",
    "decay_exempt",
    "hessian_mode",
    "hessian_operator",
    "interpolate_",
    "quant_layers",
    "quantize_model",
    "reset_steps",
    "sensitivity",
    "telemetry",
]


def __getattr__(name: str) -> Any:
    # The callbacks are subclasses of transformers' TrainerCallback. Imported at first use: `import qat` stays fast.
    if name in ("PARQCallback", "WinQCallback"):
        need("transformers")
        from qat.training import callback

        return getattr(callback, name)
    raise AttributeError(f"module 'qat' has no attribute {name!r}")
