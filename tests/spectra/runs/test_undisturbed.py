"""A probe restores loaders and the objects that a loss function holds, and repeats checks when they are due."""

import array
import collections
import threading
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

import spectra

OPTIONS = {"every": 2, "probes": 1, "steps": 3, "deflate": 0, "count_products": 0}


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


# -- what a loss function holds

module_log = []


class CountingLoss:
    """Counts in a container, in a number and on its class, and draws from a generator of its own."""

    total = 0

    def __init__(self, container):
        self.container, self.calls, self.numpy = container, 0, np.random.default_rng(0)

    def __call__(self, outputs, targets):
        self.calls += 1
        type(self).total += 1
        module_log.append(self.calls)
        self.numpy.random()
        value = functional.cross_entropy(outputs, targets)
        add = next(
            getattr(self.container, name) for name in ("append", "add", "update") if hasattr(self.container, name)
        )
        add({self.calls: value.item()} if isinstance(self.container, dict) else value.item())
        return value

    def state(self):
        return list(self.container), self.calls, CountingLoss.total, list(module_log), self.numpy.bit_generator.state


CONTAINERS = {"list": list, "dict": dict, "set": set, "deque": collections.deque, "array": lambda: array.array("d")}


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_a_loss_counts_is_put_back(container):
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3), (torch.randn(9, 4), torch.arange(9) % 3)
    loss = CountingLoss(CONTAINERS[container]())
    loss(model(batch[0]), batch[1])
    before = loss.state()
    with spectra.SpectrumProbe(model, [batch], loss=loss, **OPTIONS) as probe:
        for i in range(3):
            probe.step(i)
    assert [record.is_measured for record in probe.records] == [True, True]
    assert loss.state() == before


def test_a_closure_that_appends_keeps_the_entries_of_the_training_alone():
    torch.manual_seed(0)
    model, seen, calls = nn.Linear(4, 3), [], 0

    def loss(outputs, targets):
        nonlocal calls
        calls += 1
        seen.append(calls)
        return functional.cross_entropy(outputs, targets)

    batch = (torch.randn(9, 4), torch.arange(9) % 3)
    probe = spectra.SpectrumProbe(model, [batch], loss=loss, **OPTIONS)
    for i in range(3):
        loss(model(batch[0]), batch[1])
        probe.step(i)
    assert seen == [1, 2, 3]
    assert calls == 3


class Logging(nn.Module):
    """A layer whose forward pass writes to a global, and draws from an object of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.meter = nn.Linear(4, 3), types.SimpleNamespace(random=np.random.RandomState(0), count=0)

    def forward(self, x):
        self.meter.count += 1
        self.meter.random.rand()
        module_log.append(self.meter.count)
        return self.layer(x)


def test_what_a_forward_pass_counts_is_put_back():
    model = Logging()
    before = list(module_log), model.meter.count, model.meter.random.get_state()[2]
    spectra.SpectrumProbe(model, [(torch.randn(9, 4), torch.arange(9) % 3)], **OPTIONS).step(0)
    assert (list(module_log), model.meter.count, model.meter.random.get_state()[2]) == before


def test_a_loss_that_reads_from_a_loader_is_refused_and_nothing_is_lost():
    others = iter(DataLoader([torch.randn(4) for _ in range(6)], batch_size=2))

    def loss(model, batch):
        return model(batch).square().mean() + model(next(others)).mean()

    probe = spectra.SpectrumProbe(nn.Linear(4, 3), [torch.randn(5, 4)], loss=loss, **OPTIONS)
    with pytest.warns(UserWarning, match="DataLoader's iterator that can be read only once"):
        (record,) = probe.step(0)
    assert not record.is_measured
    assert len(list(others)) == 3


def test_a_loss_that_steps_an_optimizer_is_refused_and_other_threads_are_left_alone():
    critic = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(critic.parameters())
    elsewhere = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    done = []

    def in_another_thread():
        elsewhere.step()
        done.append(1)

    def loss(model, batch):
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        thread.join()
        out = model(batch)
        critic(out.detach()).mean().backward()
        optimizer.step()
        return -critic(out).mean()

    before = critic.weight.detach().clone()
    probe = spectra.SpectrumProbe(nn.Linear(4, 3), [torch.randn(5, 4)], loss=loss, **OPTIONS)
    with pytest.warns(UserWarning, match=r"a step of an optimizer \(Adam\)"):
        assert not probe.step(0)[0].is_measured
    assert torch.equal(critic.weight, before)
    assert critic.weight.grad is None
    assert not optimizer.state
    optimizer.step()


def test_a_quantized_model_is_said_to_be_measured_straight_through():
    qat = pytest.importorskip("qat")
    model, batch = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (torch.randn(9, 4), torch.arange(9) % 3)
    plain = spectra.SpectrumProbe(model, [batch], **OPTIONS).measure(0)
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    chosen = spectra.SpectrumProbe(model, [batch], **OPTIONS).measure(0)
    named = spectra.SpectrumProbe(model, [batch], modes={"ste": spectra.HessianOperator}, **OPTIONS).measure(0)
    assert [record.mode for record in (*plain, *chosen, *named)] == ["full", "ste", "ste"]
    said = [any("straight-through" in note for note in record.notes) for record in (*plain, *chosen, *named)]
    assert said == [False, True, False]
