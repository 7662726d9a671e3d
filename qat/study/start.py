"""What every run of a study starts from: one full-precision model, one text in blocks, one set of measured batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qat.layers.convert import quantize_model
from qat.study.config import StudyConfig, choose_device
from qat.study.models import check_fit, small_llama, tokenizer_for, trained_small_llama
from qat.text.corpus import Blocks, Text, load_text, make_blocks, trained_tokenizer
from spectra.integrations.loading import load_model, quiet_transformers
from spectra.runs.provenance import fingerprint


@dataclass(frozen=True)
class Start:
    """What every run of a study starts from.

    Attributes:
        model: The full-precision model, in evaluation mode on the CPU.
        tokenizer: The tokenizer of transformers that made the blocks.
        train: Blocks to train on.
        validation: Blocks that a validation loss is taken over.
        batches: Batches that spectra are measured on, on `device`: `input_ids` and `labels`, (sequences, length).
        device: Where runs are trained and measured.
        facts: What the config.json of every run says of model and text.
    """

    model: nn.Module
    tokenizer: Any
    train: Blocks
    validation: Blocks
    batches: list[dict[str, torch.Tensor]]
    device: torch.device
    facts: dict[str, Any]


def prepare(config: StudyConfig, *, say: Callable[[str], None] = print) -> Start:
    """Load text, tokenizer and model, and check that they fit each other before a model is trained.

    Args:
        config: The study's settings.
        say: Told what was found, a line at a time.

    Returns:
        What every run starts from.

    Raises:
        InputError: The text, the tokenizer or the model cannot be used, or do not fit each other.
    """
    text = load_text(config.text, config.dataset)
    small = replace(config.small_llama, length=min(config.length, config.small_llama.length))
    with quiet_transformers():
        if config.model is None:
            tokenizer = trained_tokenizer(text, small.vocabulary_size)
            model = small_llama(len(tokenizer), small)
        else:
            model = load_model(config.model, trust_remote_code=config.trust_remote_code)
            tokenizer = tokenizer_for(
                model, config.model, text, tokenizer=config.tokenizer, trust_remote_code=config.trust_remote_code
            )
        blocks, validation = make_blocks(text, tokenizer, length=config.length, train_blocks=config.train.batch_size)
        for part in (blocks, validation):
            check_fit(model, part)
        quantize_model(copy.deepcopy(model), config.quantization(config.bits[0]))
        say(_description(text, blocks, validation, model))
        if config.model is None:
            model = trained_small_llama(text, tokenizer, small, say=say)
    device = choose_device(config.device)
    facts = {
        "text_source": text.source,
        "model_name": config.model or "small Llama",
        "model_parameters": _parameter_count(model),
        "train_tokens": blocks.blocks.numel(),
        "validation_tokens": validation.blocks.numel(),
        "measured_on": "training sequences",
        "text_fingerprint": fingerprint([blocks.blocks, validation.blocks]),
        "model_fingerprint": fingerprint([tensor.reshape(-1) for tensor in model.state_dict().values()]),
    }
    return Start(
        model=model.eval(),
        tokenizer=tokenizer,
        train=blocks,
        validation=validation.evenly(config.validation_sequences),
        batches=_batches(blocks.evenly(config.measure_sequences), config.train.batch_size, device),
        device=device,
        facts=facts,
    )


def _batches(blocks: Blocks, batch_size: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": rows.to(device), "labels": rows.to(device)} for rows in blocks.blocks.split(batch_size)]


def _description(text: Text, blocks: Blocks, validation: Blocks, model: nn.Module) -> str:
    source = text.source if len(text.source) < 60 else text.source[:57] + "..."
    return (
        f"text: {source}, {blocks.blocks.numel():,} tokens to train on and {validation.blocks.numel():,} to validate; "
        f"model: {type(model).__name__}, {_parameter_count(model):,} parameters"
    )


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
