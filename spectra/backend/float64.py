"""Where float64 arithmetic is fast."""

from __future__ import annotations

import torch

# Compute capabilities of A100, H100 and B200, whose units multiply float64 matrices as fast as float32 ones without
# TF32, or half as fast. Other cards compute in float64 at 1/32 or 1/64 of the rate.
FAST_CAPABILITIES = ((8, 0), (9, 0), (10, 0))


def is_fast_in_float64(device: torch.device) -> bool:
    """Whether matrix products in float64 take about the time of those in float32."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in FAST_CAPABILITIES
