"""A fault at every stage of a measurement: the training does not notice, and the folder stays readable."""

import copy
import os
import random
import warnings

import numpy as np
import pytest
import torch
from oracles import random_state, same_random_state
from torch import nn
from torch.nn import functional

import spectra
from spectra.runs import folder, jsonlines, probe
from spectra.runs.folder import Run
from spectra.runs.series import series

STEPS, FAULTY = 6, 2
QUICK = {"probes": 1, "steps": 3, "deflate": 0, "count_products": 0}
CHECKED_ONCE = ("checks", "preflight")  # stages of the first measurement of a run alone
FULL_DISK = OSError(28, "No space left on device")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
NO_DERIVATIVE = RuntimeError("derivative for aten::_ctc_loss_backward is not implemented")


class Network(nn.Module):
    """Draws from three generators, and has buffers and an embedding that writes to its weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4, max_norm=1.0)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, tokens):
        scale = 1 + 0.1 * random.random() + 0.1 * np.random.rand() if self.training else 1.0  # noqa: NPY002
        return self.layers(scale * self.embedding(tokens))


def batch():
    g = torch.Generator().manual_seed(2)
    return torch.randint(0, 5, (7,), generator=g), torch.randint(0, 3, (7,), generator=g)


def train(make_probe=None, around=None):
    """A training that draws its data from the global generators; returns all that it leaves, and its probe."""
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    watching = make_probe(model) if make_probe else None
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    for i in range(STEPS):
        if watching is not None:
            around(watching, model, i)
        tokens, targets = torch.randint(0, 5, (8,)), torch.randint(0, 3, (8,))
        optimizer.zero_grad()
        functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    tensors += [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    flags = [module.training for module in model.modules()]
    return [torch.as_tensor(tensor).clone() for tensor in tensors], flags, random_state(), watching


@pytest.fixture(scope="module")
def unwatched():
    return train()


def same(one, other):
    tensors = all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    return tensors and one[1] == other[1] and same_random_state(one[2], other[2])


def disturb_and_raise(error):
    """What a function may do before it fails."""

    def fail(*given, **options):
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(3)
        raise copy.copy(error)

    return fail


def in_operator(name):
    return lambda patch, error: patch.setattr(spectra.HessianOperator, name, disturb_and_raise(error))


def in_probe(name):
    return lambda patch, error: patch.setattr(probe, name, disturb_and_raise(error))


def in_products(patch, error):
    """At the tenth product and later."""
    original, calls = spectra.HessianOperator._multiply_rows, []

    def multiply(op, vectors):
        calls.append(len(vectors))
        return disturb_and_raise(error)() if sum(calls) >= 10 else original(op, vectors)

    patch.setattr(spectra.HessianOperator, "_multiply_rows", multiply)


def in_forward_pass(patch, error):
    """In the middle of the network, in evaluation mode."""
    original = nn.Tanh.forward
    patch.setattr(nn.Tanh, "forward", lambda m, x: original(m, x) if m.training else disturb_and_raise(error)(m, x))


def in_loss(patch, error):
    patch.setattr(functional, "cross_entropy", disturb_and_raise(error))
    patch.setattr(nn.CrossEntropyLoss, "forward", disturb_and_raise(error))


def in_folder(name):
    return lambda patch, error: patch.setattr(folder, name, disturb_and_raise(error))


def in_os(name):
    return lambda patch, error: patch.setattr(os, name, disturb_and_raise(error))


def in_append(patch, error):
    patch.setattr(jsonlines.JsonLines, "append", disturb_and_raise(error))


STAGES = {
    "fingerprint": in_probe("fingerprint_of_weights"),
    "construction": in_operator("__init__"),
    "graphs": in_operator("_prepare"),
    "checks": in_operator("_verify"),
    "preflight": in_operator("preflight"),
    "loss": in_operator("loss"),
    "gradient": in_operator("gradient"),
    "basis": in_probe("choose_reorthogonalization"),
    "memory": in_probe("max_vectors_in_memory"),
    "deflation": in_probe("largest_eigenpairs"),
    "products": in_products,
    "count": in_probe("count_below"),
    "quadrature": in_probe("slq"),
    "release": in_operator("close"),
    "estimates": in_probe("summarize"),
    "record": in_probe("device_name"),
    "forward pass": in_forward_pass,
    "loss function": in_loss,
    "matrices": in_folder("save"),
    "matrices on the disk": in_os("fsync"),
    "rename": in_os("replace"),
    "line": in_append,
    "write": in_os("write"),
}
ERRORS = [FULL_DISK, MemoryError(), OUT_OF_MEMORY, NO_DERIVATIVE, spectra.InputError("expected this, got that: do it")]
CASES = [(stage, ERRORS[i % len(ERRORS)]) for i, stage in enumerate(STAGES)]
CASES += [(stage, ERRORS[(i + 2) % len(ERRORS)]) for i, stage in enumerate(STAGES)]


@pytest.mark.parametrize(
    ("stage", "error"), CASES, ids=lambda value: value if isinstance(value, str) else type(value).__name__
)
def test_a_fault_leaves_the_training_and_the_folder_whole(stage, error, unwatched, tmp_path):
    faulty = 0 if stage in CHECKED_ONCE else FAULTY

    def watch(watching, model, i):
        with pytest.MonkeyPatch.context() as patch:
            if i == faulty:
                STAGES[stage](patch, error)
            watching.step(i)

    def make(model):
        options = {"probes": 1, "steps": 4, "deflate": None if stage == "memory" else 2}
        options["count_products"] = 200 if stage == "count" else 0
        return spectra.SpectrumProbe(model, [batch()], every=2, out=tmp_path / "run", **options)

    with pytest.warns(UserWarning, match=rf"no spectrum at training step {faulty} \(full\): ") as warned:
        watched = train(make, watch)
    assert same(unwatched, watched)
    assert len([w for w in warned if "no spectrum" in str(w.message)]) == 1
    records = watched[3].records
    assert [(r.step, r.status) for r in records] == [(i, "failed" if i == faulty else "ok") for i in (0, 2, 4)]
    failed = records[faulty // 2]
    assert failed.estimates == {}
    assert failed.reason
    assert "\n" not in failed.reason + failed.remedy
    assert failed.remedy or ": " in failed.reason  # an InputError says what to do in its message
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no torn line
        written = Run(tmp_path / "run").records
    assert [r.step for r in written if r.is_measured] == [i for i in (0, 2, 4) if i != faulty]
    cannot_be_written = stage in ("matrices on the disk", "line", "write")
    assert [r.step for r in written if not r.is_measured] == ([] if cannot_be_written else [faulty])
    for record in Run(tmp_path / "run").measured:
        watched[3].run.density(record)
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert series(Run(tmp_path / "run"), "rms").points[-1].step == 4


@pytest.mark.parametrize("stage", ["loss", "products", "line"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__)
def test_an_interrupt_passes_and_everything_is_put_back(stage, error, unwatched, tmp_path):
    def watch(watching, model, i):
        with pytest.MonkeyPatch.context() as patch:
            if i == FAULTY:
                STAGES[stage](patch, error)
                with pytest.raises(type(error)):
                    watching.step(i)
            else:
                watching.step(i)

    options = {"every": 2, "out": tmp_path / "run", "probes": 1, "steps": 4, "deflate": 2, "count_products": 0}
    watched = train(lambda model: spectra.SpectrumProbe(model, [batch()], **options), watch)
    assert same(unwatched, watched)
    assert [(r.step, r.status) for r in Run(tmp_path / "run").records] == [(0, "ok"), (4, "ok")]


@pytest.mark.parametrize("stage", ["construction", "loss", "products", "line"])
def test_strict_raises_and_puts_back(stage, unwatched, tmp_path):
    def watch(watching, model, i):
        with pytest.MonkeyPatch.context() as patch:
            if i == FAULTY:
                STAGES[stage](patch, NO_DERIVATIVE)
                with pytest.raises(RuntimeError, match="not implemented"):
                    watching.step(i)
            else:
                watching.step(i)

    options = {"probes": 1, "steps": 4, "deflate": 2, "count_products": 0, "strict": True}
    options |= {"every": 2, "out": tmp_path / "run"}
    watched = train(lambda model: spectra.SpectrumProbe(model, [batch()], **options), watch)
    assert same(unwatched, watched)
    assert [r.step for r in Run(tmp_path / "run").records] == [0, 4]


def bad_extras(model):
    """Draws, trains, switches, and then fails."""
    random.random()
    np.random.rand()  # noqa: NPY002
    model.train()
    functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(2)
    model.eval()
    raise KeyError("no such number")


@pytest.mark.parametrize("fails", [True, False])
def test_extras_may_do_what_they_want(fails, unwatched):
    def extras(model):
        try:
            return bad_extras(model)
        except KeyError:
            if fails:
                raise
            return {"noise": torch.rand(()).item()}

    def make(model):
        return spectra.SpectrumProbe(model, [batch()], every=2, **QUICK, extras=extras)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        watched = train(make, lambda watching, model, i: watching.step(i))
    assert same(unwatched, watched)
    records = watched[3].records
    assert [r.is_measured for r in records] == [not fails] * 3
    if fails:
        assert records[0].reason == "extras= KeyError: 'no such number'"
        assert sum("extras=" in str(w.message) for w in warned) == 1  # one reason, one warning
    else:
        assert all("noise" in r.extras for r in records)


def test_nan_weights_a_batch_that_vanished_and_a_bad_progress_callback_are_recorded(tmp_path):
    torch.manual_seed(0)
    model = Network()

    def fail(done, total):
        raise ZeroDivisionError

    watching = spectra.SpectrumProbe(model, [batch()], out=tmp_path / "run", **QUICK)
    kept = model.layers[0].weight[0, 0].item()
    for step, begin, end in [
        (
            0,
            lambda: model.layers[0].weight.data[0, 0].fill_(torch.nan),
            lambda: model.layers[0].weight.data[0, 0].fill_(kept),
        ),
        (1, watching.batches.clear, lambda: watching.batches.append(batch())),
        (2, lambda: setattr(watching, "progress", fail), lambda: setattr(watching, "progress", None)),
    ]:
        begin()
        with pytest.warns(UserWarning, match=f"no spectrum at training step {step}"):
            (record,) = watching.measure(step)
        assert record.status == "failed"
        end()
        assert watching.measure(step)[0].is_measured
    reasons = [r.reason for r in Run(tmp_path / "run").records if not r.is_measured]
    assert "nan" in reasons[0].lower()
    assert "at least one batch" in reasons[1]
    assert reasons[2] == "ZeroDivisionError"


def test_a_training_under_warnings_as_errors_goes_on(tmp_path):
    model = Network()
    watching = spectra.SpectrumProbe(model, [batch()], **QUICK)
    with torch.no_grad():
        model.layers[0].weight.fill_(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watching.step(0)[0].status == "failed"


def test_memory_of_a_failed_measurement_is_given_back(monkeypatch):
    """Nothing keeps the tensors that the error's traceback held."""
    import gc
    import weakref

    held = []

    def fail(*given, **options):
        tensor = torch.zeros(1000)
        held.append(weakref.ref(tensor))
        raise OUT_OF_MEMORY.__class__("out of memory")

    monkeypatch.setattr(probe, "slq", fail)
    model = Network()
    watching = spectra.SpectrumProbe(model, [batch()], **QUICK)
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="microbatch="):
            watching.measure(0)
        assert held[0]() is None
    finally:
        gc.enable()


