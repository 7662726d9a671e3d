"""Random arguments for every command and public function: it works, or raises the documented error in one line.

`make test` runs some examples of each with fixed seeds; `SPECTRA_EXAMPLES=300` in the slow run gives over 2,000 cases.
"""

import contextlib
import io
import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import run_folders
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import qat
import spectra
from qat.cli import main as qat_command
from spectra.backend.errors import InputError
from spectra.cli.main import main as spectra_command
from spectra.runs.folder import Run
from spectra.views import page, plots

EXAMPLES = int(os.environ.get("SPECTRA_EXAMPLES", "25"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
NUMBERS = st.one_of(st.integers(-3, 12), st.floats(), st.none(), st.booleans(), st.text(max_size=3))
REALS, COUNTS = st.one_of(st.integers(-3, 12), st.floats()), st.integers(-3, 12)
WORDS = st.one_of(
    st.text(max_size=8),
    st.integers(-5, 5).map(str),
    st.floats().map(str),
    st.sampled_from(["ste", "full", "rms", "baseline", "winq", "cpu", ".", "", "no/such", "1e400", "<script>"]),
)


def works_or_is_refused(call):
    """Call it; an InputError of one line is as good."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except InputError as error:
            assert str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    return None


def runs_or_exits_2(command, arguments):
    """Run a command; it ends with 0, or with 2 and one line."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = command(arguments)
    assert code in (0, 2), (arguments, code)
    if code == 2:
        assert len(err.getvalue().splitlines()) == 1, (arguments, err.getvalue())
        assert "Traceback" not in err.getvalue()


def options(*names):
    """Some of these options, each with a word."""
    return st.lists(st.tuples(st.sampled_from(names), WORDS), max_size=3).map(
        lambda pairs: [w for p in pairs for w in p]
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return str(run_folders.run_folder(tmp_path_factory.mktemp("fuzz") / "run").folder)


@fuzzed
@given(more=options("--from", "--to", "--mode", "--json", "--nonsense"))
def test_spectra_compare(run_folder, more):
    runs_or_exits_2(spectra_command, ["compare", run_folder, *more])


@fuzzed
@given(more=options("--quantity", "--mode"))
def test_spectra_plot(run_folder, tmp_path_factory, more):
    out = str(tmp_path_factory.mktemp("plot") / "x.png")
    runs_or_exits_2(spectra_command, ["plot", run_folder, "--out", out, *more])


@fuzzed
@given(title=st.none() | st.text(max_size=20), more=options("--nonsense"), table=st.binary(max_size=20))
def test_spectra_report(run_folder, title, more, table):
    """With any title, and anything in table.json. Figures have no part in it."""
    (Path(run_folder) / "table.json").write_bytes(table)
    given_ = [] if title is None else [f"--title={title}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "density_pictures", lambda run: [])
        patch.setattr(page, "trajectory_pictures", lambda run: [])
        runs_or_exits_2(spectra_command, ["report", run_folder, *given_, *more])


MEASURE = (
    "--probes",
    "--steps",
    "--deflate",
    "--sequences",
    "--length",
    "--batch-size",
    "--seed",
    "--dtype",
    "--params",
)


@fuzzed
@given(more=options(*MEASURE), model=WORDS.filter(lambda word: "/" in word or not word.isidentifier()))
def test_spectra_measure_before_a_model_is_loaded(tmp_path_factory, more, model):
    folder = tmp_path_factory.mktemp("measure")
    arguments = ["measure", f"./{model}/none", "--text", str(folder / "no.txt"), "--out", str(folder / "run"), *more]
    runs_or_exits_2(spectra_command, arguments)
    assert not (folder / "run").exists()


STUDY = (
    *("--bits", "--steps", "--batch-size", "--lr", "--schedule", "--warmup", "--weight-decay", "--evaluate-every"),
    *("--seed", "--quantizer", "--preset", "--every", "--alpha", "--sigma", "--modes", "--probes", "--lanczos-steps"),
    *("--deflate", "--measure-sequences", "--length", "--vocabulary-size", "--base-steps", "--device", "--workers"),
    *("--group-size", "--initial-scale"),
)


@fuzzed
@given(command=st.sampled_from(["compare", "train", "evaluate"]), more=options(*STUDY, "--block", "--method"))
def test_qat_before_a_model_is_loaded(tmp_path_factory, command, more):
    folder = tmp_path_factory.mktemp("qat")
    text = ["--text", str(folder / "no.txt")]
    where = [str(folder)] if command == "evaluate" else ["--out", str(folder / "out")]
    runs_or_exits_2(qat_command, [command, *where, *text, *more])
    assert not (folder / "out").exists()


@fuzzed
@given(
    call=st.sampled_from([spectra.slq, spectra.trace, spectra.topk, spectra.resolve, spectra.lanczos]),
    n=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1e-300, 1.0, -1.0, 1e30, math.nan]),
    given_=st.dictionaries(st.sampled_from(["probes", "steps", "k", "seed", "deflate", "budget"]), st.integers(-2, 12)),
)
def test_algorithms(call, n, scale, given_):
    import inspect

    known = inspect.signature(call).parameters
    chosen = {name: value for name, value in given_.items() if name in known}
    if "k" in known:
        chosen.setdefault("k", 1)
    if call is spectra.lanczos:
        start = torch.ones(n, dtype=torch.float64)
        steps = chosen.get("steps", 1)
        works_or_is_refused(lambda: call(spectra.DenseOperator(scale * np.eye(n)), start, steps))
        return
    values = scale * np.arange(n, dtype=float)
    works_or_is_refused(lambda: call(spectra.DiagonalOperator(values), **chosen))


@fuzzed
@given(
    options_=st.dictionaries(
        st.sampled_from(
            [
                "probes",
                "steps",
                "seed",
                "deflate",
                "every",
                "near_zero_tol",
                "microbatch",
                "batch_groups",
                "engine",
                "precision",
                "spread",
            ]
        ),
        NUMBERS,
    )
)
def test_a_probe(options_):
    torch.manual_seed(0)
    batches = [(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))]
    settings_ = {"probes": 1, "steps": 2, "deflate": 0} | options_

    def measure():
        probe = spectra.SpectrumProbe(nn.Linear(2, 2), batches, **settings_)
        (record,) = probe.measure(0)
        assert record.status in ("ok", "failed")
        assert "\n" not in record.reason

    works_or_is_refused(measure)


@fuzzed
@given(
    values=st.lists(st.floats(), max_size=5),
    shape=st.sampled_from([(-1,), (1, -1), (-1, 1), (5, 5)]),
    options_=st.dictionaries(st.sampled_from(["probes", "steps", "deflate"]), COUNTS),
)
def test_operators_and_their_plan(values, shape, options_):
    matrix = np.resize(values or [0.0], (5, 5)) if shape == (5, 5) else np.array(values, dtype=float).reshape(shape)
    for operator in (spectra.DenseOperator, spectra.DiagonalOperator):
        op = works_or_is_refused(lambda operator=operator: operator(matrix))
        if op is not None:
            works_or_is_refused(lambda op=op: spectra.MeanOperator([op]) @ torch.from_numpy(matrix))
            works_or_is_refused(lambda op=op: spectra.DeflatedOperator(op, torch.from_numpy(matrix)))
            works_or_is_refused(lambda op=op: spectra.plan(op))
    torch.manual_seed(0)
    batches = [(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))]
    with spectra.HessianOperator(nn.Linear(2, 2), batches) as op:
        works_or_is_refused(lambda: str(spectra.plan(op, **{"steps": 2, "probes": 1} | options_)))


