"""A model and its tokenizer from a folder or the hub, and text cut into batches for them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spectra.backend.errors import InputError, first_line
from spectra.integrations.architectures import CAUSAL, Kind, architecture_of, refuse_another_kind
from spectra.integrations.hub import in_cache, offline_unless_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXCERPTS_FROM = 4_000_000  # characters of texts that are too many to make tokens of them all
CHARACTERS_A_TOKEN = 32  # in an excerpt, far more than a token of ordinary text has
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
CHARACTERS_AT_ONCE = 4_000_000
CONFIG, ADAPTER = "config.json", "adapter_config.json"
MODEL_FILES = (CONFIG,)
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


def load_causal_lm(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a folder or by name from the Hugging Face hub.

    Args:
        name: A folder written by `save_pretrained`, or a name on the hub. A hub name that was used before is found
            in the cache without a network.
        dtype: The dtype of the weights.
        device: Where the model goes; None is the first GPU if there is one, else the CPU.
        trust_remote_code: Run the code that a model brings along.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        InputError: There is no such model, it is no causal language model, it needs code of its own, its checkpoint
            lacks weights, or the device cannot be used.
    """
    target = usable_device(device)
    model: Any = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.to(target), load_tokenizer(name, trust_remote_code=trust_remote_code)


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    kind: Kind = CAUSAL,
) -> PreTrainedModel:
    """A model on the CPU, in evaluation mode, by default a causal language model.

    Args:
        name: A folder or a hub name, as in `load_causal_lm`.
        dtype: The dtype of the weights.
        trust_remote_code: Run the code that a model brings along.
        kind: The kind of model. OTHER takes the class that config.json names.

    Returns:
        The model.

    Raises:
        InputError: There is no such model, it is of another kind, it needs code of its own, or its checkpoint lacks
            weights.
    """
    import transformers

    config = load_config(name, trust_remote_code=trust_remote_code)
    refuse_another_kind(config, str(name), kind)
    own_class = architecture_of(config) if hasattr(transformers, architecture_of(config) or " ") else "AutoModel"
    model, found = from_folder_or_hub(
        getattr(transformers, kind.auto_class or own_class).from_pretrained,
        kind.what,
        str(name),
        files=MODEL_FILES,
        remedy="give a folder written by save_pretrained",
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"the checkpoint {name} lacks {len(missing)} of the model's weights, {missing[0]} among them: "
            f"give the checkpoint of {kind.what.replace(' ', ' whole ', 1).replace('an whole', 'a whole')}"
        )
    return model.eval()


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a model in a folder or on the hub.

    Args:
        name: A folder or a hub name, as in `load_causal_lm`.
        trust_remote_code: Run the code that a model brings along.

    Returns:
        The config.

    Raises:
        InputError: There is no such model, or its config cannot be read.
    """
    from transformers import AutoConfig

    return from_folder_or_hub(
        AutoConfig.from_pretrained,
        "a model",
        str(name),
        files=MODEL_FILES,
        remedy="give a folder written by save_pretrained",
        trust_remote_code=trust_remote_code,
    )


def load_tokenizer(
    name: str | Path, *, trust_remote_code: bool = False, remedy: str = "give a model together with its tokenizer"
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a model on the hub.

    For some architectures transformers silently makes an empty tokenizer where a folder holds none. Such a folder is
    refused, and so is a tokenizer that makes no tokens of a text.

    Args:
        name: A folder or a hub name, as in `load_causal_lm`.
        trust_remote_code: Run the code that a tokenizer brings along.
        remedy: What an error message advises where there is no usable tokenizer.

    Returns:
        The tokenizer.

    Raises:
        InputError: There is no such tokenizer, or it makes no tokens.
    """
    from transformers import AutoTokenizer

    # The code of a custom tokenizer may use any name for its vocabulary.
    files = (*TOKENIZER_FILES, "tokenizer_config.json") if trust_remote_code else TOKENIZER_FILES
    tokenizer = from_folder_or_hub(
        AutoTokenizer.from_pretrained,
        "a tokenizer",
        str(name),
        files=files,
        remedy=remedy,
        trust_remote_code=trust_remote_code,
    )
    if not tokenizer("a text to try", add_special_tokens=False)["input_ids"]:
        raise InputError(f"the tokenizer of {name} makes no tokens of a text: {remedy}")
    return tokenizer


