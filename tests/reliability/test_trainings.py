"""Situations of a training's life: it ends as it does without a probe, bit for bit, and its run holds what it should.

Weights, log, checkpoints with their optimizer and random states, and the random states at the end are compared.
"""

import copy
import itertools
import json
import queue
import random
import shutil
import threading
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

import spectra

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
OPTIONS = {"every": 2, "probes": 1, "steps": 3, "deflate": 0, "count_products": 0}
TIMES = ("runtime", "per_second")


def rows(count=8, seed=0):
    ids = torch.randint(2, tiny_models.VOCABULARY, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def watch(**options):
    return spectra.SpectrumCallback(**{**OPTIONS, "params": "*mlp*", **options})


def trainer_of(folder, callback, *, kind=transformers.Trainer, data=None, collate=None, model=None, **options):
    transformers.set_seed(3)
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True, "seed": 3, "learning_rate": 1e-2}
    settings |= {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    settings |= {"report_to": [], "disable_tqdm": True, "lr_scheduler_type": "constant"}
    return kind(
        model or tiny_models.causal_lm("gpt2", dtype=torch.float32),
        transformers.TrainingArguments(output_dir=str(folder), **(settings | options)),
        train_dataset=rows() if data is None else data() if callable(data) else data,
        data_collator=collate() if collate else None,
        callbacks=[callback] if callback else [],
    )


def without_times(log):
    """A log without times, and without the entries that hold a spectrum."""
    own = [entry for entry in log if not any(key.startswith("spectra/") for key in entry)]
    return [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in own]


def left_by(folder, trainer):
    """What a training leaves."""
    found = {"weights": trainer.model.state_dict(), "log": without_times(trainer.state.log_history)}
    for path in sorted(folder.glob("checkpoint-*/*")):
        if path.suffix in (".pt", ".pth"):
            found[str(path.relative_to(folder))] = torch.load(path, weights_only=False)
        elif path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            state["log_history"] = without_times(state["log_history"])
            found[str(path.relative_to(folder))] = {**state, "best_model_checkpoint": None}
    return found | {"random": (torch.get_rng_state(), random.getstate(), np.random.get_state())}  # noqa: NPY002


def same(one, other):
    if isinstance(one, torch.Tensor | np.ndarray):
        return bool((torch.as_tensor(one) == torch.as_tensor(other)).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def spectra_of(callback):
    return [record.step if record.is_measured else record.reason for record in callback.probe.records]


# -- Trainers


class OwnSampler(transformers.Trainer):
    """A loader that accelerate has not seen, with a generator of its own."""

    def get_train_dataloader(self):
        shuffled = RandomSampler(self.train_dataset, generator=torch.Generator().manual_seed(9))
        sampler = BatchSampler(shuffled, 2, drop_last=False)
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)


class Bare:
    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        yield from self.loader


class BareLoader(transformers.Trainer):
    def get_train_dataloader(self):
        return Bare(DataLoader(self.train_dataset, batch_size=2, shuffle=True, collate_fn=self.data_collator))


class Evaluating(transformers.Trainer):
    def __init__(self, *args, **options):
        super().__init__(*args, eval_dataset={"a": rows(4, 1), "b": rows(4, 2)}, **options)


class Sharpness(transformers.Trainer):
    def training_step(self, model, *args, **options):
        loss = super().training_step(model, *args, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=1e-3)
        return loss


class Wrapped(transformers.Trainer):
    def compute_loss(self, model, inputs, **_):
        return self.model_wrapped(**inputs).loss + self.model(**inputs).loss


class Counting(transformers.Trainer):
    seen = 0

    def get_batch_samples(self, iterator, count, device):
        batches, _ = super().get_batch_samples(iterator, count, device)
        self.seen += len(batches)
        return batches, None


class Annealed(transformers.Trainer):
    def compute_loss(self, model, inputs, **_):
        weight = self.state.global_step / 3
        self.log({"weight": weight})
        return (1 + weight) * model(**inputs).loss


class Shards(IterableDataset):
    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        yield from rows(24) if worker is None else rows(24)[worker.id :: worker.num_workers]


class Caching(Dataset):
    """Draws each row once."""

    def __init__(self):
        self.drawn = {}

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i not in self.drawn:
            self.drawn[i] = int(torch.randint(0, 9, ()))
        row = rows()[i]
        return {**row, "input_ids": (row["input_ids"] + self.drawn[i]) % tiny_models.VOCABULARY}


class Epochs(Dataset):
    """Shuffles itself at every epoch."""

    def __init__(self):
        self.order = list(range(8))

    def set_epoch(self, epoch):
        random.Random(epoch).shuffle(self.order)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return rows()[self.order[i]]


def streamed():
    datasets = pytest.importorskip("datasets")
    plain = [{key: value.tolist() for key, value in row.items()} for row in rows(24)]
    return datasets.Dataset.from_list(plain).to_iterable_dataset().shuffle(seed=3, buffer_size=6)


def transformed():
    datasets = pytest.importorskip("datasets")
    generator = np.random.default_rng(0)

    def transform(batch):
        shifted = [torch.tensor(row).roll(int(generator.integers(5))) for row in batch["input_ids"]]
        return {"input_ids": shifted, "labels": list(map(torch.tensor, batch["labels"]))}

    plain = [{key: value.tolist() for key, value in row.items()} for row in rows()]
    return datasets.Dataset.from_list(plain).with_transform(transform)


def masking():
    """A collator with a generator that it keeps among its defaults."""

    def collate(features, kept={}):  # noqa: B006, the mistake that people make
        generator = kept.setdefault("generator", torch.Generator().manual_seed(4))
        batch = transformers.default_data_collator(features)
        masked = torch.rand(batch["labels"].shape, generator=generator) < 0.3
        masked[:, 3] = False
        batch["labels"] = batch["labels"].masked_fill(masked, -100)
        return batch

    return collate


EACH_EPOCH = {"max_steps": -1, "num_train_epochs": 2}
TRAINERS = {
    "stock": {},
    "own sampler": {"kind": OwnSampler},
    "loader without a data set": {"kind": BareLoader},
    "workers that stay": {**EACH_EPOCH, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "shards of workers": {"data": Shards, "dataloader_num_workers": 2},
    "stream": {"data": streamed},
    "transform that draws": {"data": transformed},
    "cache": {"data": Caching},
    "epochs of the data set": {"data": Epochs, **EACH_EPOCH},
    "collator that draws": {"collate": masking},
    "evaluation between": {"kind": Evaluating, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    "step of its own": {"kind": Sharpness},
    "wrapped model": {"kind": Wrapped, "bf16": True},
    "counting": {"kind": Counting, "gradient_accumulation_steps": 2},
    "annealing": {"kind": Annealed},
    "tokens seen": {"include_num_input_tokens_seen": "all"},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("situation", TRAINERS)
def test_a_trainer_ends_as_without_the_callback(tmp_path, situation):
    found = []
    for callback in (None, watch()):
        folder = tmp_path / str(callback is None)
        trainer = trainer_of(folder, callback, **TRAINERS[situation])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=r".*(spectrum|spectra)")
            trainer.train()
        found.append(left_by(folder, trainer))
    different = [name for name in found[0] if not same(found[0][name], found[1].get(name))]
    assert not different
    last = trainer.state.max_steps
    assert spectra_of(callback) == [*range(0, last, 2), last]


def test_batches_that_do_not_fit_and_smaller_ones(tmp_path):
    """auto_find_batch_size starts again at step 0 with the weights that it has: the run counts on."""

    class Small(transformers.Trainer):
        def training_step(self, model, inputs, *args, **options):
            if len(inputs["input_ids"]) > 2 and self.state.global_step >= 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return super().training_step(model, inputs, *args, **options)

    found, options = [], {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "save_strategy": "no"}
    for callback in (None, watch()):
        trainer = trainer_of(tmp_path, callback, kind=Small, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        found.append(trainer.model.state_dict())
    assert same(*found)
    assert spectra_of(callback) == [0, 1, 2, 4, 5]
    assert sum("its step 0 is training step" in str(warning.message) for warning in caught) == 2


def test_a_training_that_is_stopped_early(tmp_path):
    found = []
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 5.0, "max_steps": 30}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_a_loss"}
    for callback in (None, watch()):
        trainer = trainer_of(tmp_path / str(callback is None), callback, kind=Evaluating, **options)
        trainer.add_callback(transformers.EarlyStoppingCallback(1))
        trainer.train()
        found.append(trainer.model.state_dict())
    assert same(*found)
    steps = spectra_of(callback)
    assert steps[-1] == trainer.state.global_step < 30
    assert len(steps) == len(set(steps))


def test_a_callback_that_is_added_in_the_training(tmp_path):
    class Adding(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):
            if self.added is not None:
                self.trainer.add_callback(self.added)
                self.added = None

    found = []
    for callback in (None, watch()):
        trainer, adding = trainer_of(tmp_path, None, save_strategy="no"), Adding()
        adding.added, adding.trainer = callback, trainer
        trainer.add_callback(adding)
        trainer.train()
        found.append(left_by(tmp_path, trainer))
    assert same(*found)
    assert [(r.step, r.label) for r in callback.probe.records] == [(1, "start"), (2, ""), (3, "end")]


@pytest.mark.parametrize("kind", [transformers.Trainer, OwnSampler])
def test_a_training_that_is_resumed(tmp_path, kind):
    trainer_of(tmp_path, watch(batch_count=2), kind=kind, max_steps=5).train()
    plain = trainer_of(tmp_path / "plain", None, kind=kind, max_steps=9)
    plain.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    torch.rand(100)
    again = trainer_of(tmp_path, watch(batch_count=2), kind=kind, max_steps=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*(spectrum|spectra)")
        again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert same(plain.model.state_dict(), again.model.state_dict())
    assert [record.step for record in spectra.Run(tmp_path / "spectra").records] == [0, 2, 4, 5, 6, 8, 9]


def test_a_training_that_is_resumed_without_its_run(tmp_path):
    trainer_of(tmp_path, watch()).train()
    shutil.rmtree(tmp_path / "spectra")
    trainer_of(tmp_path, watch(), max_steps=5).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    records = spectra.Run(tmp_path / "spectra").records
    assert [(record.step, record.label) for record in records] == [(2, "start"), (4, ""), (5, "end")]


def test_more_steps_of_the_same_trainer(tmp_path):
    trainer = trainer_of(tmp_path, watch(), save_steps=3)
    trainer.train()
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=True)
    assert [record.step for record in spectra.Run(tmp_path / "spectra").records] == [0, 2, 3, 4, 6]


def test_trials_of_a_search_have_a_run_each(tmp_path):
    def model():
        transformers.set_seed(3)
        return tiny_models.causal_lm("gpt2", dtype=torch.float32)

    trainer = trainer_of(tmp_path, watch())
    trainer.model_init = model
    for number, rate in enumerate((1e-2, 2e-2)):
        trainer.args.learning_rate = rate
        trainer._get_output_dir = lambda trial, number=number: str(tmp_path / f"run-{number}")
        trainer.train()
    runs = [spectra.Run(tmp_path / f"run-{number}" / "spectra").records for number in range(2)]
    assert [[record.step for record in run] for run in runs] == [[0, 2, 3]] * 2
    assert runs[0][0].loss == runs[1][0].loss
    assert runs[0][2].loss != runs[1][2].loss


def test_two_callbacks(tmp_path):
    mlp, whole, again, clash = (
        watch(),
        watch(out=tmp_path / "b", params=None),
        watch(out=tmp_path / "c"),
        watch(probes=2),
    )
    trainer = trainer_of(tmp_path / "a", mlp)
    for callback in (whole, again, clash):
        trainer.add_callback(callback)
    with pytest.warns(UserWarning, match=r"holds a run with other settings \(probes: 1 in the folder, 2 asked for\)"):
        trainer.train()
    assert [spectra_of(callback) for callback in (mlp, whole, again)] == [[0, 2, 3]] * 3
    assert clash.probe is None
    assert len(spectra.Run(tmp_path / "a" / "spectra").records) == 3


# -- loops


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))


def examples():
    return TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3)


