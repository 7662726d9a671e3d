import numpy as np
import pytest
import run_folders

from spectra.backend.errors import InputError
from spectra.views.curves import curves_of
from spectra.views.screen import SCALES, ScreenAxis, screen_axis

AXES = {
    "symlog": ScreenAxis("symlog", 0.01, (-2.0, 8.0), (-2.0, 8.0)),
    "linear": ScreenAxis("linear", 0.01, (-2.0, 8.0), (-2.0, 8.0)),
    "log": ScreenAxis("log", 0.01, (1e-5, 8.0), (1e-5, 8.0)),
}


@pytest.mark.parametrize("scale", SCALES)
def test_positions_and_values_are_inverse_and_points_evenly_spaced(scale):
    axis = AXES[scale].zoomed(0.5, 3.0)
    points = axis.points(101)
    np.testing.assert_allclose(axis.values(axis.positions(points)), points, rtol=1e-12, atol=1e-15)
    seen = points[(points >= 0.5) & (points <= 3.0)]
    assert {0.5, 3.0} <= set(seen.tolist())
    assert len(seen) >= 101
    even = axis.values(np.linspace(*axis.positions(np.array([0.5, 3.0])), 101))
    assert np.abs(seen[:, None] - even).min(axis=0).max() < 1e-9
    assert points[0] == axis.whole[0]
    assert points[-1] == axis.whole[1]


def test_the_axis_reaches_as_far_as_all_records_do(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")  # the spectrum shrinks from step to step
    last = screen_axis(curves_of(run, steps="last"), run.records[-1:], "symlog")
    whole = screen_axis(curves_of(run, steps="last"), run.records, "symlog")
    assert last.whole[1] == pytest.approx(0.8 * 8, rel=1e-6)
    assert whole.whole[1] == pytest.approx(8, rel=1e-6)
    assert whole.whole[0] <= -1.5
    assert 1e-3 <= whole.threshold <= 0.1  # the bulk has a standard deviation of .01
    positive = screen_axis(curves_of(run, steps="last"), run.records, "log")
    assert positive.whole[0] > 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seen", [(1e-5, 8.0), (0.02, 0.9), (0.5, 0.5001), (0.1, 0.11), (0.9, 1.1)])
def test_ticks_are_seen_distinct_and_few(scale, seen):
    axis = AXES[scale].zoomed(*seen)
    values, names = axis.ticks()
    assert 3 <= len(values) <= 9
    assert np.all((values >= seen[0] - 1e-12) & (values <= seen[1] + 1e-12))
    assert len(set(names)) == len(names)
    assert np.allclose([float(name.replace("−", "-")) for name in names], values, rtol=1e-5)


def test_ticks_of_a_symmetric_log_axis_are_decades_with_zero():
    values, names = AXES["symlog"].ticks()
    assert values.tolist() == [-1.0, -0.1, -0.01, 0.0, 0.01, 0.1, 1.0]
    assert names == ["−1", "−0.1", "−0.01", "0", "0.01", "0.1", "1"]


def test_ranges_and_scales_that_there_are_not():
    with pytest.raises(InputError, match="low < high"):
        AXES["linear"].zoomed(1.0, 1.0)
    with pytest.raises(InputError, match="positive eigenvalues"):
        AXES["log"].zoomed(-1.0, 1.0)
    with pytest.raises(InputError, match="scale of symlog, linear, log, got 'cubic'"):
        screen_axis(curves_of(run_folders.density()), [], "cubic")
