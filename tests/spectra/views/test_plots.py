import subprocess
import sys
import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import run_folders

from spectra import plots
from spectra.backend.errors import InputError
from spectra.views.style import PALETTE


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


def curves(ax):
    """The lines that carry data: not the zero line nor entries made for the legend."""
    return [line for line in ax.lines if len(line.get_xdata()) > 2]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_importing_does_not_load_matplotlib():
    code = "import sys, spectra; spectra.plots, spectra.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_curve_a_record_and_it_is_the_density(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    ax = plots.density(run)
    lines = curves(ax)
    assert len(lines) == 3
    assert legend(ax) == ["step 0", "step 10", "step 20"]
    assert ax.get_yscale() == "log"
    grid, heights = lines[0].get_data()
    np.testing.assert_allclose(heights, run.density(run.records[0]).density(grid))
    assert np.trapezoid(heights, grid) == pytest.approx(1, abs=1e-3)
    assert len({line.get_color() for line in lines}) == 3


def test_every_eigenvalue_is_inside_the_axes(tmp_path):
    run = run_folders.run_folder(tmp_path / "a", marks=((0, ""),))
    ax = plots.density(run)
    values = run_folders.eigenvalues()
    low, high = ax.get_xlim()
    assert low < values.min()
    assert values.max() < high
    grid, heights = curves(ax)[0].get_data()
    assert np.all(np.interp([8.0, 5.0, -1.5], grid, heights) > ax.get_ylim()[0])
    assert heights.max() < ax.get_ylim()[1]