def longest_sequence(model: PreTrainedModel) -> int | None:
    """The most tokens a sequence may have, or None where the model's config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """The tokens of all texts end to end, each text closed by the end-of-text token if the tokenizer has one.

    Args:
        tokenizer: Makes the tokens. No other special tokens are added.
        texts: The texts, each of any length.

    Returns:
        Token ids, int64, of shape (number of tokens,).
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    rows, waiting, characters = [], [], 0
    with quiet_transformers():  # it would warn that the text is longer than the model's longest sequence
        for index, text in enumerate(texts, 1):
            waiting.append(text)
            characters += len(text)
            if characters >= CHARACTERS_AT_ONCE or index == len(texts):  # a fast tokenizer spreads texts over the cores
                rows += [np.array([*ids, *end], dtype=np.int64) for ids in tokenizer(waiting, **options)["input_ids"]]
                waiting, characters = [], 0
    return torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0, dtype=torch.int64)


def sequence_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    sequences: int = 8,
    length: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, torch.Tensor]]:
    """Sequences at equal distances in the texts, as batches with labels. There is no padding.

    The tokens of all texts are joined and cut into pieces of `length`, and `sequences` of the pieces are taken at equal
    distances. Of more than `EXCERPTS_FROM` characters, tokens are made of excerpts at equal distances alone.

    Args:
        model: The model; its longest sequence, its vocabulary and its device matter.
        tokenizer: The tokenizer of the model.
        texts: The texts to cut.
        sequences: How many sequences to take.
        length: Tokens a sequence; None is 256, or the model's longest sequence if that is shorter.
        batch_size: Sequences a batch.

    Returns:
        Batches with `input_ids` and `labels`, both (batch_size, length), the last one possibly smaller, on the
        model's device.

    Raises:
        InputError: The texts are too short, the length is not one for the model, or the tokenizer is another
            model's.
    """
    length = sequence_length(longest_sequence(model), length)
    if batch_size < 1:
        raise InputError(f"expected one sequence or more, got {sequences} in batches of {batch_size}")
    rows = cut_sequences(model, tokenizer, texts, sequences=sequences, length=length).to(model.device)
    return [{"input_ids": part, "labels": part.clone()} for part in rows.split(batch_size)]


def sequence_length(limit: int | None, length: int | None, *, special: int = 0) -> int:
    """Tokens a sequence: the length asked for, or 256, or the model's longest sequence if that is shorter.

    Args:
        limit: The model's longest sequence, None where there is no limit.
        length: The length asked for, None for the default.
        special: How many tokens at its ends say nothing.

    Returns:
        The length.

    Raises:
        InputError: If the length is not one for the model.
    """
    length = min(256, limit or 256) if length is None else length
    if length < 2 + special or (limit is not None and length > limit):
        most = limit or "any number of"
        raise InputError(f"expected a length of {2 + special} to {most} tokens for this model, got {length}")
    return length


def cut_sequences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, sequences: int, length: int
) -> torch.Tensor:
    """Sequences of tokens at equal distances in the texts.

    Args:
        model: The model, whose vocabulary matters.
        tokenizer: The tokenizer of the model.
        texts: The texts to cut.
        sequences: How many sequences to take.
        length: Tokens a sequence.

    Returns:
        Token ids, (sequences, length).

    Raises:
        InputError: The texts are too short, or the tokenizer is another model's.
    """
    if sequences < 1:
        raise InputError(f"expected one sequence or more, got {sequences}")
    excerpts = _excerpts(tokenizer, texts, sequences=sequences, length=length)
    if excerpts is not None:
        refuse_unknown_tokens(model, excerpts)
        return excerpts
    tokens = tokenize(tokenizer, texts)
    whole = len(tokens) // length
    if whole < sequences:
        raise InputError(
            f"the text is too short: {sequences} sequences of {length} tokens need {sequences * length} tokens and it "
            f"has {len(tokens)}: give more text, fewer sequences or a smaller length"
        )
    refuse_unknown_tokens(model, tokens)
    chosen = torch.arange(sequences) * whole // sequences
    return tokens[: whole * length].view(whole, length)[chosen]


