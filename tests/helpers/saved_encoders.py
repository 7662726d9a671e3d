"""A tiny BERT or ViT in a folder, as transformers saves them, and data for it."""

import json
from pathlib import Path

import saved_models
import tiny_models

LENGTH = 16
IMAGE_SIZE = 8


def tokenizer():
    """Letters as tokens, with BERT's special tokens in the place of the first five."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrs"]
    assert len(names) == tiny_models.VOCABULARY
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **{f"{name}_token": token for name, token in special.items()})


def bert(head, **options):
    """One of transformers' BERT classes, about a thousand parameters."""
    import torch
    import transformers

    config = transformers.BertConfig(
        vocab_size=tiny_models.VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=LENGTH,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, head)(config)
    return _spread(model)


def save_bert(folder, head="BertForMaskedLM", *, with_tokenizer=tokenizer, **options):
    """The folder, which now holds the model."""
    bert(head, **options).save_pretrained(folder)
    if with_tokenizer:
        with_tokenizer().save_pretrained(folder)
    return Path(folder)


def save_vit(folder, **options):
    """The folder, which now holds the model and its image processor."""
    import torch
    import transformers
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.ViTConfig(**shape, image_size=IMAGE_SIZE, patch_size=4, **{"num_labels": 3, **options})
    torch.manual_seed(0)
    _spread(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return Path(folder)


def _spread(model):
    import torch

    with torch.no_grad():
        for parameter in model.parameters():  # the usual .02 would leave a Hessian of nearly nothing
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def write_rows(folder, rows, name="rows.jsonl"):
    """A file of labelled texts; its path."""
    path = Path(folder) / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_rows(count=12, labels=(0, 1, 2)):
    text = saved_models.TEXT
    return [{"text": text[7 * i : 7 * i + 4 + i % 9], "label": labels[i % len(labels)]} for i in range(count)]


def write_images(folder, classes=("cat", "dog", "eel"), each=4, seed=0):
    """A folder for each class with images of several sizes; their folder."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    print(f"seed = {seed}")
    for name in classes:
        (Path(folder) / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 256, (10 + number, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder) / name / f"{number}.png")
    return Path(folder)
