"""quantize_model on plain modules and on every architecture, with tied and untied heads."""

import copy
import subprocess
import sys

import pytest
import torch
from oracles import normal
from tiny_models import causal_lm, mlp, token_batches
from torch import nn

import qat
from qat.layers.config import BITS
from qat.layers.linear import full_precision_names, weight_names
from spectra.backend.errors import InputError

COMMON = {"vocab_size": 24, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
MODERN = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
# Linear layers in the two blocks of each, and the paths of the token embeddings.
ARCHITECTURES = {
    "llama": (14, "model.embed_tokens"),
    "gpt2": (8, "transformer.wte"),
    "qwen3": (14, "model.embed_tokens"),
    "gpt-neox": (8, "gpt_neox.embed_in"),
    "opt": (12, "model.decoder.embed_tokens"),
}
TIES = [(name, tied) for name in ARCHITECTURES for tied in (True, False)]


def build(name, tied, dtype=torch.float32, seed=0):
    import transformers as t

    torch.manual_seed(seed)
    tie = {"tie_word_embeddings": tied}
    match name:
        case "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**COMMON, **MODERN, num_key_value_heads=1, **tie))
        case "gpt2":
            model = t.GPT2LMHeadModel(t.GPT2Config(**COMMON, n_embd=8, n_layer=2, n_head=2, n_positions=16, **tie))
        case "qwen3":
            model = t.Qwen3ForCausalLM(t.Qwen3Config(**COMMON, **MODERN, num_key_value_heads=1, head_dim=4, **tie))
        case "gpt-neox":
            model = t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**COMMON, **MODERN, **tie))
        case "opt":
            shape = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 12, "max_position_embeddings": 16}
            layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
            model = t.OPTForCausalLM(t.OPTConfig(**COMMON, **shape, **layers, **tie))
    return model.to(dtype).eval()


def loss_of(model):
    return model(**token_batches()[0]).loss


def head_of(model):
    """lm_head, or embed_out: GPT-NeoX's goes by either, from one transformers to another."""
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("name", "tied"), TIES)
def test_architectures_by_default(name, tied):
    count, table = ARCHITECTURES[name]
    model = build(name, tied)
    head = head_of(model)
    assert is_tied(model) == tied, "the test is about ties"
    before = dict(model.named_parameters(remove_duplicate=False))
    biases = sum(key.endswith(".bias") for key in before)
    full = loss_of(model)
    report = qat.quantize_model(model, qat.QuantConfig(bits=2))

    layers = qat.quant_layers(model)
    assert len(layers) == len(report.swapped) == count
    assert report.swapped == tuple(key for key, _ in layers)
    assert head not in report.swapped
    assert type(model.get_submodule(head)) is nn.Linear
    assert report.skipped[head] == "output head (quantize_head=False)"
    assert report.skipped[table] == "token embeddings (quantize_embeddings=False)"
    assert report.weight_count == sum(layer.weight.numel() for _, layer in layers)
    after = dict(model.named_parameters(remove_duplicate=False))
    for key, parameter in before.items():
        assert after[key] is parameter, f"{key} must be the same object"
    assert set(after) - set(before) == {f"{key}.scale" for key, _ in layers}
    assert sum(key.endswith(".bias") for key in after) == biases
    assert is_tied(model) == tied
    assert not any(layer.training for _, layer in layers), "the mode is kept"

    loss = loss_of(model)
    assert torch.isfinite(loss)
    assert loss != full
    loss.backward()
    for key, layer in layers:
        assert layer.weight.grad is not None, key
        assert layer.scale.grad is not None, key


@pytest.mark.parametrize(("name", "tied"), TIES)
@pytest.mark.parametrize("bits", [1, 4])
def test_architectures_with_head_and_embeddings(name, tied, bits):
    count, table = ARCHITECTURES[name]
    model = build(name, tied)
    head = head_of(model)
    config = qat.QuantConfig(bits=bits, quantize_head=True, quantize_embeddings=True)
    report = qat.quantize_model(model, config)
    assert {head, table} <= set(report.swapped)
    assert len(report.swapped) == count + 2
    assert isinstance(model.get_output_embeddings(), qat.QuantLinear)
    assert isinstance(model.get_input_embeddings(), qat.QuantEmbedding)
    assert is_tied(model) == tied
    shared = model.get_output_embeddings().scale is model.get_input_embeddings().scale
    assert shared == tied, "tied tables compute with one and the same quantized matrix"
    assert report.weight_count == sum(p.numel() for key, p in model.named_parameters() if key in weight_names(model))
    loss_of(model).backward()
    assert model.get_output_embeddings().scale.grad is not None


