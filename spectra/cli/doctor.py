"""`spectra doctor`: what is installed, which devices there are, and how a model would be measured here."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from spectra.algorithms.block_size import max_vectors_in_memory
from spectra.algorithms.plan import format_bytes, plan
from spectra.algorithms.topk import default_basis_size
from spectra.backend import memory
from spectra.backend.extras import EXTRA_OF
from spectra.backend.float64 import is_fast_in_float64
from spectra.backend.random_vectors import probe_vector
from spectra.backend.version import __version__
from spectra.cli.command_line import add_formats, examples, interrupts_say, print_json
from spectra.cli.tables import aligned
from spectra.operators.hessian.isolation import attention_of
from spectra.operators.hessian.operator import HessianOperator
from spectra.runs.settings import DEFLATED, MeasurementSettings

PACKAGES = ("torch", "numpy", "scipy", "safetensors", "transformers", "accelerate", "datasets", "matplotlib", "pandas")
SEQUENCES = 8  # as `spectra measure` takes by default
NO_PLAN = "needs your data: print(spectra.plan(spectra.HessianOperator(model, batches, loss=...)))"


def add_parser(commands: Any) -> None:
    """Add the command to those of a parser."""
    parser = commands.add_parser(
        "doctor",
        help="versions, devices and extras, and how a model would be measured here",
        **examples("spectra doctor", "spectra doctor checkpoint --device cpu --json"),
    )
    parser.set_defaults(command=run)
    add = parser.add_argument
    add("model", nargs="?", help="a model folder, or a name on the Hugging Face hub")
    add("--device", help="where the model would be measured (default: a GPU if there is one)")
    add("--trust-remote-code", action="store_true", help="run the code that a hub model brings")
    add_formats(parser, json="print JSON instead of tables")


def run(options: argparse.Namespace) -> None:
    """Print what was found. Nothing is written."""
    with interrupts_say("nothing was written"):
        found: dict[str, Any] = {"versions": versions(), "extras": extras(), "devices": devices()}
        lines = _lines(found)
        if options.model is not None:
            found["model"] = model_facts(options.model, options.device, trust_remote_code=options.trust_remote_code)
            lines += ["", *_model_lines(found["model"])]
    if options.json:
        print_json(found)
        return
    for line in lines:
        print(line)


def versions() -> dict[str, str | None]:
    """The version of each package that matters here; None for one that is not installed."""
    found: dict[str, str | None] = {"spectra": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def extras() -> dict[str, list[str]]:
    """The packages that each extra lacks; none where it is installed."""
    found: dict[str, list[str]] = {}
    for package, extra in EXTRA_OF.items():
        found.setdefault(extra, [])
        if find_spec(package) is None:
            found[extra].append(package)
    return found


def devices() -> list[dict[str, Any]]:
    """Every device that torch can use, with its free memory in bytes and whether float64 is fast on it."""
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    found = []
    for device in map(torch.device, names):
        cuda = device.type == "cuda"
        found.append(
            {
                "device": str(device),
                "name": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
                "threads": None if cuda else torch.get_num_threads(),
                "memory_free": memory.available(device),
                "float64_is_fast": is_fast_in_float64(device),
            }
        )
    return found


def model_facts(name: str, device: str | None, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """How `spectra measure` would measure a model by default, from a few products on random tokens.

    Args:
        name: A model folder or a hub name.
        device: Where; None is a GPU if there is one.
        trust_remote_code: Run the code that a model brings along.

    Returns:
        The kind of model, its number of parameters, its attention implementations, and for a language model the engine,
        the seconds that one product takes, and the plan of its memory.

    Raises:
        InputError: If the model cannot be loaded, or the device cannot be used.
    """
    from spectra.integrations import architectures, loading

    target = loading.usable_device(device)
    kind = architectures.kind_of(loading.load_config(name, trust_remote_code=trust_remote_code))
    loaded: Any = loading.load_model(name, trust_remote_code=trust_remote_code, kind=kind)
    model = loaded.to(target)
    own, measured = attention_of(model)
    facts: dict[str, Any] = {
        "model": name,
        "kind": kind.what,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(target),
        "attention": own,
        "attention_measured": measured,
    }
    if kind not in (architectures.CAUSAL, architectures.MASKED):
        return {**facts, "plan": None}
    length = loading.sequence_length(loading.longest_sequence(model), None)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (SEQUENCES, length), generator=generator).to(target)
    with loading.quiet_transformers():
        return facts | {"sequences": SEQUENCES, "length": length} | _products(model, tokens)


def _products(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """The plan, the engine and the time of a product for a language model on some tokens."""
    settings = MeasurementSettings()
    on_cpu = tokens.device.type == "cpu"
    batches = [{"input_ids": tokens, "labels": tokens}]
    with HessianOperator(model, batches, engine="reverse" if on_cpu else "auto") as op:
        fits = 2 * default_basis_size(DEFLATED) <= max_vectors_in_memory(op)
        deflate = DEFLATED if fits and DEFLATED + settings.steps < op.shape[0] else 0
        count = settings.count_products
        planned = plan(op, probes=settings.probes, steps=settings.steps, deflate=deflate, count_products=count)
        block = torch.stack([probe_vector(op, seed=0, index=index) for index in range(planned.together)])
        op.multiply_rows(block)  # picks the engine
        started = time.perf_counter()
        op.multiply_rows(block)
        if not on_cpu:
            torch.cuda.synchronize(tokens.device)
        seconds = (time.perf_counter() - started) / len(block)
        return {
            "engine": op.engine_used,
            "seconds_per_product": seconds,
            "probes": settings.probes,
            "steps": settings.steps,
            "deflated": deflate,
            "plan": vars(planned) | {"peak": planned.peak, "text": str(planned)},
            "memory_free": memory.available(tokens.device),
            "notes": list(op.notes),
        }


def _lines(found: Mapping[str, Any]) -> list[str]:
    """Versions, devices and extras as tables."""
    packages = [(name, version or "not installed") for name, version in found["versions"].items()]
    rows = [("device", "", "memory free", "float64")]
    for device in found["devices"]:
        threads = f", {device['threads']} threads" if device["threads"] else ""
        speed = "fast" if device["float64_is_fast"] else "slower than float32"
        rows.append((device["device"], device["name"] + threads, format_bytes(device["memory_free"]), speed))
    installed = []
    for extra, lacking in found["extras"].items():
        remedy = f'without {", ".join(lacking)}: pip install "spectra-qat[{extra}]"'
        installed.append((extra, remedy if lacking else "installed"))
    tables = (aligned(packages, "<<"), aligned(rows, "<<><"), aligned([("extra", "state"), *installed], "<<"))
    return [*tables[0], "", *tables[1], "", *tables[2]]


def _model_lines(facts: Mapping[str, Any]) -> list[str]:
    """What was found out about a model."""
    own, measured = facts["attention"], facts["attention_measured"]
    attention = "not named by the model" if own is None else own
    if own != measured:
        attention += f"; {measured} during a measurement, as fused kernels have no second derivative"
    elif own == "sdpa":
        attention += ", by its math kernel during a measurement"
    rows = [
        ("model", f"{facts['model']}: {facts['class']}, {facts['kind']}, {facts['parameters']:,} parameters"),
        ("attention", attention),
    ]
    if facts["plan"] is None:
        return aligned([*rows, ("plan", NO_PLAN)], "<<")
    taken = f"{facts['sequences']} sequences of {facts['length']} tokens"
    each = f"{facts['seconds_per_product']:.3g} s on {facts['device']}, {taken}"
    rows += [
        ("engine", facts["engine"]),
        ("one product", each),
        ("memory", facts["plan"]["text"]),
        ("memory free", format_bytes(facts["memory_free"])),
        *(("note", note) for note in facts["notes"]),
    ]
    return aligned(rows, "<<")
