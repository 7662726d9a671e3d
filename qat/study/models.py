"""The full-precision model that a study starts from, and whether a tokenizer and a length fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from qat.study.config import SmallLlamaConfig
from qat.text.cache import cache_key, cached_folder
from qat.text.corpus import Blocks, Text, make_blocks, trained_tokenizer
from qat.training.config import TrainConfig
from spectra.backend.errors import InputError
from spectra.integrations.loading import load_model, load_tokenizer, longest_sequence

TRAINED_TOKENIZER = "train"  # --tokenizer train
TOKENIZER_REMEDY = f"give --tokenizer NAME_OR_FOLDER, or --tokenizer {TRAINED_TOKENIZER} for one trained on the text"


def small_llama(vocabulary_size: int, config: SmallLlamaConfig | None = None) -> nn.Module:
    """An untrained `LlamaForCausalLM` with tied embeddings.

    Args:
        vocabulary_size: How many tokens it knows.
        config: Its size, and the seed of its weights; None for the defaults.

    Returns:
        The model, in float32 on the CPU.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    config = config or SmallLlamaConfig()
    set_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.positions,
            tie_word_embeddings=True,
            initializer_range=config.initializer_range,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def trained_small_llama(
    text: Text, tokenizer: Any, config: SmallLlamaConfig | None = None, *, say: Callable[[str], None] = print
) -> nn.Module:
    """The small Llama after full-precision training on a text. It is trained once and then kept in the cache.

    Args:
        text: What it is trained and validated on.
        tokenizer: Makes the tokens; the model knows as many as it has.
        config: Size and training of the model; None for the defaults.
        say: Told in one line when a model was trained.

    Returns:
        The model in evaluation mode, in float32 on the CPU.

    Raises:
        InputError: The text has fewer tokens than one batch needs, or the cache cannot be written.
    """
    small = config or SmallLlamaConfig()

    def make(folder: Path) -> None:
        from qat.training.train import train

        train_blocks, validation_blocks = make_blocks(text, tokenizer, length=small.length)
        steps = small.steps_for(len(train_blocks))
        settings = TrainConfig(
            steps=steps,
            batch_size=small.batch_size,
            learning_rate=small.learning_rate,
            schedule="cosine",
            warmup=0.05,
            evaluate_every=steps,
            seed=small.seed,
        )
        model = small_llama(len(tokenizer), small)
        result = train(model, train_blocks, validation_blocks.evenly(64), settings, name="full precision")
        say(
            f"trained the full-precision model: {result.steps} steps in {result.seconds:.0f} s, "
            f"validation loss {result.validation_loss:.3f}; kept in the cache"
        )
        model.save_pretrained(folder)  # type: ignore[operator]

    key = cache_key((*text.train, "validation", *text.validation), asdict(small))
    return load_model(cached_folder(f"small-llama-{key}", make))


def tokenizer_for(
    model: nn.Module, name: str, text: Text, *, tokenizer: str | None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a study: the model's own, another, or one trained on the text.

    Args:
        model: Bounds the vocabulary of a trained tokenizer.
        name: The model's folder or hub name, where its own tokenizer is.
        text: What a tokenizer is trained on.
        tokenizer: A folder or hub name; "train" trains one; None is the model's own.
        trust_remote_code: Run the code that a tokenizer brings along.

    Returns:
        A tokenizer of transformers.

    Raises:
        InputError: There is no such tokenizer, or the model knows too few tokens for a trained one.
    """
    if tokenizer == TRAINED_TOKENIZER:
        return trained_tokenizer(text, min(SmallLlamaConfig.vocabulary_size, vocabulary_size(model)))
    return load_tokenizer(tokenizer or name, trust_remote_code=trust_remote_code, remedy=TOKENIZER_REMEDY)


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids the model's input embeddings know."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]


def check_fit(model: nn.Module, blocks: Blocks, *, remedy: str = "give the tokenizer it was trained with") -> None:
    """Check that the model has embeddings for the tokens and the positions of the blocks.

    Args:
        model: A causal language model of transformers.
        blocks: Tokens in blocks.
        remedy: What the message advises where a token is unknown.

    Raises:
        InputError: A token id or the length of a block is too large.
    """
    largest, known = int(blocks.blocks.max()), vocabulary_size(model)
    if largest >= known:
        raise InputError(
            f"the tokenizer gives token {largest} and the model knows {known} tokens (0 to {known - 1}): {remedy}"
        )
    longest = longest_sequence(model)  # type: ignore[arg-type]
    if longest is not None and blocks.length > longest:
        raise InputError(
            f"the model takes sequences of at most {longest} tokens, got --length {blocks.length}: lower it"
        )
