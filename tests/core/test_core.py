"""What works with the core's packages alone: torch, numpy, scipy, safetensors and tqdm.

`make test-core` runs these tests in an environment that has nothing else. The whole suite runs them too, without those
about packages that are missing.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qat
import spectra
from spectra.backend.extras import EXTRA_OF, MissingExtraError

in_core = pytest.mark.skipif(Path(sys.prefix).name != "core", reason="run by make test-core, which has no extras")
NOT_IN_CORE = sorted(set(EXTRA_OF) - {"jinja2"})  # torch brings jinja2


@pytest.fixture
def regression():
    """A small network in float64 with a squared loss: the model, its batches and its loss."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double()
    batches = [
        tuple(torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (5, 2)) for _ in range(2)
    ]
    return model, batches, torch.nn.functional.mse_loss


def dense_hessian(model, batches, loss):
    """The Hessian of the mean loss by torch.autograd.functional, (n, n)."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]

    def mean_loss(vector):
        pieces = vector.split([shape.numel() for shape in shapes])
        values = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        losses = [loss(torch.func.functional_call(model, values, (inputs,)), targets) for inputs, targets in batches]
        return torch.stack(losses).mean()

    return torch.autograd.functional.hessian(
        mean_loss, torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    )


def test_spectra_of_a_plain_model(regression):
    model, batches, loss = regression
    values = torch.linalg.eigvalsh(dense_hessian(model, batches, loss))
    operator = spectra.HessianOperator(model, batches, loss=loss)
    exact = spectra.slq(operator, probes=1, steps=operator.shape[0])
    assert exact.lambda_max().value == pytest.approx(values[-1].item(), rel=1e-8)
    assert exact.negative_share().value == pytest.approx((values < 0).double().mean().item())
    sampled = spectra.slq(operator, probes=4, steps=12, seed=1).rms()
    assert sampled.low <= values.square().mean().sqrt().item() <= sampled.high
    assert spectra.topk(operator, 2, which="LA").values == pytest.approx(values[-2:].numpy(), rel=1e-6)
    for method in ("hutchinson", "hutch++", "xtrace"):
        trace = spectra.trace(operator, method=method, probes=30, seed=0)
        assert trace.low - 1e-9 <= values.sum().item() <= trace.high + 1e-9, method
    resolved = spectra.resolve(operator, share="negative", half_width=0.05, seed=0)
    assert resolved.low <= (values < 0).double().mean().item() <= resolved.high


def test_a_probe_in_a_training_loop(regression, tmp_path):
    model, batches, loss = regression
    probe = spectra.SpectrumProbe(model, batches, loss=loss, every=2, out=tmp_path / "run", probes=2, steps=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss(model(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
        probe.step(step)
    run = spectra.Run(tmp_path / "run")
    assert [record.step for record in run.records] == [0, 2]
    before, after = (run.density(record) for record in run.records)
    assert spectra.compare(before, after)["rms"].paired
    done = command("spectra", "compare", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "trace" in done.stdout


def test_quantized_layers_in_a_plain_loop(regression):
    model, batches, loss = regression
    qat.quantize_model(model, qat.QuantConfig(bits=4))
    weights = {name: layer.weight.detach().clone() for name, layer in qat.quant_layers(model)}
    assert weights
    operator = qat.hessian_operator(model, batches, loss=loss, mode="latent")
    assert torch.isfinite(operator @ torch.ones(operator.shape[0], dtype=torch.float64)).all()
    qat.interpolate_(model, alpha=0.5)
    assert any(not torch.equal(layer.weight, weights[name]) for name, layer in qat.quant_layers(model))


@in_core
@pytest.mark.parametrize("package", NOT_IN_CORE)
def test_the_extras_are_not_installed(package):
    """Or what follows would test nothing."""
    with pytest.raises(ModuleNotFoundError):
        __import__(package)


@in_core
@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [
        (spectra, "plots", "plots"),
        (spectra, "report", "plots"),
        (spectra, "SpectrumCallback", "qat"),
        (qat, "WinQCallback", "qat"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_needs_an_extra_says_which(module, name, extra):
    with pytest.raises(MissingExtraError, match=rf'^\w+ is not installed: pip install "spectra-qat\[{extra}\]"$'):
        getattr(module, name)


def command(program, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"{program}.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@in_core
@pytest.mark.parametrize(
    "arguments", [("spectra", "measure", "MODEL"), ("qat", "evaluate", "MODEL"), ("qat", "compare")]
)
def test_a_command_that_needs_an_extra_says_which(arguments, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One sentence after another. " * 200)
    arguments = [str(tmp_path) if argument == "MODEL" else argument for argument in arguments]
    options = [] if "compare" in arguments else ["--text", str(text)]
    out = [] if "evaluate" in arguments else ["--out", str(tmp_path / "out")]
    done = command(*arguments, *options, *out)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install "spectra-qat[qat]"' in done.stderr


@in_core
@pytest.mark.parametrize("name", ["plot", "report"])
def test_a_figure_needs_the_extra_for_plots(name, regression, tmp_path):
    model, batches, loss = regression
    spectra.SpectrumProbe(model, batches, loss=loss, out=tmp_path / "run", probes=1, steps=4).measure(0)
    done = command("spectra", name, str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert 'pip install "spectra-qat[plots]"' in done.stderr
