"""Experts in 3-D parameters and nn.MultiheadAttention: quantized where their modules read them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from oracles import normal, relative_error
from torch import nn
from torch.func import functional_call

import qat
from qat.layers.activations import quantize_activations
from qat.layers.linear import QuantLinear, full_precision_names, weight_names
from qat.layers.quantizers.registry import make_quantizer
from qat.layers.readers import QuantParameter, expert_by_expert
from qat.training.telemetry import Telemetry
from spectra import HessianOperator

COMMON = {"vocab_size": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 32}
SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {"num_key_value_heads": 1}
ROUTED = {"num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": lambda: t.MixtralConfig(**COMMON, **SHAPE, **HEADS, **ROUTED, num_local_experts=4),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(
        **COMMON, **SHAPE, **HEADS, **ROUTED, head_dim=4, num_experts=4, moe_intermediate_size=8
    ),
    "gpt-oss": lambda: t.GptOssConfig(**COMMON, **SHAPE, **HEADS, **ROUTED, head_dim=4, num_local_experts=4),
    "llama4": lambda: t.Llama4TextConfig(
        **COMMON, **SHAPE, **HEADS, head_dim=4, intermediate_size_mlp=16, num_local_experts=4
    ),
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CASES = [(name, kind) for name in CONFIGS if name != "llama4" for kind in IMPLEMENTATIONS] + [("llama4", None)]
TOKENS = torch.arange(2, 22).reshape(2, 10)
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def moe(name="mixtral", implementation="eager", *, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model


def experts_of(model):
    return next(module for name, module in model.named_modules() if name.endswith("experts"))


def plain_twin(model, plain):
    """The full-precision model with Q(W) as its weights."""
    twin = copy.deepcopy(plain)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, layer in full_precision_names(model).items():
            parameters[name].copy_(layer.quantized_weight())
    return twin


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_experts_compute_with_quantized_weights(name, implementation, bits):
    plain = moe(name, implementation)
    model = copy.deepcopy(plain)
    report = qat.quantize_model(model, qat.QuantConfig(bits=bits))
    inside = [key for key in report.swapped if key.endswith(("gate_up_proj", "down_proj")) and "experts" in key]
    assert len(inside) == 2
    assert not any("experts" in key for key in report.skipped)
    assert report.parameter_count == sum(p.numel() for p in plain.parameters())
    assert report.share == report.weight_count / report.parameter_count > 0.5
    assert torch.equal(model(**BATCH).logits, plain_twin(model, plain)(**BATCH).logits)
    model(**BATCH).loss.backward()
    for key, layer in qat.quant_layers(model):
        assert layer.weight.grad is not None, key
        assert layer.scale.grad is not None, key
    parameters = dict(model.named_parameters())
    for key in inside:
        assert parameters[f"{key}.weight"].dim() == 3
        assert model.get_parameter(f"{key}.scale").shape == (4 * model.get_submodule(key).rows().shape[0] // 4, 1)
    assert {f"{key}.weight" for key in inside} <= set(weight_names(model))


@pytest.mark.parametrize("scheme", ["binary", "seq", "lsq", "rtn"])
def test_each_expert_is_quantized_as_a_layer_of_its_own(scheme):
    """Values, and the gradients of weights and scales, in both layouts."""
    bits = {"binary": 1, "seq": 2, "lsq": 4, "rtn": 4}[scheme]
    stack, direction = normal(3, 5, 7, seed=1), normal(3, 5, 7, seed=2)
    for transposed in (False, True):
        weight = nn.Parameter(stack.transpose(1, 2).contiguous() if transposed else stack.clone())
        layer = QuantParameter(weight, make_quantizer(scheme, bits), transposed=transposed)
        assert layer.rows().shape == (15, 7)
        out = layer().transpose(1, 2) if transposed else layer()
        (out * direction).sum().backward()
        for index in range(3):
            single = QuantLinear(nn.Parameter(stack[index].clone()), None, make_quantizer(scheme, bits))
            quantized = single.quantized_weight()
            (quantized * direction[index]).sum().backward()
            assert torch.equal(out[index], quantized)
            grad = weight.grad[index].t() if transposed else weight.grad[index]
            torch.testing.assert_close(grad, single.weight.grad, rtol=1e-12, atol=1e-15)
            codes = layer.codes()[index].t() if transposed else layer.codes()[index]
            assert torch.equal(codes, single.codes())
            mask = layer.mask()[index].t() if transposed else layer.mask()[index]
            assert torch.equal(mask, single.mask())
            if scheme != "rtn":
                scale = layer.scale.grad.reshape(3, 5)[index]
                torch.testing.assert_close(scale, single.scale.grad[:, 0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_the_loop_over_experts_is_what_transformers_computes(name):
    experts = experts_of(moe(name, "batched_mm", dtype=torch.float64))
    hidden = normal(9, 8, seed=3)
    index = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i))[:2] for i in range(9)])
    weights = normal(9, 2, seed=4).softmax(-1)
    expected = experts(hidden, index, weights)
    torch.testing.assert_close(expert_by_expert(experts, hidden, index, weights), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, False)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_of_both_matrices_of_an_expert_are_quantized(implementation, bits, symmetric):
    model = moe("mixtral", implementation)
    qat.quantize_model(model, qat.QuantConfig(bits=2, activation_bits=bits, activation_symmetric=symmetric))
    experts = experts_of(model)
    hidden, weights = normal(6, 8, seed=5, dtype=torch.float32), normal(6, 2, seed=6, dtype=torch.float32).softmax(-1)
    index = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 0], [2, 0]])

    def activated(x):
        return quantize_activations(x, bits, symmetric=symmetric)

    expected = torch.zeros_like(hidden)
    for token in range(6):
        for place in range(2):
            expert = index[token, place]
            gate, up = F.linear(activated(hidden[token]), experts.gate_up_proj()[expert]).chunk(2)
            out = F.linear(activated(F.silu(gate) * up), experts.down_proj()[expert])
            expected[token] += weights[token, place] * out
    torch.testing.assert_close(experts(hidden, index, weights), expected, rtol=1e-4, atol=1e-6)


def test_experts_whose_gate_is_in_line_are_named():
    report = qat.quantize_model(moe("llama4", None), qat.QuantConfig(bits=4, activation_bits=8))
    assert "Llama4TextExperts: its inputs are quantized, those of its second matrix are not" in report.notes


def test_noise_resets_and_telemetry_reach_the_experts():
    model = moe()
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    layer = experts_of(model).down_proj
    with torch.no_grad():
        layer.scale.mul_(0.7)
    telemetry = Telemetry(model)
    winq = qat.WinQ(qat.WinQConfig(every=1, alpha=0.4, sigma=0.05))
    loss, before = model(**BATCH).loss, layer.weight.detach().clone()
    winq.start(model, 2)
    assert torch.equal(model(**BATCH).loss, loss), "no noise in evaluation mode"
    model.train()
    assert not torch.equal(model(**BATCH).loss, loss)
    model.eval()
    winq.step(1)
    winq.stop()
    assert torch.equal(model(**BATCH).loss, loss), "a reset changes no code"
    torch.testing.assert_close(layer.weight.detach(), before + 0.4 * (layer.quantized_weight().detach() - before))
    assert telemetry.measure()["flip_rate"] == 0
    with torch.no_grad():
        layer.weight.neg_()
    measured = telemetry.measure()
    shares = layer.weight.numel() / sum(one.weight.numel() for _, one in qat.quant_layers(model))
    assert 0 < measured["flip_rate"] <= shares


def test_copies_pickles_and_state_dicts():
    model, other = moe(), moe(seed=1)
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    qat.quantize_model(other, qat.QuantConfig(bits=2))
    logits = model(**BATCH).logits
    copied = copy.deepcopy(model)
    assert type(experts_of(copied)) is type(experts_of(model))
    assert experts_of(copied).gate_up_proj.weight is not experts_of(model).gate_up_proj.weight
    assert torch.equal(copied(**BATCH).logits, logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**BATCH).logits, logits)
    assert not torch.equal(other(**BATCH).logits, logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**BATCH).logits, logits)
    with torch.no_grad():
        values = {name: parameter + 1 for name, parameter in model.named_parameters()}
    assert not torch.equal(functional_call(model, values, (), BATCH).logits, logits)


def test_sixteen_bit_experts_get_float32_latents_and_keep_their_dtype():
    model = moe(dtype=torch.bfloat16)
    report = qat.quantize_model(model, qat.QuantConfig(bits=2))
    assert "model.layers.0.mlp.experts.down_proj" in report.upcast
    layer = experts_of(model).down_proj
    assert layer.weight.dtype == layer.scale.dtype == torch.float32
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        output = model(**BATCH)
        assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_compile_whole(implementation):
    model = moe("mixtral", implementation)
    qat.quantize_model(model, qat.QuantConfig(bits=2, activation_bits=8))
    experts = experts_of(model)
    hidden, index = normal(6, 8, seed=5, dtype=torch.float32), torch.tensor([[0, 1]] * 6)
    weights = torch.full((6, 2), 0.5)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, index, weights), experts(hidden, index, weights))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_spectra_of_experts(implementation):
    """The quantized mode against the plain model at Q(W), symmetry in every mode; float64 in each implementation."""
    plain = moe("mixtral", implementation, dtype=torch.float64)
    model = copy.deepcopy(plain)
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    names = [name for name in weight_names(model) if "experts" in name]
    twin = plain_twin(model, plain)
    twin.set_experts_implementation("eager")  # torch has no grouped product in float64
    expected = HessianOperator(twin, [BATCH], params=[name.removesuffix(".weight") for name in names])
    found = qat.hessian_operator(model, [BATCH], "quantized", params=names)
    vector = normal(found.shape[0], seed=7)
    assert relative_error(found @ vector, expected @ vector) < 1e-6  # transformers' own float32 inside
    for mode in qat.MODES:
        operator = qat.hessian_operator(model, [BATCH], mode, params=names, sigma=1e-2, draws=1)
        assert (operator @ vector).norm() > 0
        assert operator.symmetry_gap() < 1e-5
    mask = torch.cat([layer.mask().reshape(-1) for name, layer in qat.quant_layers(model) if "experts" in name])
    assert not (qat.hessian_operator(model, [BATCH], "ste", params=names) @ vector)[~mask].any()


def test_the_ranking_of_layers_includes_experts():
    ranking = qat.sensitivity(moe(), [BATCH], qat.QuantConfig(bits=2), probes=2)
    names = {block.name for block in ranking.blocks}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert "model.layers.0.self_attn.q_proj.weight" in names


def test_globs_leave_experts_or_one_of_their_matrices():
    report = qat.quantize_model(moe(), qat.QuantConfig(bits=2, skip="*.mlp.experts"))
    assert report.skipped["model.layers.0.mlp.experts"] == "skip glob '*.mlp.experts'"
    assert not any("experts" in name for name in report.swapped)
    report = qat.quantize_model(moe(), qat.QuantConfig(bits=2, skip="*.down_proj"))
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "skip glob '*.down_proj'"
    assert "model.layers.0.mlp.experts.gate_up_proj" in report.swapped


# -- attention of torch


def attention(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 5}, {"add_bias_kv": True}])
@pytest.mark.parametrize("gradients", [True, False])
def test_attention_computes_with_quantized_weights(options, gradients):
    plain = attention(**options)
    model = copy.deepcopy(plain)
    report = qat.quantize_model(model, qat.QuantConfig(bits=2))
    twin = plain_twin(model, plain)
    query = normal(2, 5, 8, seed=1, dtype=torch.float32)
    key = normal(2, 4, 6, seed=2, dtype=torch.float32) if "kdim" in options else query
    value = normal(2, 4, 5, seed=3, dtype=torch.float32) if "kdim" in options else query
    with torch.set_grad_enabled(gradients):  # without them torch takes its fused path
        for found, expected in zip(model(query, key, value), twin(query, key, value), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    projections = 4 if "kdim" in options else 2
    assert len(report.swapped) == projections
    assert report.skipped == {}
    assert report.weight_count == sum(layer.weight.numel() for _, layer in qat.quant_layers(model))


def test_attention_quantizes_its_inputs_and_says_what_it_does_not():
    plain = attention()
    model = nn.ModuleDict({"attention": copy.deepcopy(plain)})
    report = qat.quantize_model(model, qat.QuantConfig(bits=4, activation_bits=4))
    assert any("output projection" in note for note in report.notes)
    twin = plain_twin(model, nn.ModuleDict({"attention": plain}))["attention"]
    x = normal(2, 5, 8, seed=1, dtype=torch.float32)
    quantized = quantize_activations(x, 4)
    for found, expected in zip(model["attention"](x, x, x), twin(quantized, quantized, quantized), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
def test_the_encoder_of_torch(options):
    """Padding, in training and evaluation, with and without gradients: the fused paths read weights past the layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first", False)).eval()
    model = copy.deepcopy(plain)
    report = qat.quantize_model(model, qat.QuantConfig(bits=2))
    assert report.skipped == {}
    assert len(report.swapped) == 8
    twin = plain_twin(model, plain)
    x, padding = normal(3, 6, 8, seed=1, dtype=torch.float32), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    kept = ~padding
    for training in (False, True):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                found = model.train(training)(x, src_key_padding_mask=padding)
                expected = twin.train(training)(x, src_key_padding_mask=padding)
            torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)
    model(x).square().sum().backward()
    assert all(one.weight.grad is not None and one.weight.grad.any() for _, one in qat.quant_layers(model))