def test_a_cumulative_curve_lies_in_its_band_and_the_band_holds_the_truth(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    ax = plots.cumulative(run)
    assert ax.get_xscale() == "symlog"
    assert ax.get_ylabel() == "share of eigenvalues below λ (95 % band)"
    (line,), (drawn,) = curves(ax), ax.collections
    points, middle = line.get_data()
    band = run.density(run.records[-1]).band()
    low, high = band.at(points)
    assert np.all((low <= middle) & (middle <= high))
    assert np.all(np.diff(middle) >= -1e-15)
    outline = {tuple(vertex) for vertex in drawn.get_paths()[0].vertices}
    assert {*zip(points, low, strict=True), *zip(points, high, strict=True)} <= outline
    truth = np.searchsorted(np.sort(run_folders.eigenvalues(scale=0.8)), points) / 400  # the scale at step 20
    assert np.all((low <= truth) & (truth <= high))
    assert set(band.thresholds[(band.thresholds > points[0]) & (band.thresholds < points[-1])]) <= set(points)


def test_a_line_that_wide_gaps_between_nodes_take_out_of_the_band_is_kept_inside():
    density = run_folders.density(steps=6)
    far = np.array([0.5])
    assert density.cumulative(far)[0] < density.band().at(far)[0][0]
    (line,) = curves(plots.cumulative(density))
    assert np.interp(0.5, *line.get_data()) >= density.band().at(far)[0][0] - 1e-9


def test_cumulative_curves_of_several_steps_levels_and_scales(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    ax = plots.cumulative(run, steps=None, level=0.8, scale="linear")
    assert ax.get_xscale() == "linear"
    assert legend(ax) == ["step 0", "step 10", "step 20"]
    assert len(ax.collections) == 3
    assert ax.get_ylabel() == "share of eigenvalues below λ (80 % band)"
    assert legend(plots.cumulative(run, steps=[0, 20], labels=["one", "two"])) == ["one", "two"]
    with pytest.raises(InputError, match="expected a scale of auto, linear, symlog, got 'log'"):
        plots.cumulative(run, scale="log")
    with pytest.raises(InputError, match="a level between 0 and 1"):
        plots.cumulative(run, level=95)


def test_the_scale_follows_the_data_or_the_caller():
    far = run_folders.density()
    assert plots.density(far).get_xscale() == "symlog"
    assert plots.density(far, scale="linear").get_xscale() == "linear"
    import torch

    from spectra import DenseOperator, slq

    near = slq(DenseOperator(torch.diag(torch.linspace(-1, 2, 30, dtype=torch.float64))), probes=2, steps=10)
    assert plots.density(near).get_xscale() == "linear"
    assert plots.density(near, scale="symlog").get_xscale() == "symlog"
    with pytest.raises(InputError, match="expected a scale of auto, linear, symlog, got 'log'"):
        plots.density(near, scale="log")


def test_degenerate_spectra_are_drawn():
    import torch

    from spectra import DenseOperator, slq

    for matrix in (torch.zeros(5, 5), torch.eye(5), torch.diag(torch.tensor([1e-12, 1.0, 1.0, 1.0, 1.0]))):
        ax = plots.density(slq(DenseOperator(matrix.double()), probes=2, steps=3))
        assert np.isfinite(ax.get_xlim()).all()
        ax.figure.canvas.draw()


def test_densities_and_labels_of_the_callers_own():
    spectra = [run_folders.density(seed=1), run_folders.density(seed=2)]
    _, ax = plt.subplots()
    assert plots.density(spectra, ax=ax, labels=["one", "two"]) is ax
    assert legend(ax) == ["one", "two"]
    with pytest.raises(InputError, match="one label for each of the 2 curves, got 1"):
        plots.density(spectra, labels=["one"])


def test_second_spectra_at_a_training_step_share_an_entry(tmp_path):
    marks = ((0, "start"), (10, "before-reset"), (10, "after-reset"), (20, "before-reset"), (20, "after-reset"))
    ax = plots.density(run_folders.run_folder(tmp_path / "a", marks=marks))
    assert [line.is_dashed() for line in curves(ax)] == [False, False, True, False, True]
    assert legend(ax) == ["step 0", "step 10", "step 20", "after reset"]
    run = run_folders.run_folder(
        tmp_path / "b", marks=run_folders.RESETS, presentation={"labels": {"after-reset": "after the reset"}}
    )
    assert legend(plots.density(run)) == ["step 0", "step 10", "step 20", "after the reset"]
    ax = plots.density([run, run_folders.run_folder(tmp_path / "c", marks=((5, ""), (5, "")))])
    assert legend(ax)[1:3] == ["b, step 10", "b, step 10, after the reset"]
    assert legend(ax)[-2:] == ["c, step 5", "c, step 5, measured again"]


def test_the_second_of_two_spectra_at_the_last_step_says_so(tmp_path):
    marks = ((0, ""), (10, "before-reset"), (10, "after-reset"))
    runs = [run_folders.run_folder(tmp_path / name, marks=marks) for name in "ab"]
    ax = plots.density(runs, steps="last")
    assert legend(ax) == ["a, step 10, after reset", "b, step 10, after reset"]


def test_many_steps_get_a_colour_bar(tmp_path):
    run = run_folders.run_folder(tmp_path / "a", marks=[(step, "") for step in range(12)])
    ax = plots.density(run)
    assert ax.get_legend() is None
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["training step"]


def test_runs_of_a_study_have_the_names_colours_and_lines_of_their_presentation(tmp_path):
    study = run_folders.study_folder(tmp_path / "study")
    ax = plots.density(study, steps="last")
    shown = [run_folders.COLORS[bits] for bits in (1, 1, 2, 2)]
    assert [line.get_color() for line in curves(ax)] == shown
    assert legend(ax) == [f"{bits}-bit {name}, step 20" for bits in (1, 2) for name in ("baseline", "WinQ")]
    assert [line.is_dashed() for line in curves(ax)] == [True, False, True, False]
    lines = curves(plots.trajectory(study, "flip_rate"))
    assert [line.get_color() for line in lines] == shown
    assert [line.is_dashed() for line in lines] == [True, False, True, False]
    black = plots.density(run_folders.study_folder(tmp_path / "with", bits=(2,), reference=True), steps="last")
    assert [line.get_color() for line in curves(black)] == [run_folders.COLORS[2]] * 2 + ["#000000"]
    assert legend(black)[-1] == "full precision, step 0"


def test_runs_without_a_presentation_have_the_palette_and_the_names_of_their_folders(tmp_path):
    runs = [run_folders.run_folder(tmp_path / name, marks=((0, ""),)) for name in ("b", "a", "_c")]
    ax = plots.density(runs)
    assert [line.get_color() for line in curves(ax)] == list(PALETTE[:3])
    assert not any(line.is_dashed() for line in curves(ax))
    assert legend(ax) == ["b, step 0", "a, step 0", " _c, step 0"]  # matplotlib would hide an underscore in front
    assert legend(plots.trajectory(runs, "flip_rate")) == ["b", "a", " _c"]


def test_a_presentation_may_give_a_colour_or_a_line_alone(tmp_path):
    shown = [{"color": "#123456"}, {"line": "dotted"}, {"reference": True}, {"reference": True, "color": "#abcdef"}]
    runs = [
        run_folders.run_folder(tmp_path / str(position), marks=((0, ""),), presentation=entry)
        for position, entry in enumerate(shown)
    ]
    lines = curves(plots.density(runs))
    assert [line.get_color() for line in lines] == ["#123456", PALETTE[1], "#000000", "#abcdef"]
    assert [line.get_linestyle() for line in lines] == ["-", ":", "-.", "-."]


def test_dollar_signs_in_names_are_no_formula(tmp_path):
    shown = {
        "label": r"$5 and $\frac",
        "labels": {"after-reset": r"a $b$"},
        "quantities": {"flip_rate": {"name": r"$\x$ of flips"}},
    }
    run = run_folders.run_folder(tmp_path / "a", marks=run_folders.RESETS, presentation=shown)
    other = run_folders.run_folder(tmp_path / "b")
    for ax in (plots.density(run), plots.density([run, other]), plots.trajectory([run, other], "flip_rate")):
        ax.figure.canvas.draw()  # matplotlib raises for a formula that it cannot read
        for text in ax.get_legend().get_texts():
            assert text._preprocess_math(text.get_text())[1] is False
    assert ax.yaxis.label._preprocess_math(ax.get_ylabel()) == (r"$\x$ of flips", False)


def test_long_names_leave_room_for_the_axes(tmp_path):
    runs = [run_folders.run_folder(tmp_path / name) for name in ("a" * 110, "several words and more of them " * 3)]
    for ax in (plots.trajectory(runs, "lambda_max"), plots.density(runs, steps="last")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib warns where its layout cannot be applied
            ax.figure.canvas.draw()
        assert ax.get_window_extent().width > 0.4 * ax.figure.bbox.width
        assert ax.get_legend().get_window_extent().x1 <= ax.figure.bbox.width
        assert {len(name.splitlines()) for name in legend(ax)} == {3}


def test_more_curves_than_colours_are_still_named(tmp_path):
    runs = [run_folders.run_folder(tmp_path / f"{number}", marks=((0, ""),)) for number in range(11)]
    assert legend(plots.density(runs)) == [f"{number}, step 0" for number in range(11)]


def test_a_run_that_kept_no_matrices_says_so(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    run.append(run_folders.record(run_folders.density()))
    with pytest.raises(InputError, match="kept no Lanczos matrices"):
        plots.density(run)


def test_a_trajectory_shows_values_intervals_and_what_is_unresolved(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    ax = plots.trajectory(run, "near_zero_share")
    assert ax.get_ylabel() == "near-zero share (|λ| < 0.001)"
    assert ax.get_xlabel() == "training step"
    assert [tick for tick in ax.get_xticks() if tick != round(tick)] == []
    (line,) = curves(ax)
    np.testing.assert_array_equal(line.get_data(), ([0, 10, 20], [run_folders.UNRESOLVED.value] * 3))
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (run_folders.UNRESOLVED.low, run_folders.UNRESOLVED.high)
    markers = [other for other in ax.lines if other.get_marker() == "o" and len(other.get_xdata())]
    assert {marker.get_markerfacecolor() for marker in markers} == {"white"}
    assert legend(ax) == ["a", "unresolved"]
    filled = plots.trajectory(run, "lambda_max")
    markers = [other for other in filled.lines if other.get_marker() == "o"]
    assert "white" not in {marker.get_markerfacecolor() for marker in markers}


def test_two_measurements_at_a_training_step_are_joined_by_a_vertical_line(tmp_path):
    run = run_folders.run_folder(tmp_path / "a", marks=run_folders.RESETS)
    ax = plots.trajectory(run, "rms")
    values = [record.estimates["rms"].value for record in run.records]
    jumps = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert [tuple(jump.get_xdata()) for jump in jumps] == [(10, 10)]
    np.testing.assert_array_equal(jumps[0].get_ydata(), values[1:3])
    pieces = [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    assert pieces == [[0, 10], [10, 20]]


def test_telemetry_is_a_plain_line_for_every_run_of_a_study(tmp_path):
    study = run_folders.study_folder(tmp_path / "study")
    run_folders.Run.create(study.folder / "4bit-baseline")  # has nothing to show, and is left out
    ax = plots.trajectory(study.folder, "flip_rate")
    assert len(curves(ax)) == 4
    assert not ax.collections
    assert legend(ax) == ["1-bit baseline", "1-bit WinQ", "2-bit baseline", "2-bit WinQ"]


def test_a_quantity_over_decades_gets_a_logarithmic_axis(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    for step in range(5):
        run.append_telemetry({"step": step, "rate": 10.0**-step, "level": 1.0 + step})
    assert plots.trajectory(run, "rate").get_yscale() == "log"
    assert plots.trajectory(run, "level").get_yscale() == "linear"


def test_unbounded_intervals_leave_no_band_and_no_infinite_axis(tmp_path):
    from spectra.estimates.estimate import student_interval

    run = run_folders.Run.create(tmp_path / "a")
    for step in (0, 10):
        run_folders.add(run, step=step, trace=student_interval([4.0]))
    ax = plots.trajectory(run, "trace")
    ax.figure.canvas.draw()
    assert np.isfinite(ax.get_ylim()).all()


def test_a_reference_with_one_spectrum_is_a_level_line(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,), reference=True)
    ax = plots.trajectory(study, "lambda_max")
    (value,) = [record.estimates["lambda_max"].value for run in study.runs[-1:] for record in run.records]
    levels = [line for line in ax.lines if list(line.get_xdata()) == [0, 1] and line.get_color() == "#000000"]
    assert [list(line.get_ydata()) for line in levels] == [[value, value]]
    assert legend(ax)[-1] == "full precision"


def test_eigenvalues_that_are_exactly_zero_are_told(tmp_path):
    import torch

    from spectra import DenseOperator, slq

    run = run_folders.Run.create(tmp_path / "a")
    spectrum = slq(DenseOperator(torch.diag(torch.tensor([0.0] * 15 + [1.0, 2.0, 3.0, 4.0, 5.0]).double())), probes=2)
    assert spectrum.zero_share() == 0.75
    run.append(run_folders.record(spectrum), spectrum)
    run_folders.add(run, step=5)
    assert legend(plots.density(run)) == ["step 0, 75% at 0", "step 5"]


def above(ax):
    return ax.get_title(loc="right")


def test_what_is_unfinished_says_so_above_the_axes(tmp_path):
    whole = run_folders.run_folder(tmp_path / "whole", planned_records=3)
    part = run_folders.run_folder(tmp_path / "part", planned_records=5)
    for drawn in (plots.density(part), plots.cumulative(part.folder), plots.trajectory([part], "rms")):
        assert above(drawn) == "unfinished: 3 of 5 spectra are measured"
    assert above(plots.density([whole, str(part.folder)], steps="last")) == "unfinished: 1 of 2 runs are finished"
    assert above(plots.trajectory(tmp_path_study(tmp_path), "rms")) == "unfinished: 1 of 3 runs are finished"
    for drawn in (plots.density(whole), plots.trajectory(whole, "rms"), plots.density(run_folders.density())):
        assert above(drawn) == ""


def tmp_path_study(tmp_path):
    """The two runs as a study of three."""
    (tmp_path / "config.json").write_text('{"planned_runs": ["whole", "part", "third"]}')
    return tmp_path
