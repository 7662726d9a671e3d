"""Training speed: quantized against unquantized steps, in one run on one device.

    python benchmarks/training/speed.py [MODEL_FOLDER] [--device cuda] [--out speed.json]
    python benchmarks/training/speed.py --device cpu

On a GPU, every setting is trained by `qat.training.train.train`, as `qat train` does it: bfloat16 autocast over
float32 weights, compiled, random tokens. Its row has the tokens a second of its training steps, and of a whole run of
50 million tokens: with the telemetry, the validation losses and the resets that such a run has. Noise is also compared
with no noise, in turns. Without a folder the model has the shape of SmolLM2-135M and random weights.

On a CPU, eager steps of three models take turns: unquantized, 2 bit, and 2 bit with weight noise.

The table is printed last, and after it one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

import qat
from qat.text.corpus import Blocks
from qat.training.config import TrainConfig
from qat.training.evaluate import evaluate
from qat.training.noise import DrawnNoise
from qat.training.step import TrainingStep, computing_in
from qat.training.telemetry import Telemetry
from qat.training.train import make_optimizer, train
from qat.training.winq import interpolate_
from spectra.backend.errors import InputError

RUN_TOKENS = 50_000_000  # of the run that telemetry, validation and resets are spread over
VALIDATION_SEQUENCES, RESETS = 64, 3
SIGMA = 1e-3
WATCHED = range(4, 8)  # steps, before the timed ones, in which waits for the device are counted
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 4096},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
}
HEADS = {"tiny": (4, 2), "small": (4, 4), "smollm2": (9, 3)}
CPU_CASES = (("small", 4, 16, 128), ("small", 4, 4, 128), ("smollm2", 3, 4, 128))  # shape, layers, sequences, tokens


def model_of(name: str, *, layers: int | None = None) -> nn.Module:
    """The model in a folder, or an untrained Llama of a named shape, in float32."""
    if name not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    heads, groups = HEADS[name]
    shape = SHAPES[name] | ({} if layers is None else {"num_hidden_layers": layers})
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            **shape,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    )


def random_blocks(count: int, length: int, vocabulary: int) -> Blocks:
    """Blocks of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return Blocks(torch.randint(0, vocabulary, (count * length,), generator=generator), length)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """The median time of a call, after one that is not timed."""
    function()
    samples = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


class Clock(TrainerCallback):
    """Takes the time after the warm-up and after the last step, and counts waits for the device in between."""

    def __init__(self, warm_up: int, steps: int, device: str) -> None:
        self.warm_up, self.steps, self.device = warm_up, steps, device
        self.started = self.ended = self.first = 0.0
        self.waits: list[str] = []
        self._caught: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step == 1:
            synchronize(self.device)
            self.first = time.perf_counter() - self.first
        if self.device == "cuda" and step == WATCHED.start:
            self._caught = warnings.catch_warnings(record=True)
            self.waits_raw = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.set_warn_always(True)
            torch.cuda.set_sync_debug_mode("warn")
        if self.device == "cuda" and step == WATCHED.stop:
            torch.cuda.set_sync_debug_mode("default")
            torch.set_warn_always(False)
            self._caught.__exit__(None, None, None)
            self.waits = [
                f"{w.filename}:{w.lineno}" for w in self.waits_raw if "called a synchronizing" in str(w.message)
            ]
        if step in (self.warm_up, self.steps):
            synchronize(self.device)
            self.started, self.ended = self.ended, time.perf_counter()


