"""Quantization-aware training of language models, watched through Hessian spectra.

report = qat.quantize_model(model, qat.QuantConfig(bits=2))
trainer.add_callback(qat.WinQCallback(every=0.25, alpha=0.4, sigma=1e-3))
operator = qat.hessian_operator(model, batches, mode="ste")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qat import telemetry
from qat.config import QuantConfig, WinQConfig
from qat.convert import ConversionReport, quantize_model
from qat.linear import QuantEmbedding, QuantLayer, QuantLinear, decay_exempt, quant_layers
from qat.modes import MODES, hessian_mode, hessian_operator
from qat.winq import PRESETS, WinQ, interpolate_, reset_steps
from spectra.errors import InputError

if TYPE_CHECKING:
    from qat.callback import WinQCallback

__all__ = [
    "MODES",
    "PRESETS",
    "ConversionReport",
    "InputError",
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
    "telemetry",
]


def __getattr__(name: str) -> Any:
    # Subclasses transformers' TrainerCallback: imported when it is used, so that `import qat` stays light.
    if name == "WinQCallback":
        from qat.callback import WinQCallback

        return WinQCallback
    raise AttributeError(f"module 'qat' has no attribute {name!r}")
