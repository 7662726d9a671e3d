import warnings

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import run_folders

import spectra
from spectra import plots
from spectra.backend.errors import InputError
from spectra.views.curves import curves_of
from spectra.views.style import PALETTE
from spectra.views.tails import tail_of
from spectra.views.trajectories import PALE


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


def curves(ax):
    """The lines that have a name: not the zero line, edges of bands nor entries made for the legend."""
    return [line for line in ax.lines if not str(line.get_label()).startswith("_")]


HATCHED = "not resolved: only the number inside is known"


def legend(ax):
    """The entries of the legend, without that of hatching."""
    texts = [" ".join(text.get_text().split("\n")) for text in ax.get_legend().get_texts()]
    return [text for text in texts if text != HATCHED]


def boxes(ax):
    """The filled and the hatched boxes of densities: (left, right, bottom, top) of each."""
    found = [[(*p.vertices.min(0), *p.vertices.max(0)) for p in drawn.get_paths()] for drawn in ax.collections]
    return [[(x0, x1, y0, y1) for x0, y0, x1, y1 in paths] for paths in found]


def test_a_curve_a_record_and_every_box_holds_the_mass_that_is_inside(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    ax = plots.density(run)
    assert len(curves(ax)) == 3
    assert legend(ax) == ["step 0", "step 10", "step 20"]
    assert ax.get_yscale() == "log"
    assert len({str(line.get_color()) for line in curves(ax)}) == 3
    shown, bottom = boxes(ax), ax.get_ylim()[0]
    for position, record in enumerate(run.records):
        values = np.sort(run_folders.eigenvalues(scale=1 - record.step / 100))
        drawn = shown[2 * position] + shown[2 * position + 1]
        assert len(drawn) > 2
        for left, right, low, high in drawn:
            height = np.diff(np.searchsorted(values, [left, right]))[0] / len(values) / (right - left)
            assert low * (1 - 1e-9) <= height or low == bottom
            assert height <= high * (1 + 1e-9)
        assert max(right for _, right, _, _ in drawn) == pytest.approx(values[-1], rel=1e-6)
        assert min(left for left, _, _, _ in drawn) == pytest.approx(values[0], rel=1e-6)


def test_the_line_of_a_density_lies_inside_the_filled_boxes_alone(tmp_path):
    ax = plots.density(run_folders.density(probes=4, steps=60))
    (line,), (filled, hatched) = curves(ax), boxes(ax)
    xs, ys = line.get_data()
    middles, heights = (xs[::2] + xs[1::2]) / 2, ys[::2]
    for middle, height in zip(middles, heights, strict=True):
        inside = [low <= height <= high for left, right, low, high in filled if left < middle < right]
        assert inside == ([] if np.isnan(height) else [True])
    assert np.isfinite(heights).any()
    assert np.all(heights[np.isfinite(heights)] < ax.get_ylim()[1])
    assert len(filled) + len(hatched) <= len(heights)


def test_what_a_short_recurrence_leaves_open_is_hatched_with_its_mass():
    ax = plots.density(run_folders.density(probes=2, steps=6))
    assert boxes(ax)[1]
    words = " ".join(text.get_text() for text in ax.texts)
    assert "not resolved" in words
    assert "%" in words
    texts = [" ".join(text.get_text().split("\n")) for text in ax.get_legend().get_texts()]
    assert texts == [HATCHED]


def test_known_zeros_are_a_bar_at_zero_and_in_no_box():
    density = spectra.slq(spectra.DenseOperator(np.diag([0.0] * 30 + list(np.linspace(1, 2, 20)))), probes=2, steps=30)
    assert density.zero_share() == 0.6
    ax = plots.density(density)
    assert [text.get_text().strip() for text in ax.texts if "exactly" in text.get_text()] == ["60 % exactly 0"]
    bars = [line for line in ax.lines if list(line.get_xdata()) == [0, 0] and line.get_linewidth() > 2]
    assert len(bars) == 1
    for left, right, low, high in boxes(ax)[0] + boxes(ax)[1]:
        inside = np.sum((np.linspace(1, 2, 20) >= left) & (np.linspace(1, 2, 20) < right)) / 50 / (right - left)
        assert low <= inside * (1 + 1e-9) or low == ax.get_ylim()[0]
        assert inside <= high * (1 + 1e-9)
        assert high < 10  # the zeros would need more


def test_eigenvalues_that_are_known_are_ticks():
    values = run_folders.eigenvalues()
    density = spectra.slq(spectra.DiagonalOperator(values), probes=3, steps=20, deflate=3)
    ticks = [line for line in plots.density(density).lines if line.get_marker() == "|"]
    assert [sorted(line.get_xdata().round(6)) for line in ticks] == [[3.0, 5.0, 8.0]]


def test_a_cumulative_curve_lies_in_its_band_and_the_band_holds_the_truth(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    ax = plots.cumulative(run)
    assert ax.get_xscale() == "symlog"
    assert " ".join(ax.get_ylabel().split()) == "share of eigenvalues below λ (95 % band)"
    (line,), (drawn,) = curves(ax), ax.collections
    points, middle = line.get_data()
    low, high = (side.get_ydata() for side in ax.lines[:2])
    known = np.isfinite(middle)
    assert np.array_equal(known, high - low <= 0.1)
    assert known.any()
    assert not known.all()
    assert np.all((low <= middle) & (middle <= high) | ~known)
    outline = {tuple(vertex) for vertex in drawn.get_paths()[0].vertices}
    assert {*zip(points, low, strict=True), *zip(points, high, strict=True)} <= outline
    truth = np.searchsorted(np.sort(run_folders.eigenvalues(scale=0.8)), points) / 400  # the scale at step 20
    assert np.all((low <= truth) & (truth <= high))


def test_cumulative_curves_of_several_steps_levels_and_scales(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    ax = plots.cumulative(run, steps=None, level=0.8, scale="linear")
    assert ax.get_xscale() == "linear"
    assert legend(ax) == ["step 0", "step 10", "step 20"]
    assert len(ax.collections) == 3
    assert "(80 % band)" in " ".join(ax.get_ylabel().split())
    assert legend(plots.cumulative(run, steps=[0, 20], labels=["one", "two"])) == ["one", "two"]
    with pytest.raises(InputError, match="expected a scale of auto, linear, symlog, got 'log'"):
        plots.cumulative(run, scale="log")
    with pytest.raises(InputError, match="a level between 0 and 1"):
        plots.cumulative(run, level=95)
    with pytest.raises(InputError, match="a legend of auto, outside, inside, none, got 'left'"):
        plots.cumulative(run, legend="left")


def test_tails_are_bands_that_hold_the_numbers_and_outliers_are_single_steps():
    values = np.sort(run_folders.eigenvalues())
    density = spectra.slq(spectra.DiagonalOperator(values), probes=3, steps=25, deflate=6)
    ax = plots.tails(density)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert legend(ax) == ["above t", "below −t"]
    for curve, above in zip(curves_of(density) * 2, (True, False), strict=True):
        tail = tail_of(curve, above=above, level=0.95)
        numbers = len(values) - np.searchsorted(values, tail.sizes) if above else np.searchsorted(values, -tail.sizes)
        assert np.all((tail.low <= numbers) & (numbers <= tail.high))
        far = tail.sizes > 0.5  # the six outliers are known there
        assert np.array_equal(tail.low[far], tail.high[far]) or density.atom_residuals.max() > 0
        at = [np.searchsorted(tail.sizes, size) for size in ((2.0, 4.0, 6.0) if above else (1.0,))]
        assert tail.low[at].tolist() == tail.high[at].tolist() == ([3, 2, 1] if above else [1])
    (above, below) = curves(ax)
    assert np.nanmin(above.get_ydata()) == 1
    assert below.is_dashed()
    only = plots.tails(density, side="below")
    assert only.get_legend() is None
    assert "below" in only.get_ylabel()
    with pytest.raises(InputError, match="a side of both, above, below, got 'left'"):
        plots.tails(density, side="left")
    with pytest.raises(InputError, match="no spectrum has eigenvalues below 0"):
        plots.tails(spectra.SpectralDensity.from_eigenvalues(np.array([1.0, 2.0])), side="below")


@pytest.mark.parametrize("draw", [plots.cumulative, plots.tails, plots.density])
def test_a_figure_of_two_panels_for_print_has_nothing_outside(draw, tmp_path):
    study = run_folders.study_folder(tmp_path / "study")
    figure, axes = plt.subplots(1, 2, figsize=(6.5, 2.6), layout="constrained")
    for ax, runs in zip(axes, (study.runs[:2], study.runs[2:]), strict=True):
        draw(runs, ax=ax, steps="last")
    for kind in ("svg", "pdf"):
        figure.savefig(tmp_path / f"figure.{kind}")
    figure.canvas.draw()
    for ax in axes:
        for text in (ax.xaxis.label, ax.yaxis.label, *ax.get_legend().get_texts()):
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= -1  # pixels
            assert box.x1 <= figure.bbox.width + 1
            assert box.y1 <= figure.bbox.height + 1
        assert ax.get_window_extent().width > 0.3 * figure.bbox.width


def test_runs_are_told_apart_without_colour(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    for draw in (plots.cumulative, plots.tails):
        markers = [line.get_marker() for line in curves(draw(study, steps="last"))]
        assert len(set(markers)) == 2
    entries = plots.density(study, steps="last").get_legend().legend_handles
    assert len({entry.get_marker() for entry in entries[:2]}) == 2


def test_a_record_is_no_curve_and_the_message_says_what_to_give(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    for draw in (plots.cumulative, plots.tails, plots.density):
        with pytest.raises(InputError, match=r"record \(here of step 10\).*give its run"):
            draw(run.records[1])
        with pytest.raises(InputError, match="a SpectralDensity or a list of these is expected, got float"):
            draw(1.5)
    assert not plt.get_fignums()


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
    assert legend(ax) == []
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
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert {len(name.splitlines()) for name in names[:2]} == {3}


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
    assert np.isnan(line.get_ydata()).all()  # no line where nothing is resolved
    bars = [bar for drawn in ax.collections if drawn.get_alpha() == PALE for bar in drawn.get_segments()]
    ends = (run_folders.UNRESOLVED.low, run_folders.UNRESOLVED.high)
    assert [(tuple(bar[:, 0]), tuple(bar[:, 1])) for bar in bars] == [((step, step), ends) for step in (0, 10, 20)]
    markers = [other for other in ax.lines if other.get_marker() == "o" and len(other.get_xdata())]
    assert [float(marker.get_ydata()[0]) for marker in markers] == [run_folders.UNRESOLVED.value] * 3
    assert {marker.get_markerfacecolor() for marker in markers} == {"white"}
    assert legend(ax) == ["a", "unresolved: pale, with its interval"]
    filled = plots.trajectory(run, "lambda_max")
    markers = [other for other in filled.lines if other.get_marker() == "o"]
    assert "white" not in {marker.get_markerfacecolor() for marker in markers}


def test_a_line_is_broken_at_what_is_unresolved(tmp_path):
    run = run_folders.Run.create(tmp_path / "a")
    for step in range(5):
        run_folders.add(run, step=step, **({"lambda_max": run_folders.UNRESOLVED} if step == 2 else {}))
    (line,) = curves(plots.trajectory(run, "lambda_max"))
    assert np.isnan(line.get_ydata()).tolist() == [False, False, True, False, False]


def test_records_and_densities_have_trajectories_too(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    records, densities = run.records, [run.density(record) for record in run.records]
    values = [record.estimates["lambda_max"].value for record in records]
    for shown, steps in ((records, [0, 10, 20]), (densities, [0, 1, 2])):
        (line,) = curves(plots.trajectory(shown, "lambda_max"))
        np.testing.assert_array_equal(line.get_data(), (steps, values))


def test_a_ridge_has_a_row_for_each_record(tmp_path):
    run = run_folders.run_folder(tmp_path / "a", marks=run_folders.RESETS)
    ax = plots.ridge(run)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "10", "10\nafter reset", "20"]
    assert ax.get_ylabel() == "training step"
    many = run_folders.run_folder(tmp_path / "b", marks=[(step, "") for step in range(40)])
    names = [tick.get_text() for tick in plots.ridge(many).get_yticklabels()]
    assert len(names) == 16
    assert (names[0], names[-1]) == ("0", "39")
    ax = plots.ridge([run_folders.density(), run_folders.density(seed=1)], labels=["one", "two"])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["one", "two"]


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
