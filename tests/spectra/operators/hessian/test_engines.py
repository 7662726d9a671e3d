"""Every engine gives the same numbers, through every architecture and quantizer; the pick never changes them."""

import warnings
from functools import partial

import pytest
import tiny_models
import torch
from oracles import normal, relative_error

import qat
import spectra
from spectra.operators.hessian import pick as engine_pick
from spectra.operators.hessian.graphs import GraphStore

LANGUAGE = 1e-6  # transformers computes norms and softmax in float32 whatever the model holds


def no_compiler(function, **options):
    """torch.compile takes minutes on a CPU; test_forward_over_reverse_compiles runs it for real."""

    def fails(*_):
        raise RuntimeError("there is no compiler here")

    return fails


def eager(monkeypatch):
    monkeypatch.setattr(torch, "compile", no_compiler)


def products(build, engine, count=4):
    op = build(engine=engine)
    return op @ normal(op.shape[0], count, seed=3), op


@pytest.mark.parametrize("engine", ["batched", "auto"])
@pytest.mark.parametrize("graph", ["keep", "rebuild"])
@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_blocks_of_vectors_through_language_models(architecture, graph, engine):
    model, batches = tiny_models.causal_lm(architecture), tiny_models.token_batches()
    build = partial(spectra.HessianOperator, model, batches, graph=graph)
    want, _ = products(build, "reverse")
    got, op = products(build, engine)
    assert relative_error(got, want) < LANGUAGE
    assert op.engine_used in ("reverse", "batched")


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_forward_over_reverse_through_language_models(architecture, monkeypatch):
    eager(monkeypatch)
    model, batches = tiny_models.causal_lm(architecture), tiny_models.token_batches()
    before = model.config._attn_implementation
    build = partial(spectra.HessianOperator, model, batches)
    want, _ = products(build, "reverse")
    with pytest.warns(UserWarning, match="cannot be compiled"):
        got, op = products(build, "forward")
    assert relative_error(got, want) < LANGUAGE
    assert op.engine_used == "forward"
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("engine", ["batched", "forward"])
@pytest.mark.parametrize(
    ("mode", "bits"), [("ste", 1), ("ste", 1.58), ("ste", 2), ("ste", 4), ("quantized", 2), ("latent", 2)]
)
def test_blocks_of_vectors_through_quantizers(bits, mode, engine, monkeypatch):
    """Each quantizer, and each mode with one of them."""
    eager(monkeypatch)
    model = tiny_models.causal_lm("llama")
    qat.quantize_model(model, qat.QuantConfig(bits=bits))
    build = partial(qat.hessian_operator, model, tiny_models.token_batches(), mode=mode)
    want, _ = products(build, "reverse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got, _ = products(build, engine)
    assert want.norm() > 1e-3
    assert relative_error(got, want) < LANGUAGE


@pytest.mark.parametrize("engine", ["batched", "forward", "auto"])
def test_pairs_of_inputs_and_targets_and_an_unused_parameter(engine, monkeypatch):
    eager(monkeypatch)
    model = torch.nn.ModuleDict({"used": tiny_models.mlp(), "idle": torch.nn.Linear(2, 2).double()})
    model.forward = model["used"].forward
    build = partial(spectra.HessianOperator, model, tiny_models.classification((8, 3)))
    want, _ = products(build, "reverse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got, _ = products(build, engine)
    assert relative_error(got, want) < 1e-12


def test_the_warning_about_the_compiler_comes_once(monkeypatch):
    eager(monkeypatch)
    op = spectra.HessianOperator(tiny_models.mlp(), tiny_models.classification((8,)), engine="forward")
    vectors = normal(op.shape[0], 2, seed=1)
    with pytest.warns(UserWarning, match="there is no compiler here"):
        op @ vectors
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        op @ vectors


@pytest.mark.slow
def test_forward_over_reverse_compiles():
    build = partial(spectra.HessianOperator, tiny_models.causal_lm("llama"), tiny_models.token_batches())
    want, _ = products(build, "reverse")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the model cannot be compiled")
        got, _ = products(build, "forward")
    assert relative_error(got, want) < LANGUAGE


def test_an_engine_is_picked_once_for_a_block_size_and_kept_at_new_weights(monkeypatch):
    timed = []
    monkeypatch.setattr(
        engine_pick.EnginePick, "_seconds", lambda self, way, v: (timed.append(way) or 1.0, self._run(way, v))
    )
    model = tiny_models.mlp()
    op = spectra.HessianOperator(model, tiny_models.classification((8,)))
    vectors = normal(op.shape[0], 3, seed=1)
    op @ vectors
    assert timed == ["reverse", "batched"]
    assert op.engine_used == "batched"  # a second for three vectors, a second for one
    with torch.no_grad():
        model[0].weight.mul_(2)
    want = spectra.HessianOperator(model, tiny_models.classification((8,)), engine="reverse") @ vectors
    assert relative_error(op @ vectors, want) < 1e-12
    assert timed == ["reverse", "batched"]
    op @ vectors[:, 0]
    assert op.engine_used == "reverse"


def test_an_operation_that_cannot_be_batched_is_left_to_reverse():
    class Cube(torch.autograd.Function):
        """x ** 3, twice differentiable, without the rule that batching needs."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if torch._C._functorch.is_batchedtensor(g):
                raise RuntimeError("no rule for batches")
            return g * 3 * x**2

    class Model(torch.nn.Linear):
        def forward(self, x):
            return Cube.apply(super().forward(x))

    torch.manual_seed(0)
    op = spectra.HessianOperator(Model(4, 2).double(), tiny_models.regression((6,), outputs=2))
    vectors = normal(op.shape[0], 3, seed=1)
    want = torch.stack([op @ vector for vector in vectors.T], dim=1)
    assert relative_error(op @ vectors, want) < 1e-12


def test_running_out_of_memory_is_survived_in_steps_and_noted(monkeypatch):
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches(((8, 5, 3, 6), (7, 4)))
    op = spectra.HessianOperator(model, batches, engine="batched", graph="keep")
    vectors = normal(op.shape[0], 2, seed=1)
    want = spectra.HessianOperator(model, batches) @ vectors
    whole = GraphStore.sum_over_pieces

    def fits_two_rows(self, block, way, part=None):
        if way == "batched" or self.policy == "keep" or max(self.objective.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return whole(self, block, way)

    monkeypatch.setattr(GraphStore, "sum_over_pieces", fits_two_rows)
    with pytest.warns(UserWarning, match="out of memory, went on with"):
        assert relative_error(op @ vectors, want) < LANGUAGE
    assert [note.removeprefix("out of memory, went on with ") for note in op.notes] == [
        "one vector at a time",
        "graphs rebuilt at every product",
        "2 rows at a time",
    ]


def test_running_out_of_memory_for_the_graphs_is_survived_too(monkeypatch):
    model, batches = tiny_models.causal_lm("llama"), tiny_models.token_batches(((8, 5, 3, 6), (7, 4)))
    want = spectra.HessianOperator(model, batches).loss()
    op = spectra.HessianOperator(model, batches, graph="keep")
    whole = GraphStore.build

    def fits_two_rows(self, piece, *given, **options):
        if self.policy == "keep" or len(piece.batch["labels"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return whole(self, piece, *given, **options)

    monkeypatch.setattr(GraphStore, "build", fits_two_rows)
    with pytest.warns(UserWarning, match="out of memory, went on with"):
        assert op.loss() == pytest.approx(want, rel=1e-6)
    assert len(op.notes) == 2


def test_graphs_that_fitted_before_may_not_fit_at_new_weights(monkeypatch):
    """The engine that multiplied last needs more memory: it is replaced first, then the graphs are rebuilt."""
    model = tiny_models.mlp()
    op = spectra.HessianOperator(model, tiny_models.classification((4,)), engine="batched", graph="keep")
    op @ normal(op.shape[0], 2, seed=1)
    whole = GraphStore.build

    def fits_rebuilt(self, piece, *given, **options):
        if self.policy == "keep":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, piece, *given, **options)

    monkeypatch.setattr(GraphStore, "build", fits_rebuilt)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.warns(UserWarning, match="out of memory, went on with"):
        op.loss()
    assert [note.rpartition("with ")[2] for note in op.notes] == [
        "one vector at a time",
        "graphs rebuilt at every product",
    ]


def test_what_does_not_fit_at_all_is_refused_in_one_line(monkeypatch):
    def never(self, block, way, part=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    op = spectra.HessianOperator(tiny_models.mlp(), tiny_models.classification((3,)))
    monkeypatch.setattr(GraphStore, "sum_over_pieces", never)
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(spectra.InputError, match="does not fit in memory") as caught,
    ):
        op @ normal(op.shape[0], seed=1)
    assert "\n" not in str(caught.value)


BLOCK = {"captured": 1, "captured batched": 4}  # vectors that a recording multiplies at once
RECORDED = {"captured": "reverse", "captured batched": "batched"}


@pytest.mark.parametrize("engine", ["captured", "captured batched"])
def test_captured_products_are_recorded_again_at_new_weights(engine, monkeypatch):
    """Without a GPU: a recording that multiplies, as a CUDA graph does, at the weights that it was made at."""
    made = []

    def record(graphs, example, way, part=None):
        images = graphs.multiply(torch.eye(graphs.space.dimension, dtype=example.dtype), "reverse")
        made.append((way, len(example)))
        return lambda vectors: vectors @ images

    monkeypatch.setattr(GraphStore, "capture", record)
    model = tiny_models.mlp()
    op = spectra.HessianOperator(model, tiny_models.classification((3,)), engine=engine)
    vectors = normal(op.shape[0], 4, seed=1)
    before = op @ vectors
    assert torch.allclose(op @ vectors, before)
    assert [way for way, count in made if count == BLOCK[engine]] == [RECORDED[engine]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    moved = op @ vectors
    assert [way for way, count in made if count == BLOCK[engine]] == [RECORDED[engine]] * 2
    assert not torch.allclose(moved, before)
    assert relative_error(moved, spectra.HessianOperator(model, tiny_models.classification((3,))) @ vectors) < 1e-10


@pytest.mark.parametrize("engine", ["captured", "captured batched"])
def test_capture_needs_a_gpu(engine):
    op = spectra.HessianOperator(tiny_models.mlp(), tiny_models.classification((3,)), engine=engine)
    with pytest.raises(spectra.InputError, match="CUDA"):
        op @ normal(op.shape[0], seed=1)


def test_an_unknown_engine_is_refused():
    with pytest.raises(spectra.InputError, match="engine must be one of auto, reverse"):
        spectra.HessianOperator(tiny_models.mlp(), tiny_models.classification((3,)), engine="turbo")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("engine", ["reverse", "batched", "captured", "captured batched", "auto"])
def test_engines_on_a_gpu(engine):
    model = tiny_models.causal_lm("llama").cuda()
    build = partial(spectra.HessianOperator, model, tiny_models.token_batches())
    want, _ = products(build, "reverse")
    got, op = products(build, engine)
    assert relative_error(got.cpu(), want.cpu()) < LANGUAGE
    again = op @ normal(op.shape[0], 4, seed=3)
    assert relative_error(again.cpu(), want.cpu()) < LANGUAGE
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    moved, _ = products(build, "reverse")
    assert relative_error((op @ normal(op.shape[0], 4, seed=3)).cpu(), moved.cpu()) < LANGUAGE
