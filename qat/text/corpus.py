"""Text to train on and to validate on: where it comes from, how it is split, and its tokens in blocks."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from qat.text.cache import cache_key, cached_folder
from spectra.backend.errors import InputError, first_line
from spectra.integrations.hub import offline_unless_reachable
from spectra.integrations.loading import tokenize
from spectra.integrations.text_files import read_texts

VALIDATION_SHARE = 0.1
FILES_TO_SPLIT_BY = 10  # with fewer files than this, the last tenth of each is for validation
END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the bytes and the end of text
DATASET_CHARACTERS = 20_000_000  # how much of a dataset on the hub is read
# Installed packages, tests, character tables, generated documentation, and parts that some installations lack.
SKIPPED_FOLDERS = frozenset(
    [
        *("site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "encodings", "pydoc_data"),
        *("idlelib", "lib2to3", "distutils", "tkinter", "turtledemo", "ensurepip", "__phello__"),
    ]
)


@dataclass(frozen=True)
class Text:
    """Documents to train on and documents to validate on.

    Args:
        train: One string a document.
        validation: One string a document.
        source: Where they come from, in words.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    source: str

    @property
    def characters(self) -> int:
        """The number of characters of both parts together."""
        return sum(map(len, self.train)) + sum(map(len, self.validation))


def load_text(files: Sequence[str | Path] = (), dataset: str | None = None) -> Text:
    """The given files, else the dataset of that name on the hub, else the source of Python's standard library.

    Args:
        files: Paths of UTF-8 text files.
        dataset: A name on the Hugging Face hub.

    Returns:
        The text, split into documents to train on and to validate on.

    Raises:
        InputError: Both are given, or what is given cannot be read.
    """
    if files and dataset:
        raise InputError("give text files or a dataset, not both: leave out --text or --dataset")
    if files:
        return read_files(files)
    return read_dataset(dataset) if dataset else standard_library()


def standard_library() -> Text:
    """The source of the running interpreter's standard library, split by file, without its tests and other packages.

    Returns:
        The text; the same on every machine with this version of Python.

    Raises:
        InputError: This Python comes without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = {}
    for path in _python_files(root):
        try:
            document = path.read_bytes().decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if document.strip():
            documents[path.relative_to(root).as_posix()] = document
    if len(documents) < FILES_TO_SPLIT_BY:
        raise InputError(f"this Python has no source of its standard library in {root}: give text with --text FILE")
    train, validation = split_by_file(documents)
    return Text(train, validation, "standard library")


def read_files(files: Sequence[str | Path]) -> Text:
    """Text files. Ten files or more are split by file; with fewer, the last tenth of each is for validation.

    Args:
        files: Paths of UTF-8 text files.

    Returns:
        The text.

    Raises:
        InputError: A file is missing, empty or not UTF-8.
    """
    documents = dict(zip([Path(file).as_posix() for file in files], read_texts(files), strict=True))
    if len(documents) >= FILES_TO_SPLIT_BY:
        train, validation = split_by_file(documents)
    else:
        train, validation = split_by_tail(list(documents.values()))
    return Text(train, validation, ", ".join(documents))


def read_dataset(name: str) -> Text:
    """The text of a dataset on the hub: its train split, and its validation or test split when it has one.

    Args:
        name: The dataset's name on the Hugging Face hub, or a folder that `datasets` can load.

    Returns:
        The text, at most `DATASET_CHARACTERS` characters of it.

    Raises:
        InputError: The dataset cannot be loaded, or it has no column of text.
    """
    import datasets

    with offline_unless_reachable() as reachable:
        try:
            splits: Any = datasets.load_dataset(name)
        except Exception as error:
            hint = "check the name, or give files with --text" if reachable else "no network: give files with --text"
            raise InputError(f"the dataset {name!r} could not be loaded ({first_line(error)}): {hint}") from error
    train_split = splits["train"] if "train" in splits else next(iter(splits.values()))
    train = _text_column(train_split, name, DATASET_CHARACTERS)
    for other in ("validation", "valid", "dev", "test"):
        if other in splits and "train" in splits:
            validation = _text_column(splits[other], name, int(DATASET_CHARACTERS * VALIDATION_SHARE))
            return Text((train,), (validation,), f"dataset {name}")
    return Text(*split_by_tail([train]), f"dataset {name}")


def split_by_file(documents: dict[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split by whole files. Files go to validation in the order of a hash of their path, up to a tenth of the text.

    The order of the files does not matter. If the files are so uneven that none fits, the last tenth of each is for
    validation instead.

    Args:
        documents: The text of each file by its path.

    Returns:
        The documents to train on, and those to validate on.
    """
    total = sum(map(len, documents.values()))
    held_out, taken = set(), 0
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()):
        if taken + len(documents[name]) <= VALIDATION_SHARE * total:
            held_out.add(name)
            taken += len(documents[name])
        if taken >= VALIDATION_SHARE * total / 2:
            break
    if taken < VALIDATION_SHARE * total / 4:
        return split_by_tail(list(documents.values()))
    train = tuple(document for name, document in documents.items() if name not in held_out)
    return train, tuple(document for name, document in documents.items() if name in held_out)


