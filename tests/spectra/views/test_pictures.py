import matplotlib.pyplot as plt
import run_folders

from spectra.views.pictures import density_pictures, figures, trajectory_pictures


def test_the_figures_of_a_study_by_name(tmp_path):
    study = run_folders.study_folder(tmp_path / "study")
    open_before = plt.get_fignums()
    got = figures(study)
    assert next(iter(got)) == "cumulative"
    assert [ax.get_title(loc="left") for ax in got["cumulative"].axes] == ["1-bit", "2-bit"]
    assert len(got["tails"].axes) == 2
    wanted = {
        "ridge-1-bit",
        "density-1-bit",
        "density-2-bit",
        "density-last",
        "trajectory-rms",
        "trajectory-validation_loss",
    }
    assert wanted <= set(got)
    assert [ax.get_title(loc="left") for ax in got["density-1-bit"].axes] == ["1-bit baseline", "1-bit WinQ"]
    assert len({ax.get_xlim() + ax.get_ylim() for ax in got["density-1-bit"].axes}) == 1
    assert "trajectory-repeatability" not in got
    got["density-last"].savefig(tmp_path / "last.png")
    assert plt.get_fignums() == open_before  # nothing for the caller to close


def test_what_the_runs_are_compared_with_is_drawn_beside_them(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,), reference=True)
    got = figures(study)
    assert {"density-2-bit", "density-full-precision", "density-last"} <= set(got)
    words = [text.get_text() for text in got["density-last"].axes[0].get_legend().get_texts()]
    assert words[:3] == ["2-bit baseline, step 20", "2-bit WinQ, step 20", "full precision, step 0"]


def test_runs_of_a_group_stand_side_by_side_two_in_a_figure(tmp_path):
    study = run_folders.Run.create(tmp_path / "study")
    for name, group in (("a", "one"), ("b", "two"), ("c", "one"), ("d", "one"), ("e", None)):
        run_folders.run_folder(
            study.folder / name, marks=((0, ""),), presentation={"label": f"run {name}", "group": group}
        )
    got = {name: figure for name, figure in figures(study).items() if name.startswith("density")}
    titles = {name: [ax.get_title(loc="left") for ax in figure.axes] for name, figure in got.items()}
    assert titles == {
        "density-one": ["run a", "run c"],
        "density-one-2": [""],
        "density-two": [""],
        "density-e": [""],
        "density-last": [""],
    }


def test_captions_are_in_the_words_of_the_runs(tmp_path):
    study = run_folders.study_folder(tmp_path / "study", bits=(2,))
    pictures = {picture.name: picture for picture in trajectory_pictures(study)}
    assert pictures["trajectory-flip_rate"].caption == "Flip rate: share of the codes that changed."
    assert pictures["trajectory-flip_rate"].figure.axes[0].get_ylabel() == "flip rate"
    assert "2-bit baseline from 0.1 to 0.0135" in pictures["trajectory-flip_rate"].alternative
    (bands, tails, side_by_side, ridges, last) = density_pictures(study)
    assert bands.caption.endswith("the last spectrum of 2-bit baseline and 2-bit WinQ, Hessian mode ste.")
    assert tails.name == "tails"
    assert [text.get_text() for text in ridges.figure.axes[0].get_yticklabels()] == ["0", "10", "20"]
    words = "Density of eigenvalues along the training of 2-bit baseline and 2-bit WinQ, Hessian mode ste."
    assert side_by_side.caption == words
    assert last.caption == "The last spectrum of every run, Hessian mode ste."


def test_checks_of_a_measurement_are_no_trajectories(tmp_path):
    run = run_folders.run_folder(tmp_path / "a")
    assert run.records[0].checks
    names = {picture.name for picture in trajectory_pictures(run)}
    assert "trajectory-custom" in names
    assert not names & {f"trajectory-{check}" for check in run.records[0].checks}
