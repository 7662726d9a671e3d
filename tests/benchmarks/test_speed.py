"""The speed benchmark, in this process and without the other libraries. Nothing here asserts how long a thing takes."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "speed"))

import blocks
import check_costs
import libraries
import measuring
import models
import slopes
import speed
import speed_tables
import tasks
import tools
import worker


def benchmark(*arguments):
    """A quick run whose workers are generators in this process."""
    options = speed.completed(speed.parser().parse_args(["--quick", "--bits", "16", *arguments]))
    return speed.Benchmark(options, lambda spec, limit: worker.work(spec))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or a worker takes every core


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Everything once, by the two tools that need no other library."""
    out = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        run = benchmark("--tools", "spectra,paper", "--out", str(out))
        return run, run.run(), out


def of(run, task, tool):
    return {
        row["way"]: row for row in speed_tables.flattened(run.results) if (row["task"], row["tool"]) == (task, tool)
    }


def case():
    model = models.build("tiny", 16)
    return models.Case(model, torch.randint(0, 128, (2, 8), generator=torch.Generator().manual_seed(0)))


def test_every_task_has_a_row_and_none_failed(done):
    run, text, _ = done
    for task in speed.TASKS.split(","):
        rows = of(run, task, "spectra")
        assert rows
        assert not [row for row in rows.values() if "error" in row]
        assert f"**{task}.**" in text
    assert "Left out" not in text
    assert set(of(run, "density", "paper")) == {"Lanczos"}


def test_ratios_are_finite(done):
    run, _, _ = done
    for task, ours in (("product", "one vector"), ("density", "slq"), ("trace", "hutchinson"), ("topk", "topk")):
        for tool in ("spectra", "paper"):
            for row in of(run, task, tool).values():
                ratio = speed_tables.ratio([row], [of(run, task, "spectra")[ours]])
                assert math.isfinite(ratio)
                assert ratio > 0
    for row in of(run, "product", "spectra").values():
        assert 0 < row["gradients"] < math.inf


def test_tools_agree_and_multiply_equally_often(done):
    run, _, _ = done
    errors = {result["tool"]: result["disagreement"] for result in run.results if "disagreement" in result}
    assert set(errors) == {"spectra", "paper"}
    assert max(errors.values()) < 1e-5
    assert of(run, "density", "spectra")["slq"]["products"] == of(run, "density", "paper")["Lanczos"]["products"] == 10
    for tool in ("spectra", "paper"):
        assert of(run, "trace", tool)["hutchinson"]["products"] == tasks.TRACE_PROBES


def test_eigenvalues_are_right_and_time_outside_products_is_a_share(done):
    run, _, _ = done
    found = of(run, "topk", "spectra")["topk"]
    assert found["converged"]
    assert found["true error"] <= tools.ACCURACY
    assert 0 <= of(run, "density", "spectra")["slq"]["outside"] < 1


def test_what_is_kept_reads_back_as_the_same_table(done, capsys):
    _, text, out = done
    kept = json.loads((out / "speed.json").read_text(), parse_constant=pytest.fail)
    assert kept["environment"]["versions"]["torch"] == torch.__version__
    assert (out / "speed.md").read_text() == text
    speed_tables.main([str(out / "speed.json")])
    assert capsys.readouterr().out.strip() == text.strip()


class Twice(tools.Paper):
    """A tool that is wrong by a factor of two."""

    def product(self, vector):
        return 2 * super().product(vector)


class Broken(tools.Paper):
    """A tool that cannot be made."""

    def __init__(self, case):
        raise RuntimeError("no such device")


def test_a_tool_that_disagrees_or_breaks_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setitem(worker.KINDS, "paper", Twice)
    monkeypatch.setitem(worker.KINDS, "pyhessian", Broken)
    run = benchmark("--tools", "paper,pyhessian,spectra", "--tasks", "product")
    text = run.run()
    assert "Left out: paper, its H v is off by 1.0e+00" in text
    assert "Left out: pyhessian, RuntimeError: no such device" in text
    assert not of(run, "product", "paper")
    assert of(run, "product", "spectra")


def test_no_process_is_started_past_the_time_limit():
    run = benchmark("--tools", "spectra", "--time-limit", "0")
    assert "no time was left" in run.run()
    assert [result["task"] for result in run.results] == ["start"]


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="unknown tools: nobody"):
        benchmark("--tools", "nobody")


def test_tables_take_medians_over_repeats():
    results = [
        {"model": "tiny", "bits": 16, "tool": tool, "repeat": repeat, "task": "density", "rows": [row]}
        for tool, times in (("spectra", (1.0, 5.0, 2.0)), ("paper", (3.0, 4.0, 9.0)))
        for repeat, seconds in enumerate(times)
        for row in [{"way": "w", "seconds": seconds, "products": 10, "a product": seconds / 10, "memory": 1 << 20}]
    ]
    settings = {"dtype": "float32", "repeats": 3, "probes": 10, "steps": 100, "scale": 1.0}
    text = speed_tables.table(results, settings, {})
    assert "| spectra | w | 2 (1 to 5) | 10 | 200 | 1 | 1 |" in text
    assert "| paper | w | 4 (3 to 9) | 10 | 400 | 2 | 1 |" in text


def test_a_slope_is_that_of_the_power():
    sizes = [1, 2, 4, 8]
    assert slopes.fitted(sizes, [3.0 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_the_stand_in_for_eig_is_right():
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.T
    values, vectors = libraries._symmetric_eig(matrix, eigenvectors=True)
    assert torch.allclose(matrix @ vectors, vectors * values[:, 0])
    assert not values[:, 1].any()


def test_the_plain_silu_computes_the_same_with_the_same_parameters():
    ours = case()
    plain = models.Case(libraries._with_plain_silu(ours.model), ours.ids)
    assert not any(isinstance(module, libraries.PlainSiLU) for module in ours.model.modules())
    assert any(isinstance(module, libraries.PlainSiLU) for module in plain.model.modules())
    assert all(a is b for a, b in zip(ours.parameters, plain.parameters, strict=True))
    assert plain.loss().item() == pytest.approx(ours.loss().item(), rel=1e-6)


def test_logits_and_targets_give_the_loss_of_the_model():
    ours = case()
    loss = torch.nn.functional.cross_entropy(models.Logits(ours.model)(ours.ids), models.targets(ours.ids))
    assert loss.item() == pytest.approx(ours.loss().item(), rel=1e-6)


def test_the_peak_of_memory_is_seen():
    gauge = measuring.PeakMemory(torch.device("cpu"))
    held = torch.ones(1 << 23)
    assert gauge.bytes >= 0.9 * held.nbytes


def test_the_cost_of_the_checks_is_positive_and_stands_in_the_table():
    cells = check_costs.row("llama-64", 1, torch.device("cpu"))
    assert cells[:3] == ["llama-64", "172,352", "1"]
    assert 0 < float(cells[5]) <= float(cells[4]) <= float(cells[6])


def test_the_benchmark_of_blocks_gives_the_same_numbers_both_ways(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(blocks.CASES, "tiny", lambda: check_costs.llama(8, 1))
    arguments = ["blocks.py", "--models", "tiny", "--probes", "1", "--steps", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path / "table.md")])
    blocks.main()
    (line,) = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| tiny")]
    assert line in capsys.readouterr().out
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "4"  # embeddings, a layer, the last norm, the head
    assert float(cells[-1]) < 1e-3
