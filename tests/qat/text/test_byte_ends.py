"""Bytes up to the end of each token, against texts whose tokens are known."""

import pytest
import saved_models

from qat.text.byte_ends import tokens_and_byte_ends
from spectra.backend.errors import InputError


def byte_level():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def test_letters_end_where_their_bytes_do():
    ids, ends = tokens_and_byte_ends(saved_models.tokenizer(28), "aäb€c")
    assert len(ids) == 5
    assert ends == [1, 3, 4, 7, 8]


def test_a_part_of_a_character_ends_where_the_character_does():
    ids, ends = tokens_and_byte_ends(byte_level(), "a€ b")
    assert len(ids) == 6
    assert ends == [1, 4, 4, 4, 5, 6]


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(InputError, match="--per-byte needs a fast tokenizer"):
        tokens_and_byte_ends(object(), "text")