@pytest.mark.parametrize(("name", "tied"), TIES)
def test_the_head_alone(name, tied):
    _, table = ARCHITECTURES[name]
    model = build(name, tied)
    head = head_of(model)
    report = qat.quantize_model(model, qat.QuantConfig(bits=4, quantize_head=True))
    assert head in report.swapped
    assert table in report.skipped
    assert isinstance(model.get_output_embeddings(), qat.QuantLinear)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert is_tied(model) == tied
    assert any("tied" in note for note in report.notes) == tied, "a tie to an unquantized use is said"
    loss_of(model).backward()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("gpt2", True), ("opt", False)])
def test_state_dict_round_trip(name, tied, bits):
    config = qat.QuantConfig(bits=bits, quantize_head=True, quantize_embeddings=True)
    model, fresh = build(name, tied), build(name, tied, seed=1)
    qat.quantize_model(model, config)
    with torch.no_grad():
        for _, layer in qat.quant_layers(model):
            layer.scale.mul_(1.1)
    qat.quantize_model(fresh, config)
    assert loss_of(fresh) != loss_of(model)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(loss_of(fresh), loss_of(model))
    assert is_tied(fresh) == tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_save_pretrained_keeps_every_tensor_once(tied, both, tmp_path):
    from safetensors.torch import load_file

    config = qat.QuantConfig(bits=2, quantize_head=both, quantize_embeddings=both)
    model, fresh = build("llama", tied), build("llama", tied, seed=1)
    names = set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
    qat.quantize_model(model, config)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == names, "the plain model's tensors"
    latents = load_file(tmp_path / "quantization" / "latents.safetensors")
    qat.quantize_model(fresh, config)
    missing, unexpected = fresh.load_state_dict({**saved, **latents}, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight", "lm_head.scale"} if tied else set())
    assert torch.equal(loss_of(fresh), loss_of(model))
    if both:
        fresh.tie_weights()
        assert (fresh.get_output_embeddings().scale is fresh.get_input_embeddings().scale) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_models_get_float32_latents_and_keep_their_dtype(tied):
    model = build("llama", tied, dtype=torch.bfloat16)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    report = qat.quantize_model(model, qat.QuantConfig(bits=2))
    assert report.upcast == report.swapped
    assert any("float32" in note for note in report.notes)
    for key, layer in qat.quant_layers(model):
        assert layer.weight.dtype == layer.scale.dtype == torch.float32
        assert torch.equal(layer.weight.detach(), before[f"{key}.weight"].float())
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    output = model(**token_batches()[0])
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(layer.weight.grad.dtype == torch.float32 for _, layer in qat.quant_layers(model))


def test_bfloat16_ties_are_kept_whole_or_refused():
    model = build("llama", True, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"lm_head.weight \(bfloat16\) is tied to model.embed_tokens.weight") as caught:
        qat.quantize_model(model, qat.QuantConfig(bits=2, quantize_head=True))
    assert "\n" not in str(caught.value)
    assert qat.quant_layers(model) == [], "a refusal leaves the model as it was"
    assert model.lm_head.weight.dtype == torch.bfloat16

    qat.quantize_model(model, qat.QuantConfig(bits=2, quantize_head=True, quantize_embeddings=True))
    assert is_tied(model)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.get_input_embeddings()(torch.tensor([[2]])).dtype == torch.bfloat16
    loss_of(model).backward()


def test_float64_models_stay_float64():
    model = causal_lm("llama")
    report = qat.quantize_model(model, qat.QuantConfig(bits=4))
    assert report.upcast == ()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model(**token_batches()[0]).logits.dtype == torch.float64


def test_an_optimizer_built_before_still_moves_the_weights():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    qat.quantize_model(model, qat.QuantConfig(bits=4))
    before = model[0].weight.detach().clone()
    model(normal(5, 4, seed=2)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("bits", BITS)
def test_plain_modules(bits):
    model = mlp()
    report = qat.quantize_model(model, qat.QuantConfig(bits=bits))
    assert report.swapped == ("0", "2")
    assert report.skipped == {}
    assert report.quantizer == qat.QuantConfig(bits=bits).scheme
    assert "2 modules, 42 weights" in str(report)
    assert torch.isfinite(model(normal(3, 4, seed=2))).all()


def test_default_config_is_two_bits():
    model = mlp()
    assert qat.quantize_model(model).bits == 2


def test_a_module_used_twice_is_swapped_in_both_places_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Tanh()), "b": shared, "c": nn.Linear(4, 4)})
    model["c"].weight = shared.weight
    report = qat.quantize_model(model, qat.QuantConfig(bits=4))
    assert model["a"][0] is model["b"]
    assert report.swapped == ("a.0", "c")
    assert model["c"].weight is model["b"].weight
    assert model["c"].scale is model["b"].scale, "modules that share a weight share its scale"
    assert report.weight_count == 16


