"""A probe restores loaders and the objects that a loss function holds, and repeats checks when they are due."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import spectra

OPTIONS = {"every": 2, "probes": 1, "steps": 3, "deflate": 0}


class Counting(Dataset):
    """Rows that depend on how often they were read."""

    def __init__(self):
        self.calls, self.reads = 0, np.zeros(12)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        self.calls += 1
        self.reads[i] += 1
        return torch.full((4,), float(i)) + self.calls + self.reads[i] + torch.randn(4), i % 3


class Epochs(Sampler):
    """Another order in every epoch, from a state of its own."""

    def __init__(self):
        self.epoch, self.order = 0, np.arange(12)

    def __len__(self):
        return 12

    def __iter__(self):
        self.epoch += 1
        np.random.default_rng(self.epoch).shuffle(self.order)
        return iter(self.order.tolist())


LOADERS = {
    "data set": {"shuffle": True},
    "sampler": {"sampler": Epochs},
    "workers": {"shuffle": True, "num_workers": 1, "persistent_workers": True},
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_yields_what_it_would_have(kind):
    seen = []
    for watched in (False, True):
        options = {name: value() if value is Epochs else value for name, value in LOADERS[kind].items()}
        loader = DataLoader(Counting(), batch_size=4, **options)
        model = nn.Linear(4, 3)
        torch.manual_seed(5)
        if watched:
            spectra.SpectrumProbe(model, loader, **OPTIONS)
        seen.append(torch.cat([x for _ in range(2) for x, _ in loader]))
    assert torch.equal(*seen)


def test_a_loader_of_data_that_can_be_read_once_is_refused():
    class Once(IterableDataset):
        def __init__(self):
            self.rows = iter([(torch.ones(4), 1)] * 8)

        def __iter__(self):
            return self.rows

    data = Once()
    with pytest.raises(spectra.InputError, match="read only once"):
        spectra.SpectrumProbe(nn.Linear(4, 3), DataLoader(data, batch_size=4), **OPTIONS)
    assert len(list(data)) == 8


discriminator = nn.Sequential(
    nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)),
    nn.BatchNorm1d(6),
    nn.Dropout(0.3),
    nn.Tanh(),
    nn.Linear(6, 1),
)


def adversarial(model, batch):
    return functional.softplus(-discriminator(model(batch["z"]))).mean()


def test_the_discriminator_of_a_loss_is_put_back_and_measured_in_evaluation_mode():
    torch.manual_seed(0)
    model, z = nn.Linear(4, 4), torch.randn(8, 4)
    before = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    (record,) = spectra.SpectrumProbe(model, [{"z": z}], loss=adversarial, **OPTIONS).measure(0)
    assert record.is_measured, record.reason
    assert all(torch.equal(before[name], tensor) for name, tensor in discriminator.state_dict().items())
    assert all(module.training for module in discriminator.modules())
    with torch.no_grad():
        discriminator.eval()
        assert record.loss == pytest.approx(float(adversarial(model, {"z": z})), rel=1e-5)


class Wrong(torch.autograd.Function):
    """A sine whose derivative is not seen to depend on its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.x.cos()


class WrongLayer(nn.Module):
    def forward(self, x):
        return Wrong.apply(x)


@pytest.mark.parametrize("change", ["unfrozen", "swapped"])
def test_checks_are_made_again_for_what_is_measured_anew(change):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), WrongLayer() if change == "unfrozen" else nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(change == "swapped")
    probe = spectra.SpectrumProbe(model, [(torch.randn(9, 4), torch.arange(9) % 3)], **OPTIONS)
    assert probe.measure(0)[0].is_measured
    if change == "unfrozen":
        model.requires_grad_(True)
    else:
        model[1] = WrongLayer()
    with pytest.warns(UserWarning, match="Hessian products of this model are wrong"):
        assert not probe.measure(1)[0].is_measured


def test_a_step_inside_inference_mode():
    probe = spectra.SpectrumProbe(nn.Linear(4, 3), [(torch.randn(9, 4), torch.arange(9) % 3)], **OPTIONS)
    with torch.inference_mode():
        (record,) = probe.step(0)
    assert record.is_measured, record.reason


def test_a_predicate_sees_the_names_inside_of_a_wrapper(tmp_path):
    torch.manual_seed(0)
    model = nn.DataParallel(nn.Linear(4, 3))
    batches = [(torch.randn(9, 4), torch.arange(9) % 3)]
    spectra.SpectrumProbe(model, batches, out=tmp_path, params=lambda name, _: name == "weight", **OPTIONS)
    assert spectra.Run(tmp_path).config["params"].startswith("1 chosen")
