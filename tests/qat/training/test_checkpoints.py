"""A training that is broken off at any step and goes on from its checkpoint ends with the same bits."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from oracles import generator
from transformers import TrainerCallback

import qat
from qat.study.resume import go_back
from qat.text.corpus import Blocks
from qat.training import checkpoints as module
from qat.training.checkpoints import Checkpoints, last_checkpoint, remove_checkpoints
from qat.training.config import TrainConfig
from qat.training.telemetry import Telemetry
from qat.training.train import train
from spectra.backend.errors import InputError
from spectra.runs.folder import Run

STEPS = 9
FILES = ["weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "telemetry.safetensors"]


class Broken(Exception):
    pass


class Break(TrainerCallback):
    """Breaks the training off at an event of a step."""

    def __init__(self, event, step):
        self.event, self.step, self.seen = event, step, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(state.global_step + 1)
        self._break("begin", state.global_step + 1)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._break("update", state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        self._break("end", state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self._break("save", state.global_step)

    def _break(self, event, step):
        if (event, step) == (self.event, self.step):
            raise Broken


def blocks(count, seed):
    return Blocks(torch.randint(2, tiny_models.VOCABULARY, (count * 8,), generator=generator(seed)), 8)


def run_training(folder, *, every=2, event="", step=0, architecture="opt", bits=2, clock=None, **changes):
    """Train with dropout, weight noise, resets and telemetry; returns the weights and the steps that were done."""
    config = TrainConfig(
        **{"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "schedule": "cosine", "warmup": 0.3} | changes
    )
    resumed = go_back(folder)
    model = tiny_models.causal_lm(architecture, dtype=torch.float32)
    qat.quantize_model(model, qat.QuantConfig(bits=bits))
    telemetry, broken = Telemetry(model), Break(event, step)
    winq = qat.WinQCallback(every=4, alpha=0.5, sigma=1e-3, noise_scales=True)
    options = {} if clock is None else {"clock": clock}
    with Run.open_or_create(folder, {"steps": STEPS}) as run:
        train(
            model,
            blocks(12, 5),
            blocks(3, 6),
            config,
            run=run,
            callbacks=[winq, broken],
            telemetry=telemetry,
            device="cpu",
            checkpoints=Checkpoints(folder, every=every, resumed=resumed, parts={"telemetry": telemetry}, **options),
        )
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, broken.seen


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The end of a training whose telemetry has no line at most of its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    weights, _ = run_training(folder, every=0, telemetry_every=3)
    assert not (folder / "checkpoints").exists()
    return 3, weights, (folder / "telemetry.jsonl").read_bytes()


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """The folder of a training that broke off in its third step, with a checkpoint of the second."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    with pytest.raises(Broken):
        run_training(folder, event="end", step=3)
    return folder


@pytest.fixture
def broken(broken_off, tmp_path):
    return Path(shutil.copytree(broken_off, tmp_path / "run"))


@pytest.mark.parametrize(
    ("event", "step", "first"),
    [("update", 2, 1), ("end", 4, 3), ("save", 4, 5), ("begin", 8, 7), ("end", 9, 9), ("save", 9, None)],
)
def test_a_training_that_breaks_off_goes_on_from_its_checkpoint_to_the_same_bits(
    event, step, first, undisturbed, tmp_path
):
    telemetry_every, weights, lines = undisturbed
    with pytest.raises(Broken):
        run_training(tmp_path, event=event, step=step, telemetry_every=telemetry_every)
    torch.rand(7)
    again, seen = run_training(tmp_path, telemetry_every=telemetry_every)
    assert seen == ([] if first is None else list(range(first, STEPS + 1)))
    assert same(again, weights)
    assert (tmp_path / "telemetry.jsonl").read_bytes() == lines


def test_steps_that_were_recorded_after_the_checkpoint_are_recorded_once(undisturbed, tmp_path):
    telemetry_every, _, lines = undisturbed
    with pytest.raises(Broken):
        run_training(tmp_path, event="end", step=7, every=5, telemetry_every=telemetry_every)
    assert last_checkpoint(tmp_path).step == 5
    assert max(line["step"] for line in Run(tmp_path).telemetry) > 5
    run_training(tmp_path, telemetry_every=telemetry_every)
    assert (tmp_path / "telemetry.jsonl").read_bytes() == lines