BATCHES = list(DataLoader(examples(), batch_size=8))


class Loop:
    """A training of six steps, with a probe or without."""

    def __init__(self, watched):
        torch.manual_seed(7)
        self.watched, self.model, self.probes = watched, network(), []
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)

    def watch(self, batches=BATCHES, **options):
        if self.watched:
            self.probes.append(spectra.SpectrumProbe(self.model, batches, **OPTIONS, **options))

    def run(self, batches, loss, step=None):
        for i, batch in enumerate(itertools.islice(batches, 6)):
            self.optimizer.zero_grad()
            loss(self.model, batch).backward()
            (step or self.optimizer.step)()
            for probe in self.probes:
                probe.step(i)
        for probe in self.probes:
            probe.close()
        return [self.model.state_dict(), self.optimizer.state_dict()]


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def again(loader):
    return itertools.chain.from_iterable(itertools.repeat(loader))


def shuffled(loop, **options):
    loader = DataLoader(examples(), batch_size=8, shuffle=True, **options)
    loop.watch(loader)
    return loop.run(again(loader), cross_entropy)


def in_the_middle_of_an_epoch(loop):
    loader = DataLoader(examples(), batch_size=2, shuffle=True, num_workers=1, persistent_workers=True)

    def batches():
        for i, batch in enumerate(again(loader)):
            if i == 1:
                loop.watch(loader)
            yield batch

    return loop.run(batches(), cross_entropy)