def trained(model: nn.Module, options: argparse.Namespace, *, winq: bool, quantized: bool) -> dict[str, Any]:
    """Train for the warm-up and the timed steps, and measure what a run does beside its steps."""
    device, steps = options.device, options.warm_up + options.steps
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    blocks = random_blocks(4 * options.batch, options.length, vocabulary)
    validation = random_blocks(VALIDATION_SEQUENCES, options.length, vocabulary)
    config = TrainConfig(
        steps=steps,
        batch_size=options.batch,
        learning_rate=2e-5,
        evaluate_every=steps,
        telemetry_every=steps,
        dtype=options.dtype,
        compile=options.compile,
    )
    clock = Clock(options.warm_up, steps, device)
    callbacks: list[TrainerCallback] = [clock]
    if winq:
        callbacks.append(qat.WinQCallback(every=max(2, options.warm_up - 2), sigma=SIGMA))  # a reset in the warm-up
    torch._dynamo.utils.counters.clear()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    graphs = {}

    class Count(TrainerCallback):  # before train() resets what was compiled
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counters = torch._dynamo.utils.counters
            graphs.update(graphs=counters["stats"]["unique_graphs"], breaks=sum(counters["graph_break"].values()))

    few = random_blocks(options.batch, options.length, vocabulary)
    train(model, blocks, few, config, callbacks=[*callbacks, Count()], device=device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None

    step = (clock.ended - clock.started) / options.steps
    tokens = options.batch * options.length
    run = replace(config, steps=max(1, RUN_TOKENS // tokens), evaluate_every=0, telemetry_every=0)

    def validate() -> None:
        with computing_in(options.dtype, torch.device(device)):
            evaluate(model, validation, batch_size=options.batch)

    validating = seconds_of(validate, device, 2)
    beside = {"validation": validating * len(run.evaluation_steps())}
    if quantized:
        telemetry = Telemetry(model)
        lines = len({*range(0, run.steps, run.telemetry_interval()), *run.evaluation_steps()})
        beside["telemetry"] = seconds_of(telemetry.measure, device) * lines
    drawing = None
    if winq:
        noise = DrawnNoise(noisy(model.train()))
        drawing = seconds_of(noise.draw, device)
        noise.clear()
        beside["resets"] = seconds_of(lambda: interpolate_(model, alpha=0.4), device) * RESETS
    whole = step * run.steps + sum(beside.values())
    return {
        "step_ms": step * 1e3,
        "tokens_per_second": tokens / step,
        "whole_tokens_per_second": tokens * run.steps / whole,
        **{f"{name}_share": seconds / whole for name, seconds in beside.items()},
        "validation_ms": validating * 1e3,
        "drawing_noise_ms": None if drawing is None else drawing * 1e3,
        "first_step_s": clock.first,
        "waits_per_step": len(clock.waits) / len(WATCHED),
        "waits": sorted(set(clock.waits)),
        "peak_gib": peak,
        **graphs,
    }


def torchao_linear(model: nn.Module) -> nn.Module:
    """torchao's fake-quantized linear layers, 4 bit, symmetric, a scale a row, in place of all but the head."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    head = model.get_output_embeddings()  # type: ignore[operator]
    weights = IntxFakeQuantizeConfig(torch.int4, "per_channel", is_symmetric=True)
    chosen = {id(module) for module in model.modules() if type(module) is nn.Linear and module is not head}
    quantize_(
        model, QATConfig(weight_config=weights, step="prepare"), filter_fn=lambda module, name: id(module) in chosen
    )
    return model


def quantized(model: nn.Module, **settings: Any) -> nn.Module:
    qat.quantize_model(model, qat.QuantConfig(**settings))
    return model


def in_turns(models: dict[str, nn.Module], options: argparse.Namespace, *, rounds: int, steps: int) -> dict[str, float]:
    """Seconds a step of several models in a loop without the Trainer; they take turns, and the median counts."""
    device = options.device
    modules, optimizers = {}, {}
    for name, model in models.items():
        model.to(device).train()
        optimizers[name] = make_optimizer(model, TrainConfig(learning_rate=2e-5))
        modules[name] = TrainingStep(model, dtype=options.dtype, compiled=options.compile)
    vocabulary = next(iter(models.values())).get_input_embeddings().num_embeddings  # type: ignore[operator]
    tokens = random_blocks(options.batch, options.length, vocabulary).blocks.to(device)

    def step(name: str) -> None:
        modules[name](input_ids=tokens, labels=tokens).backward()
        nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()

    samples: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name in models:
            synchronize(device)
            started = time.perf_counter()
            for _ in range(steps):
                step(name)
            synchronize(device)
            if turn:
                samples[name].append((time.perf_counter() - started) / steps)
    if options.profile:
        for name in models:
            kernels(name, lambda: step(name))  # noqa: B023
    return {name: statistics.median(times) for name, times in samples.items()}


def kernels(name: str, step: Callable[[], None]) -> None:
    """Print what a step spends its time on."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            step()
        synchronize("cuda" if torch.cuda.is_available() else "cpu")
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=90)
    print(f"\n== {name}, three steps ==\n{table}", flush=True)


def settings_of(
    bits: Sequence[str], skip: Sequence[str]
) -> Iterator[tuple[str, Callable[[nn.Module], nn.Module], bool, bool]]:
    """Each setting: its name, how the model is made of the full-precision one, with WinQ, quantized by us."""
    yield "unquantized", lambda model: model, False, False
    for width in bits:
        yield f"{width} bit, winq", lambda model, width=width: quantized(model, bits=width), True, True
    if "activations" not in skip:
        yield "2 bit, 8-bit activations, winq", lambda model: quantized(model, bits=2, activation_bits=8), True, True
    if "torchao" not in skip:
        yield "4 bit, torchao's QAT linear", torchao_linear, False, False


def gpu_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every setting trained, and noise and no noise in turns."""
    started = time.perf_counter()
    full, rows = model_of(options.model), []
    for name, make, winq, ours in settings_of(options.bits.split(","), options.skip.split(",")):
        if time.perf_counter() - started > options.time_limit:
            rows.append({"setting": name, "skipped": "no time was left"})
            continue
        row: dict[str, Any] = {"setting": name}
        try:
            model = make(copy.deepcopy(full))
            row |= trained(model, options, winq=winq, quantized=ours)
            del model
        except (InputError, ImportError, AttributeError, TypeError, RuntimeError) as error:
            row["skipped"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
        rows.append(row)
        release(options.device)
        print(f"{time.perf_counter() - started:5.0f} s  {json.dumps(row)}", flush=True)
    if "turns" not in options.skip.split(",") and time.perf_counter() - started < options.time_limit:
        rows += turns_rows(full, options)
    return rows


def turns_rows(full: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The unquantized model, 2 bit, and 2 bit with weight noise, in a loop without the Trainer, in turns."""
    models = {"unquantized": copy.deepcopy(full), "2 bit": quantized(copy.deepcopy(full), bits=2)}
    models["2 bit, noise"] = noisy(quantized(copy.deepcopy(full), bits=2))
    seconds = in_turns(models, options, rounds=6, steps=max(1, options.steps // 5))
    tokens = options.batch * options.length
    release(options.device)
    return [
        {"setting": f"{name}, plain loop, in turns", "step_ms": value * 1e3, "tokens_per_second": tokens / value}
        for name, value in seconds.items()
    ]


def noisy(model: nn.Module) -> nn.Module:
    for _, layer in qat.quant_layers(model):
        layer.noise_sigma = SIGMA
    return model


def cpu_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Eager steps in turns, for some shapes and numbers of tokens."""
    rows = []
    for shape, layers, batch, length in CPU_CASES if options.model == "smollm2" else (("tiny", 2, 2, 32),):
        case = argparse.Namespace(**vars(options) | {"batch": batch, "length": length})
        full = model_of(shape, layers=layers)
        models = {"unquantized": full, "2 bit": quantized(copy.deepcopy(full), bits=2)}
        models["2 bit, noise"] = noisy(quantized(copy.deepcopy(full), bits=2))
        seconds = in_turns(models, case, rounds=options.steps, steps=1)
        for name, value in seconds.items():
            rows.append(
                {
                    "setting": f"{shape}, {layers} layers, {batch} x {length}: {name}",
                    "step_ms": value * 1e3,
                    "tokens_per_second": batch * length / value,
                    "times_unquantized": value / seconds["unquantized"],
                }
            )
    return rows


def release(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their tokens a second over those of the unquantized model, and what noise adds to a step."""
    by_name = {row["setting"]: row for row in rows}
    plain = by_name.get("unquantized", {}).get("tokens_per_second")
    for row in rows:
        if plain and "whole_tokens_per_second" in row:
            row["whole_over_unquantized_step"] = row["whole_tokens_per_second"] / plain
    quiet, noise = (by_name.get(f"2 bit{name}, plain loop, in turns") for name in ("", ", noise"))
    if quiet and noise:
        noise["noise_share"] = noise["step_ms"] / quiet["step_ms"] - 1
    return rows


COLUMNS = {
    "step_ms": "{:.1f}",
    "tokens_per_second": "{:,.0f}",
    "whole_tokens_per_second": "{:,.0f}",
    "whole_over_unquantized_step": "{:.3f}",
    "telemetry_share": "{:.2%}",
    "validation_share": "{:.2%}",
    "resets_share": "{:.3%}",
    "drawing_noise_ms": "{:.2f}",
    "noise_share": "{:.2%}",
    "times_unquantized": "{:.2f}",
    "waits_per_step": "{:.1f}",
    "graphs": "{}",
    "breaks": "{}",
    "first_step_s": "{:.0f}",
    "peak_gib": "{:.1f}",
}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, without empty columns."""
    used = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = [
        "| setting | " + " | ".join(name.replace("_", " ") for name in used) + " |",
        "|---" * (len(used) + 1) + "|",
    ]
    for row in rows:
        cells = ["" if row.get(name) is None else COLUMNS[name].format(row[name]) for name in used]
        cells[0] = cells[0] or f"skipped: {row.get('skipped', '')}"
        lines.append(f"| {row['setting']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("model", nargs="?", default="smollm2", help=f"a folder, or one of {', '.join(SHAPES)}")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--way", choices=("train", "turns"), help="what is timed (default: by device)")
    made.add_argument("--bits", default="2,1,1.58,3,4")
    made.add_argument("--batch", type=int, default=16, help="sequences a step")
    made.add_argument("--length", type=int, default=1024, help="tokens a sequence")
    made.add_argument("--steps", type=int, default=40, help="timed steps, or rounds on a CPU")
    made.add_argument("--warm-up", type=int, default=10, help="steps before them")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU")
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    made.add_argument("--time-limit", type=float, default=420, help="seconds after which no setting is started")
    made.add_argument("--skip", default="", help="of activations,torchao,turns")
    made.add_argument("--profile", action="store_true", help="print what the steps in turns spend their time on")
    made.add_argument("--out", type=Path, help="a JSON file to write")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        print("skipped: no GPU is seen by torch; --device cpu times eager steps on this machine")
        return
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    options.compile = gpu if options.compile is None else options.compile
    with contextlib.suppress(Exception):
        from transformers.utils import logging

        logging.set_verbosity_error()
    rows = with_ratios(
        gpu_rows(options) if (options.way or ("train" if gpu else "turns")) == "train" else cpu_rows(options)
    )
    kept = {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": {name: str(value) for name, value in vars(options).items()},
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\n{kept['device']}, torch {kept['torch']}, {options.dtype}, {'compiled' if options.compile else 'eager'}\n")
    print(table(rows), "\n")
    print(json.dumps(kept))


if __name__ == "__main__":
    main()
