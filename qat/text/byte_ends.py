"""How many bytes of a text each token ends at, for losses a byte."""

from __future__ import annotations

from typing import Any

import numpy as np

from spectra.backend.errors import InputError


def tokens_and_byte_ends(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The tokens of a text, and for each the UTF-8 bytes of the text up to its end.

    A token that holds part of a character ends where the character does. A special token has no bytes of its own.

    Args:
        tokenizer: A fast tokenizer of transformers.
        text: The text.

    Returns:
        Token ids, and byte counts that never fall.

    Raises:
        InputError: The tokenizer does not say where in the text its tokens are.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("--per-byte needs a fast tokenizer (tokenizer.json), which knows where its tokens end")
    encoded = tokenizer(text, verbose=False, return_offsets_mapping=True)
    lengths = np.array([len(character.encode("utf-8", "surrogatepass")) for character in text], dtype=np.int64)
    bytes_before = np.concatenate([[0], np.cumsum(lengths)])
    ends = bytes_before[[end for _, end in encoded["offset_mapping"]]]
    return encoded["input_ids"], np.maximum.accumulate(ends).tolist()
