"""What kind of model a checkpoint holds, and so which loss and which data it is measured with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from spectra.backend.errors import InputError

# Heads other than those of language models: BertForTokenClassification, but not LlamaForCausalLM.
OTHER_HEAD = re.compile(r"For(?!CausalLM$|ConditionalGeneration$)[A-Z]\w*$")


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        what: The kind with its article.
        auto_class: The class of transformers that loads it; "" for the one that its config.json names.
        data: The data that its own loss needs: "text", "labelled" or "images".
    """

    what: str
    auto_class: str
    data: str


CAUSAL = Kind("a causal language model", "AutoModelForCausalLM", "text")
MASKED = Kind("a masked language model", "AutoModelForMaskedLM", "text")
SEQUENCE = Kind("a sequence classifier", "AutoModelForSequenceClassification", "labelled")
IMAGE = Kind("an image classifier", "AutoModelForImageClassification", "images")
OTHER = Kind("a model", "", "text")  # without a loss that could be guessed
HEADS = {"ForMaskedLM": MASKED, "ForSequenceClassification": SEQUENCE, "ForImageClassification": IMAGE}


def architecture_of(config: Any) -> str:
    """The class that a config.json names, "" where it names none."""
    return (getattr(config, "architectures", None) or [""])[0]


def kind_of(config: Any) -> Kind:
    """The kind of model that a transformers config describes.

    Args:
        config: The config.

    Returns:
        The kind; OTHER where no loss belongs to the class that it names.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_CLASSES
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_CLASSES

    name, family = architecture_of(config), getattr(config, "model_type", "")
    for head, kind in HEADS.items():
        if name.endswith(head):
            return kind
    brings_its_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if brings_its_own or name.endswith(("ForCausalLM", "LMHeadModel")) or name in CAUSAL_CLASSES.values():
        return CAUSAL
    if name in MASKED_CLASSES.values() and not getattr(config, "is_encoder_decoder", False):
        return MASKED
    if not name and family in CAUSAL_CLASSES:
        encoder = family in MASKED_CLASSES and not getattr(config, "is_decoder", False)
        return OTHER if encoder else CAUSAL
    return OTHER


def refuse_another_kind(config: Any, name: str, wanted: Kind) -> None:
    """Refuse a checkpoint whose head is not that of a language model, where one is wanted.

    transformers would make a language model of it, with a head that nobody trained or in a form that nobody trains.

    Args:
        config: Its config.
        name: What messages call it.
        wanted: The kind that is wanted.

    Raises:
        InputError: If the class that its config.json names has another head.
    """
    found = architecture_of(config)
    if wanted is CAUSAL and OTHER_HEAD.search(found):
        kind = kind_of(config)
        named = f"{found}, {kind.what}" if kind is not OTHER else found
        raise InputError(f"expected {wanted.what} in {name}, but its config.json names {named}: give another model")


def without_a_loss(config: Any, name: str) -> InputError:
    """The error for a model of whose class no loss is known."""
    found = architecture_of(config)
    what = f"a {found}" if found else f"of the family {getattr(config, 'model_type', '')!r} and names no class"
    return InputError(
        f"{name} is {what}, which has no loss that could be guessed (known: causal and masked language models, "
        "sequence and image classifiers): give its loss with --loss module:function, or measure it in Python with "
        "spectra.HessianOperator(model, batches, loss=...)"
    )
