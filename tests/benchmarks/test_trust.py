"""The trust benchmark: its truths and tables by hand, its fixture, and coverage on the fixture for a few seeds."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import spectra
from spectra.estimates.quantities import summarize

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "trust"))

import band
import cases
import coverage
import families
import finite_precision
import language_models
import peers
import tables
import ways

BITS = ("1bit", "1.58bit", "2bit", "3bit", "4bit")
FIXTURE = language_models.load()


def test_truths_by_hand():
    found = cases.truths(np.array([-2.0, -1e-3, 0.0, 3.0]))
    assert found == pytest.approx(
        {
            "negative_share": 0.5,
            "near_zero_share": 0.5,
            "trace": 0.999,
            "frobenius": np.sqrt(13.000001),
            "rms": np.sqrt(13.000001 / 4),
            "negative_energy_share": 4.000001 / 13.000001,
            "negative_magnitude_share": 2.001 / 5.001,
            "lambda_max": 3.0,
            "lambda_min": -2.0,
        }
    )


@pytest.mark.parametrize("bulk", families.BULKS)
def test_families_have_the_outliers_and_zeros_asked_for(bulk):
    values = families.eigenvalues(bulk, n=20_000, radius=27.0, zeros=0.43, seed=1)
    assert values.shape == (20_000,)
    assert values.max() == 27
    assert (values == 0).mean() == pytest.approx(0.43, abs=0.02)
    assert np.array_equal(values, families.eigenvalues(bulk, n=20_000, radius=27.0, zeros=0.43, seed=1))
    untouched = families.eigenvalues(bulk, n=20_000, radius=27.0, zeros=0.0, seed=1)[families.OUTLIERS :]
    assert np.sqrt(np.mean(untouched**2)) == pytest.approx(families.BULK_RMS, rel=0.5)


def test_the_fixture_holds_every_bit_width_before_and_after_a_reset():
    names = {f"{bits}-{mode}-before-reset" for bits in BITS for mode in ("ste", "latent")}
    names |= {f"{bits}-latent-after-reset" for bits in BITS}
    assert names | {"full"} <= set(FIXTURE)
    for name, spectrum in FIXTURE.items():
        values, facts = spectrum.eigenvalues, spectrum.facts
        assert 2000 <= len(values) == facts["n"] <= 8000
        assert values.dtype == np.float64
        assert np.all(np.diff(values) >= 0), name
        assert facts["symmetry_gap"] < 1e-6  # transformers normalises in float32
        assert facts["validation_loss_full_precision"] < 0.5 * facts["validation_loss_untrained"]
        if name != "full":
            assert facts["validation_loss_quantized_trained"] < facts["validation_loss_quantized"]


def test_a_reset_leaves_the_loss_of_the_quantized_weights():
    for name, spectrum in FIXTURE.items():
        if name.endswith("ste-after-reset"):
            before = FIXTURE[name.replace("after", "before")]
            assert spectrum.facts["loss"] == before.facts["loss"]
            assert not np.array_equal(spectrum.eigenvalues, before.eigenvalues)


@pytest.mark.parametrize("name", FIXTURE)
@pytest.mark.parametrize("seed", [1, 2])
def test_intervals_cover_on_the_language_models(name, seed):
    print(f"{name}, seed = {seed}")
    values = FIXTURE[name].eigenvalues
    truth = cases.truths(values)
    found = spectra.resolve(spectra.DiagonalOperator(values), budget=400, seed=seed)
    assert found.low <= truth["negative_share"] <= found.high
    assert found.products <= 400
    density = spectra.slq(spectra.DiagonalOperator(values), probes=4, steps=40, seed=seed)
    for quantity in ("negative_share", "near_zero_share", "lambda_max", "lambda_min"):  # whose bounds are not by chance
        estimate = summarize(density, cases.NEAR_ZERO)[quantity]
        assert estimate.low <= truth[quantity] <= estimate.high, quantity


def test_a_case_measured_every_way_fits_the_tables(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "PyHessian", ("no_such_package", peers.pyhessian))
    monkeypatch.setitem(peers.PEERS, "curvlinops", ("json", lambda values, *, probes, steps, seed: 0.25))
    case = cases.Case("gauss", 2000, 27.0, 0.1)
    seeds = (0, 1)
    rows = [
        {"label": case.label, **vars(case), "seed": seed, **row}
        for seed in seeds
        for row in ways.measure(case.values(seed), case.probe_seed(seed), frozenset(ways.WAYS))
    ]
    counted = [row for row in rows if row["way"] == f"curvlinops, {ways.SAME}"]
    assert [row["value"] for row in counted] == [0.25, 0.25]
    spent = [row["products"] for row in rows if row["way"] == ways.RESOLVE and row["quantity"] == "negative_share"]
    assert all(abs(row["products"] - products) < 10 for row, products in zip(counted, spent, strict=True))
    assert not any(row["way"].startswith("PyHessian") for row in rows)
    assert "no_such_package" in peers.missing("no_such_package")
    assert "| gauss" in tables.errors(rows)
    assert "| slq 10 x 100" in tables.coverage(rows)
    assert case.label == "gauss, R 27, 10% zeros, n 2e3"
    assert "resolved" in tables.ordinary(rows)
    assert "| gauss" in tables.by_family(rows)
    for rotated in ("slq 10 x 100, rotated", "resolve, rotated"):
        shares = [row for row in rows if row["way"] == rotated and row["quantity"] == "negative_share"]
        assert len(shares) == len(seeds)
        assert not any(row["resolved"] for row in shares)  # nobody can tell on which side rounding put the zeros
        assert all(tables.covered(row) for row in shares)


def test_tables_by_hand():
    case = {"family": "gauss", "dimension": 100, "radius": 27, "zeros": 0, "label": "one", "quantity": "negative_share"}
    ours = {**case, "way": ways.RESOLVE, "truth": 0.4, "products": 100}
    rows = [
        {**ours, "value": 0.42, "low": 0.38, "high": 0.46, "resolved": True},
        {**ours, "label": "two", "value": 0.5, "low": 0.45, "high": None, "resolved": False},
    ]
    line = tables.coverage_line(rows)
    assert line == ["0.500", "1.000", "two", "0.00", "0.50", "0.1", "100"]
    assert tables.error(rows) == "0.060"


def test_bands_and_bars_by_hand():
    """The band of 0 in 20 and of 20 in 20 is 1 - .025^(1/20), that of 18 in 20 is tabulated as (.683, .988)."""
    edge = 1 - 0.025 ** (1 / 20)
    assert tables.band(0, 20) == pytest.approx((0.0, edge))
    assert tables.band(20, 20) == pytest.approx((1 - edge, 1.0))
    assert tables.band(18, 20) == pytest.approx((0.683, 0.988), abs=5e-4)

    def group(quantity, hits, tries, resolved=True):
        row = {"way": "ours", "quantity": quantity, "truth": 0.5, "high": 1.0, "resolved": resolved, "label": "one"}
        return [{**row, "family": "gauss", "radius": 27, "low": 0.0 if i < hits else 0.9} for i in range(tries)]

    assert tables.cell(group("negative_share", 20, 20)) == "1.000"
    assert tables.cell(group("negative_share", 18, 20)) == "0.900?"  # .95 of the resolved are asked for
    assert tables.cell(group("negative_share", 18, 20, resolved=False)) == "0.900"
    assert tables.cell(group("negative_share", 10, 20)) == "0.500!"
    assert tables.cell(group("trace", 95, 100)) == "0.950"
    assert tables.cell(group("trace", 400, 400)) == "1.000!"  # wider than it need be
    assert "| 10 of 20 | 0.500 | 0.272 to 0.728 | yes" in tables.outside(group("negative_share", 10, 20))
    assert "none" in tables.outside(group("negative_share", 20, 20))


def test_a_rotated_operator_has_the_same_eigenvalues_and_shows_no_zeros():
    values = families.eigenvalues("gauss", n=200, radius=27.0, zeros=0.43, seed=1)
    op = ways.RotatedOperator(values, seed=1)
    matrix = op @ torch.eye(200, dtype=torch.float64)
    assert torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy() == pytest.approx(np.sort(values), abs=1e-12)
    assert torch.allclose(op.multiply_rows(matrix[:3].contiguous())[1], op @ matrix[1], rtol=1e-12)
    assert (matrix != 0).all()


def test_a_run_that_is_cut_off_leaves_what_it_has(tmp_path):
    case = cases.Case("gauss", 300, 27.0, 0.43)
    out = tmp_path / "rows.jsonl"
    rows = coverage.gather([(case, seed, frozenset({"trace"})) for seed in (0, 1)], 1, out)
    assert coverage.read([out]) == rows
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(out.read_text().splitlines(keepends=True)[0].encode()))
    assert coverage.read([packed]) == [row for row in rows if row["seed"] == 0]
    assert json.loads(out.read_text().splitlines()[1])["seconds"] >= 0


def test_a_bracket_without_reorthogonalisation_holds_the_mass_of_the_probe_vector():
    values = families.eigenvalues("laplace", n=1000, radius=27.0, zeros=0.0, seed=3)
    found = finite_precision.compare(values, steps=150, seed=3)
    assert found.copies > 1
    assert found.holds(found.full)
    assert found.holds(found.none)
    assert found.difference < found.none.at / 2


def test_a_band_is_counted_as_covering_where_the_whole_curve_lies_inside():
    values, thresholds = np.array([-1.0, 1.0, 2.0, 3.0]), np.array([0.0, 2.5])
    for low, high, inside in (
        ([0.2, 0.7], [0.3, 0.8], True),
        ([0.2, 0.7], [0.2, 0.8], False),
        ([0.2, 0.8], [1, 1], False),
    ):
        found = spectra.estimates.band.CumulativeBand(thresholds, np.array(low), np.array(high), 0.95)
        assert band.covers(found, values) is inside


def test_the_beginning_of_a_measurement_is_the_shorter_measurement():
    op = spectra.DiagonalOperator(families.eigenvalues("laplace", n=500, radius=27.0, zeros=0.0, seed=1))
    whole, part = (spectra.slq(op, probes=probes, steps=steps, seed=4) for probes, steps in ((4, 40), (2, 20)))
    found = band.beginning(whole, 2, 20)
    assert found.nodes == pytest.approx(part.nodes, abs=1e-9)
    assert found.weights == pytest.approx(part.weights, abs=1e-9)


def test_rows_of_bands_fit_the_table():
    (case,) = band.cases(["gamma"], 400)
    rows = band.measure(case, 0) + band.measure(case, 1)
    assert [line[:3] for line in band.lines(rows)] == [
        [case.label, size, "2 of 2"] for size in ("2 x 20", "4 x 60", "4 x 100")
    ]
    assert len(band.cases([*families.BULKS, *band.MODELS], 400)) == 11
    assert band.sampling_coverage(100, 2, level=0.95, draws=500) >= 0.93
