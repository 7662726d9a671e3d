"""How the pages and figures of `spectra` show a run of quantization-aware training: names, colours, meanings.

`spectra` knows nothing of quantization. It reads what it shows from the entry "presentation" of a run's config.json,
and this module writes that entry.
"""

from __future__ import annotations

from typing import Any

from qat.layers.config import parse_bits

# A colour for each bit-width, from Okabe and Ito's palette for people with any colour vision.
BITS_COLORS = {1: "#D55E00", 1.58: "#E69F00", 2: "#0072B2", 3: "#56B4E9", 4: "#009E73", 8: "#CC79A7"}
REFERENCE_COLOR = "#000000"
# Line styles as matplotlib takes them: a name, or (offset, lengths of the dashes and gaps in points).
METHOD_LINES: dict[str, Any] = {"baseline": [0, [4, 2]], "winq": "solid"}
OTHER_LINE = "dashdot"
METHOD_NAMES = {"winq": "WinQ"}
REFERENCE_LABEL = "full precision"

MODE_MEANINGS = {
    "full": "the Hessian of the loss in the model's own weights",
    "ste": "the Jacobian of the straight-through gradient in the latent weights, M H(Q(W)) M, with M the mask of the "
    "weights that are not clipped; clipped weights give exact zeros",
    "quantized": "H(Q(W)), the Hessian of the full-precision network at the quantized weights",
    "latent": "H(W), the Hessian of the full-precision network at the latent weights",
    "noisy": "the straight-through Hessian averaged over draws of weight noise",
}
QUANTITIES = {
    "relative_gradient_norm": {
        "name": "relative gradient norm",
        "unit": "",
        "meaning": "‖gradient‖ / ‖W‖ over the quantized weights",
    },
    "flip_rate": {
        "name": "flip rate",
        "unit": "",
        "meaning": "share of the quantization codes that changed since the measurement before",
    },
    "distance_to_grid": {
        "name": "distance to the grid",
        "unit": "",
        "meaning": "‖W − Q(W)‖ / ‖W‖ over the quantized weights",
    },
    "clipped_share": {
        "name": "clipped share",
        "unit": "",
        "meaning": "share of the weights outside the quantizer's range",
    },
}
RECORD_LABELS = {"before-reset": "before the reset", "after-reset": "after the reset"}


def presentation(
    *,
    bits: float | str | None = None,
    method: str | None = None,
    activation_bits: int = 16,
    cache_bits: int = 16,
    seed: int | None = None,
) -> dict[str, Any]:
    """The entry "presentation" of a run's config.json, from which the views of `spectra` take names and colours.

    Without a bit-width the run is the full-precision reference that the others are compared with.

    Args:
        bits: The bit-width of the quantized weights; None for a full-precision run.
        method: How the run is trained, such as "baseline" or "winq"; None leaves it out of the label.
        activation_bits: The bit-width of activations; 16 leaves it out of the label.
        cache_bits: The bit-width of keys and values; 16 leaves it out of the label.
        seed: The seed of the run, where a study has several of the same bit-width and method.

    Returns:
        Plain values for JSON: `label`, `group`, `color`, `line`, `reference`, `modes`, `quantities` and `labels`.

    Raises:
        InputError: `bits` is none of the supported bit-widths.

    Example:
        A probe that is attached by hand to a quantized model::

            SpectrumProbe(model, batches, out="runs/study",
                          config={"presentation": presentation(bits=2, method="winq")})

        >>> shown = presentation(bits=2, method="winq")
        >>> shown["label"], shown["group"], shown["color"], shown["line"]
        ('2-bit WinQ', '2-bit', '#0072B2', 'solid')
        >>> presentation()["label"]
        'full precision'
    """
    widths = {"activation_bits": activation_bits, "cache_bits": cache_bits}
    shown = _reference() if bits is None else _quantized(parse_bits(bits), method, **widths)
    return {
        **shown,
        "label": with_seed(shown["label"], seed),
        "modes": _mode_meanings(min(activation_bits, cache_bits) < 16),
        "quantities": {key: dict(entry) for key, entry in QUANTITIES.items()},
        "labels": dict(RECORD_LABELS),
    }


def run_label(bits: float, method: str | None, *, activation_bits: int = 16, cache_bits: int = 16) -> str:
    """The name of a run: bit-widths and method, such as "2-bit WinQ", or "W2A8 WinQ" with quantized activations."""
    widths = width_label(bits, activation_bits, cache_bits)
    return widths if method is None else f"{widths} {METHOD_NAMES.get(method, method)}"


def width_label(bits: float, activation_bits: int = 16, cache_bits: int = 16) -> str:
    """The bit-widths of weights, activations, and keys and values: "2-bit" for weights alone, "W2A8", "W2A16KV4"."""
    if activation_bits == cache_bits == 16:
        return f"{bits:g}-bit"
    return f"W{bits:g}A{activation_bits}" + ("" if cache_bits == 16 else f"KV{cache_bits}")


def _mode_meanings(activations: bool) -> dict[str, str]:
    """What each Hessian mode is; with quantized activations also what it takes those for."""
    if not activations:
        return dict(MODE_MEANINGS)
    return {
        mode: meaning if mode == "full" else f"{meaning}; the network's activations are quantized, straight-through"
        for mode, meaning in MODE_MEANINGS.items()
    }


def with_seed(label: str, seed: int | None) -> str:
    """The name of a run with its seed, where there are several: "2-bit WinQ, seed 1"."""
    return label if seed is None else f"{label}, seed {seed}"


def _reference() -> dict[str, Any]:
    """Name, colour and line of the full-precision run."""
    return {
        "label": REFERENCE_LABEL,
        "group": REFERENCE_LABEL,
        "color": REFERENCE_COLOR,
        "line": OTHER_LINE,
        "reference": True,
    }


def _quantized(bits: float, method: str | None, activation_bits: int, cache_bits: int) -> dict[str, Any]:
    """Name, colour and line of a quantized run."""
    return {
        "label": run_label(bits, method, activation_bits=activation_bits, cache_bits=cache_bits),
        "group": width_label(bits, activation_bits, cache_bits),
        "color": BITS_COLORS[bits],
        "line": "solid" if method is None else METHOD_LINES.get(method, OTHER_LINE),
        "reference": False,
    }
