"""PyHessian's calls on this engine, against dense Hessians, PyHessian's own results, and its tutorial."""

import copy
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from oracles import dense_hessian, flat, random_state, same_random_state
from torch import nn

from spectra.backend.errors import InputError
from spectra.integrations.pyhessian import get_esd_plot, hessian, normalization


def vision_model(seed=0):
    """A small convolutional network with batch norm and dropout, 371 parameters."""
    torch.manual_seed(seed)
    features = [nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 6, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*features, nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def images(rows=(32,)):
    return [(inputs.float(), targets) for inputs, targets in tiny_models.images(rows)]


def classifier(rows=(30,)):
    model = tiny_models.mlp(hidden=40, dtype=torch.float32)
    return model, [(inputs.float(), targets) for inputs, targets in tiny_models.classification(rows)]


def on_cpu(*arguments, **options):
    return hessian(*arguments, cuda=False, **options)


def dense(model, batches):
    """The Hessian of the mean cross-entropy over all rows, in float64 and evaluation mode."""
    model = copy.deepcopy(model).double().eval()
    inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    loss = nn.functional.cross_entropy(model(inputs.double()), targets)
    return dense_hessian(loss, list(model.parameters()))


def test_eigenvalues_come_as_floats_by_magnitude_with_vectors_shaped_like_the_parameters():
    model, batches = classifier()
    values, vectors = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0]).eigenvalues(top_n=4, maxIter=50, tol=1e-4)
    matrix = dense(model, batches)
    truth = np.linalg.eigvalsh(matrix.numpy())
    assert all(type(value) is float for value in values)
    np.testing.assert_allclose(values, sorted(truth, key=abs, reverse=True)[:4], rtol=1e-5)
    for value, vector in zip(values, vectors, strict=True):
        assert [part.shape for part in vector] == [p.shape for p in model.parameters()]
        x = flat(vector).double()
        assert x.norm() == pytest.approx(1, abs=1e-5)
        assert (matrix @ x - value * x).norm() < 1e-3 * abs(value)


def test_eigenvalues_that_did_not_converge_are_said():
    model, batches = classifier()
    found = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0])
    with pytest.warns(UserWarning, match=r"2 of 2 eigenvalues did not converge in 4 products .* raise maxIter or tol"):
        found.eigenvalues(maxIter=2, top_n=2)
    assert not found.last_eigenpairs.converged.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.eigenvalues(maxIter=50, top_n=2)
    assert found.last_eigenpairs.converged.all()


def test_the_mean_of_the_samples_is_the_trace_and_its_interval_covers():
    model, batches = classifier()
    truth = float(dense(model, batches).trace())
    torch.manual_seed(3)
    found = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0])
    samples = found.trace(maxIter=200)
    assert all(type(sample) is float for sample in samples)
    assert len(samples) == 200
    assert np.mean(samples) == pytest.approx(found.last_trace.value, rel=1e-9)
    assert found.last_trace.low <= truth <= found.last_trace.high
    assert found.last_trace.half_width < 0.25 * truth
    exact = found.trace(maxIter=400)  # more than there are parameters
    assert len(exact) == 1
    assert exact[0] == pytest.approx(truth, rel=1e-4)


def test_a_trace_ends_where_its_interval_is_narrow_enough():
    model, batches = classifier()
    found = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0])
    loose, tight = found.trace(maxIter=100, tol=0.6), found.trace(maxIter=100, tol=1e-3)
    assert len(loose) in (10, 20, 40)
    assert len(tight) == 100
    found.trace(maxIter=100, tol=0.6)
    assert found.last_trace.half_width <= 0.6 * abs(found.last_trace.value)


def test_a_trace_below_zero_takes_all_its_samples():
    """PyHessian 0.1 ends here after the second sample, because it divides by a mean without its sign."""
    pyhessian = pytest.importorskip("pyhessian")
    model, batches = Quadratic(-torch.linspace(0.5, 1.5, 300)), [(torch.zeros(1), torch.zeros(1))]
    theirs = pyhessian.hessian(copy.deepcopy(model), first, data=batches[0], cuda=False).trace()
    assert len(theirs) == 2
    found = on_cpu(model, first, data=batches[0])
    assert len(found.trace(tol=1e-9)) == 100
    assert found.last_trace.low <= -300 <= found.last_trace.high


