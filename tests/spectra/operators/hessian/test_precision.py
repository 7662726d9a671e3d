"""Products in a lower precision: faster, measured, and never silently."""

import pytest
import tiny_models
import torch
from oracles import relative_error

import spectra


def operator(precision=None, **options):
    model, batches = tiny_models.causal_lm("llama", dtype=torch.float32), tiny_models.token_batches()
    return spectra.HessianOperator(model, batches, precision=precision, engine="reverse", **options)


def test_bfloat16_products_are_close_and_their_error_is_measured():
    exact, lower = operator(), operator("bfloat16")
    vector = torch.randn(exact.shape[0], generator=torch.Generator().manual_seed(0))
    error = relative_error(lower @ vector, exact @ vector)
    assert 1e-4 < error < 0.1
    assert lower.dtype == torch.float32
    assert error / 3 < lower.precision_error() < 3 * error
    assert lower.rounding() >= 2 * lower.precision_error()
    assert lower.notes == [f"products in bfloat16, {lower.precision_error():.1e} off those in float32"]
    assert exact.precision_error() == 0.0
    assert exact.notes == []


def test_a_lower_precision_widens_the_intervals_and_they_hold_the_numbers():
    exact = spectra.slq(operator(), probes=3, steps=25, deflate=4)
    lower = spectra.slq(operator("bfloat16"), probes=3, steps=25, deflate=4)
    assert lower.rounding_error > 100 * exact.rounding_error
    for name in ("lambda_max", "lambda_min", "rms", "trace"):
        ours, theirs = getattr(lower, name)(), getattr(exact, name)()
        assert ours.low <= theirs.value <= ours.high, name
    assert (
        lower.near_zero_share(lower.rounding_error / 2).half_width
        > 2 * exact.near_zero_share(lower.rounding_error / 2).half_width
    )


def test_the_users_matmul_setting_comes_back():
    before = torch.get_float32_matmul_precision()
    op = operator("tf32")
    op @ torch.ones(op.shape[0])
    assert torch.get_float32_matmul_precision() == before
    assert len(op.notes) == 0 or "tf32" in op.notes[0]


def test_a_bfloat16_model_is_copied_to_float32_before_its_products_are_in_lower_precision():
    model = tiny_models.causal_lm("llama", dtype=torch.float32).to(torch.bfloat16)
    op = spectra.HessianOperator(model, tiny_models.token_batches(), precision="bfloat16")
    assert op.dtype == torch.float32
    op.precision_error()
    assert op.notes[0] == "bfloat16 weights, measured in a float32 copy"
    assert op.notes[1].startswith("products in bfloat16")


def test_the_record_says_so():
    model, batches = tiny_models.causal_lm("llama", dtype=torch.float32), tiny_models.token_batches()
    (record,) = spectra.SpectrumProbe(model, batches, probes=2, steps=5, precision="bfloat16").measure(0)
    assert record.notes[0].startswith("products in bfloat16")
    assert record.checks["precision_error"] > 1e-4


def test_an_unknown_precision_is_refused():
    with pytest.raises(spectra.InputError, match="float32, float64, tf32, bfloat16"):
        operator("int8")


def test_residuals_of_eigenpairs_include_the_error_of_a_lower_precision():
    exact = spectra.topk(operator(), 4, which="LM", tol=1e-3)
    lower = spectra.topk(operator("bfloat16"), 4, which="LM", tol=1e-3)
    assert exact.converged.all()
    assert not lower.converged.any()
    assert (abs(lower.values - exact.values) <= 3 * lower.residuals).all()