DENSITY = {
    "density": (np.linspace(-1, 1, 3),),
    "near_zero_share": (),
    "share_between": (-1.0,),
    "decided_signs": (),
    "band": (),
}


@fuzzed
@given(name=st.sampled_from(sorted(DENSITY)), number=REALS, other=REALS)
def test_questions_to_a_density(name, number, other):
    found = run_folders.density(steps=4)
    works_or_is_refused(lambda: getattr(found, name)(*DENSITY[name], number))
    works_or_is_refused(lambda: spectra.compare(found, found, near_zero_tol=other))


@fuzzed
@given(
    draw=st.sampled_from(["density", "cumulative", "tails", "ridge", "trajectory"]),
    word=WORDS,
    number=REALS,
    steps=COUNTS,
)
def test_figures(run_folder, draw, word, number, steps):
    import matplotlib.pyplot as plt

    given_ = {
        "density": {"mode": word, "steps": steps, "level": number, "scale": word, "legend": word},
        "ridge": {"mode": word, "steps": steps, "level": number, "scale": word},
        "tails": {"mode": word, "steps": steps, "level": number, "side": word},
        "cumulative": {"mode": word, "steps": steps, "level": number, "scale": word},
        "trajectory": {"quantity": word, "mode": word},
    }[draw]
    try:
        for key, value in given_.items():
            with_default = {"quantity": "rms"} if draw == "trajectory" else {}
            works_or_is_refused(lambda k=key, v=value, d=with_default: getattr(plots, draw)(run_folder, **{**d, k: v}))
    finally:
        plt.close("all")


