"""Time Hessian-vector products, densities, traces, eigenvalues and shares, by this project and by other libraries.

    python benchmarks/speed/speed.py [--device cpu|cuda] [--models 1M,10M] [--bits 16,2] [--tasks ...] [--tools ...]

A "product" is a Hessian-vector product throughout. Every tool gets the same model, batch, parameters and number of
products, in a process of its own. The tools take turns within each repeat. The tables are printed at the end as
Markdown, and kept in --out with every sample. A tool may be named with options of its operator, as in
spectra:engine=batched+precision=float64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import MARK
from speed_tables import table

TOOLS = "spectra,pyhessian,hessian-eigenthings,curvlinops,paper"
TASKS = "product,density,trace,topk,share,slopes"
SIZES = "tiny,1M,10M,12M,124M,1.2B"
MODELS = {"cpu": "tiny,1M,10M", "cuda": "12M,124M,1.2B"}
SLOPES_ON = {"cpu": "1M", "cuda": "12M"}
OURS_ALONE = ("share", "slopes")
QUICK_EFFORT = {
    "samples": 3,
    "budget": 60,
    "slope_points": 2,
    "slope_steps": 8,
    "trace_limit": 42,
    "engines": False,
}
QUICK = {"models": "tiny", "bits": "16", "repeats": 1, "products_scale": 0.01}


@dataclass
class Benchmark:
    """A run: its options, how a worker process is started, and the results so far."""

    options: argparse.Namespace
    launch: Callable[[dict[str, Any], float | None], Iterator[dict[str, Any]]]
    results: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def run(self) -> str:
        """Measure everything and return the tables. Results are written after every process."""
        with tempfile.TemporaryDirectory() as folder:
            for model in self.options.models.split(","):
                for bits in map(int, self.options.bits.split(",")):
                    self._case({"model": model, "bits": bits, "folder": folder})
        return self._keep()

    def _case(self, case: dict[str, Any]) -> None:
        """Prepare one model, then measure it with every tool in every repeat."""
        tasks = self.options.tasks.split(",")
        self._process({**case, "tool": "prepare", "repeat": 0, "tasks": tasks})
        if not self.results or "error" in self.results[-1]:
            return
        for repeat in range(1, self.options.repeats + 1):
            for tool in self.options.tools.split(","):
                chosen = [task for task in tasks if self._applies(task, tool, case["model"], repeat)]
                for group in self._groups(chosen):
                    effort = {**self._effort(), "accuracy": repeat == 1}
                    self._process({**case, "tool": tool, "repeat": repeat, "tasks": group, "effort": effort})
                    self._keep()

    def _applies(self, task: str, tool: str, model: str, repeat: int) -> bool:
        if task in OURS_ALONE and not tool.startswith("spectra"):
            return False
        if task == "slopes":  # once, with the operator as it comes
            models = self.options.models.split(",")
            wanted = SLOPES_ON[self.options.device]
            return tool == "spectra" and repeat == 1 and model == (wanted if wanted in models else models[0])
        return True

    def _groups(self, tasks: Sequence[str]) -> list[list[str]]:
        """Split tasks into processes: one each, so that peak memory is its own, or all in one, which starts once."""
        if not tasks:
            return []
        return [[task] for task in tasks] if self.options.processes == "task" else [list(tasks)]

    def _process(self, spec: dict[str, Any]) -> None:
        spec = {**spec, "device": self.options.device, "dtype": self.options.dtype}
        named = {key: spec[key] for key in ("model", "bits", "tool", "repeat")}
        left = self._seconds_left()
        if left is not None and left <= 0:
            self.results.append({**named, "task": "start", "error": "no time was left"})
            return
        print(f"{time.monotonic() - self.started:6.0f} s  {', '.join(map(str, named.values()))}: ", end="", flush=True)
        for result in self.launch(spec, left):
            self.results.append({**named, **result})
            self.environment = result.get("environment", self.environment)
            print(f"{result['task']}{' FAILED' if 'error' in result else ''} ", end="", flush=True)
        print(flush=True)

    def _seconds_left(self) -> float | None:
        limit = self.options.time_limit
        return None if limit is None else limit - (time.monotonic() - self.started)

    def _effort(self) -> dict[str, Any]:
        root = self.options.products_scale**0.5
        effort = {"probes": max(round(10 * root), 1), "steps": max(round(100 * root), 10)}
        effort |= {"engines": not self.options.auto_only, "trace_limit": self.options.trace_limit}
        return effort | (QUICK_EFFORT if self.options.quick else {})

    def _keep(self) -> str:
        """Write the results so far into --out, and return the tables."""
        effort, options = self._effort(), self.options
        settings = {**vars(options), "scale": options.products_scale, **effort, "out": str(options.out or "")}
        text = table(self.results, settings, self.environment)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            kept = {"environment": self.environment, "settings": settings, "results": self.results}
            (options.out / "speed.json").write_text(json.dumps(kept, indent=1) + "\n")
            (options.out / "speed.md").write_text(text)
        return text


def subprocess_results(spec: dict[str, Any], limit: float | None) -> Iterator[dict[str, Any]]:
    """Start this script again as a worker and yield its results as they come. A crash is yielded as an error."""
    command = [sys.executable, __file__, "--worker", json.dumps(spec)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            deadline = None if limit is None else time.monotonic() + limit
            cancel = _stop_at(process, deadline)
            for line in process.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
            process.wait()
            late = cancel()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1][:200]
            reason = "stopped at the time limit" if late else f"exit code {process.returncode}: {last}"
            yield {"task": "process", "error": reason}


def _stop_at(process: subprocess.Popen, deadline: float | None) -> Callable[[], bool]:
    """Kill the process at the deadline. The returned function cancels that, and says whether it was too late."""
    if deadline is None:
        return lambda: False
    timer = threading.Timer(max(deadline - time.monotonic(), 0), process.kill)
    timer.daemon = True
    timer.start()

    def ended() -> bool:
        timer.cancel()
        return time.monotonic() >= deadline

    return ended


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--models", help=f"of {SIZES} (default {MODELS})")
    made.add_argument("--bits", help="16 is full precision (default 16,2)")
    made.add_argument("--tasks", default=TASKS, help=f"of {TASKS} (default all)")
    made.add_argument("--tools", default=TOOLS, help=f"of {TOOLS} (default all); spectra:NAME=VALUE+... sets options")
    made.add_argument("--repeats", type=int, help="default 3")
    made.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    made.add_argument("--products-scale", type=float, help="scale the products of a density, for every tool")
    made.add_argument("--auto-only", action="store_true", help='time engine="auto" alone, not every engine by name')
    made.add_argument("--trace-limit", type=int, default=480, help="the largest number of products for a trace to 2 %%")
    made.add_argument("--processes", choices=("task", "tool"), help="one for each task (CPU) or for each tool (GPU)")
    made.add_argument("--time-limit", type=float, help="seconds after which nothing more is started")
    made.add_argument("--quick", action="store_true", help="every task on the tiny model, one repeat")
    made.add_argument("--out", type=Path, help="folder for speed.json and speed.md")
    made.add_argument("--worker", help=argparse.SUPPRESS)
    return made


def completed(options: argparse.Namespace) -> argparse.Namespace:
    """The options, with defaults that depend on other options filled in."""
    usual = {"models": MODELS[options.device], "bits": "16,2", "repeats": 3, "products_scale": 1.0}
    for name, value in (usual | (QUICK if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, known in (("models", SIZES), ("tasks", TASKS), ("tools", TOOLS)):
        given = {text.partition(":")[0] for text in getattr(options, name).split(",")}
        if unknown := given - set(known.split(",")):
            raise SystemExit(f"unknown {name}: {', '.join(sorted(unknown))}; there are {known}")
    if options.processes is None:
        options.processes = "tool" if options.quick or options.device == "cuda" else "task"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = completed(parser().parse_args(arguments))
    if options.worker:
        from worker import main as work

        work(options.worker)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()
    text = Benchmark(options, subprocess_results).run()
    print(f"\n{time.perf_counter() - started:.0f} s\n\n{text}")


if __name__ == "__main__":
    main()