def counted(patch, at, error):
    """Fail at the `at`-th operation that changes the disk from now on; returns the list that counts them."""
    calls = []

    def counting(original):
        def call(*given, **options):
            calls.append(original)
            if len(calls) == at:
                raise copy.copy(error)
            return original(*given, **options)

        return call

    for name in ("open", "write", "fsync", "replace", "ftruncate"):
        patch.setattr(os, name, counting(getattr(os, name)))
    return calls


NO_PERMISSION = PermissionError(13, "Permission denied")


@pytest.mark.parametrize("error", [FULL_DISK, NO_PERMISSION, KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("at", range(1, 9))
def test_a_fault_at_each_write_of_a_record_loses_no_other(at, error, tmp_path):
    """Before the first write, between any two, and after the last."""
    torch.manual_seed(0)
    model = Network()
    watching = spectra.SpectrumProbe(model, [batch()], out=tmp_path / "run", **QUICK)
    watching.measure(0)
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    kept, states = copy.deepcopy(model.state_dict()), random_state()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = counted(patch, at, error)
        try:
            watching.measure(1)
        except KeyboardInterrupt:
            assert isinstance(error, KeyboardInterrupt)
    assert len(calls) >= min(at, 7)  # an undisturbed record takes 7 of them
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert same_random_state(states, random_state())
    watching.measure(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no torn line
        run = Run(tmp_path / "run")
        steps = [record.step for record in run.measured]
    assert steps in ([0, 2], [0, 1, 2])
    assert (tmp_path / "run" / "records.jsonl").read_bytes().startswith(before)
    for record in run.measured:
        run.density(record)
    assert not list((tmp_path / "run").rglob("*.partial"))


def damaged(folder, what):
    """Damage one file of a run, as a disk or an editor may."""
    matrices = sorted((folder / "lanczos").iterdir())[-1]
    lines = (folder / "records.jsonl").read_bytes()
    {
        "torn config": lambda: (folder / "config.json").write_bytes(b'{"schema_version": 3, "mod'),
        "config of another kind": lambda: (folder / "config.json").write_text("[]"),
        "config that is no text": lambda: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
        "torn record": lambda: (folder / "records.jsonl").write_bytes(lines[:-40]),
        "record of zeros": lambda: (folder / "records.jsonl").write_bytes(lines + bytes(64) + b"\n"),
        "record of another kind": lambda: (folder / "records.jsonl").write_bytes(lines + b'{"step": "x"}\n'),
        "torn matrices": lambda: matrices.write_bytes(matrices.read_bytes()[:50]),
        "empty matrices": lambda: matrices.write_bytes(b""),
        "missing matrices": matrices.unlink,
        "torn telemetry": lambda: (folder / "telemetry.jsonl").write_bytes(b'{"step": 1}\n{"st'),
    }[what]()


DAMAGE = [
    *("torn config", "config of another kind", "config that is no text", "torn record", "record of zeros"),
    *("record of another kind", "torn matrices", "empty matrices", "missing matrices", "torn telemetry"),
]


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_read_or_refused_in_one_line_and_never_changed(what, tmp_path):
    torch.manual_seed(0)
    watching = spectra.SpectrumProbe(Network(), [batch()], out=tmp_path / "run", **QUICK)
    watching.measure(0)
    watching.measure(1)
    watching.close()
    damaged(tmp_path / "run", what)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        run = Run(tmp_path / "run")
        for read in (
            lambda: run.config,
            lambda: run.telemetry,
            lambda: [run.density(record) for record in run.records],
            lambda: Run.open_or_create(tmp_path / "run", {"other": 1}),
        ):
            try:
                read()
            except spectra.InputError as error:
                assert "\n" not in str(error)  # noqa: PT017
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_lock_that_was_lost_is_a_failed_measurement(tmp_path):
    watching = spectra.SpectrumProbe(Network(), [batch()], out=tmp_path / "run", **QUICK)
    watching.measure(0)
    other = Run.open_or_create(tmp_path / "run", watching.run.config)
    with pytest.warns(UserWarning, match="was opened again and is written there"):
        (record,) = watching.measure(1)
    assert record.status == "failed"
    assert [record.step for record in other.records] == [0]


def test_a_figure_that_cannot_be_saved_leaves_the_run(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from spectra.views import page

    watching = spectra.SpectrumProbe(Network(), [batch()], out=tmp_path / "run", **QUICK)
    watching.measure(0)
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", disturb_and_raise(FULL_DISK))
        with pytest.raises(OSError, match="No space"):
            page.write(watching.run)
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before
    assert page.write(watching.run).is_file()