class Quadratic(nn.Module):
    """L = theta . (values * theta) / 2, whose Hessian is diag(values)."""

    def __init__(self, values):
        super().__init__()
        self.register_buffer("values", values)
        self.theta = nn.Parameter(torch.full((len(values),), 0.1))

    def forward(self, _):
        return (self.theta * self.values * self.theta).sum() / 2


def first(outputs, _):
    return outputs


def test_two_eigenvalues_of_opposite_signs_are_both_found():
    """Power iteration settles between them."""
    pyhessian = pytest.importorskip("pyhessian")
    values = torch.cat([torch.tensor([5.0, -5.0]), torch.linspace(-0.1, 0.1, 200)])
    batch = (torch.zeros(1), torch.zeros(1))
    torch.manual_seed(1)
    between, _ = pyhessian.hessian(Quadratic(values), first, data=batch, cuda=False).eigenvalues()
    assert abs(between[0]) < 4.9
    found, _ = on_cpu(Quadratic(values), first, data=batch).eigenvalues(top_n=2)
    np.testing.assert_allclose(sorted(found), [-5, 5], rtol=1e-5)


def test_density_has_the_shapes_of_pyhessian_and_matches_it():
    pyhessian = pytest.importorskip("pyhessian")
    model, batches = classifier()
    torch.manual_seed(0)
    with pyhessians_torch():
        theirs = pyhessian.hessian(copy.deepcopy(model), nn.CrossEntropyLoss(), data=batches[0], cuda=False)
        wanted = theirs.density(iter=15, n_v=3)
    found = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0])
    got = found.density(iter=15, n_v=3)
    for ours, others in zip(got, wanted, strict=True):
        assert type(ours) is type(others) is list
        assert [len(row) for row in ours] == [len(row) for row in others] == [15] * 3
        assert all(isinstance(number, np.floating) for number in (ours[0][0], others[0][0]))
    nodes, weights = map(np.array, got)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert (np.diff(nodes, axis=1) >= 0).all()
    # the ends are converged after 15 steps, whatever the random vectors
    assert nodes.max() == pytest.approx(np.max(wanted[0]), rel=1e-3)
    assert nodes.min() == pytest.approx(np.min(wanted[0]), rel=0.05)
    truth = np.linalg.eigvalsh(dense(model, batches).numpy())
    rms = found.last_density.rms()
    assert rms.low <= np.sqrt((truth**2).mean()) <= rms.high


def pyhessians_torch():
    """torch.eig as PyHessian 0.1 knows it."""
    from spectra.integrations.crosscheck import _torch_eig

    return _torch_eig()


def test_a_density_of_more_steps_than_parameters_keeps_its_shape():
    model, batches = tiny_models.mlp(dtype=torch.float32), classifier()[1]
    nodes, weights = map(np.array, on_cpu(model, nn.CrossEntropyLoss(), data=batches[0]).density(iter=60, n_v=2))
    assert nodes.shape == weights.shape == (2, 60)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    truth = np.linalg.eigvalsh(dense(model, batches).numpy())
    np.testing.assert_allclose(nodes[0, : len(truth)], truth, atol=1e-5)


@pytest.mark.parametrize("rows", [(30, 30), (40, 4, 11)])
def test_a_loader_is_the_mean_over_all_targets(rows):
    model, batches = classifier(rows)
    found = on_cpu(model, nn.CrossEntropyLoss(), dataloader=batches)
    assert found.full_dataset
    v = [torch.randn_like(p) for p in model.parameters()]
    form, product = found.dataloader_hv_product(v)
    want = dense(model, batches) @ flat(v).double()
    assert (flat(product).double() - want).norm() < 1e-4 * want.norm()
    assert form == pytest.approx(float(want @ flat(v).double()), rel=1e-3, abs=1e-4)


