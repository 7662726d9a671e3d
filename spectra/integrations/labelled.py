"""Batches for a classifier: texts with labels from a file, or images in a folder for each class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectra.backend.errors import InputError, first_line
from spectra.backend.extras import need
from spectra.integrations.loading import (
    from_folder_or_hub,
    longest_sequence,
    refuse_unknown_tokens,
    sequence_length,
)
from spectra.integrations.text_files import ROWS, decoded, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMS = '{"text": ..., "label": ...} on each line (.jsonl), or columns text and label (.csv, .tsv)'
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
UNNAMED = re.compile(r"LABEL_\d+")  # the names that transformers gives classes without a name
LISTED = 5  # names in a message

Row = tuple[str, str | None, Any]  # a text, its second text if it has one, its label


def read_labelled(files: Sequence[str | Path]) -> list[Row]:
    """Texts and labels.

    Args:
        files: UTF-8 files: .jsonl with an object on each line, or .csv or .tsv with a first line of names. Each row has
            a `text`, a `label`, and may have a second text, `text_pair`.

    Returns:
        The text, the second text or None, and the label of each row, in the order of the files.

    Raises:
        InputError: A file is missing, has another form, or a row lacks its text or its label.
    """
    rows: list[Row] = []
    for file in map(Path, files):
        text = decoded(file)
        if file.suffix.lower() not in ROWS:
            raise InputError(f"expected labelled text in a .jsonl, .csv or .tsv file, got {file}: {FORMS}")
        for line, row in rows_of(file, text, expected=FORMS):
            for name in ("text", "label"):
                if not isinstance(row, dict) or row.get(name) in (None, ""):
                    raise InputError(f"line {line} of {file} has no {name}: expected {FORMS}")
            rows.append((str(row["text"]), row.get("text_pair") or None, row["label"]))
    return rows


def labelled_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    sequences: int = 8,
    length: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, torch.Tensor]]:
    """Rows at equal distances, as padded batches with labels.

    Args:
        model: The model; its longest sequence, its classes and its device matter.
        tokenizer: The tokenizer of the model.
        rows: What `read_labelled` returned.
        sequences: How many rows to take.
        length: Tokens after which a row is cut; None is 256, or the model's longest sequence if that is shorter.
        batch_size: Rows a batch.

    Returns:
        Batches with what the tokenizer makes, and `labels`, (batch_size,): the number of a class, or the value for a
        model with one output.

    Raises:
        InputError: There are fewer rows, a label is none of the model's, or the tokenizer cannot pad or is another
            model's.
    """
    limits = (longest_sequence(model), tokenizer.model_max_length)
    length = sequence_length(min((limit for limit in limits if limit), default=None), length)
    chosen = _spread(rows, sequences, "rows")
    if batch_size > 1 and tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token, so rows cannot share a batch: give --batch-size 1")
    labels = _labels_of_rows(model.config, [label for _, _, label in chosen])
    batches = []
    for first in range(0, len(chosen), max(batch_size, 1)):
        part = chosen[first : first + batch_size]
        pairs = [pair or "" for _, pair, _ in part] if any(pair for _, pair, _ in part) else None
        encoded = tokenizer(
            [text for text, _, _ in part],
            pairs,
            padding=batch_size > 1,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        refuse_unknown_tokens(model, encoded["input_ids"])
        batch = {name: value.to(model.device) for name, value in encoded.items()}
        batches.append({**batch, "labels": labels[first : first + batch_size].to(model.device)})
    return batches


def _labels_of_rows(config: Any, labels: Sequence[Any]) -> torch.Tensor:
    """The numbers of classes, or the values for a regression."""
    if config.num_labels == 1 or config.problem_type == "regression":
        try:
            return torch.tensor([float(label) for label in labels])
        except (TypeError, ValueError):
            raise InputError("the model has one output, so labels are numbers: give numbers as labels") from None
    if config.problem_type == "multi_label_classification":
        raise InputError("the model gives several labels to a row: give its loss with --loss module:function")
    numbers = {str(i): i for i in range(config.num_labels)} | {str(k): int(v) for k, v in config.label2id.items()}
    unknown = [label for label in labels if str(label) not in numbers]
    if unknown:
        known = ", ".join(list(map(str, config.label2id))[:LISTED])
        raise InputError(
            f"label {unknown[0]!r} is none of the model's {config.num_labels} classes ({known}...): give their names, "
            f"or numbers from 0 to {config.num_labels - 1}"
        )
    return torch.tensor([numbers[str(label)] for label in labels])


def image_batches(
    model: PreTrainedModel,
    name: str,
    folder: str | Path,
    *,
    images: int = 8,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Images at equal distances in a folder with a folder for each class, as batches with labels.

    Args:
        model: The image classifier.
        name: Its folder or hub name, where its image processor is.
        folder: Its folders are named as the model's classes. Where the model's classes have no names and there are as
            many folders, they are taken in alphabetical order.
        images: How many images to take, from the list in the order of classes and names.
        batch_size: Images a batch.
        trust_remote_code: Run the code that an image processor brings along.

    Returns:
        Batches with `pixel_values` and `labels`, (batch_size,).

    Raises:
        InputError: There are no folders or fewer images, a folder is none of the model's classes, a file is no image,
            or the image processor cannot be loaded.
    """
    need("PIL")
    from PIL import Image
    from transformers import AutoImageProcessor

    files = _spread(_pictures(Path(folder), model.config), images, "images")
    processor = from_folder_or_hub(
        AutoImageProcessor.from_pretrained,
        "an image processor",
        name,
        files=("preprocessor_config.json", "processor_config.json"),
        remedy="give a model together with its image processor",
        trust_remote_code=trust_remote_code,
    )
    batches = []
    for first in range(0, len(files), max(batch_size, 1)):
        part = files[first : first + batch_size]
        pictures = []
        for file, _ in part:
            try:
                with Image.open(file) as picture:
                    pictures.append(picture.convert("RGB"))
            except Exception as error:  # a dozen classes for a file that is none or is damaged
                raise InputError(f"{file} cannot be read as an image ({first_line(error)}): take it away") from None
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        labels = torch.tensor([label for _, label in part])
        batches.append({"pixel_values": pixels.to(model.device), "labels": labels.to(model.device)})
    return batches


def _pictures(folder: Path, config: Any) -> list[tuple[Path, int]]:
    """The image files of each class, with its number."""
    if not folder.is_dir():
        raise InputError(f"expected a folder of images, but there is no folder {folder}: check the path")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise InputError(f"expected a folder for each class in {folder}, but it holds none: sort the images into them")
    numbers = {str(label): int(number) for label, number in config.label2id.items()}
    if all(map(UNNAMED.fullmatch, numbers)) and len(classes) == config.num_labels:
        numbers |= {path.name: i for i, path in enumerate(classes)}
    unknown = [path.name for path in classes if path.name not in numbers]
    if unknown:
        raise InputError(
            f"folder {unknown[0]} is none of the model's {config.num_labels} classes "
            f"({', '.join(list(numbers)[:LISTED])}...): name the folders as the model's classes"
        )
    files = [(path, sorted(path.rglob("*"))) for path in classes]
    return [(file, numbers[path.name]) for path, found in files for file in found if file.suffix.lower() in PICTURES]


def _spread(items: Sequence[Any], count: int, what: str) -> list[Any]:
    """`count` items at equal distances."""
    if not 1 <= count <= len(items):
        raise InputError(f"{count} {what} are asked for and there are {len(items)}: give more, or --sequences")
    return [items[i * len(items) // count] for i in range(count)]