def test_spectra_of_attention():
    plain = attention().double()
    model = copy.deepcopy(plain)
    qat.quantize_model(model, qat.QuantConfig(bits=2))

    class Loss(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    data = [(normal(2, 5, 8, seed=1), normal(2, 5, 8, seed=2))]
    found = qat.hessian_operator(Loss(model), data, "quantized", loss=nn.MSELoss())
    expected = HessianOperator(
        Loss(plain_twin(model, plain)),
        data,
        loss=nn.MSELoss(),
        params=["inner.in_proj_weight", "inner.out_proj.weight"],
    )
    vector = normal(found.shape[0], seed=3)
    assert relative_error(found @ vector, expected @ vector) < 1e-12
    assert all(qat.hessian_operator(Loss(model), data, mode, sigma=0.01).symmetry_gap() < 1e-12 for mode in qat.MODES)


def test_a_subclass_of_attention_is_left():
    class Own(nn.MultiheadAttention):
        pass

    report = qat.quantize_model(nn.ModuleDict({"a": Own(8, 2), "b": nn.Linear(8, 8)}), qat.QuantConfig(bits=2))
    assert report.swapped == ("b",)
    assert set(report.skipped) == {"a", "a.out_proj"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [16, 8])
def test_the_report_says_which_implementation_gets_the_quantized_experts(implementation, bits):
    notes = qat.quantize_model(moe("mixtral", implementation), qat.QuantConfig(bits=2, activation_bits=bits)).notes
    (note,) = [note for note in notes if note.startswith("MixtralExperts: ")]
    assert f"experts_implementation={implementation!r} gets quantized experts" in note
    assert ("in a loop over experts" in note) == (implementation == "eager" and bits == 8)


@pytest.mark.parametrize(("activation_bits", "compiled"), [(16, False), (8, False), (16, True)])
def test_a_kernel_that_somebody_registers_gets_quantized_weights(activation_bits, compiled, monkeypatch):
    """One that fuses the gate into its products, as sonicmoe does: without quantized activations it is used."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    seen = []

    def fused(self, hidden_states, top_k_index, top_k_weights):
        seen.append((self.gate_up_proj, self.down_proj))
        return expert_by_expert(self, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "fused", fused)
    model = moe("mixtral")
    qat.quantize_model(model, qat.QuantConfig(bits=2, activation_bits=activation_bits))
    expected = model(**BATCH).logits
    model.set_experts_implementation("fused")
    run = torch.compile(model, backend="eager") if compiled else model
    torch.testing.assert_close(run(**BATCH).logits, expected)
    assert len(seen) == (activation_bits == 16)
    experts = experts_of(model)
    for weights in seen:
        assert torch.equal(weights[0], experts.get_submodule("gate_up_proj").quantized_weight().reshape(4, 32, 8))
        assert not torch.equal(weights[1], experts.get_submodule("down_proj").weight)
    torch._dynamo.reset()