def test_what_is_not_a_plain_linear_layer_is_left_with_a_reason():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "doubled": Doubled(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "convolution": nn.Conv2d(2, 2, 3),
            "table": nn.Embedding(6, 4),
            "lm_head": nn.Linear(4, 6),
            "norm": nn.LayerNorm(4),
            "empty": nn.Linear(4, 4),
        }
    )
    model["empty"].weight = nn.Parameter(torch.empty(0, 4))
    report = qat.quantize_model(model, qat.QuantConfig(bits=4))
    assert report.swapped == ("plain", "attention.in_proj_weight", "attention.out_proj")
    left = "doubled convolution table lm_head empty"
    assert set(report.skipped) == set(left.split())
    assert "subclass of nn.Linear" in report.skipped["doubled"]
    assert "not a linear layer" in report.skipped["convolution"]
    assert "empty" in report.skipped["empty"]
    assert all(name in str(report) for name in report.skipped)
    model["attention"](*[torch.randn(3, 1, 4)] * 3)


def test_a_layer_tied_to_an_embedding_counts_as_the_head():
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "inner": nn.Linear(4, 4), "decoder": nn.Linear(4, 6)})
    model["decoder"].weight = model["table"].weight
    report = qat.quantize_model(model, qat.QuantConfig(bits=4))
    assert report.swapped == ("inner",)
    assert report.skipped["decoder"] == "output head (quantize_head=False)"


def test_skip_globs():
    model = build("llama", False)
    report = qat.quantize_model(model, qat.QuantConfig(bits=4, skip=("*.mlp.*", "model.layers.1")))
    assert set(report.swapped) == {f"model.layers.0.self_attn.{key}_proj" for key in "qkvo"}
    assert report.skipped["model.layers.0.mlp.up_proj"] == "skip glob '*.mlp.*'"
    assert report.skipped["model.layers.1.self_attn.q_proj"] == "skip glob 'model.layers.1'"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh()), {}, "nothing to quantize"),
        (lambda: nn.Sequential(nn.Embedding(4, 4)), {}, "nothing to quantize .*quantize_embeddings=False"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 3)), {}, "nothing to quantize .*not a linear layer"),
        (mlp, {"skip": "*"}, "nothing to quantize .*skip glob"),
        (mlp, {"skip": "no_such_*"}, "skip glob 'no_such_\\*' matches no module"),
        (mlp, {"quantize_head": True}, "no output head"),
        (mlp, {"quantize_embeddings": True}, "no nn.Embedding"),
        (lambda: nn.Linear(2, 2), {}, "wrap it in nn.Sequential"),
        (lambda: nn.Sequential(nn.Linear(2, 2, device="meta")), {}, "meta device"),
        (
            lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1.0), nn.Linear(4, 4)),
            {"quantize_embeddings": True},
            "no nn.Embedding that can be quantized",
        ),
    ],
)
def test_refusals_are_one_line_and_leave_the_model_alone(model, options, message):
    model = model()
    modules = list(model.modules())
    with pytest.raises(InputError, match=message) as caught:
        qat.quantize_model(model, qat.QuantConfig(bits=4, **options))
    assert "\n" not in str(caught.value)
    assert list(model.modules()) == modules


def test_a_weight_of_another_type_is_left_with_its_type():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[1].weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    report = qat.quantize_model(model, qat.QuantConfig(bits=4))
    assert report.swapped == ("0",)
    assert report.skipped == {"1": "its weight is int8"}


def test_quantizing_twice_is_refused():
    model = mlp()
    qat.quantize_model(model, qat.QuantConfig(bits=4))
    with pytest.raises(InputError, match=r"quantized already \(0 is a QuantLinear\)"):
        qat.quantize_model(model, qat.QuantConfig(bits=2))
    assert {layer.quantizer.bits for _, layer in qat.quant_layers(model)} == {4}