def sharded(loop):
    data = examples()
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    sampler.set_epoch(3)
    loop.watch(loader)
    return loop.run(again(loader), cross_entropy)


def with_accelerate(loop, precision, accumulation):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    own = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
    loader = DataLoader(examples(), batch_size=4, shuffle=True)
    loop.model, loop.optimizer, loader = own.prepare(loop.model, loop.optimizer, loader)
    loop.watch(loader)
    for i, batch in enumerate(itertools.islice(again(loader), 6)):
        with own.accumulate(loop.model):
            loop.optimizer.zero_grad()
            own.backward(cross_entropy(loop.model, batch))
            loop.optimizer.step()
            for probe in loop.probes:
                probe.step(i)
    for probe in loop.probes:
        probe.close()
    return [loop.model.state_dict(), loop.optimizer.state_dict()]


def scaled(loop):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)

    def step():
        for probe in loop.probes:  # between backward and step, with gradients that overflow
            probe.measure(100 + len(probe.records))
        scaler.unscale_(loop.optimizer)
        scaler.step(loop.optimizer)
        scaler.update()

    loop.watch()
    return [*loop.run(again(BATCHES), lambda *given: scaler.scale(cross_entropy(*given)), step), scaler.state_dict()]


def in_autocast(loop):
    loop.watch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loop.run(again(BATCHES), cross_entropy)


