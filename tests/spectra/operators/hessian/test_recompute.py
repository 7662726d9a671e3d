"""Parts whose graphs are not kept give the same products, and take less memory."""

import itertools

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import qat
import spectra
from spectra.backend import memory
from spectra.operators.hessian import recompute
from spectra.operators.hessian.recompute import (
    AttentionAndLossRecomputed,
    layers_of,
    layers_recomputed,
    recomputed,
)

POLICIES = ("recompute", "recompute layers")
SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=4)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=61, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    ),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, intermediate_size=24)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
}


def language_model(name):
    torch.manual_seed(0)
    ids = torch.randint(1, 61, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return MODELS[name]().double().eval(), [{"input_ids": ids, "labels": ids, "attention_mask": mask}]


def random_vector(op):
    return torch.randn(op.shape[0], dtype=op.dtype, generator=torch.Generator().manual_seed(1))


def assert_near(found, want, tolerance=1e-6):
    """Some models compute parts in float32 whatever their own precision."""
    assert float((found - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_products_and_gradients_are_those_of_kept_graphs(name, policy):
    model, batches = language_model(name)
    want = spectra.HessianOperator(model, batches, graph="keep")
    op = spectra.HessianOperator(model, batches, graph=policy)
    vector = random_vector(op)
    assert_near(op @ vector, want @ vector)
    assert_near(op.gradient(), want.gradient())
    assert op.loss() == pytest.approx(want.loss(), rel=1e-12)
    assert op.footprint().graph(3) < want.footprint().graph(3)


@pytest.mark.parametrize("policy", POLICIES)
def test_several_vectors_share_a_pass(policy):
    model, batches = language_model("llama")
    op = spectra.HessianOperator(model, batches, graph=policy, engine="batched")
    vectors = torch.stack([random_vector(op), torch.ones(op.shape[0], dtype=op.dtype)], dim=1)
    one = spectra.HessianOperator(model, batches, graph="keep", engine="reverse")
    assert_near(op @ vectors, one @ vectors)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", qat.MODES)
def test_every_hessian_of_a_quantized_model(mode, policy):
    model, batches = language_model("llama")
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    kept, op = (
        qat.hessian_operator(model, batches, mode, sigma=1e-2 if mode == "noisy" else None, graph=graph)
        for graph in ("keep", policy)
    )
    vector = random_vector(op)
    assert_near(op @ vector, kept @ vector)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gauss_newton_matrix(policy):
    model, batches = language_model("gpt2")
    kept, op = (spectra.GaussNewtonOperator(model, batches, graph=graph) for graph in ("keep", policy))
    vector = random_vector(op)
    assert_near(op @ vector, kept @ vector)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_part_of_the_parameters(policy):
    model, batches = language_model("gpt2")
    kept, op = (spectra.HessianOperator(model, batches, params=["*.mlp.*"], graph=g) for g in ("keep", policy))
    vector = random_vector(op)
    assert_near(op @ vector, kept @ vector)


def test_dropout_of_attention_is_drawn_once():
    model, batches = language_model("gpt2")
    kept, op = (spectra.HessianOperator(model, batches, training=True, graph=g) for g in ("keep", "recompute"))
    vector = random_vector(op)
    assert_near(op @ vector, kept @ vector)


# -- functions


def second_derivatives(function, tensors):
    """Outputs, gradients and products of second derivatives of a function that returns one tensor."""
    out = function(*tensors)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    generator = torch.Generator().manual_seed(2)
    draw = lambda like: torch.randn(like.shape, dtype=like.dtype, generator=generator)  # noqa: E731
    gradient = torch.autograd.grad(out, wanted, draw(out), create_graph=True, materialize_grads=True)
    pairs = [(g, draw(g)) for g in gradient if g.requires_grad]
    if not pairs:
        return [out, *gradient]
    second = torch.autograd.grad([g for g, _ in pairs], wanted, [v for _, v in pairs], materialize_grads=True)
    return [out, *gradient, *second]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (x * y).sin(),
        lambda x, y: x.exp() + 0 * y,
        lambda x, y: 3 * x,  # no second derivative, and one input unused
        lambda x, y: x.cumsum(0) * y.detach(),
    ],
)
def test_a_function_has_the_derivatives_of_its_parts(function):
    x, y = (torch.rand(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    want = second_derivatives(function, (x, y))
    found = second_derivatives(lambda *given: recomputed(lambda *t: (function(*t),), given)[0], (x, y))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)


def test_integers_pass_through():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([0, 6, 2, -100, 1])
    want = second_derivatives(lambda x: functional.cross_entropy(x, classes, label_smoothing=0.1), (logits,))
    with AttentionAndLossRecomputed():
        found = second_derivatives(lambda x: functional.cross_entropy(x, classes, label_smoothing=0.1), (logits,))
    assert type(found[0].grad_fn).__name__ == "_RecomputedBackward"
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [1, 1 << 40])
@pytest.mark.parametrize("masked", [None, "all heads", "each head", "learned", "causal"])
@pytest.mark.parametrize(("heads", "of_keys"), [(4, 4), (4, 2), (6, 3), (1, 1)])
def test_attention_by_groups_of_heads(heads, of_keys, masked, size, monkeypatch):
    monkeypatch.setattr(recompute, "SCORES_BYTES", size)
    torch.manual_seed(0)
    query = torch.randn(2, heads, 5, 4, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, of_keys, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"enable_gqa": heads != of_keys, "is_causal": masked == "causal"}
    shapes = {"all heads": (2, 1, 5, 5), "each head": (2, heads, 5, 5), "learned": (heads, 5, 5)}
    mask = torch.randn(shapes[masked], dtype=torch.float64) if masked in shapes else None
    tensors = (query, key, value)
    if masked == "learned":
        tensors = (*tensors, mask.requires_grad_())

    def attention(*given):
        q, k, v = given[:3]
        return functional.scaled_dot_product_attention(q, k, v, mask, **options)

    with sdpa_kernel(SDPBackend.MATH):
        want = second_derivatives(attention, tensors)
        with AttentionAndLossRecomputed():
            out = attention(*tensors)
        found = second_derivatives(lambda *given: _recomputing(attention, given), tensors)
    torch.testing.assert_close(out, want[0])
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)


