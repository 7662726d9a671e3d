"""A model and what its loss is taken over, from the options of a command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spectra.backend.errors import InputError
from spectra.operators.hessian.precision import COPIES, PRECISIONS

MASKING = ("mask_share", "mask_seed")  # options of masked language models alone
SINCE = ("labelled", "images", "loss", *MASKING)  # options that runs of version 0.1 did not have


@dataclass(frozen=True)
class Inputs:
    """What a command measures.

    Attributes:
        model: The model.
        batches: What its loss is taken over.
        loss: The user's loss, None for the model's own.
        notes: What a reader of the numbers should know.
        facts: What was chosen where an option was left out, by the name of the option.
    """

    model: nn.Module
    batches: list[dict[str, torch.Tensor]]
    loss: Callable[..., Any] | None = None
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is measured, on which data, with which loss."""
    add = parser.add_argument
    add("model", help="a model folder, or a name on the Hugging Face hub")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text in UTF-8 for the loss of a language model; of .jsonl, .csv, .tsv and .parquet the column 'text'",
    )
    data.add_argument(
        "--labelled",
        nargs="+",
        metavar="FILE",
        help="text and label of each row, for a sequence classifier: .jsonl, .csv or .tsv",
    )
    data.add_argument("--images", metavar="DIR", help="images in a folder for each class, for an image classifier")
    add("--params", nargs="+", metavar="GLOB", help='parameters to measure, "*mlp*" (default: all)')
    add("--loss", metavar="MODULE:FUNCTION", help="your loss, a function of (model, batch) or (outputs, batch)")
    add("--sequences", type=int, default=8, help="sequences, rows or images to take, %(default)s by default")
    add("--length", type=int, help="tokens a sequence (default: 256, or the model's longest)")
    add("--batch-size", type=int, default=8, help="sequences a forward pass, %(default)s by default")
    add("--mask-share", type=float, help="tokens that a masked language model predicts (default: .15)")
    add("--mask-seed", type=int, help="which tokens those are (default: 0)")
    add(
        "--dtype",
        choices=PRECISIONS,
        default="float32",
        help="precision of the products; the last two are faster, and the intervals allow for their error",
    )
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--trust-remote-code", action="store_true", help="run the code that a hub model brings")


def check(options: argparse.Namespace) -> None:
    """Raise an InputError for options that cannot be used, whatever the model."""
    for name, smallest in (("sequences", 1), ("batch_size", 1), ("length", 2)):
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise InputError(f"--{name.replace('_', '-')} must be at least {smallest}, got {value}")


def load(options: argparse.Namespace) -> Inputs:
    """The model, its batches and its loss.

    Args:
        options: What the options of `add_options` were parsed to.

    Returns:
        The inputs.

    Raises:
        InputError: If the model cannot be loaded, needs other data than were given, or has no loss of its own.
    """
    from spectra.integrations import architectures, labelled, loading, masked, own_loss, text_files

    loss = None if options.loss is None else own_loss.loss_named(options.loss)
    texts = None if options.text is None else text_files.read_texts(options.text)
    rows = None if options.labelled is None else labelled.read_labelled(options.labelled)
    device = loading.usable_device(options.device)
    config = loading.load_config(options.model, trust_remote_code=options.trust_remote_code)
    kind = architectures.kind_of(config)
    _check_data(options, kind, architectures.architecture_of(config))
    if kind is architectures.OTHER and loss is None:
        raise architectures.without_a_loss(config, options.model)
    loaded: Any = loading.load_model(
        options.model,
        dtype=COPIES.get(options.dtype, torch.float32),
        trust_remote_code=options.trust_remote_code,
        kind=kind,
    )
    model = loaded.to(device)
    sizes = {"sequences": options.sequences, "batch_size": options.batch_size}
    if options.images is not None:
        sizes = {"images": options.sequences, "batch_size": options.batch_size}
        code = options.trust_remote_code
        return Inputs(
            model, labelled.image_batches(model, options.model, options.images, trust_remote_code=code, **sizes), loss
        )
    tokenizer = loading.load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    if rows is not None:
        return Inputs(model, labelled.labelled_batches(model, tokenizer, rows, length=options.length, **sizes), loss)
    if kind is architectures.MASKED:
        share, seed = options.mask_share, options.mask_seed
        facts = {"mask_share": masked.SHARE if share is None else share, "mask_seed": 0 if seed is None else seed}
        batches, note = masked.masked_batches(
            model,
            tokenizer,
            texts or [],
            length=options.length,
            share=facts["mask_share"],
            seed=facts["mask_seed"],
            **sizes,
        )
        return Inputs(model, batches, loss, (note,), {**facts, "length": batches[0]["input_ids"].shape[1]})
    batches = loading.sequence_batches(model, tokenizer, texts or [], length=options.length, **sizes)
    if kind is architectures.OTHER:  # whose loss is the user's, and who knows what labels are
        batches = [{"input_ids": batch["input_ids"]} for batch in batches]
    return Inputs(model, batches, loss, (), {"length": batches[0]["input_ids"].shape[1]})


def _check_data(options: argparse.Namespace, kind: Any, architecture: str) -> None:
    """Raise an InputError where a model's loss needs other data than were given."""
    from spectra.integrations.architectures import MASKED, OTHER
    from spectra.integrations.labelled import FORMS

    given = next(name for name in ("text", "labelled", "images") if getattr(options, name) is not None)
    needed = {
        "text": "text: give --text FILE",
        "labelled": f"text with labels: give --labelled FILE, with {FORMS}",
        "images": "images with classes: give --images DIR, with a folder for each class",
    }
    if given != kind.data and kind is not OTHER:
        raise InputError(f"{options.model} is a {architecture}, {kind.what}, whose loss needs {needed[kind.data]}")
    if kind is not MASKED and any(getattr(options, name) is not None for name in MASKING):
        raise InputError("--mask-share and --mask-seed are for masked language models: leave them out")