@fuzzed
@given(
    mode=st.sampled_from(["ste", "quantized", "latent", "noisy", "no such"]),
    options_=st.fixed_dictionaries({}, optional={"draws": COUNTS, "seed": COUNTS, "sigma": REALS, "point": REALS}),
    alpha=NUMBERS,
    params=st.none() | st.sampled_from(["*", "0.weight", "no such", ["*bias", "*"]]),
)
def test_a_quantized_model(mode, options_, alpha, params):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2))
    works_or_is_refused(lambda: qat.quantize_model(model, qat.QuantConfig(bits=2)))
    batches = [(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))]

    def product():
        with contextlib.closing(qat.hessian_operator(model, batches, mode=mode, params=params, **options_)) as op:
            return op @ torch.ones(op.shape[0])

    works_or_is_refused(product)
    works_or_is_refused(lambda: qat.interpolate_(model, alpha=alpha))


@fuzzed
@given(bits=NUMBERS, every=NUMBERS, alpha=NUMBERS, sigma=NUMBERS)
def test_settings_of_qat(bits, every, alpha, sigma):
    works_or_is_refused(lambda: qat.QuantConfig(bits=bits))
    works_or_is_refused(lambda: qat.WinQConfig(every=every, alpha=alpha, sigma=sigma))
    works_or_is_refused(lambda: qat.reset_steps(every, 10))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
FIELDS = ["step", "mode", "loss", "estimates", "lanczos", "label", "checks", "notes", "status", "schema_version"]


@fuzzed
@given(
    line=st.binary(max_size=60) | st.dictionaries(st.sampled_from(FIELDS), JSON).map(lambda f: json.dumps(f).encode()),
    config=JSON,
)
def test_a_run_folder_with_anything_in_it(tmp_path_factory, line, config):
    folder = tmp_path_factory.mktemp("any")
    (folder / "config.json").write_text(json.dumps(config))
    whole = run_folders.record(run_folders.density()).to_dict()
    (folder / "records.jsonl").write_bytes(json.dumps(whole).encode() + b"\n" + line + b"\n")
    for read in (lambda run: run.config, lambda run: run.records, lambda run: run.presentation, lambda run: run.runs):
        works_or_is_refused(lambda read=read: read(Run(folder)))
    runs_or_exits_2(spectra_command, ["compare", str(folder)])


def test_noise_beyond_all_numbers_is_refused_or_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2))
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    batches = [(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))]
    for sigma in (1e300, 1e38, 1e-300):
        with contextlib.closing(qat.hessian_operator(model, batches, mode="noisy", sigma=sigma)) as op:
            works_or_is_refused(lambda op=op: op @ torch.ones(op.shape[0]))