def _recomputing(function, given):
    with AttentionAndLossRecomputed():
        return function(*given)


# -- layers


def test_layers_are_the_outermost_ones_that_repeat():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    model = nn.ModuleDict({"layers": nn.ModuleList([inner, nn.Linear(2, 2)]), "head": nn.Linear(2, 1)})
    assert layers_of(model) == [inner, model["layers"][1]]
    assert layers_of(nn.Linear(2, 2)) == []


def test_the_model_is_left_as_it_was():
    model, _ = language_model("llama")
    model.model.layers[0].forward = own = model.model.layers[0].forward
    before = [dict(vars(module)) for module in model.modules()]
    with layers_recomputed(model):
        assert model.config.use_cache is False
        assert model.model.layers[0].forward is not own
    assert model.config.use_cache is True
    assert all(vars(m).keys() == b.keys() for m, b in zip(model.modules(), before, strict=True))
    assert model.model.layers[0].forward is own


def test_layers_of_a_sequence_with_tuples_and_other_outputs():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, given, *, scale):
            x, count = given
            return torch.tanh(self.linear(x)) * scale["by"], count + 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.layers[1].linear.weight = self.layers[0].linear.weight  # tied

        def forward(self, x):
            state = (x, 0)
            for layer in self.layers:
                state = layer(state, scale={"by": 2.0})
            assert state[1] == 2
            return state[0]

    torch.manual_seed(0)
    model = Model().double()
    batches = [(torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))]
    kept, op = (
        spectra.HessianOperator(model, batches, loss=functional.mse_loss, graph=g) for g in ("keep", "recompute layers")
    )
    torch.testing.assert_close(op.to_dense(), kept.to_dense(), rtol=1e-10, atol=1e-12)