def test_importing_qat_loads_neither_transformers_nor_matplotlib():
    code = (
        "import sys, qat; assert not {'transformers', 'matplotlib'} & set(sys.modules);"
        "import torch; qat.quantize_model(torch.nn.Sequential(torch.nn.Linear(2, 2)));"
        "assert 'transformers' not in sys.modules;"
        "assert issubclass(qat.WinQCallback, sys.modules['transformers'].TrainerCallback);"
        "assert all(getattr(qat, name) is not None for name in qat.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_computes_with_its_quantized_layers_with_and_without_a_graph(padded):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 8)
    mask = (torch.arange(5) >= torch.tensor([5, 4, 3])[:, None]) if padded else None
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    with_graph = model(x, src_key_padding_mask=mask).detach()
    with torch.no_grad():
        without = model(x, src_key_padding_mask=mask)
    real = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
    torch.testing.assert_close(without[real], with_graph[real])


def test_an_output_projection_of_attention_may_be_a_plain_linear_layer():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.out_proj = nn.Linear(8, 8)
    model = nn.ModuleDict({"attention": attention, "last": nn.Linear(8, 3)})
    report = qat.quantize_model(model, qat.QuantConfig(bits=2))
    assert report.swapped == ("attention.in_proj_weight", "attention.out_proj", "last")
    x = torch.randn(2, 5, 8)
    assert torch.isfinite(attention(x, x, x)[0]).all()


class TwoNames(nn.Module):
    """One layer under two names of its parent."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x):
        return self.again(torch.relu(self.first(x)))


def test_a_layer_under_two_names_is_one_quantized_layer():
    model = TwoNames()
    bias = model.first.bias
    qat.quantize_model(model, qat.QuantConfig(bits=2))
    assert model.first is model.again
    assert isinstance(model.again, qat.QuantLinear)
    quantized, x = model.first.quantized_weight(), normal(3, 6, seed=1, dtype=torch.float32)
    expected = nn.functional.linear(torch.relu(nn.functional.linear(x, quantized, bias)), quantized, bias)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "pruning"])
def test_layers_with_a_computed_weight_are_left(how):
    from torch.nn.utils import prune, spectral_norm, weight_norm

    model = mlp(dtype=torch.float32)
    match how:
        case "weight_norm":
            weight_norm(model[0])
        case "spectral_norm":
            spectral_norm(model[0])
        case "pruning":
            prune.l1_unstructured(model[0], "weight", amount=0.5)
    x = normal(3, 4, seed=1, dtype=torch.float32)
    hidden = model.eval()[0](x)
    report = qat.quantize_model(model)
    assert "computed from other parameters" in report.skipped["0"]
    assert report.swapped == ("2",)
    assert torch.equal(model[0](x), hidden)


def test_a_layer_with_a_forward_pass_of_its_own_is_left():
    model = mlp(dtype=torch.float32)
    model[0].forward = lambda x: torch.zeros(len(x), 6)  # as accelerate's dispatch does
    report = qat.quantize_model(model)
    assert report.skipped["0"] == "its forward pass was replaced on this module"
    assert model[0](torch.ones(2, 4)).abs().max() == 0


def test_hooks_of_a_layer_stay():
    model, seen = mlp(dtype=torch.float32), []
    handle = model[0].register_forward_hook(lambda module, given, output: seen.append(type(module).__name__))
    model[0].register_forward_pre_hook(lambda module, given: (2 * given[0],))
    model[0].register_full_backward_hook(lambda module, *gradients: seen.append("backward"))
    qat.quantize_model(model)
    x = normal(3, 4, seed=1, dtype=torch.float32).requires_grad_()
    output = model(x)
    output.sum().backward()
    assert seen == ["QuantLinear", "backward"]
    doubled = nn.functional.linear(2 * x, model[0].quantized_weight(), model[0].bias)
    assert torch.equal(output, model[2](model[1](doubled)))
    handle.remove()
    model(x)
    assert seen == ["QuantLinear", "backward"]


def test_weights_without_a_shape_are_refused():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"0\.weight has no shape yet: run a batch"):
        qat.quantize_model(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantizer", ["auto", "rtn"])
def test_weights_that_are_not_finite_are_refused(value, quantizer):
    model = mlp(dtype=torch.float32)
    with torch.no_grad():
        model[2].weight[1, 2] = value
    with pytest.raises(InputError, match="2 holds NaN or infinity in its weight"):
        qat.quantize_model(model, qat.QuantConfig(bits=2, quantizer=quantizer))
    assert type(model[0]) is nn.Linear
    assert qat.quantize_model(model, qat.QuantConfig(bits=2, quantizer=quantizer, skip="2")).swapped == ("0",)


def test_layers_that_rwkv_rescales_in_place_are_left():
    """In evaluation mode it divides weights by powers of two, which a learned scale would not follow."""
    import transformers as t

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 5, "attention_hidden_size": 8, "intermediate_size": 12}
    plain = t.RwkvForCausalLM(t.RwkvConfig(**COMMON, **shape, rescale_every=2)).train()
    model = copy.deepcopy(plain)
    report = qat.quantize_model(model)
    left = [name for name, reason in report.skipped.items() if reason == "RwkvModel rescales its weight in place"]
    assert len(left) == 10
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, layer in full_precision_names(model).items():
            parameters[name].copy_(layer.quantized_weight())
    tokens = torch.arange(2, 14).reshape(2, 6)
    for mode in (True, False):
        logits = [each.train(mode)(input_ids=tokens, use_cache=False).logits for each in (model, plain)]
        assert torch.equal(*logits)