def _excerpts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, sequences: int, length: int
) -> torch.Tensor | None:
    """The first tokens of excerpts that begin with a line at equal distances; None where the texts are too short."""
    text = texts[0] if len(texts) == 1 else "\n".join(texts)
    width = CHARACTERS_A_TOKEN * length
    if len(text) < max(EXCERPTS_FROM, 2 * width * sequences):
        return None
    distance = len(text) // sequences
    rows = []
    for start in range(0, distance * sequences, distance):
        line = text.rfind("\n", 0, start) + 1
        start = line if start - line < width else start
        ids = tokenizer(text[start : start + width], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < length:  # hardly text: a run of spaces, say
            return None
        rows.append(ids[:length])
    return torch.tensor(rows, dtype=torch.int64)


def refuse_unknown_tokens(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Raise an InputError where a token is not in the model's vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    if int(tokens.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, but the model knows {vocabulary} tokens: "
            "give a model together with its own tokenizer"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context in which transformers and the hub client write nothing but errors."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        hub.setLevel(hub_level)


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or by default the first GPU if there is one; an InputError if it cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        if reason.startswith("Expected one of cpu"):  # of twenty names, most of them of machines that nobody has
            reason = "give cpu, cuda, or another name that PyTorch knows"
        raise InputError(f"expected a device that PyTorch can use here, got {device!r}: {reason}") from None


def from_folder_or_hub(
    load: Callable[..., Any],
    what: str,
    name: str,
    *,
    files: Sequence[str],
    remedy: str,
    trust_remote_code: bool,
    **options: Any,
) -> Any:
    """Call one of transformers' `from_pretrained` on a folder or a hub name.

    Args:
        load: The function.
        what: What it loads, with an article, for messages.
        name: The folder or the hub name.
        files: Files of which a folder must hold one.
        remedy: What an error message advises where there is none of them.
        trust_remote_code: Run the code that comes along.
        **options: More arguments of the function.

    Returns:
        What the function returns.

    Raises:
        InputError: For whatever it raises, in one line that says what to do.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if (place := _model_elsewhere(folder)) is not None:
            raise InputError(f"expected {what} in {name}, but {place}")
        if not any((folder / file).is_file() for file in files):
            absent = f"no {files[0]}" if len(files) == 1 else "none of its files"
            raise InputError(f"expected {what} in {name}, but the folder holds {absent}: {remedy}")
        with quiet_transformers():
            try:
                return load(str(folder), local_files_only=True, trust_remote_code=trust_remote_code, **options)
            except Exception as error:  # transformers raises a dozen classes for a checkpoint that it cannot read
                raise _explained(error, what, name, trust_remote_code=trust_remote_code) from error
    if name and folder.exists():
        raise InputError(f"expected a model folder or a hub name, but {name} is a file: give the folder it is in")
    if not HUB_NAME.fullmatch(name):
        raise InputError(f"expected a model folder or a hub name, but there is no folder {name!r}: check the path")
    with quiet_transformers(), offline_unless_reachable() as reachable:
        if not reachable and not in_cache(name, (*MODEL_FILES, *files)):
            raise InputError(
                f"expected a folder or a cached model, got {name}: there is no such folder, it is not in the cache, "
                "and there is no network to fetch it (the hub cannot be reached): give a folder"
            )
        try:
            return load(name, local_files_only=not reachable, trust_remote_code=trust_remote_code, **options)
        except Exception as error:
            raise _explained(error, what, name, trust_remote_code=trust_remote_code) from error


def _model_elsewhere(folder: Path) -> str | None:
    """Where the model is that a folder has to do with without holding it; None for every other folder."""
    config = folder / CONFIG
    if (folder / ADAPTER).is_file() and not config.is_file():
        return (
            "it holds a PEFT adapter, not a whole model: merge it into its model, "
            "PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(another folder)"
        )
    inside = folder / "model"
    if (folder / "records.jsonl").is_file() and (inside / CONFIG).is_file():
        return f"it is a run, and its model lies in {inside}: give that folder"
    return None


def _explained(error: Exception, what: str, name: str, *, trust_remote_code: bool) -> InputError:
    """The InputError for an error of transformers, in one line that says what to do next."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes = _causes(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return InputError(f"the hub lets only some users have {name}: ask for access there and log in")
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return InputError(
            f"expected a model folder or a hub name, but there is no folder {name} and no such model on the hub: "
            "check the name"
        )
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return InputError(
            f"{name} comes with code of its own, which is not run unless asked: "
            "read it, then add --trust-remote-code (trust_remote_code=True)"
        )
    return InputError(f"expected {what} in {name}, but it cannot be loaded: {first_line(error)}")


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error, what it was raised from, and so on."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__
    return causes
