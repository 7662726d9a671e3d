"""The full-precision model to start from: a small Llama trained here once, or any causal LM by name or folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from qat.study.config import SmallLlamaConfig
from qat.text.cache import cache_key, cached_folder
from qat.text.corpus import Blocks, Text, trained_tokenizer
from qat.text.hub import offline_unless_reachable
from qat.training.config import TrainConfig
from spectra.backend.errors import InputError
from spectra.integrations.loading import longest_sequence, quiet_transformers

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
)
TRAINED_TOKENIZER = "train"  # --tokenizer train


def small_llama(vocabulary_size: int, config: SmallLlamaConfig | None = None) -> nn.Module:
    """An untrained `LlamaForCausalLM` with tied embeddings, its weights drawn from config.seed."""
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
    text: Text, tokenizer, config: SmallLlamaConfig | None = None, *, say: Callable[[str], None] = print
) -> nn.Module:
    """The small Llama after full-precision training on this text, from the cache when it was trained before.

    Raises InputError when the text has fewer tokens than one batch needs, or the cache cannot be written.
    """
    from transformers import AutoModelForCausalLM

    from qat.text.corpus import make_blocks
    from qat.training.train import train

    small = config or SmallLlamaConfig()

    def make(folder: Path) -> None:
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
    return AutoModelForCausalLM.from_pretrained(cached_folder(f"small-llama-{key}", make), dtype=torch.float32)


def load_model(name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """A causal LM from a folder or from the hub, in float32 and evaluation mode. Raises InputError in one line."""
    from transformers import AutoModelForCausalLM

    _check_folder(name)
    model, found = _load(
        AutoModelForCausalLM.from_pretrained,
        "model",
        name,
        "--model",
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"the checkpoint {name} lacks {len(missing)} of the model's weights, {missing[0]} among them: "
            "give the checkpoint of a whole causal language model"
        )
    return model


def load_tokenizer(name: str, *, trust_remote_code: bool = False):
    """The tokenizer in a folder or on the hub. Raises InputError in one line, also for one that makes no tokens."""
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        # transformers makes an empty tokenizer for some architectures here, and says nothing
        raise InputError(
            f"the folder {name} holds no tokenizer: give --tokenizer NAME_OR_FOLDER, "
            f"or --tokenizer {TRAINED_TOKENIZER} for one trained on the text"
        )
    tokenizer = _load(
        AutoTokenizer.from_pretrained, "tokenizer", name, "--tokenizer", trust_remote_code=trust_remote_code
    )
    if not tokenizer("a text to try", add_special_tokens=False)["input_ids"]:
        raise InputError(f"the tokenizer of {name} makes no tokens of a text: give another with --tokenizer")
    return tokenizer


def tokenizer_for(model: nn.Module, name: str, text: Text, *, tokenizer: str | None, trust_remote_code: bool = False):
    """The model's own tokenizer, or the one asked for; "train" trains one on the text that the model has room for."""
    if tokenizer == TRAINED_TOKENIZER:
        return trained_tokenizer(text, min(SmallLlamaConfig.vocabulary_size, vocabulary_size(model)))
    return load_tokenizer(tokenizer or name, trust_remote_code=trust_remote_code)


def vocabulary_size(model: nn.Module) -> int:
    """How many token ids the model's input embeddings know."""
    return model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]


def check_fit(model: nn.Module, blocks: Blocks, *, hint: str = "give the tokenizer it was trained with") -> None:
    """Raise InputError when blocks have token ids, or a length, that the model has no embeddings for."""
    largest, known = int(blocks.blocks.max()), vocabulary_size(model)
    if largest >= known:
        raise InputError(
            f"the tokenizer gives token {largest} and the model knows {known} tokens (0 to {known - 1}): {hint}"
        )
    longest = longest_sequence(model)  # type: ignore[arg-type]
    if longest is not None and blocks.length > longest:
        raise InputError(
            f"the model takes sequences of at most {longest} tokens, got --length {blocks.length}: lower it"
        )


def _check_folder(name: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"the folder {name} holds no config.json, so no model: give one made by save_pretrained")
    elif folder.exists():
        raise InputError(f"--model wants a folder or a hub name and {name} is a file: give the folder it is in")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise InputError(f"there is no model folder {name}: check the path given to --model")


def _load(load: Callable, what: str, name: str, option: str, **options):
    with quiet_transformers(), offline_unless_reachable() as reachable:
        local = Path(name).expanduser()
        try:
            return load(str(local) if local.is_dir() else name, **options)
        except Exception as error:  # transformers raises all kinds here, with many lines each
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if local.is_dir():
                hint = f"check what is in the folder, or give another {option}"
            elif reachable:
                hint = f"check the name, or give a folder to {option}"
            else:
                reason = "it is no folder here and there is no network to fetch it"
                hint = f"give a folder to {option}"
            raise InputError(f"the {what} {name!r} could not be loaded ({reason}): {hint}") from error
