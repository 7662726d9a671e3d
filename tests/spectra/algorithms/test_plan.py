"""What a measurement takes in memory is known before it starts, and what does not fit is cut down."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spectra
from spectra.algorithms.plan import format_bytes
from spectra.backend import memory
from spectra.backend.errors import InputError
from spectra.backend.memory import AllocationMeter


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=128, **shape))
    ids = torch.randint(0, 512, (8, 64))
    return model, [{"input_ids": ids, "labels": ids}]


def operator(case, **options):
    return spectra.HessianOperator(*case, engine="reverse", **options)


@pytest.mark.parametrize(
    ("graph", "measured"),
    [
        ({}, {}),
        ({}, {"deflate": 5}),
        ({}, {"reorthogonalize": "none"}),
        ({"microbatch": 4}, {"deflate": 5}),
        ({"microbatch": 4, "graph": "rebuild"}, {}),
    ],
)
def test_the_plan_holds_what_is_held(case, graph, measured):
    """Each way to measure, and each way to keep graphs."""
    op = operator(case, **graph)
    plan = spectra.plan(op, probes=3, steps=12, **measured)
    op.close()
    with AllocationMeter() as meter:
        spectra.slq(op, probes=3, steps=12, **measured)
    assert 0.8 * plan.peak < meter.peak < 1.15 * plan.peak
    assert (plan.kept < plan.pieces) == ("graph" in graph)
    assert plan.rows == graph.get("microbatch", 8)


def test_the_plan_holds_a_count(case):
    op = operator(case)
    plan = spectra.plan(op, probes=1, steps=4, count_products=120)
    assert plan.count > 0
    assert "count" in str(plan)
    op.close()
    with AllocationMeter() as meter:
        spectra.slq(op, probes=1, steps=4, congruence=True, count_products=120)
    assert 0.7 * plan.peak < meter.peak < 1.15 * plan.peak


def test_the_footprint_of_a_few_rows_predicts_that_of_all(case):
    op = operator(case)
    graphs, footprint = op._graphs, op.footprint()
    substitution = graphs.substitution()
    with AllocationMeter() as meter:
        _, gradient = graphs.build(op.objective.pieces[0], substitution)
        held = meter.peak = meter.live
        graphs.through(gradient, substitution, torch.zeros(1, op.shape[0]), keep=True)
    assert footprint.graph(8) == pytest.approx(held, rel=0.05)
    assert footprint.product(8) == pytest.approx(meter.peak - held, rel=0.05)


def test_a_batch_that_does_not_fit_is_cut_and_the_numbers_stay(case, monkeypatch):
    want = operator(case)
    vector = torch.randn(want.shape[0], generator=torch.Generator().manual_seed(0))
    op = operator(case)
    needed = op.footprint().graph(2) + op.footprint().product(2)
    monkeypatch.setattr(memory, "available", lambda device: int(1.3 * needed))
    plan = spectra.plan(op, probes=2, steps=5)
    assert plan.kept < plan.pieces
    assert plan.peak < 1.3 * needed
    assert f"of {plan.pieces} graphs kept" in str(plan)
    assert f"{plan.rows} rows at a time" in str(plan)
    assert op.objective.rows == [8]  # asking cuts nothing
    assert torch.allclose(op @ vector, want @ vector, rtol=1e-4, atol=1e-7)
    assert max(op.objective.rows) == 2
    assert op.notes == ["memory for 2 rows at a time"]
    assert not op._graphs.keeps_every_graph  # half of the memory does not hold every graph


def test_the_plan_reads_in_one_line(case):
    text = str(spectra.plan(operator(case), probes=2, steps=5))
    assert "MiB at most beside the model" in text
    assert "all graphs kept, 8 rows at a time, 2 probe vectors together" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1.02e+03 B"), (1024, "1 KiB"), (3 * 2**30 + 2**27, "3.12 GiB"), (2**52, "4.1e+03 TiB")],
)
def test_bytes_read_well(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_operator_without_graphs_is_refused_with_what_to_plan(case, wrapped):
    diagonal = spectra.DiagonalOperator(torch.arange(4.0))
    op = spectra.MeanOperator([diagonal]) if wrapped else diagonal
    with pytest.raises(InputError, match=f"got {type(op).__name__}: plan the HessianOperator") as refused:
        spectra.plan(op)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes", [{"probes": 0}, {"steps": -1}, {"deflate": -1}, {"reorthogonalize": "some"}, {"deflate": 10**7}]
)
def test_counts_that_slq_refuses_are_refused(case, changes):
    with pytest.raises(InputError):
        spectra.plan(operator(case), **{"probes": 2, "steps": 3} | changes)


def test_one_step_with_a_basis_holds_a_vector_more_for_each_probe(case):
    op = operator(case)
    full, none = (spectra.plan(op, probes=2, steps=1, reorthogonalize=kept) for kept in ("full", "none"))
    assert full.together == none.together == 2
    assert full.recurrence - none.recurrence == 2 * op.vector_bytes
