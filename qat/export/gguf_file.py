"""GGUF files, as llama.cpp reads them: names of tensors, metadata, and the grid of the weights in block types.

Names and metadata keys are those that llama.cpp's convert_hf_to_gguf.py writes; the `gguf` package has the tables.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.export.gguf_blocks import BLOCK_TYPES, choose_type, encode, read_q1_0
from qat.export.gguf_vocabulary import add_vocabulary
from qat.export.grid import Grid, check_weights_alone, grid_of
from qat.layers.linear import QuantEmbedding, QuantLinear, quant_layers
from spectra.backend.errors import InputError
from spectra.backend.extras import need

FILE = "model.gguf"
# transformers' model type -> the architecture of llama.cpp.
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gpt2": "GPT2"}
ACTIVATIONS = {"gpt2": ("gelu_new", "gelu_pytorch_tanh")}
LARGEST_FLOAT16 = 65504.0
LARGEST_DIFFERENCE = 2.0**-10  # of a matrix that is read back, over its norm; rounding of normal scales is 2^-11


@dataclass(frozen=True)
class _Stored:
    """A tensor as it stands in the file: its values or blocks, and the name of its type."""

    data: np.ndarray
    kind: str


def write_gguf(model: Any, source: Path, out: Path) -> dict[str, Any]:
    """Write model.gguf.

    Args:
        model: A quantized model of transformers, on the CPU.
        source: The folder it came from, where its tokenizer is.
        out: The folder, which is there.

    Returns:
        What the command says: how many quantized matrices have each block type, the largest relative change of a
        scale by its float16 rounding, and the largest difference of a matrix that is read back from Q(W).

    Raises:
        InputError: llama.cpp would compute something else: another architecture, settings or tokenizer it lacks, a
            grid that no block type holds, or scales that float16 is too coarse for.
    """
    need("gguf")
    import gguf

    config = model.config
    _check_architecture(model)
    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(out / FILE, gguf.MODEL_ARCH_NAMES[architecture])
    rope_factors = _add_metadata(writer, model, source)
    vocabulary = add_vocabulary(writer, source, config.vocab_size)
    grids = {name: _permuted_grid(name, grid_of(name, layer), config) for name, layer in quant_layers(model)}
    counts: Counter[str] = Counter()
    error, written = 0.0, {}
    tied = _tied_head(model)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    for name, tensor in model.state_dict().items():
        module, _, own = name.rpartition(".")
        if module == tied or (own == "scale" and module in grids) or name.endswith((".attn.bias", ".masked_bias")):
            continue
        stored_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored_name is None:
            raise InputError(f"GGUF has no name for {name} of {type(model).__name__}: use --format packed")
        if module in grids and own == "weight":
            stored, rounding = _blocks(module, grids[module])
            counts[stored.kind] += 1
            error = max(error, rounding)
            written[stored_name] = module, grids[module]
        else:
            turned = tensor.t() if config.model_type == "gpt2" and ".h." in name and tensor.dim() == 2 else tensor
            stored = _full_precision(_permuted(name, turned.detach(), config))  # Conv1D's weights are (in, out)
        writer.add_tensor(stored_name, stored.data, raw_dtype=gguf.GGMLQuantizationType[stored.kind])
    _add_file_type(writer, counts, gguf)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    difference = _read_back(out / FILE, written, gguf)
    return {
        "file": FILE,
        "block_types": dict(counts),
        "largest_scale_rounding": error,
        "read_back_difference": difference,
        "vocabulary": vocabulary,
    }


def _read_back(path: Path, written: dict[str, tuple[str, Grid]], gguf: Any) -> float:
    """The largest ||stored - Q(W)|| / ||Q(W)|| of a quantized matrix, read from the finished file.

    Rows are compared in the order of the file, which is llama.cpp's. Raises InputError where a matrix differs by more
    than the rounding of normal float16 scales.
    """
    largest = 0.0
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name not in written:
            continue
        name, grid = written[tensor.name]
        one_bit = tensor.tensor_type.name == "Q1_0"
        stored = read_q1_0(tensor.data) if one_bit else gguf.dequantize(tensor.data, tensor.tensor_type)
        wanted = (grid.scales() * grid.integers).numpy()
        norm = float(np.linalg.norm(wanted.astype(np.float64)))
        difference = float(np.linalg.norm(stored.astype(np.float64) - wanted)) / (norm or 1.0)
        if not difference <= LARGEST_DIFFERENCE:
            smallest = float(grid.scale.min())
            raise InputError(
                f"{name} read back from the file differs from Q(W) by {difference:.1%} of its norm (its smallest scale "
                f"is {smallest:.1e}, and float16 is coarse below 6.1e-05): use --format packed"
            )
        largest = max(largest, difference)
    return largest


def _check_architecture(model: nn.Module) -> None:
    """Raises InputError for a model that llama.cpp would compute otherwise."""
    config: Any = model.config
    kind = config.model_type
    if kind not in ARCHITECTURES or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise InputError(
            f"--format gguf covers causal language models of the families {', '.join(ARCHITECTURES)}; this one is "
            f"{type(model).__name__} ({kind}): use --format packed"
        )
    activation = getattr(config, "activation_function", None) or config.hidden_act
    if activation not in ACTIVATIONS.get(kind, ("silu",)):
        raise InputError(f"llama.cpp has no {kind} model with the activation {activation}: use --format packed")
    if getattr(config, "use_sliding_window", False) or getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError(f"llama.cpp has no {kind} model with this attention: use --format packed")
    if not getattr(config, "scale_attn_weights", True) or getattr(config, "add_cross_attention", False):
        raise InputError(f"llama.cpp has no {kind} model with this attention: use --format packed")
    check_weights_alone(model, "GGUF")
    for name, layer in quant_layers(model):
        if type(layer) not in (QuantLinear, QuantEmbedding):
            raise InputError(f"--format gguf does not cover {name}, a {type(layer).__name__}: use --format packed")


def _add_metadata(writer: Any, model: Any, source: Path) -> np.ndarray | None:
    """Add what llama.cpp needs to know; returns what rotary frequencies are divided by, None where it is 1."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size
    inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None) or 4 * width
    writer.add_name(source.resolve().name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return None
    head_width = getattr(config, "head_dim", None) or width // heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    return _add_rope(writer, model, head_width)


def _add_rope(writer: Any, model: Any, head_width: int) -> np.ndarray | None:
    """Add the base of the rotary frequencies; returns what they are divided by, None where it is 1."""
    settings = model.config.rope_parameters
    kind = settings.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3") or settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"--format gguf does not cover rotary embeddings of the type {kind}: use --format packed")
    base = settings["rope_theta"]
    writer.add_rope_freq_base(base)
    plain = 1.0 / base ** (torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    factors = plain / model.base_model.rotary_emb.inv_freq.double().cpu()
    return None if kind == "default" else factors.float().numpy()


def _blocks(name: str, grid: Grid) -> tuple[_Stored, float]:
    """A quantized matrix in blocks, and the largest relative change of a scale that is used."""
    scale = grid.scale.numpy()
    if scale.max() > LARGEST_FLOAT16:
        raise InputError(f"a scale of {name} is {scale.max():g}, above the largest float16: use --format packed")
    kind = choose_type(grid.levels, grid.integers.shape[1], grid.group)
    if kind is None:
        needed = min(kind.block for kind in BLOCK_TYPES)
        if not any(kind.holds(grid.levels) for kind in BLOCK_TYPES):
            raise InputError(
                f"the weights of {name} are integers from {min(grid.levels)} to {max(grid.levels)} times a scale, and "
                "GGUF's blocks hold -128 to 127 at most: use --format packed"
            )
        raise InputError(
            f"{name} has {grid.integers.shape[1]} columns in groups of {grid.group}, and GGUF's blocks are {needed} "
            "weights or more with one scale: use --format packed"
        )
    used = (grid.integers.view(len(scale), scale.shape[1], -1) != 0).any(dim=2).numpy()
    rounding = np.abs(scale.astype(np.float16).astype(np.float32) - scale) / scale
    blocks = encode(kind, grid.integers.numpy(), grid.scales().numpy())
    return _Stored(blocks, kind.name), float(rounding[used].max(initial=0.0))


def _full_precision(tensor: Tensor) -> _Stored:
    """A tensor that is not quantized: matrices of 16 bits stay so, all else is float32, as llama.cpp expects."""
    if tensor.dim() >= 2 and tensor.dtype == torch.float16:
        return _Stored(tensor.numpy(), "F16")
    if tensor.dim() >= 2 and tensor.dtype == torch.bfloat16:
        return _Stored(tensor.contiguous().view(torch.int16).numpy().view(np.uint8), "BF16")
    return _Stored(tensor.float().contiguous().numpy(), "F32")


def _permuted_grid(module: str, grid: Grid, config: Any) -> Grid:
    """The grid with its rows in llama.cpp's order."""
    name = f"{module}.weight"
    return Grid(_permuted(name, grid.integers, config), _permuted(name, grid.scale, config), grid.levels)


def _permuted(name: str, tensor: Tensor, config: Any) -> Tensor:
    """The rows of queries and keys in the order of llama.cpp's Llama, which rotates neighbours and not halves.

    Other tensors and architectures are left as they are.
    """
    own = name.split(".")[-2] if "." in name else name
    if config.model_type != "llama" or own not in ("q_proj", "k_proj"):
        return tensor
    heads = config.num_attention_heads if own == "q_proj" else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _tied_head(model: Any) -> str | None:
    """The name of an output head that computes with the matrix of the embeddings; llama.cpp takes theirs then."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    same_weight = head is not None and head.weight is table.weight
    if not same_weight or isinstance(head, QuantLinear) != isinstance(table, QuantEmbedding):
        return None
    return next(name for name, module in model.named_modules() if module is head)


def _add_file_type(writer: Any, counts: Counter[str], gguf: Any) -> None:
    """Add the name of the commonest type, which llama.cpp shows."""
    commonest = counts.most_common(1)[0][0].replace("Q3_K", "Q3_K_M")
    kind = getattr(gguf.LlamaFileType, f"MOSTLY_{commonest}", gguf.LlamaFileType.ALL_F32)
    writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
