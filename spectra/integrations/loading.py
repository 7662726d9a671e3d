"""A language model from a folder or the hub, and text cut into batches for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectra.backend.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_PATIENCE = 5  # seconds to wait for the hub's first answer


def load_causal_lm(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a folder or by its name on the Hugging Face hub.

    The model is in evaluation mode, in `dtype`, on `device` (None: the first GPU if there is one, else the CPU).
    A hub name that was used before is found without a network. Raises InputError where there is no such model, where
    it is not a causal language model, needs code of its own, or its checkpoint lacks some of its weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = _device(device)
    where = {"local_files_only": _find(str(name)), "trust_remote_code": trust_remote_code}
    with quiet_transformers():
        model, found = _load(
            "a causal language model", name, AutoModelForCausalLM, dtype=dtype, output_loading_info=True, **where
        )
        if missing := sorted(found["missing_keys"]):
            raise InputError(
                f"the checkpoint {name} lacks {len(missing)} of the model's weights, {missing[0]} among them: "
                "give the checkpoint of a whole causal language model"
            )
        tokenizer = _load("a tokenizer", name, AutoTokenizer, **where)
    return model.to(target).eval(), tokenizer


def read_texts(files: Sequence[str | Path]) -> list[str]:
    """The text of each file (UTF-8). Raises InputError for one that is missing, empty or not text."""
    texts = []
    for file in map(Path, files):
        if not file.is_file():
            raise InputError(f"expected a text file, but there is no file {file}: check the path")
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"expected UTF-8 text, but byte {error.start} of {file} is not: convert the file first"
            ) from None
        if not text.strip():
            raise InputError(f"expected text, but {file} is empty: give a file with text in it")
        texts.append(text)
    return texts


def longest_sequence(model: PreTrainedModel) -> int | None:
    """The most tokens a sequence may have, or None where the model's config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def sequence_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    sequences: int = 8,
    length: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, torch.Tensor]]:
    """Sequences of `length` tokens, spread evenly over the texts and cut end to end, as batches with labels.

    length: None is 256, or the model's longest sequence if that is shorter. A batch holds input_ids and labels, both
    (at most batch_size, length), on the model's device; padding is not needed. Raises InputError where the texts are
    too short, the length is not one for the model, or the tokenizer is another model's.
    """
    limit = longest_sequence(model)
    length = min(256, limit or 256) if length is None else length
    if length < 2 or (limit is not None and length > limit):
        raise InputError(f"expected a length of 2 to {limit or 'any number of'} tokens for this model, got {length}")
    if sequences < 1 or batch_size < 1:
        raise InputError(f"expected one sequence or more, got {sequences} in batches of {batch_size}")
    tokens = _tokenize(tokenizer, texts)
    whole = len(tokens) // length
    if whole < sequences:
        raise InputError(
            f"the text is too short: {sequences} sequences of {length} tokens need {sequences * length} tokens and it "
            f"has {len(tokens)}: give more text, fewer sequences or a smaller length"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if int(tokens.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())}, but the model knows {vocabulary} tokens: "
            "give a model together with its own tokenizer"
        )
    chosen = torch.arange(sequences) * whole // sequences
    rows = tokens[: whole * length].view(whole, length)[chosen].to(model.device)
    return [{"input_ids": part, "labels": part.clone()} for part in rows.split(batch_size)]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers and the hub client from writing anything but errors; what they were set to comes back."""
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


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"expected a device that PyTorch can use here, got {device!r}: {_first_line(error)}") from None


def _find(name: str) -> bool:
    """Whether `name` is to be read from this machine alone: a folder, or a hub name while the hub does not answer."""
    if name and Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(
                f"expected a model folder, but {name} holds no config.json: give one saved by transformers"
            )
        return True
    if not HUB_NAME.fullmatch(name):
        raise InputError(f"expected a model folder or a hub name, but there is no folder {name!r}: check the path")
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_PATIENCE)  # one try: loading itself would go on trying for half a minute
        return False
    except GatedRepoError:
        raise InputError(f"the hub lets only some users have {name}: ask for access there and log in") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"expected a model folder or a hub name, but there is no folder {name} and no such model on the hub"
        ) from None
    except Exception as error:  # no network, a proxy that refuses, offline mode: each client has its own classes
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
        raise InputError(
            f"expected a folder or a cached model, got {name}: there is no such folder, it is not in the cache, and "
            f"the hub cannot be reached ({_first_line(error)}); give a model folder, or connect to the network"
        ) from None


def _load(what: str, name: str | Path, source: Any, **options: Any) -> Any:
    load: Callable[..., Any] = source.from_pretrained
    try:
        return load(str(name), **options)
    except Exception as error:  # transformers raises a dozen classes for a checkpoint that it cannot read
        if "trust_remote_code" in str(error) and not options["trust_remote_code"]:
            raise InputError(
                f"{name} comes with code of its own, which is not run unless asked: "
                "read it, then add --trust-remote-code (trust_remote_code=True)"
            ) from None
        raise InputError(f"expected {what} in {name}, but it cannot be loaded: {_first_line(error)}") from error


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """The tokens of all texts end to end, each text closed by the end-of-text token if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    with quiet_transformers():  # a text longer than the model's limit is what we want here
        for text in texts:
            tokens += tokenizer(text, add_special_tokens=False)["input_ids"] + end
    return torch.tensor(tokens, dtype=torch.long)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__