def test_a_loader_with_ignored_targets_is_weighted_by_those_that_count():
    """Where PyHessian counts rows."""
    pyhessian = pytest.importorskip("pyhessian")
    model, ((inputs, targets), second) = classifier((30, 30))
    targets = torch.where(torch.arange(30) < 27, -100, targets)
    batches = [(inputs, targets), second]
    want = dense(model, [(inputs[27:], targets[27:]), second])
    v = [torch.randn_like(p) for p in model.parameters()]
    _, ours = on_cpu(model, nn.CrossEntropyLoss(), dataloader=batches).dataloader_hv_product(v)
    theirs = pyhessian.hessian(copy.deepcopy(model), nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
    _, others = theirs.dataloader_hv_product(v)
    truth = want @ flat(v).double()
    errors = [float((flat(product).double() - truth).norm() / truth.norm()) for product in (ours, others)]
    assert errors[0] < 1e-4
    assert errors[1] > 0.2


def test_a_shuffling_loader_is_read_once():
    model, ((inputs, targets),) = classifier((30,))
    dataset = torch.utils.data.TensorDataset(inputs, targets)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True)
    found = on_cpu(model, nn.CrossEntropyLoss(), dataloader=loader)
    v = [torch.randn_like(p) for p in model.parameters()]
    (one, product), (other, again) = found.dataloader_hv_product(v), found.dataloader_hv_product(v)
    assert one == other
    assert torch.equal(flat(product), flat(again))


def test_the_model_is_left_as_it_was():
    model, batches = vision_model(), images()
    model(batches[0][0])  # running statistics
    before = copy.deepcopy(model.state_dict())
    states = random_state()
    found = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0])
    assert same_random_state(random_state(), states)
    found.eigenvalues()
    found.trace(maxIter=10)
    found.density(iter=10)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gradient = flat(found.gradsH)
    assert gradient.norm() > 1e-3
    assert not gradient.requires_grad


def test_a_second_object_on_the_same_model_measures_the_same():
    """PyHessian's adds its gradient to the one that the first left, and multiplies by twice the Hessian."""
    pyhessian = pytest.importorskip("pyhessian")
    model, batches = classifier()
    other = copy.deepcopy(model)
    truth = max(np.linalg.eigvalsh(dense(model, batches).numpy()), key=abs)
    theirs = [pyhessian.hessian(other, nn.CrossEntropyLoss(), data=batches[0], cuda=False) for _ in range(2)]
    assert theirs[1].eigenvalues(tol=1e-6, maxIter=400)[0][0] == pytest.approx(2 * truth, rel=1e-3)
    ours = [on_cpu(model, nn.CrossEntropyLoss(), data=batches[0]) for _ in range(2)]
    for found in ours:
        assert found.eigenvalues(tol=1e-4)[0][0] == pytest.approx(truth, rel=1e-5)
    for parameter in other.parameters():
        parameter.grad = None  # PyHessian leaves a cycle with the graph


def test_random_vectors_follow_torchs_seed_and_differ_from_call_to_call():
    model, batches = classifier()
    found = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0])
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append((found.trace(maxIter=5), found.trace(maxIter=5)))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-4)
    assert abs(np.subtract(*runs[0])).max() > 0.1


@pytest.mark.parametrize("in_place", [True, False])
def test_changed_weights_are_measured_anew(in_place):
    """Where PyHessian raises an error of autograd, or with `.data` goes on with the weights before."""
    model, batches = classifier()
    found = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0])
    found.eigenvalues()
    with torch.no_grad():
        for parameter in model.parameters():
            if in_place:
                parameter.mul_(0.5)
            else:
                parameter.data = parameter.data * 0.5
    (value,), _ = found.eigenvalues(tol=1e-4)
    assert value == pytest.approx(max(np.linalg.eigvalsh(dense(model, batches).numpy()), key=abs), rel=1e-5)


