"""What a run of `qat` tells the views of `spectra`: names, colours, lines, and the meanings of what is quantized."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import qat
from qat.layers.config import BITS
from qat.study.config import METHODS
from qat.study.presentation import presentation, run_label
from spectra.backend.errors import InputError
from spectra.runs.presentation import Presentation


@dataclass
class Written:
    """A run folder as far as its config matters, after a way through JSON."""

    config: dict
    folder: Path = Path("runs/folder-name")


def read(**settings):
    config = {"presentation": presentation(**settings)}
    return Presentation.of(Written(json.loads(json.dumps(config))))


def test_a_quantized_run_is_named_by_bits_and_method():
    shown = read(bits=2, method="winq")
    assert (shown.label, shown.group, shown.color, shown.line) == ("2-bit WinQ", "2-bit", "#0072B2", "solid")
    assert not shown.reference
    assert read(bits="1.58", method="baseline").label == "1.58-bit baseline" == run_label(1.58, "baseline")
    assert read(bits=4).label == "4-bit"


def test_quantized_activations_and_caches_are_in_the_name():
    shown = read(bits=2, method="winq", activation_bits=8)
    assert (shown.label, shown.group, shown.color) == ("W2A8 WinQ", "W2A8", "#0072B2")
    assert read(bits=1.58, method="baseline", activation_bits=4, cache_bits=8).label == "W1.58A4KV8 baseline"
    assert run_label(4, None, cache_bits=4) == "W4A16KV4"
    assert "activations are quantized" in shown.modes["ste"]
    assert "activations" not in shown.modes["full"] + read(bits=2).modes["ste"]


def test_the_reference_is_full_precision():
    shown = read()
    assert (shown.label, shown.color, shown.line) == ("full precision", "#000000", "dashdot")
    assert shown.reference


def test_every_bit_width_has_a_colour_and_every_method_a_line_of_its_own():
    colors = [read(bits=bits, method="winq").color for bits in BITS]
    assert len(set(colors)) == len(BITS)
    assert None not in colors
    lines = [read(bits=2, method=method).line for method in METHODS]
    assert len(set(lines)) == len(METHODS)
    assert None not in lines
    assert lines[METHODS.index("baseline")] == (0, (4, 2))


def test_every_mode_quantity_and_label_of_a_quantized_run_is_explained():
    shown = read(bits=1, method="winq")
    assert set(shown.modes) == {"full", *qat.MODES}
    assert shown.describe("flip_rate").name == "flip rate"
    assert shown.describe("distance_to_grid").meaning == "‖W − Q(W)‖ / ‖W‖ over the quantized weights"
    assert shown.labels == {"before-reset": "before the reset", "after-reset": "after the reset"}


def test_every_number_of_the_telemetry_is_explained():
    import tiny_models
    import torch

    model = tiny_models.causal_lm("llama", dtype=torch.float32)
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert set(qat.telemetry.Telemetry(model).measure()) == set(read(bits=2).quantities)


def test_an_unknown_bit_width_is_refused():
    with pytest.raises(InputError, match="bits must be one of"):
        presentation(bits=5)