def split_by_tail(documents: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split each document: the first nine tenths to train on, the rest to validate on, cut at a line end if near.

    Args:
        documents: The text of each document.

    Returns:
        The parts to train on, and those to validate on.
    """
    train, validation = [], []
    for document in documents:
        cut = int(len(document) * (1 - VALIDATION_SHARE))
        newline = document.rfind("\n", int(cut * 0.98), cut)
        cut = newline + 1 if newline >= 0 else cut
        train.append(document[:cut])
        validation.append(document[cut:])
    return tuple(train), tuple(validation)


def trained_tokenizer(text: Text, vocabulary_size: int = 1024) -> Any:
    """A byte-level BPE tokenizer trained on the training documents, and kept in the cache. It knows every character.

    Args:
        text: What to train on.
        vocabulary_size: How many tokens to learn, 257 or more.

    Returns:
        A tokenizer of transformers.

    Raises:
        InputError: The vocabulary is smaller than the bytes, or the cache cannot be written.
    """
    from transformers import PreTrainedTokenizerFast

    if vocabulary_size < SMALLEST_VOCABULARY:
        raise InputError(f"a byte-level vocabulary has {SMALLEST_VOCABULARY} tokens or more, got {vocabulary_size}")

    def make(folder: Path) -> None:
        """Train the tokenizer and save it in the folder."""
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            text.train, vocab_size=vocabulary_size, special_tokens=[END_OF_TEXT], show_progress=False
        )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder)

    key = cache_key(text.train, {"vocabulary_size": vocabulary_size})
    return PreTrainedTokenizerFast.from_pretrained(cached_folder(f"tokenizer-{key}", make))


class Blocks(Dataset):
    """Tokens in blocks of equal length, as a data set of torch. An incomplete last block is dropped.

    An item has `input_ids` and `labels`, both (length,) and int64.

    Args:
        tokens: Token ids, (number of tokens,), int64.
        length: Tokens a block.
    """

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        count = len(tokens) // length
        self.length = length
        self.blocks = tokens[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}

    def evenly(self, count: int) -> Blocks:
        """At most `count` of the blocks, at equal distances."""
        if count >= len(self):
            return self
        return Blocks(self.blocks[torch.arange(count) * len(self) // count].flatten(), self.length)


def make_blocks(
    text: Text, tokenizer: Any, *, length: int, train_blocks: int = 1, validation_blocks: int = 1
) -> tuple[Blocks, Blocks]:
    """The blocks of the training documents, and those of the validation documents.

    Args:
        text: The documents.
        tokenizer: Makes the tokens.
        length: Tokens a block.
        train_blocks: How many blocks to train on are needed.
        validation_blocks: How many blocks to validate on are needed.

    Returns:
        Blocks to train on, blocks to validate on.

    Raises:
        InputError: There are fewer blocks than needed; the message has the counts.
    """
    return (
        _checked_blocks(tokenize(tokenizer, text.train), length, train_blocks, "training", text.source),
        _checked_blocks(tokenize(tokenizer, text.validation), length, validation_blocks, "validation", text.source),
    )


def _checked_blocks(tokens: torch.Tensor, length: int, needed: int, part: str, source: str) -> Blocks:
    """The tokens in blocks. Raises InputError, with the counts, where they are fewer than needed."""
    blocks = Blocks(tokens, length)
    if len(blocks) < needed:
        source = source if len(source) < 80 else source[:77] + "..."
        raise InputError(
            f"the text is too short: the {part} part of {source} has {len(tokens)} tokens and {needed * length} are "
            f"needed ({needed} blocks of {length}): give more text, or a smaller --length or --batch-size"
        )
    return blocks


def _python_files(root: Path) -> list[Path]:
    """The .py files below `root`, in the order of their relative path."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _text_column(split: Any, name: str, characters: int) -> str:
    """The column named text, else the first one that holds strings, as one document of at most so many characters."""
    columns = [column for column in split.column_names if getattr(split.features[column], "dtype", "") == "string"]
    if not columns:
        raise InputError(f"the dataset {name!r} has no column of text (its columns: {', '.join(split.column_names)})")
    column = "text" if "text" in columns else columns[0]
    pieces, taken = [], 0
    for row in split:
        piece = row[column] or ""
        pieces.append(piece)
        taken += len(piece)
        if taken >= characters:
            break
    return "\n".join(pieces)[:characters]
