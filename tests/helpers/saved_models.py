"""A tiny causal language model and its tokenizer in a folder, as transformers saves them."""

from pathlib import Path

import tiny_models

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n" * 60


def tokenizer(vocabulary=tiny_models.VOCABULARY):
    """Letters as tokens, and <end>."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<end>", "<unknown>", *"abcdefghijklmnopqrstuvwxyz"][:vocabulary]
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unknown>")


def save(folder, architecture="llama", *, with_tokenizer=True):
    """The folder, which now holds the model."""
    import torch

    tiny_models.causal_lm(architecture, dtype=torch.float32).save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return Path(folder)


def write_text(folder, text=TEXT, name="text.txt"):
    """A text file's path."""
    path = Path(folder) / name
    path.write_text(text, encoding="utf-8")
    return path
