"""`qat export`: a folder of a trained model in another format."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.export.load import load
from qat.layers.linear import distinct_quant_layers
from spectra.backend.errors import InputError

FORMATS = ("packed", "torchao", "gguf")
# What belongs to the tokenizer in a folder of transformers, besides *.model.
COMPANIONS = frozenset(
    (
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "tekken.json"),
    )
)


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        out: The folder.
        format: "packed", "torchao" or "gguf".
        weights: Quantized weights, tied ones once.
        bytes: The size of all files.
        facts: What else is to be said, by name.
    """

    out: str
    format: str
    weights: int
    bytes: int
    facts: dict[str, Any]


def export(folder: str | Path, out: str | Path, *, format: str, trust_remote_code: bool = False) -> Exported:
    """Write a trained model in another format, with its tokenizer.

    Args:
        folder: What `save_pretrained` of a quantized model or `qat train` wrote.
        out: The folder to make.
        format: "packed", "torchao" or "gguf".
        trust_remote_code: Run the code that the model brings along.

    Returns:
        What was written.

    Raises:
        InputError: The folder holds no quantized model, `out` is not free, or the format does not cover the model.
    """
    if format not in FORMATS:
        raise InputError(f"--format is one of {', '.join(FORMATS)}, got {format!r}")
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already: give --out a new folder")
    model = load(folder, trust_remote_code=trust_remote_code)
    weights = sum(layer.codes().numel() for _, layer in distinct_quant_layers(model))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        facts = _writer(format)(model, folder, made)
        if out.is_dir():
            out.rmdir()
        made.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Exported(str(out), format, weights, size, facts)


def in_words(made: Exported) -> str:
    """One sentence about an export.

    Args:
        made: The export.

    Returns:
        The sentence, with what the format says of itself.
    """
    facts = made.facts
    text = f"written to {made.out}: {made.weights:,} quantized weights as {made.format}, {made.bytes:,} bytes in all"
    if "bits_per_weight" in facts:
        text += f"; {facts['bits_per_weight']:g} bits a weight and {facts['scale_bytes']:,} bytes of scales"
    if "block_types" in facts:
        types = ", ".join(f"{count} {name}" for name, count in facts["block_types"].items())
        text += f"; {types}; float16 changes a scale by {facts['largest_scale_rounding']:.1e} of itself at most"
        text += f", and matrices read back from the file differ by {facts['read_back_difference']:.1e} of their norm"
    if "vocabulary" in facts:
        text += f"; tokenizer: {facts['vocabulary']}"
    if "tensor" in facts:
        text += f"; {facts['tensor']}"
    return text


def _writer(format: str) -> Callable[[Any, Path, Path], dict[str, Any]]:
    """The function that writes a format: (model, source folder, folder to write) -> facts."""
    if format == "packed":
        return _packed
    if format == "gguf":
        from qat.export.gguf_file import write_gguf

        return write_gguf
    from qat.export.torchao_tensors import write_torchao

    return write_torchao


def _packed(model: Any, source: Path, out: Path) -> dict[str, Any]:
    from qat.export.packed import write_packed

    copy_companions(source, out)
    return write_packed(model, out)


def copy_companions(source: Path, out: Path) -> None:
    """Copy the tokenizer, and the code of a model that brings its own."""
    for path in source.iterdir():
        if path.is_file() and (path.name in COMPANIONS or path.suffix in (".py", ".model")):
            shutil.copyfile(path, out / path.name)