def prefetched(loop):
    class Prefetcher:
        def __init__(self):
            self.ready, self.count = queue.Queue(2), []
            self.thread = threading.Thread(target=self.fetch, daemon=True)
            self.thread.start()

        def fetch(self):
            for batch in BATCHES * 2:
                self.ready.put(batch)

        def __iter__(self):
            while True:
                self.count.append(1)
                yield self.ready.get(timeout=60)

    prefetcher = Prefetcher()

    def loss(model, batch):
        return cross_entropy(model, batch) * (1 + 0 * len(prefetcher.count))

    loop.watch(loss=loss)
    return [*loop.run(prefetcher, loss), len(prefetcher.count)]


def averaged(loop):
    average = torch.optim.swa_utils.AveragedModel(loop.model)

    def loss(model, batch):
        with torch.no_grad():
            wanted = average(batch[0]).softmax(-1)
        return functional.cross_entropy(model(batch[0]), wanted)

    def step():
        loop.optimizer.step()
        average.update_parameters(loop.model)

    loop.watch(loss=loss)
    return [*loop.run(again(BATCHES), loss, step), average.state_dict()]


def queued(loop):
    memory, place = torch.randn(30_000, 3, generator=torch.Generator().manual_seed(1)), [0]

    def loss(model, batch):
        outputs = model(batch[0])
        value = (outputs @ memory[-50:].T.clone()).logsumexp(-1).mean()
        memory[place[0] : place[0] + len(outputs)] = outputs.detach()
        place[0] += len(outputs)
        return value

    loop.watch(loss=loss)
    return [*loop.run(again(BATCHES), loss), memory, place]