def test_frozen_parameters_are_left_out():
    model, batches = classifier()
    model[0].requires_grad_(False)
    found = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0])
    assert [p.shape for p in found.params] == [(3, 40), (3,)]
    assert [part.shape for part in found.eigenvalues()[1][0]] == [(3, 40), (3,)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_measures_on_the_cpu_and_says_so():
    model, batches = classifier()
    with pytest.warns(UserWarning, match="no GPU here: the model is measured on the cpu"):
        found = hessian(model, nn.CrossEntropyLoss(), data=batches[0])
    assert found.device == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian(model, nn.CrossEntropyLoss(), data=batches[0], cuda=False)


def test_a_model_elsewhere_than_cuda_says_is_measured_where_it_is(monkeypatch):
    model, batches = classifier()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with pytest.warns(UserWarning, match=r"the model is on the cpu: it is measured there; call model\.cuda\(\) first"):
        hessian(model, nn.CrossEntropyLoss(), data=batches[0])


def test_bad_arguments_are_refused_in_a_line():
    model, batches = classifier()
    for options, words in (({}, "got neither"), ({"data": batches[0], "dataloader": batches}, "got both")):
        with pytest.raises(InputError, match=words):
            on_cpu(model, nn.CrossEntropyLoss(), **options)
    for data in (torch.utils.data.DataLoader([1]), {"inputs": batches[0][0], "labels": batches[0][1]}):
        with pytest.raises(InputError, match=r"data= is one batch.* give a loader as dataloader="):
            on_cpu(model, nn.CrossEntropyLoss(), data=data)
    with pytest.raises(InputError, match="criterion must be a function"):
        on_cpu(model, None, data=batches[0])
    found = on_cpu(model, nn.CrossEntropyLoss(), data=batches[0])
    for call, words in (
        (lambda: found.eigenvalues(top_n=0), "top_n must be at least 1, got 0"),
        (lambda: found.eigenvalues(maxIter=0), "maxIter"),
        (lambda: found.trace(maxIter=0), "maxIter"),
        (lambda: found.density(iter=0), "iter"),
        (lambda: found.density(n_v=0), "n_v"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    with pytest.raises(InputError, match="two lists of n_v lists"):
        get_esd_plot([[1.0, 2.0]], [[1.0]])


def test_the_cells_of_pyhessians_tutorial_run():
    """Hessian_Tutorial.ipynb of PyHessian's repository, its calls in its order, on another model and other images."""
    from matplotlib import pyplot as plt

    model = vision_model()
    model.eval()
    criterion = torch.nn.CrossEntropyLoss()
    ((inputs, targets),) = images()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no GPU
        hessian_comp = hessian(model, criterion, data=(inputs, targets), cuda=True)
    top_eigenvalues, top_eigenvector = hessian_comp.eigenvalues()
    printed = "The top Hessian eigenvalue of this model is %.4f" % top_eigenvalues[-1]  # noqa: UP031
    top_eigenvalues, top_eigenvector = hessian_comp.eigenvalues(top_n=2)
    assert abs(top_eigenvalues[-1]) <= abs(top_eigenvalues[-2])
    assert printed.endswith("%.4f" % top_eigenvalues[0])  # noqa: UP031
    top_eigenvalues, top_eigenvector = hessian_comp.eigenvalues()

    def get_params(model_orig, model_perb, direction, alpha):
        for m_orig, m_perb, d in zip(model_orig.parameters(), model_perb.parameters(), direction, strict=True):
            m_perb.data = m_orig.data + alpha * d
        return model_perb

    def losses(direction, lams):
        model_perb = copy.deepcopy(model).eval()
        return [criterion(get_params(model, model_perb, direction, lam)(inputs), targets).item() for lam in lams]

    lams = np.linspace(-0.5, 0.5, 21).astype(np.float32)
    along = losses(top_eigenvector[0], lams)
    plt.plot(lams, along)
    across = losses(normalization([torch.randn_like(p) for p in model.parameters()]), lams)
    plt.plot(lams, across)

    def bend(values):
        return values[0] + values[-1] - 2 * values[10]

    assert bend(along) > 3 * abs(bend(across))
    small = losses(top_eigenvector[0], [-0.05, 0, 0.05])
    assert (small[0] + small[2] - 2 * small[1]) / 0.05**2 == pytest.approx(top_eigenvalues[0], rel=0.05)

    trace = hessian_comp.trace()
    assert len(trace) == 100
    assert np.isfinite(np.mean(trace))
    density_eigen, density_weight = hessian_comp.density()
    axes = get_esd_plot(density_eigen, density_weight)
    (line,) = axes.get_lines()
    grid, height = line.get_data()
    assert axes.get_yscale() == "log"
    assert np.trapezoid(height, grid) == pytest.approx(1, abs=0.02)
    assert grid[0] <= np.min(density_eigen)
    assert grid[-1] >= np.max(density_eigen)
    plt.close("all")


def test_normalization_scales_all_tensors_together():
    parts = normalization([torch.full((2, 2), 3.0), torch.full((1,), 8.0)])
    torch.testing.assert_close(parts[0], torch.full((2, 2), 0.3))
    torch.testing.assert_close(parts[1], torch.full((1,), 0.8))
    assert torch.equal(normalization([torch.zeros(2)])[0], torch.zeros(2))