def test_two_checkpoints_are_kept_and_the_older_one_serves_where_the_newer_is_damaged(undisturbed, tmp_path):
    with pytest.raises(Broken):
        run_training(tmp_path, event="end", step=7, telemetry_every=undisturbed[0])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["checkpoint-4", "checkpoint-6"]
    with open(tmp_path / "checkpoints" / "checkpoint-6" / "optimizer.pt", "r+b") as file:
        file.truncate(100)
    weights, seen = run_training(tmp_path, telemetry_every=undisturbed[0])
    assert seen[0] == 5
    assert same(weights, undisturbed[1])


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_one_of_its_files_does_not_count(name, broken):
    (broken / "checkpoints" / "checkpoint-2" / name).unlink()
    assert last_checkpoint(broken) is None
    assert go_back(broken) is None
    assert not (broken / "checkpoints").exists()
    assert Run(broken).telemetry == []


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("plain", [True, False], ids=["a pickle", "a torch file"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_checkpoint_of_a_stranger_is_run(name, plain, broken, tmp_path):
    folder, sprung = broken / "checkpoints" / "checkpoint-2", tmp_path / "sprung"
    if plain:
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save({"state": Trap(sprung)}, folder / name)
    complete = json.loads((folder / "complete.json").read_text())
    complete["files"][name] = (folder / name).stat().st_size
    (folder / "complete.json").write_text(json.dumps(complete))
    with pytest.raises(InputError) as refused:
        run_training(broken)
    assert "\n" not in str(refused.value)
    assert "delete" in str(refused.value)
    assert not sprung.exists()


def test_no_pickle_that_is_not_needed_is_written(broken_off):
    found = {path.name for path in (broken_off / "checkpoints" / "checkpoint-2").iterdir()}
    assert found == {
        *("complete.json", "trainer_state.json", "weights.safetensors", "telemetry.safetensors"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth"),
    }


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_full_disk_ends_no_training(error, undisturbed, tmp_path, monkeypatch):
    saved = torch.save

    def fail(what, path, *more, **options):
        if "checkpoint-4" in str(path):
            raise error
        saved(what, path, *more, **options)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.warns(UserWarning, match=r"no checkpoint was written at training step 4 .*--save-every 0"):
        weights, _ = run_training(tmp_path, telemetry_every=undisturbed[0])
    assert same(weights, undisturbed[1])
    assert last_checkpoint(tmp_path).step == STEPS
    assert not (tmp_path / "checkpoints" / "checkpoint-4").exists()


def test_a_kill_before_the_last_file_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    written = module.write_whole

    def killed(path, content):
        if path.parent.name == "checkpoint-4":
            raise Broken
        written(path, content)

    monkeypatch.setattr(module, "write_whole", killed)
    with pytest.raises(Broken):
        run_training(tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint-4" / "optimizer.pt").exists()
    assert last_checkpoint(tmp_path).step == 2
    go_back(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert max(line["step"] for line in Run(tmp_path).telemetry) == 2


def test_a_run_whose_files_are_shorter_than_at_the_checkpoint_starts_again(broken):
    telemetry = broken / "telemetry.jsonl"
    telemetry.write_bytes(b"".join(telemetry.read_bytes().splitlines(keepends=True)[:1]))
    assert last_checkpoint(broken) is None


def test_by_time_saving_takes_a_fiftieth_and_a_short_training_is_not_saved(tmp_path):
    run_training(tmp_path / "short", every=None)
    assert not (tmp_path / "short" / "checkpoints").exists()
    now = [0.0]
    saving = Checkpoints(tmp_path / "long", clock=lambda: now[0])
    state = type("State", (), {"max_steps": 10**6, "global_step": 0})()
    saving.on_train_begin(None, state, None)
    times = []
    (tmp_path / "long").mkdir()
    for step in range(1, 4001):
        now[0] += 1.0  # a training step takes a second
        state.global_step = step
        control = type("Control", (), {"should_save": False})()
        saving.on_step_end(None, state, control)
        if control.should_save:
            times.append(step)
            saving.save(step, lambda: now.__setitem__(0, now[0] + 10.0), main=True)  # and a checkpoint ten
    assert times == [120, *range(620, 4001, 500)]
    assert len(times) * 10.0 <= 0.02 * now[0] + 10.0


def test_removing_leaves_nothing(broken):
    assert last_checkpoint(broken).step == 2
    remove_checkpoints(broken)
    assert not (broken / "checkpoints").exists()
    remove_checkpoints(broken)


def test_tied_and_transposed_weights_are_saved(tmp_path):
    weights, _ = run_training(tmp_path / "whole", architecture="gpt2", bits=4)
    with pytest.raises(Broken):
        run_training(tmp_path / "broken", event="end", step=6, architecture="gpt2", bits=4)
    again, seen = run_training(tmp_path / "broken", architecture="gpt2", bits=4)
    assert seen[0] == 5
    assert same(again, weights)


def test_codes_of_other_layers_are_refused(tmp_path):
    made = {}
    for architecture in ("gpt2", "llama"):
        model = tiny_models.causal_lm(architecture, dtype=torch.float32)
        qat.quantize_model(model, qat.QuantConfig(bits=2))
        made[architecture] = Telemetry(model)
    made["gpt2"].save_state(tmp_path / "codes.safetensors")
    with pytest.raises(InputError, match="the codes of other layers"):
        made["llama"].load_state(tmp_path / "codes.safetensors")
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        made["llama"].load_state(tmp_path / "codes.safetensors")