# -- the choice


def long_sequence(rows):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | {"max_position_embeddings": 512}))
    ids = torch.randint(0, 61, (rows, 256))
    return model, [{"input_ids": ids, "labels": ids}]


@pytest.mark.parametrize("rows", [1, 4])
def test_what_does_not_fit_is_recomputed(rows, monkeypatch):
    model, batches = long_sequence(rows)
    want = spectra.HessianOperator(model, batches, engine="reverse")
    vector = random_vector(want)
    product = want @ vector
    kinds = ("", "attention and loss", "layers")
    sizes = [want.footprint(kind).graph(rows) + want.footprint(kind).product(rows) for kind in kinds]
    assert sizes == sorted(sizes, reverse=True)
    chosen = []
    for free in (1 << 40, *(int(1.02 * size / 0.8) for size in sizes[1:])):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        op = spectra.HessianOperator(model, batches, engine="reverse", graph="auto")
        op._graphs.can_be_cut = lambda: False
        assert_near(op @ vector, product, 1e-4)
        chosen.append(op.graph_layout().recomputed)
    assert chosen == list(kinds)


def test_vectors_that_were_announced_have_room(monkeypatch):
    model, batches = long_sequence(4)
    op = spectra.HessianOperator(model, batches, engine="reverse")
    op.loss()
    footprint = op.footprint()
    assert op.graph_layout().is_whole
    whole = footprint.graph(4) + footprint.product(4)
    monkeypatch.setattr(memory, "available", lambda device: int(2.2 * whole))
    assert op.graph_layout().is_whole
    vectors = int(1.75 * whole / op.vector_bytes)
    layout = op.graph_layout(reserved=vectors)
    assert max(layout.objective.rows) < 4 or layout.recomputed
    held = sum(op.footprint(layout.recomputed).graph(rows) for rows in layout.objective.rows[: layout.kept])
    product = op.footprint(layout.recomputed).product(max(layout.objective.rows))
    assert held + product + vectors * op.vector_bytes <= 2.2 * whole
    monkeypatch.setattr(memory, "available", lambda device: int(2.2 * whole) - held_by(op))
    op.reserve(vectors)
    assert held_by(op) == 0  # the graphs were in the way
    op.loss()
    assert op.objective.rows == layout.objective.rows
    assert len(op._graphs._state.kept) == layout.kept
    op.reserve(vectors)
    assert held_by(op) == held
    op.reserve(0)
    assert held_by(op) == 0  # more of them can be kept now
    op.loss()
    assert op._graphs.keeps_every_graph


def held_by(op):
    """Bytes of the graphs of an operator."""
    graphs = op._graphs
    if graphs._state is None:
        return 0
    return sum(op.footprint().graph(rows) for rows in op.objective.rows[: len(graphs._state.kept)])


def test_policies_are_named_in_the_error():
    model, batches = language_model("llama")
    with pytest.raises(
        spectra.InputError, match="graph must be one of auto, keep, recompute, recompute layers, rebuild"
    ):
        spectra.HessianOperator(model, batches, graph="checkpoint")


def test_running_out_of_memory_goes_down_the_same_steps(monkeypatch):
    model, batches = long_sequence(2)
    op = spectra.HessianOperator(model, batches, engine="reverse")
    words = list(itertools.takewhile(bool, (op._graphs.reduce_memory() for _ in range(9))))
    assert words == [
        "attention and loss computed again in every product",
        "graphs rebuilt at every product",
        "1 rows at a time",
        "every layer computed again in every product",
    ]


def test_scripted_layers_are_not_recomputed():
    torch.manual_seed(0)
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh())), nn.Linear(5, 3)).double()
    assert layers_of(model) == [model[1]]
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    ops = [spectra.HessianOperator(model, [(x, y)], graph=policy) for policy in ("keep", "recompute layers")]
    vector = torch.ones(ops[0].shape[0], dtype=torch.float64)
    torch.testing.assert_close(ops[0] @ vector, ops[1] @ vector)