def several(loop):
    for params in (None, "0.*", "4.*"):
        loop.watch(params=params)
    return loop.run(again(BATCHES), cross_entropy)


LOOPS = {
    "shuffled": shuffled,
    "workers": lambda loop: shuffled(loop, num_workers=1),
    "workers that stay": lambda loop: shuffled(loop, num_workers=1, persistent_workers=True),
    "middle of an epoch": in_the_middle_of_an_epoch,
    "sharded sampler": sharded,
    "accelerate": lambda loop: with_accelerate(loop, "no", 1),
    "accelerate in bfloat16": lambda loop: with_accelerate(loop, "bf16", 2),
    "scaled loss": scaled,
    "autocast": in_autocast,
    "thread": prefetched,
    "averaged weights": averaged,
    "queue": queued,
    "several probes": several,
}


@pytest.mark.parametrize("situation", LOOPS)
def test_a_loop_ends_as_without_a_probe(situation):
    found = []
    for watched in (False, True):
        loop = Loop(watched)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=r".*(spectrum|spectra)")
            left = LOOPS[situation](loop)
        found.append([copy.deepcopy(left), torch.get_rng_state()])
    assert same(*found)
    assert loop.probes
    start = 1 if situation == "middle of an epoch" else 0
    for probe in loop.probes:
        assert all(record.is_measured for record in probe.records)
        steps = [record.step for record in probe.records if record.step < 100]
        assert steps == list(dict.fromkeys([start, 2, 4, 5]))


def test_a_teacher_that_its_loss_moves_is_put_back():
    """The loss is another at every call: refused, with one warning, and the training goes on as it would have."""

    def moving(loop):
        teacher = copy.deepcopy(loop.model).requires_grad_(False)

        def loss(model, batch):
            with torch.no_grad():
                for one, other in zip(teacher.parameters(), model.parameters(), strict=True):
                    one.lerp_(other.detach(), 0.1)
                wanted = teacher(batch[0]).softmax(-1)
            return functional.cross_entropy(model(batch[0]), wanted)

        loop.watch(loss=loss)
        return [*loop.run(again(BATCHES), loss), teacher.state_dict()]

    found = []
    for watched in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(copy.deepcopy(moving(loop := Loop(watched))))
    assert same(*found)
    assert [record.is_measured for record in loop.probes[0].records] == [False] * 4
    assert sum("not a deterministic function" in str(warning.message) for warning in caught) == len(caught) == 1


def test_two_probes_on_one_folder_write_each_step_once(tmp_path):
    loop = Loop(watched=True)
    for _ in range(2):
        loop.watch(out=tmp_path)
    with pytest.warns(UserWarning, match="was opened again and is written there"):
        loop.run(again(BATCHES), cross_entropy)
    assert [record.step for record in spectra.Run(tmp_path).records] == [0, 2, 4, 5]


def test_a_folder_of_another_training_is_kept_and_that_is_said_once(tmp_path):
    for seed in range(2):
        loop = Loop(watched=True)
        torch.manual_seed(seed)
        loop.model[4].reset_parameters()
        loop.watch(out=tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loop.run(again(BATCHES), cross_entropy)
        assert ["measured at other weights" in str(warning.message) for warning in caught] == [True] * seed
        records = spectra.Run(tmp_path).records
        assert [record.step for record in records] == [0, 2, 4, 5]


def test_an_interrupt_and_the_same_command_again(tmp_path):
    class Stop:
        def __init__(self, at):
            self.at = at

        def __call__(self, model, batch):
            self.at -= 1
            if self.at == 0:
                raise KeyboardInterrupt
            return cross_entropy(model, batch)

    for at in (4, 99):
        loop = Loop(watched=True)
        loop.watch(out=tmp_path)
        try:
            with loop.probes[0]:
                loop.run(again(BATCHES), Stop(at))
        except KeyboardInterrupt:
            assert [record.step for record in spectra.Run(tmp_path).records] == [0, 2]
    assert [record.step for record in spectra.Run(tmp_path).records] == [0, 2, 4, 5]
